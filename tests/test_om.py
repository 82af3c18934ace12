"""What an OM says of itself, read from OMs that the tests write, and the refusals of those that do not fit a run."""
import json

import numpy as np
import pytest

import doctor
import om as standin
from helpers import check_error, script
from lib import om
from lib.bins import holds
from lib.images import MEAN, STD

TEXTS = {"soc_version": "Ascend310P3", "atc_version": "7.5.0.1.129", "opp_version": "7.5.0.1.130",
         "atc_cmdline": "atc --model=m.onnx --framework=5 --input_shape=actual_input_1:4,3,64,32 --insert_op_conf=aipp.cfg"}


def write_om(path, old=False, **changes):
    texts = dict(TEXTS, **changes)
    path.write_bytes(standin.content([(1, b"weights"), (0, standin.model_def(texts)), (2, b"tasks")], old))
    return str(path)


def faults(path, uint8=True, size=(64, 32), batch_size=4, chips=("310P3",), cann="8.0.RC3"):
    """What is wrong with an OM, by default for a run that TEXTS fit."""
    installed = doctor.Cann()
    installed.version, installed.home = cann, None
    return doctor.om_faults(om.read(path), batch_size, list(size), uint8, chips, installed)


@pytest.mark.parametrize("old", [False, True])
def test_oms_damaged_at_every_byte_are_neither_misread_nor_refused(tmp_path, old):
    path = write_om(tmp_path / "m.om", old)
    assert om.read(path) == TEXTS and om.has_aipp(TEXTS) and om.input_shape(TEXTS) == [4, 3, 64, 32] and faults(path) == []
    whole = (tmp_path / "m.om").read_bytes()
    sizes, seen = whole.index(b"4,3,64,32"), [{}, TEXTS]  # other digits there are another shape

    def check(i):
        found = om.read(path)
        assert set(found) <= set(om.TEXTS) and all(text.isprintable() for text in found.values())
        assert found in seen or sizes <= i < sizes + 9 or not [fault for fault in faults(path) if fault[0] != "note"], i
        seen.append(found)

    with open(path, "r+b", buffering=0) as f:
        for i, byte in enumerate(whole):
            for damaged in (byte ^ 1, byte ^ 255, byte):
                f.seek(i)
                f.write(bytes([damaged]))
                check(i)
        for i in reversed(range(len(whole))):
            f.truncate(i)
            check(i)


def test_files_that_are_no_known_om_say_nothing(tmp_path):
    path = tmp_path / "m.om"
    data = (tmp_path / write_om(path)).read_bytes()
    encrypted = data[:80] + b"\1" + data[81:]
    for content in (b"", b"IMOD", data[:256], encrypted, b"IMOD" + b"\xff" * 4096, data[:256] + b"\1" + bytes(7) + b"\xff" * 24):
        path.write_bytes(content)
        assert om.read(str(path)) == {}
    write_om(path, atc_cmdline="", soc_version="Ascend\n310")  # ge's tests have OMs without a command line
    facts = om.read(str(path))
    assert set(facts) == {"atc_version", "opp_version"} and om.has_aipp(facts) is om.input_shape(facts) is None


@pytest.mark.parametrize("line, shape, aipp", [
    ("atc --input-shape x:0:1,3,224,224 -insert-op-conf=a.cfg", [1, 3, 224, 224], True),
    ("atc --input_shape=x:-1,3,224,224 --dynamic_batch_size=1,2 --insert_op_conf=", [None, 3, 224, 224], None),
    ("atc --input_shape=\"x:1~8,3,-1,224\" --output=m", [None, 3, None, 224], False),
    ("atc --input_shape=x:1,224,224,3", None, False),       # the network itself takes uint8
    ("atc --input_shape=x:1,3,8,8;y:1,3,8,8", None, False),
    ("atc --input_shape_range=x:1,3,8,8 --insert_op=a", None, True),
    ("atc --model=deepmar_bs1_aipp.onnx", None, None), ("", None, None), ("python3 build.py", None, None)])
def test_atcs_command_line_is_read(line, shape, aipp):
    assert (om.input_shape({"atc_cmdline": line}), om.has_aipp({"atc_cmdline": line})) == (shape, aipp)


@pytest.mark.parametrize("made, installed, newer", [
    ("8.5.0", "8.1.RC1", True), ("8.5.0", "8.5.0", False), ("8.0.0", "8.0.RC3", True), ("8.2.RC1.alpha002", "8.2.RC1", False),
    ("CANN 9.0.0-beta.1", "8.5.2", True), ("[7.6.0.1.220:8.0.0]", "8.0.RC1", True), ("7.0.RC1", "8.0.0", False),
    ("6.4.T5.0.B121", "6.3.RC2", False), ("7.1.0.3.220", "7.0.RC1", False),  # a CANN's packages have other numbers
    ("9.0.T1.0.B100", "8.5.0", True), ("7.7.0.1.238", "8.0.0 7.6.0.1.220", True), ("7.6.0.1.220", "8.0.0 7.6.0.1.220", False),
    ("8.0.0", "7.6.0.1.220", False), ("8.5.0", "unknown", False), ("", "8.5.0", False), ("new", "8.5.0", False)])
