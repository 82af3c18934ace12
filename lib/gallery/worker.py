"""A worker of tools/gallery.py: reads the images of a shard, runs the model on them and writes their part.

A small dict describes a shard: a stretch of a list file, a tar, or a row group of a Parquet file. Each of these, and the images,
may be local or at any url that fsspec opens.

An image gets a row with an error only for what belongs to it alone: its bytes, or that it is missing or may not be read, while
other images can be. Everything else is a fault of the storage, the network or this machine. The shard then has no part and is
tried again.
"""
import collections
import contextlib
import errno
import functools
import io
import multiprocessing
import os
import posixpath
import re
import stat
import tempfile
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from lib.acl import PROVIDER as OM
from lib.gallery.archive import Tar
from lib.gallery.parts import write_part
from lib.gallery.rows import read_rows
from lib.gallery.shards import names_of
from lib.gallery.source import Damaged, Source
from lib.gallery.storage import FULL, IMAGE_ERRORS, fetched, filesystem, image_at, is_local, read_range
from lib.images import normalise, read_image
from lib.machine import end_with, uninterrupted
from lib.names import ENDINGS, is_image
from lib.providers import CPU
from lib.results import logits_from, probabilities
from lib.script import importing, one_line, some
from lib.session import callers, empty_batch, infer, input_size, open_session, run_batches

with importing():
    import numpy as np

MAX_BYTES = 256 * 1000 * 1000  # larger image files are refused, because they are read into memory
MAX_ENDINGS = 30  # so many endings of members that are no images are counted apart
REMOTE_READERS = 16  # threads that read from an object store, which takes tens of milliseconds to answer
TRIES = 2  # an image that so often kills the process that decodes it is at fault

# kind: "done"; "damaged" (the shard itself is at fault, so that another try is useless); "again" (the storage, the network or
# this machine is at fault); "full" (the output has no room). counts: {"images": n, "errors": n, "turned": how many images
# tools/predict.py would turn, "left_out": {ending: members of a tar that are no images by their names}}. example: [(path, why)]
# of one unreadable image. text: why it is not done, on one line. Only a shard that is done has counts and an example.
Result = collections.namedtuple("Result", "kind counts example text")


def text(name):
    """Returns a name that Parquet can hold. Escapes bytes that are not UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


# --- the images of a shard, each as (its path in the result, its content) ------------------------------------------------
# The content is bytes, or a function that reads and returns the bytes, or an exception if it cannot be read.

def of_list(shard):
    read = reader(shard["root"])
    for name in names_of(read_range(shard["list"], shard["start"], shard["end"]), shard["start"]):
        yield name, functools.partial(read, name)


def reader(root):
    """Returns a function that returns the bytes of the image with this name in the folder root.

    It raises OSError, or ValueError if the name or the file cannot be that of an image.
    """
    # fsspec makes a file system for each thread that asks for one; a single one keeps the number of connections low
    return functools.partial(read_local, root, {}) if is_local(root) else \
        functools.partial(read_elsewhere, root, *filesystem(root))


def read_local(root, listings, name):
    with open(image_at(root, name, listings), "rb", 0, opener=open_at_once) as f:
        found = os.fstat(f.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("not a regular file")
        check_size(found.st_size)
        return f.readall()


def open_at_once(path, flags):
    return os.open(path, flags | os.O_NONBLOCK)  # otherwise, opening a FIFO would wait for ever


def read_elsewhere(root, fs, folder, name):
    url = image_at(root, name)
    content = fetched(fs, folder.rstrip("/") + url[len(root.rstrip("/")):], url, 0, MAX_BYTES + 1)  # one request
    check_size(len(content))
    return content


def check_size(size):
    if size > MAX_BYTES:
        raise ValueError("%d bytes or more are too many" % size)


def of_tar(shard, job, left_out):
    """Yields the images of a tar. left_out: a Counter of the endings of other members."""
    seen, twice = set(), []
    try:
        with Source(shard["tar"]) as source:
            tar = Tar(source)
            for member in tar:
                if not is_image(member.name):
                    count_ending(left_out, member.name)
                    continue
                name = posixpath.normpath(member.name)
                if name in seen and job["duplicates"] != "keep":
                    twice.append(name)
                seen.add(name)
                if not twice:  # else nothing will be written
                    yield "%s/%s" % (shard["tar"], member.name), content_of(tar, member)
        if left_out and not seen:
            raise Damaged("holds no image (%s), but %s" % (" ".join(ENDINGS), endings(left_out)))
    except Damaged as error:
        if job["damaged"] != "keep":
            raise
        yield shard["tar"], error
    if twice:
        raise Damaged("%d members have the name of an earlier one: %s; --duplicates keep gives each a row"
                      % (len(twice), some(twice)))


def content_of(tar, member):
    """Returns the content of a tar's member."""
    if not member.isreg():
        return ValueError("is a link or another special entry in the tar, not a file")
    try:
        check_size(max(member.size, tar.offset - tar.place))
    except ValueError as error:
        return error
    return tar.content(member)


