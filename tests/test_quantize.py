"""tools/quantize.py: the INT8 model goes through stages 6 and 7, its drop is printed, and with a large drop it is not written."""
import json
import os
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from lib.session import compute, open_session
from quantize import find_ranges, multiplies_exactly, score, shortcuts
from helpers import check_error, end_in, make_model, script, tensor_info, write_model


COUNT, ATTRIBUTES = 12, 5


def write_conv_model(path, batch, wide=1, size=(224, 224)):
    """A small network of DeepMAR's kinds of layers. The values of its first channel are as many times larger as wide says."""
    random = np.random.RandomState(1)
    weights = {"w": random.standard_normal((8, 3, 3, 3)) / 5, "scale": np.linspace(0.5, 2, 8),
               "shift": np.linspace(-1, 1, 8), "mean": np.zeros(8), "variance": np.ones(8),
               "c": random.standard_normal((ATTRIBUTES, 8)), "b": np.zeros(ATTRIBUTES)}
    for name, factor in (("scale", wide), ("shift", wide), ("c", 1 / wide)):
        weights[name][..., 0] *= factor
    nodes = [helper.make_node("Conv", ["actual_input_1", "w"], ["x1"], strides=[4, 4]),
             helper.make_node("BatchNormalization", ["x1", "scale", "shift", "mean", "variance"], ["x2"]),
             helper.make_node("Relu", ["x2"], ["x3"]), helper.make_node("GlobalAveragePool", ["x3"], ["x4"]),
             helper.make_node("Flatten", ["x4"], ["x5"]),
             helper.make_node("Gemm", ["x5", "c", "b"], ["output1"], transB=1)]
    onnx.save(make_model(nodes, [tensor_info("actual_input_1", [batch, 3] + list(size))], [tensor_info("output1", [batch, ATTRIBUTES])],
                         [(name, array.astype(np.float32)) for name, array in weights.items()]), str(path))


@pytest.fixture
def folder(tmp_path):
    """Bins of images that differ in brightness, a model for batch sizes 1 and 8, and the labels that it gives."""
    (tmp_path / "input_bin").mkdir()
    random = np.random.RandomState(0)
    brightness = np.linspace(-1, 1, COUNT).reshape(-1, 1, 1, 1)  # calibration always takes the first and the last
    images = (random.standard_normal((COUNT, 3, 224, 224)) + brightness).astype("<f4")
    for i, image in enumerate(images):
        (tmp_path / "input_bin" / ("%05d.bin" % i)).write_bytes(image.tobytes())
    (tmp_path / "deepmar.info").write_text("".join("%d ./input_bin/%05d.bin 224 224\n" % (i, i) for i in range(COUNT)))
    for batch in (1, 8):
        write_conv_model(tmp_path / ("bs%d.onnx" % batch), batch)
    logits = run(tmp_path / "bs1.onnx", images)
    assert (logits >= 0).any() and (logits < 0).any()
    np.save(str(tmp_path / "images.npy"), images)
    (tmp_path / "label.json").write_text(json.dumps({"%05d.png" % i: [int(value >= 0) for value in row]
                                                     for i, row in enumerate(logits)}))
    return tmp_path


