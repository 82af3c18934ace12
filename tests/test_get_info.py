"""Stage 5: the info file's lines, their order, and what it refuses."""
import os

import pytest

from helpers import check_error, script


@pytest.fixture
def bins(tmp_path):
    (tmp_path / "input_bin").mkdir()
    for name in ("10", "2", "00001", "1", "b10", "b9", "a"):
        with open(str(tmp_path / "input_bin" / (name + ".bin")), "wb") as f:
            f.truncate(602112)
    return tmp_path


def test_the_info_file_lists_the_bins_in_natural_order(bins):
    for arguments in (["./input_bin"], ["bin", "./input_bin"]):
        process = script("get_info.py", *(arguments + ["deepmar.info", "224", "224"]), cwd=bins)
        assert process.returncode == 0 and process.stderr == "", process.stderr
        expected = ["00001", "1", "2", "10", "a", "b9", "b10"]
        assert (bins / "deepmar.info").read_text() == "".join(
            "%d ./input_bin/%s.bin 224 224\n" % (i, name) for i, name in enumerate(expected))
    assert sorted(os.listdir(str(bins))) == ["deepmar.info", "input_bin"]


def test_other_files_are_not_listed(bins):
    (bins / "input_bin" / "notes.txt").write_text("x")
    (bins / "input_bin" / "folder.bin").mkdir()
    assert script("get_info.py", "input_bin/", "deepmar.info", 224, 224, cwd=bins).returncode == 0
    lines = (bins / "deepmar.info").read_text().splitlines()
    assert len(lines) == 7 and lines[0] == "0 input_bin/00001.bin 224 224"


@pytest.mark.parametrize("wrong", [[], ["input_bin"], ["jpg", "input_bin", "i", "224", "224"],
                                   ["input_bin", "i", "224", "0"], ["input_bin", "i", "x", "224"],
                                   ["input_bin", "i", "224", "-224"]])
def test_wrong_arguments_are_usage_errors(bins, wrong):
    check_error(script("get_info.py", *wrong, cwd=bins), code=2)


def test_wrong_bins_are_named_and_an_earlier_file_stays(bins):
    (bins / "deepmar.info").write_text("earlier")
    (bins / "input_bin" / "2.bin").write_bytes(b"short")
    check_error(script("get_info.py", "input_bin", "deepmar.info", 224, 224, cwd=bins), "1 of 7", "2.bin", "602112")
    check_error(script("get_info.py", "nowhere", "deepmar.info", 224, 224, cwd=bins), "nowhere")
    (bins / "empty").mkdir()
    check_error(script("get_info.py", "empty", "deepmar.info", 224, 224, cwd=bins), "no .bin")
    check_error(script("get_info.py", "input_bin", "nowhere/deepmar.info", 224, 224, cwd=bins))
    assert (bins / "deepmar.info").read_text() == "earlier"


def test_names_with_spaces_are_noted(bins):
    os.rename(str(bins / "input_bin" / "a.bin"), str(bins / "input_bin" / "a b.bin"))
    process = script("get_info.py", "input_bin", "deepmar.info", 224, 224, cwd=bins)
    assert process.returncode == 0 and "a b.bin" in process.stderr


def test_names_that_are_not_utf8_are_refused(bins):
    with open(os.fsencode(str(bins)) + b"/input_bin/\xff.bin", "wb") as f:
        f.truncate(602112)
    check_error(script("get_info.py", "input_bin", "deepmar.info", 224, 224, cwd=bins), "udcff.bin: ", "not valid UTF-8")
    assert os.listdir(str(bins)) == ["input_bin"]
