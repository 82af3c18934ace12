"""DeepMAR.py against what it meets: files of every training script, damaged files, and files made to do harm.

A payload stands where a training run's scores do, beside a state dict that is good, and would create the file 'canary'.
"""
import argparse
import collections
import datetime
import enum
import functools
import io
import json
import os
import pathlib
import pickle
import struct
import sys
import tarfile
import time
import tracemalloc
import types
import warnings
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque

import numpy as np
import pytest
import torch

import DeepMAR
from conftest import check_error, script
from DeepMAR import load_checkpoint

MAGIC = pickle.dumps(DeepMAR.MAGIC, 2)
MARK = "MARK-MARK"
MARKED = pickle.dumps(MARK, 2)[2:-3]  # without PROTO, BINPUT 0 and STOP
STATE = OrderedDict([("classifier.weight", torch.arange(6.).reshape(2, 3)), ("classifier.bias", torch.ones(2))])
OTHER = OrderedDict((key, value + 5) for key, value in STATE.items())


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


def patch_writer(path):
    """torch.load compares a module's source with the file's and writes the difference to <its name>.patch, if its
    dump_patches is true: BUILD can make both of a function, and so a file of any name and content."""
    return (name("torch._utils", "_rebuild_tensor_v2") + b"q\xffN}(" + text("__name__") + text(path)
            + text("dump_patches") + b"\x88u\x86b0(" + text("module") + b"h\xff" + text("x.py") + text("harm") + b"tQ")


LIVE = ["os.system", "posix.system", "eval", "exec", "Python 2's eval", "Popen", "getattr chain", "import chain", "INST",
        "OBJ", "NEWOBJ_EX", "partial", "methodcaller", "dotted name", "map", "deep in the optimizer", "unread"]


def payloads(canary):
    shell, python = "echo > " + canary, "open(%r, 'w').close()" % canary
    system = call("os", "system", shell)
    found = {
        "os.system": system,
        "posix.system": call("posix", "system", shell),
        "eval": call("builtins", "eval", python),
        "exec": call("builtins", "exec", python),
        "Python 2's eval": call("__builtin__", "eval", python),
        "Popen": call("subprocess", "Popen", b"](" + text("touch") + text(canary) + b"e"),
        "getattr chain": call("builtins", "getattr", call("importlib", "import_module", "os"), "system") + b"("
        + text(shell) + b"tR",
        "import chain": call("builtins", "getattr", call("builtins", "__import__", "os"), "system") + b"("
        + text(shell) + b"tR",
        "INST": b"(" + text(shell) + b"iposix\nsystem\n",
        "OBJ": b"(" + name("subprocess", "Popen") + b"](" + text("touch") + text(canary) + b"eo",
        "NEWOBJ_EX": name("subprocess", "Popen") + b")}\x920" + system,
        "dotted name": call("shutil", "os.system", shell),
        "map": call("builtins", "list", call("builtins", "map", name("os", "system"), b"](" + text(shell) + b"e")),
        "deep in the optimizer": b"}" + text("state") + b"}K\x00}" + text("momentum_buffer") + b"]" + system + b"asss",
        "unread": system + b"0N",
        "torch.load": call("torch", "load", canary + ".inner"),
        "torch.hub.load": call("torch.hub", "load", "anyone/anything", "model"),
        "torch.save": call("torch", "save", "text", canary),
        "torch.jit.load": call("torch.jit", "load", canary + ".inner"),
        "torch's own os": call("torch", "os.system", shell),
        "torch.serialization": call("torch.serialization", "os.system", shell),
        "storage from a file": call("torch", "FloatStorage.from_file", canary, b"\x88K\x04"),
        "of an allowed class": call("collections", "OrderedDict.__init__.__class__", shell),
        "_compat_pickle": call("__builtin__", "file", canary, "w"),
        "numpy's runstring": call("numpy.testing._private.utils", "runstring", python, b"}"),
        "numpy's os": call("numpy.f2py", "os.system", shell),
        "numpy.load": call("numpy", "load", canary + ".inner", b"N\x88"),
        "extension": b"\x82\x01", "extensions": b"\x83\x01\x01" + b"\x84\x01\x01\x01\x01" + b"R",
        "persistent id": b"(" + text("module") + name("os", "system") + text(shell) + text(shell) + b"tQ",
        "call of a persistent id": b"(" + text("module") + name("os", "system") + text(shell) + text(shell) + b"tQ("
        + text(shell) + b"tR",
        "patch writer": patch_writer(canary), "NEWOBJ": name("posix", "system") + b"(" + text(shell) + b"t\x81",
        "partial": call("functools", "partial", name("os", "system"), shell) + b")R",
        "methodcaller": call("operator", "methodcaller", "system", shell) + b"(" + call("importlib", "import_module", "os")
        + b"tR",
        "rebuild of another function": call("torch._tensor", "_rebuild_from_type_v2", name("os", "system"),
                                            name("torch", "Tensor"), b"(" + text(shell) + b"t", b"N"),
        "__setstate__": call("torch._tensor", "_rebuild_from_type_v2", name("builtins", "list"),
                             name("subprocess", "Popen"), b")", b"}" + text("args") + text(shell) + b"s"),
        "parameter": call("torch._utils", "_rebuild_parameter_with_state", system, b"\x89", b"N", b"}" + text("__class__")
                          + name("subprocess", "Popen") + b"s"),
        "NPU tensor": call("torch_npu.utils.storage", "_rebuild_npu_tensor", system, *[b"K\x00"] * 5,
                           call("torch_npu.npu._format", "Format", b"K\x02")),
        "BUILD of a function": name("torch._utils", "_rebuild_tensor_v2") + b"N}" + text("__code__") + system
        + b"s\x86b",
        "BUILD of a class": name("collections", "OrderedDict") + b"N}" + text("__setstate__") + name("os", "system")
        + b"s\x86b" + text(shell) + b"b",
        "BUILD of an instance": name("collections", "OrderedDict") + b")R}" + text("items") + name("os", "system")
        + b"sb",
    }
    return found


def with_payload(path, zipped, payload, names=("scores", "state_dict")):
    """Writes a good checkpoint with the payload for its scores, or under another name."""
    content = io.BytesIO()
    torch.save({names[0]: MARK, names[1]: STATE}, content, _use_new_zipfile_serialization=zipped)
    data = content.getvalue()
    if zipped:
        with zipfile.ZipFile(content) as archive, zipfile.ZipFile(path, "w") as changed:
            for member in archive.infolist():
                data = archive.read(member)
                if member.filename.endswith("data.pkl"):
                    assert data.count(MARKED) == 1
                    data = data.replace(MARKED, payload)
                changed.writestr(member.filename, data)
    else:
        assert data.count(MARKED) == 1
        with open(path, "wb") as f:
            f.write(data.replace(MARKED, payload))


def with_content(path, zipped, opcodes):
    """Writes a file of torch.save whose content is what the opcodes push."""
    opcodes = b"\x80\x02" + opcodes + b"."
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", opcodes)
            archive.writestr("archive/version", "3\n")
    else:
        with open(path, "wb") as f:
            f.write(MAGIC + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2) + opcodes + b"\x80\x02].")


