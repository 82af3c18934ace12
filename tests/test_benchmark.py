"""tools/benchmark.py: the benchmark tool's files, the padded last batch, providers, and what is refused."""
import json
import os
import re
import sys
from unittest import mock

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

from lib import providers
from lib.providers import PROVIDERS
from lib.session import open_session
import benchmark
from helpers import check_error, contents, keep_weights_outside, put, script, started, write_means, write_model

TOOL = "tools/benchmark.py"
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
    options = {"model_type": "vision", "batch_size": batch, "device_id": 0, "om_path": model, "input_width": 224, "input_height": 224,
               "input_text_path": "deepmar.info", "useDvpp": "false", "output_binary": "true", **changes}
    return script(TOOL, *(["-%s=%s" % item for item in options.items()] + list(more)), cwd=folder)


def results(folder, device):
    """Returns the logits in the folder of results of a device, float32 [COUNT, attributes]."""
    path = folder / "result" / ("dumpOutput_device%d" % device)
    assert sorted(os.listdir(str(path))) == ["%05d_1.bin" % i for i in range(COUNT)]
    return np.stack([np.fromfile(str(path / ("%05d_1.bin" % i)), "<f4") for i in range(COUNT)])


@pytest.mark.parametrize("batch, device, more", [(1, 0, []), (8, 3, ["-threads=5"]), (8, 5, ["-threads=1", "-calls=4"])])
def test_results_are_the_models_and_the_files_the_tools(folder, batch, device, more):
    earlier = folder / "result" / ("dumpOutput_device%d" % device)
    os.makedirs(str(earlier), exist_ok=True)
    (earlier / "99999_1.bin").write_bytes(b"of an earlier, larger run")
    process = run(folder, "bs%d.onnx" % batch, batch, *more, device_id=device)
    assert process.returncode == 0 and process.stderr == "", process.stderr
    session = onnxruntime.InferenceSession(str(folder / "bs1.onnx"), providers=["CPUExecutionProvider"])
    expected = np.concatenate([session.run(None, {"actual_input_1": image[None]})[0] for image in np.load(str(folder / "images.npy"))])
    np.testing.assert_allclose(results(folder, device), expected, rtol=1e-5, atol=1e-6)
    perf = (folder / "result" / ("perf_vision_batchsize_%d_device_%d.txt" % (batch, device))).read_text()
    assert re.sub("[0-9.][0-9.e+-]*", "N", perf.replace("[e2e]", "[end]")) == (
        "[end] throughputRate: N, latency: N\n[data read] throughputRate: N, moduleLatency: N\n"
        "[preprocess] throughputRate: N, moduleLatency: N\n"
        "[infer] throughputRate: N, Interface throughputRate: N, moduleLatency: N\n[post] throughputRate: N, moduleLatency: N\n")
    assert perf in process.stdout and "CPUExecutionProvider" in process.stdout
    summary = json.loads((folder / "result" / ("dumpOutput_device%d_summary.json" % device)).read_text())
    times, calls = summary["npu_compute_time_list"], -(-COUNT // batch)
    assert len(times) == calls == summary["NPU_compute_time"]["count"]
    assert set(summary["NPU_compute_time"]) == {"min", "max", "mean", "median", "percentile(99%)", "count"}
    interface = float(re.search("Interface throughputRate: ([^,]*),", perf).group(1))
    assert summary["throughput"] == pytest.approx(interface, rel=1e-4)
    assert "latency of a call in ms: p50 %.4g, p95 %.4g, p99 %.4g, min %.4g, max %.4g\n" % (
        tuple(np.percentile(times, (50, 95, 99))) + (min(times), max(times))) in process.stdout
    assert ("latency of an image in ms: p50 %.4g," % (np.median(times) / batch) in process.stdout) == (batch > 1)
    rate, latency = map(float, re.match(r"\[e2e\] throughputRate: (\S+), latency: (\S+)", perf).groups())
    assert abs(rate * latency / 1000 - COUNT) < 0.01


@pytest.mark.parametrize("batch, size", [(1, (224, 224)), (2, (256, 128))])
def test_pure_inference_takes_the_models_size_and_writes_the_tools_files(tmp_path, batch, size):
    """-round has no widths and heights, as in the binary."""
    write_model(tmp_path / "m.onnx", batch, size=size)
    process = script(TOOL, "-round=5", "-om_path=m.onnx", "-device_id=0", "-batch_size=%d" % batch, "-calls=2", cwd=tmp_path)
    assert process.returncode == 0 and "calls at a time: 2" in process.stdout, process.stderr
    path = "./result/PureInfer_perf_of_m_in_device_0"
    assert "[INFO] PureInfer result saved in %s.txt\n" % path in process.stdout
    text = (tmp_path / (path + ".txt")).read_text()
    rate, latency = re.match(r"ave_throughputRate = ([0-9.e+-]+)samples/s, ave_latency = ([0-9.e+-]+)ms\n$", text).groups()
    assert abs(float(rate) * float(latency) / 1000 - 1) < 1e-3
    assert len(json.loads((tmp_path / (path + "_summary.json")).read_text())["npu_compute_time_list"]) == 5


# --- providers --------------------------------------------------------------------------------------------------------

def of_float16(path, *_, **__):
    """Returns a session of another provider, which computes in float16."""
    exact = open_session(path)
    session = mock.Mock(wraps=exact)
    session.get_providers = lambda: ["FastExecutionProvider", "CPUExecutionProvider"]
    session.run = lambda *arguments: [output.astype(np.float16).astype(np.float32) for output in exact.run(*arguments)]
    return session


def test_provider_of_other_precision_needs_tolerance(folder, monkeypatch, capsys):
    monkeypatch.chdir(str(folder))
    monkeypatch.setattr(benchmark, "open_session", of_float16)
    command = ["-batch_size=8", "-om_path=bs8.onnx", "-input_text_path=deepmar.info", "-device_id=9", "-provider=FastExecutionProvider"]
    with pytest.raises(ValueError, match="bs8.onnx: in the first batch, the logits of Fast.* differ from the CPU's by up to .* "
                                         "give a -tolerance above"):
        benchmark.main(command + ["-tolerance=1e-6"])
    assert not os.path.exists("result/dumpOutput_device9")
    benchmark.main(command + ["-tolerance=0.01"])
    assert "FastExecutionProvider, bs8.onnx" in capsys.readouterr().out and results(folder, 9).shape == (COUNT, 35)


@pytest.mark.parametrize("version, more", [("1.17.3", {}), ("1.18.0", {"dump_om_model": "0"}), ("1.22.1", {"dump_om_model": "0"})])
def test_provider_of_cann_writes_no_om(monkeypatch, version, more):
    cann, cuda = PROVIDERS[:2]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [cann, cuda, "CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "__version__", version)
    options = dict({"device_id": "3"}, **more)
    assert providers.default(3) == [(cann, options), (cuda, {"device_id": "3"}), ("CPUExecutionProvider", {})]
    assert providers.add(None, cann, 3, 1, 1, True) == [(cann, options), "CPUExecutionProvider"]


def test_missing_provider_is_refused(folder):
    check_error(run(folder, "bs1.onnx", 1, "-provider=CUDAExecutionProvider"), "has no provider CUDAExecutionProvider, only ")


@pytest.mark.skipif(sys.version_info < (3, 9) or os.uname().machine != "x86_64", reason="onnxruntime-ep-openvino has no package for it")
def test_the_genuine_plug_in_of_openvino_gives_the_same_results(folder):
    process = run(folder, "bs8.onnx", 8, "-provider=OpenVINOExecutionProvider", "-calls=2", device_id=11)
    if "has no provider OpenVINOExecutionProvider" in process.stderr:
        pytest.skip("NOT RUN: OpenVINO's plug-in offers no device on this CPU")
    assert process.returncode == 0 and "OpenVINOExecutionProvider, bs8.onnx" in process.stdout, process.stderr
    run(folder, "bs8.onnx", 8, device_id=10)
    cpu, openvino = results(folder, 10), results(folder, 11)
    assert np.abs(cpu - openvino).max() <= 1e-3 * np.abs(cpu).max()


@pytest.mark.parametrize("name", PROVIDERS[:2])
def test_provider_that_did_not_load_is_named(folder, monkeypatch, capsys, name):
    """As onnxruntime-gpu does without a GPU, and onnxruntime-cann without CANN: the session runs on the CPU."""
    monkeypatch.chdir(str(folder))
    monkeypatch.setattr(providers, "default", lambda device_id: ["CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [name, "CPUExecutionProvider"])
    arguments = ["-batch_size=1", "-om_path=bs1.onnx", "-round=1"]
    benchmark.main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("[WARN] %s did not load, so the CPU runs the model; " % name)
    assert lines[1] == "[INFO] ONNX Runtime %s, CPUExecutionProvider (%s did not load), bs1.onnx" % (onnxruntime.__version__, name)
    with pytest.raises(ValueError, match=name + " did not load; "):
        benchmark.main(arguments + ["-strict"])


def test_onnxruntime_of_numpy_1_with_numpy_2_is_explained(folder, tmp_path, monkeypatch):
    """As of onnxruntime-cann 1.24.4: NumPy prints a page, then the import fails."""
    (tmp_path / "onnxruntime.py").write_text(
        "import sys\nsys.stderr.write('A module that was compiled using NumPy 1.x\\nTraceback ...\\n')\nraise ImportError('numpy')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = started(TOOL, "-batch_size=1", "-om_path=bs1.onnx", "-round=1", cwd=folder)
    check_error(process, "was built for NumPy 1", "-m pip install 'numpy<2'")


# --- what is refused --------------------------------------------------------------------------------------------------

def test_symbolic_sizes_are_those_of_the_metadata(folder, tmp_path):
    put(write_means(tmp_path / "m.onnx", ["N", 3, "H", "W"]), size="[256, 128]")
    check_error(run(folder, tmp_path / "m.onnx", 2), "m.onnx: its input is [?,3,256,128], not [2,3,224,224]; give this size")
    done = script(TOOL, "-round=1", "-om_path=m.onnx", "-batch_size=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_usage_errors(folder):
    for changes in ({"batch_size": 0}, {"device_id": -1}, {"model_type": "nlp"}, {"useDvpp": "true"}, {"om_path": "model.om"},
                    {"output_binary": "false"}, {"nonsense": 1}, {"tolerance": 1.1}, {"calls": 0}, {"round": 3}):
        check_error(run(folder, "bs1.onnx", 1, **changes), code=2)
    check_error(script(TOOL, "-batch_size=1", "-om_path=bs1.onnx", cwd=folder), code=2)


def test_models_that_do_not_fit_or_would_read_another_file_are_refused(folder, tmp_path):
    (tmp_path / "cut.onnx").write_bytes((folder / "bs1.onnx").read_bytes()[:-200])
    write_model(tmp_path / "double.onnx", type=TensorProto.DOUBLE)
    write_model(tmp_path / "small.onnx", size=(112, 112))
    outside = onnx.load(str(folder / "bs1.onnx"))
    keep_weights_outside(outside)
    (tmp_path / "outside.onnx").write_bytes(outside.SerializeToString())
    for model, batch, text in ((folder / "bs1.onnx", 8, "[8,3,224,224]"), (tmp_path / "nowhere.onnx", 1, "nowhere.onnx"),
                               (tmp_path / "cut.onnx", 1, "cut.onnx"), (tmp_path / "double.onnx", 1, "double.onnx"),
                               (tmp_path / "small.onnx", 1, "112"), (tmp_path / "outside.onnx", 1, "keeps its weights in")):
        check_error(run(folder, model, batch), model.name, text)


@pytest.mark.parametrize("info, text", [
    (b"0 ./input_bin/00000.bin 224 224\n2 ./input_bin/00001.bin 224 224", "line 2"),
    (b"0 ./input_bin/00000.bin 112 224", "112"), (b"", "names no bin"), (b"0 \xff.bin 224 224", "bad.info: "),
    (b"0 ./input_bin/00000.bin 224 224\n1 ./input_bin/00000.bin 224 224", "two bins"), (b"9" * 10000 + b" a.bin 224 224", "line 1"),
    (b"0 ./input_bin/x.bin 224 224\n1 /etc/passwd 224 224", "2 of 2"), (b"0 ./nan.bin 224 224", "nan.bin")],
    ids=lambda value: value if isinstance(value, str) else "")
def test_bad_info_and_bins_are_named_in_a_short_line_and_leave_earlier_results(folder, info, text):
    np.append(np.zeros(3 * 224 * 224 - 1, "<f4"), np.float32("nan")).tofile(str(folder / "nan.bin"))
    (folder / "bad.info").write_bytes(info)
    earlier = folder / "result" / "dumpOutput_device7"
    os.makedirs(str(earlier), exist_ok=True)
    (earlier / "a_1.bin").write_bytes(b"earlier")
    process = run(folder, "bs8.onnx", 8, input_text_path="bad.info", device_id=7)
    check_error(process, text)
    assert len(process.stderr) < 6000 and contents(earlier) == {"a_1.bin": b"earlier"}
