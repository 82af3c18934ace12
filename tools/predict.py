"""Shows what the model says about images or folders of images: on the screen, as pictures, or in a file.

    python3 tools/predict.py person.png --model deepmar_bs1_nopad.onnx
    python3 tools/predict.py *.jpg --model deepmar_bs1_nopad.onnx --save pictures
    python3 tools/predict.py crops --model deepmar_bs1_nopad.onnx --json crops.json --csv crops.csv
    python3 tools/predict.py person.png --model deepmar_bs1.om --device 0
    python3 tools/predict.py --stdin --model deepmar_bs1.om

The script prints every attribute, the likeliest first: its probability, its logit, and a + if the image has it (the logit is
>= 0). The logits are exactly those that stages 4 to 6 would write for the image, with one exception: a photograph with an EXIF
orientation is turned upright here. --save DIR writes DIR/NAME_attributes.png for each image: the picture with a bar for each
attribute next to it. From a folder and its subfolders, the script takes all files whose names end like those of images. --json
and --csv write the logits of all images into a file instead of printing them; the JSON file also lists what each image has.
Images that cannot be read are named at the end and in these files.

An OM runs on the card with ais_bench's aclruntime; besides that, numpy and Pillow are enough.

With --stdin, the script loads the model once and then answers each line that it reads, the path of an image, with one line of JSON
at once: {"image": PATH, "has": [NAME, ...], "logits": {NAME: LOGIT, ...}}, or {"image": PATH, "error": WHY} if the image cannot be
read. It ends with its input.

The attributes' names come from --attributes, else from the model's metadata, else they are PETA's if there are 35. With
--thresholds, the thresholds of tools/thresholds.py replace 0.
"""
import argparse
import contextlib
import csv
import io
import json
import os
import subprocess
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from lib.files import whole_file, write_text
from lib.images import preprocess, read_image
from lib.labels import ASSUMED, PETA, attribute_names, read_thresholds
from lib.names import check_length, images_in, stem
from lib.results import as_logits, kind_of, probabilities
from lib.script import command, importing, note, number, one_line, progress, some
from lib.session import (SIZE_ASSUMED, attributes_of, described_by, empty_batch, fixed_size, infer, input_kind, input_size, open_session,
                         run_batches)

with importing():
    import numpy as np

# Sizes in the picture that --save draws, in pixels, and its colours.
MARGIN, ROW, BAR, TEXT = 16, 19, 150, 14
WIDTH = 480  # the largest width of the image
WHITE, BLACK, GREY, PALE, BLUE = "white", "#202020", "#707070", "#d8d8d8", "#2f6fb5"


def image_paths(paths):
    """Returns the paths, with each folder replaced by its images, and each path only once. Raises OSError or ValueError."""
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        raise FileNotFoundError("no such image file or folder: %s" % some(missing))
    found = []
    for path in paths:
        found += [os.path.join(parent, name) for parent, name in images_in(path)] if os.path.isdir(path) else [path]
    return list(dict.fromkeys(found))


def predict(session, paths, source, advance):
    """Runs the model over image files as stages 4 to 6 do, except that images with an EXIF orientation are turned upright.

    Returns {path: logits float32 [attributes]}, for images that cannot be read {path: why}, and what the model gives, "logits" or
    "probabilities". source: the model's path. Calls advance(images) after every batch. Raises ValueError for NaN or infinite logits.
    """
    def fill(path, row):
        try:
            preprocess(path, out=row, upright=True, kind=given)
        except Exception as error:  # Pillow raises nearly anything on damaged files
            return one_line(error)

    given, predictions, bad = input_kind(session), {}, {}
    for batch, reasons, outputs in run_batches(session, paths, fill):
        for path, reason, row in zip(batch, reasons, outputs):
            if reason is None:
                predictions[path] = row
            else:
                bad[path] = reason
        advance(len(batch))
    wrong = [path for path, row in predictions.items() if not np.isfinite(row).all()]
    if wrong:
        raise ValueError("%s: gives NaN or infinite logits for %s" % (source, some(wrong)))
    kind = kind_of(source)
    if predictions:
        logits, kind = as_logits(np.stack(list(predictions.values())), source, kind)
        predictions = dict(zip(predictions, logits))
    return predictions, bad, kind


