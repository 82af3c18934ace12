"""Stage 4: the images of a list -> the network's input, one .bin file an image.

    python3 preprocess_deepmar_pytorch.py /home/HwHiAiUser/dataset/peta/images input_bin image.txt
    python3 preprocess_deepmar_pytorch.py --file_path=.../peta/images --bin_path=input_bin --image_info=image.txt

NAME.bin holds float32, little endian, [3,224,224]: ((pixel / 255) - mean) / std of the image as RGB, resized to 224x224
(bilinear, aspect ratio not kept). NAME is the file name up to its first dot. The folder of bins is replaced as a whole
and only if every image could be read, so it holds the images of the list and no others. Runs on all cores.
"""
import argparse
import contextlib
import os
import re
import shutil
import signal
import sys

if __name__ == "__main__":  # until main(), Ctrl-C ends it at once: a library's import makes other errors of it
    interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)
import numpy as np

SIZE = 224                   # height and width of the network's input in pixels
MEAN = (0.485, 0.456, 0.406)  # ImageNet's, as DeepMAR was trained with: red, green, blue
STD = (0.229, 0.224, 0.225)
MAX_PIXELS = 64 * 1000 * 1000  # a larger image is no photograph of a pedestrian, but might exhaust the memory
NAMED = 1000                 # images that an error names at most
CHUNK = 64                   # images that a process is handed at a time, at most: each time costs about 0.5 ms


def read_list(path):
    """Returns the image names in a list file, one a line; blank lines, CRLF and a byte order mark do not count.

    Raises ValueError, with the line, for a name that leaves the images' folder, or that would write the bin of an
    earlier line.
    """
    try:
        with open(path, encoding="utf-8-sig") as f:
            lines = f.read().split("\n")
    except UnicodeDecodeError as error:
        raise ValueError("%s: is not UTF-8 text (byte %d)" % (path, error.start))
    names, seen = [], {}
    outside = re.compile(r"[\0-\x1f\x7f-\x9f]|^/|(^|/)\.\.(/|$)").search
    for number, line in enumerate(lines, 1):
        name = line.strip()
        if not name:
            continue
        if len(name) > 1000 or outside(name):
            raise ValueError("%s: line %d: %r is not a file name inside the images' folder" % (path, number, name[:200]))
        bin_name = stem(name)
        if not bin_name:
            raise ValueError("%s: line %d: %r has nothing before its first dot to name a bin after"
                             % (path, number, name))
        if bin_name in seen:
            raise ValueError("%s: lines %d and %d would both write %s.bin; each image's name up to its first dot must "
                             "be its own" % (path, seen[bin_name], number, bin_name))
        seen[bin_name] = number
        names.append(name)
    if not names:
        raise ValueError("%s: names no image; it needs one file name a line" % path)
    return names


def stem(name):
    """What a file is called in every later stage: its name, without folders, up to the first dot."""
    return os.path.basename(name).split(".")[0]


def joined(items, separator=", "):
    """All items as text, so that the user can mend all at once; of more than NAMED the first ones."""
    return separator.join(items[:NAMED] + ["..."] * (len(items) > NAMED))


def preprocess(path, out=None):
    """Returns an image file as the network's input, float32 [3,224,224], in the array out where there is one.

    Raises what Pillow raises, or ValueError.
    """
    from PIL import Image
    if not os.path.isfile(path):
        raise ValueError("not a regular file")  # reading a FIFO would wait for ever
    with Image.open(path) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError("%d x %d pixels are too many" % image.size)
        if image.format == "EPS":  # Pillow would let Ghostscript run it
            raise ValueError("PostScript is a program; save it as a picture")
        image.load()  # the mode of some formats is known only then
        if image.mode[0] in "IF":  # convert() would clip these at 255 instead of scaling them
            raise ValueError("more than 8 bits a channel (mode %s); save it with 8" % image.mode)
        rgb = image if image.mode == "RGB" else image.convert("RGB")  # which would copy RGB, too
        resized = rgb.resize((SIZE, SIZE), Image.BILINEAR)
    result = np.empty((3, SIZE, SIZE), "<f4") if out is None else out
    for channel, name, mean, std in zip(result, "RGB", MEAN, STD):
        # One channel at a time: Pillow takes it out of the pixels, and the arithmetic stays in the processor's cache.
        pixels = np.frombuffer(resized.tobytes("raw", name), np.uint8).reshape(SIZE, SIZE)
        np.divide(pixels, 255, out=channel, dtype=np.float32)
        channel -= np.float32(mean)
        channel /= np.float32(std)
    return result


def convert(images, bins, names):
    """Writes the bins of images; returns, for each, None or why it cannot be read."""
    from PIL import Image
    Image.core.set_blocks_max(8)  # Pillow's and our memory serves one image after the other: new memory took a tenth
    reasons, array = [], np.empty((3, SIZE, SIZE), "<f4")
    for name in names:
        path = os.path.join(images, name)
        try:
            preprocess(path, out=array)
        except Exception as error:  # Pillow raises nearly anything on damaged files
            reasons.append("%s: %s" % (path, str(error).replace("\n", " ") or repr(error)))
            continue
        with open(os.path.join(bins, stem(name) + ".bin"), "wb") as f:
            # ext4 writes to a place allocated at once in two thirds of the time. Whatever is wrong, the write will tell.
            with contextlib.suppress(OSError):
                os.posix_fallocate(f.fileno(), 0, array.nbytes)
            f.write(array.data)
        reasons.append(None)
    return reasons


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


