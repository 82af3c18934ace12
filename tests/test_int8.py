"""The INT8 twin against AMCT's arithmetic in plain numpy, the layers left in float, and what AMCT itself needs."""
import json
import os

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import rehearse
from helpers import check_error, constant, make_model, script, tensor_info
from lib import int8
from lib.session import cpu_session, open_session
from small_network import ATTRIBUTES, IMAGES, NAMES, SIZE, conv, normalised, pictures, pool, weights, write_bins, write_network

# --- AMCT's rules, written down plainly -------------------------------------------------------------------------------

def plain_activation(values):
    values, count = np.sort(values.ravel()), values.size
    rank = count - int(0.999999 * count)
    high, low = max(values[-rank], np.float32(0)), min(values[rank - 1], np.float32(0))
    best = None
    for ratio in np.arange(0.7, 1.3, 0.01).astype(np.float32):
        scale = (ratio * high - low) / np.float32(255)
        scale = scale if scale >= 1.192092896e-7 else np.float32(1)
        loss = ((np.rint(values.clip(low, ratio * high) / scale) * scale - values.astype(np.float64)) ** 2).mean()
        if best is None or loss < best[0]:
            best = loss, scale
    return best[1], int(-np.rint(low / best[1])) - 128


def plain_weight(weight, per_channel):
    """Returns (rounded weights, scales)."""
    rows = weight.reshape(len(weight) if per_channel else 1, -1)
    scales = np.float32([row.max() / np.float32(127) if row.max() >= -row.min() else -row.min() / np.float32(128) for row in rows])
    scales[scales < 1.192092896e-7] = 1
    return (np.rint(rows / scales[:, None]).clip(-128, 127) * scales[:, None]).reshape(weight.shape), scales


def plain_network(values, x):
    """Returns ({tensor: (scale, offset)}, logits) of the small network."""
    w, scales = {}, {}
    for name in ("conv1", "conv2", "classifier"):
        w[name], scales[name] = plain_weight(values[name + ".weight"], name != "classifier")

    def forward(rounded, bias):
        x1 = rounded("actual_input_1", x)
        p1 = pool(np.maximum(conv(x1, w["conv1"], bias("conv1", "actual_input_1")), 0), np.max)
        r2 = np.maximum(conv(rounded("p1", p1), w["conv2"], bias("conv2", "p1")) + p1, 0)
        f = pool(rounded("r2", r2), np.mean).reshape(len(x), -1)
        return rounded("f", f).dot(w["classifier"].T) + bias("classifier", "f")

    ranges = {}

    def measure(name, array):
        ranges[name] = plain_activation(array.astype(np.float32))
        return array

    def quantized(name, array):
        scale, offset = ranges[name]
        return ((np.rint(array.astype(np.float32) / scale) + offset).clip(-128, 127) - offset) * np.float64(scale)

    def bias(name, tensor):
        step = scales[name] * ranges[tensor][0]
        return np.rint(values[name + ".bias"] / step) * step

    forward(measure, lambda name, tensor: values[name + ".bias"])
    return ranges, forward(quantized, bias)


RANDOM = np.random.RandomState(3)
ACTIVATIONS = {"two signs": RANDOM.standard_normal(5000), "after a Relu": np.maximum(RANDOM.standard_normal(5000), 0),
               "negative": -np.abs(RANDOM.standard_normal(500)), "a long tail": RANDOM.standard_normal(5000) ** 5, "zeros": np.zeros(9),
               "tiny": RANDOM.standard_normal(50) * 1e-6}


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_have_amcts_scales(name):
    values = ACTIVATIONS[name].astype(np.float32)
    assert int8.activation_scale(values.copy()) == plain_activation(values)


def test_percentile_leaves_out_the_outermost_values():
    values = np.append(RANDOM.standard_normal(1100000), [1000, 2000]).astype(np.float32)  # the second largest counts
    assert 700 / 255 < int8.activation_scale(values)[0] < 1320 / 255


