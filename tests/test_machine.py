"""Machines that are not like ours: a full disk, no locks, no threads, overlays, quotas ...: it works, or one line says why."""
import ctypes
import errno
import glob
import os
import re
import resource
import subprocess
import sys

import pytest

from lib.machine import cores
import common
from lib.files import replaced_folder
from lib.machine import cgroup_cores
from helpers import ROOT, check_error, namespaces, refused, script
from lib.labels import ASSUMED
from lib.results import list_results
from stages import STAGES, contents, output, prepare, put_earlier, run, start

# Where each script says it cannot write, if not under the name of its first output.
SAYS = {"sample": "sample", "predict": "pictures/im0_attributes.png"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("machine")
    prepare(path)
    return path


def full_disk(size):
    """No file can have more bytes: the errors of a full disk, without one."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def no_privilege():
    """Takes root's right to write where the permissions forbid it; who is not root has none."""
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH of linux/capability.h
        ctypes.CDLL(None).prctl(24, capability)  # PR_CAPBSET_DROP of linux/prctl.h; in force after exec


def few_files():
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))


def finish(process):
    process.stdout, process.stderr = process.communicate()
    return process


EXPECTED = {}


def undisturbed(folder, stage):
    """What a stage writes; leaves its earlier output in place."""
    if stage not in EXPECTED:
        put_earlier(folder, stage)
        run(folder, stage)
        EXPECTED[stage] = output(folder, stage)
    put_earlier(folder, stage)
    return EXPECTED[stage]


def check_refused(folder, stage, preexec_fn):
    """A script that cannot write says so, names the file and leaves all as it was."""
    earlier = put_earlier(folder, stage)
    before = set(contents(folder))
    process = finish(start(folder, stage, preexec_fn=preexec_fn))
    check_error(process, SAYS.get(stage, os.path.basename(STAGES[stage][1][0])))
    assert output(folder, stage) == earlier and set(contents(folder)) == before
    return process.stderr


@pytest.mark.parametrize("stage", list(STAGES))
def test_a_full_disk(folder, stage):
    size = 200000 if stage == "sample" else 100  # its images fit, its checkpoint does not
    assert "File too large" in check_refused(folder, stage, lambda: full_disk(size))


@pytest.mark.parametrize("stage", sorted(set(STAGES) - {"sample"}))
def test_a_folder_that_cannot_be_written(folder, stage):
    put_earlier(folder, stage)
    folders = [str(folder)] + [str(folder / name) for name in ("result", "lists", "pictures")]
    modes = {name: 0o555 for name in folders if os.path.isdir(name)}
    try:
        for name in modes:
            os.chmod(name, 0o555)
        probe = finish(start(folder, stage, ["-c", "open('probe', 'w')"], preexec_fn=no_privilege))
        assert "PermissionError" in probe.stderr, "the test itself cannot take the right to write"
        earlier = output(folder, stage)
        process = finish(start(folder, stage, preexec_fn=no_privilege))
    finally:
        for name in modes:
            os.chmod(name, 0o755)
    check_error(process, "ermission denied", SAYS.get(stage, os.path.basename(STAGES[stage][1][0])))
    assert output(folder, stage) == earlier


@pytest.mark.parametrize("stage", sorted(set(STAGES) - {"sample"}))
def test_few_files_and_no_temporary_folder_do_not_matter_and_nothing_is_written_at_home(folder, tmp_path, stage):
    """Official builds of ONNX Runtime >= 1.29 keep what they report in ~/.cache, except where a variable says it is CI."""
    kept = ("PATH", "LANG", "LD_LIBRARY_PATH", "OMP_NUM_THREADS")
    expected = undisturbed(folder, stage)
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    process = finish(start(folder, stage, preexec_fn=few_files, env=dict(environment, HOME=str(tmp_path), TMPDIR="/nowhere")))
    assert process.returncode == 0 and re.fullmatch("(note: PETA's names .*\n)?", process.stderr), process.stderr
    assert output(folder, stage) == expected and list(tmp_path.iterdir()) == []


# --- no locks, no threads and processes, no shared memory -----------------------------------------------------------

@pytest.mark.parametrize("stage, error", [("preprocess", errno.ENOSYS), ("benchmark", errno.ENOLCK),
                                          ("get_info", errno.ENOTSUP), ("predict", errno.ENOLCK)])