def same(state, expected=STATE):
    return set(state) == set(expected) and all(torch.equal(state[key], expected[key]) for key in expected)


def same_state(path):
    return same(load_checkpoint(path))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "earlier"])
def test_the_place_of_the_payload_is_read(tmp_path, zipped):
    path = str(tmp_path / "good.pth")
    for payload in (b"N", text("0.7"), b"}(" + text("a") + b"K\x01u"):
        with_payload(path, zipped, payload)
        assert same_state(path)


def item(*opcodes):
    """A key of a dict in the payload's place, and opcodes for its value."""
    return b"}" + text("key") + b"".join(opcodes) + b"s"


REBUILD = name("torch_npu.utils.storage", "_rebuild_npu_tensor")
# Where a payload stands: beside the state dict, where what a pickle asks for must be read and do nothing.
PLACES = {
    "value": lambda p: p, "in a list": lambda p: b"](" + p + p + b"e", "in a set": lambda p: b"\x8f(" + p + p + b"\x90",
    "in a frozenset": lambda p: b"(" + p + p + b"\x91", "key": lambda p: b"}" + p + b"K\x01s",
    "keys": lambda p: b"}(" + p + b"K\x01" + p + b"K\x02u", "key of an old dict": lambda p: b"(" + p + b"K\x01d",
    "called": lambda p: p + b")R", "NEWOBJ": lambda p: p + b")\x81", "NEWOBJ_EX": lambda p: p + b")}\x92",
    "OBJ": lambda p: b"(" + p + b"o", "argument": lambda p: call("collections", "deque", p),
    "state": lambda p: name("collections", "OrderedDict") + b")R" + p + b"b",
    "with state": lambda p: p + item(b"N") + b"b", "with items": lambda p: p + b"(" + text("k") + b"N" + p + b"Nu",
    "with an item": lambda p: p + p + b"Ns", "with values": lambda p: p + b"(" + p + b"N" + b"e",
    "with a value": lambda p: p + p + b"a", "as a set": lambda p: p + b"(" + p + b"\x90",
    "Python 2's entries": lambda p: call("collections", "OrderedDict", b"](](" + p + p + b"e" + p + b"e"),
    "NPU storage": lambda p: REBUILD + b"(" + p + b"K\x00K\x01\x85K\x01\x85\x89NK\x02tR",
    "NPU sizes": lambda p: REBUILD + b"(" + p * 7 + b"tR", "no arguments": lambda p: REBUILD + p + b"R",
    "kind of storage": lambda p: b"(" + text("storage") + p + text("0") + text("cpu") + b"K\x01tQ",
    "storage": lambda p: b"(" + text("storage") + name("torch", "FloatStorage") + p * 3 + b"tQ",
    "kind of id": lambda p: b"(" + p * 5 + b"tQ", "id": lambda p: p + b"Q",
}


@pytest.fixture
def no_unpickler(monkeypatch):
    """Python's unpicklers and torch.load are not even called."""
    for module, function in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (pickle, "_Unpickler"),
                             (torch, "load"), (torch.jit, "load")):
        monkeypatch.setattr(module, function, None)


def state_or_refusal(path):
    """Loads a file: 'state' or the error, which must be one line that names the file."""
    try:
        assert same_state(path)
        return "state"
    except ValueError as error:
        assert str(error).startswith(path + ": ") and str(error).isprintable() and len(str(error)) < 1000
        return str(error)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "earlier"])
@pytest.mark.parametrize("place", sorted(PLACES))
def test_no_code_of_a_file_runs(tmp_path, monkeypatch, no_unpickler, zipped, place):
    monkeypatch.chdir(tmp_path)
    canary, path = str(tmp_path / "canary"), str(tmp_path / "bad.pth")
    with open(canary + ".inner", "wb") as f:  # what torch.load and numpy.load would unpickle
        f.write(b"\x80\x02" + payloads(canary)["os.system"] + b".")
    for payload, opcodes in sorted(payloads(canary).items()):
        with_payload(path, zipped, PLACES[place](opcodes))
        state_or_refusal(path)
        assert sorted(os.listdir(str(tmp_path))) == ["bad.pth", "canary.inner"], payload


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "earlier"])
def test_no_code_runs_inside_the_state_dict_and_the_error_names_the_key(tmp_path, monkeypatch, no_unpickler, zipped):
    """The payload is the bias, or is taken for its parts, or is the whole content."""
    monkeypatch.chdir(tmp_path)
    canary, path = str(tmp_path / "canary"), str(tmp_path / "bad.pth")

    def arguments(function, module="torch._utils"):
        return lambda p: name(module, function) + b"(" + p + p + b"(" + p + b"t" + p + b"tR"
    inside = {
        "itself": lambda p: p, "storage": PLACES["NPU storage"], "sizes": PLACES["NPU sizes"],
        "tensor of a parameter": arguments("_rebuild_parameter_with_state"),
        "function of a tensor": arguments("_rebuild_from_type_v2", "torch._tensor"),
        "function of a function": lambda p: arguments("_rebuild_from_type_v2")(arguments("_rebuild_from_type_v2")(p))}
    for payload, opcodes in sorted(payloads(canary).items()):
        for place, wrapped in sorted(inside.items()):
            state = b"}(" + text("classifier.weight") + wrapped(opcodes) + text("classifier.bias") + wrapped(opcodes) + b"u"
            # In place of the scores, which come before the good state dict: the scores are named state_dict now.
            with_payload(path, zipped, state, ("state_dict", "scores"))
            found = state_or_refusal(path)
            if "UnpicklingError" not in found and payload not in ("unread", "deep in the optimizer"):
                assert ": classifier.weight is " in found, (payload, place, found)
            assert os.listdir(str(tmp_path)) == ["bad.pth"], payload
        for content in (opcodes, b"](" + opcodes + b"e", PLACES["with items"](opcodes)):
            with_content(path, zipped, content)
            assert "state_dict()" in state_or_refusal(path), payload
            assert os.listdir(str(tmp_path)) == ["bad.pth"], payload


@pytest.mark.parametrize("payload", LIVE)
def test_the_payloads_are_live(tmp_path, payload):
    """pickle.loads, as torch.load uses it, does create the file."""
    result = None
    try:
        result = pickle.loads(b"\x80\x02" + payloads(str(tmp_path / "canary"))[payload] + b".")
    except TypeError:  # some end in a call that fails, after the harm is done
        pass
    if hasattr(result, "wait"):
        result.wait()
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("place", range(5))
def test_no_code_runs_in_any_of_the_five_pickles(tmp_path, place):
    """A file of the earlier format is a magic number, a version, the system, the content and the storages' keys."""
    pickles = [MAGIC] + [pickle.dumps(value, 2) for value in (1001, {"little_endian": True}, {}, [])]
    pickles[place] = b"\x80\x02" + payloads(str(tmp_path / "canary"))["os.system"] + b"."
    (tmp_path / "bad.pth").write_bytes(b"".join(pickles))
    with pytest.raises(ValueError, match="bad.pth: "):
        load_checkpoint(str(tmp_path / "bad.pth"))
    assert os.listdir(str(tmp_path)) == ["bad.pth"]


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_torchscript_archive_is_refused(tmp_path):
    script_, path = io.BytesIO(), str(tmp_path / "script.pth")
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), script_)
    with zipfile.ZipFile(script_) as archive, zipfile.ZipFile(path, "w") as plain:  # torch 1.6 compresses it
        for member in archive.namelist():
            plain.writestr(member, archive.read(member))
    with pytest.raises(ValueError, match="is a TorchScript archive, not a checkpoint; save model.state_dict()"):
        load_checkpoint(path)


