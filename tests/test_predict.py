"""tools/predict.py on tiny models: it prints and writes what the pipeline's files hold, draws pictures, and names bad images."""
import csv
import json
import os

import numpy as np
import pytest
from PIL import Image, ImageFont

from lib.images import ORIENTATION
from lib.labels import ASSUMED, PETA
from lib.results import probabilities
import predict
from helpers import check_error, end_in, parse_predictions, put, run_stage_6, script, write_bins, write_images, write_means, write_model

TOOL = "tools/predict.py"


# --- images, on the screen --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("batch_size, size", [(1, (224, 224)), (8, (256, 128))])
def test_logits_are_the_pipelines(tmp_path, batch_size, size):
    names = write_images(tmp_path / "images", 11)
    model = write_model(tmp_path / "m.onnx", batch_size, size=size)
    write_bins(tmp_path, names, *size)
    result = run_stage_6(tmp_path, model, batch_size, 0, *size)
    paths = ["images/" + name for name in names]
    done = script(TOOL, *paths, "--onnx", model, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "note: %s\n" % ASSUMED, done.stderr
    printed = parse_predictions(done.stdout)
    assert [key for key in printed if not key.endswith(" found")] == paths
    for name, path in zip(names, paths):
        logits = np.fromfile(str(result / (name[:-4] + "_1.bin")), "<f4")
        assert {row[2]: row[3] for row in printed[path]} == dict(zip(PETA, logits))
        assert [row[3] for row in printed[path]] == sorted(logits, reverse=True)
        assert printed[path + " found"] == (logits >= 0).sum()
        for marked, percent, _, logit in printed[path]:
            assert marked == (logit >= 0) and percent == pytest.approx(100 / (1 + np.exp(-float(logit))), abs=0.00501)


def test_photographs_are_turned_upright(tmp_path):
    """A photograph with an EXIF orientation gives the logits and the picture of the same photograph, saved upright."""
    upright = tmp_path / "images" / write_images(tmp_path / "images", 1)[0]
    paths = [upright]
    # What each EXIF orientation tells the viewer to do, undone.
    for orientation, undo in ((2, "FLIP_LEFT_RIGHT"), (3, "ROTATE_180"), (4, "FLIP_TOP_BOTTOM"), (5, "TRANSPOSE"),
                              (6, "ROTATE_90"), (7, "TRANSVERSE"), (8, "ROTATE_270")):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        paths.append(tmp_path / ("%d.png" % orientation))
        with Image.open(str(upright)) as image:
            image.transpose(getattr(Image, undo)).save(str(paths[-1]), exif=exif.tobytes())
    done = script(TOOL, *paths, "--onnx", write_model(tmp_path / "m.onnx", 8))
    assert done.returncode == 0, done.stderr
    printed = parse_predictions(done.stdout)
    assert all(printed[str(path)] == printed[str(upright)] for path in paths)
    font = predict.open_font("ab")
    pictures = [np.asarray(predict.draw(str(path), np.float32([1, -1]), ["a", "b"], font)) for path in (paths[4], upright)]
    assert np.array_equal(*pictures)


def test_probabilities_are_converted_to_logits(tmp_path):
    names = write_images(tmp_path / "images", 3)
    paths = ["images/" + name for name in names]
    plain = script(TOOL, *paths, "--onnx", write_model(tmp_path / "plain.onnx", "N"), cwd=tmp_path)  # of any batch size
    sigmoid = script(TOOL, *paths, "--onnx", end_in(write_model(tmp_path / "m.onnx", 2), "Sigmoid", "Identity"), cwd=tmp_path)
    assert "note: m.onnx: the model ends in a Sigmoid; its probabilities are" in sigmoid.stderr.replace(str(tmp_path) + "/", "")
    expected, converted = parse_predictions(plain.stdout), parse_predictions(sigmoid.stdout)
    for path in paths:
        assert [row[:3] for row in converted[path]] == [row[:3] for row in expected[path]]
        close = [(ours[3], theirs[3]) for ours, theirs in zip(converted[path], expected[path]) if abs(theirs[3]) < 9]
        assert len(close) > 20 and all(a == pytest.approx(b, abs=0.01) for a, b in close)  # float32's steps grow near 1


def test_few_logits_between_0_and_1_stay_logits_and_the_values_decide_for_a_clip(tmp_path):
    names = write_images(tmp_path / "images", 1)

    def logit(path):
        done = script(TOOL, "images/" + names[0], "--onnx", path, "--json", "out.json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        content = json.loads((tmp_path / "out.json").read_text())
        return content["model_output"], content["images"][0]["logits"][0]

    shift = 0.3 - logit(write_model(tmp_path / "m.onnx", attributes=1))[1]
    assert logit(write_model(tmp_path / "m.onnx", attributes=1, bias=shift)) == ("logits", pytest.approx(0.3, abs=1e-4))
    assert logit(end_in(tmp_path / "m.onnx", "Clip")) == ("probabilities", pytest.approx(np.log(0.3 / 0.7), abs=1e-3))
    write_model(tmp_path / "m.onnx", attributes=1, bias=shift - 1)
    assert logit(end_in(tmp_path / "m.onnx", "Clip")) == ("logits", pytest.approx(-0.7, abs=1e-4))


def test_symbolic_height_and_width_are_those_of_the_metadata(tmp_path):
    names = write_images(tmp_path / "images", 2)
    write_means(tmp_path / "fixed.onnx", ["N", 3, 32, 16])
    write_means(tmp_path / "open.onnx", ["N", 3, "H", "W"])

    def run(model):
        done = script(TOOL, *["images/" + name for name in names], "--onnx", model, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return parse_predictions(done.stdout), done.stderr

    expected, _ = run("fixed.onnx")
    found, notes = run("open.onnx")
    assert found != expected and notes == "note: neither the model nor its metadata fix the images' size; 224 x 224 is assumed\n"
    put(tmp_path / "open.onnx", size="[32, 16]")
    assert run("open.onnx") == (expected, "")


def test_probabilities_do_not_overflow():
    logits = np.array([-3e38, -100, -1, 0, 1, 100, 3e38], np.float32)
    with np.errstate(all="raise"):
        chances = probabilities(logits)
    assert chances == pytest.approx([0, 0, 1 / (1 + np.e), 0.5, np.e / (1 + np.e), 1, 1], abs=1e-15)


def test_bad_images_do_not_hide_the_others(tmp_path):
    names = write_images(tmp_path / "images", 3)
    model = write_model(tmp_path / "m.onnx", 2)
    (tmp_path / "images" / "im1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    paths = ["images/" + name for name in names]
    done = script(TOOL, *paths, "--onnx", model, "--save", "a/b", cwd=tmp_path)
    check_error(done, "1 of 3 images cannot be read: images/im1.png")
    assert [key for key in parse_predictions(done.stdout) if not key.endswith(" found")] == [paths[0], paths[2]]
    assert sorted(os.listdir(str(tmp_path / "a" / "b"))) == ["im0_attributes.png", "im2_attributes.png"]


def test_nan_logits_are_an_error(tmp_path):
    write_images(tmp_path / "images", 1)
    model = write_model(tmp_path / "m.onnx", bias=float("nan"))
    check_error(script(TOOL, tmp_path / "images" / "im0.png", "--onnx", model), "m.onnx: gives NaN", "im0.png")


# --- pictures ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("font", ["the system's", "Pillow's"])
def test_picture_shows_the_photograph_names_and_bars(tmp_path, monkeypatch, font):
    if font == "Pillow's":  # no font file is found; Pillow's own comes as an open file
        real = ImageFont.truetype
        monkeypatch.setattr(ImageFont, "truetype", lambda source, *more, **settings: real(
            "absent.ttf" if isinstance(source, str) else source, *more, **settings))
    Image.new("RGB", (30, 80), (0, 200, 0)).save(str(tmp_path / "green.png"))
    logits = np.full(35, -40, np.float32)
    logits[[4, 9, 20]] = [40, 0, -1]
    names = ["attribute %d" % i for i in range(34)] + ["\u5e74\u9f84"]
    picture = predict.draw(str(tmp_path / "green.png"), logits, names, predict.open_font("".join(names) + "0123456789. %"))
    pixels, margin, row = np.asarray(picture), predict.MARGIN, predict.ROW
    assert picture.height == 35 * row + 2 * margin
    photo = (pixels == (0, 200, 0)).all(axis=2)
    assert photo.sum() == 35 * row * round(35 * row * 30 / 80) and photo[margin, margin]
    # The bars in the middle of each row: full; half; 27 % of 150 pixels; nothing. The line at 50 % and the frame are pale, too.
    middles = pixels[margin + row // 2:-margin:row]
    blue, pale = ((middles == colour).all(axis=2).sum(axis=1) for colour in ((0x2f, 0x6f, 0xb5), (0xd8, 0xd8, 0xd8)))
    assert blue.tolist() == pytest.approx([150, 75] + [0] * 33, abs=2)
    assert pale[2:4].tolist() == pytest.approx([41 + 1, 2], abs=2)
    # The names and percentages are there, the rows' text differs, and nothing runs over the right edge.
    x = 2 * margin + int(photo[margin].sum())
    texts = pixels[margin:-margin, x:x + 80].reshape(35, row, 80, 3)
    assert all((text < 128).any() for text in texts[:3]) and (texts[0] != texts[1]).any()
    assert (pixels[:, -margin + 2:] == 255).all()


@pytest.mark.parametrize("size", [(1, 900), (900, 1), (3000, 100)])
def test_pictures_of_odd_sizes(tmp_path, size):
    Image.new("L", size, 10).save(str(tmp_path / "odd.png"))
    picture = predict.draw(str(tmp_path / "odd.png"), np.array([1, -1], np.float32), ["a", "b"], predict.open_font("ab"))
    assert picture.width < 1000 and picture.height < 1000
    assert tuple(np.asarray(picture)[predict.MARGIN, predict.MARGIN]) == (10, 10, 10)


def write_font(path, letters):
    """Writes a font that has these letters, and no other. Each is a triangle."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen
    pen, nothing = TTGlyphPen(None), TTGlyphPen(None).glyph()
    pen.moveTo((0, 0))
    pen.lineTo((300, 800))
    pen.lineTo((900, 0))
    pen.closePath()
    glyphs, builder = {".notdef": nothing, "triangle": pen.glyph()}, FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(list(glyphs))
    builder.setupCharacterMap({ord(letter): "triangle" for letter in letters})
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.save(str(path))


def propose(folder, monkeypatch, font):
    """Puts an fc-match on PATH that proposes this font, and writes what it is asked into folder/asked.txt."""
    tool = folder / "bin" / "fc-match"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho \"$@\" >> '%s'\nprintf '0 %%s' '%s'\n" % (folder / "asked.txt", font))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", "%s:%s" % (tool.parent, os.environ["PATH"]))
    return folder / "asked.txt"


def test_fontconfig_is_asked_once_for_letters_that_dejavu_lacks(tmp_path, monkeypatch):
    write_font(tmp_path / "font.ttf", "\u6234\u5e3dhat")
    asked = propose(tmp_path, monkeypatch, tmp_path / "font.ttf")
    assert predict.open_font("hat").path.endswith("DejaVuSans.ttf") and not asked.exists()
    font = predict.open_font("\u6234\u5e3d hat")
    assert font.path == str(tmp_path / "font.ttf")
    assert asked.read_text().split("charset=")[1] == "20 61 68 74 5e3d 6234\n"
    assert predict.lacking(font, "\u6234\u5e3d hats") == ["s"]


def test_letters_that_the_font_lacks_are_drawn_as_boxes_and_named(tmp_path, monkeypatch):
    propose(tmp_path, monkeypatch, tmp_path / "absent.ttf")
    names = write_images(tmp_path / "images", 1)
    (tmp_path / "names.txt").write_text("\u6234\u5e3d\ntall\n", encoding="utf-8")
    command = [TOOL, "images/" + names[0], "--onnx", write_model(tmp_path / "m.onnx", attributes=2), "--attributes=names.txt",
               "--save=out"]
    picture = tmp_path / "out" / "im0_attributes.png"
    done = script(*command, cwd=tmp_path)
    assert done.returncode == 0 and "note: the font lacks \u5e3d, \u6234: boxes are drawn" in done.stderr, done.stderr
    assert "fonts-noto-cjk" in done.stderr and "google-noto-sans-cjk-fonts" in done.stderr
    boxes = picture.read_bytes()
    write_font(tmp_path / "font.ttf", "\u6234\u5e3dtall0123456789.%")
    done = script(*(command + ["--font=font.ttf"]), cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "" and picture.read_bytes() != boxes, done.stderr
    for file in ("names.txt", "absent.ttf"):
        check_error(script(*(command + ["--font", file]), cwd=tmp_path), file + ": is not a font that Pillow can read")


# --- folders, JSON and CSV --------------------------------------------------------------------------------------------

NAMES = ["hat", "bag, red", "coat"]
GOOD = ["crops/" + name for name in ("IM3.PNG", "im0.png", "im1.png", "im2.png", "b/im0.png", "b/im1.png")]
BAD = ["crops/a/cut.jpg", "crops/b/empty.png"]


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


def run(folder, *options):
    return script(TOOL, "--onnx", "m.onnx", "--attributes", "names.txt", *options, cwd=folder)


def test_folder_gives_the_same_as_its_files_by_name(folder):
    one_by_one = parse_predictions(run(folder, *GOOD).stdout)
    done = run(folder, "crops", "--json", "out.json", "--csv", "out.csv")
    check_error(done, "2 of 8 images cannot be read: ", "crops/a/cut.jpg (", "crops/b/empty.png (")
    assert "note: crops: 2 files are left out, because their names do not end" in done.stderr
    assert done.stdout == "".join("out.%s: 6 images, 2 could not be read\n" % kind for kind in ("json", "csv"))
    content = json.loads((folder / "out.json").read_text())
    assert content["attributes"] == NAMES and content["thresholds"] == [0, 0, 0] and content["names_assumed"] is False
    assert [row["image"] for row in content["images"]] == GOOD and [row["image"] for row in content["errors"]] == BAD
    assert all(row["error"] for row in content["errors"])
    for row in content["images"]:
        printed = {name: (logit, has) for has, _, name, logit in one_by_one[row["image"]]}
        assert {name: (np.float32(logit), name in row["has"]) for name, logit in zip(NAMES, row["logits"])} == printed
    with open(str(folder / "out.csv"), encoding="utf-8", newline="") as f:
        rows = list(csv.reader(f))
    assert rows[0] == ["image", "error"] + NAMES
    assert [row[0] for row in rows[1:]] == GOOD[:4] + BAD + GOOD[4:]  # in order of their names
    by_name = {row["image"]: row["logits"] for row in content["images"]}
    for row in rows[1:]:
        assert (row[1] != "") == (row[0] in BAD) and [float(text) for text in row[2:]] == by_name.get(row[0], [])
    on_screen = run(folder, "crops", "crops/im1.png")  # once, though it is named twice
    check_error(on_screen, "2 of 8 images cannot be read")
    assert parse_predictions(on_screen.stdout) == one_by_one


def test_file_names_that_are_not_utf8(folder):
    for path in BAD:
        (folder / path).unlink()
    os.rename(bytes(folder / "crops" / "im0.png"), bytes(folder / "crops") + b"/\xff,\n.png")
    done = run(folder, "crops", "--json", "out.json", "--csv", "out.csv")
    assert done.returncode == 0, done.stderr
    names = [row["image"] for row in json.loads((folder / "out.json").read_text())["images"]]
    assert "crops/\udcff,\n.png" in names
    with open(str(folder / "out.csv"), encoding="utf-8", newline="") as f:
        assert [row[0] for row in csv.reader(f)][1:] == [name.replace("\udcff", "\\udcff") for name in names]


def test_files_are_written_even_if_no_image_can_be_read(folder):
    done = run(folder, "crops/a", "--json", "out.json", "--csv", "out.csv", "--save", "none")
    check_error(done, "1 of 1 images cannot be read")
    assert not (folder / "none").exists()
    content = json.loads((folder / "out.json").read_text())
    assert content["images"] == [] and len(content["errors"]) == 1
    assert (folder / "out.csv").read_text().startswith('image,error,hat,"bag, red",coat\ncrops/a/cut.jpg,')


def test_errors_before_work(folder):
    (folder / "crops" / "a" / "cut.jpg").unlink()
    check_error(run(folder, "crops/a"), "crops/a: holds no image file (.bmp ")
    check_error(run(folder, "crops", "nowhere"), "no such image file or folder: nowhere")
    check_error(run(folder, "crops", "--json", "nowhere/out.json"), "nowhere/out.json: cannot be written: its folder does not exist")
    done = run(folder, "crops", "--csv", "out.csv", "--save", "pictures")
    check_error(done, "crops/im0.png and crops/b/im0.png would both be drawn as im0_attributes.png")
    os.link(str(folder / "crops" / "im0.png"), str(folder / "crops" / "im0_attributes.png"))
    done = run(folder, "crops/im0.png", "crops/im0_attributes.png", "--save", "crops")
    check_error(done, "im0_attributes.png: would be overwritten by a picture")
    check_error(run(folder, "crops", "--onnx", "absent.onnx", "--json", "out.json"), "absent.onnx: no such file")
    assert not [name for name in os.listdir(str(folder)) if name.startswith("out")] and not (folder / "pictures").exists()
    check_error(script(TOOL, "crops", cwd=folder), "--onnx", code=2)