def test_a_file_system_without_locks(folder, stage, error):
    expected = undisturbed(folder, stage)
    process = finish(start(folder, stage, preexec_fn=refused(error, "flock")))
    assert process.returncode == 0, process.stderr
    assert ("note: this file system has no locks (%s)" % os.strerror(error) in process.stderr) == \
        (stage in ("preprocess", "benchmark")), process.stderr
    assert output(folder, stage) == expected


def test_another_error_of_a_lock_is_one(folder):
    put_earlier(folder, "preprocess")
    check_error(finish(start(folder, "preprocess", preexec_fn=refused(errno.EIO, "flock"))), "Input/output error")


@pytest.mark.parametrize("stage", sorted(set(STAGES) - {"export_onnx", "sample"}))
def test_no_threads_and_processes_can_be_started(folder, stage):
    expected = undisturbed(folder, stage)
    process = finish(start(folder, stage, preexec_fn=refused(errno.EAGAIN, "clone", "clone3", "fork", "vfork")))
    assert process.returncode == 0 and "Traceback" not in process.stderr, process.stderr
    said = {"preprocess": "note: only 0 of ", "lists": "note: no process can be started (Resource temporarily unavailable)",
            "benchmark": "ulimit -u", "predict": "ulimit -u"}
    assert said.get(stage, "") in process.stderr
    assert output(folder, stage) == expected


def test_no_threads_for_the_report_and_the_quantizer(folder, tmp_path):
    run(folder, "postprocess")
    run(folder, "benchmark")
    for command, said in (
            (["report.py", "--images", "images", "--results", "logits", "--output", str(tmp_path / "r.html"),
              "--perf", "result/perf_vision_batchsize_4_device_0.txt"], ""),
            (["quantize.py", "model.onnx", "input_bin", str(tmp_path / "int8.onnx")], "needs a thread for each core"),
            (["benchmark.py", "-batch_size=4", "-om_path=model.onnx", "-round=2"], "one thread does all the work")):
        process = subprocess.Popen([sys.executable, os.path.join(ROOT, "tools", command[0])] + command[1:], cwd=str(folder),
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
                                   preexec_fn=refused(errno.EAGAIN, "clone", "clone3", "fork", "vfork"))
        finish(process)
        assert said in process.stderr, process.stderr
        if process.returncode:
            check_error(process, "(ulimit -u and -v, a container's pids limit)")
    assert not [name for name in os.listdir(str(tmp_path)) if ".partial" in name or name == "int8.onnx"]


@pytest.mark.parametrize("stage", ["preprocess", "benchmark", "lists"])
@pytest.mark.parametrize("mount", ["-o ro", "-o size=4k"])
def test_no_shared_memory(folder, stage, mount):
    alone = namespaces("--mount")
    expected = undisturbed(folder, stage)
    in_it = ["sh", "-c", "mount -t tmpfs %s tmpfs /dev/shm && { head -c 9999 /dev/zero >/dev/shm/full; exec \"$@\"; }" % mount,
             "sh"]
    process = finish(start(folder, stage, prefix=alone + in_it))
    assert process.returncode == 0 and ("Read-only" in process.stderr or "No space" in process.stderr), process.stderr
    assert output(folder, stage) == expected


# --- folders that cannot be renamed ---------------------------------------------------------------------------------

OVERLAY = """
set -e
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/merged"
mount -t overlay overlay -o lowerdir="$2",upperdir="$1/upper",workdir="$1/work",redirect_dir=off "$1/merged"
cd "$1/merged"
out=$3
shift 3
"$1" -c 'import os; os.rename("bins", "elsewhere")' 2>&1 | grep -q "Invalid cross-device link"
"$@"
ls -d bins*
cp -r bins "$out"
"""


def test_the_lower_layer_of_an_overlay(folder, tmp_path):
    """As where an earlier output is a part of a container's image."""
    alone = namespaces("--mount")
    expected = undisturbed(folder, "preprocess")
    (tmp_path / "layers").mkdir()
    process = finish(start(folder, "preprocess",
                           prefix=alone + ["sh", "-c", OVERLAY, "sh", tmp_path / "layers", folder, tmp_path / "bins"]))
    assert process.returncode == 0 and process.stdout.endswith("]\nbins\n"), (process.stdout, process.stderr)
    assert [contents(tmp_path / "bins")] == expected
    assert output(folder, "preprocess") != expected, "the lower layer has been written to"


