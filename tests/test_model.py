"""DeepMAR.py: a drop-in for the open-source model, and every form of checkpoint."""
import argparse
import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torchvision

import DeepMAR
from DeepMAR import DeepMAR_ResNet50, DeepMAR_ResNet50_ExtractFeature, build_model, load_checkpoint, load_model

LEGACY = {"_use_new_zipfile_serialization": False}
torch.set_num_threads(1)  # threads that wait for each other are slow on a busy machine


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return DeepMAR_ResNet50().state_dict()


@pytest.fixture
def small(monkeypatch):
    """The state dict of a small network; load_model then takes it for a DeepMAR."""
    monkeypatch.setattr(DeepMAR, "BLOCKS", [1, 1, 1, 1])
    torch.manual_seed(0)
    return DeepMAR_ResNet50().state_dict()


@pytest.fixture(scope="module")
def image():
    return torch.from_numpy(np.random.RandomState(0).standard_normal((1, 3, 224, 224)).astype(np.float32))


def logits(model, image):
    return DeepMAR_ResNet50_ExtractFeature(model)(image)


def test_keys_are_the_open_source_models(state):
    """torchvision's names below base., without fc; the open-source repository's resnet.py has the same."""
    backbone = {"base." + key for key in torchvision.models.resnet50().state_dict() if not key.startswith("fc.")}
    assert set(state) == backbone | {"classifier.weight", "classifier.bias"}
    assert state["classifier.weight"].shape == (35, 2048) and "base.layer4.2.bn3.running_var" in state


def training():
    torch.manual_seed(1)
    DeepMAR.BLOCKS = [1, 1, 1, 1]
    model = DeepMAR_ResNet50(num_att=4, last_conv_stride=1, drop_pool5=True, drop_pool5_rate=0.5, pretrained=False)
    torch.nn.init.normal_(model.classifier.weight)
    images = torch.randn(2, 3, 64, 48)
    assert model.base(images).shape == (2, 2048, 4, 3)  # stride 16 instead of 32
    assert DeepMAR_ResNet50().base(images).shape == (2, 2048, 2, 2)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    before = [parameter.clone() for parameter in model.parameters()]
    torch.nn.functional.binary_cross_entropy_with_logits(model(images), torch.ones(2, 4)).backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters()))
    model.eval()
    assert torch.equal(model(images), model(images))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.0
    model.train()
    assert not torch.equal(model(images), model(images))
    model.drop_pool5 = False
    assert torch.equal(model(images), model(images))


def test_trainable_and_dropout_only_in_training():
    """In a process of its own, left at once: a backward pass of torch 1.6 was seen to damage the heap."""
    subprocess.run([sys.executable, "-c", "import os, test_model; test_model.training(); os._exit(0)"], check=True,
                   env=dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)))


def test_extract_feature_keeps_the_mode(small, image):
    model = DeepMAR_ResNet50(num_att=35).train()
    result = DeepMAR_ResNet50_ExtractFeature(model=model)(image)
    assert model.training and isinstance(result, np.ndarray) and result.shape == (1, 35)
    with pytest.raises(ValueError):
        DeepMAR_ResNet50_ExtractFeature(model)(image.numpy())


def optimizer_state():
    return {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.001, "params": [0, 1]}]}


