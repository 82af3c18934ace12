"""Compares the two stacks. tests/run.sh runs this file after the tests of both Pythons, if there are two.

The sample's checkpoint is exported on either and run on either. The logits must agree to 1e-4, and an attribute may only flip
if its logit is that close to 0. A checkpoint made on either must be the same network on the other.
"""
import itertools
import os
import subprocess

import numpy as np
from helpers import ROOT


PYTHONS = os.environ["DEEPMAR_TEST_PYTHONS"].split(":")
# Makes a checkpoint of a small network, or prints what it computes: CODE make|run PATH
SMALL = """
import os, sys
sys.path.insert(0, os.environ["ROOT"])
import torch, DeepMAR
DeepMAR.BLOCKS = [1, 1, 1, 1]
torch.manual_seed(0)
if sys.argv[1] == "make":
    torch.save({"state_dict": DeepMAR.DeepMAR_ResNet50().state_dict()}, sys.argv[2])
images = torch.arange(3.0 * 64 * 64).reshape(1, 3, 64, 64).sin()
with torch.no_grad():
    print(DeepMAR.load_model(sys.argv[2])(images).sum().item())
"""


def run(python, *command, **settings):
    return subprocess.run([PYTHONS[python]] + [str(word) for word in command], check=True, stdout=subprocess.PIPE,
                          universal_newlines=True, **settings).stdout


def test_stacks_agree(shared_folder):
    versions = [run(python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])").strip() for python in range(2)]
    works = [os.path.join(shared_folder, "first-" + version, "work") for version in versions]
    logits = {}
    for exporter, runner in itertools.product(range(2), range(2)):
        device = "%d%d" % (exporter + 1, runner)
        run(runner, os.path.join(ROOT, "tools", "benchmark.py"), "-batch_size=1", "-device_id=" + device,
            "-om_path=" + os.path.join(os.path.relpath(works[exporter], works[0]), "deepmar_bs1.onnx"),
            "-input_text_path=deepmar.info", cwd=works[0])
        folder = os.path.join(works[0], "result", "dumpOutput_device" + device)
        logits[exporter, runner] = np.stack([np.fromfile(os.path.join(folder, name), "<f4")
                                             for name in sorted(os.listdir(folder))])
    one = logits[0, 0]
    assert one.shape == (12, 35) and np.abs(one).max() > 1
    for other in logits.values():
        assert np.abs(other - one).max() <= 1e-4
        flipped = (other >= 0) != (one >= 0)
        assert (np.abs(one[flipped]) <= 1e-4).all()
    print("largest difference between the stacks: %.3g (largest logit %.3g)"
          % (max(np.abs(other - one).max() for other in logits.values()), np.abs(one).max()))


def test_checkpoints_of_the_other_stack(tmp_path):
    for maker in range(2):
        path = tmp_path / ("%d.pth" % maker)
        sums = [float(run(python, "-c", SMALL, what, path, env=dict(os.environ, ROOT=ROOT)))
                for python, what in ((maker, "make"), (1 - maker, "run"))]
        assert abs(sums[0] - sums[1]) < 1e-4 * abs(sums[0]) and sums[0]
