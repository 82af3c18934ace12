"""run_all.sh on a card: strict stand-ins (tests/standins) for atc, amct_onnx, npu-smi and the benchmark binary, a tiny network, from
stage 2 on."""
import csv
import json
import os
import re
import shutil

import numpy as np
import onnx
import pytest
from helpers import BINARY, PACKAGES, ROOT, SIZE, check_error, check_stopped, own_data, run_all, script, standin, tiny_data, write_model
from lib.bins import list_bins
from lib.session import cpu_session
from sample import pedestrians
from small_network import ATTRIBUTES, weights, write_network
from small_network import SIZE as SIDE


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


# --- INT8 -------------------------------------------------------------------------------------------------------------

class Int8Card(Card):
    """A card with amct_onnx and a network of AMCT's kinds of layers, and images for calibration."""

    def __init__(self, folder):
        super().__init__(folder)
        standin(self.bin / "amct_onnx", "amct_onnx.py")
        for batch_size in (1, 5):
            write_network(self.work / ("deepmar_bs%d.onnx" % batch_size), weights(), batch_size)
        labels = self.data / "sample" / "label.json"
        labels.write_text(json.dumps({name: row[:ATTRIBUTES] for name, row in json.loads(labels.read_text()).items()}))
        (self.data / "val").mkdir()
        for i, image in enumerate(pedestrians(8, 9)[0]):
            image.save(str(self.data / "val" / ("v%d.png" % i)))
        self.list_file = self.data / "val.txt"
        self.list_file.write_text("".join("v%d.png\n" % i for i in range(8)))
        self.deploy_model = self.work / "deepmar_bs5_deploy_model.onnx"

    def run(self, *arguments, int8="yes", calibration_list=None, **variables):
        return super().run("--int8", int8, "--size", SIDE, SIDE, *arguments, calibration_list=str(calibration_list or self.list_file),
                           calibration_images=str(self.data / "val"), **variables)

    def logits(self, work=None, folder="result_bs5", ending=1):
        """What stage 6 wrote."""
        return np.array([np.fromfile(str((work or self.work) / folder / "dumpOutput_device0" / name), "<f4") for name in names(ending)])

    def computed(self, name):
        """What a model in the work folder gives for the bins, on ONNX Runtime without its own fusion of quantized nodes."""
        session, folder = cpu_session(onnx.load(str(self.work / name))), str(self.work / "input_bin")
        images = [np.fromfile(os.path.join(folder, name), "<f4") for name in list_bins(folder, SIDE, SIDE)]
        return np.concatenate([session.run(None, {"actual_input_1": image.reshape(1, 3, SIDE, SIDE)})[0] for image in images])


@pytest.fixture(scope="module")
def int8_card_and_run(tmp_path_factory):
    """Such a card and its first run, at two batch sizes."""
    made = Int8Card(tmp_path_factory.mktemp("int8"))
    return made, made.run("--stage", 2, "--batch-size", "1 5")


@pytest.fixture
def int8_card(int8_card_and_run):
    return int8_card_and_run[0]


def test_int8_oms_are_made_by_amct_onnx_and_atc(int8_card_and_run):
    card, process = int8_card_and_run
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.count("[INFO][AMCT] 4 layers, ") == process.stdout.count("ATC run success") == 2
    assert "[AMCT] 4 layers, 8 batches" in process.stdout and "[AMCT] 4 layers, 2 batches" in process.stdout
    assert [row["model"] for row in card.table()] == ["deepmar_bs1.om", "deepmar_bs5.om"]
    assert "AscendQuant" in {node.op_type for node in onnx.load(str(card.deploy_model)).graph.node}
    # The OM computes what the twin does. Ranges from other images would show.
    exact, twin = card.computed("deepmar_bs1_nopad.onnx"), card.computed("deepmar_bs1_int8.onnx")
    assert np.abs(card.logits(folder="result_bs1") - twin).max() < 1e-4 < 0.01 < np.abs(twin - exact).max()
    assert np.abs(card.logits() - exact).max() < 0.2
    assert not [name for name in os.listdir(str(card.work)) if "partial" in name or name == "amct_log"]


