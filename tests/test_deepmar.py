"""DeepMAR.py: the network, the checkpoints of every training script, and files made to do harm. tests/test_fuzz.py damages more.

The harmful parts replace the 'scores' entry of an otherwise valid checkpoint. If one ran, it would create a file 'canary'.
"""
import argparse
import copyreg
import datetime
import functools
import json
import multiprocessing
import os
import pathlib
import pickle
import resource
import signal
import struct
import sys
import tarfile
import time
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import DeepMAR
from DeepMAR import DeepMAR_ResNet50, DeepMAR_ResNet50_ExtractFeature, build_model, load_checkpoint, load_model
from lib import pickles

pytestmark = pytest.mark.filterwarnings("ignore")  # torch will change storages, quantised tensors and torch.jit
torch.set_num_threads(1)  # threads that wait for each other are slow on a busy machine
STATE = OrderedDict([("classifier.weight", torch.arange(6.).reshape(2, 3)), ("classifier.bias", torch.ones(2))])
OTHER = OrderedDict((key, value + 5) for key, value in STATE.items())
OPTIMIZER = {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
both_formats = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "earlier"])


def saved(path, content, zipped=True, **arguments):
    """Saves with torch. Returns the path as text."""
    torch.save(content, str(path), _use_new_zipfile_serialization=zipped, **arguments)
    return str(path)


def read(path, name=None):
    """Loads a checkpoint. Returns its state dict and the notes for the user."""
    notes = []
    return load_checkpoint(path, name, notes.append), notes


def same(state, expected=STATE):
    return set(state) == set(expected) and all(torch.equal(state[key], expected[key]) for key in expected)


def refusal(path, *arguments):
    """Returns the error of a file that is refused. It must be one line that begins with the file's name."""
    with pytest.raises(ValueError) as error:
        load_checkpoint(str(path), *arguments)
    message = str(error.value)
    assert message.startswith("%s: " % path) and message.isprintable() and len(message) < 1000
    return message


