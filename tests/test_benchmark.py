"""The stand-in for the benchmark tool: its files, its padding of the last batch, what it refuses."""
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from lib.providers import PROVIDERS
from lib.session import callers, calls_at_once, check_precision, open_session, run
import benchmark
import providers
import session
from helpers import check_error, script, write_model

MACHINE = os.uname().machine
COUNT = 70  # images: more than two groups of writes, and no multiple of the batch size


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark")
    (path / "input_bin").mkdir()
    images = np.random.RandomState(0).standard_normal((COUNT, 3, 224, 224)).astype("<f4")
    for i, image in enumerate(images):
        (path / "input_bin" / ("%05d.bin" % i)).write_bytes(image.tobytes())
    (path / "deepmar.info").write_text("".join("%d ./input_bin/%05d.bin 224 224\n" % (i, i) for i in range(COUNT)))
    np.save(str(path / "images.npy"), images)
    for batch in (1, 8):
        write_model(path / ("bs%d.onnx" % batch), batch)
    return path


def run(folder, model, batch, *more, **changes):
    options = dict({"model_type": "vision", "batch_size": batch, "device_id": 0, "om_path": model, "input_width": 224,
                    "input_height": 224, "input_text_path": "deepmar.info", "useDvpp": "false",
                    "output_binary": "true"}, **changes)
    return script("tools/benchmark.py", *(["-%s=%s" % item for item in options.items()] + list(more)), cwd=folder)


@pytest.mark.parametrize("batch, device, more", [(1, 0, []), (1, 4, ["-threads=5"]), (8, 3, []), (8, 5, ["-threads=1", "-calls=4"]),
                                                 (8, 6, ["-threads=3", "-calls=1"])])
