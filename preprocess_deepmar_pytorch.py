"""Stage 4: the images of a list -> the network's input, one .bin file per image.

    python3 preprocess_deepmar_pytorch.py /home/HwHiAiUser/dataset/peta/images input_bin image.txt
    python3 preprocess_deepmar_pytorch.py --file_path=.../peta/images --bin_path=input_bin --image_info=image.txt

NAME.bin holds float32, little endian, [3,224,224]: ((pixel / 255) - mean) / std of the image as RGB, resized to 224x224
(bilinear, aspect ratio not kept). NAME is the file name up to its first dot. The script replaces the folder of bins as a
whole, and only if it could read every image. The folder then holds the listed images and no others. All cores work.

With --uint8, NAME.bin holds the resized pixels, [224,224,3], which are a quarter of the bytes. Such bins are for a model that
normalises the pixels itself (AIPP).
"""
import argparse
import contextlib
import os
import re
import signal
import sys

HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:0] = [os.path.join(HERE, "tools"), HERE]
from common import (command, composed, cores, importing, joined, note, one_line, pixels, progress, read_lines,
                    replaced_folder, stem)

with importing():
    import numpy as np

SIZE = 224                   # height and width of the network's input in pixels
MEAN = (0.485, 0.456, 0.406)  # red, green, blue: ImageNet's values, with which DeepMAR was trained
STD = (0.229, 0.224, 0.225)
LIMIT = 10 ** 4              # the values of a normalised picture are far smaller
MAX_PIXELS = 64 * 1000 * 1000  # a larger image is not a photograph of a pedestrian and might exhaust the memory
CHUNK = 64                   # a process gets at most this many images at a time
KILLED = "a worker process was killed; was the memory exhausted?"
ORIENTATION = 274            # the EXIF tag; 1 is upright
# When a tool is given a folder, it treats files with these endings as images.
ENDINGS = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def inside(name):
    """Returns whether a line of a list can be the name of a file inside the images' folder."""
    return len(name) <= 1000 and not re.search(r"[\0-\x1f\x7f-\x9f]|^/|(^|/)\.\.(/|$)", name)


def read_list(path):
    """Returns the image names in a list file, one per line. Ignores blank lines, CRLF and a byte order mark.

    Raises ValueError with the line number for a name that leaves the images' folder, or whose bin an earlier line
    already writes.
    """
    names, seen = [], {}
    for number, name in enumerate(read_lines(path), 1):
        if not name:
            continue
        if not inside(name):
            raise ValueError("%s: line %d: %r is not a file name inside the images' folder" % (path, number, name[:200]))
        bin_name = stem(name)
        if not bin_name:
            raise ValueError("%s: line %d: %r has nothing before its first dot, and the bin gets its name from there"
                             % (path, number, name))
        if bin_name in seen:
            raise ValueError("%s: lines %d and %d would both write %s.bin; no two images may have the same name up to "
                             "the first dot; tools/lists.py list --flatten makes such names"
                             % (path, seen[bin_name], number, bin_name))
        seen[bin_name] = number
        names.append(name)
    if not names:
        raise ValueError("%s: names no image; it needs one file name per line" % path)
    return names


def find_images(folder, names, list_path):
    """Returns the path of each named image in a folder. Raises OSError with the names of all missing images.

    If no file has exactly this name, a file with another Unicode form of it is taken. A Mac writes an accented letter as
    two characters, and a list from elsewhere has one character. Raises ValueError if two files fit.
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError("%s: no such folder; give the folder of the images" % folder)
    paths = [os.path.join(folder, name) for name in names]
    lost = [i for i, path in enumerate(paths) if not os.path.lexists(path)]
    listings = {}
    for i in lost:
        paths[i] = folder
        for part in names[i].split("/"):
            paths[i] = os.path.join(paths[i], another_form(paths[i], part, listings))
    missing = [names[i] for i in lost if not os.path.lexists(paths[i])]
    if missing:
        other = [name for name in os.listdir(folder) if re.search("[\ud800-\udfff]", name)]  # undecodable bytes
        raise FileNotFoundError("%d of the %d images in %s are not in %s: %s%s" % (
            len(missing), len(names), list_path, folder, joined(missing), "; the folder has file names that are not "
            "UTF-8, such as %s: rename them, convmv -f GBK -t UTF-8" % ascii(other[0]) if other else ""))
    return paths


def another_form(folder, name, listings):
    """Returns a file's name in the Unicode form that the folder has. Returns the given name if the folder has none.

    listings: the folders listed so far, {folder: {composed name: [names]}}.
    """
    if folder not in listings:
        listings[folder] = {}
        with contextlib.suppress(OSError):
            for other in os.listdir(folder):
                listings[folder].setdefault(composed(other), []).append(other)
    found = listings[folder].get(composed(name), [name])
    if len(found) > 1 and name not in found:
        raise ValueError("%s: has several files whose names differ only in their Unicode form, and none is exactly as in the "
                         "list: %s" % (folder, ", ".join(map(ascii, found))))
    return name if name in found else found[0]


def check_image(image):
    """Raises ValueError for an open Pillow image whose content must not be loaded."""
    if image.width * image.height > MAX_PIXELS:
        raise ValueError("%d x %d pixels are too many" % image.size)
    if image.format == "EPS":  # Pillow would let Ghostscript run it
        raise ValueError("PostScript is a program; save it as a picture")


def read_image(path, upright=False):
    """Reads an image, given as a path or an open file. Returns (a PIL image of mode RGB, its EXIF orientation, 1 to 8).

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
        orientation = 1
        with contextlib.suppress(Exception):  # damaged EXIF data is no reason to refuse a picture
            orientation = image.getexif().get(ORIENTATION, 1)
        if upright and orientation != 1:
            image = ImageOps.exif_transpose(image)
        return image if image.mode == "RGB" else image.convert("RGB"), orientation  # convert() copies even RGB


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


