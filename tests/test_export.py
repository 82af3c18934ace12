"""Stage 1: the exported model's interface, its own proof of it, and what it refuses."""
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

import export_onnx
from conftest import ROOT, check_error, script
from DeepMAR import DeepMAR_ResNet50, load_model

OLD = torch.__version__.startswith("1.6.")  # the guide's stack


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with checkpoint.pth.tar, of a random network with random weights."""
    path = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    model = DeepMAR_ResNet50()
    state = {"module." + key: value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state}, str(path / "checkpoint.pth.tar"))
    return path


def interface(value):
    return value.name, value.type.tensor_type.elem_type, [size.dim_value for size in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("batch, arguments", [
    (1, ["checkpoint.pth.tar", "deepmar.onnx", "1"]),
    (3, ["--input_file=checkpoint.pth.tar", "--output_file=deepmar.onnx", "--batch_size=3"])])
def test_export(folder, batch, arguments):
    process = script("export_onnx.py", *arguments, cwd=folder)
    assert process.returncode == 0 and process.stderr == "", process.stderr
    assert re.match(r"deepmar.onnx: batch size %d, 35 attributes, opset 11; ONNX Runtime and PyTorch differ by at most "
                    r"[0-9.e+-]+ \(largest logit [0-9.e+-]+\)\n$" % batch, process.stdout), process.stdout
    assert sorted(os.listdir(str(folder))) == ["checkpoint.pth.tar", "deepmar.onnx"]
    model = onnx.load(str(folder / "deepmar.onnx"))
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(model), full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 11)]
    assert [interface(value) for value in model.graph.input] == [
        ("actual_input_1", onnx.TensorProto.FLOAT, [batch, 3, 224, 224])]
    assert [interface(value) for value in model.graph.output] == [("output1", onnx.TensorProto.FLOAT, [batch, 35])]
    images = np.random.RandomState(9).standard_normal((batch, 3, 224, 224)).astype(np.float32)
    session = onnxruntime.InferenceSession(str(folder / "deepmar.onnx"), providers=["CPUExecutionProvider"])
    logits, = session.run(["output1"], {"actual_input_1": images})
    with torch.no_grad():
        expected = load_model(str(folder / "checkpoint.pth.tar"))(torch.from_numpy(images)).numpy()
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * max(1, np.abs(expected).max()))

    types = Counter(node.op_type for node in model.graph.node)
    assert types["Conv"] == 53
    if OLD:  # the guide's famous node, and BatchNorm as it was
        assert types["BatchNormalization"] == 53
        assert [node.name for node in model.graph.node if node.op_type == "Pad"] == ["Pad_173"]
        process = script("remove_pad.py", "deepmar.onnx", "nopad.onnx", cwd=folder)
        assert process.returncode == 0 and "removed Pad_173" in process.stdout
        nopad = onnx.load(str(folder / "nopad.onnx"))
        assert [node.name for node in nopad.graph.node] == [
            node.name for node in model.graph.node if node.name not in ("Constant_172", "Pad_173")]
        session = onnxruntime.InferenceSession(str(folder / "nopad.onnx"), providers=["CPUExecutionProvider"])
        assert np.array_equal(session.run(["output1"], {"actual_input_1": images})[0], logits)
        os.remove(str(folder / "nopad.onnx"))
    else:
        assert types["Pad"] == 0


def test_a_mismatch_is_an_error_and_leaves_no_file(folder, monkeypatch):
    """Another network's graph in the file: the earlier output stays."""
    real = export_onnx.export

    def wrong(model, path, batch_size):
        other = DeepMAR_ResNet50().eval()
        real(other, path, batch_size)
    monkeypatch.setattr(export_onnx, "export", wrong)
    (folder / "earlier.onnx").write_text("earlier")
    for name in ("earlier.onnx", "new.onnx"):
        with pytest.raises(ValueError, match="differ from PyTorch's by"):
            export_onnx.main([str(folder / "checkpoint.pth.tar"), str(folder / name), "1"])
    assert (folder / "earlier.onnx").read_text() == "earlier"
    assert not [name for name in os.listdir(str(folder)) if "partial" in name or name == "new.onnx"]
    os.remove(str(folder / "earlier.onnx"))


@pytest.mark.parametrize("wrong", [
    [], ["c"], ["c", "o"], ["c", "o", "0"], ["c", "o", "-1"], ["c", "o", "x"], ["c", "o", "1.5"], ["c", "o", ""],
    ["c", "o", "1", "2"], ["c", "o", "--batch_size=1"], ["--input_file=c"], ["--input_file=c", "--output_file=o",
                                                                            "--batch_size=0"], ["--bs=1"]])
def test_usage(folder, wrong):
    check_error(script("export_onnx.py", *wrong, cwd=folder), code=2)


def test_errors(folder, tmp_path):
    check_error(script("export_onnx.py", "nowhere.pth", "o.onnx", 1, cwd=folder), "nowhere.pth")
    check_error(script("export_onnx.py", "checkpoint.pth.tar", "nowhere/o.onnx", 1, cwd=folder), "nowhere/o.onnx")
    (tmp_path / "page.pth").write_text("<!DOCTYPE html>")
    check_error(script("export_onnx.py", tmp_path / "page.pth", "o.onnx", 1, cwd=folder), "page.pth", "no PyTorch")
    assert os.listdir(str(folder)) == ["checkpoint.pth.tar"] or "o.onnx" not in os.listdir(str(folder))


def test_in_the_open_source_repository(folder, tmp_path):
    """Copied into its root, where the model is baseline/model/DeepMAR.py."""
    (tmp_path / "baseline" / "model").mkdir(parents=True)
    shutil.copy(os.path.join(ROOT, "export_onnx.py"), str(tmp_path))
    shutil.copy(os.path.join(ROOT, "DeepMAR.py"), str(tmp_path / "baseline" / "model"))
    process = subprocess.run([sys.executable, "export_onnx.py", str(folder / "checkpoint.pth.tar"), "o.onnx", "1"],
                             cwd=str(tmp_path), stderr=subprocess.PIPE)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "o.onnx").stat().st_size > 9e7
