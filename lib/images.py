"""An image file -> the network's input."""
import contextlib
import os

from lib.camera import STANDARDS, check_even, to_nv12
from lib.files import replaced_folder
from lib.machine import cores, worker_pool
from lib.names import find_listed, read_list, stem
from lib.script import importing, joined, one_line, progress

with importing():
    import numpy as np

SIZE = 224                   # height and width of the network's input in pixels
MEAN = (0.485, 0.456, 0.406)  # red, green, blue: ImageNet's values, with which DeepMAR was trained
STD = (0.229, 0.224, 0.225)
MAX_PIXELS = 64 * 1000 * 1000  # a larger image is not a photograph of a pedestrian and might exhaust the memory
ORIENTATION = 274            # the EXIF tag; 1 is upright
# What a model's metadata say of each kind of input. The pixels of "uint8" and of NV12 ("nv12-601") are for a model with AIPP.
LAYOUTS = {"float32": "NCHW RGB", "uint8": "NHWC RGB uint8", "nv12-601": "NV12 BT.601 uint8", "nv12-709": "NV12 BT.709 uint8",
           "nv12-jpeg": "NV12 JPEG uint8"}
NV12 = tuple("nv12-" + standard for standard in STANDARDS)
CHUNK = 64                   # a process gets at most this many images at a time


def check_image(image):
    """Raises ValueError for an open Pillow image whose content must not be loaded."""
    if image.width * image.height > MAX_PIXELS:
        raise ValueError("%d x %d pixels are too many" % image.size)
    if image.format == "EPS":  # Pillow would let Ghostscript run it
        raise ValueError("PostScript is a program; save it as a picture")


def turned(image):
    """Returns whether a loaded Pillow image has an EXIF orientation other than upright. Without EXIF data, this takes 10 us.

    It must be loaded, because a PNG's orientation may follow the pixels, and because current Pillows turn a TIFF by themselves.
    """
    with contextlib.suppress(Exception):  # damaged EXIF data is no reason to refuse a picture
        return 2 <= image.getexif().get(ORIENTATION, 1) <= 8
    return False


def read_image(path, upright=False):
    """Reads an image, given as a path or an open file. Returns (a PIL image of mode RGB, whether it is turned()).

    Turns the image upright only if upright is set, because the guide's script ignores the orientation. Raises Pillow's
    errors, or ValueError.
    """
    from PIL import Image, ImageOps
    if not hasattr(path, "read") and not os.path.isfile(path):
        raise ValueError("not a regular file")  # reading a FIFO would wait for ever
    with Image.open(path) as image:
        check_image(image)
        image.load()  # for some formats, the mode is known only after load()
        if image.mode[0] in "IF":  # convert() would clip these at 255 instead of scaling them
            raise ValueError("more than 8 bits per channel (mode %s); save it with 8" % image.mode)
        orientated = turned(image)
        if upright and orientated:
            image = ImageOps.exif_transpose(image)
        return image if image.mode == "RGB" else image.convert("RGB"), orientated  # convert() copies even RGB