def describe(path, logits, names, thresholds):
    """Yields the lines to print for an image. logits, thresholds: float32 [attributes]. Nine digits give a logit exactly."""
    width = max(len(name) for name in names)
    chances, has = probabilities(logits), logits >= thresholds
    yield "%s: %d of %d attributes" % (path, has.sum(), len(names))
    for i in np.argsort(-logits, kind="stable"):
        yield "  %s %6.2f %%  %-*s  logit %.9g" % ("+" if has[i] else " ", 100 * chances[i], width, names[i],
                                                  logits[i])


def open_font(text, path=None):
    """Returns the font of a file, else DejaVu Sans, else, if that lacks letters, what fontconfig proposes for the text, else Pillow's
    own. Raises ValueError if path is not a font file."""
    from PIL import ImageFont
    if path is not None:
        try:
            return ImageFont.truetype(path, TEXT)
        except (OSError, ImportError) as error:
            raise ValueError("%s: is not a font that Pillow can read: %s" % (path, error))
    font = None
    with contextlib.suppress(OSError, ImportError):
        font = ImageFont.truetype("DejaVuSans.ttf", TEXT)
    if font is None or lacking(font, text):
        pattern = "sans-serif:scalable=true:charset=" + " ".join("%x" % ord(letter) for letter in sorted(set(text)))
        with contextlib.suppress(OSError, ImportError, ValueError, subprocess.CalledProcessError):
            found = subprocess.check_output(["fc-match", "--format=%{index} %{file}", pattern], stderr=subprocess.DEVNULL)
            index, file = found.decode("utf-8").split(" ", 1)
            font = ImageFont.truetype(file, TEXT, index=int(index))
    return font or ImageFont.load_default()


def lacking(font, text):
    """Returns the letters of a text that a font lacks: for all of them it draws the same box."""
    letters = sorted(letter for letter in set(text) if not letter.isspace())
    if not hasattr(font, "getmetrics"):  # Pillow's own before 10.1: bitmaps of latin-1's letters
        return [letter for letter in letters if ord(letter) > 255]
    box = bytes(font.getmask("\U0010ffff"))  # no font has this letter
    return [letter for letter in letters if bytes(font.getmask(letter)) == box]


def draw(path, logits, names, font, thresholds=0):
    """Returns an RGB picture of an image file, with a row for each attribute next to it, the likeliest first."""
    from PIL import Image, ImageDraw
    if hasattr(font, "getmetrics"):
        text_height = sum(font.getmetrics())
    else:  # a bitmap of latin-1's letters
        text_height = font.getmask("Hg").size[1]
        names = [name.encode("latin-1", "replace").decode("latin-1") for name in names]

    def text_width(text):
        return font.getmask(text).size[0]

    order = np.argsort(-logits, kind="stable")
    chances, has = probabilities(logits), logits >= thresholds
    threshold_chances = probabilities(np.full(len(names), thresholds, np.float32))
    names_width = max(text_width(name) for name in names)
    percent_width = text_width("100.0 %")
    height = max(ROW * len(names), 320)
    photo, _ = read_image(path, upright=True)
    scale = min(WIDTH / photo.width, height / photo.height)
    photo = photo.resize((max(1, round(photo.width * scale)), max(1, round(photo.height * scale))), Image.BICUBIC)

    name_x = 2 * MARGIN + photo.width
    bar_x = name_x + names_width + MARGIN
    percent_x = bar_x + BAR + MARGIN // 2
    picture = Image.new("RGB", (percent_x + percent_width + MARGIN, height + 2 * MARGIN), WHITE)
    picture.paste(photo, (MARGIN, MARGIN))
    canvas = ImageDraw.Draw(picture)
    for row, i in enumerate(order):
        y = MARGIN + row * ROW
        colour = BLACK if has[i] else GREY
        text_y = y + (ROW - text_height) // 2
        canvas.text((name_x, text_y), names[i], fill=colour, font=font)
        canvas.rectangle((bar_x, y + 3, bar_x + BAR, y + ROW - 4), outline=PALE)
        length = round(BAR * float(chances[i]))
        if length:
            canvas.rectangle((bar_x, y + 3, bar_x + length, y + ROW - 4), fill=BLUE if has[i] else PALE)
        percent = "%.1f %%" % (100 * chances[i])
        canvas.text((percent_x + percent_width - text_width(percent), text_y), percent, fill=colour, font=font)
        x = bar_x + int(BAR * threshold_chances[i])  # from here on, the image has the attribute
        canvas.line((x, y, x, y + ROW - 1), fill=GREY)
    return picture


