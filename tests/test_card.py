"""run_all.sh on a card: strict stand-ins (tests/standins) for atc, npu-smi and the benchmark binary, a tiny network, from stage 2 on."""
import csv
import json
import os
import re
import shutil

import numpy as np
import pytest
from helpers import BINARY, PACKAGES, ROOT, SIZE, check_error, check_stopped, own_data, run_all, script, standin, tiny_data, write_model


class Card(object):
    """A checkout with the benchmark binary's stand-in in it, and a folder bin/ with those of the toolkit.

    Their names have a space and an &, which the shell must not interpret.
    """

    def __init__(self, folder):
        folder = folder / "R&D"
        folder.mkdir()
        self.root, self.bin, self.work, self.data = folder / "check out", folder / "bin", folder / "work", folder
        shutil.copytree(ROOT, str(self.root), ignore=lambda _, names: [
            name for name in names if name.startswith((".", "work")) or name == "tests"])
        self.bin.mkdir()
        standin(self.bin / "atc", "atc.py")
        standin(self.bin / "npu-smi", "npu_smi.py")
        standin(self.root / BINARY, "benchmark.py")
        tiny_data(self.data)
        self.work.mkdir()
        for batch_size in (1, 5):
            write_model(self.work / ("deepmar_bs%d.onnx" % batch_size), batch_size)

    def run(self, *arguments, ais_bench=False, path=None, **variables):
        if ais_bench:
            variables["PYTHONPATH"] = PACKAGES
        arguments = list(arguments) + own_data(self.data)
        if "--work-dir" not in arguments:
            arguments += ["--work-dir", self.work]
        if "--stop-stage" not in arguments:
            arguments += ["--stop-stage", 7]
        return run_all(*arguments, root=self.root, path=str(path or self.bin), **variables)

    def table(self):
        with open(str(self.work / "throughput.csv"), newline="") as f:
            return list(csv.DictReader(f))

    def results(self, folder="result", device=0):
        return sorted(os.listdir(str(self.work / folder / ("dumpOutput_device%d" % device))))


@pytest.fixture(scope="module")
def card_and_run(tmp_path_factory):
    """A card and its first run, of the binary at two batch sizes on a 300I Duo, which has two chips 310P3."""
    made = Card(tmp_path_factory.mktemp("card"))
    return made, made.run("--stage", 2, "--stop-stage", 8, "--batch-size", "1 5", TABLE="25.2.0_300i_duo")


@pytest.fixture
def card(card_and_run):
    return card_and_run[0]


def names(ending):
    return ["%05d_%d.bin" % (i + 1, ending) for i in range(SIZE)]


def test_benchmark_runs_at_several_batch_sizes(card_and_run):
    made, process = card_and_run
    assert process.returncode == 0, process.stdout + process.stderr
    assert "npu-smi info names the chip Ascend310P3" in process.stdout
    assert "backend benchmark: %s is beside the scripts" % BINARY in process.stdout
    assert process.stdout.count("ATC run success") == 2
    assert process.stdout.count("stage 4: ") == 1  # the bins are made once
    rows = made.table()
    assert [row["batch_size"] for row in rows] == ["1", "5"] and {row["backend"] for row in rows} == {BINARY}
    assert [row["model"] for row in rows] == ["deepmar_bs1.om", "deepmar_bs5.om"]
    for row in rows:
        folder = "result_bs" + row["batch_size"]
        assert made.results(folder) == names(1)
        perf = (made.work / folder / ("perf_vision_batchsize_%s_device_0.txt" % row["batch_size"])).read_text()
        e2e, interface = re.search(r"\[e2e\] throughputRate: (\S+),", perf), re.search(r"Interface throughputRate: (\S+),", perf)
        assert float(row["e2e_images_per_s"]) == float(e2e.group(1))
        assert float(row["interface_images_per_s"]) == float(interface.group(1))
        assert float(row["card_images_per_s"]) == 2 * float(interface.group(1))
        with open(str(made.work / folder / "fusion_result.json")) as f:
            assert json.load(f)["instance_acc"] == float(row["instance_acc"])
    assert "card (x 2)" in process.stdout and "instance_acc is the same at all batch sizes" in process.stdout
    with open(str(made.work / "fusion_result.json")) as f:  # stage 7's, not the one that atc leaves
        assert json.load(f)["images"] == SIZE
    process = made.run("--stage", 7, "--stop-stage", 7, "--batch-size", "1 5", "--chips", 3)
    assert process.returncode == 0 and "card (x 3)" in process.stdout, process.stderr
    assert not [name for name in os.listdir(str(made.work)) if "partial" in name]