def nested(levels, before, after):
    return before * levels + b"N" + after * levels


LEVELS = 2 * 10 ** 4
BOMBS = {
    "tuples": nested(LEVELS, b"", b"\x85"), "lists": nested(LEVELS, b"](", b"e"), "dicts": nested(LEVELS, b"}K\x00", b"s"),
    "dicts of text": nested(LEVELS, b"}U\x01k", b"s"), "calls": nested(LEVELS, b"ca\nb\n", b"\x85R"),
    "parameters": nested(LEVELS, b"ct\n_rebuild_parameter\n", b"\x85R"),
    "types": nested(LEVELS, b"ct\n_rebuild_from_type_v2\n(ct\n_rebuild_from_type_v2\nN", b"\x85NtR"),
    "a tuple of itself 2 ** 100 times": b"N" + b"2\x86" * 100, "a list in itself": b"]q\x01h\x01a",
    "a dict in itself": b"}q\x01" + text("k") + b"h\x01s", "a key of tuples": b"})" + b"\x85" * LEVELS + b"K\x01s",
    "a key of 2 ** 100 tuples": b"})" + b"2\x86" * 100 + b"K\x01s", "marks": b"(" * LEVELS + b"N",
    "bytearray": call("builtins", "bytearray", b"\x8a\x06" + struct.pack("<q", 10 ** 12)[:6]),
    "range": call("builtins", "list", call("builtins", "range", b"\x8a\x06" + struct.pack("<q", 10 ** 12)[:6])),
    "set": call("builtins", "set", call("builtins", "range", b"\x8a\x06" + struct.pack("<q", 10 ** 12)[:6])),
    "zeros": call("numpy", "zeros", b"\x8a\x06" + struct.pack("<q", 10 ** 12)[:6]),
    "storage of 2 ** 62 values": b"(" + text("storage") + name("torch", "FloatStorage") + text("9") + text("cpu")
    + b"\x8a\x08" + struct.pack("<q", 2 ** 62) + b"tQ", "power": call("builtins", "pow", b"K\x09", b"J\xff\xff\xff\x7f"),
    "memo": b"Np999999999999\n", "a number of a million digits": b"I" + b"9" * 10 ** 6 + b"\n",
    "a long of a million digits": b"L" + b"9" * 10 ** 6 + b"L\n", "text of 2 GB": b"X\xff\xff\xff\x7f" + b"x",
    "bytes of 2 ** 60": b"\x8e" + struct.pack("<q", 2 ** 60), "bytearray of 2 ** 40": b"\x96" + struct.pack("<q", 2 ** 40),
    "frame": b"\x95" + struct.pack("<q", 2 ** 60) + b"N", "long of 2 GB": b"\x8b\xff\xff\xff\x7f" + b"x",
}
DAMAGED = {"marks", "types", "lists", "a number of a million digits", "a long of a million digits", "text of 2 GB", "bytes of 2 ** 60",
           "bytearray of 2 ** 40", "long of 2 GB"}  # nothing follows; or Python would take hours


@pytest.mark.parametrize("bomb", sorted(BOMBS))
def test_a_bomb_takes_neither_time_nor_memory(tmp_path, no_unpickler, bomb):
    """A function that calls itself for each level fails; the rest would take hours, or all memory."""
    path = str(tmp_path / "bomb.pth")
    began = time.process_time()
    for payload, names in ((BOMBS[bomb], ("scores", "state_dict")),
                           (b"}" + text("classifier.weight") + BOMBS[bomb] + b"s", ("state_dict", "scores"))):
        with_payload(path, True, payload, names)
        if len(BOMBS[bomb]) < 1000:  # else it has reason to take some memory, and takes long to trace
            tracemalloc.start()
        try:
            found = state_or_refusal(path)
            assert tracemalloc.get_traced_memory()[1] < 10 ** 7
        finally:
            tracemalloc.stop()
        if names[0] == "scores":
            assert found == "state" or bomb in DAMAGED, found
    assert time.process_time() - began < 60


# --- Python 2.7 ----------------------------------------------------------------------------------------------------

class Long(int):
    """Python 2's long."""


class Storage(object):
    def __init__(self, key, tensor, part=None):
        self.key, self.tensor, self.part = key, tensor, part


