"""DeepMAR.py: the network, the checkpoints of every training script, and files made to do harm. tests/test_fuzz.py damages more.

The harmful parts replace the 'scores' entry of an otherwise valid checkpoint. If one ran, it would create a file 'canary'.
"""
import argparse
import copyreg
import datetime
import json
import os
import pathlib
import pickle
import resource
import struct
import sys
import tarfile
import time
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque

import numpy as np
import pytest
import torch
import torchvision
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import DeepMAR
from DeepMAR import DeepMAR_ResNet50, DeepMAR_ResNet50_ExtractFeature, build_model, load_checkpoint, load_model
from helpers import succeeds
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


def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def refusal(path, *arguments):
    """Returns the error of a file that is refused. It must be one line that begins with the file's name."""
    with pytest.raises(ValueError) as error:
        load_checkpoint(str(path), *arguments)
    message = str(error.value)
    assert message.startswith("%s: " % path) and message.isprintable() and len(message) < 1000
    return message


# --- the network ------------------------------------------------------------------------------------------------------

@pytest.fixture
def small(monkeypatch):
    """The state dict of a small network, which load_model then takes for a DeepMAR."""
    monkeypatch.setattr(DeepMAR, "BLOCKS", [1, 1, 1, 1])
    return DeepMAR_ResNet50(num_att=26).state_dict()


def backbone(network):
    """Returns the state dict of torchvision's network with the keys of the open-source repository's resnet.py."""
    return prefixed("base.", {key: value for key, value in network.state_dict().items() if not key.startswith("fc.")})


def test_keys_and_pretrained_weights_are_those_of_torchvision(monkeypatch):
    imagenet = torchvision.models.resnet50()
    monkeypatch.setattr(torchvision.models, "resnet50", lambda **arguments: imagenet)
    state = DeepMAR_ResNet50(pretrained=True).state_dict()
    assert state.pop("classifier.weight").shape == (35, 2048) and state.pop("classifier.bias").shape == (35,)
    assert same(state, backbone(imagenet)) and "base.layer4.2.bn3.running_var" in state


def test_training_changes_all_parameters_and_dropout_acts_only_then(small):
    """In a child process, because a backward pass of torch 1.6 was seen to damage the heap."""
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
        assert torch.equal(model.eval()(batch), model(batch))
        model.drop_pool5 = False
        assert torch.equal(model.train()(batch), model(batch))
    assert succeeds(train)