def test_om_of_another_chip_or_input_stops_the_run_before_any_work(card):
    path = card.work / "deepmar_bs1.om"
    facts = json.loads(script("tools/describe.py", path).stdout)["om"]
    assert (facts["soc_version"], facts["input_shape"], facts["aipp"]) == ("Ascend310P3", [1, 3, 224, 224], False)
    assert "--output=deepmar_bs1 " in facts["atc_cmdline"]
    for options, table, text in ((["--stage", 6], "26.0.rc1_910b4", "is for Ascend310P3, but npu-smi info names Ascend910B4; run: "),
                                 (["--stage", 4, "--aipp", "yes"], "25.2.0_300i_duo", "has no AIPP"),
                                 (["--stage", 4, "--size", 256, 128], "25.2.0_300i_duo", "224 224, not 256 128; run: ")):
        process = card.run(*options, TABLE=table)
        check_error(process, "%s: the OM " % path, text)
        assert "stage" not in process.stdout
    # atc makes an OM of another chip than the card's: the run does not prepare images for it.
    other = card.work.parent / "other"
    other.mkdir()
    shutil.copy(str(card.work / "deepmar_bs1.onnx"), str(other))
    process = card.run("--stage", 2, "--work-dir", other, "--chip-name", "910B4")
    assert process.returncode == 1 and "is for Ascend910B4, but npu-smi info names Ascend310P3" in process.stderr, process.stderr
    assert "stage 4" not in process.stdout