class Scalar(object):
    """A numpy scalar of Python 2: its bytes are text, and not UTF-8."""
    pickled = (b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(U\x02f8K\x00K\x01tR(K\x03U\x01<NNN"
               b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tbU\x08\x9a\x99\x99\x99\x99\x99\xe9?tR")


class Python2Pickler(pickle._Pickler):
    """Protocol 2 as Python 2.7's cPickle and torch 1.4 wrote it, in the opcodes of a real file."""
    dispatch = dict(pickle._Pickler.dispatch)

    def persistent_id(self, value):
        if isinstance(value, Storage):
            kind = torch.LongStorage if value.tensor.dtype == torch.int64 else torch.FloatStorage
            return "storage", kind, value.key, "cuda:0", Long(value.tensor.numel()), value.part

    def save_str(self, value):
        self.write(b"U" + bytes([len(value)]) + value.encode("ascii"))
        self.memoize(value)

    def save_long_(self, value):
        data = pickle.encode_long(int(value))
        self.write(b"\x8a" + bytes([len(data)]) + data)

    def save_int(self, value):
        self.write(b"I%d\n" % value) if value >= 1 << 31 else self.save_long(value)

    def save_ordered(self, value):
        state = {"_metadata": OrderedDict([("", {"version": 1})])} if "classifier.weight" in value else None
        self.save_reduce(OrderedDict, ([[key, item] for key, item in value.items()],), state, obj=value)

    def save_tensor(self, value):
        storage = Storage(str(93840475000000 + len(self.storages)), value)
        self.storages.append(storage)
        self.save_reduce(torch._utils._rebuild_tensor_v2, (
            storage, 0, tuple(value.shape), tuple(value.stride()), False, OrderedDict()), obj=value)

    def save_scalar(self, value):
        self.write(value.pickled)

    dispatch.update({str: save_str, Long: save_long_, int: save_int, OrderedDict: save_ordered,
                     torch.Tensor: save_tensor, Scalar: save_scalar})


def python2_file(path, content):
    pickled = io.BytesIO()
    pickler = Python2Pickler(pickled, 2)
    pickler.storages = []
    pickler.dump(content)
    with open(path, "wb") as f:
        f.write(MAGIC + b"\x80\x02M\xe9\x03.")
        f.write(b"\x80\x02}q\x01(U\x10protocol_versionq\x02M\xe9\x03U\ntype_sizesq\x03}q\x04(U\x03intq\x05K\x04U\x05short"
                b"q\x06K\x02U\x04longq\x07K\x04uU\rlittle_endianq\x08\x88u.")
        f.write(pickled.getvalue())
        f.write(b"\x80\x02]q\x01(" + b"".join(b"U\x0e" + s.key.encode() for s in pickler.storages) + b"e.")
        for storage in pickler.storages:
            f.write(struct.pack("<q", storage.tensor.numel()) + storage.tensor.contiguous().numpy().tobytes())
    return pickled.getvalue()


def test_python_2_with_an_optimizer_and_numpy_scalars(tmp_path):
    optimizer = {"state": {139640614320640: {"momentum_buffer": torch.full((2, 3), 9.)}},
                 "param_groups": [{"lr": 0.001, "nesterov": False, "dampening": 0,
                                   "params": [139640614320640, 139640605219328]}]}
    state = OrderedDict(STATE, count=torch.tensor(7))
    path = str(tmp_path / "ckpt.pth")
    for scores in (0, Scalar(), [Scalar(), Scalar()]):
        python2_file(path, {"state_dicts": [state, optimizer], "ep": 150, "scores": scores})
        read = load_checkpoint(path)
        assert list(read) == list(state) and all(torch.equal(read[key], state[key]) for key in state)
    if "weights_only" in torch.load.__code__.co_varnames:  # torch's own way to be safe does not read it
        with pytest.raises(pickle.UnpicklingError):
            torch.load(path, weights_only=True, map_location="cpu")


def test_a_part_of_a_storage(tmp_path):
    """Before torch 0.4, a tensor could lie in a part of another one's storage."""
    whole = Storage("1", torch.arange(20.))
    parts = [whole, Storage("1", whole.tensor, ("2", Long(4), Long(6))), Storage("1", whole.tensor, ("3", Long(18), Long(6)))]

    class Parts(Python2Pickler):
        def save_tensor(self, value):
            part = parts[int(value[0])]
            self.storages.append(part)
            self.save_reduce(torch._utils._rebuild_tensor, (part, 0, (2, 3), (3, 1)), obj=value)
        dispatch = dict(Python2Pickler.dispatch)
        dispatch[torch.Tensor] = save_tensor
    path = str(tmp_path / "parts.pth")
    for part, expected in ((0, [[0, 1, 2], [3, 4, 5]]), (1, [[4, 5, 6], [7, 8, 9]]), (2, None)):
        file = io.BytesIO()
        pickler = Parts(file, 2)
        pickler.storages = []
        pickler.dump({"classifier.weight": torch.tensor([float(part)])})
        with open(path, "wb") as f:
            f.write(MAGIC + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2) + file.getvalue())
            f.write(pickle.dumps(["1"], 2) + struct.pack("<q", 20) + whole.tensor.numpy().tobytes())
        if expected:
            assert load_checkpoint(path)["classifier.weight"].tolist() == expected
        else:
            with pytest.raises(ValueError, match="classifier.weight reaches beyond its 2 values in the file"):
                load_checkpoint(path)


# --- right files -------------------------------------------------------------------------------------------------------

def saved(path, content, zipped=True, **arguments):
    """Saves with torch; returns the path as text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the kind of storage
        torch.save(content, str(path), _use_new_zipfile_serialization=zipped, **arguments)
    return str(path)


def read(path, name=None):
    """Loads a checkpoint; returns its state dict, and what the user is told."""
    told = []
    return load_checkpoint(path, name, told.append), told


class Mode(enum.Enum):
    TRAIN = 1


class Config(dict):
    """A dict with attributes, as EasyDict and yacs's CfgNode are."""

    def __init__(self, **entries):
        super(Config, self).__init__(entries)
        self.__dict__ = self


Point = collections.namedtuple("Point", "x y")
KEPT = [
    np.float64(0.789), np.arange(5.), np.array(["a"], dtype=object), np.dtype("f4"), {"scores": [np.int64(1)]},
    argparse.Namespace(lr=0.001, best=np.float32(3)), Counter([50, 100]), pathlib.PurePosixPath("/data/peta"), pathlib.Path("."),
    datetime.datetime(2024, 5, 6), datetime.timedelta(1), torch.device("cuda:1"), torch.float16, torch.Size([2]), torch.strided,
    {1, "a", (2, 3)}, frozenset([1]), defaultdict(list, a=[1]),
    deque([1, 2], 5), OrderedDict([((1, 2), 3)]), Config(lr=0.1, model=Config(name="DeepMAR")), 1 + 2j, slice(1, 2), range(9),
    bytearray(b"abc"), b"abc", Ellipsis, NotImplemented, functools.partial(int, base=2), len, Mode.TRAIN, Point(1, 2), Mode,
    types.SimpleNamespace(a=1), {torch.device("cpu"): 1, Mode.TRAIN: 2, pathlib.PurePath("a"): 3, (1, (2,)): 4, None: 5},
    torch.optim.SGD([torch.zeros(1)], 0.1), torch.nn.Linear(2, 2), np.random.RandomState(0).get_state(), ValueError("x")]


@pytest.mark.parametrize("arguments", [{}, {"zipped": False}, {"pickle_protocol": 1}, {"pickle_protocol": 4},
                                       {"zipped": False, "pickle_protocol": 4}], ids=str)
def test_what_a_training_run_keeps_beside_the_state_dict(tmp_path, monkeypatch, no_unpickler, arguments):
    """All of it is left alone, and none of it is imported."""
    for number, kept in enumerate(KEPT):
        saved(tmp_path / str(number), {"before": kept, "state_dict": STATE, "after": [kept]}, **arguments)
    monkeypatch.delitem(sys.modules, __name__)  # where some of the classes are
    for number, kept in enumerate(KEPT):
        state, told = read(str(tmp_path / str(number)))
        assert same(state) and told == [], kept


class Rebuilt(object):
    """Pickles as a call of a function by its name, which need not exist."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class Foreign(object):
    """Functions and classes of packages that are not here, in sys.modules as long as a file is saved (a with block)."""

    def __init__(self):
        self.patch = pytest.MonkeyPatch()

    def add(self, module, name_, value=None):
        """Returns the value, or a new function, under its name."""
        def function():
            raise AssertionError("it was called")
        value = value or function
        value.__module__, value.__qualname__, value.__name__ = module, name_, name_
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            if ".".join(parts[:end]) not in sys.modules:
                self.patch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
        self.patch.setattr(sys.modules[module], name_, value, raising=False)
        return value

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.patch.undo()


def parts(tensor):
    """What the calls that make a tensor begin with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the kind of storage
        return tensor.storage(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), False, OrderedDict()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "earlier"])
