"""Shows what the model says about images or folders of images: on the screen, as pictures, or in a file.

    python3 tools/predict.py person.png --onnx deepmar_bs1_nopad.onnx
    python3 tools/predict.py *.jpg --onnx deepmar_bs1_nopad.onnx --save pictures
    python3 tools/predict.py crops --onnx deepmar_bs1_nopad.onnx --json crops.json --csv crops.csv

The script prints every attribute, the likeliest first: its probability, its logit, and a + if the image has it (the logit is
>= 0). The logits are exactly those that stages 4 to 6 would write for the image, with one exception: a photograph with an EXIF
orientation is turned upright here. --save DIR writes DIR/NAME_attributes.png for each image: the picture with a bar for each
attribute beside it. From a folder and its subfolders, the script takes all files whose names end like those of images. --json
and --csv write the logits of all images into a file instead of printing them; the JSON file also lists what each image has.
Images that cannot be read are named at the end and in these files.

The attributes' names come from --attributes, else from the model's metadata, else they are PETA's if there are 35. With
--thresholds, the limits of tools/thresholds.py replace 0.
"""
import argparse
import collections
import contextlib
import csv
import io
import itertools
import json
import os
import subprocess
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from lib.files import whole_file, write_text
from lib.images import preprocess, read_image
from lib.labels import ASSUMED, PETA, attribute_names, read_thresholds
from lib.names import ENDINGS, stem
from lib.results import PROBABILITIES, logits_from, look_like_probabilities, probabilities
from lib.script import command, importing, note, one_line, progress, some
from lib.session import empty_batch, input_size, open_session

with importing():
    import numpy as np

# Sizes in the picture that --save draws, in pixels, and its colours.
MARGIN, ROW, BAR, TEXT = 16, 19, 150, 14
WIDTH = 480  # the largest width of the image
WHITE, BLACK, GREY, PALE, BLUE = "white", "#202020", "#707070", "#d8d8d8", "#2f6fb5"


def find_images(paths):
    """Returns the paths, with each folder replaced by its images in order of their names. Raises OSError or ValueError."""
    def broken(error):
        raise error

    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        raise FileNotFoundError("no such image file or folder: %s" % some(missing))
    found = []
    for path in paths:
        if not os.path.isdir(path):
            found.append(path)
            continue
        images, others = [], 0
        for parent, folders, files in os.walk(path, onerror=broken):
            folders.sort()
            chosen = sorted(name for name in files if name.lower().endswith(ENDINGS) and not name.startswith("."))
            images += [os.path.join(parent, name) for name in chosen]
            others += len(files) - len(chosen)
        if not images:
            raise ValueError("%s: holds no image file (%s)" % (path, " ".join(ENDINGS)))
        if others:
            note("%s: %d files are left out, because their names do not end like those of images" % (path, others))
        found += images
    return list(dict.fromkeys(found))


def predict(session, paths, report):
    """Runs the model over image files in batches, as stages 4 to 6 do. Zeros fill up the last batch.

    Turns images with an EXIF orientation upright. Returns (paths that could be read, their logits float32 [paths, attributes],
    {path: why it could not be read} for the others). Calls report(images) after every batch.
    """
    import PIL  # noqa: F401 - if it is missing, the images must not get the blame
    name = session.get_inputs()[0].name
    read, logits, bad = [], [], {}
    batch_size, height, width = input_size(session)
    batch = empty_batch(session, batch_size, height, width)
    todo = collections.deque(paths)
    while todo:
        used = 0
        while todo and used < batch_size:
            path = todo.popleft()
            try:
                preprocess(path, out=batch[used], upright=True)
            except Exception as error:  # Pillow raises nearly anything on damaged files
                bad[path] = one_line(error)
                report(1)
                continue
            read.append(path)
            used += 1
        batch[used:] = 0
        if used:
            outputs, = session.run(None, {name: batch})
            logits.append(outputs[:used])
        report(used)
    return read, np.concatenate(logits) if logits else None, bad


def describe(path, logits, names, limits):
    """Yields the lines to print for an image. logits, limits: float32 [attributes]. Nine digits give a logit exactly."""
    width = max(len(name) for name in names)
    chances, has = probabilities(logits), logits >= limits
    yield "%s: %d of %d attributes" % (path, has.sum(), len(names))
    for i in np.argsort(-logits, kind="stable"):
        yield "  %s %6.2f %%  %-*s  logit %.9g" % ("+" if has[i] else " ", 100 * chances[i], width, names[i],
                                                  logits[i])


