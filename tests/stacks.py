"""The two stacks against each other; tests/run.sh runs it where both Pythons are there, after the tests of each.

Every checkpoint (made on either Python), exported on either, run on either: logits agree to 1e-4, and no attribute
flips that is not within that of 0.
"""
import itertools
import os
import subprocess

import numpy as np
import pytest

from conftest import ROOT

PYTHONS = os.environ["DEEPMAR_TEST_PYTHONS"].split(":")
WORK = sorted(os.path.join(os.environ["DEEPMAR_TEST_STACKS"], name)
              for name in os.listdir(os.environ["DEEPMAR_TEST_STACKS"]))


@pytest.mark.parametrize("work", WORK, ids=os.path.basename)
def test_stacks_agree(work, tmp_path):
    assert len(PYTHONS) == len(WORK) == 2
    logits = {}
    for exporter, runner in itertools.product(range(2), range(2)):
        if runner == 0:
            subprocess.run([PYTHONS[exporter], os.path.join(ROOT, "export_onnx.py"), work + "/sample/checkpoint.pth.tar",
                            str(tmp_path / ("%d.onnx" % exporter)), "1"], check=True)
        subprocess.run([PYTHONS[runner], os.path.join(ROOT, "tools", "benchmark.py"), "-batch_size=1",
                        "-om_path=%s" % (tmp_path / ("%d.onnx" % exporter)), "-device_id=%d%d" % (exporter + 1, runner),
                        "-input_text_path=deepmar.info"], check=True, cwd=work)
        folder = os.path.join(work, "result", "dumpOutput_device%d%d" % (exporter + 1, runner))
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
