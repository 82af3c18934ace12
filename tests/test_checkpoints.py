"""DeepMAR.py against what it meets: files of Python 2.7, damaged files, and files made to do harm.

A payload stands where a training run's scores do, beside a state dict that is good, and would create the file 'canary'.
"""
import argparse
import io
import os
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch

import DeepMAR
from conftest import check_error, script
from DeepMAR import load_checkpoint

MARK = "MARK-MARK"
MARKED = pickle.dumps(MARK, 2)[2:-3]  # without PROTO, BINPUT 0 and STOP
STATE = OrderedDict([("classifier.weight", torch.arange(6.).reshape(2, 3)), ("classifier.bias", torch.ones(2))])


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


LIVE = ["os.system", "posix.system", "eval", "exec", "Python 2's eval", "Popen", "getattr chain", "import chain", "INST",
        "OBJ", "NEWOBJ_EX", "dotted name", "map", "deep in the optimizer", "unread"]


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
        "extension": b"\x82\x01",
        "persistent id": b"(" + text("module") + name("os", "system") + text(shell) + text(shell) + b"tQ",
        "BUILD of a function": name("torch._utils", "_rebuild_tensor_v2") + b"N}" + text("__code__") + system
        + b"s\x86b",
        "BUILD of a class": name("collections", "OrderedDict") + b"N}" + text("__setstate__") + name("os", "system")
        + b"s\x86b" + text(shell) + b"b",
        "BUILD of an instance": name("collections", "OrderedDict") + b")R}" + text("items") + name("os", "system")
        + b"sb",
    }
    return found


# These name only what stands for numpy, as a training run's scores do: they load, and do nothing.
IGNORED = {"numpy's runstring", "numpy's os", "numpy.load"}


def with_payload(path, zipped, payload):
    """Writes a good checkpoint with the payload for its scores."""
    content = io.BytesIO()
    torch.save({"state_dict": STATE, "scores": MARK}, content, _use_new_zipfile_serialization=zipped)
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


def same_state(path):
    state = load_checkpoint(path)
    return list(state) == list(STATE) and all(torch.equal(state[key], STATE[key]) for key in STATE)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "earlier"])
def test_the_place_of_the_payload_is_read(tmp_path, zipped):
    path = str(tmp_path / "good.pth")
    for payload in (b"N", text("0.7"), b"}(" + text("a") + b"K\x01u"):
        with_payload(path, zipped, payload)
        assert same_state(path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "earlier"])
@pytest.mark.parametrize("payload", sorted(payloads("")))
def test_no_code_of_a_file_runs(tmp_path, monkeypatch, zipped, payload):
    monkeypatch.chdir(tmp_path)
    canary, path = str(tmp_path / "canary"), str(tmp_path / "bad.pth")
    with open(canary + ".inner", "wb") as f:  # what torch.load and numpy.load would unpickle
        f.write(b"\x80\x02" + payloads(canary)["os.system"] + b".")
    with_payload(path, zipped, payloads(canary)[payload])
    if payload in IGNORED:
        assert same_state(path)
    else:
        with pytest.raises(ValueError) as error:
            load_checkpoint(path)
        assert str(error.value).startswith(path + ": ") and "\n" not in str(error.value)
    assert sorted(os.listdir(str(tmp_path))) == ["bad.pth", "canary.inner"]


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
    pickles = [DeepMAR.MAGIC] + [pickle.dumps(value, 2) for value in (1001, {"little_endian": True}, {}, [])]
    pickles[place] = b"\x80\x02" + payloads(str(tmp_path / "canary"))["os.system"] + b"."
    (tmp_path / "bad.pth").write_bytes(b"".join(pickles))
    with pytest.raises(ValueError, match="refers to 'os.system'" if place else "no PyTorch checkpoint"):
        load_checkpoint(str(tmp_path / "bad.pth"))
    assert os.listdir(str(tmp_path)) == ["bad.pth"]


def patch_writer(path):
    """torch.load compares a module's source with the file's and writes the difference to <its name>.patch, if its
    dump_patches is true: BUILD can make both of a function, and so a file of any name and content."""
    return (name("torch._utils", "_rebuild_tensor_v2") + b"q\xffN}(" + text("__name__") + text(path)
            + text("dump_patches") + b"\x88u\x86b0(" + text("module") + b"h\xff" + text("x.py") + text("harm") + b"tQ")