def test_what_cannot_be_renamed_and_is_half_deleted_is_no_result(tmp_path, monkeypatch):
    (tmp_path / "bins").mkdir()
    for i in range(3):
        (tmp_path / "bins" / ("%d_1.bin" % i)).write_bytes(bytes(3 * 8 * 8 * 4))
    rename, remove, deleted = os.rename, os.remove, []

    def rename_none(source, target):
        if source == str(tmp_path / "bins"):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        rename(source, target)

    def remove_one(path):
        if deleted:
            raise KeyboardInterrupt
        deleted.append(path)
        remove(path)

    monkeypatch.setattr(os, "rename", rename_none)
    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        with replaced_folder(str(tmp_path / "bins")):
            stopped.setattr(os, "remove", remove_one)
    assert len(os.listdir(str(tmp_path / "bins"))) == 3 and not (tmp_path / "bins.partial").exists()
    check_error(script("get_info.py", "bins", "i.info", 8, 8, cwd=tmp_path), "unfinished.bin (0 bytes)")
    with pytest.raises(ValueError, match="unfinished.bin: is not a result file"):
        list_results([str(tmp_path / "bins")])
    with replaced_folder(str(tmp_path / "bins")) as partial:
        open(os.path.join(partial, "new.bin"), "w").close()
    assert os.listdir(str(tmp_path)) == ["bins"] and os.listdir(str(tmp_path / "bins")) == ["new.bin"]


def test_a_mounted_folder(folder):
    alone = namespaces("--mount")
    for mount in ("-t tmpfs tmpfs bins", "--bind input_bin bins"):  # the second is of the same device
        earlier = put_earlier(folder, "preprocess")
        process = finish(start(folder, "preprocess", prefix=alone + ["sh", "-c", "mount %s && exec \"$@\"" % mount, "sh"]))
        check_error(process, "bins: something is mounted there", "give a folder inside it")
        assert output(folder, "preprocess") == earlier and not (folder / "bins.partial").exists()


