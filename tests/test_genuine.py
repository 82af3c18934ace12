"""Stage 6 with ais_bench: its stand-in (tests/standins), which behaves as in three years, and genuine front ends.

    AIS_BENCH=FOLDER[:FOLDER] bash tests/run.sh -k genuine

A FOLDER holds the package ais_bench, as `ais-bench_workload/tool/ais_bench` of the tool's repository does. The front ends run on
tests/standins/aclruntime, which stands in for a card. The same tests show that the stand-in refuses what they refuse.
"""
import concurrent.futures
import csv
import importlib.util
import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
from helpers import (FRONT_ENDS, GENUINE, RUNTIME, check_error, check_stopped, own_data, run_all, standin, write_images, write_model,
                     write_om)

import ais_bench_files
from lib.images import preprocess
from lib.metrics import evaluate
from lib.rates import read_summary
from lib.results import list_results
from lib.session import cpu_session

NAMES = ["im %d.png" % i if i % 3 else "行人%d.png" % i for i in range(11)] + ["00000003.png", "-a,b;c.png"]


# If there is no genuine front end, the stand-in for the last year is enough for most tests.
front_ends = pytest.mark.parametrize("front", FRONT_ENDS if GENUINE else FRONT_ENDS[2:], ids=lambda front: front.name)


def test_genuine_front_ends_exist():
    if not GENUINE:
        pytest.skip("NOT RUN with a genuine ais_bench: AIS_BENCH=FOLDER[:FOLDER] names folders that hold one")
    for folder in GENUINE:
        assert os.path.isfile(os.path.join(folder, "ais_bench", "infer", "__main__.py")), folder


@pytest.fixture(scope="module")
def make_folder(tmp_path_factory):
    """A function that makes a folder with the files for a run by hand: m.om of batch size 2, and in/ with its bins of 8 x 8 pixels."""
    onnx = write_model(tmp_path_factory.mktemp("model") / "m.onnx", 2, size=(8, 8))

    def make(folder, names=("b10.bin", "b9.bin", "B2.x.bin", "a.bin", "c.bin")):
        (folder / "in").mkdir(parents=True)
        write_om(folder / "m.om", onnx)
        for i, name in enumerate(names):
            np.full(3 * 64, i, "<f4").tofile(str(folder / "in" / name))
        return folder
    return make


def results_in(folder):
    """Returns the results in a folder and its subfolders, {subfolder: {name: first logit}}."""
    return {str(sub.relative_to(folder)): {path.name: np.fromfile(str(path), "<f4")[0] for path in sub.glob("*.bin")}
            for sub in [folder] + [path for path in folder.iterdir() if path.is_dir()]}


@pytest.mark.parametrize("front", FRONT_ENDS, ids=lambda front: front.name)
def test_one_device_gives_results_a_log_and_a_summary_also_without_input(front, make_folder, tmp_path):
    one = make_folder(tmp_path / "one")
    process = front.run(one, batchsize=16)  # another one than the model's, which only changes the throughput
    assert process.returncode == 0, process.stdout
    results = results_in(one / "out" / "d")["."]
    assert set(results) == {"b10_0.bin", "b9_0.bin", "B2_0.bin", "a_0.bin", "c_0.bin"}
    slope = results["b9_0.bin"]  # the bins hold 0, 1, 2, 3, 4, and the model multiplies
    np.testing.assert_allclose([results[name] for name in ("b10_0.bin", "B2_0.bin", "a_0.bin", "c_0.bin")],
                               [0, 2 * slope, 3 * slope, 4 * slope], rtol=1e-5)
    rate, times = read_summary(str(one / "out" / "d_summary.json"))
    assert len(times) == 3 and rate == pytest.approx(1000 * 16 / np.mean(times))
    files = json.loads((one / "out" / "d_summary.json").read_text())["filesinfo"]
    assert len(files) == 5 and files["0"] == {"infiles": ["in/a.bin"], "outfiles": ["out/d/a_0.bin"]}
    assert "filesperbatch:2 runcount:3" in process.stdout
    process = front.run(one, input=None, output="pure", loop=20)
    assert process.returncode == 0, process.stdout
    assert set(results_in(one / "pure" / "d")["."]) == {"pure_infer_data_0.bin"}
    rate, times = read_summary(str(one / "pure" / "d_summary.json"))
    assert len(times) == 20 and rate == pytest.approx(1000 * 2 / np.mean(times))


