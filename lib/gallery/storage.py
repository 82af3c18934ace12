"""Files on this machine and on any file system that fsspec opens, for tools/gallery.py.

A url is a local path or an address such as s3://bucket/folder. Whatever a file system raises reaches the caller as an OSError of
one line.
"""
import contextlib
import errno
import hashlib
import io
import os
import re
import secrets
import stat
import tempfile
import threading
import time
import urllib.parse

from lib.files import whole_file
from lib.names import another_form, inside
from lib.script import note, one_line

OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "obs"}  # a file put there appears whole or not at all
BLOCK = 4 * 2 ** 20  # bytes; a remote file that is read in order is fetched in requests of about this size
WAITS = (4, 8, 16, 32, 64)  # seconds; after these, what storage, network or a worker refused is tried again
CHECKSUMS = ("ETag", "etag", "md5Hash", "content_md5", "Content-MD5", "crc32c")  # a listing's keys of a checksum
# An OSError with one of these numbers may be an image's own fault, if other images can be read. Any other is not.
IMAGE_ERRORS = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}
FULL = {errno.ENOSPC, errno.EDQUOT}
EXCLUSIVE = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"}  # pipe_file(mode="create") is one request to these
KINDS = {401: PermissionError, 403: PermissionError, 404: FileNotFoundError}  # what these statuses of HTTP mean
WEB = re.compile("https?://")
LISTING_LOCK = threading.Lock()
NUMBERS = ((FileNotFoundError, errno.ENOENT), (PermissionError, errno.EACCES), (FileExistsError, errno.EEXIST))


# --- addresses ---------------------------------------------------------------------------------------------------------

def is_local(url):
    """Returns whether a url of absolute() is a path of this machine. Its name may hold a colon or ::."""
    return "://" not in url


def absolute(url):
    """Returns a local path in its absolute form, also for file:///x, and another url without a slash at its end."""
    url = re.sub("^(file|local)://(localhost(?=/))?", "", url)
    return os.path.abspath(url) if is_local(url) else url.rstrip("/")


def split_chain(url):
    """Returns (the part of a url that names the file, the rest), with the rest of fsspec's zip://a.png::s3://bucket/x.zip."""
    first, separator, rest = url.partition("::")
    return (first, separator + rest) if "://" in first and "://" in rest else (url, "")


def join(url, name):
    """Returns the url of a name in a folder."""
    folder, rest = split_chain(url)
    return "%s%s%s%s" % (folder, "" if folder.endswith("/") else "/", name, rest)


def filesystem(url):
    """Returns (the fsspec file system of a url, the path there). Raises ValueError if no package can open it."""
    from fsspec.core import url_to_fs
    if is_local(url):
        from fsspec.implementations.local import LocalFileSystem
        return LocalFileSystem(), url
    first = url.partition("::")[0]
    try:
        with reached(url):
            if "://" not in first or split_chain(url)[1]:  # file systems in a chain
                return url_to_fs(url)
            fs, _ = url_to_fs(first)  # a name may hold ::
            return fs, fs._strip_protocol(url)
    except OSError as error:
        if isinstance(error.__cause__, (ImportError, ValueError)):
            raise ValueError("%s: cannot be opened: %s" % (url, one_line(error.__cause__)))
        raise


def protocols(fs):
    return {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)


