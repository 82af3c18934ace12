"""Shared by all tests: the project's folders on the import path, and functions that run a script as a user would."""
import contextlib
import ctypes
import fcntl
import io
import json
import os
import re
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import traceback
import warnings

import numpy as np
import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OWN = [ROOT, os.path.join(ROOT, "tools"), os.path.join(ROOT, "tests")]
sys.path[:0] = OWN
SIZE = 12  # the number of images in run_all.sh's sample
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # as in all scripts
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores Ctrl-C, and its children inherit that


def script(name, *arguments, cwd=None):
    """Runs ROOT/name in a fork of this process. Returns the finished process, with its output as text.

    The result is the same as that of started(), but libraries that the test file has imported are not imported again. For torch,
    that saves seconds. The project's own modules are imported anew.
    """
    path, arguments = os.path.join(ROOT, str(name)), [str(argument) for argument in arguments]
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = os.fork()
        if not process:
            run_forked(path, arguments, cwd, output, errors)
        _, status = os.waitpid(process, 0)
        texts = []
        for file in (output, errors):
            file.seek(0)
            texts.append(io.TextIOWrapper(file).read())
    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)
    return subprocess.CompletedProcess([path] + arguments, code, *texts)


def run_forked(path, arguments, cwd, output, errors):
    """Runs a script in this process, a child of pytest, and ends it, as a new Python would."""
    status = 1
    try:
        for number, name, file in ((1, "stdout", output), (2, "stderr", errors)):
            os.dup2(file.fileno(), number)
            usual = getattr(sys, "__%s__" % name)
            setattr(sys, name, open(number, "w", encoding=usual.encoding, errors=usual.errors, closefd=False))
        warnings.resetwarnings()  # pytest would collect the warnings
        warnings.showwarning = lambda *warning: sys.stderr.write(warnings.formatwarning(*warning[:4]))
        for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)
        for module, value in list(sys.modules.items()):
            if os.path.dirname(getattr(value, "__file__", None) or "") in OWN:
                del sys.modules[module]
        sys.dont_write_bytecode = True  # a test may change a module within the same second
        sys.argv, sys.path = [path] + arguments, [os.path.dirname(path)] + [folder for folder in sys.path if folder not in OWN]
        os.chdir(str(cwd or "."))
        runpy.run_path(path, run_name="__main__")
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if status and not isinstance(stop.code, int):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


def started(name, *arguments, cwd=None):
    """Runs ROOT/name with a new Python. Returns the same as script(). It shows what a fork cannot, such as a failed import."""
    return subprocess.run([sys.executable, os.path.join(ROOT, name)] + [str(argument) for argument in arguments],
                          cwd=str(cwd) if cwd else None, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True)


def check_error(process, *texts, code=1):
    """Checks that a script failed with this exit code and one line 'SCRIPT: error: ...' with the texts, without a traceback."""
    assert process.returncode == code, (process.returncode, process.stdout, process.stderr)
    assert "Traceback" not in process.stderr, process.stderr
    lines = [line for line in process.stderr.strip().split("\n") if not line.startswith("note: ")]
    assert ": error: " in lines[-1], process.stderr
    if code == 1:
        assert len(lines) == 1, process.stderr
    for text in texts:
        assert text in process.stderr, process.stderr


# The numbers of system calls on x86_64 and aarch64. None means that there is no such call.
CALLS = {"flock": (73, 32), "clone": (56, 220), "clone3": (435, 435), "fork": (57, None), "vfork": (58, None)}


def refused(error, *calls):
    """Returns a preexec_fn after which these system calls fail with this error, as they do on some machines."""
    number = {"x86_64": 0, "aarch64": 1}[os.uname().machine]
    load, equal, end, allow, fail = 0x20, 0x15, 0x06, 0x7fff0000, 0x00050000 | error  # of linux/filter.h, linux/seccomp.h
    rules = [(load, 0, 0, 0)]
    for call in calls:
        if CALLS[call][number] is not None:
            rules += [(equal, 0, 1, CALLS[call][number]), (end, 0, 0, fail)]
    rules.append((end, 0, 0, allow))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    program = ctypes.create_string_buffer(struct.pack("HP", len(rules), ctypes.addressof(code)))
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def refuse():
        if prctl(38, 1, 0, 0, 0) or prctl(22, 2, program, 0, 0):  # PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP with a filter
            raise OSError(ctypes.get_errno(), "seccomp")
        assert code
    return refuse


