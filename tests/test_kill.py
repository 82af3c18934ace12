"""Every script killed at any moment: no file is half written, the earlier result is whole, a re-run is undisturbed.

DEEPMAR_TEST_CAMPAIGN=50 kills each script, tools/sample.py too, 50 times at random moments, and kills and interrupts it at
every operation on files; pytest's -s shows the figures.
"""
import collections
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image
from stages import STAGES, contents, output, prepare, put_earlier, run, start
from helpers import ROOT

CAMPAIGN = int(os.environ.get("DEEPMAR_TEST_CAMPAIGN", "0"))
SLOW = {"export_onnx", "sample"}  # they import torch

# Runs a script, and kills it at its n-th change of a file's name or opening of a file to write.
AT_OPERATION = """
import builtins, os, runpy, sys
sys.argv, at, number = sys.argv[3:], int(sys.argv[1]), int(sys.argv[2])
main, operations = os.getpid(), 0
def killing(function, counts):
    def call(*arguments, **named):
        global operations
        if counts(*arguments, **named) and os.getpid() == main:
            operations += 1
            if operations == at:
                os.kill(main, number)
        return function(*arguments, **named)
    return call
for name in "mkdir rename replace remove unlink rmdir".split():
    setattr(os, name, killing(getattr(os, name), lambda *a, **k: True))
builtins.open = killing(open, lambda *a, **k: "w" in str(list(a[1:2]) or k.get("mode", "")))
sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
runpy.run_path(sys.argv[0], run_name="__main__")
print("operations:", operations)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("kill")
    prepare(path)
    (path / "at_operation.py").write_text(AT_OPERATION)
    return path


def living(group):
    """Whether a process group has a process that is no zombie."""
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open("/proc/%s/stat" % process) as f:
                state, _, group_ = f.read().rpartition(")")[2].split()[:3]
        except OSError:  # it has just gone
            continue
        if int(group_) == group and state not in "ZX":
            return True
    return False


def check_killed(folder, stage, process, number, earlier, new):
    """Waits for a process that was sent a signal; checks what it leaves. Returns what became of the output."""
    process.communicate(timeout=60)
    parts = output(folder, stage)
    for name, part, old, whole in zip(STAGES[stage][1], parts, earlier, new):
        if not part and number == signal.SIGKILL:  # between the two renames of a folder; the next run takes it back
            assert contents(folder / (name + ".old")) == old
        else:
            assert part in (old, whole), (stage, name, sorted(part))
    for _ in range(100):  # the workers go as well
        if not living(process.pid):
            break
        time.sleep(0.01)
    else:
        raise AssertionError("%s: left processes behind" % stage)
    return "earlier" if parts == earlier else "new" if parts == new else "between"


def check_rerun(folder, stage, clean, new):
    """The next undisturbed run gives what it would have given, and leaves nothing else in the folder."""
    run(folder, stage)
    assert output(folder, stage) == new
    assert set(contents(folder)) == clean, sorted(set(contents(folder)) ^ clean)


def undisturbed(folder, stage):
    """Returns a stage's output, the names in the folder after it, and its duration in seconds."""
    put_earlier(folder, stage)
    began = time.time()
    run(folder, stage)
    return output(folder, stage), set(contents(folder)), time.time() - began


KINDS = {"killed": signal.SIGKILL, "interrupted": signal.SIGINT}


@pytest.mark.parametrize("stage", STAGES if CAMPAIGN else ["export_onnx"])  # of the others, the test below
def test_at_random_moments(folder, stage):
    new, clean, duration = undisturbed(folder, stage)
    kills = CAMPAIGN or 1
    for kind, number in KINDS.items():
        became = collections.Counter()
        for i in range(kills):
            earlier = put_earlier(folder, stage)
            process = start(folder, stage)
            time.sleep(duration * (i + random.random()) / kills)
            # A terminal interrupts the whole group.
            (os.killpg if kind == "interrupted" else os.kill)(process.pid, number)
            became[check_killed(folder, stage, process, number, earlier, new)] += 1
            if i % 5 == 4:
                check_rerun(folder, stage, clean, new)
        print("%s: %s %d times in %.2f s: %s" % (stage, kind, kills, duration, dict(became)))
    check_rerun(folder, stage, clean, new)


@pytest.mark.parametrize("stage", sorted(set(STAGES) - SLOW))
def test_at_an_operation_on_files(folder, stage):
    """Where it matters: before each renaming, removal and opening; unless in a campaign, the last 3 and one more."""
    put_earlier(folder, stage)
    said, _ = start(folder, stage, ["at_operation.py", "0", "0"]).communicate()
    operations = int(said.split("operations: ")[1])
    new, clean = output(folder, stage), set(contents(folder))
    for kind, number in KINDS.items():
        became = collections.Counter()
        chosen = range(1, operations + 1)
        if not CAMPAIGN:
            chosen = sorted(set(chosen[-3:]) | {random.choice(chosen)}) if kind == "killed" else [random.choice(chosen)]
        for operation in chosen:
            earlier = put_earlier(folder, stage)
            process = start(folder, stage, ["at_operation.py", str(operation), str(int(number))])
            became[check_killed(folder, stage, process, number, earlier, new)] += 1
            if CAMPAIGN:
                check_rerun(folder, stage, clean, new)
        print("%s: %s at %d of %d operations on files: %s" % (stage, kind, len(chosen), operations, dict(became)))
    check_rerun(folder, stage, clean, new)


def test_slow_images_do_not_hold_up_ctrl_c(folder):
    """Reading one of these takes a good part of a second, and each worker is handed many at a time."""
    (folder / "slow").mkdir()
    Image.new("L", (7900, 7900)).save(str(folder / "slow" / "0.png"))
    for i in range(1, 100):
        os.link(str(folder / "slow" / "0.png"), str(folder / "slow" / ("%d.png" % i)))
    (folder / "slow.txt").write_text("".join("%d.png\n" % i for i in range(100)))
    process = subprocess.Popen([sys.executable, ROOT + "/preprocess_deepmar_pytorch.py", "slow", "slow_bins", "slow.txt"],
                               cwd=str(folder), stderr=subprocess.PIPE, start_new_session=True)
    while not os.path.exists(str(folder / "slow_bins.partial")):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(1)
    began = time.time()
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate()
    assert time.time() - began < 10  # all of the images would take far longer
    assert errors == b"preprocess_deepmar_pytorch.py: interrupted; no file is half written\n", errors
    assert not living(process.pid) and not (folder / "slow_bins.partial").exists()
