"""Functions that all scripts share: start and end, files that are written whole, progress bars, names and text."""
import codecs
import contextlib
import errno
import os
import re
import secrets
import signal
import sys
import threading
import time
import unicodedata

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # otherwise ONNX Runtime >= 1.29 reports each model to its makers
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")   # numpy's threads are not needed. If none can be started, its import
                                                     # would end the process

# flock gives these errors on a file system without locks: Lustre without -o flock, some NFS and FUSE mounts.
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
NAMED = 1000  # an error names at most this many items
NUMBER = (int, float)  # the types of a number in a JSON file, for fits()
READER_LEFT = 141  # exit status if the program that reads the output has ended, as head does: 128 + SIGPIPE, as in a shell
LIMIT = "the limit of processes, threads or memory is reached (ulimit -u and -v, a container's pids limit)"
MOUNTED = "%s: something is mounted there, so it cannot be replaced as a whole; give a folder inside it"
UNFINISHED = "unfinished.bin"
NOTED = set()


# --- a script's start and end ---------------------------------------------------------------------------------------

@contextlib.contextmanager
def importing(ends=True):
    """Wraps the import of a large library. In the block, Ctrl-C ends the process at once.

    Otherwise the library could turn the KeyboardInterrupt into another error, such as an ImportError. If ends is set, a
    missing library ends the process with a one-line message, because command() may not be running yet.
    """
    main = threading.current_thread() is threading.main_thread()  # only the main thread may set a handler
    before = signal.signal(signal.SIGINT, signal.SIG_DFL) if main else None
    try:
        yield
    except ImportError as error:
        if not ends:
            raise
        sys.exit(missing(error))
    finally:
        if main:
            signal.signal(signal.SIGINT, before)


def script_name():
    return os.path.basename(os.path.realpath(sys.argv[0]))


def missing(error):
    """Returns the message for an ImportError."""
    return "%s: error: %s; install the packages in requirements.txt" % (script_name(), error)


def command(main):
    """Runs a script's main(). Turns an error into one line, 'SCRIPT: error: ...', and exit status 1."""
    script = script_name()
    start_in_utf8()
    status = None
    try:
        main()
    except SystemExit as stop:  # argparse raises it
        status = stop.code
    except BrokenPipeError:
        status = READER_LEFT
    except ImportError as error:
        status = missing(error)
    except (OSError, ValueError) as error:
        status = "%s: error: %s" % (script, error)
    except RuntimeError as error:
        if "can't start new thread" not in str(error):
            raise
        status = "%s: error: no more threads can be started: %s" % (script, LIMIT)
    except KeyboardInterrupt:
        status = "%s: interrupted; no file is half written" % script
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
        status = status or (READER_LEFT if error.errno == errno.EPIPE else
                            "%s: error: the output cannot be written: %s" % (script, error.strerror))
    if status:
        sys.exit(status)


def start_in_utf8():
    """Makes Python decode file names as UTF-8, like the lists, the labels and the info file. Makes the output readable."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the caller closed it
            setattr(sys, name, open(os.devnull, "w"))
    if sys.getfilesystemencoding() != "utf-8":  # for example in the locale zh_CN.GBK
        os.environ["PYTHONIOENCODING"] = sys.stdout.encoding  # the output keeps the terminal's encoding
        with open("/proc/self/cmdline", "rb") as f:  # sys.argv as it was before Python decoded it
            arguments = f.read().split(b"\0")[:-1][-len(sys.argv):]
        os.execv(sys.executable, [sys.executable, "-X", "utf8"] + ["-B"] * sys.flags.dont_write_bytecode + arguments)
    codecs.register_error("readable", readable)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="readable")


def readable(error):
    """An error handler for codecs. It escapes characters that the output's encoding lacks.

    It keeps the bytes of a name that is not UTF-8, if they are letters in the output's encoding. Python represents such a byte
    as U+DC80 to U+DCFF.
    """
    found = re.compile("[^\0-\x7f]*[\udc80-\udcff][^\0-\x7f]*").match(error.object, error.start)
    if found:
        with contextlib.suppress(ValueError):
            data = found.group().encode("utf-8", "surrogateescape")
            if data.decode(error.encoding).isprintable():
                return data, found.end()
    return codecs.backslashreplace_errors(error)


def note(text):
    """Prints a note for the user, which is not an error, on stderr. Prints the same note only once."""
    if text not in NOTED:
        NOTED.add(text)
        print("note: %s" % text, file=sys.stderr)


def progress(total, unit):
    """Returns a progress bar that appears after two seconds. Without a terminal, the bar shows nothing."""
    if not sys.stderr.isatty():
        return Silent()
    from tqdm import tqdm
    return tqdm(total=total, unit=unit, delay=2, leave=False)


class Silent(object):
    """A progress bar that shows nothing."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def update(self, count=1):
        pass