@pytest.mark.parametrize("front", FRONT_ENDS, ids=lambda front: front.name)
def test_several_devices_get_contiguous_shares_in_natural_order(front, make_folder, tmp_path):
    folder = make_folder(tmp_path / "several")
    for made in (folder / "out", folder / "out" / "d"):
        made.mkdir(0o750)  # the processes of the genuine front ends may collide when they make it
    process = front.run(folder, device="1,2", divide_input=1 if front.year > 2023 else None)
    assert process.returncode == 0, process.stdout
    names = ["device1", "device2"] if front.year == 2023 else ["device1_0", "device2_1"]
    shares = results_in(folder / "out" / "d")
    assert [set(shares[name]) for name in names] == [{"a_0.bin", "B2_0.bin", "b9_0.bin"}, {"b10_0.bin", "c_0.bin"}]
    assert set(list_results([str(folder / "out" / "d")])) == {"a", "B2", "b9", "b10", "c"}


def link(path):
    path.rename(str(path) + ".real")
    path.symlink_to(path.name + ".real")


def output(mode):
    """Returns a function that makes the output folder with this mode."""
    def make(folder):
        (folder / "out").mkdir()
        (folder / "out").chmod(mode)
    return make


# what is wrong: (the first year in which it is refused, a text in the output, a function that makes it wrong, other options)
LEGAL, OWNER, WRITABLE, ALWAYS, NEVER = "illegal char", "owner or ownergroup", "group writable", 2023, 3000
REFUSED = {
    "the model is a link": (2024, "soft link", lambda f: link(f / "m.om"), {}),
    "the input folder is a link": (2024, "soft link", lambda f: link(f / "in"), {}),
    "a bin is a link": (2024, "soft link", lambda f: link(f / "in" / "a.bin"), {}),
    "the output folder is a link": (2024, "soft link", lambda f: (output(0o750)(f), link(f / "out")), {}),
    "the group may write the model": (2024, WRITABLE, lambda f: (f / "m.om").chmod(0o664), {}),
    "the group may write the input folder": (2024, WRITABLE, lambda f: (f / "in").chmod(0o775), {}),
    "others may read the output folder": (2025, WRITABLE, output(0o755), {}),
    "an output folder of 0750": (NEVER, "", output(0o750), {}),
    "a space in a bin's name": (2024, LEGAL, lambda f: (f / "in" / "a.bin").rename(f / "in" / "a b.bin"), {}),
    "a space in the model's name": (2024, LEGAL, lambda f: (f / "m.om").rename(f / "a b.om"), {"model": "a b.om"}),
    "no bin in the input": (ALWAYS, "not find valid file", lambda f: [path.unlink() for path in (f / "in").iterdir()], {}),
    "bins that do not fill the model's input": (ALWAYS, "not match", lambda f: (f / "in" / "a.bin").write_bytes(b"12345"), {}),
    "an absolute output_dirname": (2024, "abs path", None, {"output_dirname": "/nonexistent/d"}),
    "a device that does not exist": (ALWAYS, "device 3", None, {"device": 3}),
    "a second device that does not exist": (ALWAYS, "[ERROR] subprocess run failed", None, {"device": "0,3"}),
}
if os.geteuid() == 0:
    groups = os.getgroups()  # may lack the effective group
    REFUSED.update({
        "another user's model": (2024, OWNER, lambda f: os.chown(str(f / "m.om"), 12345, 12345), {}),
        "another user's bin of the own group": (
            NEVER if groups else 2024, "", lambda f: os.chown(str(f / "in" / "a.bin"), 12345, (groups or [0])[0]), {})})


@front_ends
def test_front_end_refuses_what_it_should(front, make_folder, tmp_path):
    def problem(what):
        """Returns a text if a case does not end as it should, else None."""
        since, text, change, options = REFUSED[what]
        folder = make_folder(tmp_path / re.sub("[^A-Za-z]", "_", what))
        if change:
            change(folder)
        process = front.run(folder, **options)
        refused = front.year >= since
        if (process.returncode != 0) != refused or refused and text not in process.stdout:
            return "%s: status %d\n%s" % (what, process.returncode, process.stdout[-3000:])

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        wrong = [text for text in pool.map(problem, REFUSED) if text]
    assert not wrong, "\n\n".join(wrong)


