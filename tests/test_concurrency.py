"""Two runs at the same time: they do not disturb each other, or the second says so and stops.

DEEPMAR_TEST_CAMPAIGN=1 repeats what may meet in several ways.
"""
import os
import shutil

import pytest
from stages import STAGES, contents, output, prepare, put_earlier, run, start
from helpers import check_error, namespaces

from lib.files import replaced_folder, whole_file


# Tells a process's number, and runs a script in it.
AS_NUMBER_1 = """
import os, runpy, sys
print(os.getpid(), flush=True)
sys.argv[:] = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("concurrency")
    prepare(path)
    return path


ROUNDS = 3 if os.environ.get("DEEPMAR_TEST_CAMPAIGN") else 1


def finish(process):
    process.stdout, process.stderr = process.communicate()
    return process


def test_two_devices_at_once(folder):
    run(folder, "benchmark")
    expected = contents(folder / "result" / "dumpOutput_device0")
    for _ in range(ROUNDS):
        shutil.rmtree(str(folder / "result"))
        processes = [finish(process) for process in
                     [start(folder, "benchmark", more=["-device_id=%d" % device]) for device in range(3)]]
        assert [process.returncode for process in processes] == [0, 0, 0], [process.stderr for process in processes]
        written = ["dumpOutput_device%d", "dumpOutput_device%d_summary.json", "perf_vision_batchsize_4_device_%d.txt"]
        assert sorted(os.listdir(str(folder / "result"))) == sorted(name % device for name in written for device in range(3))
        for device in range(3):
            assert contents(folder / "result" / ("dumpOutput_device%d" % device)) == expected
            perf = (folder / "result" / ("perf_vision_batchsize_4_device_%d.txt" % device)).read_text()
            assert perf.startswith("[e2e]") and perf.count("\n") == 5 and perf in processes[device].stdout


@pytest.mark.parametrize("stage", ["preprocess", "benchmark"])
def test_a_second_run_that_would_write_the_same_folder_stops(folder, stage):
    earlier = put_earlier(folder, stage)
    path = folder / STAGES[stage][1][0]
    with pytest.raises(KeyboardInterrupt):
        with replaced_folder(str(path), ending="") as partial:
            with open(os.path.join(partial, "a.bin"), "w") as f:
                f.write("of the first run")
            check_error(finish(start(folder, stage)), str(path), "another run is writing this folder")
            assert os.listdir(partial) == ["a.bin"] and output(folder, stage) == earlier
            raise KeyboardInterrupt
    assert output(folder, stage) == earlier


@pytest.mark.parametrize("stage", ["remove_pad", "get_info", "postprocess", "compare"])
def test_runs_that_write_the_same_file_are_both_whole(folder, stage):
    put_earlier(folder, stage)
    run(folder, stage)
    expected, clean = output(folder, stage), set(contents(folder))
    for _ in range(ROUNDS):
        put_earlier(folder, stage)
        for process in [finish(process) for process in [start(folder, stage) for _ in range(3)]]:
            assert process.returncode == 0, process.stderr
        assert output(folder, stage) == expected and set(contents(folder)) == clean


def test_two_containers_write_one_file(folder):
    """In each of them, every process has the number 1."""
    put_earlier(folder, "get_info")
    run(folder, "get_info")
    expected, clean = output(folder, "get_info"), set(contents(folder))
    alone = namespaces("--pid", "--fork")
    processes = [start(folder, "get_info", ["-c", AS_NUMBER_1], prefix=alone) for _ in range(3)]
    for process in [finish(process) for process in processes]:
        assert process.returncode == 0 and process.stdout.startswith("1\n"), process.stderr
    assert output(folder, "get_info") == expected and set(contents(folder)) == clean


def test_two_files_at_once(tmp_path):
    """Neither takes the other's away, and what comes last stays."""
    path = str(tmp_path / "a.onnx")
    with whole_file(path) as first:
        with whole_file(path) as second:
            for name in (first, second):
                with open(name, "w") as f:
                    f.write(name)
        with open(path) as f:
            assert f.read() == second
    with open(path) as f:
        assert f.read() == first and os.listdir(str(tmp_path)) == ["a.onnx"]


def test_only_the_files_of_dead_runs_go(tmp_path):
    path = str(tmp_path / "a[1].onnx")  # a name that means something to glob
    mine = [path, path + ".partial", path + ".notes.partial", path + ".1234567.partial", path + "x.12345678.partial"]
    for name in mine + [path + ".0123abcd.partial"]:
        open(name, "w").close()
    with whole_file(path) as temporary:
        with open(temporary, "w") as f:
            f.write("new")
    assert sorted(os.path.join(str(tmp_path), name) for name in os.listdir(str(tmp_path))) == sorted(mine)
    with open(path) as f:
        assert f.read() == "new"
