"""run_all.sh from end to end: sample data, the user's own data, a (stand-in) card, and what stops it."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from common import description
from conftest import ROOT, SIZE, own_data, run_all
from postprocess_deepmar_pytorch import PETA, label_checksum, read_labels

WRONG_CHECKPOINT = "bs1.onnx was made from another checkpoint.pth.tar; run stage 1"


def metrics(output):
    return {name: float(value) for name, value in re.findall(r"^(instance_\w+|mA): (\S+)$", output, re.MULTILINE)}


def results(work, device=0):
    return sorted(os.listdir(os.path.join(work, "result", "dumpOutput_device%d" % device)))


def test_sample_from_end_to_end(first):
    work, process = first
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
    assert re.search(r"\n\| +1 \| +\S+ \| +\S+ \| +- \| %s \|\n" % found["instance_acc"], process.stdout), process.stdout
    with open(os.path.join(work, "report.html")) as f:
        assert str(found["instance_acc"]) in f.read()
    assert not [name for name in os.listdir(work) if "partial" in name or name.endswith(".old")]


def test_own_smaller_data_after_it_leaves_nothing_stale(first, tmp_path):
    """Five of the images, batch size 8, in the same folder; the earlier run's other results must not be counted."""
    work, process = first
    (tmp_path / "five.txt").write_text("".join("%05d.png\r\n" % i for i in (2, 3, 5, 7, 11)))
    process = run_all("--work-dir", work, "--batch-size=8", *own_data(work, **{"image-list": "five.txt"}), cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "scored 5 images; %d labelled images had no result" % (SIZE - 5) in process.stdout
    assert len(results(work)) == 5 and "stage 0" not in process.stdout
    assert os.path.exists(os.path.join(work, "result", "perf_vision_batchsize_8_device_0.txt"))
    # only what it is asked to
    process = run_all("--work-dir", work, "--stage", 7, "--batch-size", 8, *own_data(work))
    assert process.returncode == 1 and "made from another image.txt; run stage 4 again" in process.stderr, process.stdout
    before = os.path.getmtime(os.path.join(work, "deepmar_bs1.onnx"))
    process = run_all("--work-dir", work, "--stage", 4, batch_size="1")
    assert process.returncode == 0, process.stderr
    assert "stage 3" not in process.stdout and before == os.path.getmtime(os.path.join(work, "deepmar_bs1.onnx"))
    assert len(results(work)) == SIZE


def test_another_attribute_set(first, tmp_path):
    """26 attributes, as PA-100K has, with no option given."""
    work, _ = first
    content = torch.load(os.path.join(work, "sample", "checkpoint.pth.tar"))
    for key in ("weight", "bias"):
        content["state_dict"]["module.classifier." + key] = content["state_dict"]["module.classifier." + key][:26].clone()
    torch.save(content, str(tmp_path / "26.pth"))
    with open(os.path.join(work, "sample", "label.json")) as f:
        labels = {name: values[:26] for name, values in json.load(f).items()}
    (tmp_path / "26.json").write_text(json.dumps(labels))
    process = run_all("--work-dir", tmp_path / "work", *own_data(work, checkpoint=tmp_path / "26.pth",
                                                                **{"label-file": tmp_path / "26.json"}))
    assert process.returncode == 0, process.stderr
    with open(str(tmp_path / "work" / "fusion_result.json")) as f:
        assert len(json.load(f)["attributes"]) == 26


def test_a_drop_beyond_one_percent_fails_and_says_which_stage(first):
    work, _ = first
    process = run_all("--work-dir", work, "--published-acc", "100", "--stage", 7)
    assert process.returncode == 1
    assert "published" in process.stderr and "the accuracy at batch size 1 is" in process.stderr
    assert "published 100.00 %" in process.stdout
    with open(os.path.join(work, "report.html")) as f:  # is made all the same, to see why
        assert "FAIL" in f.read()


def test_names_intervals_and_thresholds(first, tmp_path):
    """The model says what it is, beside an OM too; stage 7 and the report take limits that were found on other images."""
    work, _ = first
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


def test_a_failing_stage_stops_the_run(first, tmp_path):
    work, _ = first
    (tmp_path / "bad.pth").write_text("<html>")
    process = run_all("--work-dir", tmp_path / "work", *own_data(work, checkpoint=tmp_path / "bad.pth"))
    assert process.returncode == 1 and "stage 2" not in process.stdout
    lines = process.stderr.splitlines()
    assert lines[0].startswith("export_onnx.py: error: ") and "bad.pth" in lines[0]
    assert lines[1:] == ["run_all.sh: error: stage 1 failed"]


def test_bad_variables(tmp_path):
    for wrong, text in ((["--batch-size", "0"], "batch_size"), (["--batch-size", "x"], "batch_size"),
                        (["--nonsense", "1"], "nonsense"), (["--stage"], "value"), (["8"], "no option"),
                        (["--stage", "9"], "stage"), (["--device-id", "-1"], "device_id"),
                        (["--chip-name", "a b"], "chip_name"), (["--checkpoint", __file__], "images is not set, and stage 4"),
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
    assert process.returncode == 0 and "--batch-size" in process.stdout and "6 inference" in process.stdout


def test_stale_inputs_are_not_scored(first, tmp_path):
    """--stage 6 alone, where something was replaced since: refused, with the stage to run again."""
    source, _ = first
    work = tmp_path / "work"
    shutil.copytree(source, str(work))
    sample = work / "sample"
    content = torch.load(str(sample / "checkpoint.pth.tar"))
    content["state_dict"]["module.classifier.bias"] += 1
    torch.save(content, str(tmp_path / "checkpoint.pth.tar"))
    lines = (sample / "image.txt").read_text().splitlines()
    (tmp_path / "fewer.txt").write_text("\n".join(lines[1:]) + "\n")
    (tmp_path / "renamed.txt").write_text("\n".join(["other.png"] + lines[1:]) + "\n")
    arguments = ["--work-dir", work, "--stage"]
    assert run_all(*arguments + [6]).returncode == 0  # a copied work folder goes on
    shutil.copy(str(sample / "images" / "00001.png"), str(tmp_path / "kept.png"))
    shutil.copy(str(sample / "images" / "00002.png"), str(sample / "images" / "00001.png"))
    for stage in (5, 6, 7, 8):  # other pictures under the same names
        process = run_all(*arguments + [stage])
        assert process.returncode == 1 and "1 changed: 00001.png; run stage 4 again" in process.stderr, process.stderr
        assert "instance_acc" not in process.stdout
    shutil.copy(str(tmp_path / "kept.png"), str(sample / "images" / "00001.png"))

    for changes, first_stage, text in (
            ({"checkpoint": tmp_path / "checkpoint.pth.tar"}, 6, WRONG_CHECKPOINT),
            ({"checkpoint": tmp_path / "checkpoint.pth.tar"}, 7, WRONG_CHECKPOINT),
            ({"image-list": tmp_path / "fewer.txt"}, 6, "input_bin was made from another fewer.txt; run stage 4 again"),
            ({"image-list": tmp_path / "renamed.txt"}, 7, "1 of the %d images in %s are not in" % (SIZE, tmp_path / "renamed.txt"))):
        process = run_all(*arguments + [first_stage] + own_data(str(work), **changes))
        assert process.returncode == 1 and text in process.stderr, (changes, process.stderr)
        assert "instance_acc" not in process.stdout
    # a new model, but results of the old one
    process = run_all(*arguments + [1, "--stop-stage", 2] + own_data(str(work), checkpoint=tmp_path / "checkpoint.pth.tar"))
    assert process.returncode == 0, process.stderr
    process = run_all(*arguments + [7] + own_data(str(work), checkpoint=tmp_path / "checkpoint.pth.tar"))
    assert process.returncode == 1 and "was made from another deepmar_bs1_nopad.onnx; run stage 6 again" in process.stderr
    process = run_all(*arguments + [6])
    assert process.returncode == 1 and "run stage 1 again" in process.stderr
    process = run_all(*arguments + [6, "--batch-size", 3])
    assert process.returncode == 1 and "deepmar_bs3_nopad.onnx is missing; run stage 2 first" in process.stderr
    # a bin too many
    assert run_all(*arguments + [1, "--stop-stage", 5]).returncode == 0
    shutil.copy(str(work / "input_bin" / "00001.bin"), str(work / "input_bin" / "x.bin"))
    process = run_all(*arguments + [6])
    assert process.returncode == 1 and "input_bin is not what stage 4 made here; 1 new: x.bin" in process.stderr


def test_on_the_cards_own_machine(first, tmp_path):
    """No checkpoint and no torch there: the images, the lists and a model are enough for stage 4 and what follows."""
    source, _ = first
    work = tmp_path / "work"
    work.mkdir()
    shutil.copy(os.path.join(source, "deepmar_bs1_nopad.onnx"), str(work))
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = sys.modules['torchvision'] = None\n")
    data = own_data(source)[2:]  # all but --checkpoint
    process = run_all("--work-dir", work, "--stage", 4, *data, PYTHONPATH=str(tmp_path))
    assert process.returncode == 0 and "scored %d images" % SIZE in process.stdout, process.stderr
    # and each stage asks for what it needs alone
    process = run_all("--work-dir", work, "--stage", 6, "--stop-stage", 6, "--image-list", data[3], PYTHONPATH=str(tmp_path))
    assert process.returncode == 0, process.stderr
    process = run_all("--work-dir", work, "--stage", 8, *data, PYTHONPATH=str(tmp_path))
    assert process.returncode == 1 and "result/fusion_result.json is missing; run stage 7 first" in process.stderr
    process = run_all("--work-dir", work, "--stage", 7, *data, PYTHONPATH=str(tmp_path))
    assert process.returncode == 0, process.stderr


def test_the_users_lists_are_checked_before_any_work(first, tmp_path):
    work, _ = first
    with open(os.path.join(work, "sample", "label.json")) as f:
        labels = json.load(f)
    (tmp_path / "fewer.json").write_text(json.dumps({name: labels[name] for name in sorted(labels)[1:]}))
    (tmp_path / "narrow.json").write_text(json.dumps({name: values[:34] for name, values in labels.items()}))
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "names.txt").write_text("hat\n")
    for changes, text in (({"label-file": tmp_path / "fewer.json"}, "has no label for 1 of %d images: 00001" % SIZE),
                          ({"label-file": tmp_path / "broken.json"}, "broken.json: is not JSON"),
                          ({"label-file": tmp_path / "narrow.json"}, "34"),
                          ({"attributes": tmp_path / "names.txt"}, "names.txt: holds 1 names, but there are 35 attributes"),
                          ({"images": str(tmp_path)}, "%d of the %d images in" % (SIZE, SIZE))):
        process = run_all("--work-dir", tmp_path / "work", *own_data(work, **changes))
        assert process.returncode == 1 and text in process.stderr, (changes, process.stderr)
        assert not [name for name in os.listdir(str(tmp_path / "work")) if name.endswith(".onnx")]


def test_sh_and_a_link(first, tmp_path):
    """sh run_all.sh, through a symbolic link, in a Python that does not look beside the script for modules."""
    work, _ = first
    (tmp_path / "link.sh").symlink_to(os.path.join(ROOT, "run_all.sh"))
    process = subprocess.run(["sh", str(tmp_path / "link.sh"), "--work-dir", work, "--stage", "7"], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, universal_newlines=True,
                             env=dict(os.environ, PYTHON=sys.executable, sample_size=str(SIZE), PYTHONSAFEPATH="1"))
    assert process.returncode == 0 and "scored %d images" % SIZE in process.stdout, process.stderr


def start(*arguments):
    """Starts run_all.sh and returns once it is at work in stage 6; (the process, what it has said)."""
    process = subprocess.Popen(["bash", os.path.join(ROOT, "run_all.sh")] + [str(argument) for argument in arguments],
                               env=dict(os.environ, PYTHON=sys.executable, sample_size=str(SIZE)), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, universal_newlines=True)
    said = []
    for line in process.stdout:
        said.append(line)
        if "stage 6" in line:
            break
    return process, said


def test_two_runs_in_one_folder(first):
    """On two devices they do not disturb each other; on the same device the second one says so and stops."""
    work, _ = first
    assert run_all("--work-dir", work, "--stop-stage", 5).returncode == 0
    arguments = ["--work-dir", work, "--stage", 6]
    one, _ = start(*arguments)
    two, _ = start(*arguments + ["--device-id", 1])
    third = run_all(*arguments)
    assert third.returncode == 1 and "another run is at work on device 0" in third.stderr, (third.stdout, third.stderr)
    for process in (one, two):
        output, error = process.communicate()
        assert process.returncode == 0 and "scored %d images" % SIZE in output, error
    assert results(work, 0) == results(work, 1)
    # one that makes files waits for one that reads them, though the device is another
    one, _ = start(*arguments)
    process = run_all("--work-dir", work, "--stage", 4, "--stop-stage", 4, "--device-id", 1)
    assert process.returncode == 0 and "waiting for the run on another device" in process.stdout, process.stderr
    assert one.poll() is not None
    one.communicate()
    assert one.returncode == 0


def test_ctrl_c_ends_it_and_its_processes(first):
    work, _ = first
    assert run_all("--work-dir", work, "--stop-stage", 5).returncode == 0
    before = run_all("--work-dir", work, "--stage", 6, "--device-id", "0 1")
    assert before.returncode == 0, before.stderr
    process = subprocess.Popen(["bash", os.path.join(ROOT, "run_all.sh"), "--work-dir", work, "--stage", "6", "--device-id",
                                "0 1"], env=dict(os.environ, PYTHON=sys.executable, sample_size=str(SIZE)),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, start_new_session=True)
    for line in process.stdout:
        if "images -> result" in line:
            break
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    started = time.time()
    _, error = process.communicate()
    assert time.time() - started < 5  # a generous bound for a busy machine
    assert process.returncode == 130 and error == "run_all.sh: error: stage 6 failed\n", error
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # nothing of it is left
    assert not [name for name in os.listdir(work) if "partial" in name]
    after = run_all("--work-dir", work, "--stage", 7, "--device-id", "0 1")
    assert after.returncode == 0 and metrics(after.stdout) == metrics(before.stdout)