class UserData(object):
    """A user's images with odd names, models of two batch sizes, and the expected logits and accuracy."""

    def __init__(self, folder):
        self.folder, images = folder, folder / "sample" / "images"
        for new in ("bin", "models", "sample"):
            (folder / new).mkdir()
        standin(folder / "bin" / "atc", "atc.py")
        for size in (1, 8):
            onnx = write_model(folder / "models" / ("deepmar_bs%d_nopad.onnx" % size), size)
            write_om(folder / "models" / ("deepmar_bs%d.om" % size), onnx)
        for written, name in zip(write_images(images, len(NAMES)), NAMES):
            (images / written).rename(images / name)
        labels = np.random.RandomState(3).randint(0, 2, (len(NAMES), 35))
        (folder / "sample" / "label.json").write_text(json.dumps(dict(zip(NAMES, labels.tolist()))))
        (folder / "sample" / "image.txt").write_text("\n".join(NAMES) + "\n", encoding="utf-8")
        (folder / "sample" / "checkpoint.pth.tar").write_text("")
        session = cpu_session(str(folder / "models" / "deepmar_bs1_nopad.onnx"))
        self.logits = {name[:-4]: session.run(None, {"actual_input_1": preprocess(str(images / name))[None]})[0][0] for name in NAMES}
        self.accuracy = evaluate(np.stack([self.logits[name[:-4]] for name in NAMES]), labels)[0]["instance_acc"]

    def run(self, front, work, *arguments, umask=0o022, **variables):
        """Runs stages 4 to 7 with ais_bench in a work folder. If the folder is new, it gets the models."""
        if not work.exists():
            shutil.copytree(str(self.folder / "models"), str(work))
        before = os.umask(umask)
        try:
            return run_all("--stage", 4, "--stop-stage", 7, "--backend", "ais_bench", "--work-dir", work, *own_data(str(self.folder)),
                           *arguments, **front.variables(**variables))
        finally:
            os.umask(before)


@pytest.fixture(scope="module")
def user_data(tmp_path_factory):
    return UserData(tmp_path_factory.mktemp("user_data"))


RUNS = [(front, devices, umask) for front in FRONT_ENDS if front.genuine for devices in ("0", "2 1") for umask in (0o022, 0o002, 0o077)]
RUNS += [(FRONT_ENDS[0], "2 1", 0o077), (FRONT_ENDS[2], "2 1", 0o002)]


@pytest.mark.parametrize("front, devices, umask", RUNS, ids=lambda value: getattr(value, "name", None) or (
    "%03o" % value if isinstance(value, int) else value))
def test_run_with_ais_bench_gives_the_expected_results_and_rates(front, devices, umask, user_data, tmp_path):
    work = tmp_path / "work"
    process = user_data.run(front, work, "--stage", 3, "--batch-size", "1 8", "--device-id", devices, "--chip-name", "310P3",
                            umask=umask, path=str(user_data.folder / "bin"))
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.count("ATC run success") == 2
    with open(str(work / "throughput.csv"), newline="") as f:
        rows = list(csv.DictReader(f))
    assert [row["batch_size"] for row in rows] == ["1", "8"]
    for row in rows:
        assert float(row["instance_acc"]) == pytest.approx(user_data.accuracy, rel=1e-12)
        results, rates, written = {}, [], work / ("result_bs" + row["batch_size"])
        assert {path.name for path in written.iterdir()} == {"fusion_result.json"}.union(*(
            {"dumpOutput_device" + device, "dumpOutput_device%s_summary.json" % device} for device in devices.split()))
        for device in devices.split():
            folder = written / ("dumpOutput_device" + device)
            own = {path.name[:-len("_0.bin")]: np.fromfile(str(path), "<f4") for path in folder.iterdir()}
            results.update(own)
            summary = json.loads((folder.parent / (folder.name + "_summary.json")).read_text())
            rates.append(summary["throughput"])
            assert {os.path.basename(files["outfiles"][0])[:-len("_0.bin")]
                    for files in summary["filesinfo"].values()} == set(own)
        assert set(results) == set(user_data.logits)
        for name, logits in results.items():
            np.testing.assert_allclose(logits, user_data.logits[name], atol=1e-5)
        assert float(row["interface_images_per_s"]) == float(row["card_images_per_s"]) == pytest.approx(sum(rates))
        assert row["backend"] == "ais_bench" and row["e2e_images_per_s"] == ""
    assert not [name for name in os.listdir(str(work)) if "partial" in name]


@front_ends
def test_errors_of_ais_bench_are_shown_before_its_last_lines(front, user_data, tmp_path):
    process = user_data.run(front, tmp_path / "work", "--device-id", "0 7")
    lines = [line for line in process.stderr.splitlines() if not line.startswith("note: ")]
    assert process.returncode == 1 and "[ERROR] " in lines[0], process.stderr
    assert "device 7" in process.stderr and "ais_bench ended with status 1" in process.stderr


