"""run_all.sh from end to end: sample data, the user's own data, what stops it, and what a second run finds."""
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
from helpers import ROOT, SIZE, contents, make_model, own_data, run_all, tensor_info, tiny_data
from lib.labels import PETA, label_checksum, read_labels


@pytest.fixture(scope="module")
def own_run(tmp_path_factory):
    """A checkout with a small network, and its work folder after a run on the user's own data, of 26 attributes as PA-100K has.

    There are models of two batch sizes, and results of one. (a function that runs it, the work folder, the two processes)
    """
    folder = tmp_path_factory.mktemp("own")
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
    for name in state:
        if name.endswith("running_mean"):  # the exporter lets layers share equal weights, which INT8 does not take
            state[name].normal_()
    torch.save({"state_dict": {"module." + key: value for key, value in state.items()}},
               str(work / "sample" / "checkpoint.pth.tar"))

    def run(stage, *arguments, cwd=None, environment=(), work=work, **changes):
        return run_all("--work-dir", work, "--stage", stage, *(own_data(str(work), **changes) + list(arguments)),
                       root=folder / "checkout", cwd=cwd, **dict(environment))
    return run, work, [run(1, "--stop-stage", 2, "--batch-size", "1 2"), run(3)]


@pytest.fixture
def own_copy(own_run, tmp_path):
    """A copy of that work folder; (a function that runs there, the folder)."""
    run, source, _ = own_run
    shutil.copytree(str(source), str(tmp_path / "work"))
    return functools.partial(run, work=tmp_path / "work"), tmp_path / "work"


def metrics(output):
    return {name: float(value) for name, value in re.findall(r"^(instance_\w+|mA): (\S+)$", output, re.MULTILINE)}


def results(work, device=0):
    return sorted(os.listdir(os.path.join(work, "result", "dumpOutput_device%d" % device)))


def test_sample_runs_from_end_to_end(first_run):
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
    row = r"\n\| +1 (\| +[0-9.]+ ){2}(\| +- ){2}(\| +[0-9.]+ ){3}\| %s \|\n"  # rates, none of a card, latencies
    assert re.search(row % found["instance_acc"], process.stdout), process.stdout
    with open(os.path.join(work, "report.html")) as f:
        assert str(found["instance_acc"]) in f.read()
    assert not [name for name in os.listdir(work) if "partial" in name or name.endswith(".old")]


def test_labels_decide_the_number_of_attributes(own_run):
    _, work, processes = own_run
    for process in processes:
        assert process.returncode == 0 and process.stderr == "", process.stderr
        assert "stage 0" not in process.stdout
    for batch_size in (1, 2):
        shape = onnx.load(str(work / ("deepmar_bs%d_nopad.onnx" % batch_size))).graph.output[0].type.tensor_type.shape
        assert [dim.dim_value for dim in shape.dim] == [batch_size, 26]
    assert "stage 8 done" in processes[1].stdout and len(results(str(work))) == SIZE
    assert len(json.loads((work / "fusion_result.json").read_text())["attributes"]) == 26


def test_results_of_fewer_images_replace_all_earlier_ones(own_copy, tmp_path):
    run, work = own_copy
    (tmp_path / "five.txt").write_text("".join("%05d.png\r\n" % i for i in (2, 3, 5, 7, 11)))
    (work / "result" / "kept_dumpOutput_device0").mkdir()
    before = (work / "deepmar_bs1.onnx").stat().st_mtime_ns
    process = run(4, "--stop-stage", 7, "--batch-size=2", cwd=tmp_path, **{"image-list": "five.txt"})
    assert process.returncode == 0, process.stderr
    assert "scored 5 images; %d labelled images had no result" % (SIZE - 5) in process.stdout
    assert len(results(str(work))) == 5
    assert sorted(os.listdir(str(work / "result"))) == [
        "dumpOutput_device0", "dumpOutput_device0_summary.json", "fusion_result.json", "kept_dumpOutput_device0",
        "perf_vision_batchsize_2_device_0.txt"]
    assert "stage 3" not in process.stdout and before == (work / "deepmar_bs1.onnx").stat().st_mtime_ns


def test_drop_of_the_accuracy_fails_the_run_after_the_report(first_run):
    work, _ = first_run
    process = run_all("--work-dir", work, "--published-acc", "100", "--stage", 7)
    assert process.returncode == 1
    assert "published" in process.stderr and "the accuracy at batch size 1 is" in process.stderr
    assert "published 100.00 %" in process.stdout
    with open(os.path.join(work, "report.html")) as f:
        assert "FAIL" in f.read()


