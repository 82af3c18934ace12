"""Two runs at the same time: they do not disturb each other, or the second says so and stops."""
import inspect
import os
import shutil

import pytest
from conftest import check_error
from stages import STAGES, contents, output, prepare, put_earlier, run, start

import get_info
import postprocess_deepmar_pytorch as post
import remove_pad
from preprocess_deepmar_pytorch import replaced_folder

DEAD = 4194304 + 1  # more than any process's number can be (PID_MAX_LIMIT of linux/threads.h)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("concurrency")
    prepare(path)
    return path


def finish(process):
    process.stdout, process.stderr = process.communicate()
    return process


def test_two_devices_at_once(folder):
    run(folder, "benchmark")
    expected = contents(folder / "result" / "dumpOutput_device0")
    for _ in range(3):
        shutil.rmtree(str(folder / "result"))
        processes = [finish(process) for process in
                     [start(folder, "benchmark", more=["-device_id=%d" % device]) for device in range(3)]]
        assert [process.returncode for process in processes] == [0, 0, 0], [process.stderr for process in processes]
        for device in range(3):
            assert contents(folder / "result" / ("dumpOutput_device%d" % device)) == expected
            perf = (folder / "result" / ("perf_vision_batchsize_4_device_%d.txt" % device)).read_text()
            assert perf.startswith("[e2e]") and perf.count("\n") == 5 and perf in processes[device].stdout
        assert len(os.listdir(str(folder / "result"))) == 6


@pytest.mark.parametrize("stage", ["preprocess", "benchmark", "sample"])
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
    for _ in range(3):
        put_earlier(folder, stage)
        for process in [finish(process) for process in [start(folder, stage) for _ in range(3)]]:
            assert process.returncode == 0, process.stderr
        assert output(folder, stage) == expected and set(contents(folder)) == clean


@pytest.mark.parametrize("module", [remove_pad, get_info, post], ids=lambda module: module.__name__)
def test_only_the_temporary_files_of_dead_runs_go(tmp_path, module):
    path = str(tmp_path / "a[1].onnx")  # a name that means something to glob
    mine = ["%s.%d.partial" % (path, os.getppid()), path + ".partial", path + ".notes.partial", path]
    for name in mine + ["%s.%d.partial" % (path, number) for number in (DEAD, DEAD + 1)]:
        open(name, "w").close()
    with module.whole_file(path) as temporary:
        with open(temporary, "w") as f:
            f.write("new")
    assert sorted(os.path.join(str(tmp_path), name) for name in os.listdir(str(tmp_path))) == sorted(mine)
    with open(path) as f:
        assert f.read() == "new"
    # Each script stands alone and has the function; it is the same in all.
    assert inspect.getsource(module.whole_file) == inspect.getsource(get_info.whole_file)
