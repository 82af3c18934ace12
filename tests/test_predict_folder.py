"""tools/predict.py over folders, into JSON and CSV: the logits to the bit, and what cannot be read counted and named."""
import csv
import json
import os

import numpy as np
import pytest

from helpers import check_error, parse_predictions, script, write_images, write_model

TOOL = "tools/predict.py"
NAMES = ["hat", "bag, red", "coat"]


@pytest.fixture
def folder(tmp_path):
    """crops/ with six images in two levels, two that are damaged, and files that are no images; m.onnx of batch size 4."""
    crops = tmp_path / "crops"
    write_images(crops, 4)
    (crops / "im3.png").rename(crops / "IM3.PNG")
    write_images(crops / "b", 2)
    (crops / "a").mkdir()
    (crops / "a" / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    (crops / "b" / "empty.png").write_bytes(b"")
    (crops / "b" / "label.json").write_text("{}")
    (crops / ".im0.png").write_bytes(b"of some editor")
    write_model(tmp_path / "m.onnx", 4, attributes=3)
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    return tmp_path


def predict(folder, *options):
    return script(TOOL, *(("--onnx", "m.onnx", "--attributes", "names.txt") + options), cwd=folder)


READ = ["crops/" + name for name in ("IM3.PNG", "im0.png", "im1.png", "im2.png", "b/im0.png", "b/im1.png")]
BAD = ["crops/a/cut.jpg", "crops/b/empty.png"]


def test_folder(folder):
    """The same as with each file by its name, in the files and on the screen."""
    one_by_one = parse_predictions(predict(folder, *READ).stdout)
    done = predict(folder, "crops", "--json", "out.json", "--csv", "out.csv")
    check_error(done, "2 of 8 images cannot be read: ", "crops/a/cut.jpg (", "crops/b/empty.png (")
    assert "note: crops: 2 files are left out, because their names do not end" in done.stderr
    assert done.stdout == "".join("out.%s: 6 images, 2 could not be read\n" % kind for kind in ("json", "csv"))
    content = json.loads((folder / "out.json").read_text())
    assert content["attributes"] == NAMES and content["thresholds"] == [0, 0, 0] and content["names_assumed"] is False
    assert [row["image"] for row in content["images"]] == READ and [row["image"] for row in content["errors"]] == BAD
    assert all(row["error"] for row in content["errors"])
    for row in content["images"]:
        said = {name: (has, logit) for has, _, name, logit in one_by_one[row["image"]]}
        assert {name: np.float32(logit) for name, logit in zip(NAMES, row["logits"])} == {
            name: logit for name, (_, logit) in said.items()}
        assert row["has"] == [name for name in NAMES if said[name][0]]
    with open(str(folder / "out.csv"), encoding="utf-8", newline="") as f:
        rows = list(csv.reader(f))
    assert rows[0] == ["image", "error"] + NAMES
    assert [row[0] for row in rows[1:]] == READ[:4] + BAD + READ[4:]  # in order of their names
    by_name = {row["image"]: row["logits"] for row in content["images"]}
    for row in rows[1:]:
        assert (row[1] != "") == (row[0] in BAD) and [float(text) for text in row[2:]] == by_name.get(row[0], [])
    on_screen = predict(folder, "crops", "crops/im1.png")  # once, though it is named twice
    check_error(on_screen, "2 of 8 images cannot be read")
    assert parse_predictions(on_screen.stdout) == one_by_one


def test_names_that_are_no_text(folder):
    for path in BAD:
        (folder / path).unlink()
    try:
        os.rename(bytes(folder / "crops" / "im0.png"), bytes(folder / "crops") + b"/\xff,\n.png")
    except OSError:
        pytest.skip("this file system takes no such names")
    done = predict(folder, "crops", "--json", "out.json", "--csv", "out.csv")
    assert done.returncode == 0, done.stderr
    names = [row["image"] for row in json.loads((folder / "out.json").read_text())["images"]]
    assert "crops/\udcff,\n.png" in names
    with open(str(folder / "out.csv"), encoding="utf-8", newline="") as f:
        assert [row[0] for row in csv.reader(f)][1:] == [name.replace("\udcff", "\\udcff") for name in names]


def test_nothing_can_be_read(folder):
    check_error(predict(folder, "crops/a", "--json", "out.json", "--csv", "out.csv"), "1 of 1 images cannot be read")
    content = json.loads((folder / "out.json").read_text())
    assert content["images"] == [] and len(content["errors"]) == 1
    assert (folder / "out.csv").read_text().startswith('image,error,hat,"bag, red",coat\ncrops/a/cut.jpg,')


def test_errors_before_work(folder):
    (folder / "crops" / "a" / "cut.jpg").unlink()
    check_error(predict(folder, "crops/a"), "crops/a: holds no image file (.bmp ")
    check_error(predict(folder, "crops", "nowhere"), "no such image file or folder: nowhere")
    check_error(predict(folder, "crops", "--json", "nowhere/out.json"), "nowhere/out.json: cannot be written: its folder does not exist")
    check_error(predict(folder, "crops", "--csv", "out.csv", "--save", "pictures"),
                "crops/im0.png and crops/b/im0.png would both be drawn as im0_attributes.png")
    (folder / "names.txt").write_text("hat\n")
    check_error(predict(folder, "crops", "--json", "out.json"), "names.txt: holds 1 names, but there are 3")
    assert not [name for name in os.listdir(str(folder)) if name.startswith("out")] and not (folder / "pictures").exists()