def run(path, images):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    batch = session.get_inputs()[0].shape[0]
    return np.concatenate([session.run(["output1"], {"actual_input_1": images[i:i + batch]})[0]
                           for i in range(0, len(images) // batch * batch, batch)])


def quantize(folder, *arguments):
    return script("tools/quantize.py", *arguments, cwd=folder)


@pytest.mark.parametrize("batch", [1, 8])
def test_int8_model_goes_through_the_stages(folder, batch):
    before = set(os.listdir(str(folder)))
    process = quantize(folder, "bs%d.onnx" % batch, "input_bin", "int8.onnx", "--images", 5, "--labels", "label.json",
                       "--allow-drop")
    assert process.returncode == 0 and "note: input_bin: deepmar.info lists these bins, so they are the test set" in process.stderr
    used = 5 if batch == 1 else 8
    assert "calibrated on %d of 12 bins, scored on the %d others; " % (used, 12 - used) in process.stdout
    assert "instance_acc: float32 1.0, int8 " in process.stdout and " of %d attributes flip" % (5 * (12 - used)) in process.stdout
    assert set(os.listdir(str(folder))) - before == {"int8.onnx"}

    model = onnx.load(str(folder / "int8.onnx"))
    assert {"QLinearConv"} <= {node.op_type for node in model.graph.node}
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    kernels = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer if len(tensor.dims) == 4]
    assert [kernel.dtype for kernel in kernels] == [np.int8]
    most = 127 if multiplies_exactly() else 63
    assert (np.abs(kernels[0].astype(int)).reshape(8, -1).max(axis=1) >= most).all()  # a scale for each
    images = np.load(str(folder / "images.npy"))[:8]
    float32, int8 = (run(folder / name, images) for name in ("bs%d.onnx" % batch, "int8.onnx"))
    assert float32.shape == int8.shape and 0 < np.abs(int8 - float32).max() < 0.05 * np.ptp(float32)

    for name, arguments in (("tools/benchmark.py", ["-batch_size=%d" % batch, "-om_path=int8.onnx",
                                                    "-input_text_path=deepmar.info"]),
                            ("postprocess_deepmar_pytorch.py", ["result/dumpOutput_device0", "label.json"])):
        process = script(name, *arguments, cwd=folder)
        assert process.returncode == 0, process.stderr
    accuracy = json.loads((folder / "fusion_result.json").read_text())["instance_acc"]
    assert "scored 12 images" in process.stdout and accuracy > 0.9


@pytest.mark.parametrize("batch", [1, 4])
def test_outliers_do_not_widen_a_range(folder, batch):
    images = np.load(str(folder / "images.npy"))[:4]
    images[0, 0, 0, :9], images[3, 1, 2, :9] = 1e4, -1e3  # of 600,000 values, 6 are beyond each end
    images[0, 0, 5, :6], images[3, 1, 5, :6] = 1e5, -1e5
    ranges = find_ranges(onnx.load(str(folder / "bs1.onnx")), list(images.reshape(-1, batch, 3, 224, 224)))
    assert ranges["actual_input_1"] == (-1e3, 1e4) and set(ranges) == {"actual_input_1", "x1", "x2", "x3", "x4", "x5"}


def test_mean_of_the_logits_stays(folder):
    assert quantize(folder, "bs1.onnx", "input_bin", "int8.onnx").returncode == 0
    images = np.load(str(folder / "images.npy"))
    float32, int8 = (run(folder / name, images) for name in ("bs1.onnx", "int8.onnx"))
    assert np.abs(int8 - float32).max() > 1e-3
    np.testing.assert_allclose(int8.mean(axis=0), float32.mean(axis=0), atol=1e-5)


def test_classifier_is_fitted_by_ridge_regression(folder):
    """Its formula in the primal form, with an unknown for each feature."""
    assert quantize(folder, "bs1.onnx", "input_bin", "int8.onnx").returncode == 0
    model = onnx.load(str(folder / "int8.onnx"))
    gemm, = [node for node in model.graph.node if node.op_type == "Gemm"]
    model.graph.output.append(onnx.ValueInfoProto(name=gemm.input[0]))
    session, images = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]), \
        np.load(str(folder / "images.npy"))
    x = np.concatenate([session.run([gemm.input[0]], {"actual_input_1": image[None]})[0] for image in images]).astype(np.float64)
    before, after = ([numpy_helper.to_array(tensor) for name in names for tensor in m.graph.initializer if tensor.name == name]
                     for m, names in ((onnx.load(str(folder / "bs1.onnx")), "cb"), (model, gemm.input[1:])))
    missed = run(folder / "bs1.onnx", images) - x.dot(before[0].T) - before[1]
    x1, missed1 = x - x.mean(axis=0), missed - missed.mean(axis=0)
    ridge = (x1 ** 2).sum() / COUNT
    change = np.linalg.solve(x1.T.dot(x1) + ridge * np.eye(8), x1.T.dot(missed1)).T
    np.testing.assert_allclose(after[0] - before[0], change, atol=1e-6)
    assert np.abs(change).max() > 1e-4


