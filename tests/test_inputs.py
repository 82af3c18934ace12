"""tools/run/inputs.py: what the work folder's files were made from is known by content, and the lists are checked before any work."""
import json
import os
import shutil
import subprocess

import pytest

from helpers import ROOT, check_error, script, write_images

TOOL = "tools/run/inputs.py"
VARIABLES = {"image_list": "image.txt", "images": "images", "size": "224 224", "checkpoint": ""}


def call(folder, command, *arguments, **changes):
    """Calls inputs.py in a work folder, with the run's variables, as tools/run/driver.sh does."""
    variables = ["%s=%s" % item for item in dict(VARIABLES, **changes).items()]
    return script(TOOL, command, *arguments, "--", *variables, cwd=folder)


def verify(folder, *products, **changes):
    return call(folder, "verify", *(products or ["deepmar.info=5"]), **changes)


@pytest.fixture
def work(tmp_path):
    """A work folder after stages 4 and 5, in small."""
    folder = tmp_path / "work"
    folder.mkdir()
    names = write_images(folder / "images", 4)
    (folder / "image.txt").write_text("".join(name + "\n" for name in names))
    (folder / "input_bin").mkdir()
    for name in names:
        (folder / "input_bin" / name.replace(".png", ".bin")).write_text(name)
    (folder / "deepmar.info").write_text("0 ./input_bin/im0.bin 224 224\n")
    for arguments in ([4, "input_bin", "image_list", "images", "size"], [5, "deepmar.info", "input_bin", "by=me and you"]):
        assert call(folder, "made", *arguments).returncode == 0
    return folder


def test_unchanged_inputs_are_accepted(work):
    assert verify(work).returncode == 0
    (work / "images" / "not_listed.png").write_text("x")
    os.utime(str(work / "images" / "im1.png"), (1, 1))  # another time, the same content
    assert verify(work).returncode == 0


def test_copied_work_folder_goes_on(work, tmp_path):
    shutil.copytree(str(work), str(tmp_path / "copy"))
    shutil.rmtree(str(work))
    process = verify(tmp_path / "copy")
    assert process.returncode == 0, process.stderr
    # Images that are not on this machine cannot be checked; what was made from them can.
    shutil.rmtree(str(tmp_path / "copy" / "images"))
    assert verify(tmp_path / "copy").returncode == 0
    (tmp_path / "copy" / "input_bin" / "im1.bin").write_text("im0.png")
    check_error(verify(tmp_path / "copy"), "input_bin is not what stage 4 made here; 1 changed: im1.bin; run stage 4 again")


def test_other_images_under_the_same_names_are_named(work):
    image, other = work / "images" / "im1.png", work / "images" / "im2.png"
    before = os.stat(str(image))
    shutil.copy(str(other), str(image))
    check_error(verify(work), "input_bin was made from other images", "1 changed: im1.png; run stage 4 again")
    os.utime(str(image), ns=(before.st_atime_ns, before.st_mtime_ns))  # as cp -p and rsync -t leave it
    check_error(verify(work), "1 changed: im1.png")


@pytest.mark.parametrize("change, text", [
    (lambda work: (work / "image.txt").write_text("im0.png\nim1.png\n"), "input_bin was made from another image.txt; run stage 4"),
    (lambda work: (work / "input_bin" / "new.bin").write_text("x"), "is not what stage 4 made here; 1 new: new.bin"),
    (lambda work: (work / "input_bin" / "im0.bin").unlink(), "is not what stage 4 made here; 1 gone: im0.bin"),
    (lambda work: (work / "deepmar.info").unlink(), "deepmar.info is missing; run stage 5 first"),
    (lambda work: (work / "deepmar.info").write_text("x"), "deepmar.info is not what stage 5 made here; run stage 5 again"),
])
def test_change_is_named_with_the_stage_to_run_again(work, change, text):
    change(work)
    check_error(verify(work), text)


def test_product_of_a_deleted_product_is_still_verified(work):
    shutil.rmtree(str(work / "input_bin"))
    assert verify(work).returncode == 0
    check_error(verify(work, "deepmar.info=5", "input_bin=4"), "input_bin is missing; run stage 4 first")