def targets(paths, folder):
    """Returns {image path: path of its picture in folder}. Raises ValueError if two pictures would get the same path, or if a
    picture would overwrite an image."""
    result, seen = {}, {}
    for path in paths:
        name = stem(path)
        check_length(name, path, "_attributes.png.01234567.partial")  # as whole_file() calls it at first
        if name in seen:
            raise ValueError("%s and %s would both be drawn as %s_attributes.png; draw them in two runs with different folders"
                             % (seen[name], path, name))
        seen[name] = path
        result[path] = os.path.join(folder, name + "_attributes.png")
    over = {os.path.realpath(path) for path in paths} & {os.path.realpath(target) for target in result.values()}
    if over:
        raise ValueError("%s: would be overwritten by a picture; give another folder" % some(sorted(over)))
    return result


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("images", metavar="IMAGE", nargs="*", help="an image file, or a folder")
    parser.add_argument("--stdin", action="store_true", help="read the images' paths from the standard input and answer each at once")
    parser.add_argument("--model", "--onnx", required=True, help="the model, .onnx or .om, of any batch size")
    parser.add_argument("--device", type=number(int, 0), default=0, metavar="ID", help="the card's or GPU's number (default: 0)")
    parser.add_argument("--attributes", metavar="FILE",
                        help="a file with the attributes' names, one per line (default: the model's, else PETA's if there are 35)")
    parser.add_argument("--thresholds", metavar="FILE", help="the file of tools/thresholds.py (default: a logit of 0 for all)")
    parser.add_argument("--json", metavar="FILE", help="write the results into this file instead of printing them")
    parser.add_argument("--csv", metavar="FILE", help="the same as a table: one row per image, one column of logits per attribute")
    parser.add_argument("--save", metavar="DIR", help="also draw each image's attributes and write the pictures into this folder")
    parser.add_argument("--font", metavar="FILE",
                        help="with --save: a font (default: DejaVu Sans, or another one if it lacks letters)")
    args = parser.parse_args(argv)
    if args.stdin == bool(args.images) or args.stdin and (args.json, args.csv, args.save) != (None, None, None):
        parser.error("give either images, or --stdin without --json, --csv and --save")
    return args


def digits(logits):
    """Returns logits as numbers with nine digits, which give a float32 exactly."""
    return [float("%.9g" % value) for value in logits]


def having(names, logits, thresholds):
    """Returns the names of the attributes that an image has."""
    return [name for name, has in zip(names, logits >= thresholds) if has]


def as_json(model, kind, names, thresholds, predictions, bad):
    """Returns the results as JSON text. kind: what the model gives. predictions: {image path: logits}. bad: {image path: why it
    cannot be read}."""
    return json.dumps({
        "model": model, "model_output": kind, "attributes": names, "names_assumed": names is PETA, "thresholds": digits(thresholds),
        "images": [{"image": path, "has": having(names, row, thresholds), "logits": digits(row)}
                   for path, row in predictions.items()],
        "errors": [{"image": path, "error": reason} for path, reason in bad.items()]}) + "\n"