@pytest.mark.parametrize("guarded", [True, False])
def test_build_cannot_make_torch_write_a_file(tmp_path, monkeypatch, guarded):
    path = str(tmp_path / "bad.pth")
    with_payload(path, False, patch_writer(str(tmp_path / "canary")))
    function = torch._utils._rebuild_tensor_v2
    monkeypatch.setattr(function, "__name__", function.__name__)  # put back afterwards
    monkeypatch.setattr(function, "dump_patches", False, raising=False)
    if guarded:
        assert same_state(path)  # torch compares, and has no patch to write
        assert (function.__name__, function.dump_patches) == ("_rebuild_tensor_v2", False)
        assert os.listdir(str(tmp_path)) == ["bad.pth"]
    else:  # the same names, with an unpickler that obeys BUILD: the danger is real
        class Obedient(pickle.Unpickler):
            def find_class(self, module, function):
                assert (module, function) in DeepMAR.ALLOWED
                return super().find_class(module, function)
        monkeypatch.setattr(DeepMAR.CheckpointPickle, "Unpickler", Obedient)
        load_checkpoint(path)
        assert (tmp_path / "canary.patch").exists()


def central_directory(data):
    """Where a zip file's directory begins and ends (no comment, no zip64)."""
    size, start = struct.unpack("<II", data[-10:-2])
    return start, start + size


def test_a_torchscript_archive_that_zipfile_takes_for_a_checkpoint(tmp_path):
    """zipfile reads the directory just before the end record, torch the one that the record points to."""
    script_, real, fake = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), script_)
    with zipfile.ZipFile(script_) as archive, zipfile.ZipFile(real, "w") as plain:
        for member in archive.namelist():
            plain.writestr(member, archive.read(member))
    (tmp_path / "plain.pth").write_bytes(real.getvalue())
    start, end = central_directory(real.getvalue())
    entry = zipfile.ZipInfo("archive/data.pkl")
    entry.comment = b" " * (end - start - 46 - len(entry.filename))
    with zipfile.ZipFile(fake, "w") as archive:
        archive.writestr(entry, b"")
    directory = slice(*central_directory(fake.getvalue()))
    path = str(tmp_path / "two.pth")
    with open(path, "wb") as f:
        f.write(real.getvalue()[:end] + fake.getvalue()[directory] + real.getvalue()[end:])

    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["archive/data.pkl"]
    assert any(record.endswith("constants.pkl") for record in torch._C.PyTorchFileReader(path).get_all_records())
    for archive in (path, str(tmp_path / "plain.pth")):
        with pytest.raises(ValueError, match="a TorchScript archive, not a checkpoint"):
            load_checkpoint(archive)


# --- Python 2.7 ----------------------------------------------------------------------------------------------------

class Long(int):
    """Python 2's long."""


class Storage(object):
    def __init__(self, key, tensor):
        self.key, self.tensor = key, tensor


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
            return "storage", kind, value.key, "cuda:0", Long(value.tensor.numel()), None

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
        f.write(DeepMAR.MAGIC + b"\x80\x02M\xe9\x03.")
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


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "earlier"])
def test_what_a_training_run_keeps_beside_the_state_dict(tmp_path, zipped):
    path = str(tmp_path / "run.pth")
    for kept in (np.float64(0.789), np.arange(5.), argparse.Namespace(lr=0.001, best=np.float32(3)),
                 Counter([50, 100]), {"scores": [np.int64(1)]}):
        torch.save({"state_dict": STATE, "kept": kept}, path, _use_new_zipfile_serialization=zipped)
        assert same_state(path)


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
    for at in range(0, len(whole)):
        with open(path, "wb") as f:
            f.write(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1:])
        try:
            assert all(isinstance(value, torch.Tensor) for value in load_checkpoint(path).values())
        except ValueError as error:
            refused += 1
            assert str(error).startswith(path + ": ") and "\n" not in str(error), at
    assert refused > len(whole) / 8


def test_keys_that_would_break_a_message(tmp_path):
    path = str(tmp_path / "keys.pth")
    for key in ("a\nerror: all is well", "\x1b[2J", 3):
        torch.save({key: torch.zeros(1)}, path)
        with pytest.raises(ValueError, match="holds no state dict") as error:
            load_checkpoint(path)
        assert str(error.value).isprintable() and len(str(error.value)) < 300


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precisions(tmp_path, kind):
    path = str(tmp_path / "kind.pth")
    torch.save({"weight": torch.ones(3, dtype=kind)}, path)
    assert load_checkpoint(path)["weight"].tolist() == [1, 1, 1]
    torch.save({"weight": torch.tensor([1, float("inf")]).to(kind)}, path)
    with pytest.raises(ValueError, match="weight holds NaN or infinite values"):
        load_checkpoint(path)


