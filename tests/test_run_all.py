"""run_all.sh from end to end: sample data, the user's own data, a (stand-in) card, and what stops it."""
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

import DeepMAR
from lib.models import description
from helpers import ROOT, SIZE, make_model, own_data, run_all, tensor_info, tiny_data
from lib.labels import PETA, label_checksum, read_labels


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """A checkout with a smaller network, and its work folder after a run on the user's own data, of 26 attributes as PA-100K has.

    The models are of two batch sizes, the results of one. (a way to run it, the work folder, the two processes)
    """
    folder = tmp_path_factory.mktemp("small")
    shutil.copytree(ROOT, str(folder / "checkout"), ignore=lambda _, names: [
        name for name in names if name.startswith((".", "work")) or name == "tests"])
    network = folder / "checkout" / "DeepMAR.py"
    source = network.read_text()
    assert source.count("BLOCKS = [3, 4, 6, 3]") == 1
    network.write_text(source.replace("BLOCKS = [3, 4, 6, 3]", "BLOCKS = [1, 1, 1, 1]"))
    work = folder / "work"
    tiny_data(work)
    label_file = work / "sample" / "label.json"
    label_file.write_text(json.dumps({name: labels[:26] for name, labels in json.loads(label_file.read_text()).items()}))
    torch.manual_seed(0)
    with mock.patch.object(DeepMAR, "BLOCKS", [1, 1, 1, 1]):
        state = DeepMAR.DeepMAR_ResNet50(num_att=26).state_dict()
    torch.save({"state_dict": {"module." + key: value for key, value in state.items()}},
               str(work / "sample" / "checkpoint.pth.tar"))

    def run(stage, *arguments, cwd=None, environment=(), work=work, **changes):
        return run_all("--work-dir", work, "--stage", stage, *(own_data(str(work), **changes) + list(arguments)),
                       root=folder / "checkout", cwd=cwd, **dict(environment))
    return run, work, [run(1, "--stop-stage", 2, "--batch-size", "1 2"), run(3)]


@pytest.fixture
def copied_run(small_run, tmp_path):
    """A copy of the small network's work folder; (a way to run there, the folder)."""
    run, source, _ = small_run
    shutil.copytree(str(source), str(tmp_path / "work"))
    return functools.partial(run, work=tmp_path / "work"), tmp_path / "work"


def metrics(output):
    return {name: float(value) for name, value in re.findall(r"^(instance_\w+|mA): (\S+)$", output, re.MULTILINE)}


def results(work, device=0):
    return sorted(os.listdir(os.path.join(work, "result", "dumpOutput_device%d" % device)))


def test_sample_from_end_to_end(first_run):
    work, process = first_run
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    for stage in range(9):
        assert "[run_all] stage %d: " % stage in process.stdout
        assert "[run_all] stage %d done in " % stage in process.stdout
    assert "backend onnxruntime: no atc and no OM on this machine" in process.stdout
    found = metrics(process.stdout)
    assert list(found) == ["instance_acc", "instance_precision", "instance_recall", "instance_F1", "mA"]
    with open(os.path.join(work, "fusion_result.json")) as f:
        report = json.load(f)
    assert {name: report[name] for name in found} == found
    assert found["instance_acc"] > 0.84
    with open(os.path.join(work, "sample", "accuracy.txt")) as f:
        assert abs(found["instance_acc"] - float(f.read())) < 0.005
    assert "scored %d images; 0 labelled images had no result" % SIZE in process.stdout
    names = ["%05d" % (i + 1) for i in range(SIZE)]
    assert results(work) == [name + "_1.bin" for name in names]
    assert sorted(os.listdir(os.path.join(work, "input_bin"))) == [name + ".bin" for name in names]
    row = r"\n\| +1 (\| +[0-9.]+ ){2}(\| +- ){2}(\| +[0-9.]+ ){3}\| %s \|\n"  # rates, no card's, latencies
    assert re.search(row % found["instance_acc"], process.stdout), process.stdout
    with open(os.path.join(work, "report.html")) as f:
        assert str(found["instance_acc"]) in f.read()
    assert not [name for name in os.listdir(work) if "partial" in name or name.endswith(".old")]


