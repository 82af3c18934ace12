"""The float16 twin against numpy's float16, and compare --rehearsal: it accepts another float16 and names each seeded fault."""
import os

import numpy as np
import onnxruntime
import pytest
from onnx import helper

import compare
from lib.faults import layers, tensors
from lib.float16 import rounding
from helpers import check_error, make_model, script, tensor_info, write_model
from lib.images import MEAN, STD
from small_network import (ATTRIBUTES, IMAGES, NAMES, SIZE, Scene, compute, grid, float16, make_twin, normalised, weights,
                           write_bins, write_network)

# --- the twin ---------------------------------------------------------------------------------------------------------

def test_every_layer_is_numpys_float16(tmp_path):
    """To the bit."""
    values = {name: grid(value) for name, value in weights().items()}
    x = grid(np.random.RandomState(0).standard_normal((IMAGES, 3, SIZE, SIZE)) * 3)
    write_bins(tmp_path / "bins", x)
    twin = make_twin(write_network(tmp_path / "m.onnx", values), tmp_path / "t.onnx")
    expected = compute(values, x)
    bins = [str(tmp_path / "bins" / (name + ".bin")) for name in NAMES]
    for i, found in enumerate(tensors(twin, list(expected), bins)):
        for name, value in found.items():
            assert np.array_equal(value[0], expected[name][i]), name


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"])
def test_optimization_keeps_the_rounding(level):
    """ONNX Runtime 1.10 drops a Cast to float16 and the Cast back, at any level."""
    values = np.float32([1 + 2.0 ** -12, 3.14159265, 1e-8, 70000])
    nodes = []
    for i in range(3):
        nodes.append(helper.make_node("Mul", ["y%d" % i, "w"], ["x%d" % (i + 1)]))
        nodes += rounding("x%d" % (i + 1), "y%d" % (i + 1), 1)
    model = make_model(nodes, [tensor_info("y0", [4])], [tensor_info("y3", [4])],
                       [("w", np.float32([1.001])), ("shape_of_rank_1", np.zeros(1, np.int64))])
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    expected = values
    for _ in range(3):
        expected = float16(expected * np.float32(1.001)).astype(np.float32)
    assert np.array_equal(session.run(None, {"y0": values})[0], expected) and np.isinf(expected[3])


def test_bad_models_are_refused(tmp_path):
    model = write_network(tmp_path / "m.onnx", weights())
    (tmp_path / "cut.onnx").write_bytes((tmp_path / "m.onnx").read_bytes()[:100])
    check_error(script("tools/rehearse.py", "float16", tmp_path / "cut.onnx", tmp_path / "t.onnx"), "cut.onnx: is not a valid ONNX model")
    check_error(script("tools/rehearse.py", "float16", model, model), "OUTPUT is MODEL", code=2)
    check_error(script("tools/rehearse.py"), "give cfg, aipp, float16, int8, input or costs", code=2)
    make_twin(model, tmp_path / "a.onnx", "aipp")
    check_error(script("tools/rehearse.py", "aipp", tmp_path / "a.onnx", tmp_path / "t.onnx"), "it may already have AIPP")
    assert not (tmp_path / "t.onnx").exists()


# --- the card's results, judged by the twin ----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return Scene(tmp_path_factory.mktemp("rehearse"))


def changed(values, **changes):
    """A copy of weights with some of them changed by functions; a name has _ in place of the dot."""
    copies = {name: value.copy() for name, value in values.items()}
    for name, change in changes.items():
        name = name.replace("_", ".")
        copies[name] = np.ascontiguousarray(change(copies[name]), np.float32)
    return copies


def plus(index, value):
    def change(array):
        array[index] += value
        return array
    return change


def swap(i, j):
    def change(array):
        array[[i, j]] = array[[j, i]]
        return array
    return change


def copy(i, j):
    def change(array):
        array[i] = array[j]
        return array
    return change