def test_weights_have_amcts_scales():
    weight = RANDOM.standard_normal((6, 4, 3, 3)).astype(np.float32)
    weight[1], weight[2] = np.abs(weight[1]), -np.abs(weight[2])
    weight[3], weight[4] = 0, weight[4] * 1e-7
    weight[5].flat[:2] = -9, 8.99  # the second one rounds to 128
    for op in ("Conv", "Gemm"):
        rounded, scales = plain_weight(weight, op == "Conv")
        found = int8.weight_scale(weight, op)
        assert np.array_equal(found.ravel(), scales) and np.array_equal(int8.rounded(weight, found), rounded)


# --- the twin -----------------------------------------------------------------------------------------------------------

@pytest.fixture
def folder(tmp_path):
    """A folder with the small network, m.onnx, and bins."""
    write_network(tmp_path / "m.onnx", weights())
    write_bins(tmp_path / "bins", normalised(pictures()))
    return tmp_path


def make(folder, *options, model="m.onnx"):
    """Runs rehearse.py int8. Returns what it printed."""
    done = script("tools/rehearse.py", "int8", model, "bins", "t.onnx", *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def quantized_inputs(path):
    """Returns {node: (scale, offset)} of a twin's layers."""
    graph = onnx.load(str(path)).graph
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    return {node.name: tuple(values[node.input[0].replace("dequantized", end)] for end in ("scale", "offset"))
            for node in graph.node if node.op_type != "DequantizeLinear" and node.input[0].endswith("/dequantized")}


def test_twin_is_amcts_arithmetic(folder):
    x = normalised(pictures())
    ranges, expected = plain_network(weights(), x)
    assert "4 layers in int8, AveragePool among them, 0 in float, calibrated on 12 of 12 bins" in make(folder)
    found = quantized_inputs(folder / "t.onnx")
    for node, tensor in (("conv1", "actual_input_1"), ("conv2", "p1"), ("pool2", "r2"), ("classifier", "f")):
        assert found[node][0] == pytest.approx(ranges[tensor][0], rel=1e-4) and found[node][1] == ranges[tensor][1]
    session, exact = open_session(str(folder / "t.onnx")), cpu_session(str(folder / "m.onnx"))
    logits, float32 = (np.concatenate([s.run(None, {"actual_input_1": image[None]})[0] for image in x]) for s in (session, exact))
    noise, moved = int8.rms(logits, expected), int8.rms(logits, float32)
    assert noise < 0.1 * moved  # a value between two integers may go either way
    assert [onnx.load(str(folder / "t.onnx")).opset_import[0].version, open_config(folder, "t.onnx")] == [11, "1"]


def open_config(folder, name):
    """Returns the entry of a session's options that switches fusion off, or None."""
    options = open_session(str(folder / name)).get_session_options()
    try:
        return options.get_session_config_entry("session.disable_quant_qdq")
    except RuntimeError:
        return None


def test_only_twins_are_run_without_fusion(folder):
    assert open_config(folder, "m.onnx") is None


def test_batch_normalization_is_folded(tmp_path):
    random = np.random.RandomState(1)
    values = [("w", random.standard_normal((8, 3, 3, 3))), ("b", random.standard_normal(8)), ("mean", random.standard_normal(8)),
              ("scale", random.standard_normal(8)), ("shift", random.standard_normal(8)), ("variance", random.rand(8))]
    norm = ["scale", "shift", "mean", "variance"]
    values += [("w2", random.standard_normal((4, 8, 1, 1)))] + [(name + "2", random.rand(4)) for name in norm]
    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["a"], "first"),
             helper.make_node("BatchNormalization", ["a"] + norm, ["c"], epsilon=0.01),
             helper.make_node("Conv", ["c", "w2"], ["d"], "second"),
             helper.make_node("BatchNormalization", ["d"] + [name + "2" for name in norm], ["e"]),
             helper.make_node("BatchNormalization", ["e"] + [name + "2" for name in norm], ["y"])]  # it follows no convolution
    model = make_model(nodes, [tensor_info("x", [2, 3, 6, 6])], [tensor_info("y", list("nchw"))],
                       [(name, array.astype(np.float32)) for name, array in values])
    x = random.standard_normal((2, 3, 6, 6)).astype(np.float32)
    before, = cpu_session(model.SerializeToString()).run(None, {"x": x})
    int8.fold(model)
    assert [(node.name, node.op_type) for node in model.graph.node] == [
        ("first", "Conv"), ("second", "Conv"), ("", "BatchNormalization")]
    after, = cpu_session(model.SerializeToString()).run(None, {"x": x})
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)


