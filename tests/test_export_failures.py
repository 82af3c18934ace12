"""export_onnx.py when something fails: one line, no file left, an earlier output whole.

Most run in a copy of the open-source repository's layout, where baseline/model/DeepMAR.py is a small network of ours.
"""
import os
import shutil

import pytest

from helpers import NETWORK, ROOT, check_error, script, started


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
    returned, message = FAILURES[failure]
    (tmp_path / "out.onnx").write_bytes(b"of yesterday")
    check_error(checkout(NETWORK % returned), "export_onnx.py: error: ", message)
    assert checkout.new == set() and (tmp_path / "out.onnx").read_bytes() == b"of yesterday"


def test_a_batch_larger_than_the_memory_is_an_error(checkout):
    check_error(checkout(NETWORK % "x", batch_size=999999999), "out.onnx: was not exported: ")
    assert checkout.new == set()


def test_an_output_that_cannot_be_written_is_an_error_before_the_work(checkout, tmp_path):
    """The export of this network would fail."""
    for output in ("nowhere/out.onnx", "export_onnx.py/out.onnx", "/proc/out.onnx"):
        check_error(checkout(NETWORK % "torch.erfinv(x)", output), "export_onnx.py: error: ", output)
        assert checkout.new == set()
    (tmp_path / "folder.onnx").mkdir()
    check_error(checkout(NETWORK % "x", "folder.onnx"), "folder.onnx")
    assert checkout.new == set()


def test_a_missing_network_is_an_error(checkout):
    check_error(checkout(None), "export_onnx.py: error: ", "DeepMAR")
    check_error(checkout("import torch"), "export_onnx.py: error: ", "load_model")  # the repository's own DeepMAR.py


def test_a_mismatch_within_the_tolerance_is_printed(checkout):
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