def test_every_form_fits_each_stride_and_image_size_and_the_extractor_restores_the_mode(tmp_path, small):
    uncounted = {key: value for key, value in small.items() if not key.endswith("num_batches_tracked")}
    for form, zipped, stride, size in (
            ({"epoch": 3, "arch": "DeepMAR", "state_dict": prefixed("module.", small)}, True, 1, (100, 60)),  # Ascend's
            ({"state_dicts": [small, OPTIMIZER], "ep": 150, "scores": 0}, False, 2, (100, 60)),  # the open-source repository's
            (uncounted, False, 2, (7, 5))):  # of torch < 0.4.1
        model = load_model(saved(tmp_path / "c.pth", form, zipped), last_conv_stride=stride)
        assert not model.training and model.num_att == 26 and same(model.state_dict(), small)
        batch = torch.rand(1, 3, *size)
        with torch.no_grad():
            features = model.base(batch)
            assert features.shape[2:] == tuple(-(-side // (16 * stride)) for side in size)
            pooled = torch.nn.functional.linear(features.mean((2, 3)), model.classifier.weight, model.classifier.bias)
        logits = DeepMAR_ResNet50_ExtractFeature(model=model.train())(batch)
        assert isinstance(logits, np.ndarray) and np.allclose(logits, pooled.numpy(), rtol=1e-4, atol=1e-5) and model.training
    with pytest.raises(ValueError, match="^imgs must be a torch.Tensor, not ndarray$"):
        DeepMAR_ResNet50_ExtractFeature(model)(logits)


def test_what_does_not_fit_is_named(tmp_path, small):
    conv = "base.conv1.weight"
    classifier = {key: small[key] for key in STATE}
    for changed, message in (
            ({key: value for key, value in small.items() if key != conv}, "missing: " + conv),
            (dict(small, **{"base.extra": torch.zeros(1)}), "unexpected: base.extra"),
            (dict(small, **{conv: torch.zeros(64, 3, 3, 3)}), "wrong shapes: %s [64, 3, 3, 3] instead of [64, 3, 7, 7]" % conv),
            (dict(small, **{conv: small[conv].to(torch.int8)}), "whole numbers instead of weights, as in a quantised model: " + conv),
            (dict(backbone(ResNet(Bottleneck, [1, 1, 2, 1])), **classifier),
             "another backbone ([1, 1, 2, 1] residual blocks; ResNet-50 has [1, 1, 1, 1]"),
            (dict(backbone(ResNet(BasicBlock, [1, 1, 1, 1])), **classifier),
             "another backbone ([1, 1, 1, 1] residual blocks of two convolutions; ResNet-50"),
            ({"fc.weight": torch.zeros(2, 2)}, "none instead of classifier.weight [num_att,2048]; its keys are fc.weight")):
        with pytest.raises(ValueError, match="^not a DeepMAR ResNet-50 checkpoint: ") as error:
            build_model(changed)
        assert message in str(error.value)
    with pytest.raises(ValueError, match=r"c.pth: not a DeepMAR ResNet-50 checkpoint: \[2, 3\] instead of classifier.weight"):
        load_model(saved(tmp_path / "c.pth", STATE))


# --- files made to do harm ------------------------------------------------------------------------------------------

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
    shell = "echo > " + canary
    return {
        "REDUCE": call("os", "system", shell),
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


def repacked(source, path, root="archive/", folders=(), **members):
    """Packs a file of torch.save again, as zip -0 -r does. members: changes of their content, by name."""
    content = dict.fromkeys(folders, b"")
    with zipfile.ZipFile(source) as archive:
        content.update((member.split("/", 1)[1], archive.read(member)) for member in archive.namelist())
    with zipfile.ZipFile(str(path), "w") as changed:
        for member, data in dict(content, **members).items():
            changed.writestr(root + member, data)
    return str(path)


@pytest.fixture
def guarded(tmp_path, monkeypatch):
    """A folder. Afterwards, no payload may have run in it. The reader may have imported nothing, and used only its own unpickler."""
    load_checkpoint(with_payload(tmp_path / "bad.pth", True, b"N"))  # imports what zip files need
    calls = []
    for module, functions in ((pickle, "load loads Unpickler"), (torch, "load"), (torch.jit, "load"),
                              (pickle._Unpickler, "find_class get_extension load_build load_newobj load_reduce")):
        for function in functions.split():
            monkeypatch.setattr(module, function, lambda *_: calls.append(1))
    monkeypatch.setitem(copyreg._inverted_registry, EXTENSION, ("posix", "system"))
    modules = set(sys.modules)
    yield tmp_path
    assert not calls and set(sys.modules) == modules and os.listdir(str(tmp_path)) == ["bad.pth"]


def test_the_payloads_are_live(tmp_path, monkeypatch):
    """pickle.loads, as torch.load uses it, does create the file."""
    monkeypatch.setitem(copyreg._inverted_registry, EXTENSION, ("posix", "system"))
    canary = tmp_path / "canary"
    for payload, opcodes in list(payloads(str(canary)).items())[:-2]:
        pickle.loads(b"\x80\x02" + opcodes + b".")
        assert canary.exists(), payload
        canary.unlink()


@both_formats
@pytest.mark.parametrize("place", sorted(PLACES))
def test_no_code_of_a_file_runs(guarded, zipped, place):
    path = guarded / "bad.pth"
    for payload, opcodes in payloads(str(guarded / "canary")).items():
        opcodes = PLACES[place](opcodes)
        with_payload(path, zipped, opcodes)
        if payload == "extension":
            assert "(UnpicklingError: it has an extension of copyreg, which nothing needs)" in refusal(path)
        elif place == "called":
            assert "(UnpicklingError: it calls a value that is no function)" in refusal(path)
        else:
            assert same(load_checkpoint(path)), payload
        if place in ("value", "state", "tensor"):  # now it is a weight, and the good state dict is named scores
            with_payload(path, zipped, b"}" + text("classifier.weight") + opcodes + b"s", ("state_dict", "scores"))
            assert (": classifier.weight is " in refusal(path)) == (payload != "extension"), payload


LEVELS = 10 ** 4
BOMBS = {
    "nested calls": b"ca\nb\n" * LEVELS + b"N" + b"\x85R" * LEVELS, "a list full of itself": b"]q\x01(" + b"h\x01" * 1000 + b"e",
    "marks": b"(" * 200 * LEVELS + b"N", "keys of 2 ** 100 tuples": b"})" + b"2\x86" * 100 + b"q\x01K\x01s\x8f(h\x01\x90(h\x01\x91(h\x01Nd",
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


def test_a_line_is_limited_and_each_python_reads_protocol_5():
    """Before 3.7.14, Python takes hours for a number of a million digits."""
    def load(opcodes):
        return pickles.Unpickler(pickles.Pickle(opcodes)).load()
    for frame in (b"", b"\x95" + struct.pack("<Q", 10 ** 4 + 2)):
        assert load(frame + b"V" + b"x" * 1000 + b"\n.") == "x" * 1000
        with pytest.raises(KeyError):  # the rest of the line is no opcode
            load(frame + b"V" + b"x" * 10 ** 4 + b"\n.")
    assert load(b"\x80\x05\x96" + struct.pack("<q", 3) + b"abc.") == b"abc"


def test_the_two_copies_of_the_reader_are_one():
    """DeepMAR.py is copied alone, so that it holds the text of lib/pickles.py."""
    with open(pickles.__file__) as copy, open(DeepMAR.__file__) as f:
        text_ = copy.read()
        assert text_[text_.index("class Named("):] in f.read()
    assert all(hasattr(DeepMAR, name_) for name_ in vars(pickles) if name_[0] != "_")  # the same imports


# --- the earlier format, also of Python 2.7 -----------------------------------------------------------------------------

def earlier(path, content, storages, little_endian=True):
    """Writes the format before the zip format. storages: {opcodes of the name: the number of values and the values}."""
    header = b"".join(pickle.dumps(value, 2) for value in (DeepMAR.MAGIC, 1001, {"little_endian": little_endian}))
    path.write_bytes(header + b"\x80\x02" + content + b".\x80\x02](" + b"".join(storages) + b"e." + b"".join(storages.values()))
    return path


def counted(values, kind="<f4"):
    return struct.pack("<q", len(values)) + np.array(values, kind).tobytes()


def string(value):
    return b"U" + bytes([len(value)]) + value.encode()


def ordered(*pairs):
    """Python 2's OrderedDict is a call with a list of pairs."""
    return b"ccollections\nOrderedDict\n](" + b"".join(b"](" + key + value + b"e" for key, value in pairs) + b"e\x85R"


def python2_tensor(key, kind, count, size, stride, part=b"N"):
    storage = b"(" + string("storage") + name("torch", kind) + string(key) + string("cuda:0") + b"\x8a\x01" + bytes([count]) + part + b"tQ"
    return (name("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + b"K\x00(" + b"".join(b"K%c" % n for n in size) + b"t("
            + b"".join(b"K%c" % n for n in stride) + b"t\x89" + ordered() + b"tR")


def test_files_of_python_2_are_read(tmp_path):
    """With the opcodes of a real file of Python 2.7 and torch 1.4."""
    tensors = [python2_tensor("93840475000000", "FloatStorage", 6, (2, 3), (3, 1)), python2_tensor("1", "FloatStorage", 2, (2,), (1,)),
               python2_tensor("2", "LongStorage", 1, (), ())]
    model = ordered(*zip(map(string, ("classifier.weight", "classifier.bias", "count")), tensors)) + (
        b"}" + string("_metadata") + ordered((string(""), b"}" + string("version") + b"K\x01s")) + b"sb")
    optimizer = b"}" + string("state") + b"}I139640614320640\n}" + string("momentum_buffer") + tensors[0] + b"sss"
    # A numpy scalar's bytes are text in Python 2, and not UTF-8.
    scalar = (b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(U\x02f8K\x00K\x01tR(K\x03U\x01<NNN"
              b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tbU\x08\x9a\x99\x99\x99\x99\x99\xe9?tR")
    content = b"}(" + string("state_dicts") + b"](" + model + optimizer + b"e" + string("scores") + scalar + b"u"
    state = load_checkpoint(earlier(tmp_path / "c.pth", content, {
        string("93840475000000"): counted(range(6)), string("1"): counted([1, 1]), string("2"): counted([7], "<i8")}))
    assert list(state) == list(STATE) + ["count"] and same(state, dict(STATE, count=torch.tensor(7)))


def test_a_part_of_a_storage_is_read(tmp_path):
    """Before torch 0.4, a tensor's values could lie in a part of another one's storage."""
    def file(begin, length):
        tensor = python2_tensor("1", "FloatStorage", 20, (2, 3), (3, 1), b"(" + string("2") + b"\x8a\x01%c\x8a\x01%ct" % (begin, length))
        return earlier(tmp_path / "c.pth", ordered((string("classifier.weight"), tensor)), {string("1"): counted(range(20))})
    assert load_checkpoint(file(4, 6))["classifier.weight"].tolist() == [[4, 5, 6], [7, 8, 9]]
    assert "classifier.weight reaches beyond its 5 values in the file" in refusal(file(4, 5))


def test_damage_of_the_earlier_format_is_named(tmp_path):
    storage = b"(" + text("storage") + name("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x04tQ"
    for content, storages, message in (
            (b"}", {b"K\x00": b""}, "is damaged, or made to do harm (a storage's name is not text)"),
            (storage, {text("0"): counted(range(4))[:-1]}, "is damaged or cut off (it ends within the values of its tensors)"),
            (b"K\x00Q", {}, "is damaged or cut off (UnpicklingError: it has a persistent id that torch.save does not write)")):
        assert message in refusal(earlier(tmp_path / "c.pth", content, storages))


# --- right files -------------------------------------------------------------------------------------------------------

KEPT = [
    np.float64(0.789), np.arange(5.), np.array(["a"], dtype=object), np.dtype("f4"), argparse.Namespace(best=np.float32(3)), Counter([50]),
    pathlib.Path("."), datetime.datetime(2024, 5, 6), torch.device("cuda:1"), torch.float16, torch.Size([2]), {1, (2, 3)}, frozenset([1]),
    defaultdict(list, a=[1]), deque([1, 2], 5), OrderedDict([((1, 2), 3)]), 1 + 2j, range(9), bytearray(b"abc"), b"abc", Ellipsis, len,
    {torch.device("cpu"): 1, (1, (2,)): 4, None: 5}, torch.optim.SGD([torch.zeros(1)], 0.1), torch.nn.Linear(2, 2), ValueError("x")]


@pytest.mark.parametrize("arguments", [{}, {"zipped": False}, {"pickle_protocol": 1}, {"pickle_protocol": pickle.HIGHEST_PROTOCOL}])
def test_what_a_training_run_keeps_with_the_state_dict_is_ignored(tmp_path, arguments):
    state, notes = read(saved(tmp_path / "c.pth", {"kept": KEPT, "state_dict": STATE, "after": KEPT}, **arguments))
    assert same(state) and notes == []


class Rebuilt(tuple):
    """(function, its arguments), pickled as a call of the function by its name, which need not exist."""

    def __reduce__(self):
        return tuple(self)


def stand_in():
    """Stands for a function of a package, or of a later torch, that is not here. replaced() changes its name."""


FUNCTION = b"ctest_deepmar\nstand_in\n"


def parts(tensor):
    """The first arguments of the calls that make a tensor."""
    return tensor.storage(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), False, OrderedDict()


@both_formats
def test_tensors_of_an_npu_are_read(tmp_path, zipped):
    expected = {"classifier.weight": torch.arange(20.)[2:8].view(3, 2).t(), "classifier.bias": torch.ones(2)}  # a part, turned
    state = {"module." + key: Rebuilt((stand_in, parts(value) + (MARK,))) for key, value in expected.items()}
    momentum = Rebuilt((stand_in, parts(torch.ones(3)) + (MARK,)))
    for format_ in (b"K\x02", call("torch_npu.npu._format", "Format", b"K\x02")):
        path = replaced(tmp_path / "c.pth", zipped, {"state_dict": state, "optimizer": [momentum]}, {
            FUNCTION: name("torch_npu.utils.storage", "_rebuild_npu_tensor"), MARKED: format_, text("cpu"): text("npu:0")})
        assert same(load_checkpoint(path), expected)


@both_formats
def test_calls_around_a_tensor_are_followed(tmp_path, zipped):
    """Parameters and attributes as this torch and later ones write them, a tensor of an XLA device, one call in another."""
    rebuild = torch._utils._rebuild_tensor_v2
    plain, parameter = Rebuilt((rebuild, parts(torch.ones(2, 3)))), torch.nn.Parameter(torch.ones(2, 3))
    noted, attributes = torch.nn.Parameter(torch.ones(2, 3)), {"note": torch.device("cpu")}
    noted.note, with_hooks = attributes, (plain, True, OrderedDict())
    for function, value in (
            (None, parameter), (None, noted), (None, Rebuilt((torch._utils._rebuild_parameter, (parameter, True, OrderedDict())))),
            (None, Rebuilt((rebuild, plain[1] + ({"npu_format_/FRACTAL_Z": True},)))),  # a mark of Ascend's
            ("_rebuild_parameter_with_state", Rebuilt((stand_in, with_hooks + (attributes,)))),
            ("_rebuild_from_type_v2", Rebuilt((stand_in, (rebuild, torch.Tensor, plain[1], attributes)))),
            ("_rebuild_from_type_v2", Rebuilt((stand_in, (torch._utils._rebuild_parameter, torch.Tensor, with_hooks, None)))),
            ("_rebuild_device_tensor_from_cpu_tensor", Rebuilt((stand_in, (plain, torch.float32, "xla:0"))))):
        path = replaced(tmp_path / "c.pth", zipped, {"classifier.weight": value},
                        {FUNCTION: name("torch._utils", function)} if function else {})
        assert same(load_checkpoint(path), {"classifier.weight": torch.ones(2, 3)}), function


def test_prefixes_are_removed(tmp_path):
    for prefix in ("", "module.", "_orig_mod.", "model.module.", "_orig_mod.module."):
        assert read(saved(tmp_path / "c.pth", {"state_dict": prefixed(prefix, STATE)}))[1] == []
        assert same(load_checkpoint(tmp_path / "c.pth"))
        # in a key, and only in some keys
        for keys in (("classifier.%sweight" % prefix, "classifier.bias"), ("classifier.weight", prefix + "classifier.bias")):
            assert same(load_checkpoint(saved(tmp_path / "c.pth", dict(zip(keys, STATE.values())))))
    for prefix, named in (("net.", "net"), ("model.backbone.", "backbone"), ("classifier.", "classifier"), ("base.", "base")):
        state, notes = read(saved(tmp_path / "c.pth", {"state_dict": prefixed(prefix, STATE)}))
        assert same(state) and notes == ([] if named == "net" else ["took its only state dict, state_dict." + named])


def test_keys_that_become_one_must_have_equal_values(tmp_path):
    twice = dict(STATE, **prefixed("model.module.", OrderedDict((key, value.clone()) for key, value in STATE.items())))
    assert same(load_checkpoint(saved(tmp_path / "c.pth", {"state_dict": twice})))
    for changed in (STATE["classifier.bias"] + 1, STATE["classifier.bias"][:1], STATE["classifier.bias"].half() * 1.01):
        twice["model.module.classifier.bias"] = changed
        assert ("c.pth: classifier.bias and model.module.classifier.bias are the same key of the network, but their values differ; "
                "delete the wrong one") in refusal(saved(tmp_path / "c.pth", {"state_dict": twice}))


def test_what_does_not_belong_to_the_network_is_left_out(tmp_path):
    """torch's AveragedModel counts; a Lightning module has its loss's weights next to the model."""
    wrapped = prefixed("model.", STATE)
    for content, left in ((dict(prefixed("module.", STATE), n_averaged=torch.tensor(5)), "n_averaged"),
                          ({"state_dict": dict(wrapped, **{"criterion.pos_weight": torch.ones(2)})}, "criterion.pos_weight"),
                          (dict(STATE, epoch=3, path=pathlib.Path("a"), ema_decay=0.9), "epoch, path, ema_decay")):
        state, notes = read(saved(tmp_path / "c.pth", content))
        assert same(state) and notes == ["left out what does not belong to the network: " + left]
    wrapped["model.attention.weight"] = torch.ones(1)  # but this belongs to another network, and build_model will say so
    assert list(read(saved(tmp_path / "c.pth", wrapped))[0])[-1] == "model.attention.weight"


@pytest.mark.parametrize("content, taken, other", [
    ({"ema": {"module": OTHER, "decay": 0.99}, "model": STATE}, "model", "ema.module"),
    ({"state_dicts": [STATE, OTHER, OPTIMIZER], "ep": 3}, "state_dicts.0", "state_dicts.1"),
    ({"state_dict": dict(STATE, **prefixed("ema.module.", OTHER))}, "state_dict", "state_dict.ema"),
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
    for content, names in (({"student": STATE, "teacher": OTHER}, "student, teacher"), ({"nets": [STATE, OTHER]}, "nets.0, nets.1"),
                           (dict(prefixed("fast.", STATE), **prefixed("slow.", OTHER)), "fast, slow")):
        path = saved(tmp_path / "c.pth", content)
        assert "has several state dicts: %s; choose one with --state-dict NAME" % names in refusal(path)
    # The beginning of a name is enough if only one name has it.
    assert same(read(saved(path, {"model": STATE, "ema": {"module": OTHER}}), "ema")[0], OTHER)
    saved(path, {"model": STATE, "ema": {"fast": OTHER, "slow": OTHER.copy()}})
    assert "has more than one state dict ema; it has: model, ema.fast, ema.slow" in refusal(path, "ema")


def test_the_only_state_dict_is_found_anywhere(tmp_path):
    """An optimizer that knows the parameters' names, and other entries with these names, are no state dicts."""
    optimizer = {"state": {key: {"exp_avg": torch.ones(2)} for key in STATE}}
    for where in DeepMAR.MODEL_NAMES + ["anything", "ema.module"]:
        content = defaultdict(list, STATE)
        for part in reversed(where.split(".")):
            content = defaultdict(list, {part: content, "epoch": 3, "optimizer": optimizer, "train": {"classifier.weight": 0.1}})
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
            ({"fc.weight": torch.ones(1)}, "It has: fc.weight (a tensor)"), ({"key%d" % i: i for i in range(30)}, "and 18 more"),
            ([1], "not a state dict"), ({}, "not a state dict"), (3, "holds an object of int, not a state dict")):
        assert message in refusal(saved(tmp_path / "c.pth", content, zipped))


def test_what_is_not_a_plain_tensor_is_named(tmp_path):
    rebuild, arguments = torch._utils._rebuild_tensor_v2, parts(torch.ones(2))
    plain = "not a plain tensor; save model.state_dict() of the whole model, not sharded or quantised"
    for value, message in (
            (3, "is int, " + plain), (None, "is NoneType, " + plain), (Rebuilt((stand_in, (1, 2))), "is test_deepmar.stand_in, " + plain),
            (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "is torch._utils._rebuild_qtensor,"),
            (torch.ones(2).to_sparse(), "is torch._utils._rebuild_sparse_tensor,"),
            # torch 2 can write -x as x and a mark.
            (Rebuilt((rebuild, arguments + ({"neg": True},))), "is torch._utils._rebuild_tensor_v2,"),
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
    source, outer = saved(tmp_path / "c.pth", {"state_dict": STATE}), tmp_path / "un packed"
    with zipfile.ZipFile(source) as archive:
        archive.extractall(str(outer))
    inner, = os.listdir(str(outer))
    for given in (outer / inner, outer):
        assert refusal(given).endswith(": is an unpacked checkpoint; pack its folder again: (cd '%s' && zip -0 -r %s.pth %s)" % (
            outer, inner, inner))
    for root, folders in (("", ()), (inner + "/", ("", "data/")), ("a/b/c/", ("", "data/"))):  # what zip makes of it
        assert same(load_checkpoint(repacked(source, tmp_path / "again.pth", root=root, folders=folders)))
    assert "is a folder, not a checkpoint file" in refusal(tmp_path)


def test_a_zip_file_without_checksums_is_read(tmp_path):
    """torch 2.5 and later can leave them out (set_crc32_options). They are 0 then."""
    path = tmp_path / "c.pth"
    with zipfile.ZipFile(saved(path, STATE)) as archive:
        for member in archive.infolist():
            path.write_bytes(path.read_bytes().replace(struct.pack("<I", member.CRC), bytes(4)))
    assert same(load_checkpoint(path))


def write_safetensors(path, tensors):
    """The format: the length of a JSON header, the header, the values. tensors: {key: (type, shape, values)}."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for key, (kind, shape, values) in tensors.items():
        header[key] = {"dtype": kind, "shape": shape, "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    header = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def test_safetensors_are_read(tmp_path, monkeypatch):
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
    path, whole = tmp_path / "m.safetensors", path.read_bytes()
    for cut in (4, 40, len(whole) - 10):
        path.write_bytes(whole[:cut])
        assert "is damaged or cut off" in refusal(path)
    write_safetensors(path, {"classifier.weight": ("F8_E4M3", [2], b"ab")})
    assert "classifier.weight has values of the type F8_E4M3" in refusal(path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert "is a safetensors file, and the package that reads it is missing (" in refusal(path)
    assert refusal(path).endswith("install it: python3 -m pip install --prefer-binary safetensors")


def test_files_of_other_kinds_are_named(tmp_path):
    path, source = tmp_path / "file", saved(tmp_path / "c.pth", STATE)
    with tarfile.open(str(path), "w:gz") as archive:
        archive.add(source, "c.pth")
    assert "is a tar archive, not a checkpoint; unpack it with tar -xf and give the file in it" in refusal(path)
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), str(path))
    assert "is a TorchScript archive, not a checkpoint; save model.state_dict()" in refusal(path)
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
    for big in (repacked(source, path, byteorder=b"big"), earlier(tmp_path / "big", b"}", {}, little_endian=False)):
        assert "it was saved on a big-endian machine, whose files are not supported" in refusal(big)
    with pytest.raises(OSError, match="^/proc/self/mem: cannot be read: Input/output error$"):
        load_checkpoint("/proc/self/mem")


def test_names_that_would_break_a_message_are_escaped(tmp_path):
    for wild in ["a\nerror: all is well\x1b[2J", "x" * 10 ** 5, "\ud800"]:
        for content, given in (({wild[:150]: STATE, "b": OTHER}, None), ({wild: 1}, None), ({"state_dict": STATE}, wild)):
            refusal(saved(tmp_path / "c.pth", content), given)
        for content in ({"state_dict": STATE, wild[:150]: OTHER}, {wild[:150]: STATE}, dict(STATE, **{wild: 3})):
            note, = read(saved(tmp_path / "c.pth", content))[1]
            assert note.isprintable() and len(note) < 1000


@both_formats
def test_a_tensor_that_reaches_beyond_its_storage_is_refused(tmp_path, zipped):
    """Other memory must not become weights. The storage claims to have 99 values, and has 4."""
    beyond, much = "reaches beyond its 4 values in the file", "and the tensors before it have more values than the file has bytes"
    wrong = "is not a tensor as torch.save writes it; the file is damaged, or made to do harm"
    for offset, size, stride, message in (
            (0, (2,), (2 ** 62,), wrong), (0, (3,), (2 ** 61,), beyond), (0, (-1,), (1,), wrong), (-50, (2,), (1,), wrong),
            (0, (2 ** 32, 2 ** 32), (1, 0), much), (100, (1,), (1,), beyond), (0, (5,), (1,), beyond), (0, (10 ** 4,) * 3, (0,) * 3, much)):
        tensor = Rebuilt((torch._utils._rebuild_tensor_v2, (torch.zeros(4).storage(), offset, size, stride, False, OrderedDict())))
        path = replaced(tmp_path / "c.pth", zipped, {"classifier.weight": tensor}, {b"K\x04": b"K\x63"})
        assert "classifier.weight " + message in refusal(path)