def test_descriptions_and_thresholds_reach_stage_7_and_the_report(first_run, tmp_path):
    work, _ = first_run
    described = description(os.path.join(work, "deepmar_bs1_nopad.onnx"))
    assert described == description(os.path.join(work, "deepmar_bs1.json"))
    assert (described["attributes"], described["size"], described["last_conv_stride"]) == (PETA, [224, 224], 2)
    content = {"attributes": [{"name": name, "threshold": 0.5} for name in PETA], "names_assumed": False, "goal": "maximal F1",
               "images": 99, "checksum": "0", "tuned_on": {}}
    (tmp_path / "t.json").write_text(json.dumps(content))
    rows, labels = read_labels(os.path.join(work, "sample", "label.json"))
    (tmp_path / "groups.txt").write_text("".join("%s one_person\n" % image for image in rows))
    process = run_all("--work-dir", work, "--stage", 7, "--thresholds", tmp_path / "t.json", "--groups", tmp_path / "groups.txt")
    assert process.returncode == 0 and "tuned for maximal F1 on 99 other images" in process.stdout, process.stderr
    with open(os.path.join(work, "fusion_result.json")) as f:
        report = json.load(f)
    assert {row["threshold"] for row in report["attributes"]} == {0.5} and report["names_assumed"] is False
    assert set(report["intervals"].values()) == {None}  # there are too few groups
    with open(os.path.join(work, "report.html")) as f:
        page = f.read()
    assert "tuned for maximal F1 on 99 other images" in page and "data-interval" not in page
    content["tuned_on"] = {image: label_checksum(labels[row]) for image, row in rows.items()}
    (tmp_path / "t.json").write_text(json.dumps(content))
    process = run_all("--work-dir", work, *own_data(work) + ["--thresholds", str(tmp_path / "t.json")])
    assert process.returncode == 1 and "names and labels of %d of these %d" % (SIZE, SIZE) in process.stderr, process.stderr
    assert "stage 1" not in process.stdout


def test_int8_without_atc_runs_the_twin(own_copy):
    run, work = own_copy
    process = run(3, "--stop-stage", 7, "--int8", "yes", "--calibration-list", work / "sample" / "image.txt")
    assert process.returncode == 0 and "batch size 1: deepmar_bs1_int8.onnx" in process.stdout, process.stderr
    assert "image.txt both name 00001.png, 00002.png" in process.stderr and "scored %d images" % SIZE in process.stdout
    assert "deepmar_bs1_int8.onnx" in (work / "throughput.csv").read_text()


def test_failing_stage_stops_the_run(own_copy):
    run, work = own_copy
    (work / "deepmar_bs1.onnx").write_text("<html>")
    (work / ".made_from" / "deepmar_bs1.onnx.json").unlink()
    process = run(2)
    assert process.returncode == 1 and "stage 3" not in process.stdout
    lines = process.stderr.splitlines()
    assert lines[0].startswith("remove_pad.py: error: ") and "deepmar_bs1.onnx" in lines[0]
    assert lines[1:] == ["run_all.sh: error: stage 2 failed"]


def test_bad_variables_are_usage_errors(tmp_path):
    for wrong, text in ((["--batch-size", "0"], "batch_size"), (["--nonsense", "1"], "nonsense"), (["--stage"], "value"),
                        (["8"], "not an option"), (["--stage", "9"], "stage"), (["--device-id", "-1"], "device_id"),
                        (["--chip-name", "a b"], "chip_name"), (["--checkpoint", __file__], "images is not set, and stage 4"),
                        (["--stage", "7", "--label-file", __file__], "image_list is not set, and stage 7 needs it"),
                        (["--published-acc", "78,9"], "published_acc"), (["--size", "224"], "height and width"),
                        (["--last-conv-stride", "3"], "last_conv_stride"), (["--chips", "0"], "chips"), (["--pure", "x"], "pure"),
                        (["--tolerance", "x"], "tolerance"), (["--stage", "7", "--stop-stage", "4"], "no stage would run"),
                        (["--json", "x"], "json needs --check"), (["--int8", "8"], "int8 must be yes or no"), (["--strict=no"], "strict")):
        process = run_all("--work-dir", tmp_path / "work", *wrong)
        assert process.returncode == 2 and text in process.stderr, (wrong, process.stderr)
    process = run_all("--work-dir", tmp_path / "work", *own_data("/nowhere"))
    assert process.returncode == 1 and "/nowhere/sample/checkpoint.pth.tar" in process.stderr
    assert not (tmp_path / "work").exists()
    for stage, text in ((6, "input_bin is missing; run stage 4 first"), (7, "sample/accuracy.txt is missing; run stage 0 first")):
        process = run_all("--work-dir", tmp_path / "work", "--stage", stage)
        assert process.returncode == 1 and text in process.stderr
    process = run_all("--help")
    assert process.returncode == 0 and "6 inference" in process.stdout
    assert {"--batch-size", "--check", "--json", "--chips", "--strict", "--set-env"} <= set(process.stdout.split())