def test_results_are_the_models_and_the_files_the_tools(folder, batch, device, more):
    stale = folder / "result" / ("dumpOutput_device%d" % device)
    os.makedirs(str(stale), exist_ok=True)
    (stale / "99999_1.bin").write_bytes(b"of an earlier, larger run")
    process = run(folder, "bs%d.onnx" % batch, batch, *more, device_id=device)
    assert process.returncode == 0 and process.stderr == "", process.stderr
    session = onnxruntime.InferenceSession(str(folder / "bs1.onnx"), providers=["CPUExecutionProvider"])
    images = np.load(str(folder / "images.npy"))
    assert sorted(os.listdir(str(stale))) == ["%05d_1.bin" % i for i in range(COUNT)]
    for i, image in enumerate(images):
        expected, = run(None, {"actual_input_1": image[None]})
        logits = np.fromfile(str(stale / ("%05d_1.bin" % i)), "<f4")
        assert logits.shape == (35,)
        np.testing.assert_allclose(logits, expected[0], rtol=1e-5, atol=1e-6)
    perf = (folder / "result" / ("perf_vision_batchsize_%d_device_%d.txt" % (batch, device))).read_text()
    number = r"[0-9.e+-]+"
    assert re.match("\\n".join([
        r"\[e2e\] throughputRate: N, latency: N", r"\[data read\] throughputRate: N, moduleLatency: N",
        r"\[preprocess\] throughputRate: N, moduleLatency: N",
        r"\[infer\] throughputRate: N, Interface throughputRate: N, moduleLatency: N",
        r"\[post\] throughputRate: N, moduleLatency: N\n$"]).replace("N", number), perf), perf
    assert perf in process.stdout and "CPUExecutionProvider" in process.stdout
    with open(str(stale) + "_summary.json") as f:
        summary = json.load(f)
    times, calls = summary["npu_compute_time_list"], -(-COUNT // batch)
    assert len(times) == calls == summary["NPU_compute_time"]["count"]
    assert set(summary["NPU_compute_time"]) == {"min", "max", "mean", "median", "percentile(99%)", "count"}
    assert summary["NPU_compute_time"]["percentile(99%)"] == pytest.approx(np.percentile(times, 99))
    assert summary["throughput"] == pytest.approx(float(re.search("Interface throughputRate: ([^,]*)", perf).group(1)), rel=1e-4)
    assert "latency of a call in ms: p50 %.4g, p95 %.4g, p99 %.4g, min %.4g, max %.4g\n" % (
        tuple(np.percentile(times, (50, 95, 99))) + (min(times), max(times))) in process.stdout
    assert ("latency of an image in ms: p50 %.4g," % (np.median(times) / batch) in process.stdout) == (batch > 1)
    # what the parsers of other people take: the eighth value between a colon and a comma
    values = [float(value) for value in re.findall(":(.*?),", perf.replace("\n", ",") + ",")]
    assert values[7] == float(re.search("Interface throughputRate: (%s)," % number, perf).group(1))
    assert abs(values[0] * values[1] / 1000 - COUNT) < 0.01 and values[7] >= values[6] >= values[0] * 0.5


def test_each_caller_stays_on_a_core_of_its_own():
    """Only if there is one for each core: processes that share the cores would choose the same ones."""
    places = os.sched_getaffinity(0)
    for calls in (len(places), len(places) + 1):
        meeting = threading.Barrier(calls)  # so that each thread takes one call

        def place(_):
            meeting.wait(60)
            return os.sched_getaffinity(0)
        with callers(calls) as pool:
            found = list(pool.map(place, range(calls)))
        assert found == [places] * calls if calls > len(places) else sorted(map(tuple, found)) == [(i,) for i in sorted(places)]
        assert os.sched_getaffinity(0) == places


@pytest.mark.parametrize("threads, images, batch_size, calls", [
    (2, 1000, 1, 2), (2, 1000, 8, 2), (2, 1000, 64, 2), (1, 1000, 8, 1), (16, 100000, 8, 16),
    (64, 100000, 8, 29), (64, 100000, 64, 3),                     # 69 and 551 MB a call
    (2, 8, 8, 1), (2, 16, 8, 2), (2, 24, 8, 1), (2, 25 * 8, 8, 2),  # 3 batches would leave one of 2 threads idle for a third
    (8, 9 * 8, 8, 3), (2, 1, 1, 1)])
def test_calls_at_once(threads, images, batch_size, calls):
    assert calls_at_once(threads, images, batch_size) == calls


def test_calls_of_a_large_batch_take_no_more_than_the_memory_allowed():
    assert calls_at_once(8, 10 ** 6, 1024) == 1
    assert calls_at_once(8, 10 ** 6, 8, 896, 896) == 1 < calls_at_once(8, 10 ** 6, 8, 256, 128) == 8


def test_pure_inference_of_another_size(folder, tmp_path):
    """-round has no widths and heights, as the binary: the model tells its own."""
    write_model(tmp_path / "tall.onnx", 2, size=(256, 128))
    process = script("tools/benchmark.py", "-round=3", "-om_path=tall.onnx", "-batch_size=2", "-calls=2", cwd=tmp_path)
    assert process.returncode == 0 and "2 calls at a time" in process.stdout, process.stderr
    with open(str(tmp_path / "result" / "PureInfer_perf_of_tall_in_device_0_summary.json")) as f:
        assert len(json.load(f)["npu_compute_time_list"]) == 3


class Half(object):
    """A session of another provider, which computes in float16."""

    def __init__(self, path):
        self.exact = open_session(path)

    def __getattr__(self, name):
        return getattr(self.exact, name)

    def get_providers(self):
        return ["FastExecutionProvider", "CPUExecutionProvider"]

    def run(self, *arguments):
        return [output.astype(np.float16).astype(np.float32) for output in self.exact.run(*arguments)]


def test_a_provider_that_computes_otherwise(folder, monkeypatch, capsys):
    """Its first batch is compared with the CPU's; -tolerance allows for its precision, and no more."""
    monkeypatch.chdir(str(folder))
    names = ["FastExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(benchmark, "available", lambda: names)
    monkeypatch.setattr(benchmark, "open_session", lambda path, device_id, threads, calls, name, exact: (
        Half(path) if name == names[0] else open_session(path, device_id, threads, calls, name, exact)))
    arguments = ["-batch_size=8", "-om_path=bs8.onnx", "-input_text_path=deepmar.info", "-device_id=9"]
    with pytest.raises(ValueError, match="bs8.onnx: in the first batch, the logits of Fast.* differ from the CPU's by up to .* "
                                         "give a -tolerance above"):
        benchmark.main(arguments + ["-provider=" + names[0], "-tolerance=1e-6"])
    assert not os.path.exists("result/dumpOutput_device9")
    monkeypatch.setattr(benchmark, "measure", lambda session, *_: 9.0 if isinstance(session, Half) else 3.0)
    benchmark.main(arguments + ["-provider=measure", "-tolerance=1e-6"])
    said = capsys.readouterr().out
    assert "[WARN] FastExecutionProvider is left out: bs8.onnx: in the first" in said
    assert "[INFO] measured: CPUExecutionProvider 3 images/s; CPUExecutionProvider is taken" in said
    benchmark.main(arguments + ["-provider=measure", "-tolerance=0.01"])
    said = capsys.readouterr().out
    assert "measured: FastExecutionProvider 9 images/s, CPUExecutionProvider 3 images/s; FastExecutionProvider is taken" in said
    assert "FastExecutionProvider, bs8.onnx" in said


def test_a_provider_whose_logits_are_nan(folder, monkeypatch):
    monkeypatch.setattr(Half, "run", lambda self, *arguments: [np.full((8, 35), np.nan, np.float32)])
    path = str(folder / "bs8.onnx")
    with pytest.raises(ValueError, match="differ from the CPU's by up to nan"):
        check_precision(Half(path), path, np.zeros((8, 3, 224, 224), np.float32), 0.5)


def test_a_provider_that_is_not_there(folder):
    process = run(folder, "bs1.onnx", 1, "-provider=CUDAExecutionProvider")
    check_error(process, "this ONNX Runtime has no provider CUDAExecutionProvider, only ", "CPUExecutionProvider")
    for wrong in ("-tolerance=x", "-tolerance=1", "-calls=0"):
        check_error(run(folder, "bs1.onnx", 1, wrong), code=2)


@pytest.mark.skipif(sys.version_info < (3, 9) or MACHINE != "x86_64", reason="onnxruntime-ep-openvino has no package for this Python")
@pytest.mark.parametrize("batch", [1, 8])
def test_openvinos_plug_in(folder, batch):
    """The genuine one: float32 as the CPU provider, several calls at a time, and the same results."""
    run(folder, "bs%d.onnx" % batch, batch, device_id=10)
    process = run(folder, "bs%d.onnx" % batch, batch, "-provider=OpenVINOExecutionProvider", "-calls=2", device_id=11)
    assert process.returncode == 0, process.stderr
    assert "OpenVINOExecutionProvider, bs%d.onnx" % batch in process.stdout
    logits = [np.stack([np.fromfile(str(folder / "result" / ("dumpOutput_device%d" % device) / ("%05d_1.bin" % i)), "<f4")
                        for i in range(COUNT)]) for device in (10, 11)]
    assert np.abs(logits[0] - logits[1]).max() <= 1e-3 * np.abs(logits[0]).max()


def test_a_clock_counts_the_time_of_overlapping_calls_once():
    clock, began = benchmark.Clock(), time.perf_counter()
    with clock:
        with clock:
            time.sleep(0.05)
        time.sleep(0.05)
    assert 0.1 <= clock.seconds <= time.perf_counter() - began


@pytest.mark.parametrize("batch", [1, 8])
def test_pure_inference(folder, batch):
    process = script("tools/benchmark.py", "-round=5", "-om_path=bs%d.onnx" % batch, "-device_id=0",
                     "-batch_size=%d" % batch, cwd=folder)
    assert process.returncode == 0, process.stderr
    path = "./result/PureInfer_perf_of_bs%d_in_device_0.txt" % batch
    assert "[INFO] PureInfer result saved in %s\n" % path in process.stdout
    text = (folder / path).read_text()
    rate, latency = re.match(r"ave_throughputRate = ([0-9.e+-]+)samples/s, ave_latency = ([0-9.e+-]+)ms\n$", text).groups()
    assert abs(float(rate) * float(latency) / 1000 - 1) < 1e-3


def test_usage(folder):
    for changes in ({"batch_size": 0}, {"batch_size": "x"}, {"device_id": -1}, {"model_type": "nlp"}, {"useDvpp": "true"},
                    {"om_path": "model.om"}, {"output_binary": "false"}, {"nonsense": 1}):
        check_error(run(folder, "bs1.onnx", 1, **changes), code=2)
    check_error(run(folder, "bs1.onnx", 1, "-round=3"), code=2)
    check_error(script("tools/benchmark.py", "-batch_size=1", "-om_path=bs1.onnx", cwd=folder), code=2)


def test_models_that_do_not_fit(folder, tmp_path):
    check_error(run(folder, "bs1.onnx", 8), "bs1.onnx", "[8,3,224,224]")
    check_error(run(folder, "nowhere.onnx", 1), "nowhere.onnx")
    (tmp_path / "cut.onnx").write_bytes((folder / "bs1.onnx").read_bytes()[:-200])
    check_error(run(folder, tmp_path / "cut.onnx", 1), "cut.onnx")
    write_model(tmp_path / "double.onnx", type=TensorProto.DOUBLE)
    check_error(run(folder, tmp_path / "double.onnx", 1), "double.onnx")
    write_model(tmp_path / "small.onnx", size=(112, 112))
    check_error(run(folder, tmp_path / "small.onnx", 1), "small.onnx", "112")


@pytest.mark.parametrize("lines, text", [
    (["0 ./input_bin/00000.bin 224 224", "2 ./input_bin/00001.bin 224 224"], "line 2"),
    (["0 ./input_bin/00000.bin 224"], "line 1"), (["0 ./input_bin/00000.bin 112 224"], "112"),
    (["0 ./input_bin/00000.bin 224 224", "1 ./input_bin/00000.bin 224 224"], "two bins"),
    (["0 ./input_bin/x.bin 224 224", "1 /etc/passwd 224 224"], "2 of 2"), ([], "names no bin"),
    (["0 ./short.bin 224 224"], "short.bin"), (["0 ./nan.bin 224 224"], "nan.bin")])
def test_bad_info_and_bins_leave_earlier_results(folder, lines, text):
    (folder / "short.bin").write_bytes(b"\0" * 602108)
    nan = np.zeros((3, 224, 224), "<f4")
    nan[2, 100, 100] = np.nan
    (folder / "nan.bin").write_bytes(nan.tobytes())
    (folder / "bad.info").write_text("\n".join(lines))
    earlier = folder / "result" / "dumpOutput_device7"
    os.makedirs(str(earlier), exist_ok=True)
    (earlier / "a_1.bin").write_bytes(b"earlier")
    check_error(run(folder, "bs8.onnx", 8, input_text_path="bad.info", device_id=7), text)
    assert os.listdir(str(earlier)) == ["a_1.bin"] and (earlier / "a_1.bin").read_bytes() == b"earlier"
    assert not (folder / "result" / "dumpOutput_device7.partial").exists()


# Runs a model over one image, and says when.
SLOW = """
import sys
sys.path.insert(0, sys.argv[1])
import benchmark
session = benchmark.open_session("slow.onnx")
print("started", flush=True)
benchmark.run(session, [("a", "a.bin")], 32768, 2, 2, ".", lambda images: None)
"""


def test_ctrl_c_does_not_wait_for_the_batch(tmp_path):
    """Which takes this model a minute or more."""
    nodes = [helper.make_node("GlobalAveragePool", ["x"], ["p"]), helper.make_node("Flatten", ["p"], ["f"]),
             helper.make_node("Gemm", ["f", "w"], ["h0"])]
    nodes += [helper.make_node("MatMul", ["h%d" % i, "s"], ["h%d" % (i + 1)]) for i in range(400)]
    nodes.append(helper.make_node("ReduceSum", ["h400"], ["output1"], axes=[1]))
    weights = [numpy_helper.from_array(np.zeros((3, 512), np.float32), "w"),
               numpy_helper.from_array(np.zeros((512, 512), np.float32), "s")]
    model = helper.make_model(helper.make_graph(
        nodes, "slow", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [32768, 3, 2, 2])],
        [helper.make_tensor_value_info("output1", TensorProto.FLOAT, [32768, 1])], weights),
        opset_imports=[helper.make_opsetid("", 11)])
    model.ir_version = 6
    onnx.save(model, str(tmp_path / "slow.onnx"))
    (tmp_path / "a.bin").write_bytes(bytes(48))
    process = subprocess.Popen([sys.executable, "-c", SLOW, os.path.dirname(benchmark.__file__)], cwd=str(tmp_path),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"started\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    began = time.time()
    _, errors = process.communicate()
    assert process.returncode and errors.endswith(b"KeyboardInterrupt\n"), errors
    assert time.time() - began < 30


def test_a_provider_that_did_not_load(folder, monkeypatch, capsys):
    """As onnxruntime-gpu does without a GPU, and onnxruntime-cann without CANN: the session runs on the CPU."""
    monkeypatch.chdir(str(folder))
    monkeypatch.setattr(providers, "default", lambda device_id: ["CPUExecutionProvider"])
    arguments = ["-batch_size=1", "-om_path=bs1.onnx", "-round=1"]
    for name in PROVIDERS[:2]:
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [name, "CPUExecutionProvider"])
        benchmark.main(arguments)
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("[WARN] %s did not load, so the CPU runs the model; " % name)
        assert lines[1] == "[INFO] ONNX Runtime %s, CPUExecutionProvider (%s did not load), bs1.onnx" % (
            onnxruntime.__version__, name)
        with pytest.raises(ValueError, match=name + " did not load; "):
            benchmark.main(arguments + ["-strict"])
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    benchmark.main(arguments + ["-strict"])
    assert "did not load" not in capsys.readouterr().out


def test_onnxruntime_of_numpy_1_with_numpy_2(folder, tmp_path):
    """onnxruntime-cann 1.24.4: NumPy prints a page that begins so, then the import fails."""
    (tmp_path / "onnxruntime.py").write_text(
        "import sys\nsys.stderr.write('\\nA module that was compiled using NumPy 1.x cannot be run in\\nNumPy 2.4.6 as it'\n"
        "                 ' may crash.\\nTraceback (most recent call last):\\n')\nraise ImportError('import numpy failed')\n")
    code = "import sys; sys.path.insert(0, %r); import session; sys.path.insert(0, %r); session.open_session('bs1.onnx')" % (
        os.path.dirname(benchmark.__file__), str(tmp_path))
    process = subprocess.run([sys.executable, "-c", code], cwd=str(folder), stderr=subprocess.PIPE, universal_newlines=True)
    last = process.stderr.splitlines()[-1]
    assert "was built for NumPy 1" in last and last.endswith("-m pip install 'numpy<2'"), process.stderr
    assert "A module that was compiled" not in process.stderr
