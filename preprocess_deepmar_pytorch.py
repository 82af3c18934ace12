"""Stage 4: the images of a list -> the network's input, one .bin file an image.

    python3 preprocess_deepmar_pytorch.py /home/HwHiAiUser/dataset/peta/images input_bin image.txt
    python3 preprocess_deepmar_pytorch.py --file_path=.../peta/images --bin_path=input_bin --image_info=image.txt

NAME.bin holds float32, little endian, [3,224,224]: ((pixel / 255) - mean) / std of the image as RGB, resized to 224x224
(bilinear, aspect ratio not kept). NAME is the file name up to its first dot. The folder of bins is replaced as a whole
and only if every image could be read, so it holds the images of the list and no others. Runs on all cores.

With --uint8 it holds the resized pixels, [224,224,3], a quarter of the bytes: for a model that normalises them itself (AIPP).
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
MEAN = (0.485, 0.456, 0.406)  # ImageNet's, as DeepMAR was trained with: red, green, blue
STD = (0.229, 0.224, 0.225)
LIMIT = 10 ** 4              # no value of a normalised picture is near it
MAX_PIXELS = 64 * 1000 * 1000  # a larger image is no photograph of a pedestrian, but might exhaust the memory
CHUNK = 64                   # images that a process is handed at a time, at most
KILLED = "a worker process was killed; was the memory exhausted?"
ORIENTATION = 274            # the EXIF tag; 1 is upright
# The names of files that tools take for images, where they are given a folder.
ENDINGS = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def inside(name):
    """Whether a line of a list can be the name of a file inside the images' folder."""
    return len(name) <= 1000 and not re.search(r"[\0-\x1f\x7f-\x9f]|^/|(^|/)\.\.(/|$)", name)


def read_list(path):
    """Returns the image names in a list file, one a line; blank lines, CRLF and a byte order mark do not count.

    Raises ValueError, with the line, for a name that leaves the images' folder, or that would write the bin of an
    earlier line.
    """
    names, seen = [], {}
    for number, name in enumerate(read_lines(path), 1):
        if not name:
            continue
        if not inside(name):
            raise ValueError("%s: line %d: %r is not a file name inside the images' folder" % (path, number, name[:200]))
        bin_name = stem(name)
        if not bin_name:
            raise ValueError("%s: line %d: %r has nothing before its first dot to name a bin after"
                             % (path, number, name))
        if bin_name in seen:
            raise ValueError("%s: lines %d and %d would both write %s.bin; each image's name up to its first dot must "
                             "be its own; tools/lists.py list --flatten makes such names"
                             % (path, seen[bin_name], number, bin_name))
        seen[bin_name] = number
        names.append(name)
    if not names:
        raise ValueError("%s: names no image; it needs one file name a line" % path)
    return names


def find_images(folder, names, list_path):
    """Returns the path of each named image in a folder. Raises OSError that names all images that are not there.

    A file whose name has another Unicode form is found, too, if none has the name itself: a Mac writes a letter with an
    accent as two characters, and a list that was made elsewhere has it as one. Raises ValueError where two files fit.
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError("%s: no such folder; it is the images' folder" % folder)
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
    """The name of a file in a folder, in the Unicode form that it has there; the name as given if there is none.

    listings: the folders seen so far, {folder: {composed name: [names]}}.
    """
    if folder not in listings:
        listings[folder] = {}
        with contextlib.suppress(OSError):
            for other in os.listdir(folder):
                listings[folder].setdefault(composed(other), []).append(other)
    found = listings[folder].get(composed(name), [name])
    if len(found) > 1 and name not in found:
        raise ValueError("%s: has several files whose names differ in their Unicode form alone, none of them in that of the "
                         "list: %s" % (folder, ", ".join(map(ascii, found))))
    return name if name in found else found[0]


def read_image(path, upright=False):
    """Returns (an image file, by its path or open, as a PIL image of mode RGB, its EXIF orientation, 1 to 8).

    The orientation is ignored, as the guide's script ignores it, unless upright. Raises what Pillow raises, or ValueError.
    """
    from PIL import Image, ImageOps
    if not hasattr(path, "read") and not os.path.isfile(path):
        raise ValueError("not a regular file")  # reading a FIFO would wait for ever
    with Image.open(path) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError("%d x %d pixels are too many" % image.size)
        if image.format == "EPS":  # Pillow would let Ghostscript run it
            raise ValueError("PostScript is a program; save it as a picture")
        image.load()  # the mode of some formats is known only then
        if image.mode[0] in "IF":  # convert() would clip these at 255 instead of scaling them
            raise ValueError("more than 8 bits a channel (mode %s); save it with 8" % image.mode)
        orientation = 1
        with contextlib.suppress(Exception):  # damaged EXIF data is no reason to refuse a picture
            orientation = image.getexif().get(ORIENTATION, 1)
        if upright and orientation != 1:
            image = ImageOps.exif_transpose(image)
        return image if image.mode == "RGB" else image.convert("RGB"), orientation  # convert() would copy RGB, too


def empty_input(size, uint8=False):
    """An array for one image: the network's input, float32 [3,height,width], or uint8 [height,width,3] for AIPP."""
    return np.empty(tuple(size) + (3,), np.uint8) if uint8 else np.empty((3,) + tuple(size), "<f4")


