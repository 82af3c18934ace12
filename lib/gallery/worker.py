"""A worker of tools/gallery.py: reads the images of a shard, runs the model on them and writes their Parquet file.

A small dict describes a shard: a stretch of a list file, a tar, or a row group of a Parquet file. This file does not depend on
Ray. Each path may be local or a URL that fsspec opens, such as s3://bucket/folder.
"""
import collections
import contextlib
import errno
import functools
import io
import os
import secrets
import tarfile
import tempfile
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

from lib.files import whole_file
from lib.images import preprocess
from lib.names import another_form, inside, is_image
from lib.results import logits_from, probabilities
from lib.script import importing, one_line
from lib.session import empty_batch, input_size, open_session, run_batches

with importing():
    import numpy as np

OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "obs"}  # a file put there appears whole or not at all
MAX_BYTES = 256 * 1000 * 1000  # larger image files in a tar or object store are refused, because they are read into memory
PARQUET_ROWS = 64  # this many rows are read at a time
REMOTE_READERS = 16  # threads that read from an object store, which takes tens of milliseconds to answer
# An OSError with one of these numbers is the image's own fault. After any other, such as a network error, the shard is retried.
IMAGE_ERRORS = {None, errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}
LISTING_LOCK = threading.Lock()


# --- files here and elsewhere ------------------------------------------------------------------------------------------

def is_local(url):
    return "://" not in url


def filesystem(url):
    """Returns (the fsspec file system of a path or URL, the path there). Raises ValueError if no package can open it."""
    from fsspec.core import url_to_fs
    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError("%s: cannot be opened: %s" % (url, one_line(error)))


@contextlib.contextmanager
def whole(url):
    """Yields the name of a local file for the block to write. The file then appears at url, whole or not at all."""
    if is_local(url):
        with whole_file(url) as temporary:
            yield temporary
            with open(temporary, "rb") as f:
                os.fsync(f.fileno())  # without it, a power failure after the rename may leave an empty file
        return
    with tempfile.NamedTemporaryFile(prefix="gallery") as f:
        yield f.name
        put(f.name, *filesystem(url))


def put(name, fs, path):
    """Copies a local file to path on a file system, where it appears whole or not at all."""
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    if protocols & OBJECT_STORES:
        fs.put_file(name, path)
        return
    temporary = "%s.%s.partial" % (path, secrets.token_hex(4))
    fs.put_file(name, temporary)
    if fs.exists(path):  # HDFS cannot rename to an existing name
        fs.rm_file(path)
    fs.mv(temporary, path)


def own_fault(error):
    """Returns whether an image, tar or Parquet file itself is at fault, so that another try would fail in the same way."""
    return not isinstance(error, OSError) or error.errno in IMAGE_ERRORS