def test_other_float16_arithmetic_is_within_the_bound(scene, capsys):
    scene.compare(scene.card(), "--json", str(scene.folder / "c.json"))
    out = capsys.readouterr().out
    assert "within what float16 explains: difference" in out and "not a simulation of the chip" in out
    assert "order of accumulation and its kernels are unknown" in out
    report = compare.json.loads((scene.folder / "c.json").read_text())
    logits = np.stack([np.fromfile(str(scene.folder / "result" / (name + "_1.bin")), "<f4") for name in NAMES])
    x = normalised(scene.pixels)
    exact, twin = compute(scene.values, x, lambda array: array)["output1"], compute(scene.values, x)["output1"]
    assert report["rehearsal"]["shift"] == pytest.approx(np.abs(twin - exact).max(), rel=1e-3, abs=1e-6)
    assert report["rehearsal"]["largest"] == pytest.approx(np.abs(logits - exact).max(), rel=1e-3, abs=1e-6)
    assert 0 < report["rehearsal"]["typical"] <= report["allowed_difference"] and report["within_tolerances"]
    compare.main([scene.twin, "--onnx", scene.model, "--bins", scene.bins])  # the twin itself, against the fixed tolerances
    assert "largest difference: %.6g" % report["rehearsal"]["shift"] in capsys.readouterr().out


INPUTS = {
    "BGR instead of RGB": lambda pixels: normalised(pixels[..., ::-1]),
    "without the mean subtracted (min_chn in aipp.cfg)":
        lambda pixels: (pixels / 255 / np.array(STD)).transpose(0, 3, 1, 2).astype("<f4"),
    "without the division by the standard deviation":
        lambda pixels: (pixels / 255 - np.array(MEAN)).transpose(0, 3, 1, 2).astype("<f4"),
    "pixels from 0 to 1": lambda pixels: (pixels / 255).transpose(0, 3, 1, 2).astype("<f4"),
    "pixels from 0 to 255": lambda pixels: pixels.transpose(0, 3, 1, 2).astype("<f4"),
    "not divided by 255": lambda pixels: normalised(pixels * 255.0),
    "divided by 255 twice": lambda pixels: normalised(pixels / 255),
    "normalised twice": lambda pixels: normalised(255 * normalised(pixels).transpose(0, 2, 3, 1)),
    "with the mean rounded to whole numbers": lambda pixels: normalised(pixels, np.rint(np.array(MEAN) * 255) / 255),
    "with the mean's fraction cut off": lambda pixels: normalised(pixels, np.floor(np.array(MEAN) * 255) / 255),
    "with the mean in the order BGR": lambda pixels: normalised(pixels, MEAN[::-1]),
    "with the standard deviation in the order BGR": lambda pixels: normalised(pixels, std=STD[::-1]),
    "with the mean and the standard deviation in the order BGR": lambda pixels: normalised(pixels, MEAN[::-1], STD[::-1]),
    "with the mean and the standard deviation exchanged": lambda pixels: normalised(pixels, STD, MEAN),
    "with a mean and a standard deviation of 0.5": lambda pixels: (pixels / 127.5 - 1).transpose(0, 3, 1, 2).astype("<f4"),
    "mirrored": lambda pixels: normalised(pixels[:, :, ::-1]),
    "upside down": lambda pixels: normalised(pixels[:, ::-1]),
    "with height and width exchanged": lambda pixels: normalised(pixels.transpose(0, 2, 1, 3)),
    "in the order [height,width,3]": lambda pixels: normalised(pixels).transpose(0, 2, 3, 1).reshape(-1, 3, SIZE, SIZE)}


@pytest.mark.parametrize("name", sorted(INPUTS))
def test_wrong_inputs_are_named(scene, name):
    message = scene.refused(scene.card(inputs=INPUTS[name](scene.pixels)))
    assert "differ by more than float16 explains" in message and message.count("these are the results for an input") == 1
    assert "these are the results for an input " + name in message


@pytest.mark.parametrize("changes, text", [
    ({"classifier_weight": plus((2, 3), 0.5)}, "only 1 of 6 attributes are off, so look at the last layer: attribute2 (by"),
    ({"classifier_bias": plus(4, 0.5)}, "attribute4 (by +0.5 in all images: its bias)"),
    ({"classifier_weight": swap(1, 5), "classifier_bias": swap(1, 5)},
     "the attributes are in another order: attribute1 has the results of attribute5, attribute5 has the"),
    ({"classifier_weight": copy(1, 5), "classifier_bias": copy(1, 5)},
     "the attributes are repeated: attribute1 has the results of attribute5"),
    ({"conv2_weight": plus((5, 2, 1, 1), 0.5)}, "none of the 19 known faults of the input explains it, nor another order")])
