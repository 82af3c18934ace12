"""Runs test files on this Python, for tests/run.sh: each in a fork of this process, which imports the libraries once.

    python3 tests/files.py FILE... -- PYTEST'S ARGUMENTS

If a library crashes, the other files' tests still run. Four files run at the same time, over all Pythons with the same folder
$DEEPMAR_TEST_SHARED. The file "done" in that folder records the result of each file.
"""
import fcntl
import gc
import os
import platform
import signal
import sys
import tempfile
import time

SHARED = os.environ["DEEPMAR_TEST_SHARED"]
# Pytest rewrites the modules of packages that have a plugin, such as hypothesis, for each file again, unless they are imported before.
OPTIONS = ["-q", "-rs", "-p", "no:cacheprovider", "--durations=3", "--durations-min=5",
           "-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning"]
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # as in all scripts
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores Ctrl-C, and its children inherit that

import hypothesis  # noqa: F401, E402
import numpy  # noqa: F401, E402
import onnx  # noqa: F401, E402
import onnxruntime  # noqa: F401, E402
import pytest  # noqa: E402
import scipy.io  # noqa: F401, E402
import torch  # noqa: F401, E402
import torchvision  # noqa: F401, E402
from PIL import Image  # noqa: F401, E402


def free_place():
    """Waits until fewer than four files run; returns an open file whose lock stands for one of the four places."""
    while True:
        for number in "1234":
            place = os.open(os.path.join(SHARED, "place" + number), os.O_CREAT | os.O_RDWR)
            try:
                fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return place
            except BlockingIOError:
                os.close(place)
        report()
        time.sleep(0.1)


def start(file, arguments):
    """Runs a test file in a fork."""
    place, log = free_place(), tempfile.TemporaryFile(dir=SHARED)
    pid = os.fork()
    if not pid:
        status = 3
        try:
            os.close(place)
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            status = int(pytest.main(OPTIONS + [file] + arguments))
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)
    running[pid] = file, log, place


def report(options=os.WNOHANG):
    """Tells of the files that have come to their end."""
    while running:
        pid, ended, usage = os.wait4(-1, options)
        if not pid:
            return
        file, log, place = running.pop(pid)
        fcntl.flock(place, fcntl.LOCK_UN)  # another file's process may still have it open
        os.close(place)
        status = os.WEXITSTATUS(ended) if os.WIFEXITED(ended) else -os.WTERMSIG(ended)
        if status == 5:  # the arguments choose none of its tests
            continue
        name = "%s (Python %s)" % (file, platform.python_version())
        with open(os.path.join(SHARED, "done"), "a") as f:
            fcntl.flock(f, fcntl.LOCK_EX)  # the output is in one piece
            f.write("%d %s\n" % (status, name))
            log.seek(0)
            sys.stdout.buffer.write(b"=== %s: %.1f s of CPU\n" % (name.encode(), usage.ru_utime + usage.ru_stime) + log.read())
            sys.stdout.buffer.flush()


gc.freeze()  # the forks' garbage collector leaves the libraries' objects alone
running = {}
end = sys.argv.index("--")
for file in sys.argv[1:end]:
    start(file, sys.argv[end + 1:])
report(0)