# --- errors ------------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def reached(url):
    """In the block, each error of a file system becomes an OSError that says "url: why" on one line.

    A missing file gives FileNotFoundError and ENOENT, refused access PermissionError and EACCES. Another OSError keeps its errno.
    All else, such as the errors of botocore and aiohttp, has EIO.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (OSError, ValueError)) and str(error).startswith(url + ": "):
            raise
        raise as_oserror(url, error) from error


def as_oserror(url, error):
    """Returns the OSError for an error of a file system."""
    cause = error
    if isinstance(error, FileNotFoundError) and error.__cause__ and WEB.match(url):
        cause = error.__cause__  # fsspec calls a web server's file "not found" whatever went wrong
    status = http_status(cause)
    kind = KINDS.get(status) if status else next((kind for kind, _ in NUMBERS if isinstance(cause, kind)), None)
    number = dict(NUMBERS).get(kind) or getattr(cause, "errno", None) or errno.EIO
    text = cause.strerror if type(cause).__str__ is OSError.__str__ and cause.strerror else one_line(cause)
    if kind is FileNotFoundError:
        text = "no such file or folder"
    elif status and hasattr(cause, "message"):  # aiohttp
        text = "%d %s" % (status, cause.message)
    elif isinstance(cause, KeyError) or not str(cause):
        text = repr(cause)
    told = (kind or OSError)("%s: %s" % (url, text))
    told.errno = number
    return told


def http_status(error):
    """Returns the status of the HTTP answer that an error stands for, or None."""
    for source in (error, getattr(error, "__cause__", None)):
        response = getattr(source, "response", None)  # botocore
        if isinstance(response, dict):
            return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        for name in ("status", "status_code", "code"):  # aiohttp, azure, gcsfs
            if isinstance(getattr(source, name, None), int):
                return getattr(source, name)


def patiently(function, url, first=False):
    """Returns function(url). Tries again, after WAITS, what storage or network refused; not what is missing, forbidden or full.

    first: whether this may be the first request of a run. Then it is not repeated if no server answers.
    """
    for wait in WAITS:
        try:
            return function(url)
        except OSError as error:
            final = is_local(url) or isinstance(error, (FileNotFoundError, PermissionError)) or error.errno in FULL
            if final or first and not http_status(error.__cause__):
                raise
            note("%s; trying again" % error)
            time.sleep(wait)
    return function(url)


# --- reading -----------------------------------------------------------------------------------------------------------

def read_range(url, start=0, end=None):
    """Returns a file's bytes from start to end, fewer if the file ends before. It is one request where there are any.

    end=None: the whole file. Raises OSError as reached() does.
    """
    if is_local(url):
        with open_binary(url) as f:
            f.seek(start)
            return f.read() if end is None else f.read(end - start)
    fs, path = filesystem(url)
    return fetched(fs, path, url, start, end)


def fetched(fs, path, url, start, end):
    """Does the work of read_range() for a path of a remote file system."""
    with reached(url):
        if not fs.async_impl:  # its cat_file() opens the file, too, and that of HDFS fails for a range
            with fs.open(path, "rb") as f:
                f.seek(start)
                return f.read() if end is None else f.read(end - start)
        try:
            content = fs.cat_file(path, start=start, end=end) if end is not None else fs.cat_file(path)
        except Exception as error:
            if http_status(error) == 416:  # the range begins at the end of the file
                return b""
            raise
    return content if end is None or len(content) <= end - start else content[start:end]  # some web servers always send all


class Reached(io.RawIOBase):
    """An open file whose errors are those of reached()."""

    def __init__(self, url):
        self.url = url
        self.fs, self.path = (None, url) if is_local(url) else filesystem(url)
        with reached(url):
            self.file = self.fs.open(self.path, "rb", block_size=BLOCK) if self.fs else open(url, "rb", 0)

    def readable(self):
        return True

    def seekable(self):
        return True

    def call(self, method, *arguments):
        """Calls a method of the file."""
        with reached(self.url):
            try:
                return getattr(self.file, method)(*arguments)
            except ValueError:
                if not WEB.match(self.url) or not hasattr(self.file, "fs"):
                    raise
            position, copy = self.file.tell(), tempfile.TemporaryFile()  # this server only sends whole files, not parts
            self.fs.get_file(self.path, copy)
            self.file.close()
            self.file = copy
            self.file.seek(position)
            return getattr(self.file, method)(*arguments)

    def readinto(self, buffer):
        content = self.call("read", len(buffer))
        buffer[:len(content)] = content
        return len(content)

    def seek(self, offset, whence=0):
        return self.call("seek", offset, whence)

    def tell(self):
        return self.file.tell()

    def close(self):
        if not self.closed and hasattr(self, "file"):
            self.file.close()
        super().close()


def open_binary(url):
    """Opens a file for reading. Opening and reading raise OSError as reached() does."""
    return io.BufferedReader(Reached(url), 2 ** 20)


def is_folder(url):
    """Returns whether a url is a folder, not a file. Raises FileNotFoundError if it is neither."""
    with reached(url):
        if is_local(url):
            return stat.S_ISDIR(os.stat(url).st_mode)
        fs, path = filesystem(url)
        return fs.info(path)["type"] == "directory"


def image_at(root, name, listings=None):
    """Returns the url of a listed image. Raises ValueError if its name leaves the root, as a list may come from anyone.

    A local file may have another Unicode form of the name than the list. listings: a dict that keeps what is found for that.
    """
    if not inside(name):
        raise ValueError("not a file name inside the images' folder")
    url = "%s/%s" % (root.rstrip("/"), urllib.parse.quote(name) if WEB.match(root) else name)
    if is_local(root) and not name.isascii() and not os.path.lexists(url):
        url, listings = root, {} if listings is None else listings
        for part in name.split("/"):
            with LISTING_LOCK:
                url = os.path.join(url, another_form(url, part, listings))
    return url


def read_image(root, name, end):
    """Returns the first bytes of a listed image, as read_range() does. Raises ValueError as image_at() does."""
    url = image_at(root, name)
    if not is_local(root):
        fs, path = filesystem(root)  # of the root alone, because a name may hold ::
        return fetched(fs, path.rstrip("/") + url[len(root.rstrip("/")):], url, 0, end)
    if os.path.exists(url) and not os.path.isfile(url):
        raise ValueError("not a regular file")
    return read_range(url, 0, end)


def size_and_checksum(url):
    """Returns (a file's size in bytes, its checksum): a local file's SHA-256, else what the file system has, or None."""
    if is_local(url):
        digest, size = hashlib.sha256(), 0
        with open_binary(url) as f:
            for block in iter(lambda: f.read(2 ** 20), b""):
                digest.update(block)
                size += len(block)
        return size, digest.hexdigest()
    fs, path = filesystem(url)
    with reached(url):
        return of_listing(fs.info(path))


def of_listing(entry):
    """Returns (bytes, checksum or None) of a file by its entry in a listing."""
    return entry.get("size"), next((str(entry[name]).strip('"') for name in CHECKSUMS if entry.get(name)), None)


def entries(url):
    """Returns what a remote folder holds, by fsspec's listing and never from its cache: [(name, entry)]."""
    fs, path = filesystem(url)
    with reached(url):
        fs.invalidate_cache()
        found = fs.ls(path, detail=True)
        fs.invalidate_cache()  # it would hold all names that were listed
    names = [(entry["name"].rstrip("/"), entry) for entry in found]
    names = [("" if name == path.rstrip("/") else name.rpartition("/")[2], entry) for name, entry in names]
    # An object store may have an empty file of the folder's own name.
    return [(name, entry) for name, entry in names if name or entry["type"] == "directory"]


def names_in(url):
    """Returns the names in a folder, [] if there is no such folder."""
    try:
        with reached(url):
            return sorted(os.listdir(url) if is_local(url) else (name for name, _ in entries(url)))
    except FileNotFoundError:
        return []


# --- writing -----------------------------------------------------------------------------------------------------------

def write(url, content):
    """Writes bytes to a file, which appears whole or not at all and replaces an earlier one. Raises OSError as reached() does."""
    with reached(url):
        if is_local(url):
            try:
                with whole_file(url) as temporary:
                    write_local(temporary, content)
            except OSError as error:
                raise error.__context__ or error  # whole_file()'s own has no errno
            return
        fs, path = filesystem(url)
        if protocols(fs) & OBJECT_STORES:
            fs.pipe_file(path, content)
            return
        temporary = put_beside(fs, path, content)
        if fs.exists(path):  # HDFS cannot rename to an existing name
            fs.rm_file(path)
        fs.mv(temporary, path)


def create(url, content):
    """Writes bytes to a new file, which appears whole or not at all. Returns False if the file exists.

    Where the file system can, only one of several machines that do this at the same time succeeds.
    """
    with reached(url):
        if is_local(url):
            return create_local(url, content)
        fs, path = filesystem(url)
        if protocols(fs) & EXCLUSIVE:
            try:
                fs.pipe_file(path, content, mode="create")
            except Exception as error:
                if isinstance(error, FileExistsError) or http_status(error) in (409, 412):
                    return False
                if http_status(error) != 501:  # this server knows no such request
                    raise
            else:
                return True
        if fs.exists(path):
            return False
        if protocols(fs) & OBJECT_STORES:
            fs.pipe_file(path, content)
            return True
        temporary = put_beside(fs, path, content)
        try:
            fs.mv(temporary, path)  # on HDFS it fails if another machine was faster
        except Exception:
            fs.rm_file(temporary)
            if fs.exists(path):
                return False
            raise
        return True


def create_local(path, content):
    """Does the work of create() on this machine."""
    temporary = "%s.%s.partial" % (path, secrets.token_hex(4))
    try:
        write_local(temporary, content)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:  # this file system has no links
            try:
                write_local(path, content, "xb")
            except FileExistsError:
                return False
        return True
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def write_local(path, content, mode="wb"):
    """Writes bytes to a new local file and to the disk: after a rename, a power failure could otherwise leave an empty file."""
    with open(path, mode) as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())


def put_beside(fs, path, content):
    """Writes bytes to a new file beside a remote path. Returns its path."""
    temporary = "%s.%s.partial" % (path, secrets.token_hex(4))
    fs.pipe_file(temporary, content)
    return temporary