@pytest.mark.parametrize("arguments", [{}, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize("form", ["state_dict", "state_dicts", "bare", "old", "extras"])
def test_every_form(tmp_path, small, image, form, arguments):
    state = small
    module = OrderedDict(("module." + key, value) for key, value in state.items())
    content = {
        "state_dict": {"epoch": 3, "arch": "DeepMAR", "state_dict": module, "best": 0.7},
        "state_dicts": {"state_dicts": [state, optimizer_state()], "ep": 150, "scores": 0},
        "bare": state,
        "old": {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")},
        "extras": {"state_dict": state, "best": np.float64(0.5), "args": argparse.Namespace(lr=1), "all": np.ones(3)},
    }[form]
    torch.save(content, str(tmp_path / "c.pth"), **arguments)
    model = load_model(str(tmp_path / "c.pth"))
    assert not model.training and model.num_att == 35
    expected = DeepMAR_ResNet50()
    expected.load_state_dict(state)
    assert np.array_equal(logits(model, image), logits(expected, image))


def python2_pickle(value, storages):
    """Pickles with the opcodes of Python 2.7's protocol 2: str as SHORT_BINSTRING, long as LONG1, bool as INT."""
    def text(string):
        return b"U" + bytes([len(string)]) + string.encode()

    def number(integer):
        return b"\x8a\x04" + struct.pack("<i", integer)

    def pickled(item):
        if item is None:
            return b"N"
        if isinstance(item, bool):
            return b"I0%d\n" % item
        if isinstance(item, int):
            return number(item)
        if isinstance(item, str):
            return text(item)
        if isinstance(item, float):
            return b"G" + struct.pack(">d", item)
        if isinstance(item, list):
            return b"](" + b"".join(map(pickled, item)) + b"e"
        if isinstance(item, OrderedDict):
            pairs = b"".join(b"]" + b"(" + pickled(key) + pickled(value) + b"e" for key, value in item.items())
            metadata = b"}" + text("_metadata") + b"ccollections\nOrderedDict\n](]" + b"(" + text("") \
                + b"}" + text("version") + number(1) + b"see\x85Rs"
            return b"ccollections\nOrderedDict\n](" + pairs + b"e\x85R" + metadata + b"b"
        if isinstance(item, dict):
            return b"}(" + b"".join(pickled(key) + pickled(value) for key, value in item.items()) + b"u"
        kind = {torch.float32: "Float", torch.int64: "Long"}[item.dtype]
        key = str(len(storages))
        storages.append((key, item))
        reference = b"(" + text("storage") + b"ctorch\n%sStorage\n" % kind.encode() + text(key) + text("cuda:0") \
            + number(item.numel()) + b"NtQ"
        numbers = [b"(" + b"".join(map(number, sizes)) + b"t" for sizes in (item.shape, item.stride())]
        return b"ctorch._utils\n_rebuild_tensor_v2\n(" + reference + number(0) + b"".join(numbers) \
            + b"I00\nccollections\nOrderedDict\n)RtR"
    return b"\x80\x02" + pickled(value) + b"."


def test_python_2_files(tmp_path, small, image):
    """save_ckpt's own: Python 2.7, torch <= 1.4, an optimizer in it. torch.load's weights_only refuses such a file."""
    state, storages = small, []
    content = python2_pickle({"state_dicts": [OrderedDict(state), optimizer_state()], "ep": 150, "scores": 0}, storages)
    with open(str(tmp_path / "ckpt.pth"), "wb") as f:
        f.write(pickle.dumps(DeepMAR.MAGIC, 2) + b"\x80\x02M\xe9\x03.")
        f.write(b"\x80\x02}(U\x10protocol_versionM\xe9\x03U\rlittle_endian\x88U\ntype_sizes}(U\x03intK\x04U\x04longK\x04"
                b"U\x05shortK\x02uu.")
        f.write(content + pickle.dumps([key for key, _ in storages], protocol=2))
        for _, tensor in storages:
            f.write(struct.pack("<q", tensor.numel()) + tensor.contiguous().numpy().tobytes())
    model = load_model(str(tmp_path / "ckpt.pth"))
    expected = DeepMAR_ResNet50()
    expected.load_state_dict(state)
    assert np.array_equal(logits(model, image), logits(expected, image))
    if hasattr(torch.serialization, "add_safe_globals"):  # the file is what it claims to be
        with pytest.raises(pickle.UnpicklingError):
            torch.load(str(tmp_path / "ckpt.pth"), map_location="cpu", weights_only=True)


@pytest.mark.parametrize("attributes", [26, 51])
def test_the_number_of_attributes_follows_from_the_checkpoint(small, attributes):
    state = dict(small)
    state["classifier.weight"], state["classifier.bias"] = torch.zeros(attributes, 2048), torch.zeros(attributes)
    assert build_model(state).num_att == attributes


def test_what_does_not_fit_is_named(state):
    def message(changed):
        with pytest.raises(ValueError) as error:
            build_model(changed)
        return str(error.value)

    less = {key: value for key, value in state.items() if key != "base.layer3.2.conv1.weight"}
    assert "missing: base.layer3.2.conv1.weight" in message(less)
    assert "unexpected: base.extra" in message(dict(state, **{"base.extra": torch.zeros(1)}))
    assert "wrong shapes: base.conv1.weight [64, 3, 3, 3] instead of [64, 3, 7, 7]" in message(
        dict(state, **{"base.conv1.weight": torch.zeros(64, 3, 3, 3)}))
    classifier = {"classifier.weight": torch.zeros(35, 2048), "classifier.bias": torch.zeros(35)}
    for name, blocks in (("resnet101", "[3, 4, 23, 3]"), ("resnet18", "[2, 2, 2, 2] residual blocks of two"),
                         ("resnet34", "two convolutions")):
        other = getattr(torchvision.models, name)().state_dict()
        other = dict({"base." + key: value for key, value in other.items() if not key.startswith("fc.")}, **classifier)
        assert "another backbone" in message(other) and blocks in message(other)
    assert "none instead of classifier.weight" in message({"fc.weight": torch.zeros(2, 2)})
    quantised = {key: (value * 100).to(torch.int8) if key.endswith("conv1.weight") else value for key, value in state.items()}
    assert "whole numbers instead of weights, as in a quantised model: base.conv1.weight, " in message(quantised)
    # so many attributes would not fit into the memory
    many = torch.zeros(1).expand(10 ** 9, 1)
    assert "[1000000000, 1] instead of classifier.weight [num_att,2048]" in message({"classifier.weight": many})


@pytest.mark.parametrize("stride", [1, 2])
def test_the_same_checkpoint_with_each_stride_and_any_size(tmp_path, small, stride):
    torch.save(small, str(tmp_path / "c.pth"))
    model = load_model(str(tmp_path / "c.pth"), last_conv_stride=stride)
    for height, width in ((224, 224), (256, 128), (100, 60), (7, 5)):
        images = torch.from_numpy(np.random.RandomState(0).standard_normal((1, 3, height, width)).astype(np.float32))
        with torch.no_grad():
            features = model.base(images)
            assert features.shape[2:] == tuple(-(-size // (16 * stride)) for size in (height, width))
            pooled = torch.nn.functional.linear(features.mean((2, 3)), model.classifier.weight, model.classifier.bias)
        assert np.allclose(logits(model, images), pooled.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_files_that_are_no_checkpoint(tmp_path, small):
    state, good = small, io.BytesIO()
    torch.save({"state_dict": state}, good)
    legacy = io.BytesIO()
    torch.save({"state_dict": state}, legacy, **LEGACY)
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10000000)
    script = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), script)
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    files = {"empty": b"", "page.html": b"<!DOCTYPE html><html>", "picture": b"\x89PNG\r\n", "bomb": bomb.getvalue(),
             "torchscript": script.getvalue(), "tar": tar.getvalue(), "list": pickle.dumps([1, 2], 2),
             "zip": b"PK\x03\x04" + b"\0" * 50}
    for name, data in (("good", good.getvalue()), ("legacy", legacy.getvalue())):
        for cut in (1, 20, 300, 5000, len(data) // 2, len(data) - 1):
            files["%s cut at %d" % (name, cut)] = data[:cut]
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError) as error:
            load_model(str(tmp_path / name))
        assert name in str(error.value) and "\n" not in str(error.value), str(error.value)
    for content, text in (({"a": 1}, "no state dict"), ([1], "not a state dict"), ({"state_dict": 3}, "no state dict"),
                          ({"state_dicts": []}, "no state dict"), ({}, "not a state dict"),
                          (dict(state, **{"classifier.bias": torch.full((35,), float("nan"))}), "classifier.bias holds NaN")):
        torch.save(content, str(tmp_path / "other"))
        with pytest.raises(ValueError, match=text):
            load_model(str(tmp_path / "other"))
    with pytest.raises(OSError, match="nowhere: no such file"):
        load_model(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("arguments", [{}, LEGACY], ids=["zip", "legacy"])
def test_a_whole_pickled_model_is_refused_with_the_remedy(tmp_path, small, arguments):
    for content, said in ((DeepMAR_ResNet50(), "holds an object of DeepMAR.DeepMAR_ResNet50, not a state dict; save"),
                          ({"epoch": 3, "model": DeepMAR_ResNet50()}, r"model \(DeepMAR.DeepMAR_ResNet50\)")):
        torch.save(content, str(tmp_path / "model.pth"), **arguments)
        with pytest.raises(ValueError, match=said) as error:
            load_model(str(tmp_path / "model.pth"))
        assert "save model.state_dict()" in str(error.value)


def test_a_path_object(tmp_path, small):
    torch.save(small, str(tmp_path / "c.pth"))
    assert set(load_checkpoint(tmp_path / "c.pth")) == set(small)