def test_shortcuts_are_the_convolutions_beside_the_blocks():
    weights = [(name, np.zeros((channels, 3, 1, 1), np.float32)) for name, channels in (("small", 4), ("large", 16))]
    nodes = [helper.make_node("Conv", [source, weight], [name], name) for name, source, weight in
             (("first", "x", "small"), ("shortcut", "x", "large"), ("other", "first", "large"))]
    assert shortcuts(make_model(nodes, [], [], weights)) == ["shortcut"]


def test_int8_model_of_another_size(folder):
    write_conv_model(folder / "tall.onnx", 4, size=(256, 128))
    (folder / "bins").mkdir()
    for i in range(6):
        (folder / "bins" / ("%d.bin" % i)).write_bytes(np.full(3 * 256 * 128, i - 2.5, "<f4").tobytes())
    (folder / "tall.json").write_text(json.dumps({"%d.png" % i: [1, 0, 1, 0, 1] for i in range(6)}))
    process = quantize(folder, "tall.onnx", "bins", "int8.onnx", "--images", 4, "--labels", "tall.json", "--allow-drop")
    assert process.returncode == 0 and process.stderr == "", process.stderr
    assert run(folder / "int8.onnx", np.zeros((4, 3, 256, 128), np.float32)).shape == (4, ATTRIBUTES)
    check_error(quantize(folder, "tall.onnx", "input_bin", "int8.onnx"), "12 of 12 bins are not float32 [3,256,128]")


def test_without_labels(folder):
    os.rename(str(folder / "input_bin"), str(folder / "val_bin"))
    process = quantize(folder, "bs1.onnx", "val_bin", "int8.onnx")
    assert process.returncode == 0 and process.stderr == "", process.stderr
    assert "calibrated on 12 of 12" in process.stdout and "instance_acc" not in process.stdout
    assert "tools/benchmark.py" in process.stdout and "--published" in process.stdout
    check_error(quantize(folder, "int8.onnx", "val_bin", "twice.onnx"), "int8.onnx", "already")
    assert not (folder / "twice.onnx").exists()


def test_large_drop_writes_nothing_unless_allowed(folder):
    write_conv_model(folder / "wide.onnx", 1, wide=1e5)  # one channel takes all of the 8 bits' range
    images = np.load(str(folder / "images.npy"))
    (folder / "wide.json").write_text(json.dumps({"%05d.png" % i: [int(value >= 0) for value in row]
                                                  for i, row in enumerate(run(folder / "wide.onnx", images))}))
    (folder / "int8.onnx").write_bytes(b"earlier")
    process = quantize(folder, "wide.onnx", "input_bin", "int8.onnx", "--images", 6, "--labels", "wide.json")
    check_error(process, "int8.onnx: was not written", "1 %", "--allow-drop")
    assert "drop" in process.stdout and "calibrated on" not in process.stdout
    assert (folder / "int8.onnx").read_bytes() == b"earlier"
    assert not [name for name in os.listdir(str(folder)) if name.endswith(".partial")]
    allowed = quantize(folder, "wide.onnx", "input_bin", "int8.onnx", "--images", 6, "--labels", "wide.json", "--allow-drop")
    assert allowed.returncode == 0, allowed.stderr
    onnx.checker.check_model(onnx.load(str(folder / "int8.onnx")))


@pytest.mark.parametrize("end", [["Sigmoid"], ["Sigmoid", "Identity"], ["Sigmoid", "Clip"]])
def test_the_drop_of_a_model_that_gives_probabilities(tmp_path, capsys, end):
    names = [("%d" % i, str(tmp_path / ("%d.bin" % i))) for i in range(20)]
    for i, (_, path) in enumerate(names):
        np.random.RandomState(i).standard_normal((3, 4, 4)).astype("<f4").tofile(path)
    plain, worse, model = (str(write_model(tmp_path / name, 1, attributes=5, size=(4, 4), bias=bias))
                           for name, bias in (("plain.onnx", 0), ("worse.onnx", 1), ("m.onnx", 0)))
    labels = (compute(open_session(plain), names) >= 0).astype(np.uint8)
    for path in (worse, model):
        end_in(path, *end)
    assert score(open_session(worse), open_session(model), names, labels, None, model) > 0.05
    assert capsys.readouterr().out.startswith("instance_acc: float32 1.0, int8 ")


