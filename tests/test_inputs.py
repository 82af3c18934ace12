"""tools/run/inputs.py: what the work folder's files were made from is known by content, and the lists are checked before any work."""
import errno
import json
import os
import shutil
import subprocess
import sys

import pytest

from helpers import ROOT, check_error, refused, script, write_images

TOOL = "tools/run/inputs.py"
VARIABLES = {"image_list": "image.txt", "images": "images", "size": "224 224"}


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
    for arguments in (["made", 4, "input_bin", "image_list", "images", "size"], ["made", 5, "deepmar.info", "input_bin"]):
        assert inputs(folder, *arguments).returncode == 0
    return folder


def inputs(folder, *arguments, **changes):
    """Runs the script with a run's variables."""
    return script(TOOL, *arguments, "--", *("%s=%s" % item for item in dict(VARIABLES, **changes).items()), cwd=folder)


def verify(folder, **changes):
    return inputs(folder, "verify", "deepmar.info=5", **changes)


def test_the_same_inputs(work):
    assert verify(work).returncode == 0
    (work / "images" / "not_listed.png").write_text("x")  # is none of the list
    os.utime(str(work / "images" / "im1.png"), (1, 1))  # another time, the same content
    assert verify(work).returncode == 0


def test_a_copied_work_folder_goes_on(work, tmp_path):
    shutil.copytree(str(work), str(tmp_path / "copy"))
    shutil.rmtree(str(work))
    process = verify(tmp_path / "copy")
    assert process.returncode == 0, process.stderr
    # Images that are not on this machine cannot be checked; what was made from them can.
    shutil.rmtree(str(tmp_path / "copy" / "images"))
    assert verify(tmp_path / "copy").returncode == 0
    (tmp_path / "copy" / "input_bin" / "im1.bin").write_text("im0.png")
    check_error(verify(tmp_path / "copy"), "input_bin is not what stage 4 made here; 1 changed: im1.bin; run stage 4 again")


def test_other_images_under_the_same_names(work):
    image, other = work / "images" / "im1.png", work / "images" / "im2.png"
    before = os.stat(str(image))
    shutil.copy(str(other), str(image))
    check_error(verify(work), "input_bin was made from other images", "1 changed: im1.png; run stage 4 again")
    os.utime(str(image), ns=(before.st_atime_ns, before.st_mtime_ns))  # as cp -p and rsync -t leave it
    check_error(verify(work), "1 changed: im1.png")


@pytest.mark.parametrize("change, text", [
    (lambda work: (work / "image.txt").write_text("im0.png\nim1.png\n"), "input_bin was made from another image.txt; run"),
    (lambda work: (work / "input_bin" / "new.bin").write_text("x"), "is not what stage 4 made here; 1 new: new.bin"),
    (lambda work: (work / "input_bin" / "im0.bin").unlink(), "is not what stage 4 made here; 1 gone: im0.bin"),
    (lambda work: (work / "deepmar.info").unlink(), "deepmar.info is missing; run stage 5 first"),
    (lambda work: (work / "deepmar.info").write_text("x"), "deepmar.info is not what stage 5 made here; run stage 5 again"),
])
def test_what_has_changed_is_named(work, change, text):
    change(work)
    check_error(verify(work), text)


def test_other_settings_are_named_with_the_option(work):
    check_error(verify(work, size="256 128"), "was made with size 224 224, not 256 128; run stage 4 again, or give --size 224 224")


def test_a_file_of_the_users_own_is_accepted(work):
    (work / "deepmar_bs1.om").write_text("converted elsewhere")
    assert inputs(work, "verify", "deepmar_bs1.om=3").returncode == 0


def test_a_product_that_is_being_replaced_is_refused(work):
    assert inputs(work, "made", 4, "input_bin").returncode == 0
    check_error(verify(work), "input_bin: stage 4 did not finish; run stage 4 again")


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
    (0, "", False, "work/sample/attributes.txt"), (7, "", True, "work/sample/attributes.txt"), (7, "", False, "")])
def test_own_names_of_attributes_win_over_the_samples(tmp_path, stage, attributes, file, expected):
    (tmp_path / "work" / "sample").mkdir(parents=True)
    if file:
        (tmp_path / "work" / "sample" / "attributes.txt").write_text("")
    code = ("here=%s sample=yes work_dir=work stage=%s stop_stage=8 attributes=%s; size='224 224' aipp=no; "
            "source $here/tools/run/driver.sh; cd work; check_data; echo $attributes" % (ROOT, stage, attributes))
    output = subprocess.check_output(["bash", "-c", code], cwd=str(tmp_path), universal_newlines=True)
    assert output.strip() == expected


def test_one_line_names_the_limit_of_threads(work):
    for name in ("im0.png", "im1.png"):
        os.utime(str(work / "images" / name), (1, 1))  # so that both are read again
    process = subprocess.run([sys.executable, os.path.join(ROOT, TOOL), "verify", "input_bin=4", "--", "image_list=image.txt",
                              "images=images", "size=224 224"], cwd=str(work), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             universal_newlines=True, preexec_fn=refused(errno.EAGAIN, "clone", "clone3"))
    check_error(process, "ulimit -u")


def test_facts_are_remembered(work):
    assert inputs(work, "made", 6, "result", "deepmar.info", "model=m.onnx", "backend=ONNX Runtime").returncode == 1  # there is no result
    assert inputs(work, "made", 5, "deepmar.info", "input_bin", "model=m.onnx", "backend=ONNX Runtime").returncode == 0
    assert inputs(work, "get", "deepmar.info", "model", "size", "backend").stdout == "m.onnx unknown ONNX Runtime\n"
    assert inputs(work, "get", "image.txt", "model").stdout == "unknown\n"