def test_tensors_of_an_npu(tmp_path, zipped):
    weight = torch.arange(20.)[2:8].view(3, 2).t()  # a part of its storage, turned
    expected = OrderedDict([("classifier.weight", weight), ("classifier.bias", torch.ones(2))])
    paths = []
    with Foreign() as foreign:
        foreign.patch.setattr(torch.serialization, "location_tag", lambda storage: "npu:0")
        rebuild = foreign.add("torch_npu.utils.storage", "_rebuild_npu_tensor")
        formats = foreign.add("torch_npu.npu._format", "Format", enum.IntEnum("Format", "NCHW ND"))
        for number, format_ in enumerate((2, True, formats.ND)):
            state = {"module." + key: Rebuilt(rebuild, *(parts(value) + (format_,))) for key, value in expected.items()}
            momentum = Rebuilt(rebuild, *(parts(torch.ones(3)) + (format_,)))
            paths.append(saved(tmp_path / ("all%d" % number), {"state_dict": state, "optimizer": [momentum]}, zipped))
            paths.append(saved(tmp_path / ("optimizer%d" % number), {
                "optimizer": {"state": {0: {"momentum_buffer": momentum}}}, "state_dict": expected}, zipped))
    for path in paths:
        with open(path, "rb") as f:
            content = f.read()
        assert b"_rebuild_npu_tensor" in content and b"npu:0" in content and (b"_format" in content) == path.endswith("2")
        assert same(load_checkpoint(path), expected), path


def with_attribute(tensor):
    tensor.note = {"optim": "sgd", "device": torch.device("cpu")}
    return tensor


def test_tensors_with_attributes_and_parameters(tmp_path):
    """torch 1.6 writes no attributes, but reads what later ones wrote."""
    plain = torch.ones(2, 3)
    around = {
        "parameter": torch.nn.Parameter(plain), "buffer with an attribute": with_attribute(plain.clone()),
        "parameter with an attribute": with_attribute(torch.nn.Parameter(plain.clone())),
        "written by hand": Rebuilt(torch._utils._rebuild_parameter, torch.nn.Parameter(plain), True, OrderedDict())}
    for name_, value in around.items():
        path = saved(tmp_path / "file.pth", {"classifier.weight": value})
        assert same(load_checkpoint(path), {"classifier.weight": plain}), name_


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "earlier"])
def test_the_calls_of_later_torches(tmp_path, zipped):
    """On every stack: an attribute on a parameter and on a buffer, a tensor of an XLA device, one call in another."""
    plain = Rebuilt(torch._utils._rebuild_tensor_v2, *parts(torch.ones(2, 3)))
    attributes = {"note": torch.device("cpu")}
    with Foreign() as foreign:
        parameter = Rebuilt(foreign.add("torch._utils", "_rebuild_parameter_with_state"), plain, True, OrderedDict(), attributes)
        from_type = foreign.add("torch._tensor", "_rebuild_from_type_v2")
        calls = [plain, parameter, Rebuilt(from_type, plain.function, torch.Tensor, plain.arguments, attributes),
                 Rebuilt(from_type, parameter.function, torch.Tensor, parameter.arguments, None),
                 Rebuilt(foreign.add("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"), plain, torch.float32, "xla:0")]
        paths = [saved(tmp_path / str(number), {"classifier.weight": value}, zipped) for number, value in enumerate(calls)]
    for path in paths:
        assert same(load_checkpoint(path), {"classifier.weight": torch.ones(2, 3)}), path