@pytest.mark.parametrize("flags, exact", [("flags\t\t: fpu avx2 avx512_vnni", True), ("flags\t\t: fpu avx_vnni", True),
                                          ("flags\t\t: fpu avx2 avx512f", False), ("Features\t: fp asimd", True)])
def test_weights_have_7_bits_for_a_cpu_that_would_overflow(tmp_path, flags, exact):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\n%s\nbugs\t\t:\n" % flags)
    assert multiplies_exactly(str(tmp_path / "cpuinfo")) == exact


def test_bad_input_leaves_an_earlier_model(folder):
    (folder / "int8.onnx").write_bytes(b"earlier")
    check_error(quantize(folder, "nowhere.onnx", "input_bin", "int8.onnx"), "nowhere.onnx")
    check_error(quantize(folder, "bs1.onnx", "nowhere", "int8.onnx"), "nowhere")
    check_error(quantize(folder, "bs1.onnx", "input_bin", "nowhere/int8.onnx"), "nowhere/int8.onnx")
    (folder / "few.json").write_text(json.dumps({"00000.png": [0, 1, 0, 1, 0]}))
    check_error(quantize(folder, "bs1.onnx", "input_bin", "int8.onnx", "--images", 4, "--labels", "few.json"), "few.json", "8 of 8")
    (folder / "narrow.json").write_text(json.dumps({"%05d.png" % i: [0, 1] for i in range(COUNT)}))
    check_error(quantize(folder, "bs1.onnx", "input_bin", "int8.onnx", "--images", 4, "--labels", "narrow.json"), "narrow.json", "2")
    check_error(quantize(folder, "bs1.onnx", "input_bin", "int8.onnx", "--labels", "label.json"),
                "input_bin: all 12 bins calibrate", "give fewer --images")
    nan = np.zeros(3 * 224 * 224, "<f4")
    nan[77] = np.nan
    (folder / "input_bin" / "00011.bin").write_bytes(nan.tobytes())
    check_error(quantize(folder, "bs8.onnx", "input_bin", "int8.onnx"), "NaN", "00011.bin")
    check_error(quantize(folder, "bs1.onnx", "input_bin", "int8.onnx", "--images", 0), code=2)
    check_error(quantize(folder, "bs1.onnx", "input_bin", "./bs1.onnx"), "OUTPUT is MODEL", code=2)
    assert (folder / "int8.onnx").read_bytes() == b"earlier"
    assert not [name for name in os.listdir(str(folder)) if name.endswith(".partial")]


def test_qdq_model(folder):
    """OpenVINO reads it too: opset 13, only standard operators. Its logits are those of the other kind."""
    process = script("tools/quantize.py", "bs8.onnx", "input_bin", "qdq.onnx", "--qdq", "--images", 4, "--labels", "label.json",
                     "--allow-drop", cwd=folder)
    if sys.version_info < (3, 8):
        check_error(process, "--qdq needs a current ONNX", code=2)
        return
    assert process.returncode == 0, process.stderr
    model = onnx.load(str(folder / "qdq.onnx"))
    assert [opset.version for opset in model.opset_import if not opset.domain] == [13]
    kinds = {node.op_type for node in model.graph.node}
    assert {"Conv", "QuantizeLinear", "DequantizeLinear"} <= kinds and not any(kind.startswith("QLinear") for kind in kinds)
    images = np.load(str(folder / "images.npy"))[:8]
    exact = run(folder / "bs8.onnx", images)
    assert np.abs(run(folder / "qdq.onnx", images) - exact).max() < 0.05 * np.abs(exact).max()
    if os.uname().machine == "x86_64":
        process = script("tools/benchmark.py", "-batch_size=8", "-om_path=qdq.onnx", "-input_text_path=deepmar.info",
                         "-provider=OpenVINOExecutionProvider", "-tolerance=0.1", cwd=folder)
        if "has no provider OpenVINOExecutionProvider" in process.stderr:
            pytest.skip("NOT RUN: OpenVINO's plug-in offers no device on this CPU")
        assert process.returncode == 0 and "OpenVINOExecutionProvider, qdq.onnx" in process.stdout, process.stderr