def as_csv(paths, names, predictions, bad):
    """Returns the same as CSV text, in the order of the paths. A byte of a name that is not UTF-8 becomes, say, \\udc80."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "error"] + names)
    for path in paths:
        writer.writerow([path, bad.get(path, "")] + digits(predictions.get(path, [])))
    return text.getvalue().encode("utf-8", "backslashreplace").decode("utf-8")


def check_targets(args):
    """Raises OSError or ValueError for files that could not be written, and for a bad font."""
    for path in (args.json, args.csv):
        if path is not None and not os.path.isdir(os.path.dirname(os.path.abspath(path))):
            raise FileNotFoundError("%s: cannot be written: its folder does not exist" % path)
    if args.font is not None:
        open_font("", args.font)


def save_pictures(pictures, predictions, names, thresholds, font_path):
    """Draws the pictures. pictures: {image path: path of its picture}. predictions: {image path: logits}."""
    text = "".join(names) + "0123456789. %"
    font = open_font(text, font_path)
    missing = lacking(font, text)
    if missing:
        note("the font lacks %s: boxes are drawn. Install one that has them (for Chinese: fonts-noto-cjk on Debian and Ubuntu, "
             "google-noto-sans-cjk-fonts on openEuler, CentOS and Fedora), or give --font FILE" % some(missing))
    for path, logits in predictions.items():
        with whole_file(pictures[path]) as temporary:
            draw(path, logits, names, font, thresholds).save(temporary, format="PNG")


def answer(session, source, names, thresholds):
    """Answers each line of the standard input, the path of an image, with a line of JSON, until the input ends. source: the model's path.

    Raises ValueError if the model cannot compute.
    """
    batch, given, kind = empty_batch(session, *input_size(session)), input_kind(session), kind_of(source)
    for line in (sys.stdin or open(os.devnull)).buffer:  # the caller may have closed it
        path = os.fsdecode(line.rstrip(b"\r\n"))
        found = {"image": path}
        try:
            if not os.path.isfile(path):  # opening a FIFO would wait for ever
                raise FileNotFoundError("no such image file")
            preprocess(path, out=batch[0], upright=True, kind=given)
        except Exception as error:  # Pillow raises nearly anything on damaged files
            found["error"] = one_line(error)
        else:
            logits = infer(session, batch)[0]
            if np.isfinite(logits).all():
                logits, judged = as_logits(logits, source, kind)
                kind = kind or (judged if judged == "logits" else None)  # logits may all lie between 0 and 1 by chance
                found.update(has=having(names, logits, thresholds), logits=dict(zip(names, digits(logits))))
            else:
                found["error"] = "the model gives NaN or infinite logits"
        print(json.dumps(found), flush=True)


def main(argv=None):
    args = parse(argv)
    import PIL  # noqa: F401 - import it here, so that a missing package is not reported as a bad image
    paths = image_paths(args.images)
    pictures = {} if args.save is None else targets(paths, args.save)
    check_targets(args)  # before the work
    session = open_session(args.model, args.device)
    if None in fixed_size(session)[1:]:
        note(SIZE_ASSUMED)
    names = attribute_names(attributes_of(session), args.attributes, args.model, described_by(session, args.model))
    names, thresholds, _ = read_thresholds(args.thresholds, names)
    if names is PETA:
        note(ASSUMED)
    if args.stdin:
        answer(session, args.model, names, thresholds)
        return
    with progress(len(paths), "image") as bar:
        predictions, bad, kind = predict(session, paths, args.model, bar.update)
    if pictures and predictions:
        os.makedirs(args.save, exist_ok=True)
        save_pictures(pictures, predictions, names, thresholds, args.font)
        print("%s: %d pictures" % (args.save, len(predictions)))
    if args.json is not None:
        write_text(args.json, as_json(args.model, kind, names, thresholds, predictions, bad))
    if args.csv is not None:
        write_text(args.csv, as_csv(paths, names, predictions, bad))
    files = [path for path in (args.json, args.csv) if path is not None]
    for path in files:
        print("%s: %d images, %d could not be read" % (path, len(predictions), len(bad)))
    if not files:
        for path, logits in predictions.items():
            print("\n".join(describe(path, logits, names, thresholds)))
    if bad:
        raise ValueError("%d of %d images cannot be read: %s"
                         % (len(bad), len(paths), some("%s (%s)" % item for item in bad.items())))


if __name__ == "__main__":
    command(main)