def test_other_inputs_are_refused_with_the_stage_to_run_again(own_copy, tmp_path):
    run, work = own_copy
    sample, image = work / "sample", work / "sample" / "images" / "00001.png"
    process = run(6, environment={"stop_stage": "6"})
    assert process.returncode == 0 and "stage 7" not in process.stdout, process.stderr  # a copied work folder goes on

    (tmp_path / "checkpoint.pth.tar").write_bytes(b"other")
    (tmp_path / "fewer.txt").write_text("".join((sample / "image.txt").read_text().splitlines(True)[1:]))
    for changes, stage, text in (
            ({"checkpoint": tmp_path / "checkpoint.pth.tar"}, 6, "bs1.onnx was made from another checkpoint.pth.tar; run stage 1"),
            ({"checkpoint": tmp_path / "checkpoint.pth.tar"}, 7, "bs1.onnx was made from another checkpoint.pth.tar; run stage 1"),
            ({"image-list": tmp_path / "fewer.txt"}, 7, "input_bin was made from another fewer.txt; run stage 4 again")):
        process = run(stage, **changes)
        assert process.returncode == 1 and text in process.stderr, (changes, process.stderr)
        assert "instance_acc" not in process.stdout

    content = image.read_bytes()
    shutil.copy(str(sample / "images" / "00002.png"), str(image))
    for stage in (5, 6, 7, 8):
        process = run(stage)
        assert process.returncode == 1 and "1 changed: 00001.png; run stage 4 again" in process.stderr, process.stderr
        assert "instance_acc" not in process.stdout
    image.write_bytes(content)

    model = onnx.load(str(work / "deepmar_bs1.onnx"))
    model.producer_name = "another"
    onnx.save(model, str(work / "deepmar_bs1.onnx"))
    process = run(2, "--stop-stage", 2)
    assert process.returncode == 1 and "bs1.onnx is not what stage 1 made here; run stage 1 again" in process.stderr
    (work / ".made_from" / "deepmar_bs1.onnx.json").unlink()  # now it is the user's own
    assert run(2, "--stop-stage", 2).returncode == 0
    process = run(7)
    assert process.returncode == 1 and "was made from another deepmar_bs1_nopad.onnx; run stage 6 again" in process.stderr


def test_table_of_other_devices_is_not_reported(own_copy):
    run, work = own_copy
    shutil.copytree(str(work / "result" / "dumpOutput_device0"), str(work / "result" / "dumpOutput_device1"))
    process = run(8, "--device-id", 1)
    text = "throughput.csv was made with device_id 0, not 1; run stage 7 again, or give --device-id 0"
    assert process.returncode == 1 and text in process.stderr, process.stderr


def test_stages_from_4_on_need_neither_checkpoint_nor_torch(own_run, tmp_path):
    """As on the card's own machine: the images, the lists and a model are enough."""
    _, source, _ = own_run
    work = tmp_path / "work"
    work.mkdir()
    shutil.copy(str(source / "deepmar_bs1_nopad.onnx"), str(work))
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = sys.modules['torchvision'] = None\n")
    data = own_data(str(source))[2:]  # all but --checkpoint
    process = run_all("--work-dir", work, "--stage", 4, *data, PYTHONPATH=str(tmp_path))
    assert process.returncode == 0 and "scored %d images" % SIZE in process.stdout, process.stderr
    process = run_all("--work-dir", work, "--stage", 6, "--stop-stage", 6, "--image-list", data[3], PYTHONPATH=str(tmp_path))
    assert process.returncode == 0, process.stderr  # stage 6 needs neither images nor labels
    process = run_all("--work-dir", work, "--stage", 8, *data, PYTHONPATH=str(tmp_path))
    assert process.returncode == 1 and "result/fusion_result.json is missing; run stage 7 first" in process.stderr


def test_wrong_labels_stop_the_run_before_a_model_is_made(first_run, tmp_path):
    work, _ = first_run
    with open(os.path.join(work, "sample", "label.json")) as f:
        labels = json.load(f)
    (tmp_path / "narrow.json").write_text(json.dumps({name: values[:34] for name, values in labels.items()}))
    (tmp_path / "broken.json").write_text("{")
    for name, text in (("broken.json", "broken.json: is not JSON"), ("narrow.json", "34")):
        process = run_all("--work-dir", tmp_path / "work", *own_data(work, **{"label-file": tmp_path / name}))
        assert process.returncode == 1 and text in process.stderr, (name, process.stderr)
        assert not [name for name in os.listdir(str(tmp_path / "work")) if name.endswith(".onnx")]


