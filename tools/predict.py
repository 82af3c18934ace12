"""One image or a few: what the model says about them, on the screen and as pictures.

    python3 tools/predict.py person.png --onnx deepmar_bs1_nopad.onnx
    python3 tools/predict.py *.jpg --onnx deepmar_bs1_nopad.onnx --save pictures

Prints every attribute, the likeliest first: its probability, its logit, and a + where the image has it (the logit is >= 0).
The logits are those that stages 4 to 6 would write for the image, to the bit, unless a camera noted that it was held
sideways: such a photograph (with an EXIF orientation) is turned upright here. --save DIR writes DIR/NAME_attributes.png for
each image: the picture with a bar for each attribute beside it. Images that cannot be read are named at the end, after
the others' attributes.
"""
import argparse
import os
import sys

HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]
from common import command, importing, note, one_line, progress, some, stem, whole_file
from postprocess_deepmar_pytorch import (ASSUMED, PETA, PROBABILITIES, attribute_names, logits_from,
                                         look_like_probabilities, probabilities)
from preprocess_deepmar_pytorch import preprocess, read_image
from session import empty_batch, input_size, open_session

with importing():
    import numpy as np

# The picture that --save draws, in pixels, and its colours.
MARGIN, ROW, BAR, TEXT = 16, 19, 150, 14
WIDTH = 480  # of the image at most
WHITE, BLACK, GREY, PALE, BLUE = "white", "#202020", "#707070", "#d8d8d8", "#2f6fb5"


def predict(session, paths, report):
    """Runs the model over image files in batches, the last filled up with zeros, as stages 4 to 6 do.

    Images with an EXIF orientation are turned upright. Returns (paths read, their logits float32 [paths read, attributes],
    why the others could not be read). Calls report(images) after every batch.
    """
    import PIL  # noqa: F401 - here, so that its absence is no fault of the images
    name = session.get_inputs()[0].name
    read, logits, bad = [], [], []
    batch_size, height, width = input_size(session)
    batch = empty_batch(session, batch_size, height, width)
    todo = list(paths)
    while todo:
        used = 0
        while todo and used < batch_size:
            path = todo.pop(0)
            try:
                preprocess(path, out=batch[used], upright=True)
            except Exception as error:  # Pillow raises nearly anything on damaged files
                bad.append("%s (%s)" % (path, one_line(error)))
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


def describe(path, logits, names):
    """The lines to print for an image: logits float32 [attributes], with digits that say them to the bit."""
    width = max(len(name) for name in names)
    chances = probabilities(logits)
    yield "%s: %d of %d attributes" % (path, (logits >= 0).sum(), len(names))
    for i in np.argsort(-logits, kind="stable"):
        yield "  %s %6.2f %%  %-*s  logit %.9g" % ("+" if logits[i] >= 0 else " ", 100 * chances[i], width, names[i],
                                                  logits[i])


def load_font():
    """A font that the system or Pillow >= 10.1 has; before that, Pillow's small bitmaps, of latin-1 letters only."""
    from PIL import ImageFont
    try:
        return ImageFont.truetype("DejaVuSans.ttf", TEXT), "utf-8"
    except (OSError, ImportError):
        pass
    try:
        return ImageFont.load_default(TEXT), "utf-8"
    except TypeError:
        return ImageFont.load_default(), "latin-1"


def draw(path, logits, names):
    """Returns an RGB picture of an image file with a row for each attribute beside it, the likeliest first."""
    from PIL import Image, ImageDraw
    font, encoding = load_font()

    def text_size(text):
        return font.getmask(text).size

    order = np.argsort(-logits, kind="stable")
    chances = probabilities(logits)
    labels = [name.encode(encoding, "replace").decode(encoding) for name in names]
    percents = ["%.1f %%" % (100 * chance) for chance in chances]
    names_width = max(text_size(label)[0] for label in labels)
    percent_width = text_size("100.0 %")[0]
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
    text_y = (ROW - text_size("Hg")[1]) // 2 - 2  # a font's letters begin a little below where they are drawn
    for row, i in enumerate(order):
        y = MARGIN + row * ROW
        has = logits[i] >= 0
        canvas.text((name_x, y + text_y), labels[i], fill=BLACK if has else GREY, font=font)
        canvas.rectangle((bar_x, y + 3, bar_x + BAR, y + ROW - 4), outline=PALE)
        length = round(BAR * float(chances[i]))
        if length:
            canvas.rectangle((bar_x, y + 3, bar_x + length, y + ROW - 4), fill=BLUE if has else PALE)
        x = percent_x + percent_width - text_size(percents[i])[0]
        canvas.text((x, y + text_y), percents[i], fill=BLACK if has else GREY, font=font)
    middle = bar_x + BAR // 2  # 50 %: from here on, the image has the attribute
    canvas.line((middle, MARGIN, middle, MARGIN + ROW * len(names) - 1), fill=GREY)
    return picture


def targets(paths, folder):
    """Returns {image path: path of its picture in folder}; raises ValueError where two are one, or one is an image."""
    result, seen = {}, {}
    for path in paths:
        name = stem(path)
        if name in seen:
            raise ValueError("%s and %s would both be drawn as %s_attributes.png; give them to two runs with two folders"
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
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="an image file")
    parser.add_argument("--onnx", metavar="MODEL", required=True, help="the model, of any batch size")
    parser.add_argument("--attributes", metavar="FILE",
                        help="the attributes' names, one a line (default: PETA's, if there are 35)")
    parser.add_argument("--save", metavar="DIR", help="also draw each image's attributes, into this folder")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    pictures = {} if args.save is None else targets(args.images, args.save)
    missing = [path for path in args.images if not os.path.isfile(path)]
    if missing:
        raise FileNotFoundError("no such image file: %s" % some(missing))
    session = open_session(args.onnx)
    with progress(len(args.images), "image") as bar:
        read, logits, bad = predict(session, args.images, bar.update)
    if read:
        if not np.isfinite(logits).all():
            raise ValueError("%s: gives NaN or infinite logits for %s" % (
                args.onnx, some(path for path, row in zip(read, logits) if not np.isfinite(row).all())))
        if look_like_probabilities(logits):
            note("%s: %s; the logits below are those that belong to them" % (args.onnx, PROBABILITIES))
            logits = logits_from(logits)
        names = attribute_names(logits.shape[1], args.attributes)
        if names is PETA:
            note(ASSUMED)
    if pictures and read:
        os.makedirs(args.save, exist_ok=True)
        for path, row in zip(read, logits):
            with whole_file(pictures[path]) as temporary:
                draw(path, row, names).save(temporary, format="PNG")
        print("%s: %d pictures" % (args.save, len(read)))
    for path, row in zip(read, logits if read else []):
        for line in describe(path, row, names):
            print(line)
    if bad:
        raise ValueError("%d of %d images cannot be read: %s" % (len(bad), len(args.images), some(bad)))


if __name__ == "__main__":
    command(main)
