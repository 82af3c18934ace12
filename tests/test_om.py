"""What an OM says of itself, read from OMs that the tests write, and the refusals of those that do not fit a run."""
import json

import numpy as np
import pytest

import doctor
import om as standin
from helpers import check_error, script
from lib import om
from lib.bins import holds_uint8

TEXTS = {"soc_version": "Ascend310P3", "atc_version": "7.5.0.1.129", "opp_version": "7.5.0.1.130",
         "atc_cmdline": "atc --model=m.onnx --framework=5 --input_shape=actual_input_1:4,3,64,32 --insert_op_conf=aipp.cfg"}


def write_om(path, old=False, **changes):
    texts = dict(TEXTS, **changes)
    path.write_bytes(standin.content([(1, b"weights"), (0, standin.model_def(texts)), (2, b"tasks")], old))
    return str(path)


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """A function that returns om_rows() of an OM of batch size 4 for a run on such chips, at device 0 of them."""
    monkeypatch.setattr(doctor, "Cann", lambda: type("Cann", (), {"version": "8.0.RC3", "home": None, "__str__": lambda _: "CANN 8.0.RC3"})())

    def of(path, bins="yes", size=(64, 32), batch_size="4", chips=("310P3",)):
        monkeypatch.setattr(doctor, "npu_smi", lambda: ("25.2.0", [("0", chip, "OK", str(i)) for i, chip in enumerate(chips)]))
        return doctor.om_rows(path, batch_size, *size, bins, ["0"])
    return of


@pytest.mark.parametrize("old", [False, True])
def test_oms_damaged_at_every_byte_are_neither_misread_nor_refused(tmp_path, rows, old):
    path = write_om(tmp_path / "m.om", old)
    assert om.read(path) == TEXTS and om.has_aipp(TEXTS) and om.input_shape(TEXTS) == [4, 3, 64, 32] and rows(path) == []
    whole = (tmp_path / "m.om").read_bytes()
    sizes, seen = whole.index(b"4,3,64,32"), [{}, TEXTS]  # other digits there are another shape
    for i in range(len(whole)):
        for damaged in (whole[:i], whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1:], whole[:i] + bytes([whole[i] ^ 255]) + whole[i + 1:]):
            (tmp_path / "m.om").write_bytes(damaged)
            found = om.read(path)
            assert set(found) <= set(om.TEXTS) and all(text.isprintable() for text in found.values())
            assert found in seen or sizes <= i < sizes + 9 or not [row for row in rows(path) if row[0] != "note"], i
            seen.append(found)


def test_files_that_are_no_known_om_say_nothing(tmp_path):
    path = tmp_path / "m.om"
    data = (tmp_path / write_om(path)).read_bytes()
    encrypted = data[:80] + b"\1" + data[81:]
    for content in (b"", b"IMOD", data[:256], encrypted, b"IMOD" + b"\xff" * 4096, data[:256] + b"\1" + bytes(7) + b"\xff" * 24):
        path.write_bytes(content)
        assert om.read(str(path)) == {}
    write_om(path, atc_cmdline="", soc_version="")  # as the OMs of ge's tests
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
def test_chips_are_refused_where_their_families_surely_differ(tmp_path, rows, soc_version, card, other):
    found = rows(write_om(tmp_path / "m.om", soc_version=soc_version), chips=(card,))
    assert [row[0] for row in found] == ["missing"] * other
    if other:
        assert "the OM is for %s, but npu-smi info names Ascend%s" % (soc_version, card) in found[0][1]
        assert found[0][2].endswith("--stage 3 --stop-stage 3 --batch-size 4 --chip-name " + card)


def test_only_the_chips_of_the_runs_devices_count(tmp_path, rows):
    path = write_om(tmp_path / "m.om")
    assert rows(path, chips=("310P3", "910B3")) == [] != rows(path, chips=("910B3", "310P3")) and rows(path, chips=()) == []


def write_bins(folder, array):
    folder.mkdir()
    array.tofile(str(folder / "a.bin"))
    return str(folder)


def test_other_input_is_refused_and_the_command_that_mends_it_named(tmp_path, rows):
    line = TEXTS["atc_cmdline"]
    aipp = write_om(tmp_path / "aipp.om")
    plain, dynamic, nhwc = (write_om(tmp_path / ("%d.om" % i), atc_cmdline=line.split(" --ins")[0].replace("4,3,64,32", shape))
                            for i, shape in enumerate(("4,3,64,32", "-1,3,64,32", "4,64,32,3")))
    random = np.random.RandomState(0)
    pixels = random.randint(0, 256, (64, 32, 3)).astype(np.uint8)
    floats = write_bins(tmp_path / "float32", ((pixels.transpose(2, 0, 1) / np.float32(255) - np.float32(0.485)) / np.float32(0.229)))
    images = write_bins(tmp_path / "uint8", pixels)
    four = write_bins(tmp_path / "four", np.stack([pixels] * 4))  # as many bytes as a float32 bin
    black, nv12 = write_bins(tmp_path / "black", np.zeros((4, 64, 32, 3), np.uint8)), write_bins(tmp_path / "nv12", np.zeros(64 * 48, np.uint8))
    for path, bins, text, command in ((aipp, "no", "has AIPP", "--stage 4 --aipp yes"), (aipp, floats, "has AIPP", "--stage 4 --aipp yes"),
                                      (plain, "yes", "has no AIPP", "--stage 4 --aipp no"), (plain, images, "has no AIPP", "--stage 4 --aipp no")):
        (state, found, run), = rows(path, bins)
        assert state == "missing" and text in found and run.endswith(command)
    for path, fitting in ((aipp, ("yes", images, four, black, nv12, "none")), (plain, ("no", floats, four, black, nv12, "none")),
                          (nhwc, ("yes", images))):
        assert all(rows(path, bins) == [] for bins in fitting)
    assert [holds_uint8(folder + "/a.bin", 64, 32) for folder in (images, floats, four, black, nv12)] == [True, False, None, None, None]
    (_, found, run), = rows(plain, "no", batch_size="8")
    assert found == "the OM takes 4 images at a time, not 8" and run.endswith("--stage 3 --stop-stage 3 --batch-size 8")
    assert rows(dynamic, "no", batch_size="8") == []
    (_, found, run), = rows(dynamic, "no", size=(224, 224))
    assert found == "the OM takes images of height and width 64 32, not 224 224" and run.endswith("--stage 4 --size 64 32")
    assert rows(aipp, size=(72, 40)) == []  # AIPP can crop
    (state, found, _), = rows(write_om(tmp_path / "new.om", atc_version="", opp_version="8.5.0"))
    assert state == "note" and found == "the OM was made by version 8.5.0, newer than CANN 8.0.RC3, and may not load"


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