@front_ends
def test_wrong_paths_and_owners_are_named_before_any_work(front, user_data, tmp_path):
    work = tmp_path / "a 行人"
    check_error(user_data.run(front, work), "A-Z a-z 0-9", "--work-dir", str(work))
    assert not (work / "input_bin").exists()
    if os.geteuid() == 0:
        work = tmp_path / "work"
        assert user_data.run(front, work, "--stop-stage", 5).returncode == 0
        for name, stage in (("input_bin/00000003.bin", 6), ("deepmar_bs1.om", 4)):
            os.chown(str(work / name), 12345, 12345)
            process = user_data.run(front, work, "--stage", stage)
            check_error(process, name, "12345", "run: chown -R 0 %s" % (work / os.path.dirname(name)))
            assert "[run_all] stage" not in process.stdout


def test_missing_or_broken_ais_bench_is_named_with_the_remedy(user_data, tmp_path):
    front = FRONT_ENDS[2]
    (tmp_path / "aclruntime.py").write_text("raise ImportError('libascendcl.so: cannot open shared object file')")
    install = "%s -m pip install aclruntime" % sys.executable
    for path, texts in ((front.folder, ("has no aclruntime; run: " + install,)),
                        (RUNTIME, ("has no ais_bench; run: " + install,)),
                        ("%s:%s" % (tmp_path, front.folder), ("libascendcl.so", "set_env.sh"))):
        process = user_data.run(front, tmp_path / "work", PYTHONPATH=path)
        check_error(process, *texts)
        assert "stage 4" not in process.stdout
        if "set_env.sh" in texts:
            assert ("has no pkg_resources" in process.stderr) == (importlib.util.find_spec("pkg_resources") is None)


@front_ends
def test_om_of_another_batch_size_and_too_many_devices_are_refused(front, user_data, tmp_path):
    work = tmp_path / "work"
    shutil.copytree(str(user_data.folder / "models"), str(work))
    shutil.copyfile(str(work / "deepmar_bs8.om"), str(work / "deepmar_bs1.om"))
    process = user_data.run(front, work)
    assert process.returncode == 1 and "deepmar_bs1.om takes 8 images at a time, not 1" in process.stderr, process.stderr
    process = user_data.run(front, work, "--stage", 6, "--device-id", ",".join(map(str, range(14))))
    assert process.returncode == 1 and "14 devices, but fewer images" in process.stderr, process.stderr


def test_failing_ais_bench_leaves_the_earlier_results(user_data, tmp_path):
    front, work = FRONT_ENDS[2], tmp_path / "work"
    assert user_data.run(front, work, "--stop-stage", 6).returncode == 0
    for fail, text in (("ais_bench", "ais_bench ended with status 1"),
                       ("ais_bench leaves fewer", "ais_bench wrote 12 results for 13 images")):
        process = user_data.run(front, work, "--stage", 6, FAIL=fail)
        check_stopped(process, text, "stage 6 failed")
    process = user_data.run(front, work, "--stage", 6, FAIL="ais_bench reports an error")
    assert process.returncode == 1 and "ais_bench reports an error: [ERROR] aclmdlExecute failed" in process.stderr, process.stderr
    assert "see %s" % (work / "logs" / "ais_bench_bs1.log") in process.stderr
    assert len(os.listdir(str(work / "result" / "dumpOutput_device0"))) == 13
    assert user_data.run(front, work, "--stage", 7).returncode == 0


def test_copies_replace_hard_links_that_cannot_be_made(make_folder, tmp_path, monkeypatch):
    make_folder(tmp_path / "bins", ["a b.bin", "c.bin"])
    for name in ("linked", "copied"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        if name == "copied":
            monkeypatch.setattr(os, "link", lambda source, target: os.open("/nonexistent", 0))
        (tmp_path / "bins" / "m.om").chmod(0o666)
        ais_bench_files.give(str(tmp_path / "bins" / "in"), str(tmp_path / "bins" / "m.om"))
        for given, own in (("input_bin/00000000.bin", "in/a b.bin"), ("input_bin/00000001.bin", "in/c.bin"), ("m.om", "m.om")):
            assert (tmp_path / name / given).read_bytes() == (tmp_path / "bins" / own).read_bytes()
            assert not (tmp_path / name / given).stat().st_mode & 0o022
            assert os.path.samefile(given, str(tmp_path / "bins" / own)) == (name == "linked")