def namespaces(*options):
    """Returns the beginning of a command that runs in new Linux namespaces. options: those of unshare."""
    command = ["unshare"] + ["--map-root-user"] * (os.getuid() != 0) + list(options)
    if subprocess.call(command + ["true"], stderr=subprocess.DEVNULL):
        pytest.skip("NOT RUN: this user may not make namespaces; run it as root")
    return command


def run_all(*arguments, root=ROOT, cwd=None, path=None, **variables):
    """Runs run_all.sh with this Python. Returns the finished process."""
    environment = dict(os.environ, PYTHON=sys.executable, sample_size=str(SIZE), set_env="/dev/null")  # ignore this machine's CANN
    environment.update(variables)
    if path:
        environment["PATH"] = "%s:%s" % (path, environment["PATH"])
    return subprocess.run(["bash", os.path.join(str(root), "run_all.sh")] + [str(argument) for argument in arguments],
                          cwd=str(cwd or root), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True)


VERSION = "%d.%d" % sys.version_info[:2]


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """The folder for things that are made only once: tests/run.sh's for all test files, else this session's."""
    return os.environ.get("DEEPMAR_TEST_SHARED") or str(tmp_path_factory.mktemp("shared"))


@contextlib.contextmanager
def locked(path):
    """Locks a path for the block, because another test file may be making the file or folder there."""
    with open(path + ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def sample(shared):
    """A folder with the sample of SIZE images. One Python makes it; the other takes a copy, and computes its own accuracy.txt.

    Pillow 7.2 and 13 scale some images differently, by one grey level.
    """
    folder = os.path.join(shared, "sample-" + VERSION)
    with locked(os.path.join(shared, "sample")):
        others = [name for name in os.listdir(shared) if re.match(r"sample-[0-9.]+$", name)]
        if others and not os.path.exists(folder):
            shutil.copytree(os.path.join(shared, others[0]), folder)
            compute_accuracy(folder)
        process = script("tools/sample.py", folder, "--images", SIZE, "--keep")
    assert process.returncode == 0, process.stderr
    return folder


def compute_accuracy(folder):
    from DeepMAR import load_model
    from PIL import Image
    from postprocess_deepmar_pytorch import evaluate
    from sample import forward
    with open(os.path.join(folder, "label.json")) as f:
        labels = json.load(f)
    images = [Image.open(os.path.join(folder, "images", name)) for name in labels]
    model = load_model(os.path.join(folder, "checkpoint.pth.tar"))
    logits = np.concatenate(list(forward(lambda batch: model(batch).numpy(), images, (224, 224), lambda count: None, 1)))
    with open(os.path.join(folder, "accuracy.txt"), "w") as f:
        f.write("%r\n" % evaluate(logits, np.array(list(labels.values())))[0]["instance_acc"])


@pytest.fixture(scope="session")
def first(shared, sample):
    """The first run of run_all.sh on this Python, on sample data: (its work folder, the process)."""
    folder = os.path.join(shared, "first-" + VERSION)
    work, told = os.path.join(folder, "work"), os.path.join(folder, "process.json")
    with locked(folder):
        if not os.path.exists(told):
            shutil.copytree(sample, os.path.join(work, "sample"))
            process = run_all("--work-dir", work)
            with open(told, "w") as f:
                json.dump([process.args, process.returncode, process.stdout, process.stderr], f)
    with open(told) as f:
        return work, subprocess.CompletedProcess(*json.load(f))


def tiny_data(folder):
    """Writes folder/sample like the sample's folder, but with a fake checkpoint, for stages that read no checkpoint."""
    from sample import pedestrians
    (folder / "sample" / "images").mkdir(parents=True)
    images, labels = pedestrians(SIZE, 0)
    names = ["%05d.png" % (i + 1) for i in range(SIZE)]
    for name, image in zip(names, images):
        image.save(str(folder / "sample" / "images" / name))
    (folder / "sample" / "image.txt").write_text("".join(name + "\n" for name in names))
    (folder / "sample" / "label.json").write_text(json.dumps(dict(zip(names, labels.tolist()))))
    (folder / "sample" / "checkpoint.pth.tar").write_bytes(b"none")


def own_data(work, **changes):
    """Returns options that give the sample as the user's own data, with absolute paths."""
    options = {"checkpoint": "checkpoint.pth.tar", "images": "images", "image-list": "image.txt",
               "label-file": "label.json"}
    options = {name: os.path.join(work, "sample", value) for name, value in options.items()}
    options.update(changes)
    return [str(text) for name, value in options.items() for text in ("--" + name, value)]
