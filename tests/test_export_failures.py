"""export_onnx.py when something fails: one line, no file left, an earlier output whole.

Most run in a copy of the open-source repository's layout, where baseline/model/DeepMAR.py is a small network of ours.
"""
import os
import shutil

import numpy as np
import onnxruntime
import pytest
import torch
from helpers import NETWORK, ROOT, check_error, script, started

import DeepMAR
import export_onnx
from DeepMAR import DeepMAR_ResNet50

@pytest.fixture
def checkout(tmp_path):
    """Writes the small network, what it returns given as an expression; returns a way to run its export_onnx.py."""
    (tmp_path / "baseline" / "model").mkdir(parents=True)
    shutil.copy(os.path.join(ROOT, "export_onnx.py"), str(tmp_path))
    (tmp_path / "any.pth").write_bytes(b"checkpoint")

    def run(network, output="out.onnx", batch_size=2):
        if network:
            (tmp_path / "baseline" / "model" / "DeepMAR.py").write_text(network)
        before = set(os.listdir(str(tmp_path)))
        process = script(tmp_path / "export_onnx.py", "any.pth", output, batch_size, cwd=tmp_path)
        run.new = set(os.listdir(str(tmp_path))) - before
        return process
    return run


def test_the_small_network_exports(checkout, tmp_path):
    process = checkout(NETWORK % "x")
    assert process.returncode == 0, process.stderr
    assert checkout.new == {"out.onnx"} and "last_conv_stride 2, 35 attributes, opset 11" in process.stdout


FAILURES = {
    "exports another result": ("x + 1 if torch.onnx.is_in_onnx_export() else x", "differ from PyTorch's by 1 "),
    "exports another shape": ("x[:, :7] if torch.onnx.is_in_onnx_export() else x", "shape (2, 7), PyTorch (2, 35)"),
    "exports NaN": ("x * float('nan') if torch.onnx.is_in_onnx_export() else x", "differ from PyTorch's by nan"),
    "computes NaN": ("x * float('nan')", "differ from PyTorch's by nan"),
    "has no operator in ONNX": ("torch.erfinv(x)", "out.onnx: was not exported: "),
    "fails in torch": ("x @ x", "out.onnx: was not exported: RuntimeError: "),
    "raises many lines": ("(_ for _ in ()).throw(RuntimeError('one\\ntwo'))", "not exported: RuntimeError: one two"),
    "does not depend on the input": ("torch.zeros(2, 35)", "out.onnx: was not exported: "),
}


@pytest.mark.parametrize("failure", sorted(FAILURES))
def test_a_failure_is_one_line_and_keeps_the_earlier_output(checkout, tmp_path, failure):
    returned, said = FAILURES[failure]
    (tmp_path / "out.onnx").write_bytes(b"of yesterday")
    check_error(checkout(NETWORK % returned), "export_onnx.py: error: ", said)
    assert checkout.new == set() and (tmp_path / "out.onnx").read_bytes() == b"of yesterday"


def test_a_batch_that_does_not_fit_into_memory(checkout):
    check_error(checkout(NETWORK % "x", batch_size=999999999), "out.onnx: was not exported: ")
    assert checkout.new == set()


def test_an_output_that_cannot_be_written(checkout, tmp_path):
    """Said before the work is done: the network would fail."""
    for output in ("nowhere/out.onnx", "export_onnx.py/out.onnx", "/proc/out.onnx"):
        check_error(checkout(NETWORK % "torch.erfinv(x)", output), "export_onnx.py: error: ", output)
        assert checkout.new == set()
    (tmp_path / "folder.onnx").mkdir()
    check_error(checkout(NETWORK % "x", "folder.onnx"), "folder.onnx")
    assert checkout.new == set()


def test_no_model_beside_it(checkout):
    check_error(checkout(None), "export_onnx.py: error: ", "DeepMAR")
    check_error(checkout("import torch"), "export_onnx.py: error: ", "load_model")  # the repository's own DeepMAR.py


def test_a_mismatch_within_the_tolerance_is_told(checkout):
    process = checkout(NETWORK % "x + 5e-5 if torch.onnx.is_in_onnx_export() else x")
    assert process.returncode == 0 and "differ by at most 5e-05 (" in process.stdout, process
    check_error(checkout(NETWORK % "x + 2e-4 if torch.onnx.is_in_onnx_export() else x"), "by 0.0002 (")


def test_help_and_usage_need_no_torch(tmp_path, monkeypatch):
    for module in ("torch", "onnx", "onnxruntime", "numpy"):
        (tmp_path / (module + ".py")).write_text("raise SystemExit('it was imported')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = started("export_onnx.py", "--help")
    assert process.returncode == 0 and "--batch_size" in process.stdout, process.stderr
    check_error(started("export_onnx.py", "in.pth", "out.onnx", "eight"), "'eight'", code=2)


@pytest.mark.parametrize("batch_size", ["0", "-1", "1.5", "x", "", " 1", "0x1", "1e3", "\u0661", "1" * 5000])
@pytest.mark.parametrize("named", [False, True])
def test_a_batch_size_must_be_a_positive_number(capsys, batch_size, named):
    arguments = ["in.pth", "out.onnx", batch_size]
    if named:
        arguments = ["--input_file=in.pth", "--output_file=out.onnx", "--batch_size=" + batch_size]
    elif batch_size == "-1":
        arguments.insert(0, "--")
    with pytest.raises(SystemExit) as exit_:
        export_onnx.main(arguments)
    assert exit_.value.code == 2 and "BATCH_SIZE must be a positive whole number" in capsys.readouterr().err


@pytest.mark.parametrize("attributes", [26, 51])
def test_another_number_of_attributes_needs_no_option(tmp_path, capsys, monkeypatch, attributes):
    monkeypatch.setattr(DeepMAR, "BLOCKS", [1, 1, 1, 1])
    torch.manual_seed(0)
    model = DeepMAR_ResNet50(num_att=attributes).eval()
    torch.save(model.state_dict(), str(tmp_path / "model.pth"))
    export_onnx.main([str(tmp_path / "model.pth"), str(tmp_path / "out.onnx"), "1"])
    assert "%d attributes" % attributes in capsys.readouterr().out
    x = np.random.RandomState(1).standard_normal((1, 3, 224, 224)).astype(np.float32)
    session = onnxruntime.InferenceSession(str(tmp_path / "out.onnx"), providers=["CPUExecutionProvider"])
    logits, = session.run(["output1"], {"actual_input_1": x})
    with torch.no_grad():
        expected = model(torch.from_numpy(x)).numpy()
    assert logits.shape == (1, attributes) and np.abs(logits - expected).max() < 1e-4 * max(1, np.abs(expected).max())
