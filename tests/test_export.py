"""Stage 1: the exported model's interface, the check against PyTorch, and what the script refuses."""
import os
import re
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import DeepMAR
import export_onnx
from DeepMAR import DeepMAR_ResNet50, load_model
from helpers import ROOT, check_error, script

OLD = torch.__version__.startswith("1.6.")  # the guide's stack
torch.set_num_threads(1)  # threads that wait for each other are slow on a busy machine


def interface(value):
    return value.name, value.type.tensor_type.elem_type, [size.dim_value for size in value.type.tensor_type.shape.dim]


def test_the_exported_model_computes_the_networks_logits(first_run):
    """The real network, in run_all.sh's first run."""
    work, process = first_run
    assert process.returncode == 0, process.stderr
    assert re.search(r"\ndeepmar_bs1.onnx: batch size 1, images of 224 x 224 \(height x width\), last_conv_stride 2, 35 attributes, "
                     r"opset 11; ONNX Runtime and PyTorch differ by at most [0-9.e+-]+ \(largest logit [0-9.e+-]+\)\n",
                     process.stdout), process.stdout
    path = os.path.join(work, "deepmar_bs1.onnx")
    model = onnx.load(path)
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(model), full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 11)]
    assert [interface(value) for value in model.graph.input] == [
        ("actual_input_1", onnx.TensorProto.FLOAT, [1, 3, 224, 224])]
    assert [interface(value) for value in model.graph.output] == [("output1", onnx.TensorProto.FLOAT, [1, 35])]
    images = np.random.RandomState(9).standard_normal((1, 3, 224, 224)).astype(np.float32)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    logits, = session.run(["output1"], {"actual_input_1": images})
    with torch.no_grad():
        expected = load_model(os.path.join(work, "sample", "checkpoint.pth.tar"))(torch.from_numpy(images)).numpy()
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * max(1, np.abs(expected).max()))

    types = Counter(node.op_type for node in model.graph.node)
    assert types["Conv"] == 53
    if OLD:  # the guide's famous node, and BatchNorm as it was
        assert types["BatchNormalization"] == 53
        assert [node.name for node in model.graph.node if node.op_type == "Pad"] == ["Pad_173"]
        assert "removed Pad_173" in process.stdout
        path = os.path.join(work, "deepmar_bs1_nopad.onnx")
        assert [node.name for node in onnx.load(path).graph.node] == [
            node.name for node in model.graph.node if node.name not in ("Constant_172", "Pad_173")]
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        assert np.array_equal(session.run(["output1"], {"actual_input_1": images})[0], logits)
    else:
        assert types["Pad"] == 0


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder with c.pth: two state dicts of a small network of 4 attributes. main() takes it for a DeepMAR."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DeepMAR, "BLOCKS", [1, 1, 1, 1])
    torch.manual_seed(0)
    states = [DeepMAR_ResNet50(num_att=4).state_dict() for _ in range(2)]
    torch.save({"state_dict": states[0], "ema": {"module": {"module." + k: v for k, v in states[1].items()}}}, "c.pth")
    return tmp_path, states


def test_another_networks_graph_is_an_error_and_keeps_the_earlier_output(small, monkeypatch):
    folder, _ = small
    real = export_onnx.export

    def wrong(model, shape):
        return real(DeepMAR_ResNet50(num_att=4).eval(), shape)
    monkeypatch.setattr(export_onnx, "export", wrong)
    (folder / "earlier.onnx").write_text("earlier")
    for name in ("earlier.onnx", "new.onnx"):
        with pytest.raises(ValueError, match="differ from PyTorch's by"):
            export_onnx.main(["c.pth", name, "1", "--size", "64", "64"])
    assert (folder / "earlier.onnx").read_text() == "earlier"
    assert sorted(os.listdir(str(folder))) == ["c.pth", "earlier.onnx"]


@pytest.mark.parametrize("options, stride, size, which", [
    (["c.pth", "o.onnx", "2", "--last-conv-stride", "1"], 1, (224, 224), 0),
    (["--size", "128", "64", "--last_conv_stride=1", "c.pth", "o.onnx", "2"], 1, (128, 64), 0),
    (["--input_file=c.pth", "--output_file=o.onnx", "--batch_size=2", "--size", "100", "60", "--state-dict=ema", "--num-att=4"],
     2, (100, 60), 1)])
def test_stride_size_and_state_dict_are_those_of_the_options(small, capsys, options, stride, size, which):
    _, states = small
    export_onnx.main(options)
    note, summary = capsys.readouterr().out.splitlines()
    names = ["state_dict", "ema.module"]
    assert note == "c.pth: took the state dict %s; it also has: %s (--state-dict NAME takes another)" % (
        names[which], names[1 - which])
    assert "o.onnx: batch size 2, images of %d x %d (height x width), last_conv_stride %d, 4 attributes, " % (
        size + (stride,)) in summary
    assert [interface(value) for value in onnx.load("o.onnx").graph.input] == [
        ("actual_input_1", onnx.TensorProto.FLOAT, [2, 3] + list(size))]
    images = np.random.RandomState(9).standard_normal((2, 3) + size).astype(np.float32)
    session = onnxruntime.InferenceSession("o.onnx", providers=["CPUExecutionProvider"])
    logits, = session.run(["output1"], {"actual_input_1": images})
    expected = {}
    for other in (1, 2):
        model = DeepMAR_ResNet50(num_att=4, last_conv_stride=other).eval()
        model.load_state_dict(states[which])
        with torch.no_grad():
            expected[other] = model(torch.from_numpy(images)).numpy()
    assert np.abs(logits - expected[stride]).max() < 1e-4 * max(1, np.abs(expected[stride]).max())
    assert np.abs(logits - expected[3 - stride]).max() > 1e-2 * np.abs(expected[stride]).max()  # a wrong one is not noticed