class Pen(object):
    """Writes text into pictures. Each letter comes from the first font that has it: the file path, DejaVu Sans, the fonts of
    fontconfig, Pillow's own font.

    texts: all text that will be written. missing holds the letters that no font has; boxes are drawn for them. Raises
    ValueError if path is not a font file.
    """

    def __init__(self, texts, path=None):
        self.missing, self.fonts, self.font_of = sorted(set("".join(texts))), [], {}
        if path is not None:
            from PIL import ImageFont
            try:
                self.take(ImageFont.truetype(path, TEXT))
            except (OSError, ImportError) as error:
                raise ValueError("%s: is not a font that Pillow can read: %s" % (path, error))
        for font in open_fonts(self):
            self.take(font)

    def take(self, font):
        """Uses a font for the letters that the earlier fonts lack."""
        found = [letter for letter in self.missing if has_letter(font, letter)]
        self.missing = [letter for letter in self.missing if letter not in found]
        self.font_of.update(dict.fromkeys(found, font))
        self.fonts.append(font)

    def parts(self, text):
        """Yields the text in parts of one font each, (font, part)."""
        for font, letters in itertools.groupby(text, lambda letter: self.font_of.get(letter, self.fonts[0])):
            part = "".join(letters)
            yield font, part if hasattr(font, "getmetrics") else part.encode("latin-1", "replace").decode("latin-1")

    def width(self, text):
        return round(sum(advance(font, part) for font, part in self.parts(text)))

    def write(self, canvas, x, y, text, fill):
        """Writes the text into a row of the picture that begins at (x, y)."""
        ascent, descent = metrics(self.fonts[0])
        for font, part in self.parts(text):
            top = y + (ROW - ascent - descent) // 2 + ascent - metrics(font)[0]  # all fonts share a baseline
            canvas.text((round(x), top), part, fill=fill, font=font)
            x += advance(font, part)


def open_fonts(pen):
    """Yields the available fonts. Of fontconfig's fonts, only those with letters that the pen still lacks."""
    from PIL import ImageFont
    with contextlib.suppress(OSError, ImportError):
        yield ImageFont.truetype("DejaVuSans.ttf", TEXT)
    asked = None
    while pen.missing and pen.missing != asked:
        asked = pen.missing
        pattern = "sans-serif:scalable=true:charset=" + " ".join("%x" % ord(letter) for letter in asked)
        with contextlib.suppress(OSError, ImportError, ValueError, subprocess.CalledProcessError):
            found = subprocess.check_output(["fc-match", "--format=%{index} %{file}", pattern], stderr=subprocess.DEVNULL)
            index, path = found.decode("utf-8").split(" ", 1)
            yield ImageFont.truetype(path, TEXT, index=int(index))
    try:
        yield ImageFont.load_default(TEXT)
    except (TypeError, ImportError):  # before Pillow 10.1, it has only small bitmaps of latin-1 letters
        yield ImageFont.load_default()


def has_letter(font, letter):
    """Returns whether a font has a letter: it then draws something else than for a letter that it lacks."""
    if not hasattr(font, "getmetrics"):  # Pillow's bitmap font
        return ord(letter) < 256
    mask, lacking = font.getmask(letter), font.getmask("\U0010ffff")  # no font has this letter
    return letter.isspace() or mask.size != lacking.size or list(mask) != list(lacking)


def advance(font, text):
    """Returns the width of a text in pixels."""
    return font.getlength(text) if hasattr(font, "getlength") else font.getsize(text)[0]  # Pillow before 8 has only getsize()


def metrics(font):
    """Returns how many pixels a font takes above and below the baseline."""
    return font.getmetrics() if hasattr(font, "getmetrics") else (font.getmask("Hg").size[1], 0)


def draw(path, logits, names, pen, limits=0):
    """Returns an RGB picture of an image file, with a row for each attribute beside it, the likeliest first."""
    from PIL import Image, ImageDraw
    order = np.argsort(-logits, kind="stable")
    chances, has = probabilities(logits), logits >= limits
    limit_chances = probabilities(np.full(len(names), limits, np.float32))
    names_width = max(pen.width(name) for name in names)
    percent_width = pen.width("100.0 %")
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
        pen.write(canvas, name_x, y, names[i], colour)
        canvas.rectangle((bar_x, y + 3, bar_x + BAR, y + ROW - 4), outline=PALE)
        length = round(BAR * float(chances[i]))
        if length:
            canvas.rectangle((bar_x, y + 3, bar_x + length, y + ROW - 4), fill=BLUE if has[i] else PALE)
        percent = "%.1f %%" % (100 * chances[i])
        pen.write(canvas, percent_x + percent_width - pen.width(percent), y, percent, colour)
        x = bar_x + int(BAR * limit_chances[i])  # from here on, the image has the attribute
        canvas.line((x, y, x, y + ROW - 1), fill=GREY)
    return picture


