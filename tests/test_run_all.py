"""run_all.sh from end to end: sample data, the user's own data, a (stand-in) card, and what stops it."""
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from conftest import ROOT

SIZE = 12  # images of the sample


def run_all(*arguments, root=ROOT, cwd=None, path=None, **variables):
    """Runs run_all.sh with this Python; returns the finished process."""
    environment = dict(os.environ, PYTHON=sys.executable, sample_size=str(SIZE), set_env="/nonexistent", **variables)
    if path:
        environment["PATH"] = "%s:%s" % (path, environment["PATH"])
    return subprocess.run(["bash", os.path.join(str(root), "run_all.sh")] + [str(argument) for argument in arguments],
                          cwd=str(cwd or root), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The first run, on sample data; (its work folder, the process). tests/run.sh keeps it for tests/stacks.py."""
    work = os.path.join(os.environ.get("DEEPMAR_TEST_STACKS", str(tmp_path_factory.mktemp("run_all"))),
                        "work-%d.%d" % sys.version_info[:2])
    return work, run_all("--work-dir", work)


def own_data(work, **changes):
    """The options that make the sample the user's own data, by absolute paths."""
    options = {"checkpoint": "checkpoint.pth.tar", "images": "images", "image-list": "image.txt",
               "label-file": "label.json"}
    options = {name: os.path.join(work, "sample", value) for name, value in options.items()}
    options.update(changes)
    return [text for name, value in options.items() for text in ("--" + name, value)]


def metrics(output):
    return {name: float(value) for name, value in re.findall(r"^(instance_\w+|mA): (\S+)$", output, re.MULTILINE)}


def results(work, device=0):
    return sorted(os.listdir(os.path.join(work, "result", "dumpOutput_device%d" % device)))


def test_sample_from_end_to_end(first):
    work, process = first
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    for stage in range(8):
        assert "[run_all] stage %d: " % stage in process.stdout
        assert "[run_all] stage %d done in " % stage in process.stdout
    assert "no atc on this machine" in process.stdout
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
    rate = r"\S+ images/s end to end, \S+ images/s in the model \(Interface throughputRate\)"
    assert re.search(r"throughput at batch size 1: %s\n$" % rate, process.stdout), process.stdout
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
    process = run_all("--work-dir", work, "--stage", 7, *own_data(work))
    assert process.returncode == 1 and "run stages 4 to 6 again" in process.stderr, process.stdout
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
    assert "published" in process.stderr and "stage 7 failed" in process.stderr
    assert "published 100.00 %" in process.stdout


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
                        (["--stage", "8"], "stage"), (["--device-id", "-1"], "device_id"),
                        (["--chip-name", "a b"], "chip_name"), (["--checkpoint", "x"], "images")):
        process = run_all("--work-dir", tmp_path / "work", *wrong)
        assert process.returncode == 2 and text in process.stderr, (wrong, process.stderr)
    process = run_all("--work-dir", tmp_path / "work", *own_data("/nowhere"))
    assert process.returncode == 1 and "/nowhere/sample/checkpoint.pth.tar" in process.stderr
    assert not (tmp_path / "work").exists()
    process = run_all("--work-dir", tmp_path / "work", "--stage", 6)
    assert process.returncode == 1 and "run stage 5 first" in process.stderr
    process = run_all("--help")
    assert process.returncode == 0 and "--batch-size" in process.stdout and "6 inference" in process.stdout


def test_two_runs_in_one_folder(tmp_path):
    """A run that finds another at work in its folder says so and stops."""
    import fcntl
    with open(str(tmp_path / "x"), "w"):
        lock = os.open(str(tmp_path), os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    process = run_all("--work-dir", tmp_path)
    os.close(lock)
    assert process.returncode == 1 and "another run" in process.stderr


ATC = """#!/usr/bin/env bash
# Stands in for atc: takes exactly the options of the guide and turns the ONNX model into "an OM", a copy of it.
set -e
for option; do
    case $option in
        --model=*) model=${option#*=} ;;
        --output=*) output=${option#*=} ;;
        --framework=5 | --input_format=NCHW | --log=error) ;;
        --input_shape=actual_input_1:$EXPECTED_BATCH,3,224,224) ;;
        --soc_version=Ascend310P3) ;;
        *) echo "E10001: unknown option $option" >&2; exit 1 ;;
    esac
done
[ -f "$model" ]
[ $# = 7 ]
cp "$model" "$output.om"
echo "ATC run success, welcome to the next use."
"""
BENCHMARK = """#!/usr/bin/env bash
# Stands in for benchmark.x86_64: the model is "the OM" that the stand-in for atc made. Like it, it leaves old files.
set -e
declare -A value
for option; do value[${option%%%%=*}]=${option#*=}; done
[ $# = 9 ]
[ "${value[-om_path]##*.}" = om ]
cp "${value[-om_path]}" om.onnx
"%s" "%s/tools/benchmark.py" "${@/#-om_path=*/-om_path=om.onnx}"
[ -z "${FEWER-}" ] || rm result/dumpOutput_device0/00001_1.bin
echo "the benchmark binary ran"
"""


def test_card(first, tmp_path):
    """With atc on the PATH and the benchmark binary beside the scripts, stages 3 and 6 use them."""
    work, _ = first
    root = tmp_path / "checkout"
    shutil.copytree(ROOT, str(root), ignore=lambda folder, names: [
        name for name in names if name.startswith((".", "work")) or name == "tests"])
    (tmp_path / "bin").mkdir()
    for path, text in ((tmp_path / "bin" / "atc", ATC),
                       (root / ("benchmark." + os.uname().machine), BENCHMARK % (sys.executable, root))):
        path.write_text(text)
        path.chmod(0o755)
    arguments = ["--chip-name", "310P3", "--batch-size", 2, "--work-dir", tmp_path / "work"] + own_data(work)
    process = run_all(*arguments, root=root, path=str(tmp_path / "bin"), EXPECTED_BATCH="2")
    assert process.returncode == 0, process.stderr
    assert "ATC run success" in process.stdout and "the benchmark binary ran" in process.stdout
    assert "ONNX Runtime instead" not in process.stdout
    assert len(results(str(tmp_path / "work"))) == SIZE and not (tmp_path / "work" / "result.partial").exists()
    # a benchmark that leaves fewer results than images is a failure, and the earlier results stay
    process = run_all("--stage", 6, *arguments, root=root, path=str(tmp_path / "bin"), EXPECTED_BATCH="2", FEWER="1")
    assert process.returncode == 1 and "%d results for %d images" % (SIZE - 1, SIZE) in process.stderr
    assert len(results(str(tmp_path / "work"))) == SIZE
    # a failing atc stops the run
    process = run_all(*arguments, root=root, path=str(tmp_path / "bin"), EXPECTED_BATCH="3")
    assert process.returncode == 1 and "E10001" in process.stderr and "stage 3 failed" in process.stderr
