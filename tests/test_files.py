"""lib/files.py: what is written is whole wherever its run stops."""
import builtins
import errno
import fcntl
import gc
import glob
import inspect
import itertools
import os
import re
import shutil
import signal

import pytest

import export_onnx
from helpers import ROOT
from lib.files import lock, not_utf8, read_json, read_lines, read_text, replaced_folder, sweep, whole_file

WRITERS = {"file": whole_file, "folder": replaced_folder}
SUCCESS, NAMED_ERROR, INTERRUPTED, TRACEBACK, KILLED = range(5)  # how a fork ends


def write(kind, path, text):
    """Writes a file, or a folder of two files."""
    with WRITERS[kind](path) as temporary:
        for name in [temporary] if kind == "file" else [temporary + "/a.bin", temporary + "/b.bin"]:
            with open(name, "w") as f:
                f.write(text)


def read(path):
    """Returns the text of each file that write() has written; none if there is nothing at path."""
    paths = sorted(glob.glob(path + "/*")) if os.path.isdir(path) else glob.glob(path)
    texts = []
    for name in paths:
        with open(name) as f:
            texts.append(f.read())
    return texts


def kill(_):
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt(_):
    raise KeyboardInterrupt


def fill_disk(path):
    raise OSError(errno.ENOSPC, "No space left on device", path)


def write_stopped(kind, path, stop, number):
    """Runs write() in a fork, and stop() before its number-th operation on files. Returns how it ended."""
    process = os.fork()
    if process:
        status = os.waitpid(process, 0)[1]
        return KILLED if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    gc.freeze()  # collecting ONNX Runtime's objects would wait for threads that a fork lacks
    count = itertools.count(1)

    def counted(function):
        def call(*arguments, **named):
            if next(count) == number:
                stop(arguments[0])
            return function(*arguments, **named)
        return call
    for name in ("open", "mkdir", "rename", "replace", "remove", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    builtins.open = counted(open)
    status = TRACEBACK
    try:
        write(kind, path, "new")
        status = SUCCESS
    except KeyboardInterrupt:
        status = INTERRUPTED
    except (OSError, ValueError) as error:
        if path in str(error):
            status = NAMED_ERROR
    finally:
        os._exit(status)


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("stop", [kill, interrupt, fill_disk], ids=["killed", "interrupted", "disk full"])
@pytest.mark.parametrize("earlier", [["earlier"], []], ids=["replaces", "is new"])
def test_it_is_whole_wherever_its_run_stops(tmp_path, kind, stop, earlier):
    """The next run clears up what a killed one left."""
    path = str(tmp_path / "out")
    files = 2 if kind == "folder" else 1
    for number in range(1, 20):  # it has fewer operations
        for text in earlier:
            write(kind, path, text)
        status = write_stopped(kind, path, stop, number)
        assert status in (SUCCESS, {kill: KILLED, interrupt: INTERRUPTED, fill_disk: NAMED_ERROR}[stop]), number
        found = read(path)
        if stop is kill and not found:  # between the two renames of a folder; the next run takes it back
            found = read(path + ".old")
        assert found in (earlier * files, ["new"] * files), number
        write(kind, path, "next")
        assert read(path) == ["next"] * files and os.listdir(str(tmp_path)) == ["out"], number
        (shutil.rmtree if kind == "folder" else os.remove)(path)
    assert found == ["new"] * files, "it has more operations"


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch, capsys, kind):
    def flock(*_):
        raise OSError(errno.ENOLCK, "no locks")
    monkeypatch.setattr(fcntl, "flock", flock)
    for text in ("first", "second"):
        write(kind, str(tmp_path / "out"), text)
        assert set(read(str(tmp_path / "out"))) == {text} and os.listdir(str(tmp_path)) == ["out"]
    assert ("has no locks" in capsys.readouterr().err) == (kind == "folder")


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    """What comes last stays."""
    path = str(tmp_path / "a.onnx")
    with whole_file(path) as first:
        with whole_file(path) as second:
            for name in (first, second):
                with open(name, "w") as f:
                    f.write(name)
        assert read(path) == [second]
    assert read(path) == [first] and os.listdir(str(tmp_path)) == ["a.onnx"]


def test_only_the_files_of_dead_runs_are_deleted(tmp_path, monkeypatch):
    def flock(file, operation, lock=fcntl.flock):  # NFS cannot lock a file that is open only for reading
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        lock(file, operation)
    monkeypatch.setattr(fcntl, "flock", flock)
    path = str(tmp_path / "a[1].onnx")  # a name that means something to glob
    others = [path, path + ".partial", path + ".notes.partial", path + ".1234567.partial", path + "x.12345678.partial"]
    for name in others + [path + ".0123abcd.partial"]:
        open(name, "w").close()
    with whole_file(path) as temporary:
        with open(temporary, "w") as f:
            f.write("new")
    assert sorted(os.path.join(str(tmp_path), name) for name in os.listdir(str(tmp_path))) == sorted(others)


