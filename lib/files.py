"""Files and folders that appear whole or not at all, text files and JSON."""
import contextlib
import errno
import fcntl
import glob
import json
import os
import shutil

from lib.script import note, some

NUMBER = (int, float)  # the types of a number in a JSON file, for fits()
MOUNT_ERROR = "%s: something is mounted there, so it cannot be replaced as a whole; give a folder inside it"


# --- files and folders that appear whole or not at all ---------------------------------------------------------------
# export_onnx.py, which is also copied alone, has the same whole_file(), sweep(), lock(), read_text() and not_utf8().

@contextlib.contextmanager
def whole_file(path):
    """Yields the name of a new file next to path. Renames it to path if the block succeeds, deletes it if the block fails."""
    if os.path.exists(path) and not os.path.isfile(path):  # root could replace even /dev/null
        raise OSError("%s: is no regular file, so it cannot be replaced; give another name" % path)
    sweep(glob.escape(path) + ".%s.partial" % ("[0-9a-f]" * 8))
    temporary = "%s.%s.partial" % (path, os.urandom(4).hex())
    try:
        with open(temporary, "x+b") as file:
            lock(file)
            yield temporary
            os.replace(temporary, path)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise OSError("%s: something is mounted there, so it cannot be replaced as a whole; mount the folder that holds it, or "
                          "give another name" % path)
        raise OSError("%s: cannot be written: %s" % (path, error.strerror or error))
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def sweep(pattern):
    """Removes the files of a pattern that no process locks: killed runs left them."""
    for path in glob.glob(pattern):
        with contextlib.suppress(OSError), open(path, "r+b") as file:  # NFS cannot lock a file that is open only for reading
            if lock(file):
                os.remove(path)


def lock(file):
    """Locks an open file or folder. Returns True, or False if another process holds the lock, or None if there are no locks.

    Some file systems have none: Lustre without -o flock, some NFS and FUSE mounts.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:
        return None


def write_text(path, text):
    """Writes a text file whole or not at all."""
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as f:
        f.write(text)


@contextlib.contextmanager
def replaced_folder(path, ending=".bin", names=None):
    """Yields an empty folder next to path. If the block succeeds, the folder replaces path.

    An earlier folder at path may only hold names with this ending, so that a mistyped path deletes nothing else. names: of the
    files that the block writes, if they are known; all of them must be there. Raises ValueError or OSError.
    """
    path = os.path.realpath(path)
    if os.path.ismount(path):
        raise ValueError(MOUNT_ERROR % path)
    if os.path.exists(path):
        others = sorted(name for name in os.listdir(path) if not name.endswith(ending))
        if others:
            raise ValueError("%s: holds %s, and only %s files may be there; give a new folder, or one of an earlier run"
                             % (path, others[0], ending))
    partial, old = path + ".partial", path + ".old"
    os.makedirs(partial, exist_ok=True)
    folder = os.open(partial, os.O_RDONLY)
    try:
        locked = lock(folder)
        if locked is None:
            note("the file system of %s has no locks, so do not start two runs that write the same folder" % path)
        try:
            ours = locked is not False and os.path.samestat(os.fstat(folder), os.stat(partial))
        except FileNotFoundError:  # another run has just renamed it
            ours = False
        if not ours:
            raise ValueError("%s: another run is writing this folder" % path)
        for entry in list(os.scandir(partial)):  # a killed run may have left files
            (shutil.rmtree if entry.is_dir(follow_symlinks=False) else os.remove)(entry.path)
        if os.path.exists(old) and not os.path.exists(path):  # an earlier run was killed between the two renames below
            os.rename(old, path)
        shutil.rmtree(old, ignore_errors=True)
        try:
            yield partial
            if names is not None:
                check_written(path, names, len(os.listdir(partial)))
            if os.path.exists(path):
                put_away(path, old)
            os.rename(partial, path)
        except BaseException as error:
            if os.path.exists(old) and not os.path.exists(path):  # this run was interrupted between the two renames
                os.rename(old, path)
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) and error.errno and not error.filename:  # for example, the disk is full
                raise OSError("%s: %s" % (path, error.strerror))
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        os.close(folder)


def check_written(path, names, found):
    """Raises ValueError if a folder holds fewer files than were written: some file systems do not know a.bin from A.bin."""
    if found != len(names):
        first = {}
        twins = ["%s and %s" % (first[name.lower()], name) for name in names if first.setdefault(name.lower(), name) is not name]
        raise ValueError("%s: %d files were written, but it holds %d: its file system takes different names for the same%s; "
                         "rename the images, or write to another file system"
                         % (path, len(names), found, " (%s)" % some(twins) if twins else ""))


def put_away(path, old):
    """Renames a folder. Raises ValueError with the remedy where folders cannot be renamed."""
    try:
        os.rename(path, old)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise ValueError(MOUNT_ERROR % path)
        if error.errno == errno.EXDEV:  # a folder in the lower layer of an overlay
            raise ValueError("%s: cannot be renamed, because it is part of a container's image; delete it, then start again" % path)
        raise


# --- text and JSON ----------------------------------------------------------------------------------------------------

def read_text(path):
    """Returns the content of a UTF-8 text file without a byte order mark. Each line ends with \\n, whatever the file has.

    Raises OSError or ValueError.
    """
    try:
        with open(path, encoding="utf-8-sig") as f:
            text = f.read()
    except UnicodeDecodeError as error:
        raise not_utf8(path, error.start, error.object)
    if "\0" in text:  # English text in UTF-16 is valid UTF-8
        raise not_utf8(path, len(text[:text.index("\0")].encode()), text.encode())
    return text


def not_utf8(path, byte, content):
    """Returns the error for a text file that is not UTF-8. byte: the first wrong one. content: the file's, or some lines of it."""
    zeros = [content[i::2].count(0) for i in (0, 1)]  # in UTF-16, one byte of each Latin letter and of each line's end is 0
    encoding = "GBK"
    if content[:4] == b"\xff\xfe\0\0":
        encoding = "UTF-32"
    elif content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        encoding = "UTF-16"
    elif max(zeros) > max(20 * min(zeros), len(content) / 20, 1):
        encoding = "UTF-16BE" if zeros[0] > zeros[1] else "UTF-16LE"
    elif any(zeros):
        return ValueError("%s: is not text (byte %d)" % (path, byte))
    else:
        try:
            content.decode("gb18030")
        except UnicodeDecodeError:
            encoding = "ITS_ENCODING"
    return ValueError("%s: is not UTF-8 text (byte %d); convert it: iconv -f %s -t UTF-8" % (path, byte, encoding))


def read_lines(path):
    """Returns the stripped lines of a text file that read_text() reads. Ignores a missing last newline. Raises the same errors."""
    return [line.strip() for line in read_text(path).split("\n")]


def fits(value, shape):
    """Returns whether a value from a JSON file has a shape: a type or types, [the shape of each item] or {key: shape}.

    Numbers must be finite and below 1e15, as all figures of a run are.
    """
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(key in value and fits(value[key], shape[key]) for key in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(item, shape[0]) for item in value)
    return isinstance(value, shape) and (not isinstance(value, NUMBER) or abs(value) < 1e15)


def read_json(path, shape, writer):
    """Returns the content of a JSON file, which must have the shape. writer: the script that writes it. Raises OSError or
    ValueError."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("%s: is not JSON: %s; %s writes this file" % (path, error, writer))
    if not fits(value, shape):
        raise ValueError("%s: is not what %s writes" % (path, writer))
    return value
