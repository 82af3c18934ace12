"""Rates, latencies and pure inference: in the files of each backend, in the table, and through run_all.sh."""
import csv
import json
import os

import numpy as np
import pytest

from lib.rates import figures
from helpers import FRONT_ENDS, check_error, run_all, script, write_images, write_model, write_om

PERF = "[e2e] throughputRate: 10, latency: 1\n[infer] throughputRate: 1, Interface throughputRate: %g, moduleLatency: 1\n"


def write_summary(folder, device, **content):
    (folder / ("dumpOutput_device%d_summary.json" % device)).write_text(json.dumps(content))


@pytest.fixture
def folder(tmp_path):
    for device, rate in ((0, 30), (1, 50)):
        (tmp_path / ("perf_vision_batchsize_8_device_%d.txt" % device)).write_text(PERF % rate)
        (tmp_path / ("PureInfer_perf_of_m_in_device_%d.txt" % device)).write_text(
            "ave_throughputRate = %gsamples/s, ave_latency = 0.192ms\n" % (100 + rate))
    (tmp_path / "fusion_result.json").write_text(json.dumps({"images": 9, "instance_acc": 0.75}))
    return tmp_path


def test_figures_of_several_devices(folder):
    """Rates are summed; the latencies are those of all devices' calls."""
    found = figures(str(folder), 8, ["0", "1"], "benchmark.x86_64")
    assert found["e2e_images_per_s"] == 20 and found["interface_images_per_s"] == 80 and found["pure_images_per_s"] == 280
    assert {found["latency_p%d_ms" % percent] for percent in (50, 95, 99)} == {None}  # the binary has none
    write_summary(folder, 0, throughput=30.5, npu_compute_time_list=[1, 2, 3])
    assert figures(str(folder), 8, ["0", "1"], "ONNX Runtime")["latency_p50_ms"] is None  # not of one device alone
    write_summary(folder, 1, throughput=50.5, npu_compute_time_list=[[100.0, 110.0], [105.0, 125.0]])  # ais_bench --threads 2
    found = figures(str(folder), 8, ["0", "1"], "ONNX Runtime")
    assert found["interface_images_per_s"] == 80
    assert [found["latency_p%d_ms" % percent] for percent in (50, 99)] == [3, pytest.approx(np.percentile([1, 2, 3, 10, 20], 99))]
    found = figures(str(folder), 8, ["0", "1"], "ais_bench")
    assert found["interface_images_per_s"] == 81 and found["e2e_images_per_s"] is None and found["pure_images_per_s"] is None
    for device in (0, 1):
        (folder / ("pure_device%d_summary.json" % device)).write_text(json.dumps({"throughput": 7, "npu_compute_time_list": [1]}))
    assert figures(str(folder), 8, ["0", "1"], "ais_bench")["pure_images_per_s"] == 14


@pytest.mark.parametrize("content", ["", "{}", '{"throughput": NaN, "npu_compute_time_list": [1]}',
                                     '{"throughput": 1, "npu_compute_time_list": [[1]]}',
                                     '{"throughput": 1, "npu_compute_time_list": 5}'])
def test_damaged_summaries_are_refused(folder, content):
    (folder / "dumpOutput_device0_summary.json").write_text(content)
    process = script("tools/run/table.py", "t", "--run", "8", folder, "m.om", "ais_bench", cwd=folder)
    check_error(process, "dumpOutput_device0_summary.json: is not a summary", "run stage 6 again")
    assert not (folder / "t.csv").exists()


def test_table_of_the_binary_and_of_ais_bench(folder):
    def cells(backend, *arguments):
        process = script("tools/run/table.py", "t", "--run", "8", folder, "m.om", backend, *arguments, cwd=folder)
        assert process.returncode == 0, process.stderr
        return [cell.strip() for cell in process.stdout.splitlines()[3].split("|")[1:-1]]

    assert cells("benchmark.x86_64", "--chips", 4) == ["8", "10.00", "30.00", "120.00", "130.00", "-", "-", "-", "0.75"]
    write_summary(folder, 0, throughput=30.5, npu_compute_time_list=[1, 2, 3])
    assert cells("ais_bench") == ["8", "-", "30.50", "-", "-", "2.00", "2.90", "2.98", "0.75"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A user's data, with models of batch size 2 that take images of 8 x 8."""
    folder = tmp_path_factory.mktemp("place")
    names = write_images(folder / "images", 5)
    (folder / "image.txt").write_text("".join(name + "\n" for name in names))
    labels = np.random.RandomState(3).randint(0, 2, (5, 35)).tolist()
    (folder / "label.json").write_text(json.dumps(dict(zip(names, labels))))
    (folder / "work").mkdir()
    write_om(folder / "work" / "deepmar_bs2.om", write_model(folder / "work" / "deepmar_bs2_nopad.onnx", 2, size=(8, 8)))
    return folder


def run(place, *arguments, **variables):
    return run_all("--work-dir", place / "work", "--size", 8, 8, "--batch-size", 2, "--images", place / "images", "--image-list",
                   place / "image.txt", "--label-file", place / "label.json", "--stage", 4, *arguments, **variables)


@pytest.mark.parametrize("backend", ["onnxruntime", "ais_bench"])  # the binary: tests/test_card.py
def test_pure_inference_and_latencies_through_run_all(place, backend):
    process = run(place, "--backend", backend, "--device-id", "0 1", "--pure", "yes", **FRONT_ENDS[2].variables())
    assert process.returncode == 0, process.stdout + process.stderr
    with open(str(place / "work" / "throughput.csv"), newline="") as f:
        row, = csv.DictReader(f)
    assert all(float(row[column]) > 0 for column in ("pure_images_per_s", "latency_p50_ms", "latency_p95_ms", "latency_p99_ms"))
    page = (place / "work" / "report.html").read_text()
    assert "milliseconds of a batch in the model" in page and "p99 ms" in page
    left = os.listdir(str(place / "work" / "result"))
    assert not [name for name in left if name.startswith("pure_device") and not name.endswith(".json")]


def test_failed_pure_inference_stops_the_run(place):
    process = run(place, "--stop-stage", 6, "--backend", "ais_bench", "--pure", "yes", **FRONT_ENDS[2].variables(FAIL="ais_bench pure"))
    assert process.returncode == 1 and "ais_bench failed on device 0; above are the errors" in process.stderr, process.stderr


def test_provider_and_tolerance_reach_stage_6(place):
    arguments = ["--stop-stage", 6, "--backend", "onnxruntime", "--provider"]
    process = run(place, *arguments, "NoSuchProvider")
    assert process.returncode == 1 and "has no provider NoSuchProvider, only " in process.stderr, process.stderr
    process = run(place, *arguments, "CPUExecutionProvider", "--tolerance", "0.5")
    assert process.returncode == 0 and "CPUExecutionProvider" in process.stdout, process.stdout + process.stderr