def text(name):
    """Returns a name that Parquet can hold. Escapes bytes that are not UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


# --- the images of a shard, each as (its path in the result, its content) ------------------------------------------------
# The content is bytes, or a function that returns bytes or a local path, or an exception if it cannot be read.

def listed_names(shard):
    """Returns the names in a stretch of a list file, by the rules of lib.files.read_lines()."""
    fs, path = filesystem(shard["list"])
    with fs.open(path, "rb") as f:
        f.seek(shard["start"])
        lines = f.read(shard["end"] - shard["start"])
    lines = lines.decode("utf-8-sig" if shard["start"] == 0 else "utf-8")
    return [line.strip() for line in lines.split("\n") if line.strip()]


def of_list(shard):
    root = shard["root"]
    find = functools.partial(local_path, root, listings={}) if is_local(root) else functools.partial(fetch, *filesystem(root))
    for name in listed_names(shard):
        yield name, functools.partial(find, name)


def check_inside(name):
    if not inside(name):  # a list may come from an untrusted source
        raise ValueError("not a file name inside the images' folder")


def local_path(root, name, listings):
    """Returns the path of a listed image. Its file may have another Unicode form of the name than the list."""
    check_inside(name)
    path = os.path.join(root, name)
    if not os.path.lexists(path) and not name.isascii():
        path = root
        for part in name.split("/"):
            with LISTING_LOCK:
                path = os.path.join(path, another_form(path, part, listings))
    if not os.path.lexists(path):
        raise FileNotFoundError("no such file")
    return path


def fetch(fs, root, name):
    """Returns the bytes of a listed image on a remote file system. After its OSError with EIO, the shard is retried."""
    check_inside(name)
    try:
        with fs.open("%s/%s" % (root.rstrip("/"), name), "rb") as f:
            size = getattr(f, "size", None) or 0
            return f.read() if size <= MAX_BYTES else too_large(size)
    except FileNotFoundError:
        raise FileNotFoundError("no such file")
    except Exception as error:  # each file system has its own kinds of errors
        raise OSError(errno.EIO, "%s/%s: %s" % (root, name, one_line(error)))


def too_large(size):
    """Returns the error that stands for the content of a file that is too large."""
    return ValueError("%d bytes are too many" % size)


def of_tar(shard):
    fs, path = filesystem(shard["tar"])
    with fs.open(path, "rb") as f, tarfile.open(fileobj=f, mode="r|*") as tar:
        for member in tar:
            if member.isdir() or not is_image(member.name):
                continue
            if not member.isreg():
                content = ValueError("is a link or another special entry in the tar, not a file")
            elif member.size > MAX_BYTES:
                content = too_large(member.size)
            else:
                content = tar.extractfile(member).read()
            yield "%s/%s" % (shard["tar"], member.name), content


def of_row_group(shard):
    import pyarrow
    import pyarrow.parquet
    columns = [shard["path_column"], shard["bytes_column"]]
    fs, path = filesystem(shard["parquet"])
    with fs.open(path, "rb") as f:
        file = pyarrow.parquet.ParquetFile(f, buffer_size=2 ** 20)
        row = 0
        for batch in file.iter_batches(PARQUET_ROWS, [shard["group"]], columns, use_threads=False):
            table = pyarrow.Table.from_batches([batch]).flatten()  # a column may be a field: image.bytes
            for name, content in zip(*(table.column(column) for column in columns)):
                name, content = name.as_py(), content.as_py()
                if name is None:
                    name = "%s row group %d row %d" % (shard["parquet"], shard["group"], row)
                yield (name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else str(name),
                       ValueError("no bytes") if content is None else content)
                row += 1


def images(shard):
    """Yields (path, content) for each image of a shard. For a damaged tar or Parquet file, yields its path and the error."""
    kind = next(kind for kind in ("list", "tar", "parquet") if kind in shard)
    try:
        for name, content in {"list": of_list, "tar": of_tar, "parquet": of_row_group}[kind](shard):
            yield text(name), content
    except Exception as error:  # tarfile, zlib, lzma and pyarrow have their own kinds
        if not own_fault(error) or kind == "list":
            raise
        yield shard[kind], error


def read(image, row):
    """Writes an image of images() into its row of a batch. Returns None, or why the image cannot be read."""
    _, content = image
    try:
        content = content() if callable(content) else content
        if isinstance(content, Exception):
            raise content
        preprocess(io.BytesIO(content) if isinstance(content, bytes) else content, out=row)
    except Exception as error:  # Pillow raises nearly anything on damaged files
        if not own_fault(error):
            raise
        return text(one_line(error))


# --- a worker -----------------------------------------------------------------------------------------------------------

def versions():
    """Returns the versions of the packages that compute the logits. They must be the same on all machines."""
    import onnxruntime
    import PIL
    return {"onnxruntime": onnxruntime.__version__, "Pillow": PIL.__version__, "numpy": np.__version__}


class Worker(object):
    """Computes shards. job: a dict with the settings that all workers share, from main() in tools/gallery.py."""

    def __init__(self, job):
        self.job = job
        self.under_way = collections.Counter()  # {shard's number: images computed so far}

    def count(self):
        """Returns how many images of the unfinished shards are computed."""
        return sum(list(self.under_way.values()))

    def start(self, model):
        """Opens the model, the bytes of an ONNX file. Raises ValueError if this machine does not fit the job."""
        import pyarrow.parquet  # noqa: F401 - import it now, because that takes a while
        from PIL import Image
        warnings.simplefilter("ignore")  # Pillow warns about damaged files
        Image.core.set_blocks_max(8)  # reuse memory for the next image
        calls, readers = self.job["calls"], self.job["readers"]
        with tempfile.NamedTemporaryFile(prefix="gallery", suffix=".onnx") as f:
            f.write(model)
            f.flush()
            self.session = open_session(f.name, threads=self.job["threads"], calls=calls, provider=self.job["provider"])
        differing = ["%s %s, not %s" % (name, mine, self.job["versions"][name])
                     for name, mine in versions().items() if mine != self.job["versions"][name]]
        if differing:
            raise ValueError("its logits might differ, because it has %s" % ", ".join(differing))
        batch = empty_batch(self.session, *input_size(self.session))
        self.session.run(None, {self.session.get_inputs()[0].name: batch})  # the first call also allocates memory
        self.runners, self.readers = ThreadPoolExecutor(calls), ThreadPoolExecutor(readers)

    def work(self, number, shard):
        """Computes a shard and writes its part. Returns (number of images, number of unreadable ones, one of them and why).

        Several calls may run at the same time. Raises an error if the shard should be tried again.
        """
        self.under_way[number] = 0
        try:
            return self.compute(number, shard)
        finally:
            del self.under_way[number]

    def compute(self, number, shard):
        """Does the work of work()."""
        paths, reasons, parts = [], [], [np.zeros((0, len(self.job["names"])), np.float32)]
        for batch, unread, values in run_batches(self.session, images(shard), read, self.job["calls"], runner=self.runners,
                                                 reader=self.readers):
            paths += [path for path, _ in batch]
            reasons += ["the model gives NaN or infinite values" if reason is None and not finite else reason
                        for reason, finite in zip(unread, np.isfinite(values).all(axis=1))]
            parts.append(self.converted(values))
            self.under_way[number] += len(batch)
        write_part(part_name(self.job["output"], number), self.job["names"], paths, np.concatenate(parts), reasons)
        bad = [(path, reason) for path, reason in zip(paths, reasons) if reason is not None]
        return len(paths), len(bad), bad[:1]

    def converted(self, values):
        """Returns the model's output as logits or probabilities, as the job wants them."""
        if self.job["sigmoid"] and not self.job["probabilities"]:
            return logits_from(values)
        if self.job["probabilities"] and not self.job["sigmoid"]:
            return probabilities(values).astype(np.float32)
        return values


def part_name(output, number):
    return "%s/part-%06d.parquet" % (output, number)


def write_part(url, names, paths, values, reasons):
    """Writes a part: path, a column of values for each attribute, and error. An image with an error has no values."""
    import pyarrow
    import pyarrow.parquet
    bad = np.array([reason is not None for reason in reasons], bool)
    columns = {"path": pyarrow.array(paths, pyarrow.string())}
    columns.update((name, pyarrow.array(np.ascontiguousarray(column), pyarrow.float32(), mask=bad))
                   for name, column in zip(names, values.T))
    columns["error"] = pyarrow.array(reasons, pyarrow.string())
    with whole(url) as temporary:
        pyarrow.parquet.write_table(pyarrow.table(columns), temporary, compression="zstd", use_dictionary=False)