# --- fewer cores than one sees ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("table, quotas, cores", [
    # A container of today, a session of a group that has a quota, no quota, a part of a core
    ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
    ("0::/user.slice/user-0.slice\n", {"user.slice/cpu.max": "400000 100000\n",
                                       "user.slice/user-0.slice/cpu.max": "max 100000\n"}, 4),
    ("0::/a/b\n", {"a/cpu.max": "400000 100000\n", "a/b/cpu.max": "100000 50000\n"}, 2),
    ("0::/\n", {"cpu.max": "max 100000\n"}, None), ("0::/\n", {"cpu.max": "20000 100000\n"}, 1), ("0::/\n", {}, None),
    # cgroup v1: a container, whose path is the host's; on the host; CentOS's order; no quota; the mixture of both versions
    ("5:memory:/docker/ab\n4:cpu,cpuacct:/docker/ab\n", {"cpu/cpu.cfs_quota_us": "250000\n",
                                                         "cpu/cpu.cfs_period_us": "100000\n"}, 3),
    ("3:cpuacct,cpu:/system.slice/docker-1.scope\n1:name=systemd:/\n",
     {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n",
      "cpu/system.slice/docker-1.scope/cpu.cfs_quota_us": "100000\n",
      "cpu/system.slice/docker-1.scope/cpu.cfs_period_us": "100000\n"}, 1),
    ("2:cpu:/\n0::/init.scope\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
    ("4:cpuset:/x\n2:cpu:/x\n0::/x\n", {"cpu/x/cpu.cfs_quota_us": "600000\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, 6),
    (None, {"cpu.max": "100000 100000\n"}, None)])
def test_quotas_of_processor_time(tmp_path, table, quotas, cores):
    if table is not None:
        (tmp_path / "table").write_text(table)
    for name, text in quotas.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cgroup_cores(str(tmp_path), str(tmp_path / "table")) == cores


def test_no_more_cores_than_the_quota(monkeypatch):
    monkeypatch.setattr(common, "cgroup_cores", lambda: 1)
    assert cores() == 1
    monkeypatch.setattr(common, "cgroup_cores", lambda: None)
    assert cores() == len(os.sched_getaffinity(0))


# --- the terminal, and who reads the output --------------------------------------------------------------------------

@pytest.mark.parametrize("stage", sorted(set(STAGES) - {"export_onnx", "sample"}))
def test_a_link_to_a_script_and_a_locale_without_utf8(folder, stage):
    """By a relative path, where Python may not look for modules beside the script, and file names would be ASCII."""
    expected = undisturbed(folder, stage)
    (folder / "links").mkdir(exist_ok=True)
    link = folder / "links" / (stage + "_link")
    if not link.exists():
        link.symlink_to(STAGES[stage][0][0])
    process = finish(start(folder, stage, script=os.path.join("links", link.name), env=dict(
        os.environ, PYTHONSAFEPATH="1", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")))
    assert process.returncode == 0 and "Traceback" not in process.stderr, process.stderr
    assert output(folder, stage) == expected


def shell(command, cwd):
    """Runs a line of bash with $PYTHON and $ROOT; returns (exit status of its first command, output, errors)."""
    process = subprocess.Popen(["bash", "-c", command + "\nexit ${PIPESTATUS[0]}"], cwd=str(cwd), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, universal_newlines=True,
                               env=dict(os.environ, PYTHON=sys.executable, ROOT=ROOT))
    output, errors = process.communicate()
    return process.returncode, output, errors


def test_a_link_to_any_script(tmp_path):
    for path in glob.glob(ROOT + "/*.py") + glob.glob(ROOT + "/tools/*.py"):
        if "__main__" in open(path, encoding="utf-8").read():
            link = tmp_path / ("a_" + os.path.basename(path))
            link.symlink_to(path)
            process = subprocess.Popen([sys.executable, link.name, "--help"], cwd=str(tmp_path), stdout=subprocess.PIPE,
                                       stderr=subprocess.PIPE, env=dict(os.environ, PYTHONSAFEPATH="1"))
            output, errors = process.communicate()
            assert process.returncode == 0 and output.startswith(b"usage: ") and errors == b"", (path, errors)


@pytest.mark.parametrize("package, stage", [("numpy", "postprocess"), ("numpy", "predict"), ("PIL", "preprocess"),
                                            ("onnx", "remove_pad"), ("onnxruntime", "benchmark"), ("scipy", "lists")])
def test_a_missing_package(folder, tmp_path, package, stage):
    (tmp_path / (package + ".py")).write_text("raise ImportError('No module named %s')" % package)
    earlier = put_earlier(folder, stage)
    process = finish(start(folder, stage, env=dict(os.environ, PYTHONPATH=str(tmp_path))))
    check_error(process, "error: No module named %s; install the packages in requirements.txt" % package)
    assert output(folder, stage) == earlier


@pytest.mark.parametrize("stage", ["predict", "get_info"])  # more than a buffer holds, and less
def test_a_reader_that_leaves(folder, stage):
    reader, writer = os.pipe()
    os.close(reader)
    command = {"predict": [ROOT + "/tools/predict.py"] + ["images/im%d.png" % i for i in range(20)] + ["--onnx=model.onnx"],
               "get_info": STAGES["get_info"][0]}[stage]
    process = subprocess.Popen([sys.executable] + command, cwd=str(folder), stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    _, errors = process.communicate()
    assert process.returncode == 141 and errors in (b"", b"note: %s\n" % ASSUMED.encode()), errors


def test_output_that_is_closed_or_full(folder):
    for redirection, status in ((">&-", 0), ("2>&-", 0), (">&- 2>&-", 0), (">/dev/full", 1)):
        (folder / "new.info").write_text("")
        done = shell("$PYTHON $ROOT/get_info.py input_bin new.info 224 224 " + redirection, folder)
        assert done[0] == status and "Traceback" not in done[2] and (folder / "new.info").read_text(), done
    assert "No space left on device" in done[2] and done[2].count("\n") == 1


def test_a_checkout_on_windows_keeps_the_line_ends(tmp_path):
    names = [".gitattributes", "run_all.sh", "get_info.py", "README.md", "tools/report_template.html"]
    (tmp_path / "tools").mkdir()
    for name in names:
        (tmp_path / name).write_bytes(open(os.path.join(ROOT, name), "rb").read())
    for command in (["init", "-q"], ["config", "core.autocrlf", "true"], ["add", "."], ["rm", "-q", "-r", "--cached", "."],
                    ["add", "."]):
        subprocess.check_call(["git"] + command, cwd=str(tmp_path), stderr=subprocess.DEVNULL)
    for name in names:
        os.remove(str(tmp_path / name))
    subprocess.check_call(["git", "checkout", "-q", "--", "."], cwd=str(tmp_path))
    assert not any(b"\r" in (tmp_path / name).read_bytes() for name in names)
