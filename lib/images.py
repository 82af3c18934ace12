"""An image file -> the network's input."""
import contextlib
import os

from lib.machine import cores, worker_pool
from lib.script import importing, one_line

with importing():
    import numpy as np

SIZE = 224                   # height and width of the network's input in pixels
MEAN = (0.485, 0.456, 0.406)  # red, green, blue: ImageNet's values, with which DeepMAR was trained
STD = (0.229, 0.224, 0.225)
MAX_PIXELS = 64 * 1000 * 1000  # a larger image is not a photograph of a pedestrian and might exhaust the memory
ORIENTATION = 274            # the EXIF tag; 1 is upright
CHUNK = 64                   # a process gets at most this many images at a time


def check_image(image):
    """Raises ValueError for an open Pillow image whose content must not be loaded."""
    if image.width * image.height > MAX_PIXELS:
        raise ValueError("%d x %d pixels are too many" % image.size)
    if image.format == "EPS":  # Pillow would let Ghostscript run it
        raise ValueError("PostScript is a program; save it as a picture")


def turned(image):
    """Returns whether an open Pillow image has an EXIF orientation other than upright. Without EXIF data this takes 10 us.

    A PNG is loaded for it, because the data may follow the pixels. So call check_image() first.
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


def empty_input(size, uint8=False):
    """Returns an empty array for one image: float32 [3,height,width], or uint8 [height,width,3] for a model with AIPP."""
    return np.empty(tuple(size) + (3,), np.uint8) if uint8 else np.empty((3,) + tuple(size), "<f4")


def normalise(image, out):
    """Resizes a PIL image of mode RGB into an array from empty_input() and returns it. A uint8 array gets plain pixels."""
    from PIL import Image
    height, width = out.shape[:2] if out.dtype == np.uint8 else out.shape[1:]
    resized = image.resize((width, height), Image.BILINEAR)
    if out.dtype == np.uint8:
        out[...] = resized
        return out
    for channel, name, mean, std in zip(out, "RGB", MEAN, STD):
        # Each channel is done by itself, so that the arithmetic stays in the processor's cache. Pillow extracts the channel.
        pixels = np.frombuffer(resized.tobytes("raw", name), np.uint8).reshape(height, width)
        np.divide(pixels, 255, out=channel, dtype=np.float32)
        channel -= np.float32(mean)
        channel /= np.float32(std)
    return out


def preprocess(path, out=None, upright=False):
    """Returns an image file as the network's input, float32 [3,224,224]. Writes it into the array out if given.

    out: of empty_input(), of any size. upright: follow the image's EXIF orientation. Raises Pillow's errors, or ValueError.
    """
    if out is None:
        out = empty_input((SIZE, SIZE))
    return normalise(read_image(path, upright)[0], out)


def convert(images, bins, size, uint8):
    """Writes the bins of images, [(path, bin's file name)], into the folder bins. size: (height, width).

    Returns (for each image, None or why it cannot be read; how many images have an EXIF orientation).
    """
    from PIL import Image
    Image.core.set_blocks_max(8)  # reuse memory for the next image: allocating it anew took a tenth of the time
    reasons, count, array = [], 0, empty_input(size, uint8)
    for path, name in images:
        try:
            image, orientated = read_image(path)
            normalise(image, array)
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


def convert_all(images, bins, size, uint8):
    """Runs convert() on all cores and yields its results. Raises OSError if a bin cannot be written."""
    from PIL import Image  # noqa: F401 - imported once, for all processes
    workers = min(cores(), len(images))
    # The workers are processes, because threads hold each other back in Pillow.
    with worker_pool(workers, lambda part: convert(images[part], bins, size, uint8)) as run:
        yield from run(parts(len(images), workers))