def succeeds(function):
    """Calls a function in a child process. Returns whether it raised nothing and was not killed."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join()
    return process.exitcode == 0


# --- the network ------------------------------------------------------------------------------------------------------

@pytest.fixture
def quick(monkeypatch):
    """Networks begin without random weights, which take time, where others replace them or nobody looks at them."""
    for function in ("kaiming_normal_", "kaiming_uniform_"):
        monkeypatch.setattr(torch.nn.init, function, lambda tensor, *_, **__: tensor)


@pytest.fixture(scope="module")
def small_state():
    with mock.patch.object(DeepMAR, "BLOCKS", [1, 1, 1, 1]):
        return DeepMAR_ResNet50(num_att=26).state_dict()


@pytest.fixture
def small(monkeypatch, small_state, quick):
    """The state dict of a small network, which load_model then takes for a DeepMAR."""
    monkeypatch.setattr(DeepMAR, "BLOCKS", [1, 1, 1, 1])
    return small_state


def images(height, width):
    return torch.from_numpy(np.random.RandomState(0).standard_normal((1, 3, height, width)).astype(np.float32))


def test_keys_are_those_of_the_open_source_model(quick):
    """torchvision's names below base., without fc; the open-source repository's resnet.py has the same."""
    state = DeepMAR_ResNet50().state_dict()
    backbone = {"base." + key for key in torchvision.models.resnet50().state_dict() if not key.startswith("fc.")}
    assert set(state) == backbone | {"classifier.weight", "classifier.bias"}
    assert state["classifier.weight"].shape == (35, 2048) and "base.layer4.2.bn3.running_var" in state


def test_training_changes_all_parameters_and_dropout_acts_only_then(monkeypatch):
    """In a child process, because a backward pass of torch 1.6 was seen to damage the heap."""
    monkeypatch.setattr(DeepMAR, "BLOCKS", [1, 1, 1, 1])

    def train():
        torch.manual_seed(1)
        model = DeepMAR_ResNet50(num_att=4, last_conv_stride=1, drop_pool5=True, drop_pool5_rate=0.5, pretrained=False)
        torch.nn.init.normal_(model.classifier.weight)
        batch = torch.randn(2, 3, 64, 48)
        before = [parameter.clone() for parameter in model.parameters()]
        torch.nn.functional.binary_cross_entropy_with_logits(model.train()(batch), torch.ones(2, 4)).backward()
        torch.optim.SGD(model.parameters(), lr=1e-5).step()
        assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters()))
        assert not torch.equal(model(batch), model(batch))
        model.drop_pool5 = False
        assert torch.equal(model(batch), model(batch))
        model.drop_pool5 = True
        assert torch.equal(model.eval()(batch), model(batch))
    assert succeeds(train)


def test_pretrained_weights_are_those_of_torchvision(small, monkeypatch):
    imagenet = ResNet(Bottleneck, [1, 1, 1, 1])
    torch.nn.init.ones_(imagenet.conv1.weight)
    monkeypatch.setattr(torchvision.models, "resnet50", lambda **arguments: imagenet)
    assert same(DeepMAR_ResNet50(pretrained=True).base.conv1.state_dict(), imagenet.conv1.state_dict())


def test_extract_feature_restores_the_mode(small):
    model = DeepMAR_ResNet50().train()
    result = DeepMAR_ResNet50_ExtractFeature(model=model)(images(64, 64))
    assert model.training and isinstance(result, np.ndarray) and result.shape == (1, 35)
    with pytest.raises(ValueError, match="^imgs must be a torch.Tensor, not ndarray$"):
        DeepMAR_ResNet50_ExtractFeature(model)(images(64, 64).numpy())


def test_every_form_gives_the_same_network(tmp_path, small):
    for form, zipped in (
            ({"epoch": 3, "arch": "DeepMAR", "state_dict": {"module." + key: value for key, value in small.items()}}, True),  # Ascend's
            ({"state_dicts": [small, OPTIMIZER], "ep": 150, "scores": 0}, False),  # the open-source repository's
            ({key: value for key, value in small.items() if not key.endswith("num_batches_tracked")}, False)):  # torch < 0.4.1
        model = load_model(saved(tmp_path / "c.pth", form, zipped))
        assert not model.training and model.num_att == 26 and same(model.state_dict(), small)


def test_what_does_not_fit_is_named(tmp_path, small):
    def message(changed):
        with pytest.raises(ValueError, match="^not a DeepMAR ResNet-50 checkpoint: ") as error:
            build_model(changed)
        return str(error.value)

    less = {key: value for key, value in small.items() if key != "base.layer3.0.conv1.weight"}
    assert "missing: base.layer3.0.conv1.weight" in message(less)
    assert "unexpected: base.extra" in message(dict(small, **{"base.extra": torch.zeros(1)}))
    assert "wrong shapes: base.conv1.weight [64, 3, 3, 3] instead of [64, 3, 7, 7]" in message(
        dict(small, **{"base.conv1.weight": torch.zeros(64, 3, 3, 3)}))
    for network, blocks in ((ResNet(Bottleneck, [1, 1, 2, 1]), "[1, 1, 2, 1] residual blocks; ResNet-50 has [1, 1, 1, 1]"),
                            (ResNet(BasicBlock, [1, 1, 1, 1]), "[1, 1, 1, 1] residual blocks of two convolutions; ResNet-50")):
        other = {"base." + key: value for key, value in network.state_dict().items() if not key.startswith("fc.")}
        other.update((key, small[key]) for key in ("classifier.weight", "classifier.bias"))
        assert "another backbone (%s" % blocks in message(other)
    quantised = dict(small, **{"base.conv1.weight": small["base.conv1.weight"].to(torch.int8)})
    assert "whole numbers instead of weights, as in a quantised model: base.conv1.weight" in message(quantised)
    assert "none instead of classifier.weight [num_att,2048]; its keys are fc.weight" in message({"fc.weight": torch.zeros(2, 2)})
    many = torch.zeros(1).expand(10 ** 9, 1)  # a network with so many attributes would not fit into the memory
    assert "[1000000000, 1] instead of classifier.weight [num_att,2048]" in message({"classifier.weight": many})
    with pytest.raises(ValueError, match="c.pth: not a DeepMAR ResNet-50 checkpoint: "):
        load_model(saved(tmp_path / "c.pth", STATE))


def test_a_checkpoint_fits_each_stride_and_image_size(tmp_path, small):
    path = saved(tmp_path / "c.pth", small)
    models = {stride: load_model(path, last_conv_stride=stride) for stride in (1, 2)}
    for stride, size in ((1, (100, 60)), (2, (100, 60)), (2, (96, 64)), (2, (7, 5))):
        model = models[stride]
        with torch.no_grad():
            features = model.base(images(*size))
            assert features.shape[2:] == tuple(-(-side // (16 * stride)) for side in size)
            pooled = torch.nn.functional.linear(features.mean((2, 3)), model.classifier.weight, model.classifier.bias)
        assert np.allclose(DeepMAR_ResNet50_ExtractFeature(model)(images(*size)), pooled.numpy(), rtol=1e-4, atol=1e-5)


# --- files made to do harm ------------------------------------------------------------------------------------------

MAGIC = pickle.dumps(DeepMAR.MAGIC, 2)
MARK = "MARK-MARK"
MARKED = pickle.dumps(MARK, 2)[2:-3]  # without PROTO, BINPUT 0 and STOP
EXTENSION = 0x70  # the number of posix.system in copyreg's table, while a test runs


def text(string):
    return b"X" + struct.pack("<I", len(string)) + string.encode()


def name(module, function):
    """GLOBAL for a plain name; STACK_GLOBAL of protocol 4, which follows dots, for the others."""
    if "." in function:
        return b"\x80\x04" + text(module) + text(function) + b"\x93"
    return b"c%s\n%s\n" % (module.encode(), function.encode())


def call(module, function, *arguments):
    return name(module, function) + b"(" + b"".join(
        argument if isinstance(argument, bytes) else text(argument) for argument in arguments) + b"tR"


def payloads(canary):
    """Returns {what it uses: opcodes}. pickle.loads would create the file canary; of the last two, torch.load might."""
    shell, python = "echo > " + canary, "open(%r, 'w').close()" % canary
    return {
        "REDUCE": call("os", "system", shell),
        "Python 2's name": call("__builtin__", "eval", python),
        "dotted name": call("shutil", "os.system", shell),
        "getattr": call("builtins", "getattr", call("importlib", "import_module", "os"), "system") + b"(" + text(shell) + b"tR",
        "INST": b"(" + text(shell) + b"iposix\nsystem\n",
        "OBJ": b"(" + name("posix", "system") + text(shell) + b"o",
        "NEWOBJ_EX": name("subprocess", "Popen") + b")}\x920" + call("os", "system", shell),
        "extension": b"\x82" + bytes([EXTENSION]) + b"(" + text(shell) + b"tR",
        "BUILD": name("argparse", "Namespace") + b"N}" + text("__setstate__") + name("posix", "system") + b"s\x86b)R"
        + text(shell) + b"b",
        "persistent id": b"(" + text("module") + name("os", "system") + text(shell) + text(shell) + b"tQ(" + text(shell) + b"tR",
        "rebuild": call("torch._tensor", "_rebuild_from_type_v2", name("os", "system"), name("torch", "Tensor"),
                        b"(" + text(shell) + b"t", b"N"),
    }


# Where a payload stands, in place of the scores.
PLACES = {
    "value": lambda p: p, "keys": lambda p: b"}(" + p + b"K\x01" + p + b"K\x02u" + p + b"K\x03s",
    "sets": lambda p: b"(\x8f(" + p + p + b"\x90(" + p + b"\x91t", "called": lambda p: p + b")R" + p + b"N\x81",
    "state": lambda p: name("collections", "OrderedDict") + b")R" + p + b"b",
    "tensor": lambda p: name("torch_npu.utils.storage", "_rebuild_npu_tensor") + b"(" + p * 7 + b"tR",
}


def replaced(path, zipped, content, replacements):
    """Saves with torch, then replaces {bytes of the pickle: other bytes}. Returns the path as text."""
    saved(path, content, zipped)
    if zipped:
        with zipfile.ZipFile(str(path)) as archive:
            pickled, = [archive.read(member) for member in archive.namelist() if member.endswith("data.pkl")]
    else:
        pickled = path.read_bytes()
    for old, new in replacements.items():
        assert old in pickled
        pickled = pickled.replace(old, new)
    if zipped:
        return repacked(str(path), path, **{"data.pkl": pickled})
    path.write_bytes(pickled)
    return str(path)


def with_payload(path, zipped, payload, names=("scores", "state_dict")):
    """Writes a good checkpoint with the payload for its scores, or under another name."""
    return replaced(path, zipped, {names[0]: MARK, names[1]: STATE}, {MARKED: payload})


def repacked(source, path, compression=zipfile.ZIP_STORED, root="archive/", folders=(), **members):
    """Packs a file of torch.save again, as zip -0 -r does. members: changes of their content, by name."""
    content = dict.fromkeys(folders, b"")
    with zipfile.ZipFile(source) as archive:
        content.update((member.split("/", 1)[1], archive.read(member)) for member in archive.namelist())
    with zipfile.ZipFile(str(path), "w", compression) as changed:
        for member, data in dict(content, **members).items():
            changed.writestr(root + member, data)
    return str(path)


@pytest.fixture
def guarded(tmp_path, monkeypatch):
    """A folder. Afterwards, no payload may have run in it, and the reader may have imported nothing.

    Only the subclass may use Python's unpickler: its functions that import and call are replaced.
    """
    load_checkpoint(with_payload(tmp_path / "bad.pth", True, b"N"))  # imports what zip files need
    calls = []
    for module, function in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load"), (torch.jit, "load"),
                             (pickle._Unpickler, "find_class"), (pickle._Unpickler, "get_extension"),
                             (pickle._Unpickler, "load_build"), (pickle._Unpickler, "load_newobj"),
                             (pickle._Unpickler, "load_reduce")):
        monkeypatch.setattr(module, function, lambda *_: calls.append(1))
    monkeypatch.setitem(copyreg._inverted_registry, EXTENSION, ("posix", "system"))
    monkeypatch.setitem(copyreg._extension_cache, EXTENSION, os.system)
    modules = set(sys.modules)
    yield tmp_path
    assert not calls and set(sys.modules) == modules and os.listdir(str(tmp_path)) == ["bad.pth"]


def test_the_payloads_are_live(tmp_path, monkeypatch):
    """pickle.loads, as torch.load uses it, does create the file."""
    monkeypatch.setitem(copyreg._inverted_registry, EXTENSION, ("posix", "system"))
    canary = tmp_path / "canary"
    for payload, opcodes in payloads(str(canary)).items():
        if payload not in ("persistent id", "rebuild"):
            try:
                pickle.loads(b"\x80\x02" + opcodes + b".")
            except TypeError:
                assert payload == "NEWOBJ_EX"  # Popen without arguments
            assert canary.exists(), payload
            canary.unlink()


@both_formats
@pytest.mark.parametrize("place", sorted(PLACES))
def test_no_code_of_a_file_runs(guarded, zipped, place):
    path = guarded / "bad.pth"
    for payload, opcodes in payloads(str(guarded / "canary")).items():
        with_payload(path, zipped, PLACES[place](opcodes))
        if payload == "extension":
            assert "(UnpicklingError: it has an extension of copyreg, which nothing needs)" in refusal(path)
        elif place == "called":
            assert "(UnpicklingError: it calls a value that is no function)" in refusal(path)
        else:
            assert same(load_checkpoint(path)), payload


@both_formats
def test_no_code_runs_inside_the_state_dict_and_the_error_names_the_key(guarded, zipped):
    """The payload is the weight and the bias, or stands where a tensor's parts do."""
    path = guarded / "bad.pth"

    def arguments(function):
        return lambda p: name("torch._utils", function) + b"(" + p + p + b"(" + p + b"t" + p + b"tR"
    inside = [PLACES["value"], PLACES["tensor"], arguments("_rebuild_parameter_with_state"), arguments("_rebuild_from_type_v2")]
    for payload, opcodes in payloads(str(guarded / "canary")).items():
        for wrapped in inside:
            entries = [text(key) + wrapped(opcodes) for key in STATE]
            # It replaces the scores, which come before the good state dict. The scores are named state_dict now.
            with_payload(path, zipped, b"}(" + b"".join(entries) + b"u", ("state_dict", "scores"))
            assert (": classifier.weight is " in refusal(path)) == (payload != "extension"), payload