PREFIXES = ["", "module.", "model.", "_orig_mod.", "module.module.", "_orig_mod.module.", "module._orig_mod.", "model.module.",
            "net.", "model.backbone.", "classifier.", "base."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_are_removed(tmp_path, prefix):
    state, told = read(saved(tmp_path / "c.pth", {"state_dict": {prefix + key: value for key, value in STATE.items()}}))
    assert same(state)
    assert told == (["took its only state dict, state_dict.%s" % prefix.split("model.")[-1].strip(".")] if prefix in (
        "model.backbone.", "classifier.", "base.") else [])


def test_prefixes_inside_a_key_and_of_some_keys(tmp_path):
    for names in (("classifier.module.weight", "classifier._orig_mod.bias"), ("classifier.weight", "module.classifier.bias"),
                  ("module.classifier.weight", "classifier.bias")):
        state, told = read(saved(tmp_path / "c.pth", dict(zip(names, STATE.values()))))
        assert same(state) and told == []


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.module."])
def test_keys_that_become_one(tmp_path, prefix):
    """The same values may be there twice; of different values nobody can tell which are right."""
    twice = OrderedDict(STATE)
    twice.update((prefix + key, value.clone()) for key, value in STATE.items())
    assert same_state(saved(tmp_path / "equal.pth", {"state_dict": twice}))
    for changed in (STATE["classifier.bias"] + 1, STATE["classifier.bias"][:1], STATE["classifier.bias"].half() * 1.01):
        twice[prefix + "classifier.bias"] = changed
        with pytest.raises(ValueError, match="c.pth: classifier.bias and %sclassifier.bias are the same key of the network, but "
                                             "their values differ" % prefix.replace(".", r"\.")):
            load_checkpoint(saved(tmp_path / "c.pth", {"state_dict": twice}))


def test_what_is_not_of_the_network_is_left_out(tmp_path):
    """torch's AveragedModel counts; a Lightning module has its loss's weights beside the model."""
    wrapped = {"module." + key: value for key, value in STATE.items()}
    state, told = read(saved(tmp_path / "c.pth", dict(wrapped, n_averaged=torch.tensor(5))))
    assert same(state) and told == ["left out what does not belong to the network: n_averaged"]
    wrapped = {"model." + key: value for key, value in STATE.items()}
    state, told = read(saved(tmp_path / "c.pth", {"state_dict": dict(wrapped, **{"criterion.pos_weight": torch.ones(2)})}))
    assert same(state) and told == ["left out what does not belong to the network: criterion.pos_weight"]
    state, told = read(saved(tmp_path / "c.pth", dict(STATE, epoch=3, path=pathlib.Path("a"), ema_decay=0.9)))
    assert same(state) and told == ["left out what does not belong to the network: epoch, path, ema_decay"]
    wrapped["model.attention.weight"] = torch.ones(1)  # but this is of another network, and build_model will say so
    assert list(read(saved(tmp_path / "c.pth", wrapped))[0])[-1] == "model.attention.weight"


OPTIMIZER = {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
AVERAGED = {"module." + key: value for key, value in OTHER.items()}
# content -> (what is taken, all others)
SEVERAL = [
    ({"state_dict": STATE, "state_dict_ema": OTHER, "optimizer": OPTIMIZER}, "state_dict", ["state_dict_ema"]),
    ({"ema": {"module": OTHER, "decay": 0.99}, "model": STATE}, "model", ["ema.module"]),
    ({"model_ema": AVERAGED, "model": STATE}, "model", ["model_ema"]),
    ({"state_dict": {"ema": OTHER, "net": STATE}}, "state_dict.net", ["state_dict.ema"]),
    ({"state_dicts": [STATE, OTHER, OPTIMIZER], "ep": 3}, "state_dicts.0", ["state_dicts.1"]),
    ({"state_dict": dict(STATE, **{"ema." + key: value for key, value in AVERAGED.items()})}, "state_dict", ["state_dict.ema"]),
    ({"epoch": 3, "weights": STATE, "best": {"swa": {"weights": OTHER}}}, "weights", ["best.swa.weights"]),
    ([STATE, {"teacher": OTHER}], "0", ["1.teacher"]),
]


@pytest.mark.parametrize("number", range(len(SEVERAL)))
def test_which_of_several_state_dicts(tmp_path, number):
    content, taken, others = SEVERAL[number]
    path = saved(tmp_path / "c.pth", content)
    state, told = read(path)
    assert same(state) and told == [
        "took the state dict %s; it also has: %s (--state-dict NAME takes another)" % (taken, others[0])]
    state, told = read(path, others[0])
    assert same(state, OTHER) and told == [
        "took the state dict %s; it also has: %s (--state-dict NAME takes another)" % (others[0], taken)]
    with pytest.raises(ValueError, match="has no state dict momentum; it has: "):
        read(path, "momentum")


def test_a_second_state_dict_inside_the_first(tmp_path):
    path = saved(tmp_path / "c.pth", dict(STATE, ema=OTHER))
    state, told = read(path)
    assert same(state) and told == ["took the state dict (top level); it also has: ema (--state-dict NAME takes another)",
                                    "left out what does not belong to the network: ema"]
    assert same(read(path, "ema")[0], OTHER)


def test_a_state_dict_by_the_beginning_of_its_name(tmp_path):
    path = saved(tmp_path / "c.pth", {"model": STATE, "ema": {"module": OTHER}})
    assert same(read(path, "ema")[0], OTHER)
    path = saved(tmp_path / "c.pth", {"model": STATE, "ema": {"fast": OTHER, "slow": OTHER.copy()}})
    with pytest.raises(ValueError, match="has more than one state dict ema; it has: model, ema.fast, ema.slow"):
        read(path, "ema")


def test_state_dicts_of_which_none_is_the_likelier(tmp_path):
    flat = {"fast." + key: value for key, value in STATE.items()}
    flat.update(("slow." + key, value) for key, value in OTHER.items())
    for content, names in (({"student": STATE, "teacher": OTHER}, "student, teacher"), (flat, "fast, slow"),
                           ({"nets": [STATE, OTHER]}, "nets.0, nets.1")):
        with pytest.raises(ValueError, match="has several state dicts: %s; choose one with --state-dict NAME" % names):
            load_checkpoint(saved(tmp_path / "c.pth", content))


@pytest.mark.parametrize("where", DeepMAR.MAIN + ["anything", "ema.module"])
@pytest.mark.parametrize("kind", [dict, OrderedDict, Config, defaultdict])
def test_the_only_state_dict_is_found_anywhere(tmp_path, where, kind):
    state = kind()
    state.update(STATE)
    content = state
    for part in reversed(where.split(".")):
        content = kind()
        content.update({part: state, "epoch": 3, "optimizer": OPTIMIZER, "train": {"classifier.weight": 0.1}})
        state = content
    read_, told = read(saved(tmp_path / "c.pth", content))
    assert same(read_)
    assert told == ([] if where not in ("anything", "ema.module") else ["took its only state dict, " + where])


def test_optimizers_that_know_the_parameters_names_are_no_state_dicts(tmp_path):
    by_name = {"state": {"classifier.weight": {"exp_avg": torch.ones(2, 3)}, "classifier.bias": {"exp_avg": torch.ones(2)}}}
    state, told = read(saved(tmp_path / "c.pth", {"optim": by_name, "net": STATE}))
    assert same(state) and told == []


def test_no_state_dict_lists_what_there_is(tmp_path):
    with pytest.raises(ValueError, match=r"holds no state dict with classifier.weight; save model.state_dict\(\). It has: epoch "
                                         r"\(int\), model \(torch.nn.modules.linear.Linear\), best \(dict\), a \(NoneType\)$"):
        load_checkpoint(saved(tmp_path / "c.pth", {"epoch": 3, "model": torch.nn.Linear(1, 1), "best": {}, "a": None}))
    with pytest.raises(ValueError, match="holds an object of torch.nn.modules.linear.Linear, not a state dict; save"):
        load_checkpoint(saved(tmp_path / "c.pth", torch.nn.Linear(1, 1)))
    with pytest.raises(ValueError, match=r"It has: fc.weight \(a tensor\)"):
        load_checkpoint(saved(tmp_path / "c.pth", {"fc.weight": torch.ones(1)}))
    with pytest.raises(ValueError, match="and 18 more$"):
        load_checkpoint(saved(tmp_path / "c.pth", {"key%d" % i: i for i in range(30)}))


def quantised(tensor):
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


# What is inside a state dict and no plain tensor -> what the error says after the key
NO_TENSORS = {
    "a number": (lambda: 3, "int"), "numpy": (lambda: np.ones(2), r"numpy\._?core\.multiarray\._reconstruct"),
    "text": (lambda: "x", "str"), "nothing": (lambda: None, "NoneType"), "a path": (lambda: pathlib.PurePosixPath("a"),
                                                                                    r"pathlib.*PurePosixPath"),
    "quantised": (lambda: quantised(torch.ones(2)), r"torch\._utils\._rebuild_qtensor"),
    "sparse": (lambda: torch.ones(2).to_sparse(), r"torch\._utils\._rebuild_sparse_tensor"),
    "sharded": (lambda: Rebuilt(Point, 1, 2), r"test_checkpoints\.Point"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", sorted(NO_TENSORS))
def test_what_is_no_tensor_inside_the_state_dict(tmp_path, what):
    make, said = NO_TENSORS[what]
    path = saved(tmp_path / "c.pth", {"state_dict": dict(STATE, **{"classifier.bias": make()})})
    with pytest.raises(ValueError, match="c.pth: classifier.bias is %s, not a plain tensor; save" % said):
        load_checkpoint(path)


@pytest.mark.parametrize("kind, name_", [(torch.float16, "float16"), (torch.bfloat16, "bfloat16"), (torch.float64, "float64")])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "earlier"])
def test_weights_of_other_precisions(tmp_path, kind, name_, zipped):
    """They become float32, and the user is told."""
    values = torch.tensor([1, -2.5, 3e-3, 0, 6e4])
    state, told = read(saved(tmp_path / "c.pth", {"classifier.weight": values.to(kind), "base.count": torch.tensor(7)}, zipped))
    assert state["classifier.weight"].dtype == torch.float32 and state["base.count"].dtype == torch.int64
    assert torch.equal(state["classifier.weight"], values.to(kind).float()) and state["base.count"] == 7
    assert told == ["converted the weights from %s to float32" % name_]
    for bad in [float("inf"), float("nan")] + [1e300] * (kind == torch.float64):
        with pytest.raises(ValueError, match="classifier.weight holds NaN or infinite values"):
            load_checkpoint(saved(tmp_path / "c.pth", {"classifier.weight": torch.tensor([1, bad], dtype=kind)}, zipped))


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool])
def test_whole_numbers_keep_their_values(tmp_path, kind):
    for values in (torch.tensor([[0, 1]], dtype=kind), torch.tensor(1, dtype=kind), torch.zeros(2, 0, dtype=kind)):
        state, _ = read(saved(tmp_path / "c.pth", {"classifier.weight": torch.ones(1), "base.x": values}))
        assert state["base.x"].tolist() == values.tolist()


