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
from lib.files import lock, replaced_folder, whole_file

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


# The files of these are written into a folder of replaced_folder(), or are those of another tool's interface.
EXCEPTIONS = {"lib/images.py", "lib/session.py", "tools/sample.py", "tools/run/ais_bench_files.py"}


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
    for function in (whole_file, lock):
        assert inspect.getsource(getattr(export_onnx, function.__name__)) == inspect.getsource(function)