def test_no_code_runs_in_any_of_the_five_pickles(guarded):
    """The earlier format has pickles of a magic number, a version, the system, the content and the storages' names."""
    for opcodes in payloads(str(guarded / "canary")).values():
        for place in range(5):
            pickles_ = [MAGIC] + [pickle.dumps(value, 2) for value in (1001, {"little_endian": True}, {}, [])]
            pickles_[place] = b"\x80\x02" + opcodes + b"."
            (guarded / "bad.pth").write_bytes(b"".join(pickles_))
            refusal(guarded / "bad.pth")


LEVELS = 10 ** 4
BOMBS = {
    "nested calls": b"ca\nb\n" * LEVELS + b"N" + b"\x85R" * LEVELS, "a list full of itself": b"]q\x01(" + b"h\x01" * 1000 + b"e",
    "a key of nested tuples": b"})" + b"\x85" * 15 * LEVELS + b"K\x01s", "marks": b"(" * 200 * LEVELS + b"N",
    "keys of 2 ** 100 tuples": b"})" + b"2\x86" * 100 + b"q\x01K\x01s\x8f(h\x01\x90(h\x01\x91(h\x01Nd",
    "a number of a million digits": b"\x95" + struct.pack("<Q", 10 ** 6 + 2) + b"I" + b"9" * 10 ** 6 + b"\n",
    "state dicts below a long key": b"}" + text("x" * 10 ** 6) + b"](" + (b"}" + text("classifier.weight") + b"ca\nb\ns") * 1000 + b"es",
    "bytearray of 2 ** 40": b"\x96" + struct.pack("<q", 2 ** 40),
}


