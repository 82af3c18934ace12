"""The two stacks against each other; tests/run.sh runs it where both Pythons are there, after the tests of each.

Every checkpoint (made on either Python), exported on either, run on either: logits agree to 1e-4, and no attribute
flips that is not within that of 0.
"""
import itertools
import os
import re
import subprocess

import numpy as np
import pytest

from conftest import ROOT

PYTHONS = os.environ["DEEPMAR_TEST_PYTHONS"].split(":")
SHARED = os.environ["DEEPMAR_TEST_SHARED"]
SAMPLES = sorted(os.path.join(SHARED, name) for name in os.listdir(SHARED) if re.fullmatch(r"sample-[0-9.]+[0-9]", name))


@pytest.mark.parametrize("sample", SAMPLES, ids=os.path.basename)
def test_stacks_agree(sample, tmp_path):
    assert len(PYTHONS) == len(SAMPLES) == 2

    def run(python, script, *arguments):
        subprocess.run([PYTHONS[python], os.path.join(ROOT, script)] + list(arguments), check=True, cwd=str(tmp_path))

    run(0, "preprocess_deepmar_pytorch.py", sample + "/images", "input_bin", sample + "/image.txt")
    run(0, "get_info.py", "input_bin", "deepmar.info", "224", "224")
    logits = {}
    for exporter, runner in itertools.product(range(2), range(2)):
        if runner == 0:
            run(exporter, "export_onnx.py", sample + "/checkpoint.pth.tar", "%d.onnx" % exporter, "1")
        run(runner, "tools/benchmark.py", "-batch_size=1", "-om_path=%d.onnx" % exporter,
            "-device_id=%d%d" % (exporter + 1, runner), "-input_text_path=deepmar.info")
        folder = str(tmp_path / "result" / ("dumpOutput_device%d%d" % (exporter + 1, runner)))
        logits[exporter, runner] = np.stack([np.fromfile(os.path.join(folder, name), "<f4")
                                             for name in sorted(os.listdir(folder))])
    first = logits[0, 0]
    assert first.shape == (12, 35) and np.abs(first).max() > 1
    for other in logits.values():
        assert np.abs(other - first).max() <= 1e-4
        flipped = (other >= 0) != (first >= 0)
        assert (np.abs(first[flipped]) <= 1e-4).all()
    print("largest difference between the stacks: %.3g (largest logit %.3g)"
          % (max(np.abs(other - first).max() for other in logits.values()), np.abs(first).max()))