def test_several_devices_share_the_images(card):
    process = card.run("--stage", 6, "--device-id", "0 3", "--pure", "yes", DEVICES="4")
    assert process.returncode == 0, process.stderr
    both = card.results(device=0), card.results(device=3)
    assert sorted(both[0] + both[1]) == names(1) and len(both[0]) == len(both[1])
    row, = card.table()
    perf = [(card.work / "result" / ("perf_vision_batchsize_1_device_%d.txt" % device)).read_text() for device in (0, 3)]
    rate = sum(float(re.search(r"Interface throughputRate: (\S+),", text).group(1)) for text in perf)
    assert row["devices"] == "0 3" and float(row["interface_images_per_s"]) == pytest.approx(rate)
    assert row["card_images_per_s"] == row["interface_images_per_s"]  # measured, not multiplied
    assert float(row["pure_images_per_s"]) > 0 and row["latency_p50_ms"] == ""  # the binary measures no latencies
    assert "scored %d images" % SIZE in process.stdout

    process = card.run("--stage", 6, "--device-id", "0 4 5", DEVICES="4")
    check_stopped(process, "errorCode 107001", "stage 6 failed")
    assert re.search("benchmark failed on device (4 5|5 4);", process.stderr)
    assert card.results(device=0) == both[0]
    process = card.run("--stage", 7, "--device-id", "3")
    assert process.returncode == 1 and "%d of" % (SIZE // 2) in process.stderr, process.stderr
    assert card.run("--stage", 6, "--stop-stage", 6).returncode == 0  # one device with all images
    assert not list((card.work / "result").glob("PureInfer*_device_0.txt"))  # no earlier rate of pure inference
    process = card.run("--stage", 7, "--device-id", "0 3")
    assert process.returncode == 1 and "%d images have two results" % (SIZE // 2) in process.stderr, process.stderr


def test_failing_inference_tool_leaves_the_earlier_results(card):
    for fail, text in (
            ("benchmark", "benchmark ended with status 255; above"),
            ("another chip", "benchmark ended with status 255: the OM is for Ascend910B, but the card's chip is Ascend310P3; run: "),
            ("benchmark leaves fewer", "benchmark wrote %d results for %d images" % (SIZE - 1, SIZE)),
            ("benchmark leaves no rate", "benchmark wrote no result/perf_vision_batchsize_1_device_0.txt, which holds its rate")):
        process = card.run("--stage", 6, "--batch-size", "1 5", FAIL=fail)
        check_stopped(process, text, "stage 6 failed")
        assert card.results("result_bs1") == names(1)
    assert card.run("--stage", 7, "--batch-size", "1 5").returncode == 0


@pytest.mark.parametrize("fail, texts", [
    ("atc", ("atc ended with status 1; above", "E40000: the compiler is out of memory")),
    ("atc's operators", ("atc ended with status 1: ", "no operators for Ascend310P3; run: bash ./Ascend-cann-310p-ops_")),
    ("atc leaves nothing", ("atc wrote no deepmar_bs5.om",))])
def test_failing_atc_leaves_the_earlier_om(card, fail, texts):
    before = (card.work / "deepmar_bs5.om").stat()
    process = card.run("--stage", 3, "--batch-size", 5, FAIL=fail)
    check_stopped(process, "stage 3 failed", *texts)
    assert "stage 4" not in process.stdout and (card.work / "deepmar_bs5.om").stat() == before


def test_chip_is_given_or_found(card, tmp_path):
    process = card.run("--stage", 3, "--stop-stage", 3, "--chip-name", "Ascend310P3", "--batch-size", 5)
    assert process.returncode == 0 and "npu-smi" not in process.stdout, process.stderr
    process = card.run("--stage", 3, "--chip-name", "310Q9", "--batch-size", 5)
    check_stopped(process, "Value [Ascend310Q9] is invalid for the SoC version")
    for text, variables in (("names several chips, 310 and 310P3", {"TABLE": "21.0.3.1_200dk,25.3.rc1_300i_pro"}),
                            ("npu-smi info failed: dcmi module initialize failed. ret is -8005", {"FAIL": "npu-smi"})):
        process = card.run("--stage", 3, **variables)
        check_error(process, text, "set chip_name")
        assert "stage 3" not in process.stdout
    (tmp_path / "atc").write_text("")
    (tmp_path / "atc").chmod(0o755)
    check_error(card.run("--stage", 3, path=tmp_path), "cannot find out the chip (no npu-smi on the PATH); give --chip-name, such as 310P3")


def test_missing_pieces_are_named_before_any_work(card, tmp_path):
    arguments = ["--work-dir", tmp_path / "work", "--backend"]
    binary = card.root / BINARY
    binary.chmod(0o644)
    check_error(card.run(*arguments + ["benchmark"]), "chmod u+x %s" % binary)
    binary.rename(card.root / "away")
    check_error(card.run(*arguments + ["benchmark"]), "cp %s " % BINARY)
    check_error(card.run(*arguments + ["ais_bench"]), "-m pip install aclruntime")
    (card.root / "away").rename(binary)
    binary.chmod(0o755)
    check_error(card.run(*arguments + ["benchmark"], path=tmp_path), "no atc", "toolkit", "deepmar_bs1.om, into %s" % tmp_path)
    assert not (tmp_path / "work").exists()
    assert card.run(*arguments + ["npu"]).returncode == 2


def test_auto_takes_the_backend_that_the_machine_has(card, tmp_path):
    stage_6 = ["--stage", 6, "--batch-size", 5]
    (card.root / BINARY).rename(card.root / "away")
    shutil.copytree(str(card.work), str(tmp_path / "work"))  # ais_bench takes no path with an &
    process = card.run(*stage_6, "--stop-stage", 6, "--work-dir", tmp_path / "work", ais_bench=True)
    assert process.returncode == 0 and "backend ais_bench: no %s beside" % BINARY in process.stdout, process.stderr
    process = card.run(*stage_6)
    assert process.returncode == 0 and "backend onnxruntime: no %s beside" % BINARY in process.stdout, process.stderr
    assert card.table()[0]["backend"].startswith("ONNX Runtime") and card.table()[0]["card_images_per_s"] == ""
    (card.root / "away").rename(card.root / BINARY)
    process = card.run("--stage", 7, "--batch-size", 5)  # the table names what made the results, not what auto would take now
    assert process.returncode == 0 and card.table()[0]["backend"].startswith("ONNX Runtime"), process.stderr


def test_set_env_puts_atc_on_the_path(card, tmp_path):
    (tmp_path / "set_env.sh").write_text('PATH="%s:$PATH"\n' % card.bin)
    process = card.run("--stage", 3, "--stop-stage", 3, "--batch-size", 5, "--set-env", tmp_path / "set_env.sh", path=tmp_path)
    assert process.returncode == 0 and "read %s" % (tmp_path / "set_env.sh") in process.stdout, process.stderr
    assert "ATC run success" in process.stdout


def test_om_that_was_converted_elsewhere_is_accepted(card, tmp_path):
    (tmp_path / "work").mkdir()
    shutil.copy(str(card.work / "deepmar_bs5.om"), str(tmp_path / "work"))
    process = card.run("--stage", 4, "--stop-stage", 6, "--batch-size", 5, "--work-dir", tmp_path / "work", path=tmp_path)
    assert process.returncode == 0 and "backend benchmark" in process.stdout, process.stderr


def test_models_with_aipp_run_on_all_backends(card, tmp_path):
    work = tmp_path / "work"
    shutil.copytree(str(card.work), str(work))

    def run(*arguments, **settings):
        return card.run("--work-dir", work, "--batch-size", 5, *arguments, **settings)

    def logits(ending=1, folder=work / "result"):
        return np.array([np.fromfile(str(folder / "dumpOutput_device0" / name), "<f4") for name in names(ending)])

    process = run("--stage", 3, "--stop-stage", 6, "--aipp", "yes")
    assert process.returncode == 0 and "ATC run success" in process.stdout, process.stderr
    assert {path.stat().st_size for path in (work / "input_bin").iterdir()} == {150528}
    assert not (work / "deepmar_bs5_aipp.onnx").exists()
    binary = logits()
    assert 1e-4 < np.abs(binary - logits(folder=card.work / "result_bs5")).max() < 0.05
    process = run("--stage", 6, "--stop-stage", 6, "--aipp", "yes", "--backend", "ais_bench", ais_bench=True)
    assert process.returncode == 0, process.stderr
    assert np.array_equal(logits(0), binary)
    process = run("--stage", 6)
    assert process.returncode == 1, process.stdout
    assert "input_bin was made with aipp yes, not no; run stage 4 again, or give --aipp yes" in process.stderr
    # A machine with atc, but without a tool for its OMs: ONNX Runtime runs another model with AIPP.
    (card.root / BINARY).rename(card.root / "away")
    process = run("--stage", 3, "--stop-stage", 6, "--aipp", "yes")
    (card.root / "away").rename(card.root / BINARY)
    assert process.returncode == 0 and "ATC run success" in process.stdout, process.stderr
    assert "batch size 5: deepmar_bs5_aipp.onnx" in process.stdout and np.abs(logits() - binary).max() < 1e-4


def test_models_for_nv12_run_on_all_backends(card, tmp_path):
    work = tmp_path / "work"
    shutil.copytree(str(card.work), str(work))

    def run(*arguments, **settings):
        process = card.run("--work-dir", work, "--batch-size", 5, "--stop-stage", 6, "--aipp", "nv12-709", *arguments, **settings)
        assert process.returncode == 0, process.stderr
        return np.array([np.fromfile(str(path), "<f4") for path in sorted((work / "result" / "dumpOutput_device0").glob("*.bin"))])

    binary = run("--stage", 3)
    assert {path.stat().st_size for path in (work / "input_bin").iterdir()} == {75264}
    assert np.array_equal(run("--stage", 6, "--backend", "ais_bench", ais_bench=True), binary)
    twin = run("--stage", 3, "--backend", "onnxruntime")
    assert twin.shape == (SIZE, 35) and np.abs(twin - binary).max() < 1e-4
    process = card.run("--work-dir", work, "--batch-size", 5, "--stage", 6, "--aipp", "nv12-601")
    assert process.returncode == 1 and "input_bin was made with aipp nv12-709, not nv12-601" in process.stderr
    process = card.run("--aipp", "nv12-601", "--size", "224 223")
    assert process.returncode == 2 and "aipp nv12-601 needs an even height and width, not 224 223" in process.stderr


def test_options_of_atc_are_passed_on_and_recorded(card, tmp_path):
    work = tmp_path / "work"
    shutil.copytree(str(card.work), str(work))

    def run(*arguments):
        return card.run("--work-dir", work, "--batch-size", 5, "--stop-stage", 6, *arguments)

    options = "--precision_mode_v2=mixed_float16 --enable_small_channel=1"
    process = run("--stage", 3, "--atc-options", options, "--stop-stage", 3)
    assert process.returncode == 0 and "--soc_version=Ascend310P3 %s\n" % options in process.stdout, process.stderr
    process = run("--stage", 6)
    assert process.returncode == 1, process.stdout
    assert "deepmar_bs5.om was made with atc_options %s, not (none); run stage 3 again, or give --atc-options '%s'" % (
        options, options) in process.stderr
    assert run("--stage", 6, "--atc-options", options).returncode == 0
    check_stopped(run("--stage", 3, "--atc-options=--precision_mode_v2=fp8"), "E10001: Value [fp8]", "stage 3 failed")
    check_error(run("--atc-options", "precision_mode_v2=origin"), "atc_options must be options of atc", code=2)


@pytest.mark.parametrize("wrong, message", [
    ({"accuracy": 0.9}, "instance_acc differs between the batch sizes, by 0.100000"),
    ({"images": 11}, "the batch sizes have results of different numbers of images: 12 at 1, 11 at 8; run stage 6 again")])
def test_accuracy_must_not_differ_between_batch_sizes(tmp_path, wrong, message):
    perf = ("[e2e] throughputRate: 10, latency: 1\n[infer] throughputRate: 1, Interface throughputRate: 2, "
            "moduleLatency: 1\n")
    for size, report in ((1, {}), (8, wrong)):
        folder = tmp_path / str(size)
        folder.mkdir()
        (folder / ("perf_vision_batchsize_%d_device_0.txt" % size)).write_text(perf)
        (folder / "fusion_result.json").write_text(json.dumps({"images": report.get("images", 12),
                                                               "instance_acc": report.get("accuracy", 0.8)}))
    runs = [["--run", str(size), str(size), "m.om", "b"] for size in (8, 1)]
    process = script("tools/run/table.py", "t", *sum(runs, []), cwd=tmp_path)
    check_error(process, message)
    assert (tmp_path / "t.md").read_text().splitlines()[2].split() == "| 1 | 10.00 | 2.00 | - | - | - | - | - | 0.8 |".split()
    (tmp_path / "8" / "perf_vision_batchsize_8_device_0.txt").write_text("torn")
    check_error(script("tools/run/table.py", "t", *sum(runs, []), cwd=tmp_path), "perf_vision_batchsize_8", "stage 6")
