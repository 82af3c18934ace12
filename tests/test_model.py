"""DeepMAR.py: a drop-in for the open-source model; every checkpoint form; no file runs code."""
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
from conftest import ROOT
from DeepMAR import DeepMAR_ResNet50, DeepMAR_ResNet50_ExtractFeature, build_model, load_checkpoint, load_model

LEGACY = {"_use_new_zipfile_serialization": False}


@pytest.fixture(scope="module")
def state():
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


def test_extract_feature_keeps_the_mode(state, image):
    model = DeepMAR_ResNet50(num_att=35)
    model.load_state_dict(state)
    model.train()
    result = DeepMAR_ResNet50_ExtractFeature(model=model)(image)
    assert model.training and isinstance(result, np.ndarray) and result.shape == (1, 35)
    with pytest.raises(ValueError):
        DeepMAR_ResNet50_ExtractFeature(model)(image.numpy())


def optimizer_state():
    return {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.001, "params": [0, 1]}]}


@pytest.mark.parametrize("arguments", [{}, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize("form", ["state_dict", "state_dicts", "bare", "old", "extras"])
def test_every_form(tmp_path, state, image, form, arguments):
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


def test_python_2_files(tmp_path, state, image):
    """save_ckpt's own: Python 2.7, torch <= 1.4, an optimizer in it. torch.load's weights_only refuses such a file."""
    storages = []
    content = python2_pickle({"state_dicts": [OrderedDict(state), optimizer_state()], "ep": 150, "scores": 0}, storages)
    with open(str(tmp_path / "ckpt.pth"), "wb") as f:
        f.write(DeepMAR.MAGIC + b"\x80\x02M\xe9\x03.")
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
def test_the_number_of_attributes_follows_from_the_checkpoint(state, attributes):
    state = dict(state)
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
    # so many attributes would not fit into the memory
    many = torch.zeros(1).expand(10 ** 9, 1)
    assert "[1000000000, 1] instead of classifier.weight [num_att,2048]" in message({"classifier.weight": many})


class Payload(object):
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def call(name, *arguments):
    """The pickle, protocol 4, of a call of a function by its dotted name, which need not exist here."""
    module, function = name
    return (b"\x80\x04\x8c" + bytes([len(module)]) + module.encode() + b"\x8c" + bytes([len(function)])
            + function.encode() + b"\x93(" + b"".join(pickle.dumps(a, 2)[2:-1] for a in arguments) + b"tR.")


def payloads(canary):
    """Pickles that create the file canary if anything in them is executed."""
    touch, python = "touch %s" % canary, "open(%r, 'w').close()" % canary
    deep = {"state_dicts": [OrderedDict(), {"state": {0: {"momentum_buffer": Payload(os.system, touch)}}}]}
    text = pickle.dumps(touch, 2)[2:-1]
    return {
        "os.system": pickle.dumps(Payload(os.system, touch), 2),
        "deep in the optimizer": pickle.dumps(deep, 2),
        "eval": pickle.dumps(Payload(eval, python), 2), "exec": pickle.dumps(Payload(exec, python), 2),
        "subprocess": pickle.dumps(Payload(subprocess.Popen, ["touch", canary]), 2),
        "torch.load": call(("torch", "load"), canary), "torch.save": call(("torch", "save"), 1, canary),
        "dotted": call(("collections", "OrderedDict.__init__.__globals__"), touch),
        "torch dotted": call(("torch", "os.system"), touch),
        "torch._utils dotted": call(("torch._utils", "torch.os.system"), touch),
        "getattr": pickle.dumps(Payload(getattr, "", "upper"), 2),
        "numpy runstring": call(("numpy.testing._private.utils", "runstring"), python, {}),
        "Python 2 names": b"\x80\x02c__builtin__\neval\n(" + pickle.dumps(python, 2)[2:-1] + b"tR.",
        "INST": b"(" + text + b"iposix\nsystem\n.", "OBJ": b"(cposix\nsystem\n" + text + b"o.",
        # the name under which torch 1.6 and later look for a function that writes a file
        "BUILD": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}U\x08__code__cposix\nsystem\nsb.",
    }


def containers(path, data):
    """Puts a pickle where each container of torch.save has it; yields the files' names."""
    with open(path + ".legacy", "wb") as f:  # the content, then the keys of its storages
        f.write(DeepMAR.MAGIC + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2) + data + b"\x80\x02].")
    yield path + ".legacy"
    with open(path + ".first", "wb") as f:  # in the place of the magic number
        f.write(data)
    yield path + ".first"
    with open(path + ".second", "wb") as f:  # in that of the protocol's version
        f.write(DeepMAR.MAGIC + data)
    yield path + ".second"
    with zipfile.ZipFile(path + ".zip", "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
    yield path + ".zip"


@pytest.mark.parametrize("name", sorted(payloads("")))
def test_no_file_runs_code(tmp_path, name):
    canary = str(tmp_path / "canary")
    for path in containers(str(tmp_path / "bad"), payloads(canary)[name]):
        with pytest.raises(ValueError) as error:
            load_checkpoint(path)
        assert path in str(error.value) and "\n" not in str(error.value)
    assert not os.path.exists(canary)
    assert torch._utils._rebuild_tensor_v2.__code__.co_name == "_rebuild_tensor_v2"


def test_the_payloads_are_live(tmp_path):
    """Unguarded, they do create the file: so the test above can fail."""
    for name in ("os.system", "deep in the optimizer", "eval", "exec", "INST", "OBJ", "Python 2 names"):
        canary = tmp_path / name
        pickle.loads(payloads(str(canary).replace(" ", "_"))[name])
        assert os.path.exists(str(canary).replace(" ", "_")), name


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_files_that_are_no_checkpoint(tmp_path, state):
    good = io.BytesIO()
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
    for content, text in (({"a": 1}, "no state dict"), ([1], "no state dict"), ({"state_dict": 3}, "no state dict"),
                          ({"state_dicts": []}, "no state dict"), (dict(state, **{"classifier.bias": torch.full(
                              (35,), float("nan"))}), "classifier.bias holds NaN")):
        torch.save(content, str(tmp_path / "other"))
        with pytest.raises(ValueError, match=text):
            load_model(str(tmp_path / "other"))
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(OSError):
            load_model(str(path))


def test_a_whole_pickled_model_is_refused_with_the_remedy(tmp_path, state):
    torch.save(torch.nn.Linear(2, 2), str(tmp_path / "model.pth"))
    with pytest.raises(ValueError, match=r"torch\.nn\.modules\.linear\.Linear.*model\.state_dict\(\)"):
        load_model(str(tmp_path / "model.pth"))
    assert ROOT in sys.path