def preprocess(path, out=None, upright=False, size=(SIZE, SIZE)):
    """Returns an image file as the network's input, float32 [3,height,width]. Writes it into the array out if given.

    size: (height, width), if out is not given. upright: follow the image's EXIF orientation. Raises Pillow's errors, or
    ValueError.
    """
    if out is None:
        out = empty_input(size)
    return normalise(read_image(path, upright)[0], out)


def fault(array):
    """Returns why an array from a bin cannot be of its type, or None if it can.

    A float32 bin is as large as a uint8 bin of twice the height and width, so with a wrong size one could pass for the other.
    """
    with np.errstate(all="ignore"):
        if array.dtype != np.uint8:  # four pixels, read as one float, give any value: infinity, or 1e30
            return None if -LIMIT < array.min() and array.max() < LIMIT else "NaN or infinite values, or beyond %d" % LIMIT
        plane = array.size // 12 * 4  # the bytes of a float32 bin's first channel
        red = (array.reshape(-1)[:min(plane, 4096)].view("<f4") * np.float32(STD[0]) + np.float32(MEAN[0])) * 255
        pixels = (np.abs(red - np.rint(red)) < 1e-3) & (red > -1) & (red < 256)
    return "float32 values, not pixels" if pixels.size and pixels.all() else None


def convert(images, bins, array):
    """Writes the bins of images, [(path, bin's file name)], into the folder bins. array: a buffer from empty_input().

    Returns (for each image, None or why it cannot be read; how many images have an EXIF orientation).
    """
    from PIL import Image
    Image.core.set_blocks_max(8)  # reuse memory for the next image: allocating it anew took a tenth of the time
    reasons, turned = [], 0
    for path, name in images:
        try:
            image, orientation = read_image(path)
            normalise(image, array)
        except Exception as error:  # Pillow raises nearly anything on damaged files
            reasons.append("%s: %s" % (path, one_line(error)))
            continue
        turned += orientation != 1
        with open(os.path.join(bins, name), "wb") as f:
            # ext4 needs a third less time if the file's space is allocated at once. If that fails, write() reports why.
            with contextlib.suppress(OSError):
                os.posix_fallocate(f.fileno(), 0, array.nbytes)
            f.write(array.data)
        reasons.append(None)
    return reasons, turned


@contextlib.contextmanager
def uninterrupted():
    """Delays Ctrl-C until the block ends. Processes that start in the block never see it, because they ignore it first."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def start_worker(parent):
    """Makes a worker process ignore Ctrl-C, end when its parent is killed, and hide Pillow's warnings."""
    import ctypes
    import warnings
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG of linux/prctl.h
    if os.getppid() != parent:  # the parent was killed before that call
        os._exit(1)
    warnings.simplefilter("ignore")


