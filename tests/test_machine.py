"""A full disk, a folder that cannot be written, few open files, no temporary folder: clear errors, nothing torn."""
import ctypes
import os
import re
import resource

import pytest
from conftest import check_error
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
def test_few_files_and_no_temporary_folder_do_not_matter(folder, stage):
    put_earlier(folder, stage)
    run(folder, stage)
    expected = output(folder, stage)
    put_earlier(folder, stage)
    process = finish(start(folder, stage, preexec_fn=few_files, env=dict(os.environ, TMPDIR="/nowhere")))
    assert process.returncode == 0 and re.fullmatch("(note: PETA's names .*\n)?", process.stderr), process.stderr
    assert output(folder, stage) == expected


@pytest.mark.parametrize("stage", list(STAGES))
def test_nothing_is_reported_or_written_at_home(folder, tmp_path, stage):
    """Official builds of ONNX Runtime >= 1.29 keep what they report in ~/.cache, except where a variable says it is CI."""
    kept = ("PATH", "LANG", "TMPDIR", "LD_LIBRARY_PATH")
    put_earlier(folder, stage)
    process = finish(start(folder, stage, env=dict({name: os.environ[name] for name in kept if name in os.environ},
                                                   HOME=str(tmp_path))))
    assert process.returncode == 0, process.stderr
    assert list(tmp_path.iterdir()) == []