def test_versions_in_several_forms_are_compared(made, installed, newer):
    assert om.newer(made, installed.split()) == newer


@pytest.mark.parametrize("soc_version, card, other", [
    ("Ascend910B3", "310P3", True), ("Ascend310", "310P3", True), ("Ascend310B4", "310P3", True), ("Ascend910", "310", True),
    ("Ascend910A", "910B3", True), ("Ascend910_9362", "910B4-1", True),
    ("Ascend310P1", "310P3", False), ("Ascend910B2C", "910B4-1", False), ("Ascend910ProB", "910A", False),
    ("Ascend910_9362", "910", False), ("Ascend910", "910B3", False), ("Ascend910B", "910B3", False),  # names of several families
    ("Ascend310Q1", "310P3", False), ("Ascend950PR", "310P3", False), ("310", "Odd", False)])
def test_chips_are_refused_where_their_families_surely_differ(tmp_path, soc_version, card, other):
    found = faults(write_om(tmp_path / "m.om", soc_version=soc_version), chips=(card,))
    assert [fault[0] for fault in found] == ["missing"] * other
    if other:
        assert "the OM is for %s, but npu-smi info names Ascend%s" % (soc_version, card) in found[0][1]
        assert found[0][2].endswith("--stage 3 --stop-stage 3 --batch-size 4 --size 64 32 --aipp yes --chip-name " + card)


def test_other_input_is_refused_and_the_command_that_mends_it_named(tmp_path):
    aipp, (plain, dynamic, nhwc) = write_om(tmp_path / "aipp.om"), (
        write_om(tmp_path / (shape + ".om"), atc_cmdline="atc --input_shape=actual_input_1:" + shape)
        for shape in ("4,3,64,32", "-1,3,64,32", "4,64,32,3"))
    for path, changes, found, command in (
            (aipp, {"uint8": False}, "has AIPP (--insert_op_conf) and takes uint8 bins", "--stage 4 --aipp yes"),
            (plain, {"uint8": True}, "has no AIPP (no --insert_op_conf) and takes float32 bins", "--stage 4 --aipp no"),
            (plain, {"uint8": False, "batch_size": 8}, "takes batches of 4, not 8", "--stop-stage 3 --batch-size 8 --size 64 32"),
            (dynamic, {"uint8": False, "size": (224, 224)}, "height and width 64 32, not 224 224", "--stage 4 --size 64 32")):
        (state, text, run), = faults(path, **changes)
        assert state == "missing" and found in text and run.endswith(command)
    for path, changes in (
            (aipp, {"uint8": None}), (aipp, {"size": (72, 40)}), (aipp, {"chips": ()}), (aipp, {"chips": ("310P3", "910B3")}), (nhwc, {}),
            (plain, {"uint8": None}), (plain, {"uint8": False}), (dynamic, {"uint8": False, "batch_size": 8})):
        assert faults(path, **changes) == [], (path, changes)
    (state, text, run), = faults(write_om(tmp_path / "new.om", atc_version="", opp_version="8.5.0"))
    assert state == "note" and "made by version 8.5.0, newer than " in text


def test_kinds_of_bins_are_told_by_their_content(tmp_path):
    pixels = np.random.RandomState(0).randint(0, 256, (64, 32, 3)).astype(np.uint8)
    floats = ((pixels.transpose(2, 0, 1) / 255 - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))).astype(np.float32)
    path = tmp_path / "a.bin"
    for array, kind in ((pixels, "uint8"), (floats, "float32"), (pixels[:32], "nv12-601"), (np.stack([pixels] * 4), None),
                        (np.zeros((4, 64, 32, 3), np.uint8), None), (np.zeros(8 * 64 * 32 * 3 // 2, np.uint8), None),  # eight in NV12
                        (floats * 2, None), (pixels[:16], None)):
        array.tofile(str(path))
        assert holds(str(path), 64, 32) == kind


def test_describe_prints_what_an_om_says(tmp_path):
    path = write_om(tmp_path / "m.om")
    process = script("tools/describe.py", path)
    assert json.loads(process.stdout) == {"om": dict(TEXTS, input_shape=[4, 3, 64, 32], aipp=True)} and "no description" in process.stderr
    (tmp_path / "m.json").write_text('{"attributes": ["hat"]}')
    process = script("tools/describe.py", path)
    assert json.loads(process.stdout)["attributes"] == ["hat"] and "om" in json.loads(process.stdout) and not process.stderr
    (tmp_path / "m.om").write_bytes(b"<html>")
    process = script("tools/describe.py", path)
    assert json.loads(process.stdout)["om"] == {} and "says nothing of itself" in process.stderr
    check_error(script("tools/describe.py", tmp_path / "none.om"), "none.om")