def test_another_attribute_set(small_run):
    """26 attributes, with no option given; two batch sizes' models in one run."""
    run, work, processes = small_run
    for process in processes:
        assert process.returncode == 0 and process.stderr == "", process.stderr
        assert "stage 0" not in process.stdout
    for batch_size in (1, 2):
        assert onnx.load(str(work / ("deepmar_bs%d_nopad.onnx" % batch_size))).graph.output[0].type.tensor_type.shape.dim[
            0].dim_value == batch_size
    assert "stage 8 done" in processes[1].stdout and len(results(str(work))) == SIZE
    assert len(json.loads((work / "fusion_result.json").read_text())["attributes"]) == 26


def test_smaller_data_in_the_same_folder_leaves_nothing_stale(copied_run, tmp_path):
    """Five of the images, batch size 2; the earlier run's other results must not be counted."""
    run, work = copied_run
    (tmp_path / "five.txt").write_text("".join("%05d.png\r\n" % i for i in (2, 3, 5, 7, 11)))
    process = run(4, "--stop-stage", 7, "--batch-size=2", cwd=tmp_path, **{"image-list": "five.txt"})
    assert process.returncode == 0, process.stderr
    assert "scored 5 images; %d labelled images had no result" % (SIZE - 5) in process.stdout
    assert len(results(str(work))) == 5
    assert os.path.exists(str(work / "result" / "perf_vision_batchsize_2_device_0.txt"))
    assert not os.path.exists(str(work / "result" / "perf_vision_batchsize_1_device_0.txt"))
    # only what it is asked to
    process = run(7, "--batch-size", 2)
    assert process.returncode == 1 and "made from another image.txt; run stage 4 again" in process.stderr, process.stdout
    before = (work / "deepmar_bs1.onnx").stat().st_mtime_ns
    process = run(4, "--stop-stage", 6, environment={"batch_size": "1"})
    assert process.returncode == 0, process.stderr
    assert "stage 3" not in process.stdout and before == (work / "deepmar_bs1.onnx").stat().st_mtime_ns
    assert len(results(str(work))) == SIZE


def test_a_drop_beyond_one_percent_fails_and_says_which_stage(first_run):
    work, _ = first_run
    process = run_all("--work-dir", work, "--published-acc", "100", "--stage", 7)
    assert process.returncode == 1
    assert "published" in process.stderr and "the accuracy at batch size 1 is" in process.stderr
    assert "published 100.00 %" in process.stdout
    with open(os.path.join(work, "report.html")) as f:  # is made all the same, to see why
        assert "FAIL" in f.read()


def test_names_intervals_and_thresholds(first_run, tmp_path):
    """The model says what it is, beside an OM too; stage 7 and the report take limits that were found on other images."""
    work, _ = first_run
    described = description(os.path.join(work, "deepmar_bs1_nopad.onnx"))
    assert described == description(os.path.join(work, "deepmar_bs1.json"))
    assert (described["attributes"], described["size"], described["last_conv_stride"]) == (PETA, [224, 224], 2)
    content = {"attributes": [{"name": name, "threshold": 0.5} for name in PETA], "names_assumed": False, "goal": "maximal F1",
               "images": 99, "checksum": "0", "tuned_on": {}}
    (tmp_path / "t.json").write_text(json.dumps(content))
    process = run_all("--work-dir", work, "--stage", 7, "--thresholds", tmp_path / "t.json")
    assert process.returncode == 0 and "tuned for maximal F1 on 99 other images" in process.stdout, process.stderr
    with open(os.path.join(work, "fusion_result.json")) as f:
        report = json.load(f)
    assert {row["threshold"] for row in report["attributes"]} == {0.5} and report["names_assumed"] is False
    assert report["intervals"]["instance_acc"][0] < report["instance_acc"] < report["intervals"]["instance_acc"][1]
    with open(os.path.join(work, "report.html")) as f:
        assert "tuned for maximal F1 on 99 other images" in f.read()
    rows, labels = read_labels(os.path.join(work, "sample", "label.json"))
    content["tuned_on"] = {image: label_checksum(labels[row]) for image, row in rows.items()}
    (tmp_path / "t.json").write_text(json.dumps(content))
    process = run_all("--work-dir", work, *own_data(work) + ["--thresholds", str(tmp_path / "t.json")])
    assert process.returncode == 1 and "was tuned on %d of these %d images" % (SIZE, SIZE) in process.stderr, process.stderr
    assert "stage 1" not in process.stdout