def work(parent, taken, workers, sender, images, bins, names):
    """A worker process: converts its share of the names, sends the results of convert() and at last any OSError."""
    start_worker(parent)
    try:
        while taken.value < len(names):
            with taken.get_lock():
                start = taken.value
                # Ever fewer at a time, so that all processes end together.
                taken.value += min(CHUNK, -(-(len(names) - start) // (2 * workers)))
                end = taken.value
            sender.send(convert(images, bins, names[start:end]))
    except OSError as error:
        sender.send(error)


def convert_all(images, bins, names):
    """convert() on all cores; yields its results as they come. Raises OSError where a bin cannot be written."""
    import multiprocessing
    from multiprocessing.connection import wait
    from PIL import Image  # noqa: F401 - once, for all processes
    context = multiprocessing.get_context("fork")
    # Processes, as threads hold each other back in Pillow. No pool, whose threads and queues take time from the images.
    count, taken, workers = min(len(os.sched_getaffinity(0)), len(names)), context.Value("q", 0), {}
    try:
        for _ in range(count):
            receiver, sender = context.Pipe(duplex=False)
            worker = context.Process(target=work, daemon=True, args=(
                os.getpid(), taken, count, sender, images, bins, names))
            with uninterrupted():
                worker.start()
            workers[receiver] = worker
            sender.close()
        while workers:
            for receiver in wait(list(workers)):
                try:
                    results = receiver.recv()
                except EOFError:
                    worker = workers.pop(receiver)
                    worker.join()
                    if worker.exitcode:
                        raise OSError("a worker process was killed; was the memory exhausted?")
                    continue
                if isinstance(results, OSError):
                    raise results
                yield from results
    except BaseException:  # above all Ctrl-C; once they have ended, the caller can delete what they wrote
        for worker in multiprocessing.active_children():
            worker.kill()
            worker.join()
        raise


@contextlib.contextmanager
def replaced_folder(path, ending=".bin"):
    """Yields an empty folder beside path; if the block succeeds it becomes path, in place of an earlier one.

    The earlier one may hold names of this ending only, so that a mistyped path deletes nothing else. Raises ValueError
    or OSError.
    """
    import fcntl
    path = os.path.realpath(path)
    if os.path.exists(path):
        others = sorted(name for name in os.listdir(path) if not name.endswith(ending))
        if others:
            raise ValueError("%s: holds %s, which is no .bin file; give a new folder, or one of an earlier run"
                             % (path, others[0]))
    partial, old = path + ".partial", path + ".old"
    os.makedirs(partial, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(lock), os.stat(partial)):
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError):
            raise ValueError("%s: another run is writing this folder" % path)
        for entry in list(os.scandir(partial)):  # by a run that was killed
            (shutil.rmtree if entry.is_dir(follow_symlinks=False) else os.remove)(entry.path)
        if os.path.exists(old) and not os.path.exists(path):  # killed between the two renames below
            os.rename(old, path)
        shutil.rmtree(old, ignore_errors=True)
        try:
            yield partial
            if os.path.exists(path):
                os.rename(path, old)
            os.rename(partial, path)
        except BaseException as error:
            if os.path.exists(old) and not os.path.exists(path):  # interrupted between the two renames
                os.rename(old, path)
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) and error.errno and not error.filename:  # a full disk
                raise OSError("%s: %s" % (path, error.strerror))
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        os.close(lock)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        usage="preprocess_deepmar_pytorch.py IMAGES BIN_DIR IMAGE_TXT\n"
              "       preprocess_deepmar_pytorch.py --file_path IMAGES --bin_path BIN_DIR --image_info IMAGE_TXT")
    parser.add_argument("positional", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--file_path", metavar="IMAGES", help="the folder of the images")
    parser.add_argument("--bin_path", metavar="BIN_DIR", help="the folder of bins to write")
    parser.add_argument("--image_info", metavar="IMAGE_TXT", help="the list of images, one file name a line")
    args = parser.parse_args(argv)
    named = [args.file_path, args.bin_path, args.image_info]
    if args.positional and any(value is not None for value in named):
        parser.error("give the arguments either in their order or by name, not both")
    values = args.positional or named
    if len(values) != 3 or None in values:
        parser.error("give IMAGES, BIN_DIR and IMAGE_TXT")
    images, bins, image_txt = values

    names = read_list(image_txt)
    if not os.path.isdir(images):
        raise FileNotFoundError("%s: no such folder; the first argument is the images' folder" % images)
    missing = [name for name in names if not os.path.lexists(os.path.join(images, name))]
    if missing:
        raise FileNotFoundError("%d of the %d images in %s are not in %s: %s"
                                % (len(missing), len(names), image_txt, images, joined(missing)))
    with replaced_folder(bins) as partial:
        results = convert_all(images, partial, names)
        if sys.stderr.isatty():
            with contextlib.suppress(ImportError):  # this script alone, in another checkout: no bar then
                from tqdm import tqdm
                results = tqdm(results, total=len(names), unit="image", delay=2, leave=False)
        bad = [reason for reason in results if reason]
        if bad:
            raise ValueError("%d of %d images cannot be read, so nothing was written (the other %d are fine): %s"
                             % (len(bad), len(names), len(names) - len(bad), joined(sorted(bad), "; ")))
    print("%s: %d images -> %d bins of float32 [3,%d,%d]" % (bins, len(names), len(names), SIZE, SIZE))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupt)
    try:
        main()
    except (OSError, ValueError, ImportError) as error:
        sys.exit("preprocess_deepmar_pytorch.py: error: %s" % error)
    except KeyboardInterrupt:
        sys.exit("preprocess_deepmar_pytorch.py: interrupted; no file is half written")
