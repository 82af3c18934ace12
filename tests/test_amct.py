"""The INT8 twin (tools/rehearse.py int8) against the genuine AMCT, on the sample's network.

    AMCT=FOLDER bash tests/run.sh -k amct

FOLDER holds a checkout of github.com/hicann/amct. It stays as it is. AMCT runs on the CPU, for one or two minutes.
"""
import importlib.util
import os
import re
import subprocess
import sys

import numpy as np
import onnx
import pytest

from helpers import ROOT, script
from lib import int8
from lib.bins import list_bins
from lib.session import cpu_session, open_session

AMCT = os.environ.get("AMCT")
IMAGES = 4


def test_twin_is_what_amct_makes(first_run, tmp_path):
    if not AMCT:
        pytest.skip("NOT RUN with the genuine AMCT: AMCT=FOLDER names a checkout of github.com/hicann/amct")
    if sys.version_info < (3, 8) or not importlib.util.find_spec("grpc_tools"):
        pytest.skip("NOT RUN with the genuine AMCT: it needs a current Python with the package grpcio-tools")
    work, _ = first_run
    model, bins = os.path.join(work, "deepmar_bs1_nopad.onnx"), os.path.join(work, "input_bin")
    done = script("tools/rehearse.py", "int8", model, bins, tmp_path / "t.onnx", "--images", IMAGES)
    assert done.returncode == 0, done.stderr
    genuine = subprocess.run([sys.executable, os.path.join(ROOT, "tests", "amct.py"), os.path.abspath(AMCT),
                              os.path.join(work, "sample", "checkpoint.pth.tar"), model, "t_amct/calibration", "t_amct/quant.cfg"],
                             cwd=str(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert genuine.returncode == 0, genuine.stdout[-3000:]

    entry = r"key: \"(.*)\"\s+value {\s+scale_d: (\S+)\s+offset_d: (\S+)\s+((?:scale_w: \S+\s+)+)"
    record = re.findall(entry, (tmp_path / "record.txt").read_text())
    record = {name: (float(scale), int(offset), np.float32(weights.split()[1::2])) for name, scale, offset, weights in record}
    amcts = onnx.load(str(tmp_path / "twin_fake_quant_model.onnx"))
    names = [node.name for node in amcts.graph.node if node.op_type in ("Conv", "AveragePool", "Gemm")]
    assert len(names) == 55 and set(names) == set(record)

    float32 = onnx.load(model)
    int8.fold(float32)
    layers = int8.find_layers(float32, model)
    twin = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(str(tmp_path / "t.onnx")).graph.initializer}
    _, weights = int8.with_quantized_weights(float32, layers)
    offsets, scales = [], []
    for layer, name in zip(layers, names):
        scale, offset, of_weights = record[name]
        offsets.append((int(twin[layer.tensor + "/offset"]), offset))
        scales.append(abs(twin[layer.tensor + "/scale"] / scale - 1))
        if layer.weight:
            np.testing.assert_allclose(weights[layer.name].ravel(), of_weights, rtol=1e-5)
    assert [a for a, _ in offsets] == [b for _, b in offsets] and max(scales) <= 1e-4

    sessions = [open_session(str(tmp_path / "t.onnx")), cpu_session(str(tmp_path / "twin_fake_quant_model.onnx")), cpu_session(model)]
    images = [np.fromfile(os.path.join(bins, name), "<f4").reshape(1, 3, 224, 224) for name in list_bins(bins, 224, 224)]
    ours, theirs, exact = (np.concatenate([s.run(None, {"actual_input_1": image})[0] for image in images]) for s in sessions)
    noise, moved, flips = int8.rms(ours, theirs), int8.rms(theirs, exact), ((ours >= 0) != (theirs >= 0)).sum()
    print("offsets: all %d equal; scales: within %.2g; logits: rms %.4f (AMCT against float32: %.4f), largest %.4f; decisions: %d of %d"
          % (len(offsets), max(scales), noise, moved, np.abs(ours - theirs).max(), flips, ours.size))
    assert noise < 0.01 and noise < moved and flips <= 0.01 * ours.size