def test_other_settings_are_named(work):
    check_error(verify(work, size="256 128"), "was made with size 224 224, not 256 128; run stage 4 again, or give --size '224 224'")


def test_calibration_images_are_known_by_content(work):
    (work / "hundred.txt").write_text("".join("i%d.png\n" % i for i in range(100)))
    for i in range(100):
        (work / "images" / ("i%d.png" % i)).write_text(str(i))
    variables = {"calibration_list": "hundred.txt", "calibration_images": "images", "card_model": ""}
    process = call(work, "spread", "hundred.txt", "calibration_bin.txt")
    chosen = (work / "calibration_bin.txt").read_text().split()
    assert process.returncode == 0 and len(chosen) == 32 == len(set(chosen)) and chosen[::31] == ["i0.png", "i96.png"]
    assert call(work, "made", 3, "calibration_bin.txt", "calibration_list", "calibration_images", "card_model", **variables).returncode == 0
    (work / "images" / "i2.png").write_text("other")  # it is not among the chosen
    assert "i2.png" not in chosen and verify(work, "calibration_bin.txt=3", **variables).returncode == 0
    check_error(verify(work, "calibration_bin.txt=3", **dict(variables, card_model="image.txt")), "was made from another image.txt;")
    (work / "images" / "i96.png").write_text("other")
    check_error(verify(work, "calibration_bin.txt=3", **variables), "was made from other images than those in images now; 1 changed: i96")


def test_users_own_files_are_accepted(work):
    assert verify(work, "image.txt=0").returncode == 0


def test_interrupted_stage_is_named(work):
    assert call(work, "made", 4, "input_bin").returncode == 0  # as at the beginning of a replacement
    check_error(verify(work), "input_bin: stage 4 did not finish; run stage 4 again")


def test_facts_are_remembered(work):
    assert call(work, "get", "deepmar.info", "by").stdout == "me and you\n"
    assert call(work, "get", "image.txt", "by", "with").stdout == "unknown unknown\n"


def test_lists_are_checked_before_any_work(work):
    def check(**files):
        arguments = {"image-list": "image.txt", "images": "images", "label-file": "label.json"}
        arguments.update(files)
        return script(TOOL, "lists", *sum((["--" + name, value] for name, value in arguments.items()), []), cwd=work)

    labels = {"im%d.png" % i: [0, 1, 1] for i in range(4)}
    (work / "label.json").write_text(json.dumps(labels))
    process = check()
    assert (process.returncode, process.stdout) == (0, "3\n"), process.stderr
    (work / "two.txt").write_text("hat\nbag\n")
    check_error(check(attributes="two.txt"), "two.txt: holds 2 names, but there are 3 attributes")
    (work / "longer.txt").write_text("im0.png\nim7.png\n")
    check_error(check(**{"image-list": "longer.txt"}), "1 of the 2 images in longer.txt are not in images: im7.png")
    (work / "label.json").write_text(json.dumps({"im0.png": [1, 0]}))
    check_error(check(), "label.json: has no label for 3 of 4 images: im1.png")
    (work / "label.json").write_text("{")
    check_error(check(), "label.json: is not JSON")


@pytest.mark.parametrize("stage, attributes, file, expected", [
    (0, "own.txt", False, "own.txt"), (0, "own.txt", True, "own.txt"), (7, "own.txt", True, "own.txt"),
    (0, "", False, "sample/attributes.txt"), (7, "", True, "sample/attributes.txt"), (7, "", False, "")])
def test_own_names_of_attributes_win_over_the_samples(tmp_path, stage, attributes, file, expected):
    (tmp_path / "work" / "sample").mkdir(parents=True)
    if file:
        (tmp_path / "work" / "sample" / "attributes.txt").write_text("")
    code = ("here=%s sample=yes work_dir=$PWD stage=%s stop_stage=8 attributes=%s; source $here/tools/run/driver.sh; "
            "check_data; echo ${attributes#$PWD/}" % (ROOT, stage, attributes))
    printed = subprocess.check_output(["bash", "-c", code], cwd=str(tmp_path / "work"), universal_newlines=True)
    assert printed.strip() == expected