def test_complex_weights_are_refused(tmp_path):
    path = saved(tmp_path / "c.pth", {"classifier.weight": torch.ones(2, dtype=torch.complex64)})
    with pytest.raises(ValueError, match="classifier.weight has values of the type ComplexFloat"):
        load_checkpoint(path)


def test_negated_tensors_are_refused(tmp_path):
    """torch 2 can write -x as x and a mark. Ascend's marks tell a format that the values in the file do not have."""
    for mark, refused in (({"neg": True}, True), ({"conj": True}, True), ({"npu_format_/FRACTAL_Z": True}, False), ({}, False)):
        tensor = Rebuilt(torch._utils._rebuild_tensor_v2, *(parts(torch.ones(2)) + (mark,)))
        path = saved(tmp_path / "c.pth", {"classifier.weight": tensor})
        if refused:
            with pytest.raises(ValueError, match="classifier.weight is torch._utils._rebuild_tensor_v2, not a plain tensor"):
                load_checkpoint(path)
        else:
            assert load_checkpoint(path)["classifier.weight"].tolist() == [1, 1]


def test_shared_expanded_and_turned_tensors(tmp_path):
    whole = torch.arange(24.).view(2, 3, 4)
    expected = {"classifier.weight": whole.permute(2, 0, 1), "classifier.bias": whole[1, :, 1], "base.a": whole,
                "base.b": torch.ones(1, 3).expand(4, 3), "base.c": torch.tensor(2.5)}
    for zipped in (True, False):
        assert same(load_checkpoint(saved(tmp_path / "c.pth", expected, zipped)), expected)


# --- other containers --------------------------------------------------------------------------------------------------

def repacked(source, path, compression=zipfile.ZIP_STORED, root="archive/", folders=False):
    """Packs a file of torch.save again, as zip -0 -r does."""
    with zipfile.ZipFile(str(source)) as archive, zipfile.ZipFile(str(path), "w", compression) as changed:
        if folders:
            for folder in (root, root + "data/"):
                changed.writestr(folder, b"")
        for member in archive.infolist():
            changed.writestr(root + member.filename.split("/", 1)[1], archive.read(member))
    return str(path)


def test_an_unpacked_checkpoint(tmp_path):
    """A browser may have unpacked it. Packed as the error says, it is one again."""
    source = saved(tmp_path / "c.pth", {"state_dict": STATE})
    with zipfile.ZipFile(source) as archive:
        archive.extractall(str(tmp_path / "un packed"))
    folder = [tmp_path / "un packed" / name_ for name_ in os.listdir(str(tmp_path / "un packed"))][0]
    for given in (folder, tmp_path / "un packed"):
        with pytest.raises(ValueError, match="is an unpacked checkpoint; pack its folder again: ") as error:
            load_checkpoint(str(given))
    command = str(error.value).split("again: ")[1]
    assert command == "(cd '%s' && zip -0 -r %s.pth %s)" % (tmp_path / "un packed", folder.name, folder.name)
    for root, folders in (("", False), (folder.name + "/", True), ("a/b/c/", True)):  # what zip makes of it
        assert same_state(repacked(source, tmp_path / "again.pth", root=root, folders=folders))
    with pytest.raises(ValueError, match="zip -0 -r"):
        load_checkpoint(repacked(source, tmp_path / "small.pth", zipfile.ZIP_DEFLATED))
    with pytest.raises(ValueError, match="is a folder, not a checkpoint file"):
        load_checkpoint(str(tmp_path))


def test_a_zip_file_without_checksums(tmp_path):
    """torch 2.5 and later can leave them out (set_crc32_options): they are 0."""
    path = saved(tmp_path / "c.pth", STATE)
    with zipfile.ZipFile(path) as archive:
        checksums = {struct.pack("<I", member.CRC) for member in archive.infolist()}
    with open(path, "rb") as f:
        data = f.read()
    for checksum in checksums:
        data = data.replace(checksum, bytes(4))
    (tmp_path / "none.pth").write_bytes(data)
    with zipfile.ZipFile(str(tmp_path / "none.pth")) as archive:
        assert archive.testzip() and not any(member.CRC for member in archive.infolist())
    assert same_state(str(tmp_path / "none.pth"))


def test_files_of_a_big_endian_machine_are_refused(tmp_path):
    path = saved(tmp_path / "c.pth", STATE)
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(str(tmp_path / "big.pth"), "w") as changed:
        for member in archive.infolist():
            changed.writestr("a/" + member.filename.split("/", 1)[1],
                             b"big" if member.filename.endswith("byteorder") else archive.read(member))
        if "a/byteorder" not in changed.namelist():
            changed.writestr("a/byteorder", b"big")
    with open(saved(tmp_path / "c.pth", STATE, zipped=False), "rb") as f:
        data = f.read()
    assert data.count(b"little_endian") == 1
    at = data.index(b"\x88", data.index(b"little_endian"))
    (tmp_path / "old.pth").write_bytes(data[:at] + b"\x89" + data[at + 1:])
    for file in ("big.pth", "old.pth"):
        with pytest.raises(ValueError, match="big-endian"):
            load_checkpoint(str(tmp_path / file))