def input_shape(kind, height, width):
    """Returns the shape of one image's input. kind: a key of LAYOUTS. Raises ValueError for an odd size in NV12."""
    if kind in NV12:
        check_even(height, width)
        return (height * 3 // 2, width)
    return (3, height, width) if kind == "float32" else (height, width, 3)


def empty_input(size, kind="float32", images=()):
    """Returns an array of zeros for one image, or with images=(N,) for a batch. size: (height, width). See input_shape()."""
    return np.zeros(images + input_shape(kind, *size), "<f4" if kind == "float32" else np.uint8)


def resize(image, size):
    """Returns a PIL image resized as the guide does it: Pillow's bilinear filter, which averages while it shrinks."""
    from PIL import Image
    return image.resize(size[::-1], Image.BILINEAR)


def normalise(image, out, kind=None, resized=resize):
    """Writes a PIL image of mode RGB, resized, into an array from empty_input() and returns it. Only NV12 needs its kind named."""
    if out.dtype != np.uint8:
        height, width = out.shape[1:]
    else:
        height, width = (len(out) * 2 // 3, out.shape[1]) if kind in NV12 else out.shape[:2]
    resized = resized(image, (height, width))
    if out.dtype == np.uint8:
        out[...] = to_nv12(np.asarray(resized), kind[len("nv12-"):]) if kind in NV12 else resized
        return out
    for channel, name, mean, std in zip(out, "RGB", MEAN, STD):
        # Each channel is done by itself, so that the arithmetic stays in the processor's cache. Pillow extracts the channel.
        pixels = np.frombuffer(resized.tobytes("raw", name), np.uint8).reshape(height, width)
        np.divide(pixels, 255, out=channel, dtype=np.float32)
        channel -= np.float32(mean)
        channel /= np.float32(std)
    return out


def preprocess(path, out=None, upright=False, kind=None):
    """Returns an image file as the network's input, float32 [3,224,224]. Writes it into the array out if given.

    out: of empty_input(), of any size. upright: follow the image's EXIF orientation. kind: see normalise(). Raises Pillow's errors,
    or ValueError.
    """
    if out is None:
        out = empty_input((SIZE, SIZE))
    return normalise(read_image(path, upright)[0], out, kind)


def convert(images, bins, size, kind, resized=resize):
    """Writes the bins of images, [(path, bin's file name)], into the folder bins. size: (height, width). kind: a key of LAYOUTS.

    Returns (for each image, None or why it cannot be read; how many images have an EXIF orientation).
    """
    from PIL import Image
    Image.core.set_blocks_max(8)  # reuse memory for the next image: allocating it anew took a tenth of the time
    reasons, count, array = [], 0, empty_input(size, kind)
    for path, name in images:
        try:
            image, orientated = read_image(path)
            normalise(image, array, kind, resized)
        except Exception as error:  # Pillow raises nearly anything on damaged files
            reasons.append("%s: %s" % (path, one_line(error)))
            continue
        count += orientated
        with open(os.path.join(bins, name), "wb") as f:
            # ext4 needs a third less time if the file's space is allocated at once. If that fails, write() reports why.
            with contextlib.suppress(OSError):
                os.posix_fallocate(f.fileno(), 0, array.nbytes)
            f.write(array.data)
        reasons.append(None)
    return reasons, count


def parts(count, workers):
    """Yields slices of a list of count images, ever smaller ones, so that all workers end together."""
    start = 0
    while start < count:
        end = start + min(CHUNK, -(-(count - start) // (2 * workers)))
        yield slice(start, end)
        start = end


def convert_all(images, bins, size, kind, resized=resize):
    """Runs convert() on all cores and yields its results. Raises OSError if a bin cannot be written."""
    from PIL import Image  # noqa: F401 - imported once, for all processes
    workers = min(cores(), len(images))
    # The workers are processes, because threads hold each other back in Pillow.
    with worker_pool(workers, lambda part: convert(images[part], bins, size, kind, resized)) as run:
        yield from run(parts(len(images), workers))


def write_bins(folder, bins, image_txt, size, kind, resized=resize):
    """Writes the bins of the images that a list names in a folder. It replaces the folder bins, and only if all images can be read.

    kind: a key of LAYOUTS. resized(image, (height, width)) returns a PIL image of mode RGB in this size. Returns (how many images
    there are, how many of them are turned()). Raises OSError or ValueError.
    """
    names = read_list(image_txt)
    images = [(path, stem(name) + ".bin") for path, name in zip(find_listed(folder, names, image_txt), names)]
    input_shape(kind, *size)  # refuses an odd size before the old bins are gone
    bad, turned = [], 0
    with replaced_folder(bins, names=[name for _, name in images]) as partial, \
            contextlib.closing(convert_all(images, partial, size, kind, resized)) as parts:
        with progress(len(names), "image") as bar:
            for reasons, part_turned in parts:
                bad += [reason for reason in reasons if reason]
                turned += part_turned
                bar.update(len(reasons))
        if bad:
            raise ValueError("%d of %d images cannot be read, so nothing was written (the other %d are fine): %s"
                             % (len(bad), len(names), len(names) - len(bad), joined(sorted(bad), "; ")))
    return len(names), turned