def test_a_failing_stage_stops_the_run(copied_run):
    run, work = copied_run
    (work / "deepmar_bs1.onnx").write_text("<html>")
    (work / ".made_from" / "deepmar_bs1.onnx.json").unlink()
    process = run(2)
    assert process.returncode == 1 and "stage 3" not in process.stdout
    lines = process.stderr.splitlines()
    assert lines[0].startswith("remove_pad.py: error: ") and "deepmar_bs1.onnx" in lines[0]
    assert lines[1:] == ["run_all.sh: error: stage 2 failed"]


def test_bad_variables(tmp_path):
    for wrong, text in ((["--batch-size", "0"], "batch_size"), (["--batch-size", "x"], "batch_size"),
                        (["--nonsense", "1"], "nonsense"), (["--stage"], "value"), (["8"], "not an option"), (["--stage", "9"], "stage"),
                        (["--device-id", "-1"], "device_id"), (["--chip-name", "a b"], "chip_name"), (["--chips", "0"], "chips"),
                        (["--checkpoint", __file__], "images is not set, and stage 4"),
                        (["--stage", "7", "--label-file", __file__], "image_list is not set, and stage 7 needs it"),
                        (["--published-acc", "78,9"], "published_acc"), (["--published-acc", "780"], "published_acc"),
                        (["--size", "224"], "height and width"), (["--size", "0", "224"], "height and width"),
                        (["--last-conv-stride", "3"], "last_conv_stride")):
        process = run_all("--work-dir", tmp_path / "work", *wrong)
        assert process.returncode == 2 and text in process.stderr, (wrong, process.stderr)
    process = run_all("--work-dir", tmp_path / "work", *own_data("/nowhere"))
    assert process.returncode == 1 and "/nowhere/sample/checkpoint.pth.tar" in process.stderr
    assert not (tmp_path / "work").exists()
    process = run_all("--work-dir", tmp_path / "work", "--stage", 6)
    assert process.returncode == 1 and "input_bin is missing; run stage 4 first" in process.stderr
    process = run_all("--help")
    assert process.returncode == 0 and "6 inference" in process.stdout
    assert all(option in process.stdout for option in ("--batch-size", "--check", "--json", "--chips", "--strict", "--set-env"))


def check_refused(process, text):
    """Nothing is scored."""
    assert process.returncode == 1 and text in process.stderr, process.stderr
    assert "instance_acc" not in process.stdout


@pytest.fixture
def other_checkpoint(copied_run, tmp_path):
    content = torch.load(str(copied_run[1] / "sample" / "checkpoint.pth.tar"))
    content["state_dict"]["module.classifier.bias"] += 1
    torch.save(content, str(tmp_path / "checkpoint.pth.tar"))
    return tmp_path / "checkpoint.pth.tar"


def test_other_pictures_under_the_same_names_are_refused(copied_run):
    run, work = copied_run
    images = work / "sample" / "images"
    assert run(6, "--stop-stage", 6).returncode == 0  # a copied work folder goes on
    shutil.copy(str(images / "00002.png"), str(images / "00001.png"))
    for stage in (5, 6, 7, 8):
        check_refused(run(stage), "1 changed: 00001.png; run stage 4 again")