def count_ending(left_out, name):
    """Adds a member that is no image to a Counter of endings. Names that begin with a dot count as "hidden"."""
    name = name.rpartition("/")[2]
    ending = "hidden" if name.startswith(".") else text(os.path.splitext(name)[1].lower())
    left_out[ending if ending in left_out or len(left_out) < MAX_ENDINGS else "other"] += 1


def endings(left_out):
    """Returns such a Counter as text."""
    return some(("%d files %s" % (number, "that end in %s" % ending if ending.startswith(".") else
                                  "of %s names" % ending if ending else "without an ending")
                 for ending, number in left_out.most_common()))


def of_row_group(shard):
    with Source(shard["parquet"]) as source:
        rows = read_rows(source, shard["group"], shard["images"], (shard["path_column"], shard["bytes_column"]))
        for row, (name, content) in enumerate(rows):
            if not isinstance(content, (bytes, Exception)):  # a text is never taken for a path
                content = ValueError("no bytes" if content is None else "a value of type %s, not bytes" % type(content).__name__)
            if isinstance(name, Exception):
                name, content = None, name
            if name is None:
                name = "%s row group %d row %d" % (shard["parquet"], shard["group"], row)
            yield name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else str(name), content


# --- decoding an image ---------------------------------------------------------------------------------------------------

def decode(content, row):
    """Writes an image, given as bytes, into its row of a batch. Returns (None or why it cannot be read, whether it is turned).

    See lib.images.turned(). Raises MemoryError or OSError if this machine is at fault.
    """
    try:
        image, turned = read_image(io.BytesIO(content))
        normalise(image, row)
        return None, turned
    except Exception as error:  # Pillow raises nearly anything on damaged files; its own OSErrors have no errno
        memory = isinstance(error, MemoryError) or "out of memory" in str(error)
        if memory or isinstance(error, OSError) and error.errno is not None:
            raise
        return text(re.sub(" <_io.BytesIO object at 0x[0-9a-f]+>", "", one_line(error))), False


def decode_apart(content, shape, dtype):
    """Does the work of decode() in another process. Returns (the row, None or why not, whether it is turned)."""
    row = np.zeros(shape, dtype)
    return (row,) + decode(content, row)


class Apart(object):
    """Decodes images in a process that does nothing else, one at a time, because one of them kills processes."""

    def __init__(self):
        self.pool, self.lock, self.ended = None, threading.Lock(), False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with self.lock:
            self.ended = True
            self.close()

    def decode(self, content, row):
        """Does the work of decode(). An image that kills the process TRIES times cannot be read."""
        with self.lock:
            for _ in range(TRIES):
                try:
                    row[...], reason, turned = self.started(row).submit(decode_apart, content, row.shape, row.dtype).result()
                    return reason, turned
                except BrokenProcessPool:
                    self.close()
            return "kills the process that decodes it", False

    def started(self, row):
        """Returns the pool of the process, which is started if there is none. Raises OSError if that fails."""
        if self.pool is None:
            if self.ended:
                raise OSError("the shard is given up")
            self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), end_with, (os.getpid(),))
            try:
                with uninterrupted():
                    trial = self.pool.submit(decode_apart, b"", row.shape, row.dtype)
                trial.result()
            except BrokenProcessPool:
                self.close()
                raise OSError("a process for decoding cannot be started; is there memory left?")
        return self.pool

    def close(self):
        if self.pool is not None:
            self.pool.shutdown()
            self.pool = None