# --- layers left in float ---------------------------------------------------------------------------------------------

def test_layers_are_ranked_by_what_each_costs_alone(folder):
    lines = make(folder, "--layers").splitlines()
    rows = [line.split() for line in lines if line.startswith("  ") and line.endswith(")")]
    assert {row[1] for row in rows} == {"conv1", "conv2", "pool2", "classifier"}
    costs = [float(row[0]) for row in rows]
    assert costs == sorted(costs, reverse=True)
    for skipped in rows:  # without the others, the twin moves the logits as far as the ranking says
        make(folder, "--skip", *[row[1] for row in rows if row != skipped])
        x = normalised(pictures())[:rehearse.RANKED_IMAGES]
        twin, exact = (np.concatenate([s.run(None, {"actual_input_1": image[None]})[0] for image in x])
                       for s in (open_session(str(folder / name)) for name in ("t.onnx", "m.onnx")))
        assert int8.rms(twin, exact) == pytest.approx(float(skipped[0]), rel=0.2)  # calibrated without the others' rounding


@pytest.mark.parametrize("limit, in_float", [(1, 0), (1e-9, 4)])
def test_layers_stay_in_float_within_a_shift(folder, limit, in_float):
    assert "%d in float" % in_float in make(folder, "--within", limit)
    assert len(quantized_inputs(folder / "t.onnx")) == 4 - in_float
    assert (folder / "t_amct" / "quant.cfg").read_text().count("skip_layers") == in_float


def test_some_layers_stay_in_float(folder):
    out = make(folder, "--layers", "--within", 0.02)
    ranking = [line.split()[1] for line in out.splitlines() if line.startswith("  ") and line.endswith(")")]
    left = [line.split()[2] for line in out.splitlines() if line.startswith("  in float: ")]
    assert 0 < len(left) < 4 and left == ranking[:len(left)]
    assert "%.4f" % 0.02 not in out and "(allowed: 0.02)" in out and "calibrated anew: 0.0" in out
    assert not set(left) & set(quantized_inputs(folder / "t.onnx"))


def test_layers_stay_in_float_within_points_of_accuracy(folder):
    session = cpu_session(str(folder / "m.onnx"))
    logits = [session.run(None, {"actual_input_1": image[None]})[0][0] for image in normalised(pictures())]
    (folder / "label.json").write_text(json.dumps({name + ".png": [int(value >= 0) for value in row] for name, row in zip(NAMES, logits)}))
    out = make(folder, "--within", 0, "--labels", "label.json")
    assert "drop of instance_acc in points: " in out and "(allowed: 0)" in out


def test_shortest_needs_few_tries():
    for answer in range(56):
        tried = []
        assert int8.shortest(55, lambda count: tried.append(count) or max(0, answer - count), 0) == answer and len(tried) <= 6


# --- what AMCT needs --------------------------------------------------------------------------------------------------