def test_wrong_weights_are_recognised_from_the_results(scene, changes, text):
    assert text in scene.refused(scene.card(changed(scene.values, **changes)))


def test_small_fault_is_not_blamed_on_the_last_layer(scene):
    """It moves only some attributes beyond the bound."""
    assert "last layer" not in scene.refused(scene.card(changed(scene.values, conv2_weight=plus((5, 2, 1, 1), 0.02))))


def test_unknown_input_is_not_blamed_on_a_layer(scene):
    message = scene.refused(scene.card(inputs=normalised(scene.pixels.mean(axis=3, keepdims=True).repeat(3, axis=3))))
    assert "A may have had other bins or another aipp.cfg, or a layer or its weights are wrong" in message


def test_order_of_attributes_with_equal_results(tmp_path):
    """As those of the sample, where attributes have the same labels."""
    values = changed(weights(), classifier_weight=copy(2, 0), classifier_bias=copy(2, 0))
    other = Scene(tmp_path)
    other.model = write_network(tmp_path / "equal.onnx", values)
    other.twin = make_twin(other.model, tmp_path / "equal_t.onnx")
    side = other.card(changed(values, classifier_weight=swap(0, 4), classifier_bias=swap(0, 4)))
    message = other.refused(side)
    assert "another order: attribute0 has the results of attribute4, attribute4 has the results of attribute0" in message


def test_repeated_results_are_no_other_order(scene):
    inputs = normalised(scene.pixels)
    inputs[1::2] = inputs[::2]
    message = scene.refused(scene.card(inputs=inputs))
    assert "the images are repeated: " in message and "im03 has the results of im02" in message


def test_other_networks_are_refused(scene, tmp_path):
    values = changed(scene.values, conv1_weight=lambda w: w[:4], conv1_bias=lambda b: b[:4], conv2_weight=lambda w: w[:4, :4],
                     conv2_bias=lambda b: b[:4], classifier_weight=lambda w: w[:, :4])
    message = scene.refused(write_network(tmp_path / "narrow.onnx", values))
    assert "narrow.onnx: is another network than %s: " % scene.model in message
    assert "the results of conv1 (Conv) are [1, 4, 16, 16] and [1, 8, 16, 16]" in message
    wide = write_model(tmp_path / "wide.onnx", size=(8, 32), attributes=ATTRIBUTES)
    assert "wide.onnx 8 x 32, %s 16 x 16" % scene.model in scene.refused(str(wide))


def test_wrong_order_and_one_bad_image_are_named(scene):
    inputs = normalised(scene.pixels)
    assert "im00 has the results of im01" in scene.refused(scene.card(inputs=np.roll(inputs, -1, axis=0)))
    inputs[7] = 0
    assert "only 1 of 12 images are off: im07" in scene.refused(scene.card(inputs=inputs))


@pytest.mark.parametrize("changes, layer, text", [
    ({"conv2_weight": plus((5, 2, 1, 1), 0.5)}, "conv2", "only 1 of its 8 channels are off (5)"),
    ({"conv2_weight": swap(1, 6), "conv2_bias": swap(1, 6)}, "conv2", "its channels are in another order: 1 has the values of 6"),
    ({"conv1_weight": lambda array: array[:, ::-1]}, "conv1", "channels are off"),
    ({"conv1_weight": plus(slice(None), 0.01)}, "conv1", "all of its channels are off")])
def test_faulty_layer_is_named_if_the_model_is_given(scene, changes, layer, text):
    """The ONNX model from which the OM was made replaces the card's results."""
    message = scene.refused(write_network(scene.folder / "faulty.onnx", changed(scene.values, **changes)))
    assert "the first layer to differ is %s (Conv)" % layer in message and text in message