def test_it_runs_by_sh_through_a_link_and_with_safe_path(first_run, tmp_path):
    work, _ = first_run
    (tmp_path / "link.sh").symlink_to(os.path.join(ROOT, "run_all.sh"))
    process = subprocess.run(["sh", str(tmp_path / "link.sh"), "--work-dir", work, "--stage", "7", "--stop-stage", "7"],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
                             env=dict(os.environ, PYTHON=sys.executable, sample_size=str(SIZE), PYTHONSAFEPATH="1"))
    assert process.returncode == 0 and "scored %d images" % SIZE in process.stdout, process.stderr


def test_nothing_of_the_users_shell_gets_in(first_run, tmp_path):
    work, _ = first_run
    (tmp_path / "rc").write_text("echo hello\n")
    settings = {"BASH_ENV": str(tmp_path / "rc"), "SHELLOPTS": "braceexpand:hashall:noglob:keyword", "BASHOPTS": "failglob",
                "BASH_FUNC_cd%%": '() { builtin cd "$@" && pwd\n}', "CDPATH": ".:/", "POSIXLY_CORRECT": "1", "PYTHONINSPECT": "1",
                "GREP_OPTIONS": "--color=always", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    process = run_all("--work-dir", work, "--stage", 7, "--stop-stage", 7, **settings)
    assert process.returncode == 0 and process.stderr == "" and "scored %d images" % SIZE in process.stdout, process.stderr
    process = subprocess.run(["bash", "-x", os.path.join(ROOT, "run_all.sh"), "--help"], stderr=subprocess.PIPE, text=True)
    assert process.returncode == 0 and "+ read_options --help" in process.stderr


def test_a_folders_name_may_begin_with_a_dash(own_copy, tmp_path):
    run, work = own_copy
    work.rename(tmp_path / "-wd")
    process = run(7, "--stop-stage", 7, work="-wd", cwd=tmp_path)
    assert process.returncode == 0 and "scored %d images" % SIZE in process.stdout, process.stderr


def test_packages_go_into_the_environment_whatever_pips_settings_are(tmp_path):
    (tmp_path / "tools" / "run").mkdir(parents=True)
    shutil.copy(os.path.join(ROOT, "tools", "run", "python.sh"), str(tmp_path / "tools" / "run"))
    (tmp_path / "r.txt").write_text("no-such-package\n")
    pip = tmp_path / (".venv-%d.%d" % sys.version_info[:2]) / "bin" / "pip"
    pip.parent.mkdir(parents=True)
    pip.write_text('#!/bin/sh\necho "$PIP_USER $PIP_INDEX_URL $PIP_TARGET$PIP_PREFIX" >&2\n')
    pip.chmod(0o755)
    (tmp_path / "bin").symlink_to(os.path.dirname(sys.executable))
    process = subprocess.run(["bash", "tools/run/python.sh", "r.txt"], cwd=str(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             text=True, env=dict(os.environ, PYTHON="bin/" + os.path.basename(sys.executable), CDPATH=str(tmp_path),
                                                 PIP_USER="1", PIP_TARGET="t", PIP_PREFIX="p", PIP_INDEX_URL="mirror"))
    assert process.returncode == 0 and process.stdout == "%s/python\n" % pip.parent, process.stderr
    assert process.stderr.endswith("0 mirror \n"), process.stderr


def start(work, *arguments, until="stage 6"):
    """Starts run_all.sh on the data in its work folder. Returns the process once it has printed until."""
    command = ["bash", os.path.join(ROOT, "run_all.sh"), "--work-dir", work] + own_data(str(work)) + list(arguments)
    process = subprocess.Popen([str(argument) for argument in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=dict(os.environ, PYTHON=sys.executable, set_env="/dev/null"), universal_newlines=True,
                               start_new_session=True)
    for line in process.stdout:
        if until in line:
            return process
    raise AssertionError(process.stderr.read())


def test_runs_in_one_folder_share_it_wait_or_stop(own_copy):
    """On two devices they do not disturb each other. On the same device, the second one stops."""
    run, work = own_copy
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
    # A run that makes files waits for a run that reads them, also on another device.
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


def test_ctrl_c_ends_the_run_and_its_processes_and_keeps_the_earlier_results(own_copy):
    _, work = own_copy
    before = contents(work / "result")
    write_slow_model(work / "deepmar_bs1_nopad.onnx")
    (work / ".made_from" / "deepmar_bs1_nopad.onnx.json").unlink()  # it is the user's own model
    process = start(work, "--stage", 6, "--device-id", "0 1", until="images -> result")
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
    assert contents(work / "result") == before