def test_a_wrong_number_of_attributes_or_state_dict_is_an_error_before_the_export(small, monkeypatch):
    monkeypatch.setattr(export_onnx, "export", None)
    with pytest.raises(ValueError, match="c.pth: was trained for 4 attributes, but --num-att asks for 35"):
        export_onnx.main(["c.pth", "o.onnx", "1", "--num-att", "35"])
    with pytest.raises(ValueError, match="c.pth: has no state dict momentum; it has: state_dict, ema.module"):
        export_onnx.main(["c.pth", "o.onnx", "1", "--state-dict", "momentum"])
    assert os.listdir(".") == ["c.pth"]


@pytest.mark.parametrize("wrong", [
    [], ["c"], ["c", "o"], ["c", "o", "1", "2"], ["c", "o", "--batch_size=1"], ["--input_file=c"], ["--bs=1"],
    ["c", "o", "1", "--last-conv-stride", "3"], ["c", "o", "1", "--size", "224"], ["c", "o", "1", "--size", "224", "0"],
    ["c", "o", "1", "--size", "2.5", "2"], ["c", "o", "1", "--size", "\u0661", "2"], ["c", "o", "1", "--num-att", "0"],
    ["c", "o", "1", "--num-att"], ["c", "o", "1", "--state-dict"]])
def test_wrong_arguments_are_usage_errors(capsys, wrong):
    with pytest.raises(SystemExit) as exit_:
        export_onnx.main(wrong)
    assert exit_.value.code == 2 and "export_onnx.py: error: " in capsys.readouterr().err


@pytest.mark.parametrize("batch_size", ["0", "-1", "1.5", "x", "", " 1", "0x1", "1e3", "\u0661", "1" * 5000])
def test_the_batch_size_must_be_a_positive_number(capsys, batch_size):
    for arguments in (["--", "c", "o", batch_size], ["--input_file=c", "--output_file=o", "--batch_size=" + batch_size]):
        with pytest.raises(SystemExit) as exit_:
            export_onnx.main(arguments)
        assert exit_.value.code == 2 and "BATCH_SIZE must be a positive whole number" in capsys.readouterr().err


def test_a_file_that_is_no_checkpoint_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.pth").write_text("<!DOCTYPE html>")
    check_error(script("export_onnx.py", "page.pth", "o.onnx", 1, cwd=tmp_path), "export_onnx.py: error: page.pth: is not a PyTorch")
    with pytest.raises(OSError, match="nowhere.pth: no such file"):
        export_onnx.main(["nowhere.pth", "o.onnx", "1"])
    assert os.listdir(".") == ["page.pth"]


@pytest.fixture
def places(small):
    """A folder with copies of the two files alone, a link to one of them, and copies in the open-source repository's layout."""
    folder, _ = small
    with open(os.path.join(ROOT, "DeepMAR.py")) as f:
        source = f.read()
    assert source.count("BLOCKS = [3, 4, 6, 3]") == 1
    for network in ("project/DeepMAR.py", "repository/baseline/model/DeepMAR.py"):
        (folder / network).parent.mkdir(parents=True)
        (folder / network).write_text(source.replace("BLOCKS = [3, 4, 6, 3]", "BLOCKS = [1, 1, 1, 1]"))
        shutil.copy(os.path.join(ROOT, "export_onnx.py"), str(folder / network.partition("/")[0]))
    for package in ("baseline", "baseline/model"):
        (folder / "repository" / package / "__init__.py").write_text("")
    (folder / "link.py").symlink_to(folder / "project" / "export_onnx.py")
    (folder / "elsewhere").mkdir()
    return folder


def test_a_copy_finds_its_network_from_any_folder(places):
    """With PYTHONSAFEPATH (Python 3.11). The program that reads the output has ended, as head does."""
    process = subprocess.run(
        '"%s" ../repository/export_onnx.py ../c.pth o.onnx 1 --size 64 64 | true; echo ${PIPESTATUS[0]}' % sys.executable,
        shell=True, executable="/bin/bash", env=dict(os.environ, PYTHONSAFEPATH="1"), cwd=str(places / "elsewhere"), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, universal_newlines=True)
    assert process.stderr == "" and process.stdout == "141\n"
    assert os.listdir(str(places / "elsewhere")) == ["o.onnx"]


def test_names_that_the_terminal_cannot_show_are_escaped(places):
    """A file name that is not UTF-8, and a state dict with a Chinese name, on an ASCII terminal. By a link."""
    torch.save({"\u6a21\u578b": DeepMAR_ResNet50(num_att=4).state_dict()}, "c.pth")
    name = os.fsdecode(b"\xff\xe9.pth")
    os.rename("c.pth", name)
    ascii_ = {"PYTHONSAFEPATH": "1", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    process = subprocess.run([sys.executable, "../link.py", "../" + name, name + ".onnx", "1", "--size", "64", "64"],
                             cwd=str(places / "elsewhere"), env=dict(os.environ, **ascii_), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.returncode == 0 and b"took its only state dict, \\u6a21\\u578b" in process.stdout, process
    assert os.listdir(str(places / "elsewhere")) == [name + ".onnx"]