def test_a_bomb_takes_neither_time_nor_memory(tmp_path):
    """Each may use 10 seconds, and all of them 200 MB."""
    def load_all():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for bomb, opcodes in BOMBS.items():
            print(bomb, file=sys.stderr)  # if the process is killed, the last one did it
            path = with_payload(tmp_path / "c.pth", True, b"}" + text("classifier.weight") + opcodes + b"s", ("state_dict", "scores"))
            resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 10, resource.RLIM_INFINITY))
            try:
                load_checkpoint(path)
            except ValueError as error:
                assert "MemoryError" not in str(error) and ("it is nested too deeply" in str(error)) == (bomb == "marks")
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024
    assert succeeds(load_all)


def test_a_line_is_limited():
    """Before 3.7.14, Python takes hours for a number of a million digits."""
    for frame in (b"", b"\x95" + struct.pack("<Q", 10 ** 4 + 2)):
        assert pickles.Unpickler(pickles.Pickle(frame + b"V" + b"x" * 1000 + b"\n.")).load() == "x" * 1000
        with pytest.raises(KeyError):  # the rest of the line is no opcode
            pickles.Unpickler(pickles.Pickle(frame + b"V" + b"x" * 10 ** 4 + b"\n.")).load()


def test_protocol_5_is_read_by_each_python():
    assert pickles.Unpickler(pickles.Pickle(b"\x80\x05\x96" + struct.pack("<q", 3) + b"abc.")).load() == b"abc"


def test_the_two_copies_of_the_reader_are_one():
    """DeepMAR.py is copied alone, so that it holds the text of lib/pickles.py."""
    with open(pickles.__file__) as copy, open(DeepMAR.__file__) as f:
        text_ = copy.read()
        assert text_[text_.index("class Named("):] in f.read()
    assert all(hasattr(DeepMAR, name_) for name_ in vars(pickles) if name_[0] != "_")  # the same imports


# --- Python 2.7 ----------------------------------------------------------------------------------------------------

def string(value):
    return b"U" + bytes([len(value)]) + value.encode()


def ordered(*pairs):
    """Python 2's OrderedDict is a call with a list of pairs."""
    return b"ccollections\nOrderedDict\n](" + b"".join(b"](" + key + value + b"e" for key, value in pairs) + b"e\x85R"