def pixels(text):
    """Converts an argument that is a height or width in pixels: a positive whole number."""
    value = int(text)
    if not 0 < value < 10 ** 5:
        raise ValueError
    return value


# --- the machine ----------------------------------------------------------------------------------------------------

def cgroup_cores(root="/sys/fs/cgroup", table="/proc/self/cgroup"):
    """Returns a container's CPU quota in cores, rounded up, or None without a quota. Reads cgroup v1 and v2."""
    found = []
    with contextlib.suppress(OSError), open(table) as f:
        for line in f:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            base = os.path.join(root, "cpu") if controllers else root
            parts = [part for part in path.split("/") if part]
            for depth in range(len(parts) + 1):  # a quota also limits all groups below it
                folder = os.path.join(base, *parts[:depth])
                with contextlib.suppress(OSError, ValueError):
                    if controllers:
                        with open(folder + "/cpu.cfs_quota_us") as q, open(folder + "/cpu.cfs_period_us") as p:
                            quota, period = int(q.read()), int(p.read())
                    else:
                        with open(folder + "/cpu.max") as q:
                            quota, period = map(int, q.read().split())  # "max" means no quota and raises ValueError
                    if quota > 0:
                        found.append(-(-quota // period))
    return min(found) if found else None


def cores():
    """Returns the number of cores that this process may use."""
    return min(len(os.sched_getaffinity(0)), cgroup_cores() or sys.maxsize)


def tasks():
    """Returns the kernel's count of this process's threads, or 0 without /proc."""
    with contextlib.suppress(OSError):
        return len(os.listdir("/proc/self/task"))
    return 0


def can_start(threads, instead="one thread does all the work"):
    """Returns whether this many threads can be started now. If not, prints a note that says what happens instead.

    Ask this before a library starts threads: ONNX Runtime may wait for ever if only some of them start.
    """
    go, started, before = threading.Event(), [], tasks()
    try:
        for _ in range(threads):
            thread = threading.Thread(target=go.wait, daemon=True)
            thread.start()
            started.append(thread)
    except RuntimeError:
        if instead:
            note("%s, so %s" % (LIMIT, instead))
        return False
    finally:
        go.set()
        for thread in started:
            thread.join()
        for _ in range(1000):  # the kernel still counts a thread for a moment after its end
            if tasks() <= before:
                break
            time.sleep(0.001)
    return True


class Inline(object):
    """Replaces a ThreadPoolExecutor when no threads can be started. The caller's thread does the work."""
    map = staticmethod(map)

    def __init__(self, _):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        from concurrent.futures import Future
        future = Future()
        future.set_result(function(*arguments))
        return future


def lock(file):
    """Locks an open file or folder against other processes. Returns False if another process holds the lock.

    On a file system without locks, it prints a note and returns True.
    """
    import fcntl
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        note("this file system has no locks (%s), so do not start two runs that write the same file"
             % error.strerror)
    return True


# --- files and folders that appear whole or not at all ---------------------------------------------------------------

@contextlib.contextmanager
def whole_file(path):
    """Yields the name of a new file beside path. Renames it to path if the block succeeds, deletes it if the block fails."""
    import glob
    # A file that no process locks is left from a killed run.
    for left in glob.glob(glob.escape(path) + ".%s.partial" % ("[0-9a-f]" * 8)):
        with contextlib.suppress(OSError):
            file = os.open(left, os.O_RDWR)  # NFS cannot lock a file that is open only for reading
            try:
                if lock_quietly(file):
                    os.remove(left)
            finally:
                os.close(file)
    temporary = "%s.%s.partial" % (path, secrets.token_hex(4))
    file = None
    try:
        file = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        lock_quietly(file)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise OSError("%s: cannot be written: %s" % (path, error.strerror or error))
    finally:
        if file is not None:
            os.close(file)
        with contextlib.suppress(OSError):
            os.remove(temporary)


def lock_quietly(file):
    """Tries to lock an open file. Returns whether this process holds the lock now."""
    import fcntl
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False


def write_text(path, text):
    """Writes a text file whole or not at all."""
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as f:
        f.write(text)


@contextlib.contextmanager
def replaced_folder(path, ending=".bin"):
    """Yields an empty folder beside path. If the block succeeds, the folder replaces path.

    An earlier folder at path may only hold names with this ending, so that a mistyped path deletes nothing else. Raises
    ValueError or OSError.
    """
    import shutil
    path = os.path.realpath(path)
    if os.path.ismount(path):
        raise ValueError(MOUNTED % path)
    if os.path.exists(path):
        others = sorted(name for name in os.listdir(path) if not name.endswith(ending))
        if others:
            raise ValueError("%s: holds %s, and only %s files may be there; give a new folder, or one of an earlier run"
                             % (path, others[0], ending))
    partial, old = path + ".partial", path + ".old"
    os.makedirs(partial, exist_ok=True)
    folder = os.open(partial, os.O_RDONLY)
    try:
        try:
            ours = lock(folder) and os.path.samestat(os.fstat(folder), os.stat(partial))
        except FileNotFoundError:  # another run has just renamed it
            ours = False
        if not ours:
            raise ValueError("%s: another run is writing this folder" % path)
        empty(partial)  # a killed run may have left files
        if os.path.exists(old) and not os.path.exists(path):  # an earlier run was killed between the two renames below
            os.rename(old, path)
        shutil.rmtree(old, ignore_errors=True)
        try:
            yield partial
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


def put_away(path, old):
    """Renames a folder. Deletes it if it lies in the lower layer of an overlay (a container's image), which forbids renaming."""
    try:
        os.rename(path, old)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise ValueError(MOUNTED % path)
        if error.errno != errno.EXDEV:
            raise
        # If the deletion is killed halfway, this file marks the folder as incomplete. No stage accepts a folder with it.
        open(os.path.join(path, UNFINISHED), "w").close()
        empty(path, UNFINISHED)
        os.remove(os.path.join(path, UNFINISHED))
        os.rmdir(path)


def empty(folder, but=None):
    """Deletes everything in a folder except the file with this name."""
    import shutil
    for entry in list(os.scandir(folder)):
        if entry.name != but:
            (shutil.rmtree if entry.is_dir(follow_symlinks=False) else os.remove)(entry.path)


# --- JSON files and the description in a model ------------------------------------------------------------------------

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
    import json
    try:
        with open(path, encoding="utf-8") as f:
            value = json.load(f)
    except (ValueError, RecursionError) as error:
        raise ValueError("%s: is not JSON: %s; %s writes this file" % (path, error, writer))
    if not fits(value, shape):
        raise ValueError("%s: is not what %s writes" % (path, writer))
    return value


PREFIX = "deepmar."  # the names of our entries in an ONNX file's metadata begin with this
TEXTS = ("layout", "output", "checkpoint_sha256", "version")  # these entries are plain text, the others JSON


def description(path):
    """Returns a model's description: an .onnx file's metadata, or the .json beside an OM. It is {} if there is none.

    The keys are those that export_onnx.py writes: attributes, mean, std, size, layout, output, last_conv_stride,
    checkpoint_sha256, version. Raises OSError or ValueError.
    """
    import json
    import warnings
    if path.endswith(".om"):
        path = path[:-len(".om")] + ".json"
    if not path.endswith(".onnx"):
        found = read_json(path, {}, "tools/describe.py")
    else:
        with importing():
            import onnx
            from google.protobuf.message import DecodeError
        model = onnx.ModelProto()
        try:
            with open(path, "rb") as f, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # an old protobuf warns about a file that is not a model
                model.ParseFromString(f.read())
            if not model.HasField("graph"):
                raise DecodeError
            found = {entry.key[len(PREFIX):]: entry.value for entry in model.metadata_props if entry.key.startswith(PREFIX)}
            found = {key: value if key in TEXTS else json.loads(value) for key, value in found.items()}
        except DecodeError:
            raise ValueError("%s: is not an ONNX model" % path)
        except (ValueError, RecursionError) as error:
            raise ValueError("%s: its metadata is damaged: %s" % (path, one_line(error)))
    names = found.get("attributes", [])
    if not fits(names, [str]) or len(set(names)) < len(names) or not all(len(name.splitlines()) == 1 for name in names):
        raise ValueError("%s: its attributes are not a list of different names, each on one line" % path)
    return found


# --- names and text --------------------------------------------------------------------------------------------------

def composed(text):
    """Returns text in Unicode's composed form (NFC) for comparing names: a Mac writes an accent as a second character."""
    return unicodedata.normalize("NFC", text)


def stem(name):
    """Returns the name that a file has in every stage: without folders, up to the first dot, in composed form."""
    return composed(name.rpartition("/")[2].partition(".")[0])


def read_lines(path):
    """Returns the stripped lines of a UTF-8 text file. Ignores a byte order mark, CRLF and a missing last newline.

    Raises OSError or ValueError.
    """
    try:
        with open(path, encoding="utf-8-sig") as f:
            return [line.strip() for line in f.read().split("\n")]
    except UnicodeDecodeError as error:
        raise ValueError("%s: is not UTF-8 text (byte %d); convert it: iconv -f GBK -t UTF-8" % (path, error.start))


def one_line(error):
    """Returns an exception's text on one line."""
    return " ".join(str(error).split()) or repr(error)


def some(items, most=5):
    """Returns the first items as text, and how many more there are."""
    items = list(items)
    return ", ".join(items[:most]) + (" and %d more" % (len(items) - most) if len(items) > most else "")


def joined(items, separator=", "):
    """Returns all items as text, at most the first NAMED, so that the user can fix all of them at once."""
    return separator.join(items[:NAMED] + ["..."] * (len(items) > NAMED))