def test_other_settings_of_int8_are_noticed(int8_card, tmp_path):
    (tmp_path / "few.txt").write_text("v1.png\n")
    for settings, text in (({"int8": "no"}, "deepmar_bs5.om was made with int8 yes, not no; run stage 3 again, or give --int8 yes"),
                           ({"calibration_list": tmp_path / "few.txt"}, "calibration_bin was made from another few.txt; run stage 3"),
                           ({"card_model": str(int8_card.deploy_model)}, "bs5.om was made from another deepmar_bs5_deploy_model.onnx;")):
        process = int8_card.run("--stage", 6, "--stop-stage", 6, "--batch-size", 5, **settings)
        assert process.returncode == 1 and text in process.stderr, process.stderr


def test_int8_model_made_elsewhere_is_given_to_atc(int8_card, tmp_path):
    work, bin = tmp_path / "work", tmp_path / "bin"
    work.mkdir()
    bin.mkdir()
    for name in ("atc", "npu-smi"):  # but no amct_onnx
        standin(bin / name, name.replace("-", "_") + ".py")
    shutil.copy(str(int8_card.work / "deepmar_bs5.onnx"), str(work))
    process = int8_card.run("--stage", 2, "--stop-stage", 6, "--batch-size", 5, "--card-model", int8_card.deploy_model,
                            "--work-dir", work, "--backend", "ais_bench", path=bin, ais_bench=True)
    assert process.returncode == 0 and "amct_onnx" not in process.stdout, process.stderr
    assert not (work / "calibration_bin").exists()
    assert np.array_equal(int8_card.logits(work, "result", 0), int8_card.logits())
    other = onnx.load(str(int8_card.deploy_model))
    other.producer_name = "another"
    onnx.save(other, str(tmp_path / "other.onnx"))
    process = int8_card.run("--stage", 7, "--batch-size", 5, "--card-model", tmp_path / "other.onnx", "--work-dir", work)
    assert process.returncode == 1 and "deepmar_bs5.om was made from another other.onnx; run stage 3 again" in process.stderr


def test_int8_with_aipp_runs_as_om_and_as_twin(int8_card, tmp_path):
    work = tmp_path / "work"
    shutil.copytree(str(int8_card.work), str(work))

    arguments = ["--stage", 3, "--stop-stage", 6, "--batch-size", 5, "--aipp", "yes", "--work-dir", work]
    process = int8_card.run(*arguments)
    assert process.returncode == 0, process.stderr
    assert "atc --model=../deepmar_bs5_deploy_model.onnx " in process.stdout and "--insert_op_conf=../aipp.cfg" in process.stdout
    om = int8_card.logits(work, "result")
    assert 0 < np.abs(om - int8_card.logits()).max() < 0.1
    process = int8_card.run(*arguments, "--backend", "onnxruntime")
    assert process.returncode == 0 and "batch size 5: deepmar_bs5_int8_aipp.onnx" in process.stdout, process.stderr
    assert np.abs(int8_card.logits(work, "result") - om).max() < 1e-4


def test_what_int8_lacks_is_named_before_any_work(int8_card, tmp_path):
    model, stage_3 = int8_card.deploy_model, ["--stage", 3, "--batch-size", 5, "--work-dir", tmp_path / "work"]
    for options, text in ((["--card-model", model, "--batch-size", "1 5"], "card_model has one batch size, but batch_size is 1 5"),
                          (["--card-model", model, "--int8", "no"], "card_model is an INT8 model: give --int8 yes, too"),
                          (["--card-model", model, "--backend", "onnxruntime"], "card_model is for atc, but backend onnxruntime"),
                          (["--calibration-list", ""], "calibration_list is not set, and INT8 needs a list of training")):
        check_error(int8_card.run(*stage_3, *options), text, code=2)
    away = int8_card.bin / "away"
    (int8_card.bin / "amct_onnx").rename(away)
    check_error(int8_card.run(*stage_3), "no amct_onnx on the PATH", "tar -xzf Ascend-cann-amct_", "--card-model", "--backend onnxruntime")
    away.rename(int8_card.bin / "amct_onnx")
    check_error(int8_card.run(*stage_3, "--card-model", model, path=tmp_path), "card_model: there is no atc on this machine")
    check_error(int8_card.run(*stage_3, "--card-model", tmp_path / "none"), "card_model: %s: no such file" % (tmp_path / "none"))
    assert not (tmp_path / "work").exists()
    (tmp_path / "few.txt").write_text("v1.png\nw.png\n")
    for options, text in ((["--card-model", int8_card.list_file], "val.txt: is not a valid ONNX model"),
                          (["--card-model", int8_card.work / "deepmar_bs5_nopad.onnx"], "has no AscendQuant, so it is no INT8 model"),
                          (["--card-model", model, "--batch-size", 1], "takes [5, 3, 16, 16], but batch_size and size make it [1, "),
                          (["--calibration-list", tmp_path / "few.txt"], "1 of the 2 images in %s are not in" % (tmp_path / "few.txt"))):
        process = int8_card.run(*stage_3, *options)
        check_error(process, text)
        assert "stage 3:" not in process.stdout