def targets(paths, folder):
    """Returns {image path: path of its picture in folder}. Raises ValueError if two pictures would get the same path, or if a
    picture would overwrite an image."""
    result, seen = {}, {}
    for path in paths:
        name = stem(path)
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
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="an image file, or a folder")
    parser.add_argument("--onnx", metavar="MODEL", required=True, help="the model, of any batch size")
    parser.add_argument("--attributes", metavar="FILE",
                        help="a file with the attributes' names, one per line (default: the model's, else PETA's if there are 35)")
    parser.add_argument("--thresholds", metavar="FILE", help="the file of tools/thresholds.py (default: a logit of 0 for all)")
    parser.add_argument("--json", metavar="FILE", help="write the results into this file instead of printing them")
    parser.add_argument("--csv", metavar="FILE", help="the same as a table: one row per image, one column of logits per attribute")
    parser.add_argument("--save", metavar="DIR", help="also draw each image's attributes and write the pictures into this folder")
    parser.add_argument("--font", metavar="FILE",
                        help="with --save: a font (default: DejaVu Sans, and other fonts for letters that it lacks)")
    return parser.parse_args(argv)


def attributes_of(session):
    """Returns the number of a model's attributes."""
    count = session.get_outputs()[0].shape[1]
    if isinstance(count, int):
        return count
    return session.run(None, {session.get_inputs()[0].name: empty_batch(session, *input_size(session))})[0].shape[1]


def digits(logits):
    """Returns logits as numbers with nine digits, which give a float32 exactly."""
    return [float("%.9g" % value) for value in logits]


def as_json(model, names, limits, predictions, bad):
    """Returns the results as JSON text. predictions: {image path: logits}. bad: {image path: why it cannot be read}."""
    return json.dumps({
        "model": model, "attributes": names, "names_assumed": names is PETA, "thresholds": digits(limits),
        "images": [{"image": path, "has": [name for name, has in zip(names, row >= limits) if has], "logits": digits(row)}
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


def main(argv=None):
    args = parse(argv)
    paths = find_images(args.images)
    pictures = {} if args.save is None else targets(paths, args.save)
    files = [path for path in (args.json, args.csv) if path is not None]
    for path in files:  # fail before the work
        if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
            raise FileNotFoundError("%s: cannot be written: its folder does not exist" % path)
    if args.font is not None:
        Pen([], args.font)  # fail before the work if the font is bad
    session = open_session(args.onnx)
    names = attribute_names(attributes_of(session), args.attributes, args.onnx)
    names, limits, _ = read_thresholds(args.thresholds, names)
    if names is PETA:
        note(ASSUMED)
    with progress(len(paths), "image") as bar:
        read, logits, bad = predict(session, paths, bar.update)
    if read:
        if not np.isfinite(logits).all():
            raise ValueError("%s: gives NaN or infinite logits for %s" % (
                args.onnx, some(path for path, row in zip(read, logits) if not np.isfinite(row).all())))
        if look_like_probabilities(logits):
            note("%s: %s; they are converted to logits" % (args.onnx, PROBABILITIES))
            logits = logits_from(logits)
    predictions = dict(zip(read, logits)) if read else {}
    if pictures and read:
        pen = Pen(names + ["0123456789. %"], args.font)
        if pen.missing:
            note("no font on this machine has %s: boxes are drawn. Install one (for Chinese: fonts-noto-cjk on Debian and "
                 "Ubuntu, google-noto-sans-cjk-fonts on openEuler, CentOS and Fedora), or give --font FILE" % some(pen.missing))
        os.makedirs(args.save, exist_ok=True)
        for path, row in predictions.items():
            with whole_file(pictures[path]) as temporary:
                draw(path, row, names, pen, limits).save(temporary, format="PNG")
        print("%s: %d pictures" % (args.save, len(read)))
    if args.json is not None:
        write_text(args.json, as_json(args.onnx, names, limits, predictions, bad))
    if args.csv is not None:
        write_text(args.csv, as_csv(paths, names, predictions, bad))
    for path in files:
        print("%s: %d images, %d could not be read" % (path, len(read), len(bad)))
    for path, row in predictions.items() if not files else ():
        for line in describe(path, row, names, limits):
            print(line)
    if bad:
        raise ValueError("%d of %d images cannot be read: %s"
                         % (len(bad), len(paths), some("%s (%s)" % item for item in bad.items())))


if __name__ == "__main__":
    command(main)
