"""A small network in ONNX and in numpy, and the results of a card that runs it in float16."""
import numpy as np
import onnx
import pytest
from onnx import helper

import compare
from helpers import make_model, script, tensor_info
from lib.images import MEAN, STD

SIZE, CHANNELS, ATTRIBUTES, IMAGES = 16, 8, 6, 12
NAMES = ["im%02d" % i for i in range(IMAGES)]


def float16(array):
    """Rounds to float16, as numpy does."""
    with np.errstate(over="ignore"):
        return array.astype(np.float16).astype(np.float64)


def grid(array):
    """Values that rounding to float16 makes multiples of 1/16, of which float32 adds up hundreds exactly, in any order."""
    array = np.rint(array * 16) / 16
    return (array + np.where(array == 0, 0, 2.0 ** -17)).astype("<f4")


def weights():
    random = np.random.RandomState(5)
    shapes = {"conv1.weight": (CHANNELS, 3, 3, 3), "conv1.bias": (CHANNELS,), "conv2.weight": (CHANNELS, CHANNELS, 3, 3),
              "conv2.bias": (CHANNELS,), "classifier.weight": (ATTRIBUTES, CHANNELS), "classifier.bias": (ATTRIBUTES,)}
    return {name: (random.standard_normal(shape) / 3).astype(np.float32) for name, shape in shapes.items()}


def write_network(path, values, batch=1):
    """DeepMAR's kinds of layers: two convolutions, a shortcut around the second, pooling, the classifier."""
    nodes = [helper.make_node("Conv", ["actual_input_1", "conv1.weight", "conv1.bias"], ["c1"], "conv1", pads=[1] * 4),
             helper.make_node("Relu", ["c1"], ["r1"], "relu1"),
             helper.make_node("MaxPool", ["r1"], ["p1"], "pool1", kernel_shape=[4, 4], strides=[4, 4]),
             helper.make_node("Conv", ["p1", "conv2.weight", "conv2.bias"], ["c2"], "conv2", pads=[1] * 4),
             helper.make_node("Add", ["c2", "p1"], ["a2"], "add2"), helper.make_node("Relu", ["a2"], ["r2"], "relu2"),
             helper.make_node("AveragePool", ["r2"], ["p2"], "pool2", kernel_shape=[4, 4]),
             helper.make_node("Flatten", ["p2"], ["f"], "flatten"),
             helper.make_node("Gemm", ["f", "classifier.weight", "classifier.bias"], ["output1"], "classifier", transB=1)]
    onnx.save(make_model(nodes, [tensor_info("actual_input_1", [batch, 3, SIZE, SIZE])], [tensor_info("output1", [batch, ATTRIBUTES])],
                         values.items()), str(path))
    return str(path)


def conv(x, weight, bias):
    height, width = x.shape[2:]
    x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), "constant")
    return bias[:, None, None] + sum(
        np.einsum("oc,nchw->nohw", weight[:, :, i, j], x[:, :, i:i + height, j:j + width]) for i in range(3) for j in range(3))


def pool(x, how):
    return how(x.reshape(x.shape[:2] + (x.shape[2] // 4, 4, x.shape[3] // 4, 4)), axis=(3, 5))


def compute(values, x, rounded=float16, fused=False):
    """{tensor: value} of the network in numpy. fused: as a card may do it, a convolution is rounded with what follows it."""
    w = {name: rounded(value.astype(np.float64)) for name, value in values.items()}
    inner = (lambda array: array) if fused else rounded
    t = {"c1": inner(conv(rounded(x.astype(np.float64)), w["conv1.weight"], w["conv1.bias"]))}
    t["r1"] = rounded(np.maximum(t["c1"], 0))
    t["p1"] = pool(t["r1"], np.max)
    t["c2"] = inner(conv(t["p1"], w["conv2.weight"], w["conv2.bias"]))
    t["a2"] = inner(t["c2"] + t["p1"])
    t["r2"] = rounded(np.maximum(t["a2"], 0))
    t["p2"] = rounded(pool(t["r2"], np.mean))
    t["f"] = t["p2"].reshape(len(x), -1)
    t["output1"] = rounded(t["f"].dot(w["classifier.weight"].T) + w["classifier.bias"])
    return t


def write_bins(folder, arrays):
    folder.mkdir()
    for name, array in zip(NAMES, arrays):
        (folder / (name + ".bin")).write_bytes(array.tobytes())
    return str(folder)


def pictures():
    """Random pictures, uint8 [images,height,width,3], each with another colour and brightness."""
    random = np.random.RandomState(2)
    return (random.randint(0, 256, (IMAGES, 1, 1, 3)) + random.randint(-60, 60, (IMAGES, SIZE, SIZE, 3))).clip(0, 255).astype(np.uint8)


def normalised(pixels, mean=MEAN, std=STD):
    """What stage 4 makes of them."""
    return ((pixels.astype(np.float32) / 255 - np.float32(mean)) / np.float32(std)).transpose(0, 3, 1, 2).astype("<f4")


def make_twin(path, target, action="float16", *more):
    done = script("tools/rehearse.py", action, path, target, *more)
    assert done.returncode == 0, done.stderr
    return str(target)


class Scene(object):
    """A model, its twin and bins. The card's results are computed in numpy."""

    def __init__(self, folder):
        self.folder, self.values, self.pixels = folder, weights(), pictures()
        self.bins = write_bins(folder / "bins", normalised(self.pixels))
        self.model = write_network(folder / "m.onnx", self.values)
        self.twin = make_twin(self.model, folder / "t.onnx")

    def card(self, values=None, inputs=None):
        """Writes the results of a card that computes with these weights on these inputs. Returns the folder."""
        inputs = normalised(self.pixels) if inputs is None else inputs
        logits = compute(self.values if values is None else values, inputs, fused=True)["output1"]
        self.folder.joinpath("result").mkdir(exist_ok=True)
        for name, row in zip(NAMES, logits):
            (self.folder / "result" / (name + "_1.bin")).write_bytes(row.astype("<f4").tobytes())
        return str(self.folder / "result")

    def compare(self, side, *more):
        """Runs compare.py --rehearsal on a side."""
        compare.main([side, "--onnx", self.model, "--rehearsal", self.twin, "--bins", self.bins] + list(more))

    def refused(self, side):
        with pytest.raises(ValueError) as error:
            self.compare(side)
        return str(error.value)