# --- a worker -----------------------------------------------------------------------------------------------------------

def versions(provider=None):
    """Returns the versions of the packages that compute the logits. They must be the same on all machines."""
    import PIL
    found = {"Pillow": PIL.__version__, "numpy": np.__version__}
    if provider != OM:
        import onnxruntime
        found["onnxruntime"] = onnxruntime.__version__
    return found


class Again(Exception):
    """The storage, the network or this machine is at fault."""


def kind_of(error):
    """Returns what an error of reading is: equal for two errors of the same kind."""
    return isinstance(error, OSError) and error.errno


def why(error):
    """Returns the reason of an error on one line, without the file's name if it is one of IMAGE_ERRORS."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return text(os.strerror(error.errno).lower() if kind_of(error) in IMAGE_ERRORS else one_line(error))


class Images(object):
    """The images of a shard while they are read. Its methods are called by several threads."""

    def __init__(self, shard, job, decode):
        self.shard, self.job, self.decode = shard, job, decode
        self.left_out = collections.Counter()
        self.suspects = []  # (path, content, error) of each image that may not be at fault itself
        self.turned = []    # an item for each image that is turned

    def __iter__(self):
        shard = self.shard
        for name, content in (of_list(shard) if "list" in shard else of_row_group(shard) if "parquet" in shard else
                              of_tar(shard, self.job, self.left_out)):
            yield text(name), content

    def read(self, image, row):
        """Writes an image into its row of a batch. Returns None, or why the image cannot be read."""
        path, content = image
        try:
            content = content() if callable(content) else content
        except OSError as error:
            if kind_of(error) not in IMAGE_ERRORS:
                raise
            self.suspects.append((path, image[1], error))
            return why(error)
        except ValueError as error:
            return why(error)
        if isinstance(content, Exception):
            return why(content)
        reason, turned = self.decode(content, row)
        if turned:
            self.turned.append(path)
        return reason

    def check_suspects(self, fit, readers):
        """Raises Again unless each image that could not be read is itself at fault. fit: see Worker.fit(). readers: threads."""
        def check_fit():
            fault = fit()
            if fault:
                path, _, error = self.suspects[0]
                raise Again("%s: %s, but %s" % (path, why(error), fault))

        def check(suspect):
            path, content, error = suspect
            try:
                content()
                now = None
            except (OSError, ValueError) as other:
                now = other
            if kind_of(now) != kind_of(error):
                raise Again("%s: %s, and then %s" % (path, why(error), why(now) if now else "it could be read"))

        if self.suspects:
            check_fit()
            list(readers.map(check, self.suspects))
            check_fit()


class Worker(object):
    """Computes shards. job: a dict with the settings that all workers share, from main() in tools/gallery.py."""

    def __init__(self, job):
        self.job = job
        self.under_way = collections.Counter()  # {shard's number: images computed so far}

    def count(self):
        """Returns how many images of the unfinished shards are computed."""
        return sum(list(self.under_way.values()))

    def start(self, model):
        """Opens the model, an ONNX file or an OM, given as its bytes or a path.

        Raises ValueError or ImportError if this machine does not fit the job.
        """
        import pyarrow.parquet  # noqa: F401 - import it now, because that takes a while
        from PIL import Image
        warnings.simplefilter("ignore")  # Pillow warns about damaged files
        Image.core.set_blocks_max(8)  # reuse memory for the next image
        differing = ["%s %s, not %s" % (name, mine, self.job["versions"][name])
                     for name, mine in versions(self.job["provider"]).items() if mine != self.job["versions"][name]]
        if differing:
            raise ValueError("its logits might differ, because it has %s" % ", ".join(differing))
        calls = self.job["calls"]
        with contextlib.ExitStack() as stack:
            name = model
            if isinstance(model, bytes):
                f = stack.enter_context(tempfile.TemporaryFile())  # it has no name that a killed worker could leave behind
                f.write(model)
                f.flush()
                name = "/proc/self/fd/%d" % f.fileno()
            try:
                self.session = open_session(name, self.job["device_id"], self.job["threads"], calls, self.job["provider"],
                                            twin=self.job["twin"])
                if self.job["provider"] != CPU:  # a device may not work; on a CPU, this would only take as long as a batch
                    infer(self.session, empty_batch(self.session, *input_size(self.session)))
            except ImportError:
                raise
            except Exception as error:  # ONNX Runtime's own exceptions do not reach another process
                raise ValueError("the model cannot be opened: %s" % one_line(error).replace(name + ": ", ""))
        self.runners, self.readers = callers(calls), ThreadPoolExecutor(self.job["readers"])

    def fit(self):
        """Returns None, or on one line why one of the job's witnesses cannot be read here."""
        for witness in self.job["witnesses"]:
            try:
                if "file" in witness:
                    read_range(witness["file"], 0, 1)
                else:
                    reader(witness["root"])(witness["name"])
            except (OSError, ValueError) as error:
                return text("%s cannot be read here: %s" % (
                    witness.get("file") or "%s/%s" % (witness["root"], witness["name"]), why(error)))
        return None

    def work(self, number, shard, careful=False):
        """Computes a shard and writes its part. Returns a Result. Several calls may run at the same time.

        careful: a worker died with this shard, so that each image is decoded in a process that does nothing else.
        """
        self.under_way[number] = 0
        try:
            with Apart() as apart:
                return self.compute(number, shard, Images(shard, self.job, apart.decode if careful else decode))
        except Damaged as error:
            return Result("damaged", None, [], text("%s: %s" % (shard.get("tar") or shard["parquet"], error)))
        except Exception as error:  # those of file systems and ONNX Runtime do not reach another process
            name = "" if isinstance(error, (Again, OSError, ValueError)) else type(error).__name__ + ": "
            return Result("again", None, [], text(name + one_line(error)))
        finally:
            del self.under_way[number]

    def compute(self, number, shard, images):
        """Does the work of work()."""
        paths, reasons, parts = [], [], [np.zeros((0, len(self.job["names"])), np.float32)]
        for batch, unread, values in run_batches(self.session, images, images.read, self.job["calls"], runner=self.runners,
                                                 reader=self.readers):
            paths += [path for path, _ in batch]
            reasons += ["the model gives NaN or infinite values" if reason is None and not finite else reason
                        for reason, finite in zip(unread, np.isfinite(values).all(axis=1))]
            parts.append(self.converted(values))
            self.under_way[number] += len(batch)
        if len(paths) != shard.get("images", len(paths)):
            raise Again("%s: gives %d images, not %d" % (shard.get("list") or shard["parquet"], len(paths), shard["images"]))
        images.check_suspects(self.fit, self.readers)
        bad = [(path, reason) for path, reason in zip(paths, reasons) if reason is not None]
        counts = {"images": len(paths), "errors": len(bad), "turned": len(images.turned), "left_out": dict(images.left_out)}
        try:
            write_part(self.job["output"], number, self.job["run"], self.job["names"], paths, np.concatenate(parts), reasons,
                       counts)
        except OSError as error:
            return Result("full" if error.errno in FULL | {errno.EROFS} else "again", None, [], text(one_line(error)))
        return Result("done", counts, bad[:1], None)

    def converted(self, values):
        """Returns the model's output as logits or probabilities, as the job wants them."""
        if self.job["kind"] == "probabilities" and not self.job["probabilities"]:
            return logits_from(values)
        if self.job["kind"] == "logits" and self.job["probabilities"]:
            return probabilities(values).astype(np.float32)
        return values
