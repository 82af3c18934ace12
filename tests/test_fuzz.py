"""Random and damaged input for every parser: it gives the right answer or an error that names the file, and never crashes.

DEEPMAR_TEST_CAMPAIGN=50 tries 50 times as many examples, and different ones each time.
"""
import io
import json
import os
import sys
import zipfile

import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from DeepMAR import load_checkpoint
from helpers import ZEROS, between, constant, model_of, node, outputs_of
from lib.bins import read_info
from lib.labels import read_labels
from lib.models import load
from lib.names import read_list, stem
from lib.results import check_images
from lib.session import open_session
from remove_pad import remove_pads

CAMPAIGN = int(os.environ.get("DEEPMAR_TEST_CAMPAIGN", "0"))


def fuzz(examples, *strategies):
    """Like hypothesis's given(), with the same examples each time, except in a campaign."""
    def decorate(test):
        return settings(max_examples=examples * (CAMPAIGN or 1), derandomize=not CAMPAIGN, deadline=None, database=None,
                        suppress_health_check=list(HealthCheck))(given(*strategies)(test))
    return decorate


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Returns a function that writes bytes to a file and returns its path."""
    path = tmp_path_factory.mktemp("fuzz") / "file"

    def write(data):
        path.write_bytes(data)
        return str(path)
    return write


def refused(function, path, *arguments):
    """Returns what a parser returns, or None if it refuses the file with a proper error."""
    try:
        return function(path, *arguments)
    except (ValueError, OSError) as error:
        message = str(error)
        assert message.startswith(path + ": ") and "\n" not in message and len(message) < 3000, message
        assert type(error) in (ValueError, OSError), repr(error)  # not a subclass such as UnicodeDecodeError


@st.composite
def damaged(draw, whole):
    """Returns one of the whole contents with some bytes changed, cut out, doubled or put in."""
    data = bytearray(draw(st.sampled_from(whole)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(["change", "cut", "put in", "double", "end"]))
        if kind == "change" and data:
            data[at] = draw(st.integers(0, 255))
        elif kind == "cut":
            del data[at:at + draw(st.integers(1, 40))]
        elif kind == "put in":
            data[at:at] = draw(st.one_of(st.binary(max_size=9),
                                         st.sampled_from([b"\n", b"\0", b"..", b"/", b"9" * 30, b"["])))
        elif kind == "double":
            data[at:at] = data[at:at + draw(st.integers(1, 40))]
        else:
            del data[at:]
    return bytes(data)


LISTS = ["00001.png\n00002.png\r\n\n sub/3.b.png", "\ufeffa.png\nü x.jpg\n", "a.png\nb.png\na.jpg\n"]


@fuzz(150, st.one_of(damaged([text.encode("utf-8") for text in LISTS]), st.binary(max_size=60)))
def test_damaged_lists_are_read_or_refused(file, data):
    path = file(data)
    names = refused(read_list, path)
    if names is not None:
        lines = [line.strip() for line in data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").split("\n")]
        assert names == [line for line in lines if line]
        bins = [os.path.normpath(os.path.join("/bins", stem(name) + ".bin")) for name in names]
        assert len(set(bins)) == len(bins) and all(os.path.dirname(path) == "/bins" for path in bins)
        assert all(os.path.normpath(os.path.join("/images", name)).startswith("/images/") for name in names)
        check_images(path, {stem(name): "" for name in names})  # stage 7 reads the list as stage 4 does


INFO = "".join("%d ./bins/%05d.bin 224 224\n" % (i, i) for i in range(3)).encode()


@fuzz(150, st.one_of(damaged([INFO]), st.binary(max_size=60)))
def test_damaged_info_files_are_refused(file, data):
    bins = refused(read_info, file(data), 224, 224)
    assert bins is None, "none of the bins exists"


LABELS = [b'{"a.png": [0, 1, 1], "b.png": [1, 0, 0]}', '\ufeff{"x/ü.png": [0.0, 1e0], "b": [true, 0]}'.encode("utf-8")]


@fuzz(200, st.one_of(damaged(LABELS), st.binary(max_size=60)))
def test_damaged_labels_are_read_or_refused(file, data):
    found = refused(read_labels, file(data))
    if found is not None:
        rows, labels = found
        expected = json.loads(data.decode("utf-8-sig"))
        assert rows == {stem(name): i for i, name in enumerate(expected)}
        assert labels.tolist() == [[int(value) for value in row] for row in expected.values()]


STATE = {"classifier.weight": torch.arange(6.).reshape(2, 3), "classifier.bias": torch.ones(2, dtype=torch.float16)}


def checkpoint(zipped, content):
    data = io.BytesIO()
    torch.save(content, data, _use_new_zipfile_serialization=zipped)
    return data.getvalue()


CHECKPOINTS = [checkpoint(zipped, content) for zipped in (True, False) for content in
               (STATE, {"state_dict": STATE, "epoch": 3}, {"state_dicts": [STATE, {"state": {0: STATE}}], "ep": 1})]


def zipped(pickle):
    """Returns the first checkpoint with another pickle and the right checksum."""
    data = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(CHECKPOINTS[0])) as archive, zipfile.ZipFile(data, "w") as changed:
        for member in archive.infolist():
            changed.writestr(member.filename, pickle if member.filename.endswith("data.pkl") else archive.read(member))
    return data.getvalue()


PICKLES = [zipfile.ZipFile(io.BytesIO(data)).read("archive/data.pkl") for data in CHECKPOINTS[:3]]


def in_a_child(function, *arguments):
    """Calls a function in a forked process, because a crash of C++ code would end this one. The function must not fail."""
    child = os.fork()
    if not child:
        try:
            function(*arguments)
        except BaseException as error:
            sys.__stderr__.write("%r\n" % error)
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status == 0, "it crashed" if os.WIFSIGNALED(status) else "see above"


@fuzz(40, st.one_of(damaged(CHECKPOINTS), damaged(PICKLES).map(zipped)))
def test_damaged_checkpoints_are_read_or_refused(file, data):
    def check(path):
        state = refused(load_checkpoint, path)
        assert state is None or all(isinstance(value, torch.Tensor) and value.numel() <= len(data)
                                    and torch.isfinite(value.float()).all() for value in state.values())
        if data in CHECKPOINTS:
            assert all(torch.equal(state[key], STATE[key].float()) for key in STATE) and len(state) == 2
    in_a_child(check, file(data))


MODELS = [model_of(between(node("Pad", "r c", "p")), [("c", ZEROS)]),
          model_of([constant("c", ZEROS)] + between(node("Pad", "r c", "p"))),
          model_of([constant("c", ZEROS), node("Identity", "c", "d")] + between(node("Pad", "r d", "p"))),
          model_of(between(node("Pad", "r", "p", pads=[0] * 8)), opset=10)]


@fuzz(40, damaged([model.SerializeToString() for model in MODELS]))
def test_damaged_models_are_refused_or_keep_their_outputs(file, data):
    def check(path):
        model = refused(load, path)
        if model is None:
            return
        refused(open_session, path)
        try:
            before = outputs_of(model)
        except Exception:  # ONNX Runtime's exceptions have no common class. It may refuse the model afterwards too
            return
        removed = remove_pads(model)[0]
        onnx.checker.check_model(model)
        assert not removed or all(a.tobytes() == b.tobytes() for a, b in zip(before, outputs_of(model)))
    in_a_child(check, file(data))