def chunks(images, workers):
    """Yields the images in ever smaller parts, so that all workers end together."""
    start = 0
    while start < len(images):
        end = start + min(CHUNK, -(-(len(images) - start) // (2 * workers)))
        yield images[start:end]
        start = end


def work(parent, pipe, bins, array):
    """Runs in a worker process: converts the images that come through the pipe and sends back convert()'s results."""
    start_worker(parent)
    try:
        while True:
            pipe.send(convert(pipe.recv(), bins, array))
    except EOFError:  # there are no more images
        pass
    except OSError as error:
        pipe.send(error)


def start_workers(count, bins, array):
    """Starts up to count worker processes, as many as the system allows. Returns {our end of its pipe: process}."""
    import multiprocessing
    context = multiprocessing.get_context("fork")
    workers = {}
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            with contextlib.closing(theirs), uninterrupted():
                worker = context.Process(target=work, daemon=True, args=(os.getpid(), theirs, bins, array))
                worker.start()
            workers[ours] = worker
    except OSError as error:  # the limit of processes or open files is reached
        note("only %d of %d processes can be started (%s), so this takes longer" % (len(workers), count, error.strerror))
    return workers


def convert_all(images, bins, array):
    """Runs convert() on all cores and yields its results as they come. Raises OSError if a bin cannot be written."""
    from multiprocessing.connection import wait
    from PIL import Image  # noqa: F401 - imported once, for all processes
    # The workers are processes, because threads hold each other back in Pillow. A pool's own threads would cost time.
    workers = start_workers(min(cores(), len(images)) if len(images) > 1 else 0, bins, array)
    todo = chunks(images, max(1, len(workers)))
    if not workers:
        for part in todo:
            yield convert(part, bins, array)
        return
    idle = list(workers)
    busy = 0
    try:
        for part in todo:
            while not idle:
                for pipe in wait(list(workers)):
                    yield received(pipe)
                    idle.append(pipe)
                    busy -= 1
            try:
                idle.pop().send(part)
            except ConnectionError:
                raise OSError(KILLED)
            busy += 1
        while busy:
            for pipe in wait(list(workers)):
                yield received(pipe)
                busy -= 1
    finally:  # the caller can rename or delete the workers' files only after the workers have ended
        for worker in workers.values():
            worker.kill()
            worker.join()


def received(pipe):
    """Returns a worker's next results. Raises OSError if the worker could not write or was killed."""
    try:
        results = pipe.recv()
    except (EOFError, ConnectionError):
        raise OSError(KILLED)
    if isinstance(results, OSError):
        raise results
    return results


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        usage="preprocess_deepmar_pytorch.py IMAGES BIN_DIR IMAGE_TXT [--size H W] [--uint8]\n"
              "       preprocess_deepmar_pytorch.py --file_path IMAGES --bin_path BIN_DIR --image_info IMAGE_TXT ...")
    parser.add_argument("positional", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--file_path", metavar="IMAGES", help="the folder of the images")
    parser.add_argument("--bin_path", metavar="BIN_DIR", help="the folder of bins to write")
    parser.add_argument("--image_info", metavar="IMAGE_TXT", help="the list of images, one file name per line")
    parser.add_argument("--size", nargs=2, type=pixels, default=(SIZE, SIZE), metavar=("H", "W"),
                        help="height and width of the network's input (default: 224 224)")
    parser.add_argument("--uint8", action="store_true", help="write pixels, uint8 [H,W,3], for a model with AIPP")
    args = parser.parse_intermixed_args(argv)
    named = [args.file_path, args.bin_path, args.image_info]
    if args.positional and any(value is not None for value in named):
        parser.error("give the arguments either in their order or by name, not both")
    values = args.positional or named
    if len(values) != 3 or None in values:
        parser.error("give IMAGES, BIN_DIR and IMAGE_TXT")
    return values + [tuple(args.size), args.uint8]


def main(argv=None):
    folder, bins, image_txt, size, uint8 = parse(argv)
    names = read_list(image_txt)
    paths = find_images(folder, names, image_txt)
    bad, turned = [], 0
    with replaced_folder(bins) as partial:
        parts = convert_all([(path, stem(name) + ".bin") for path, name in zip(paths, names)], partial,
                            empty_input(size, uint8))
        with contextlib.closing(parts), progress(len(names), "image") as bar:
            for reasons, part_turned in parts:
                bad += [reason for reason in reasons if reason]
                turned += part_turned
                bar.update(len(reasons))
        if bad:
            raise ValueError("%d of %d images cannot be read, so nothing was written (the other %d are fine): %s"
                             % (len(bad), len(names), len(names) - len(bad), joined(sorted(bad), "; ")))
    print("%s: %d images -> %d bins of %s" % (bins, len(names), len(names), ("uint8 [%d,%d,3]" if uint8 else "float32 [3,%d,%d]")
                                              % size))
    if turned:
        print("note: %d of %d images have an EXIF orientation (a camera held sideways). It is ignored here, as in the "
              "guide's script, so the network sees them sideways" % (turned, len(names)))


if __name__ == "__main__":
    command(main)