@pytest.mark.parametrize("error, text", [(errno.EBUSY, "out: something is mounted there.*; give a folder inside it"),
                                         (errno.EXDEV, "out: cannot be renamed.* part of a container's image; delete it"),
                                         (errno.EACCES, "out")])
def test_a_folder_that_cannot_be_renamed_stays_whole(tmp_path, monkeypatch, error, text):
    """EBUSY: a mount in another mount namespace. EXDEV: the lower layer of an overlay."""
    path = str(tmp_path / "out")
    write("folder", path, "earlier")

    def rename(source, target, real=os.rename):
        if source == path:
            raise OSError(error, os.strerror(error), source)
        real(source, target)
    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises((ValueError, OSError), match=text):
        write("folder", path, "new")
    assert read(path) == ["earlier"] * 2 and os.listdir(str(tmp_path)) == ["out"]


def test_a_file_that_is_mounted_on_the_output_is_named(tmp_path, monkeypatch):
    """As docker run -v FILE:FILE mounts one."""
    def replace(source, target):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), source, None, target)
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="out: something is mounted there.*; mount the folder that holds it, or give another name"):
        write("file", str(tmp_path / "out"), "new")
    assert os.listdir(str(tmp_path)) == []


def test_fewer_files_than_were_written_are_an_error(tmp_path, monkeypatch):
    """As on a file system that ignores case."""
    write("folder", str(tmp_path / "out"), "earlier")
    with pytest.raises(ValueError, match=r"out: 3 files were written, but it holds 2: .*for the same \(A.bin and a.bin\); rename"):
        with replaced_folder(str(tmp_path / "out"), names=["A.bin", "b.bin", "a.bin"]) as partial:
            for name in ("a.bin", "b.bin", "a.bin"):
                (tmp_path / partial / name).touch()
    assert read(str(tmp_path / "out")) == ["earlier"] * 2


# --- text -------------------------------------------------------------------------------------------------------------

LINES = "\u884c\u4eba.png\r\nim2.png\r\n"


@pytest.mark.parametrize("content, message", [
    (LINES.encode("utf-16"), "iconv -f UTF-16 -t UTF-8"), (b"\xfe\xff" + LINES.encode("utf-16-be"), "iconv -f UTF-16 -t UTF-8"),
    (LINES.encode("utf-16-le"), "iconv -f UTF-16LE -t UTF-8"), (b"im2.png\n".decode().encode("utf-16-be"), "(byte 0); convert it: "
     "iconv -f UTF-16BE -t UTF-8"), (LINES.encode("utf-32"), "iconv -f UTF-32 -t UTF-8"), (LINES.encode("gbk"), "iconv -f GBK -t UTF-8"),
    ("\u00e9t\u00e9.png\n".encode("latin-1"), "iconv -f ITS_ENCODING -t UTF-8"), (b"im1.png\n" + bytes(9), "is not text (byte 8)"),
    (b"\x89PNG\r\n\x1a\n" + bytes(8), "is not text (byte 0)")])
def test_the_remedy_names_the_encoding(tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    for reader in (read_lines, read_text, lambda path: read_json(path, {}, "x.py")):
        with pytest.raises(ValueError, match=".*a.txt: .*" + re.escape(message) + "$"):
            reader(str(tmp_path / "a.txt"))


def test_a_byte_order_mark_is_ignored(tmp_path):
    for text in (LINES, '{"a": 1}'):
        (tmp_path / "a").write_bytes(text.encode("utf-8-sig"))
        assert read_text(str(tmp_path / "a")) == text.replace("\r", "")
    assert read_json(str(tmp_path / "a"), {"a": int}, "x.py") == {"a": 1}


def test_only_regular_files_are_replaced(tmp_path):
    os.mkfifo(str(tmp_path / "fifo"))
    for path in str(tmp_path / "fifo"), str(tmp_path), os.devnull:
        with pytest.raises(OSError, match="is no regular file, so it cannot be replaced"), whole_file(path):
            raise AssertionError
    assert not os.path.isfile(os.devnull)


# --- the scripts --------------------------------------------------------------------------------------------------------

# The files of these are written into a folder of replaced_folder(), are remote, or are those of another tool's interface.
EXCEPTIONS = {"lib/acl.py", "lib/int8.py", "lib/images.py", "lib/session.py", "lib/gallery/parts.py", "tools/sample.py",
              "tools/run/ais_bench_files.py"}


def test_every_script_writes_through_whole_file():
    found = set()
    for pattern in ("/*.py", "/lib/**/*.py", "/tools/**/*.py"):
        for path in glob.glob(ROOT + pattern, recursive=True):
            with open(path, encoding="utf-8") as f:
                if re.search(r'\bopen\((?!temporary,|os\.devnull,).*, "[wax]', f.read()):
                    found.add(os.path.relpath(path, ROOT))
    assert found == EXCEPTIONS


def test_export_onnx_has_the_same_functions():
    """It is copied alone, so that it holds the text of lib/files.py."""
    for function in (whole_file, sweep, lock, read_text, not_utf8):
        assert inspect.getsource(getattr(export_onnx, function.__name__)) == inspect.getsource(function)