def test_another_checkpoint_or_list_is_refused(copied_run, other_checkpoint, tmp_path):
    run, work = copied_run
    lines = (work / "sample" / "image.txt").read_text().splitlines()
    (tmp_path / "fewer.txt").write_text("\n".join(lines[1:]) + "\n")
    (tmp_path / "renamed.txt").write_text("\n".join(["other.png"] + lines[1:]) + "\n")
    check_refused(run(7, checkpoint=other_checkpoint), "bs1.onnx was made from another checkpoint.pth.tar; run stage 1")
    check_refused(run(6, **{"image-list": tmp_path / "fewer.txt"}), "input_bin was made from another fewer.txt; run stage 4 again")
    check_refused(run(7, **{"image-list": tmp_path / "renamed.txt"}),
                  "1 of the %d images in %s are not in" % (SIZE, tmp_path / "renamed.txt"))


def test_results_of_another_model_are_refused(copied_run, other_checkpoint):
    run, _ = copied_run
    process = run(1, "--stop-stage", 2, checkpoint=other_checkpoint)
    assert process.returncode == 0, process.stderr
    check_refused(run(7, checkpoint=other_checkpoint), "was made from another deepmar_bs1_nopad.onnx; run stage 6 again")
    check_refused(run(6), "run stage 1 again")


def test_on_the_cards_own_machine(small_run, tmp_path):
    """No checkpoint and no torch there: the images, the lists and a model are enough for stage 4 and what follows."""
    _, source, _ = small_run
    work = tmp_path / "work"
    work.mkdir()
    shutil.copy(str(source / "deepmar_bs1_nopad.onnx"), str(work))
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = sys.modules['torchvision'] = None\n")
    data = own_data(str(source))[2:]  # all but --checkpoint
    process = run_all("--work-dir", work, "--stage", 4, *data, PYTHONPATH=str(tmp_path))
    assert process.returncode == 0 and "scored %d images" % SIZE in process.stdout, process.stderr
    # and each stage asks for what it needs alone
    process = run_all("--work-dir", work, "--stage", 6, "--stop-stage", 6, "--image-list", data[3], PYTHONPATH=str(tmp_path))
    assert process.returncode == 0, process.stderr
    process = run_all("--work-dir", work, "--stage", 8, *data, PYTHONPATH=str(tmp_path))
    assert process.returncode == 1 and "result/fusion_result.json is missing; run stage 7 first" in process.stderr
    process = run_all("--work-dir", work, "--stage", 7, "--stop-stage", 7, *data, PYTHONPATH=str(tmp_path))
    assert process.returncode == 0, process.stderr


def test_the_users_lists_are_checked_before_any_work(first_run, tmp_path):
    """How each fault is named: tests/test_inputs.py."""
    work, _ = first_run
    with open(os.path.join(work, "sample", "label.json")) as f:
        labels = json.load(f)
    (tmp_path / "fewer.json").write_text(json.dumps({name: labels[name] for name in sorted(labels)[1:]}))
    process = run_all("--work-dir", tmp_path / "work", *own_data(work, **{"label-file": tmp_path / "fewer.json"}))
    assert process.returncode == 1 and "has no label for 1 of %d images: 00001" % SIZE in process.stderr, process.stderr
    assert "stage 1" not in process.stdout


def test_sh_and_a_link(first_run, tmp_path):
    """sh run_all.sh, through a symbolic link, in a Python that does not look beside the script for modules."""
    work, _ = first_run
    (tmp_path / "link.sh").symlink_to(os.path.join(ROOT, "run_all.sh"))
    process = subprocess.run(["sh", str(tmp_path / "link.sh"), "--work-dir", work, "--stage", "7"], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, universal_newlines=True,
                             env=dict(os.environ, PYTHON=sys.executable, sample_size=str(SIZE), PYTHONSAFEPATH="1"))
    assert process.returncode == 0 and "scored %d images" % SIZE in process.stdout, process.stderr