def test_amct_gets_its_files(folder):
    out = make(folder, "--images", 5, "--skip", "AveragePool", "conv1")
    assert "2 layers in int8, 2 in float, calibrated on 5 of 12 bins" in out
    assert (folder / "t_amct" / "quant.cfg").read_text().splitlines() == [
        "batch_num: 5", "activation_offset: true", "do_fusion: true", 'skip_layers: "conv1"', 'skip_layers: "pool2"']
    names = ["im00.bin", "im03.bin", "im06.bin", "im08.bin", "im11.bin"]
    assert sorted(os.listdir(str(folder / "t_amct" / "calibration"))) == names
    assert all(os.path.samefile(str(folder / "bins" / name), str(folder / "t_amct" / "calibration" / name)) for name in names)
    assert ("amct_onnx calibration --model m.onnx --save_path t_amct/t --input_shape actual_input_1:1,3,16,16 --data_dir "
            "t_amct/calibration --data_types float32 --calibration_config t_amct/quant.cfg\n") in out
    assert "atc --model=t_amct/t_deploy_model.onnx --framework=5 --output=t --input_format=NCHW" in out


def test_amcts_bins_hold_a_batch_each(folder):
    write_network(folder / "bs8.onnx", weights(), 8)
    assert "calibrated on 16 of 12 bins" in make(folder, "--images", 9, model="bs8.onnx")
    bins = sorted((folder / "t_amct" / "calibration").iterdir())
    images = np.stack([np.fromfile(str(path), "<f4") for path in bins]).reshape(16, -1)
    assert [path.name for path in bins] == ["im00.bin", "im08.bin"]
    assert np.array_equal(images, normalised(pictures()).reshape(IMAGES, -1)[[i % IMAGES for i in range(16)]])


def test_test_set_gets_a_word(folder):
    assert script("get_info.py", "bins", "deepmar.info", SIZE, SIZE, cwd=folder).returncode == 0
    done = script("tools/rehearse.py", "int8", "m.onnx", "bins", "t.onnx", "--images", 2, cwd=folder)
    assert done.returncode == 0 and "note: bins: deepmar.info lists these bins, so they are the test set" in done.stderr
    os.rename(str(folder / "bins"), str(folder / "val"))
    done = script("tools/rehearse.py", "int8", "m.onnx", "val", "t.onnx", "--images", 2, cwd=folder)
    assert done.returncode == 0 and "test set" not in done.stderr


def test_what_cannot_be_quantized_is_refused(folder):
    def refuse(*words, code=1, model="m.onnx", options=()):
        check_error(script("tools/rehearse.py", "int8", model, "bins", "u.onnx", *options, cwd=folder), *words, code=code)
    refuse("--labels goes with --within", code=2, options=["--labels", "label.json"])
    refuse("has no layer or type conv3; it has AveragePool, Conv, Gemm, classifier, conv1", options=["--skip", "conv3"])
    make(folder)
    refuse("t.onnx: is already quantized", model="t.onnx")
    assert script("tools/rehearse.py", "aipp", "m.onnx", "a.onnx", cwd=folder).returncode == 0
    refuse("a.onnx: does not take float32", model="a.onnx")
    model = onnx.load(str(folder / "m.onnx"))
    model.graph.initializer.remove(next(tensor for tensor in model.graph.initializer if tensor.name == "conv1.weight"))
    model.graph.node.insert(0, constant("conv1.weight", weights()["conv1.weight"]))
    onnx.save(model, str(folder / "c.onnx"))
    refuse("the weights of conv1 (Conv) are not among the model's initializers", model="c.onnx")
    write_network(folder / "large.onnx", dict(weights(), **{"classifier.bias": np.full(ATTRIBUTES, 1e9, np.float32)}))
    refuse("the bias of classifier is beyond int32; leave this layer in float (--skip classifier)", model="large.onnx")
    bad = np.fromfile(str(folder / "bins" / "im11.bin"), "<f4")
    bad[5] = np.nan
    bad.tofile(str(folder / "bins" / "im11.bin"))
    refuse("NaN", "im11.bin")
    assert not (folder / "u.onnx").exists() and not (folder / "u_amct").exists()