def normalise(image, out):
    """Writes a PIL image of mode RGB into an array of empty_input(), as pixels where that is uint8; returns it."""
    from PIL import Image
    height, width = out.shape[:2] if out.dtype == np.uint8 else out.shape[1:]
    resized = image.resize((width, height), Image.BILINEAR)
    if out.dtype == np.uint8:
        out[...] = resized
        return out
    for channel, name, mean, std in zip(out, "RGB", MEAN, STD):
        # One channel at a time: Pillow takes it out of the pixels, and the arithmetic stays in the processor's cache.
        pixels = np.frombuffer(resized.tobytes("raw", name), np.uint8).reshape(height, width)
        np.divide(pixels, 255, out=channel, dtype=np.float32)
        channel -= np.float32(mean)
        channel /= np.float32(std)
    return out


def preprocess(path, out=None, upright=False, size=(SIZE, SIZE)):
    """Returns an image file as the network's input, float32 [3,height,width], or in the array out where there is one.

    size: (height, width), where there is no out. upright: follow the image's EXIF orientation. Raises what Pillow raises,
    or ValueError.
    """
    if out is None:
        out = empty_input(size)
    return normalise(read_image(path, upright)[0], out)


def fault(array):
    """Why an array from a bin cannot be of its kind; None where it can.

    A float32 bin has as many bytes as a uint8 one of twice its height and width, so a wrong size would take one for the other.
    """
    with np.errstate(all="ignore"):
        if array.dtype != np.uint8:  # four pixels, read as a float, may be anything: infinite, or 1e30
            return None if -LIMIT < array.min() and array.max() < LIMIT else "NaN or infinite values, or beyond %d" % LIMIT
        plane = array.size // 12 * 4  # the bytes of a float32 bin's first channel
        red = (array.reshape(-1)[:min(plane, 4096)].view("<f4") * np.float32(STD[0]) + np.float32(MEAN[0])) * 255
        pixels = (np.abs(red - np.rint(red)) < 1e-3) & (red > -1) & (red < 256)
    return "float32 values, not pixels" if pixels.size and pixels.all() else None


def convert(images, bins, array):
    """Writes the bins of images, [(path, bin's file name)], into the folder bins; array is one of empty_input().

    Returns, for each image, None or why it cannot be read, and how many have an EXIF orientation.
    """
    from PIL import Image
    Image.core.set_blocks_max(8)  # Pillow's and our memory serves one image after the other: new memory took a tenth
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
            # ext4 writes to a place allocated at once in two thirds of the time. Whatever is wrong, the write will tell.
            with contextlib.suppress(OSError):
                os.posix_fallocate(f.fileno(), 0, array.nbytes)
            f.write(array.data)
        reasons.append(None)
    return reasons, turned


@contextlib.contextmanager
def uninterrupted():
    """Holds Ctrl-C back in the block, and from the processes that it starts until they ignore it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def start_worker(parent):
    """Makes a worker process leave Ctrl-C to its parent, end when its parent is killed, and keep Pillow's warnings."""
    import ctypes
    import warnings
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG of linux/prctl.h
    if os.getppid() != parent:  # it was killed before that
        os._exit(1)
    warnings.simplefilter("ignore")


def chunks(images, workers):
    """Yields the images in parts: ever fewer at a time, so that all workers end together."""
    start = 0
    while start < len(images):
        end = start + min(CHUNK, -(-(len(images) - start) // (2 * workers)))
        yield images[start:end]
        start = end


def work(parent, pipe, bins, array):
    """A worker process: converts the images that come through the pipe, and sends back what convert() returns."""
    start_worker(parent)
    try:
        while True:
            pipe.send(convert(pipe.recv(), bins, array))
    except EOFError:  # there are no more
        pass
    except OSError as error:
        pipe.send(error)


def start_workers(count, bins, array):
    """Starts at most so many worker processes; returns {our end of its pipe: process}, as many as the system allows."""
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
    except OSError as error:  # a limit of processes or open files
        note("%d of %d processes can be started (%s), so this takes longer" % (len(workers), count, error.strerror))
    return workers


def convert_all(images, bins, array):
    """convert() on all cores; yields its results as they come. Raises OSError where a bin cannot be written."""
    from multiprocessing.connection import wait
    from PIL import Image  # noqa: F401 - once, for all processes
    # Processes, as threads hold each other back in Pillow. No pool, whose threads and queues take time from the images.
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
    finally:  # once they have ended, the caller can rename or delete what they wrote
        for worker in workers.values():
            worker.kill()
            worker.join()


def received(pipe):
    """The next results of a worker. Raises OSError where it could not write, or where it was killed."""
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
    parser.add_argument("--image_info", metavar="IMAGE_TXT", help="the list of images, one file name a line")
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
              "guide's script, so the network sees them lying" % (turned, len(names)))


if __name__ == "__main__":
    command(main)