def python2_tensor(key, kind, count, size, stride, part=b"N"):
    storage = b"(" + string("storage") + name("torch", kind) + string(key) + string("cuda:0") + b"\x8a\x01" + bytes([count]) + part + b"tQ"
    return (name("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + b"K\x00(" + b"".join(b"K%c" % n for n in size) + b"t("
            + b"".join(b"K%c" % n for n in stride) + b"t\x89" + ordered() + b"tR")


def python2_file(path, content, storages):
    """Writes what Python 2.7's cPickle and torch 1.4 wrote, in the opcodes of a real file. storages: {name: values}."""
    path.write_bytes(b"".join([
        MAGIC, b"\x80\x02M\xe9\x03.\x80\x02}q\x01(U\x10protocol_versionq\x02M\xe9\x03U\ntype_sizesq\x03}q\x04(U\x03intq\x05K\x04"
        b"U\x05shortq\x06K\x02U\x04longq\x07K\x04uU\rlittle_endianq\x08\x88u.\x80\x02", content, b".\x80\x02]q\x01("]
        + [string(key) for key in storages] + [b"e."]
        + [struct.pack("<q", values.size) + values.tobytes() for values in storages.values()]))
    return path


def test_files_of_python_2_are_read(tmp_path):
    tensors = [python2_tensor("93840475000000", "FloatStorage", 6, (2, 3), (3, 1)), python2_tensor("1", "FloatStorage", 2, (2,), (1,)),
               python2_tensor("2", "LongStorage", 1, (), ())]
    model = ordered(*zip(map(string, ("classifier.weight", "classifier.bias", "count")), tensors)) + (
        b"}" + string("_metadata") + ordered((string(""), b"}" + string("version") + b"K\x01s")) + b"sb")
    optimizer = (b"}(" + string("state") + b"}I139640614320640\n}" + string("momentum_buffer") + tensors[0] + b"ss" + string("param_groups")
                 + b"]}(" + string("nesterov") + b"\x89" + string("params") + b"](I139640614320640\nI139640605219328\neuau")
    # A numpy scalar's bytes are text in Python 2, and not UTF-8.
    scalar = (b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(U\x02f8K\x00K\x01tR(K\x03U\x01<NNN"
              b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tbU\x08\x9a\x99\x99\x99\x99\x99\xe9?tR")
    for scores in (b"K\x00", scalar, b"](" + scalar + scalar + b"e"):
        path = python2_file(tmp_path / "c.pth", b"}(" + string("state_dicts") + b"](" + model + optimizer + b"e" + string("ep") + b"K\x96"
                            + string("scores") + scores + b"u",
                            {"93840475000000": np.arange(6, dtype="<f4"), "1": np.ones(2, "<f4"), "2": np.array([7], "<i8")})
        state = load_checkpoint(path)
        assert list(state) == list(STATE) + ["count"] and same(state, dict(STATE, count=torch.tensor(7)))
    options = {"weights_only": False} if "weights_only" in torch.load.__code__.co_varnames else {}
    assert same(torch.load(str(path), "cpu", encoding="latin1", **options)["state_dicts"][0], state)  # torch reads the same


def test_a_part_of_a_storage_is_read(tmp_path):
    """Before torch 0.4, a tensor's values could lie in a part of another one's storage."""
    def file(begin, length):
        tensor = python2_tensor("1", "FloatStorage", 20, (2, 3), (3, 1), b"(" + string("2") + b"\x8a\x01%c\x8a\x01%ct" % (begin, length))
        return python2_file(tmp_path / "c.pth", ordered((string("classifier.weight"), tensor)), {"1": np.arange(20, dtype="<f4")})
    assert load_checkpoint(file(4, 6))["classifier.weight"].tolist() == [[4, 5, 6], [7, 8, 9]]
    assert "classifier.weight reaches beyond its 5 values in the file" in refusal(file(4, 5))


# --- right files -------------------------------------------------------------------------------------------------------

class Config(dict):
    """A dict with attributes, as EasyDict and yacs's CfgNode are."""

    def __init__(self, **entries):
        super(Config, self).__init__(entries)
        self.__dict__ = self


Point = namedtuple("Point", "x y")
KEPT = [
    np.float64(0.789), np.arange(5.), np.array(["a"], dtype=object), np.dtype("f4"), {"scores": [np.int64(1)]},
    argparse.Namespace(lr=0.001, best=np.float32(3)), Counter([50, 100]), pathlib.PurePosixPath("/data/peta"), pathlib.Path("."),
    datetime.datetime(2024, 5, 6), datetime.timedelta(1), torch.device("cuda:1"), torch.float16, torch.Size([2]), torch.strided,
    {1, "a", (2, 3)}, frozenset([1]), defaultdict(list, a=[1]),
    deque([1, 2], 5), OrderedDict([((1, 2), 3)]), Config(lr=0.1, model=Config(name="DeepMAR")), 1 + 2j, slice(1, 2), range(9),
    bytearray(b"abc"), b"abc", Ellipsis, NotImplemented, functools.partial(int, base=2), len, signal.SIGINT, Point(1, 2), Point,
    {torch.device("cpu"): 1, signal.SIGINT: 2, pathlib.PurePath("a"): 3, (1, (2,)): 4, None: 5},
    torch.optim.SGD([torch.zeros(1)], 0.1), torch.nn.Linear(2, 2), np.random.RandomState(0).get_state(), ValueError("x")]


@pytest.mark.parametrize("arguments", [{}, {"zipped": False}, {"pickle_protocol": 1}, {"pickle_protocol": 4},
                                       {"zipped": False, "pickle_protocol": pickle.HIGHEST_PROTOCOL}], ids=str)
def test_what_a_training_run_keeps_with_the_state_dict_is_ignored(tmp_path, monkeypatch, arguments):
    """All of it is left alone, and none of it is imported."""
    content = OrderedDict([("kept%d" % number, kept) for number, kept in enumerate(KEPT)] + [("state_dict", STATE), ("after", KEPT)])
    path = saved(tmp_path / "c.pth", content, **arguments)
    monkeypatch.delitem(sys.modules, __name__)  # where some of the classes are
    state, notes = read(path)
    assert same(state) and notes == [] and __name__ not in sys.modules


class Rebuilt(object):
    """Pickles as a call of a function by its name, which need not exist."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def stand_in():
    """Stands for a function of a package, or of a later torch, that is not here. replaced() changes its name."""


FUNCTION = b"ctest_deepmar\nstand_in\n"


def parts(tensor):
    """The first arguments of the calls that make a tensor."""
    return tensor.storage(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), False, OrderedDict()


@both_formats
def test_tensors_of_an_npu_are_read(tmp_path, zipped):
    weight = torch.arange(20.)[2:8].view(3, 2).t()  # a part of its storage, turned
    expected = OrderedDict([("classifier.weight", weight), ("classifier.bias", torch.ones(2))])
    for format_ in (b"K\x02", call("torch_npu.npu._format", "Format", b"K\x02")):
        state = {"module." + key: Rebuilt(stand_in, *(parts(value) + (MARK,))) for key, value in expected.items()}
        momentum = Rebuilt(stand_in, *(parts(torch.ones(3)) + (MARK,)))
        for content in ({"state_dict": state, "optimizer": [momentum]}, {"optimizer": {"state": [momentum]}, "model": expected}):
            assert same(load_checkpoint(replaced(tmp_path / "c.pth", zipped, content, {
                FUNCTION: name("torch_npu.utils.storage", "_rebuild_npu_tensor"), MARKED: format_, text("cpu"): text("npu:0")})), expected)


@both_formats
def test_calls_around_a_tensor_are_followed(tmp_path, zipped):
    """Parameters and attributes as this torch and later ones write them, a tensor of an XLA device, one call in another.

    Ascend marks a format that the values in the file do not have.
    """
    rebuild = torch._utils._rebuild_tensor_v2
    plain, parameter = Rebuilt(rebuild, *parts(torch.ones(2, 3))), torch.nn.Parameter(torch.ones(2, 3))
    noted, attributes = torch.nn.Parameter(torch.ones(2, 3)), {"note": torch.device("cpu")}
    noted.note, expected = {"optim": "sgd", "device": torch.device("cpu")}, {"classifier.weight": torch.ones(2, 3)}
    with_hooks = (plain, True, OrderedDict())
    for value in (parameter, noted, Rebuilt(torch._utils._rebuild_parameter, parameter, True, OrderedDict()),
                  Rebuilt(rebuild, *(plain.arguments + ({"npu_format_/FRACTAL_Z": True},)))):
        assert same(load_checkpoint(saved(tmp_path / "c.pth", {"classifier.weight": value}, zipped)), expected)
    for function, arguments in (("_rebuild_parameter_with_state", with_hooks + (attributes,)),
                                ("_rebuild_from_type_v2", (rebuild, torch.Tensor, plain.arguments, attributes)),
                                ("_rebuild_from_type_v2", (torch._utils._rebuild_parameter, torch.Tensor, with_hooks, None)),
                                ("_rebuild_device_tensor_from_cpu_tensor", (plain, torch.float32, "xla:0"))):
        path = replaced(tmp_path / "c.pth", zipped, {"classifier.weight": Rebuilt(stand_in, *arguments)},
                        {FUNCTION: name("torch._utils", function)})
        assert same(load_checkpoint(path), expected), function


def test_prefixes_are_removed(tmp_path):
    for prefix in ("", "module.", "_orig_mod.", "module.module.", "_orig_mod.module.", "model.module."):
        content = {"state_dict": {prefix + key: value for key, value in STATE.items()}}
        assert read(saved(tmp_path / "c.pth", content))[1] == [] and same(load_checkpoint(tmp_path / "c.pth"))
        # in a key, and only in some keys
        for keys in (("classifier.%sweight" % prefix, "classifier.bias"), ("classifier.weight", prefix + "classifier.bias")):
            assert same(load_checkpoint(saved(tmp_path / "c.pth", dict(zip(keys, STATE.values())))))
    for prefix, named in (("net.", "net"), ("model.backbone.", "backbone"), ("classifier.", "classifier"), ("base.", "base")):
        state, notes = read(saved(tmp_path / "c.pth", {"state_dict": {prefix + key: value for key, value in STATE.items()}}))
        assert same(state) and notes == ([] if named == "net" else ["took its only state dict, state_dict." + named])


def test_keys_that_become_one_must_have_equal_values(tmp_path):
    twice = OrderedDict(STATE)
    twice.update(("model.module." + key, value.clone()) for key, value in STATE.items())
    assert same(load_checkpoint(saved(tmp_path / "equal.pth", {"state_dict": twice})))
    for changed in (STATE["classifier.bias"] + 1, STATE["classifier.bias"][:1], STATE["classifier.bias"].half() * 1.01):
        twice["model.module.classifier.bias"] = changed
        assert ("c.pth: classifier.bias and model.module.classifier.bias are the same key of the network, but their values differ; "
                "delete the wrong one") in refusal(saved(tmp_path / "c.pth", {"state_dict": twice}))


def test_what_does_not_belong_to_the_network_is_left_out(tmp_path):
    """torch's AveragedModel counts; a Lightning module has its loss's weights next to the model."""
    wrapped = {"model." + key: value for key, value in STATE.items()}
    averaged = {"module." + key: value for key, value in STATE.items()}
    for content, left in ((dict(averaged, n_averaged=torch.tensor(5)), "n_averaged"),
                          ({"state_dict": dict(wrapped, **{"criterion.pos_weight": torch.ones(2)})}, "criterion.pos_weight"),
                          (dict(STATE, epoch=3, path=pathlib.Path("a"), ema_decay=0.9), "epoch, path, ema_decay")):
        state, notes = read(saved(tmp_path / "c.pth", content))
        assert same(state) and notes == ["left out what does not belong to the network: " + left]
    wrapped["model.attention.weight"] = torch.ones(1)  # but this belongs to another network, and build_model will say so
    assert list(read(saved(tmp_path / "c.pth", wrapped))[0])[-1] == "model.attention.weight"


@pytest.mark.parametrize("content, taken, other", [
    ({"state_dict": STATE, "state_dict_ema": OTHER, "optimizer": OPTIMIZER}, "state_dict", "state_dict_ema"),
    ({"ema": {"module": OTHER, "decay": 0.99}, "model": STATE}, "model", "ema.module"),
    ({"state_dict": {"ema": OTHER, "net": STATE}}, "state_dict.net", "state_dict.ema"),
    ({"state_dicts": [STATE, OTHER, OPTIMIZER], "ep": 3}, "state_dicts.0", "state_dicts.1"),
    ({"state_dict": dict(STATE, **{"ema.module." + key: value for key, value in OTHER.items()})}, "state_dict", "state_dict.ema"),
    ({"epoch": 3, "weights": STATE, "best": {"swa": {"weights": OTHER}}}, "weights", "best.swa.weights"),
    (dict(STATE, ema=OTHER), "(top level)", "ema"), ([STATE, {"teacher": OTHER}], "0", "1.teacher")])
def test_the_likelier_of_several_state_dicts_is_taken_and_the_others_are_named(tmp_path, content, taken, other):
    path, note = saved(tmp_path / "c.pth", content), "took the state dict %s; it also has: %s (--state-dict NAME takes another)"
    state, notes = read(path)
    assert same(state) and notes[0] == note % (taken, other)
    state, notes = read(path, other)
    assert same(state, OTHER) and notes == [note % (other, taken)]
    assert "has no state dict momentum; it has: " in refusal(path, "momentum")


def test_ambiguous_state_dicts_are_refused(tmp_path):
    flat = {"fast." + key: value for key, value in STATE.items()}
    flat.update(("slow." + key, value) for key, value in OTHER.items())
    for content, names in (({"student": STATE, "teacher": OTHER}, "student, teacher"), (flat, "fast, slow"),
                           ({"nets": [STATE, OTHER]}, "nets.0, nets.1")):
        path = saved(tmp_path / "c.pth", content)
        assert "has several state dicts: %s; choose one with --state-dict NAME" % names in refusal(path)
    # The beginning of a name is enough if only one name has it.
    assert same(read(saved(path, {"model": STATE, "ema": {"module": OTHER}}), "ema")[0], OTHER)
    saved(path, {"model": STATE, "ema": {"fast": OTHER, "slow": OTHER.copy()}})
    assert "has more than one state dict ema; it has: model, ema.fast, ema.slow" in refusal(path, "ema")


@pytest.mark.parametrize("kind", [dict, OrderedDict, Config, defaultdict])
def test_the_only_state_dict_is_found_anywhere(tmp_path, kind):
    """An optimizer that knows the parameters' names, and other entries with these names, are no state dicts."""
    optimizer = {"state": {"classifier.weight": {"exp_avg": torch.ones(2, 3)}, "classifier.bias": {"exp_avg": torch.ones(2)}}}
    for where in DeepMAR.MODEL_NAMES + ["anything", "ema.module"]:
        content = kind()
        content.update(STATE)
        for part in reversed(where.split(".")):
            inner, content = content, kind()
            content.update({part: inner, "epoch": 3, "optimizer": optimizer, "train": {"classifier.weight": 0.1}})
        state, notes = read(saved(tmp_path / "c.pth", content))
        assert same(state)
        assert notes == ([] if where in DeepMAR.MODEL_NAMES else ["took its only state dict, " + where])


@both_formats
def test_a_file_without_a_state_dict_says_what_it_has(tmp_path, zipped):
    linear = torch.nn.Linear(1, 1)  # a whole pickled model
    for content, message in (
            ({"epoch": 3, "model": linear, "best": {}, "a": None}, "holds no state dict with classifier.weight; save "
             "model.state_dict(). It has: epoch (int), model (torch.nn.modules.linear.Linear), best (dict), a (NoneType)"),
            (linear, "holds an object of torch.nn.modules.linear.Linear, not a state dict; save model.state_dict()"),
            ({"fc.weight": torch.ones(1)}, "It has: fc.weight (a tensor)"), ({"state_dicts": []}, "no state dict"),
            ({"key%d" % i: i for i in range(30)}, "and 18 more"), ([1], "not a state dict"), ({}, "not a state dict"),
            (3, "holds an object of int, not a state dict; save model.state_dict()")):
        assert message in refusal(saved(tmp_path / "c.pth", content, zipped))


def test_what_is_not_a_plain_tensor_is_named(tmp_path):
    rebuild = torch._utils._rebuild_tensor_v2
    plain = "not a plain tensor; save model.state_dict() of the whole model, not sharded or quantised"
    for value, message in (
            (3, "is int, " + plain), ("x", "is str, " + plain), (None, "is NoneType, " + plain),
            (np.ones(2), "is %s._reconstruct," % np.ones(2).__reduce__()[0].__module__),
            (Rebuilt(Point, 1, 2), "is test_deepmar.Point,"),
            (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "is torch._utils._rebuild_qtensor,"),
            (torch.ones(2).to_sparse(), "is torch._utils._rebuild_sparse_tensor,"),
            # torch 2 can write -x as x and a mark.
            (Rebuilt(rebuild, *(parts(torch.ones(2)) + ({"neg": True},))), "is torch._utils._rebuild_tensor_v2,"),
            (Rebuilt(rebuild, *(parts(torch.ones(2)) + ({"conj": True},))), "is torch._utils._rebuild_tensor_v2,"),
            (torch.ones(2, dtype=torch.complex64), "has values of the type ComplexFloat; save model.float().state_dict()")):
        path = saved(tmp_path / "c.pth", {"state_dict": dict(STATE, **{"classifier.bias": value})})
        assert "c.pth: classifier.bias " + message in refusal(path)


@both_formats
def test_weights_of_other_precisions_become_float32(tmp_path, zipped):
    values, path = torch.tensor([1, -2.5, 3e-3, 0, 6e4]), tmp_path / "c.pth"
    for kind, name_ in (torch.float16, "float16"), (torch.bfloat16, "bfloat16"), (torch.float64, "float64"):
        state, notes = read(saved(path, {"classifier.weight": values.to(kind), "base.count": torch.tensor(7)}, zipped))
        assert state["classifier.weight"].dtype == torch.float32 and state["base.count"].dtype == torch.int64
        assert torch.equal(state["classifier.weight"], values.to(kind).float()) and state["base.count"] == 7
        assert notes == ["converted the weights from %s to float32" % name_]
        for bad in float("inf"), float("nan"), 1e300:
            saved(path, {"classifier.weight": torch.tensor([1, bad], dtype=torch.float64).to(kind)}, zipped)
            assert "classifier.weight holds NaN or infinite values" in refusal(path)


@both_formats
def test_whole_numbers_and_shared_expanded_and_turned_tensors_keep_their_values(tmp_path, zipped):
    whole = torch.arange(24.).view(2, 3, 4)
    expected = {"classifier.weight": whole.permute(2, 0, 1), "classifier.bias": whole[1, :, 1], "base.a": whole,
                "base.b": torch.ones(1, 3).expand(4, 3), "base.c": torch.tensor(2.5)}
    for kind in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool):
        expected.update(("base.%s.%d" % (kind, number), torch.tensor(values).to(kind))
                        for number, values in enumerate(([[0, 1]], 1, [[], []])))
    state = load_checkpoint(saved(tmp_path / "c.pth", expected, zipped))
    assert {key: value.tolist() for key, value in state.items()} == {key: value.tolist() for key, value in expected.items()}


# --- other containers --------------------------------------------------------------------------------------------------

def test_an_unpacked_checkpoint_can_be_packed_again(tmp_path):
    """A browser may have unpacked it. The error's command packs it."""
    source = saved(tmp_path / "c.pth", {"state_dict": STATE})
    with zipfile.ZipFile(source) as archive:
        archive.extractall(str(tmp_path / "un packed"))
    folder = [tmp_path / "un packed" / name_ for name_ in os.listdir(str(tmp_path / "un packed"))][0]
    for given in (folder, tmp_path / "un packed"):
        message = refusal(given)
        assert "is an unpacked checkpoint; pack its folder again: " in message
    assert message.split("again: ")[1] == "(cd '%s' && zip -0 -r %s.pth %s)" % (tmp_path / "un packed", folder.name, folder.name)
    for root, folders in (("", ()), (folder.name + "/", ("", "data/")), ("a/b/c/", ("", "data/"))):  # what zip makes of it
        assert same(load_checkpoint(repacked(source, tmp_path / "again.pth", root=root, folders=folders)))
    assert "zip -0 -r" in refusal(repacked(source, tmp_path / "small.pth", zipfile.ZIP_DEFLATED))
    assert "is a folder, not a checkpoint file" in refusal(tmp_path)


def test_a_zip_file_without_checksums_is_read(tmp_path):
    """torch 2.5 and later can leave them out (set_crc32_options). They are 0 then."""
    path = tmp_path / "c.pth"
    with zipfile.ZipFile(saved(path, STATE)) as archive:
        for member in archive.infolist():
            path.write_bytes(path.read_bytes().replace(struct.pack("<I", member.CRC), bytes(4)))
    with zipfile.ZipFile(str(path)) as archive:
        assert archive.testzip() and not any(member.CRC for member in archive.infolist())
    assert same(load_checkpoint(path))


def test_files_of_a_big_endian_machine_are_refused(tmp_path):
    message, path = "it was saved on a big-endian machine, whose files are not supported", tmp_path / "big.pth"
    assert message in refusal(repacked(saved(tmp_path / "c.pth", STATE), path, byteorder=b"big"))
    path.write_bytes(MAGIC + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": False}, 2))
    assert message in refusal(path)


def write_safetensors(path, tensors):
    """The format: the length of a JSON header, the header, the values. tensors: {key: (type, shape, values)}."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for key, (kind, shape, values) in tensors.items():
        header[key] = {"dtype": kind, "shape": shape, "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def test_safetensors_are_read(tmp_path):
    """With the real package, which tests/requirements.txt has."""
    six = np.arange(6, dtype="<f4")
    for kind, values, names, file in (
            ("F32", six, [], "m.safetensors"), ("F16", six.astype("<f2"), ["float16"], "renamed.pth"),
            ("BF16", (six.view("<u4") >> 16).astype("<u2"), ["bfloat16"], "renamed.pth"), ("F64", six.astype("<f8"), ["float64"], "m")):
        path = write_safetensors(tmp_path / file, {
            "model.classifier.bias": ("F32", [2], np.ones(2, "<f4").tobytes()),
            "model.classifier.weight": (kind, [2, 3], values.tobytes()), "model.base.count": ("I64", [], struct.pack("<q", 7))})
        state, notes = read(path)
        assert same(state, dict(STATE, **{"base.count": torch.tensor(7)}))
        assert notes == ["converted the weights from %s to float32" % name_ for name_ in names]
    whole = path.read_bytes()
    for cut in (4, 9, 40, len(whole) - 10):
        (tmp_path / "cut.safetensors").write_bytes(whole[:cut])
        assert "cut.safetensors: is damaged or cut off" in refusal(tmp_path / "cut.safetensors")
    path = write_safetensors(tmp_path / "f8.safetensors", {"classifier.weight": ("F8_E4M3", [2], b"ab")})
    assert "classifier.weight has values of the type F8_E4M3" in refusal(path)


def test_safetensors_need_their_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    message = refusal(write_safetensors(tmp_path / "m.safetensors", {"classifier.weight": ("F32", [1], bytes(4))}))
    assert "is a safetensors file, and the package that reads it is missing " in message
    assert message.endswith("install it: python3 -m pip install --prefer-binary safetensors")
    assert same(load_checkpoint(saved(tmp_path / "c.pth", STATE)))  # needs no package


def test_files_of_other_kinds_are_named(tmp_path):
    path = tmp_path / "file"
    for mode in ("w", "w:gz"):
        with tarfile.open(str(path), mode) as archive:
            archive.add(saved(tmp_path / "c.pth", STATE), "c.pth")
        assert "is a tar archive, not a checkpoint; unpack it with tar -xf and give the file in it" in refusal(path)
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), str(path))
    assert "is a TorchScript archive, not a checkpoint; save model.state_dict()" in refusal(
        repacked(str(path), tmp_path / "script.pth"))  # torch 1.6 compresses it
    for data, message in ((pickle.dumps({"classifier.weight": np.ones(2)}, 2),
                           "is a pickle, but not from torch.save; save the checkpoint with torch.save"),
                          (b"", "is not a PyTorch checkpoint (it begins with b'')"),
                          (b"<!DOCTYPE html><html>", "is not a PyTorch checkpoint (it begins with b'<!DOCTYPE html>')"),
                          (b"PK\x03\x04" + bytes(50), "is damaged or cut off (BadZipFile: ")):
        path.write_bytes(data)
        assert message in refusal(path)
    for member, message in (("archive/data.pkl", "has compressed or oversized members, which torch.save does not write; if someone "
                             "packed it, unpack it and pack it without compression: zip -0 -r"),
                            ("photo.png", "is a zip file, but not a PyTorch checkpoint (it has no data.pkl)")):
        with zipfile.ZipFile(str(path), "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(member, bytes(10 ** 7))
        assert message in refusal(path)
    with pytest.raises(OSError, match="nowhere: no such file; the first argument is the trained checkpoint"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(OSError, match="^/proc/self/mem: cannot be read: Input/output error$"):
        load_checkpoint("/proc/self/mem")


def test_names_that_would_break_a_message_are_escaped(tmp_path):
    for wild in ["a\nerror: all is well", "\x1b[2J", "x" * 10 ** 5, "\ud800"]:
        for content, given in (({wild: STATE, "b": OTHER}, None), ({"state_dict": STATE, wild: OTHER}, None),
                               ({wild: 1}, None), ({"state_dict": STATE}, wild),
                               (dict(STATE, **{"module." + wild: torch.ones(1)}), None),
                               ({"classifier.weight": STATE["classifier.weight"], wild: 3}, None)):
            lines = []
            try:
                load_checkpoint(saved(tmp_path / "c.pth", content), given, lines.append)
            except ValueError as error:
                lines.append(str(error))
            assert all(line.isprintable() and len(line) < 1000 for line in lines), lines


def test_damage_of_the_earlier_format_is_named(tmp_path):
    path, storage = tmp_path / "c.pth", b"(" + text("storage") + name("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x04tQ."
    for content, keys, message in (
            (b"}.", b"]K\x00a.", "is damaged, or made to do harm (a storage's name is not text)"),
            (storage, b"]" + text("0") + b"a." + struct.pack("<q", 5) + bytes(16),
             "is damaged or cut off (it ends within the values of its tensors)"),
            (b"K\x00Q.", b"].", "is damaged or cut off (UnpicklingError: it has a persistent id that torch.save does not write)")):
        path.write_bytes(MAGIC + pickle.dumps(1001, 2) + pickle.dumps({}, 2) + b"\x80\x02" + content + b"\x80\x02" + keys)
        assert message in refusal(path)


@both_formats
def test_a_tensor_that_reaches_beyond_its_storage_is_refused(tmp_path, zipped):
    """Other memory must not become weights. The storage claims to have 99 values, and has 4."""
    beyond, much = "reaches beyond its 4 values in the file", "and the tensors before it have more values than the file has bytes"
    wrong = "is not a tensor as torch.save writes it; the file is damaged, or made to do harm"
    for offset, size, stride, message in (
            (0, (2,), (2 ** 62,), wrong), (0, (3,), (2 ** 61,), beyond), (0, (2, 3), (2 ** 62, 2 ** 62), wrong), (0, (-1,), (1,), wrong),
            (0, (2 ** 32, 2 ** 32), (1, 0), much), (100, (1,), (1,), beyond), (-50, (2,), (1,), wrong), (0, (5,), (1,), beyond),
            (0, (50,), (1,), beyond), (0, (10 ** 4,) * 3, (0,) * 3, much)):
        tensor = Rebuilt(torch._utils._rebuild_tensor_v2, parts(torch.zeros(4))[0], offset, size, stride, False, OrderedDict())
        path = replaced(tmp_path / "c.pth", zipped, {"classifier.weight": tensor}, {b"K\x04": b"K\x63"})
        assert "classifier.weight " + message in refusal(path)