@pytest.mark.parametrize("given", ["a card that has infinity", "a card that stops at 65504", "the model"])
def test_overflow_is_named(scene, given, tmp_path):
    """Weights that are fine in float32, and in float16, too: the first layer's results are not."""
    values = changed(scene.values, conv1_weight=lambda array: array * np.float32(2.0 ** 15), conv1_bias=lambda array: array * 2.0 ** 15,
                     conv2_weight=lambda array: array * np.float32(2.0 ** -5), classifier_weight=lambda array: array * 2.0 ** -15)
    other = Scene(tmp_path)
    other.model = write_network(tmp_path / "large.onnx", values)
    other.twin = make_twin(other.model, tmp_path / "large_t.onnx")
    with np.errstate(invalid="ignore"):
        side = other.model if given == "the model" else other.card(values)
    if given.endswith("65504"):
        for name in NAMES:
            path = tmp_path / "result" / (name + "_1.bin")
            path.write_bytes(np.nan_to_num(np.fromfile(str(path), "<f4")).tobytes())
    message = other.refused(side)
    assert "overflow in conv1 (Conv): its values reach" in message and "float16 ends at 65504" in message
    assert "--atc-options=--precision_mode_v2=mixed_float16, or with origin" in message


def test_overflow_that_float16_does_not_explain(scene):
    folder = scene.card()
    (scene.folder / "result" / "im03_1.bin").write_bytes(np.full(ATTRIBUTES, np.inf, "<f4").tobytes())
    assert "result: NaN or infinite logits for 1 of 12 images (im03): no value of" in scene.refused(folder)


def test_difference_without_a_shift_by_float16():
    logits = np.zeros((2, 3), np.float32)
    sides = compare.Sides(logits + np.float32(0.2), logits, logits, ["x", "y"], {})
    verdict, problems = compare.judge_by_twin(sides, ["a", "b", "c"], "t.onnx")
    assert problems == ["largest difference 0.2; float16 alone: 0", "root mean square 0.2; float16 alone: 0"]
    assert not verdict["within_tolerances"]


def test_layers_are_ranked(scene, capsys):
    scene.compare(scene.card(), "--layers")
    out = capsys.readouterr().out
    assert "relative error of each layer's result" in out and "conv2 (Conv)" in out
    assert "msprobe compare -m offline_model -gp %s -tp %s --input_data %s" % (
        scene.model, scene.model.replace(".onnx", ".om"), os.path.join(scene.bins, "im00.bin")) in out
    rows = layers(scene.model, [scene.twin], [os.path.join(scene.bins, name + ".bin") for name in NAMES])
    x = normalised(scene.pixels)
    exact, twin = compute(scene.values, x, lambda array: array), compute(scene.values, x)
    for row in rows:
        expected = np.sqrt(((twin[row["tensor"]] - exact[row["tensor"]]) ** 2).sum() / (exact[row["tensor"]] ** 2).sum())
        assert row["error"][0] == pytest.approx(expected, rel=0.02) and 0 < row["error"][0] < 0.002
    assert [row["node"] for row in rows] == ["conv1", "relu1", "pool1", "conv2", "add2", "relu2", "pool2", "flatten", "classifier"]


def test_usage_errors_and_the_twin_of_another_model(scene, tmp_path):
    side = scene.card()
    other = write_network(tmp_path / "other.onnx", changed(scene.values, conv1_bias=plus(0, 1)))
    check_error(script("tools/compare.py", side, "--onnx", other, "--rehearsal", scene.twin, "--bins", scene.bins),
                "t.onnx: is not the float16 twin of", "tools/rehearse.py float16")
    for more in (["--layers"], ["--rehearsal", scene.twin, "--max-flips", 1], ["--rehearsal", scene.twin, "--max-difference", 1]):
        check_error(script("tools/compare.py", side, "--onnx", scene.model, "--bins", scene.bins, *more), code=2)
    check_error(script("tools/compare.py", scene.twin, side), "--model MODEL", code=2)
    batch = write_network(tmp_path / "bs4.onnx", scene.values, 4)
    twin = make_twin(batch, tmp_path / "bs4_t.onnx")
    command = ["tools/compare.py", side, "--onnx", batch, "--rehearsal", twin, "--bins", scene.bins]
    assert script(*command).returncode == 0
    check_error(script(*command, "--layers"), "bs4.onnx: its batch size is 4", "give models of batch size 1")
    command[1] = write_network(tmp_path / "faulty.onnx", changed(scene.values, conv1_weight=plus(slice(None), 0.01)), 4)
    check_error(script(*command), "by more than float16 explains", "bs4.onnx: its batch size is 4")