def start(work, *arguments, until="stage 6"):
    """Starts run_all.sh on the data in its work folder and returns once it has said so; the process."""
    command = ["bash", os.path.join(ROOT, "run_all.sh"), "--work-dir", work] + own_data(str(work)) + list(arguments)
    process = subprocess.Popen([str(argument) for argument in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=dict(os.environ, PYTHON=sys.executable, set_env="/dev/null"), universal_newlines=True,
                               start_new_session=True)
    for line in process.stdout:
        if until in line:
            return process
    raise AssertionError(process.stderr.read())


def test_two_runs_in_one_folder(copied_run):
    """On two devices they do not disturb each other; on the same device the second one says so and stops."""
    run, work = copied_run
    arguments = ["--stage", 6, "--stop-stage", 7]
    one = start(work, *arguments)
    one.send_signal(signal.SIGSTOP)  # so that it does not end before the others
    two = start(work, *(arguments + ["--device-id", 1]))
    third = run(6)
    assert third.returncode == 1 and "another run is at work on device 0" in third.stderr, (third.stdout, third.stderr)
    one.send_signal(signal.SIGCONT)
    for process in (one, two):
        output, error = process.communicate()
        assert process.returncode == 0 and "scored %d images" % SIZE in output, error
    assert results(str(work), 0) == results(str(work), 1)
    # one that makes files waits for one that reads them, though the device is another
    one = start(work, "--stage", 6, "--stop-stage", 6)
    one.send_signal(signal.SIGSTOP)
    two = start(work, "--stage", 4, "--stop-stage", 4, "--device-id", 1, until="waiting for the run on another device")
    assert one.poll() is None
    one.send_signal(signal.SIGCONT)
    _, error = two.communicate()
    assert two.returncode == 0, error
    assert one.poll() is not None
    one.communicate()
    assert one.returncode == 0


def write_slow_model(path):
    """Writes a model of DeepMAR's interface that computes for minutes."""
    nodes = [helper.make_node("ReduceMean", ["actual_input_1"], ["mean"], keepdims=0), helper.make_node("Mul", ["m", "mean"], ["h0"])]
    # The constant comes first: of a second factor that is constant, ONNX Runtime makes a copy for each node.
    nodes += [helper.make_node("MatMul", ["m", "h%d" % i], ["h%d" % (i + 1)]) for i in range(3000)]
    nodes += [helper.make_node("ReduceMean", ["h3000"], ["one"], axes=[0, 1]), helper.make_node("MatMul", ["one", "w"], ["output1"])]
    onnx.save(make_model(nodes, [tensor_info("actual_input_1", [1, 3, 224, 224])], [tensor_info("output1", [1, 26])],
                         [("m", np.zeros((1024, 1024), np.float32)), ("w", np.zeros((1, 26), np.float32))]), str(path))


def test_ctrl_c_ends_it_and_its_processes(copied_run, tmp_path):
    run, work = copied_run
    devices = ["--device-id", "0 1"]
    before = run(6, "--stop-stage", 7, *devices)
    assert before.returncode == 0, before.stderr
    model, record = work / "deepmar_bs1_nopad.onnx", work / ".made_from" / "deepmar_bs1_nopad.onnx.json"
    for path in (model, record):
        path.rename(tmp_path / path.name)
    write_slow_model(model)
    process = start(work, "--stage", 6, *devices, until="images -> result")
    while len(list(work.glob("result.partial*/result/dumpOutput_device*.partial"))) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    started = time.time()
    _, error = process.communicate()
    assert time.time() - started < 30  # the models would take far longer
    assert process.returncode == 130 and error == "run_all.sh: error: stage 6 failed\n", error
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # nothing of it is left
    assert not [name for name in os.listdir(str(work)) if "partial" in name]
    for path in (model, record):
        (tmp_path / path.name).rename(path)
    after = run(7, "--stop-stage", 7, *devices)
    assert after.returncode == 0 and metrics(after.stdout) == metrics(before.stdout)