def write_safetensors(path, tensors):
    """The format: the length of a JSON header, the header, the values. tensors: {key: (type, shape, values)}."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for key, (kind, shape, values) in tensors.items():
        header[key] = {"dtype": kind, "shape": shape, "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    with open(str(path), "wb") as f:
        f.write(struct.pack("<Q", len(header)) + header + data)
    return str(path)


def test_safetensors(tmp_path):
    """With the real package, which tests/requirements.txt has."""
    half = np.arange(6, dtype="<f2").tobytes()
    upper = (np.arange(6, dtype="<f4").view("<u4") >> 16).astype("<u2").tobytes()
    for kind, values, told in (("F32", np.arange(6, dtype="<f4").tobytes(), []), ("F16", half, ["float16"]),
                               ("BF16", upper, ["bfloat16"]), ("F64", np.arange(6, dtype="<f8").tobytes(), ["float64"])):
        for file in ("model.safetensors", "renamed.pth"):
            path = write_safetensors(tmp_path / file, {
                "model.classifier.bias": ("F32", [2], np.ones(2, "<f4").tobytes()),
                "model.classifier.weight": (kind, [2, 3], values), "model.base.count": ("I64", [], struct.pack("<q", 7))})
            state, said = read(path)
            assert same(state, dict(STATE, **{"base.count": torch.tensor(7)}))
            assert said == ["converted the weights from %s to float32" % name_ for name_ in told]
    with pytest.raises(ValueError, match="classifier.weight has values of the type F8_E4M3"):
        load_checkpoint(write_safetensors(tmp_path / "f8.safetensors", {"classifier.weight": ("F8_E4M3", [2], b"ab")}))
    for cut in (4, 9, 40, len(values) + 200):
        with open(path, "rb") as f:
            (tmp_path / "cut.safetensors").write_bytes(f.read()[:cut])
        with pytest.raises(ValueError, match="cut.safetensors: is damaged or cut off"):
            load_checkpoint(str(tmp_path / "cut.safetensors"))


def test_safetensors_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    path = write_safetensors(tmp_path / "m.safetensors", {"classifier.weight": ("F32", [1], bytes(4))})
    with pytest.raises(ValueError, match="is a safetensors file, and the package that reads it is missing .*; install it: "
                                         "python3 -m pip install --prefer-binary safetensors$"):
        load_checkpoint(path)
    assert same_state(saved(tmp_path / "c.pth", STATE))  # needs it not


def test_files_of_other_kinds(tmp_path):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        archive.add(saved(tmp_path / "c.pth", STATE), "c.pth")
    (tmp_path / "checkpoint.pth.tar").write_bytes(content.getvalue())
    with pytest.raises(ValueError, match="is a tar archive, not a checkpoint; unpack it with tar -xf"):
        load_checkpoint(str(tmp_path / "checkpoint.pth.tar"))
    with open(str(tmp_path / "pickle.pth"), "wb") as f:
        pickle.dump({key: value.numpy() for key, value in STATE.items()}, f)
    with pytest.raises(ValueError, match="is a pickle, but not from torch.save"):
        load_checkpoint(str(tmp_path / "pickle.pth"))


def test_names_that_would_break_a_message(tmp_path):
    wild = ["a\nerror: all is well", "\x1b[2J", "x" * 10 ** 5, "\ud800"]
    for name_ in wild:
        for content, given in (({name_: STATE, "b": OTHER}, None), ({"state_dict": STATE, name_: OTHER}, None),
                               ({name_: 1}, None), ({"state_dict": STATE}, name_),
                               (dict(STATE, **{"module." + name_: torch.ones(1)}), None),
                               ({"classifier.weight": STATE["classifier.weight"], name_: 3}, None)):
            told = []
            try:
                load_checkpoint(saved(tmp_path / "c.pth", content), given, told.append)
            except ValueError as error:
                told.append(str(error))
            assert all(line.isprintable() and len(line) < 1000 for line in told), told


# --- damage --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "earlier"])
def test_a_file_cut_off_anywhere_is_refused(tmp_path, zipped):
    path = str(tmp_path / "cut.pth")
    with_payload(path, zipped, b"N")
    with open(path, "rb") as f:
        whole = f.read()
    for end in range(len(whole)):
        with open(path, "wb") as f:
            f.write(whole[:end])
        with pytest.raises(ValueError) as error:
            load_checkpoint(path)
        assert str(error.value).startswith(path + ": ") and "\n" not in str(error.value), end


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "earlier"])
def test_a_flipped_byte_is_refused_or_harmless(tmp_path, zipped):
    path = str(tmp_path / "flipped.pth")
    with_payload(path, zipped, b"N")
    with open(path, "rb") as f:
        whole = f.read()
    refused = 0
    for at in range(len(whole)):
        with open(path, "wb") as f:
            f.write(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1:])
        try:
            assert all(isinstance(value, torch.Tensor) for value in load_checkpoint(path).values())
        except ValueError as error:
            refused += 1
            assert str(error).startswith(path + ": ") and "\n" not in str(error), at
    assert refused > len(whole) / 8


def test_tensors_that_claim_more_than_the_file_holds(tmp_path):
    path = str(tmp_path / "wide.pth")
    torch.save({"classifier.weight": torch.zeros(1).expand(10 ** 6, 10 ** 4)}, path)
    with pytest.raises(ValueError, match="classifier.weight and the tensors before it have more values than the file has bytes"):
        load_checkpoint(path)


@pytest.mark.parametrize("claimed", [5, 10 ** 3, 10 ** 6, 10 ** 10, 2 ** 62, -1])
def test_a_storage_that_claims_more_than_its_record_holds(tmp_path, claimed):
    """Other memory must not become weights."""
    path, content = str(tmp_path / "claim.pth"), io.BytesIO()
    torch.save({"classifier.weight": torch.zeros(4)}, content)
    with zipfile.ZipFile(content) as archive, zipfile.ZipFile(path, "w") as changed:
        for member in archive.infolist():
            data = archive.read(member)
            if member.filename.endswith("data.pkl"):
                assert data.count(b"K\x04") == 2  # the storage's size, and the tensor's
                data = data.replace(b"K\x04", b"\x8a\x08" + struct.pack("<q", claimed))
            changed.writestr(member.filename, data)
        changed.writestr("archive/ballast", bytes(5 * 10 ** 6))
    with pytest.raises(ValueError, match="classifier.weight (reaches beyond its 4 values|and the tensors before|is not a tensor)"):
        load_checkpoint(path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "earlier"])
@pytest.mark.parametrize("offset, size, stride", [
    (0, (2,), (2 ** 62,)), (0, (3,), (2 ** 61,)), (0, (2, 3), (2 ** 62, 2 ** 62)), (0, (2 ** 32, 2 ** 32), (1, 0)),
    (100, (1,), (1,)), (-50, (2,), (1,)), (0, (5,), (1,)), (0, (10 ** 4,) * 3, (0,) * 3)])
def test_a_tensor_that_reaches_beyond_its_storage(tmp_path, zipped, offset, size, stride):
    tensor = Rebuilt(torch._utils._rebuild_tensor_v2, parts(torch.zeros(4))[0], offset, size, stride, False, OrderedDict())
    path = saved(tmp_path / "strides.pth", {"classifier.weight": tensor}, zipped)
    with pytest.raises(ValueError) as error:
        load_checkpoint(path)
    assert str(error.value).startswith(path + ": ") and "\n" not in str(error.value)


def test_a_tar_file_that_begins_like_a_checkpoint(tmp_path):
    """torch.load would unpack it before looking at anything else."""
    path = str(tmp_path / "tar.pth")
    header = bytearray(tarfile.TarInfo("x" * len(MAGIC)).tobuf(tarfile.GNU_FORMAT))
    header[:len(MAGIC)] = MAGIC
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    with open(path, "wb") as f:
        f.write(bytes(header) + bytes(1024))
    with pytest.raises(ValueError, match="tar.pth: "):
        load_checkpoint(path)
    assert os.listdir(str(tmp_path)) == ["tar.pth"]


def test_the_script_says_so_in_one_line(tmp_path):
    with_content(str(tmp_path / "bad.pth"), True, payloads(str(tmp_path / "canary"))["os.system"])
    check_error(script("export_onnx.py", "bad.pth", "out.onnx", 1, cwd=tmp_path),
                "export_onnx.py: error: bad.pth: holds an object of os.system, not a state dict")
    assert os.listdir(str(tmp_path)) == ["bad.pth"]
