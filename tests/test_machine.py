"""Machines that are not like ours: a full disk, no locks, no threads, quotas ...: a script works, or one line says why.

Stage 4 stands for all scripts: it reads and writes many files in several processes. Of what a script writes: tests/test_files.py.
"""
import errno
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from helpers import ROOT, check_error, contents, mounting, refused, write_bins, write_images, write_model
from lib import machine
from lib.files import replaced_folder
from lib.labels import ASSUMED

NAMES = ["im%d.png" % i for i in range(8)]
STAGE_4 = ["preprocess_deepmar_pytorch.py", "images", "input_bin", "image.txt"]
GET_INFO = ["get_info.py", "input_bin", "deepmar.info", "224", "224"]
BENCHMARK = ["tools/benchmark.py", "-batch_size=4", "-om_path=model.onnx", "-input_text_path=deepmar.info"]
PREDICT = ["tools/predict.py", "images", "--onnx=model.onnx"]
QUANTIZE = ["tools/quantize.py", "model.onnx", "input_bin", "int8.onnx"]
NO_MORE_PROCESSES = refused(errno.EAGAIN, "clone", "clone3", "fork", "vfork")
EARLIER = {"earlier.bin": b"earlier"}


@pytest.fixture
def folder(tmp_path):
    """Images and their list; in input_bin, what an earlier run left."""
    write_images(tmp_path / "images", len(NAMES))
    (tmp_path / "image.txt").write_text("\n".join(NAMES))
    (tmp_path / "input_bin").mkdir()
    (tmp_path / "input_bin" / "earlier.bin").write_bytes(EARLIER["earlier.bin"])
    return tmp_path


@pytest.fixture
def bins_folder(folder):
    """Images, their bins and a model, for the scripts that run it."""
    write_model(folder / "model.onnx", 4)
    write_bins(folder, NAMES)
    return folder


def start(folder, command, prefix=(), **settings):
    """Starts a script in a new Python and a new process group. prefix: goes before the whole command."""
    settings = dict({"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}, **settings)
    return subprocess.Popen(list(prefix) + [sys.executable, "-B", os.path.join(ROOT, command[0])] + command[1:], cwd=str(folder),
                            universal_newlines=True, start_new_session=True, **settings)


def finish(process):
    """Waits for the end of a process, and of all that it has started and that has its output."""
    process.stdout, process.stderr = process.communicate(timeout=120)
    return process


def check_complete(folder, process):
    assert process.returncode == 0 and "Traceback" not in process.stderr, process.stderr
    assert sorted(contents(folder / "input_bin")) == [name.replace("png", "bin") for name in NAMES]


def check_refused(folder, process, *texts):
    """One line says why, and all is as it was."""
    check_error(process, *texts)
    assert contents(folder / "input_bin") == EARLIER and sorted(os.listdir(str(folder))) == ["image.txt", "images", "input_bin"]


# --- disks ----------------------------------------------------------------------------------------------------------

def test_a_full_disk_is_named(folder):
    """No file can have more bytes: the errors of a full disk, without one."""
    process = finish(start(folder, STAGE_4, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))))
    check_refused(folder, process, "input_bin", "File too large")


def test_a_mounted_folder_is_named(folder):
    (folder / "images" / "other").mkdir()
    for mount in ("-t tmpfs tmpfs input_bin", "--bind images/other input_bin"):  # the second is of the same device
        process = finish(start(folder, STAGE_4, mounting(mount)))
        check_refused(folder, process, "input_bin: something is mounted there", "give a folder inside it")


def test_few_files_and_no_temporary_folder_do_not_matter_and_nothing_is_written_at_home(bins_folder, tmp_path_factory):
    """Official builds of ONNX Runtime >= 1.29 keep what they report in ~/.cache, except where a variable says it is CI."""
    home = tmp_path_factory.mktemp("home")
    environment = {name: os.environ[name] for name in ("PATH", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
    process = finish(start(bins_folder, BENCHMARK, env=dict(environment, HOME=str(home), TMPDIR="/nowhere", OMP_NUM_THREADS="1"),
                           preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))))
    assert process.returncode == 0 and process.stderr == "", process.stderr
    assert list(home.iterdir()) == []


# --- no locks, no threads and processes -------------------------------------------------------------------------------

def test_a_file_system_without_locks_is_noted(folder):
    process = finish(start(folder, STAGE_4, preexec_fn=refused(errno.ENOLCK, "flock")))
    check_complete(folder, process)
    assert "has no locks" in process.stderr


def test_one_line_names_the_limit_of_processes(folder):
    check_refused(folder, finish(start(folder, STAGE_4, preexec_fn=NO_MORE_PROCESSES)), "cannot be started", "ulimit -u")


@pytest.mark.parametrize("command", [BENCHMARK, QUANTIZE], ids=["benchmark", "quantize"])
def test_one_line_names_the_limit_of_threads(bins_folder, command):
    """And ONNX Runtime does not wait for ever for a thread that did not start."""
    before = sorted(os.listdir(str(bins_folder)))
    check_error(finish(start(bins_folder, command, preexec_fn=NO_MORE_PROCESSES)), "threads", "ulimit -u")
    assert sorted(os.listdir(str(bins_folder))) == before


# --- stopped runs, and two at the same time --------------------------------------------------------------------------

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stage_4_stopped_at_any_moment_leaves_whole_bins(folder, number):
    began = time.time()
    check_complete(folder, finish(start(folder, STAGE_4)))
    complete, duration = contents(folder / "input_bin"), time.time() - began
    process = start(folder, STAGE_4)
    time.sleep(duration * random.random())
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)  # a terminal interrupts the whole group
    finish(process)
    if (folder / "input_bin").exists():  # otherwise it was killed between two renames, of which tests/test_files.py
        assert contents(folder / "input_bin") == complete
    check_complete(folder, finish(start(folder, STAGE_4)))
    assert sorted(os.listdir(str(folder))) == ["image.txt", "images", "input_bin"]