def test_tensors_that_claim_more_than_the_file_holds(tmp_path):
    path = str(tmp_path / "wide.pth")
    torch.save({"weight": torch.zeros(1).expand(10 ** 6, 10 ** 4)}, path)
    with pytest.raises(ValueError, match="up to weight have more values than the file has bytes"):
        load_checkpoint(path)


@pytest.mark.parametrize("claimed", [5, 10 ** 3, 10 ** 6, 10 ** 10, 2 ** 62, -1])
def test_a_storage_that_claims_more_than_its_record_holds(tmp_path, claimed):
    """torch 1.6 would read on behind the record: other memory as weights, or a crash."""
    path, content = str(tmp_path / "claim.pth"), io.BytesIO()
    torch.save({"weight": torch.zeros(4)}, content)
    with zipfile.ZipFile(content) as archive, zipfile.ZipFile(path, "w") as changed:
        for member in archive.infolist():
            data = archive.read(member)
            if member.filename.endswith("data.pkl"):
                assert data.count(b"K\x04") == 2  # the storage's size, and the tensor's
                data = data.replace(b"K\x04", b"\x8a\x08" + struct.pack("<q", claimed))
            changed.writestr(member.filename, data)
        changed.writestr("archive/ballast", bytes(5 * 10 ** 6))
    with pytest.raises(ValueError, match="claims %d values in a record of 16 bytes" % claimed):
        load_checkpoint(path)


class Rebuilt(object):
    """A tensor as a pickle rebuilds it, of sizes that torch.save would not write."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.arguments


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "earlier"])
@pytest.mark.parametrize("offset, size, stride", [
    (0, (2,), (2 ** 62,)), (0, (3,), (2 ** 61,)), (0, (2, 3), (2 ** 62, 2 ** 62)), (0, (2 ** 32, 2 ** 32), (1, 0)),
    (100, (1,), (1,)), (-50, (2,), (1,)), (0, (5,), (1,)), (0, (10 ** 4,) * 3, (0,) * 3)])
def test_a_tensor_that_reaches_beyond_its_storage(tmp_path, zipped, offset, size, stride):
    path = str(tmp_path / "strides.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the kind of storage
        tensor = Rebuilt(torch.zeros(4).storage(), offset, size, stride, False, OrderedDict())
        torch.save({"weight": tensor}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError) as error:
        load_checkpoint(path)
    assert str(error.value).startswith(path + ": ") and "\n" not in str(error.value)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "earlier"])
@pytest.mark.parametrize("bomb", ["deep", "wide"])
def test_a_key_that_cannot_be_hashed_in_time(tmp_path, zipped, bomb):
    """Python computes a tuple's hash from all that is in it: a million levels crash it, 100 doublings never end."""
    path = str(tmp_path / "bomb.pth")
    levels = b"\x85" * 10 ** 6 if bomb == "deep" else b"2\x86" * 100
    with_payload(path, zipped, b"})" + levels + b"K\x01s")
    with pytest.raises(ValueError, match="tuple for a key"):
        load_checkpoint(path)


def test_a_tar_file_that_begins_like_a_checkpoint(tmp_path):
    """torch.load would unpack it before it looks at anything else."""
    path = str(tmp_path / "tar.pth")
    header = bytearray(tarfile.TarInfo("x" * len(DeepMAR.MAGIC)).tobuf(tarfile.GNU_FORMAT))
    header[:len(DeepMAR.MAGIC)] = DeepMAR.MAGIC
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    with open(path, "wb") as f:
        f.write(bytes(header) + bytes(1024))
    with pytest.raises(ValueError, match="a tar file"):
        load_checkpoint(path)


def test_the_script_says_so_in_one_line(tmp_path):
    canary = tmp_path / "canary"
    with_payload(str(tmp_path / "bad.pth"), True, payloads(str(canary))["os.system"])
    with_payload(str(tmp_path / "cut.pth"), False, b"N")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:-5])
    for file, said in (("bad.pth", "refers to 'os.system'"), ("cut.pth", "damaged or cut off")):
        check_error(script("export_onnx.py", file, "out.onnx", 1, cwd=tmp_path), "export_onnx.py: error: " + file, said)
    assert sorted(os.listdir(str(tmp_path))) == ["bad.pth", "cut.pth"]
