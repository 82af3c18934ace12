"""Random and damaged input for every parser: it gives the right answer or an error that names the file, and never crashes.

DEEPMAR_TEST_CAMPAIGN=50 tries 50 times as many examples, and different ones each time.
"""
import io
import json
import os

import onnx
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from DeepMAR import load_checkpoint
from helpers import ZEROS, between, constant, model_of, node, outputs_of, succeeds
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


def refused(function, folder, data, *arguments):
    """Returns what a parser returns for a file of this data, or None if it refuses the file with a proper error."""
    path = str(folder / "file")
    (folder / "file").write_bytes(data)
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
        at = draw(st.integers(0, len(data)))
        cut = draw(st.sampled_from([0, 1, 9, 40, len(data)]))
        new = draw(st.one_of(st.binary(max_size=9), st.binary(min_size=1, max_size=1),
                             st.sampled_from([b"\n", b"\0", b"..", b"/", b"9" * 30, b"[", bytes(data[at:at + 40])])))
        data[at:at + cut] = new
    return bytes(data)


LISTS = ["00001.png\n00002.png\r\n\n sub/3.b.png".encode(), "\ufeffa.png\nü x.jpg\n".encode("utf-8"), b"a.png\nb.png\na.jpg\n"]


@fuzz(150, st.one_of(damaged(LISTS), st.binary(max_size=60)))
def test_damaged_lists_are_read_or_refused(tmp_path, data):
    names = refused(read_list, tmp_path, data)
    if names is not None:
        lines = [line.strip() for line in data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").split("\n")]
        assert names == [line for line in lines if line]
        bins = [os.path.normpath(os.path.join("/bins", stem(name) + ".bin")) for name in names]
        assert len(set(bins)) == len(bins) and all(os.path.dirname(path) == "/bins" for path in bins)
        assert all(os.path.normpath(os.path.join("/images", name)).startswith("/images/") for name in names)
        check_images(str(tmp_path / "file"), {stem(name): "" for name in names})  # stage 7 reads the list as stage 4 does


@fuzz(150, st.one_of(damaged([b"0 ./bins/0.bin 224 224\n1 ./bins/1.bin 224 224\n"]), st.binary(max_size=60)))
def test_damaged_info_files_are_refused(tmp_path, data):
    assert refused(read_info, tmp_path, data, 224, 224) is None, "none of the bins exists"


LABELS = [b'{"a.png": [0, 1, 1], "b.png": [1, 0, 0]}', '\ufeff{"x/ü.png": [0.0, 1e0], "b": [true, 0]}'.encode("utf-8")]


@fuzz(200, st.one_of(damaged(LABELS), st.binary(max_size=60)))
def test_damaged_labels_are_read_or_refused(tmp_path, data):
    found = refused(read_labels, tmp_path, data)
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


CHECKPOINTS = [checkpoint(zipped, content) for zipped in (False, False, True) for content in  # a zip file has checksums
               (STATE, {"state_dict": STATE, "epoch": 3}, {"state_dicts": [STATE, {"state": {0: STATE}}], "ep": 1})]


@fuzz(40, damaged(CHECKPOINTS))
def test_damaged_checkpoints_are_read_or_refused(tmp_path, data):
    """In a child process, like the models, because a crash of C++ code would end this one."""
    def check():
        state = refused(load_checkpoint, tmp_path, data)
        assert state is None or all(isinstance(value, torch.Tensor) and value.numel() <= len(data)
                                    and torch.isfinite(value.float()).all() for value in state.values())
        if data in CHECKPOINTS:
            assert all(torch.equal(state[key], STATE[key].float()) for key in STATE) and len(state) == 2
    assert succeeds(check)


MODELS = [model_of(between(node("Pad", "r c", "p")), [("c", ZEROS)]),
          model_of([constant("c", ZEROS)] + between(node("Pad", "r c", "p"))),
          model_of([constant("c", ZEROS), node("Identity", "c", "d")] + between(node("Pad", "r d", "p"))),
          model_of(between(node("Pad", "r", "p", pads=[0] * 8)), opset=10)]


@fuzz(40, damaged([model.SerializeToString() for model in MODELS]))
def test_damaged_models_are_refused_or_keep_their_outputs(tmp_path, data):
    def check():
        model = refused(load, tmp_path, data)
        if model is None:
            return
        refused(open_session, tmp_path, data)
        try:
            before = outputs_of(model)
        except Exception:  # ONNX Runtime's exceptions have no common class. It may refuse the model afterwards too
            return
        removed = remove_pads(model)[0]
        onnx.checker.check_model(model)
        assert not removed or all(a.tobytes() == b.tobytes() for a, b in zip(before, outputs_of(model)))
    assert succeeds(check)