def test_slow_images_do_not_hold_up_ctrl_c(tmp_path):
    """Reading one of these takes a good part of a second, and each worker is handed many at a time."""
    (tmp_path / "slow").mkdir()
    Image.new("L", (7900, 7900)).save(str(tmp_path / "slow" / "0.png"))
    for i in range(1, 100):
        os.link(str(tmp_path / "slow" / "0.png"), str(tmp_path / "slow" / ("%d.png" % i)))
    (tmp_path / "slow.txt").write_text("".join("%d.png\n" % i for i in range(100)))
    process = start(tmp_path, STAGE_4[:1] + ["slow", "bins", "slow.txt"])
    while not (tmp_path / "bins.partial").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(1)
    began = time.time()
    os.killpg(process.pid, signal.SIGINT)
    finish(process)
    assert time.time() - began < 10  # all of the images would take far longer
    assert process.stderr == "preprocess_deepmar_pytorch.py: interrupted; no file is half written\n"
    assert not (tmp_path / "bins.partial").exists()


def test_a_second_run_for_the_same_folder_stops(folder):
    with pytest.raises(KeyboardInterrupt):
        with replaced_folder(str(folder / "input_bin")) as partial:
            with open(os.path.join(partial, "a.bin"), "w") as f:
                f.write("of the first run")
            check_error(finish(start(folder, STAGE_4)), str(folder / "input_bin"), "another run is writing this folder")
            assert os.listdir(partial) == ["a.bin"] and contents(folder / "input_bin") == EARLIER
            raise KeyboardInterrupt
    assert contents(folder / "input_bin") == EARLIER


# --- fewer cores than one sees ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("table, quotas, cores", [
    # version 2: a container, a group in a group that has a quota, no quota, no groups
    ("0::/\n", {"": "150000 100000"}, 2), ("0::/u/s\n", {"u": "400000 100000", "u/s": "max 100000"}, 4),
    ("0::/\n", {"": "max 100000"}, None), (None, {"": "100000 100000"}, None),
    # version 1: a container, whose path is the host's; CentOS's order, on the host; no quota, and the mixture of both versions
    ("5:memory:/docker/ab\n4:cpu,cpuacct:/docker/ab\n", {"cpu": "250000 100000"}, 3),
    ("3:cpuacct,cpu:/s/d\n1:name=systemd:/\n", {"cpu": "-1 100000", "cpu/s/d": "100000 100000"}, 1),
    ("4:cpuset:/x\n2:cpu:/x\n0::/x\n", {"cpu/x": "600000 100000"}, 6)])
def test_quotas_of_processor_time_are_read(tmp_path, table, quotas, cores):
    """quotas: {group: "quota period"}."""
    if table is not None:
        (tmp_path / "table").write_text(table)
    for group, text in quotas.items():
        (tmp_path / group).mkdir(parents=True, exist_ok=True)
        if group.startswith("cpu"):  # version 1
            for name, value in zip(("cpu.cfs_quota_us", "cpu.cfs_period_us"), text.split()):
                (tmp_path / group / name).write_text(value + "\n")
        else:
            (tmp_path / group / "cpu.max").write_text(text + "\n")
    assert machine.cgroup_cores(str(tmp_path), str(tmp_path / "table")) == cores


def test_no_more_cores_are_used_than_the_quota(monkeypatch):
    monkeypatch.setattr(machine, "cgroup_cores", lambda: 1)
    assert machine.cores() == 1
    monkeypatch.setattr(machine, "cgroup_cores", lambda: None)
    assert machine.cores() == len(os.sched_getaffinity(0))


# --- the terminal, and who reads the output --------------------------------------------------------------------------

def test_a_locale_without_utf8_is_no_obstacle(folder):
    """Where Python would take the names of files to be ASCII."""
    check_complete(folder, finish(start(folder, STAGE_4, env=dict(os.environ, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0"))))


@pytest.mark.parametrize("package, command", [("PIL", STAGE_4), ("onnxruntime", BENCHMARK), ("numpy", PREDICT)])
def test_a_missing_package_is_named(bins_folder, tmp_path_factory, package, command):
    broken = tmp_path_factory.mktemp("package")
    (broken / (package + ".py")).write_text("raise ImportError('No module named %s')" % package)
    process = finish(start(bins_folder, command, env=dict(os.environ, PYTHONPATH=str(broken))))
    check_error(process, "error: No module named %s; install the packages in requirements.txt" % package)


@pytest.mark.parametrize("command", [PREDICT, GET_INFO], ids=["more than a buffer holds", "less"])
def test_a_reader_that_leaves_is_no_error(bins_folder, command):
    reader, writer = os.pipe()
    os.close(reader)
    process = finish(start(bins_folder, command, stdout=writer))
    os.close(writer)
    assert process.returncode == 141 and process.stderr in ("", "note: %s\n" % ASSUMED), process.stderr


@pytest.mark.parametrize("redirection, status", [(">&-", 0), ("2>&-", 0), (">&- 2>&-", 0), (">/dev/full", 1)])
def test_an_output_that_is_closed_or_full_costs_no_result(bins_folder, redirection, status):
    (bins_folder / "deepmar.info").write_text("")
    process = finish(start(bins_folder, GET_INFO, ["bash", "-c", '"$@" ' + redirection, "bash"]))
    assert process.returncode == status and (bins_folder / "deepmar.info").read_text(), process.stderr
    assert status == 0 or "No space left on device" in process.stderr and process.stderr.count("\n") == 1, process.stderr