def test_calibration_on_test_images_is_noted(int8_card):
    options = [str(int8_card.data / "sample" / name) for name in ("images", "image.txt")]
    lists = ["--images", options[0], "--image-list", options[1], "--calibration-images", options[0], "--calibration-list", options[1]]
    process = script("tools/run/inputs.py", "lists", *lists)
    assert process.returncode == 0 and "both name 00001.png, 00002.png" in process.stderr, process.stderr


def test_failing_amct_onnx_leaves_the_earlier_om(int8_card):
    before = (int8_card.work / "deepmar_bs5.om").stat()
    process = int8_card.run("--stage", 3, "--batch-size", 5, FAIL="amct_onnx leaves nothing")
    check_stopped(process, "amct_onnx wrote no deepmar_bs5_deploy_model.onnx; above", "stage 3 failed")
    assert (int8_card.work / "deepmar_bs5.om").stat() == before


@pytest.mark.parametrize("options, cfg, text", [
    ({}, "", None), ({"batch_num": 2, "calibration_config": None}, "", None), ({}, "skip_layer_types: \"AveragePool\"\n", None),
    ({"batch_num": 2}, "", "exclude each other"), ({"data_dir": "R&D"}, "", "other characters"),
    ({"input_shape": "actual_input_1:5,3,16,16"}, "", "but the model has actual_input_1:[1, 3, 16, 16]"),
    ({"data_types": "uint8"}, "", "but the model takes float32"), ({"data_dir": None}, "", "belong together"),
    ({"model": "none.onnx"}, "", "none.onnx: no such file"), ({"batch_num": 9, "calibration_config": None}, "", "9 batches are wanted"),
    ({"data_dir": "short"}, "", "cannot be reshaped"), ({}, "skip_layers: \"conv9\"\n", "Layer conv9 does not exist"),
    ({}, "skip_layer: \"conv1\"\n", 'no field named "skip_layer"'), ({}, "batch_num: 3\n", '"batch_num" is there twice'),
    ({}, "do_fusion: 1\n", "the value 1"), ({"gpu_id": 0}, "", "unrecognized arguments")])
def test_stand_in_of_amct_onnx_is_strict(tmp_path, options, cfg, text):
    write_network(tmp_path / "m.onnx", weights())
    for folder, size in (("bins", 12 * SIDE * SIDE), ("short", 12)):
        (tmp_path / folder).mkdir()
        for i in range(2):
            (tmp_path / folder / ("%d.bin" % i)).write_bytes(bytes(size))
    (tmp_path / "q.cfg").write_text("batch_num: 2\nactivation_offset: true\n" + cfg)
    values = dict({"model": "m.onnx", "save_path": "out/m", "input_shape": "actual_input_1:1,3,16,16", "data_dir": "bins",
                   "data_types": "float32", "calibration_config": "q.cfg"}, **options)
    arguments = [str(part) for name, value in values.items() if value is not None for part in ("--" + name, value)]
    process = script("tests/standins/amct_onnx.py", "calibration", *arguments, cwd=tmp_path)
    if text:
        assert process.returncode and text in process.stdout + process.stderr, process.stderr
    else:
        assert process.returncode == 0 and (tmp_path / "out" / "m_deploy_model.onnx").exists(), process.stdout


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
    if "accuracy" in wrong:
        check_error(script("tools/run/table.py", "t", "--int8", *sum(runs, []), cwd=tmp_path), message)
        (tmp_path / "8" / "fusion_result.json").write_text(json.dumps({"images": 12, "instance_acc": 0.805}))
        process = script("tools/run/table.py", "t", "--int8", *sum(runs, []), cwd=tmp_path)
        assert process.returncode == 0 and "note: instance_acc differs by 0.005 between" in process.stdout, process.stderr
    (tmp_path / "8" / "perf_vision_batchsize_8_device_0.txt").write_text("torn")
    check_error(script("tools/run/table.py", "t", *sum(runs, []), cwd=tmp_path), "perf_vision_batchsize_8", "stage 6")
