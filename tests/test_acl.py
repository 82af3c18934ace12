"""lib/acl.py: OMs in the tools through aclruntime (its stand-in), with the calls of ais_bench's own InferSession."""
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

import lib.script
import om
from helpers import (FRONT_ENDS, ROOT, RUNTIME, all_images, check_error, check_once, run_gallery, write_bins, write_images, write_model,
                     write_om)

NAMES = ["attribute %d" % i for i in range(35)]
CONTEXT = ("session_options", "InferenceSession", "set_staticbatch", "BaseTensor", "run", "to_host", "free_resource", "finalize")
YEARS = pytest.mark.parametrize("front", [FRONT_ENDS[0]] + FRONT_ENDS[2:], ids=lambda front: front.name)
# What a front end's own InferSession does for one batch.
INFER_SESSION = """
import numpy as np
from ais_bench.infer.interface import InferSession
session = InferSession(1, "m.om")
session.set_staticbatch()
session.run([np.zeros([4, 3, 224, 224], np.float32)], out_array=True)
if hasattr(session, "free_resource"):
    session.free_resource()
session.finalize()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """images/ with 11 images, their bins; m.onnx of batch size 4, m.om and aipp.om of it, m.json."""
    path = tmp_path_factory.mktemp("acl")
    write_bins(path, write_images(path / "images", 11))
    onnx = write_model(path / "m.onnx", 4)
    write_om(path / "m.om", onnx, soc_version="Ascend310P3")
    fields = json.dumps({"aipp_mode": "static", "input_format": "RGB888_U8", "var_reci_chn_1": "0.01"}).encode()
    (path / "aipp.om").write_bytes(om.content([(om.MODEL_DEF, om.model_def({})), (om.WEIGHTS, onnx.read_bytes()), (om.TASKS, fields)]))
    for name in ("m.json", "aipp.json"):
        (path / name).write_text(json.dumps({"attributes": NAMES, "layout": "NCHW RGB", "size": [224, 224], "output": "logits"}))
    return path


def run(folder, *command, **variables):
    """Runs a command with aclruntime in a folder; a script's name is below ROOT. Returns the finished process."""
    path = os.path.join(ROOT, command[0]) if command[0].endswith(".py") else command[0]
    return subprocess.run([sys.executable, path] + [str(part) for part in command[1:]], cwd=str(folder), stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, universal_newlines=True, env=dict(os.environ, **{"PYTHONPATH": RUNTIME, **variables}))


def calls(path):
    """Returns the calls in a file of aclruntime's, without the log level, and without those that need no context."""
    lines = [line.partition(" log_level")[0] for line in path.read_text().splitlines()]
    return [line for line in lines if line.split()[0] in CONTEXT]


@YEARS
def test_logits_are_those_of_stage_6_to_the_bit(front, folder, tmp_path):
    done = front.run(folder, input="input_bin", output="out_" + front.name, batchsize=4)
    assert done.returncode == 0, done.stdout
    stage6 = {path.name[:-len("_0.bin")]: np.fromfile(str(path), "<f4") for path in (folder / ("out_" + front.name) / "d").iterdir()}
    done = run(folder, "tools/predict.py", "images", "--model", "m.om", "--device", 1, "--json", tmp_path / "p.json", **front.variables())
    assert done.returncode == 0 and done.stderr in ("", "[INFO] open device 1 success\n"), done.stderr
    content = json.loads((tmp_path / "p.json").read_text())
    assert content["attributes"] == NAMES and content["model_output"] == "logits" and len(content["images"]) == 11
    for row in content["images"]:
        assert np.float32(row["logits"]).tobytes() == stage6[os.path.basename(row["image"])[:-4]].tobytes()
    done = run_gallery(folder, "images", "--model", "m.om", "--output", tmp_path / "gallery", "--npus", 1, "--devices", 2,
                       "--shard-size", 4, **front.variables())
    assert done.returncode == 0, done.stderr
    for name, (error, logits) in check_once(tmp_path / "gallery", all_images(folder / "images")).items():
        assert error is None and logits.tobytes() == stage6[name[:-4]].tobytes()
    manifest = json.loads((tmp_path / "gallery" / "_manifest.json").read_text())
    assert manifest["provider"] == "aclruntime" and "onnxruntime" not in manifest["versions"]
    assert run(folder, "tools/compare.py", folder / ("out_" + front.name) / "d", "--model", "m.om", "--bins", "input_bin",
               "--max-difference", 0, **front.variables()).returncode == 0


@YEARS
def test_calls_are_those_of_ais_bench_in_one_thread(front, folder, tmp_path):
    done = run(folder, "tools/predict.py", "images/im1.png", "--model", "m.om", "--device", 1,
               **front.variables(ACLRUNTIME_CALLS=str(tmp_path / "ours")))
    assert done.returncode == 0, done.stderr
    expected = ["session_options", "InferenceSession .om 1 loop 1", "set_staticbatch", "BaseTensor 2408448", "run output1", "to_host"]
    assert calls(tmp_path / "ours") == expected + ["free_resource"] * (front.year > 2023) + ["finalize"]
    if front.genuine:
        done = run(folder, "-c", INFER_SESSION, **front.variables(ACLRUNTIME_CALLS=str(tmp_path / "theirs")))
        assert done.returncode == 0, done.stderr
        assert calls(tmp_path / "theirs") == calls(tmp_path / "ours")


def test_stand_in_refuses_another_thread(folder):
    done = run(folder, "-c", "import aclruntime, threading\n"
               "session = aclruntime.InferenceSession('m.om', 0, aclruntime.session_options())\n"
               "threading.Thread(target=session.set_staticbatch).start()")
    assert "107002" in done.stdout and "no context in this thread" in done.stderr


def test_predict_needs_numpy_and_pillow_alone(folder):
    """Whatever the project's files import is refused if it is no module of Python, numpy, Pillow or aclruntime."""
    code = """
import builtins, runpy, sys
real = builtins.__import__
def own(name, variables=None, *more, **named):
    if name.partition(".")[0] in ("onnx", "onnxruntime", "google", "tqdm") and (variables or {}).get("__file__", "").startswith(%r):
        raise ImportError("refused: " + name)
    return real(name, variables, *more, **named)
builtins.__import__ = own
sys.argv = ["predict.py", "images/im1.png", "--model", "m.om"]
runpy.run_path(%r, run_name="__main__")
""" % (tuple(os.path.join(ROOT, name) for name in ("lib", "tools")), os.path.join(ROOT, "tools", "predict.py"))
    done = run(folder, "-c", code)
    assert done.returncode == 0 and done.stdout.startswith("images/im1.png: "), done.stderr
    assert "refused: onnx" in run(folder, "-c", code.replace('"m.om"', '"m.onnx"')).stderr


def test_aipp_gets_pixels(folder, tmp_path):
    done = run(folder, "tools/predict.py", "images/im1.png", "--model", "aipp.om", "--json", tmp_path / "p.json")
    assert done.returncode == 0, done.stderr
    assert run(folder, "preprocess_deepmar_pytorch.py", "images", tmp_path / "bins", "image.txt", "--uint8").returncode == 0
    model = om.Model(str(folder / "aipp.om"))
    logits = model.run([str(tmp_path / "bins" / "im1.bin")])[0]
    assert np.float32(json.loads((tmp_path / "p.json").read_text())["images"][0]["logits"]).tobytes() == logits.tobytes()


def test_description_says_that_it_gives_probabilities(folder, tmp_path):
    write_om(tmp_path / "m.om", write_model(tmp_path / "m.onnx", attributes=2, sigmoid=True))
    command = ["tools/predict.py", folder / "images" / "im1.png", "--model", "m.om", "--json", "p.json"]
    done = run(tmp_path, *command)
    assert "m.om: there is no description, a .json file of the same name" in done.stderr and "look like probabilities" in done.stderr
    (tmp_path / "m.json").write_text(json.dumps({"attributes": ["hat", "bag"], "output": "probabilities"}))
    done = run(tmp_path, *command)
    assert done.returncode == 0 and done.stderr == "note: m.om: the model ends in a Sigmoid; its probabilities are converted to logits\n"
    assert json.loads((tmp_path / "p.json").read_text())["attributes"] == ["hat", "bag"]
    (tmp_path / "m.json").write_text(json.dumps({"size": [64, 32]}))
    check_error(run(tmp_path, *command), "m.om: its metadata say size [64, 32]")


def test_om_is_compared_with_its_onnx_model(folder):
    done = run(folder, "tools/compare.py", "m.om", "--model", "m.onnx", "--bins", "input_bin", "--max-difference", 0)
    assert done.returncode == 0 and "flips: 0 of 385" in done.stdout, done.stderr
    for options in (["m.onnx", "--model", "m.om", "--layers"], ["m.om", "--model", "m.onnx", "--rehearsal", "m.om"]):
        check_error(run(folder, "tools/compare.py", *options, "--bins", "input_bin"), "give the OM as A", code=2)


def test_errors(folder, tmp_path):
    command = ["tools/predict.py", folder / "images" / "im1.png", "--model"]
    done = run(folder, *command, "m.om", "--device", 7)
    assert "[ERROR] aclrtSetDevice failed, device 7" in done.stderr and done.stdout == ""
    assert "error: m.om: aclruntime cannot open it on device 7: open device 7 failed (the OM is for Ascend310P3)" in done.stderr
    check_error(run(folder, *command, "none.om"), "none.om: no such file")
    check_error(run(folder, *command, "m.om", PYTHONPATH=""), "m.om: an OM runs with ais_bench's aclruntime", "-m pip install aclruntime")
    (tmp_path / "bad.om").write_bytes(b"<html>")
    check_error(run(folder, *command, tmp_path / "bad.om"), "bad.om: aclruntime cannot open it")
    check_error(run(folder, "tools/gallery.py", "images", "--model", "m.om", "--output", tmp_path / "out", "--gpus", 1), "NPUs", code=2)


@pytest.mark.parametrize("size, shape, text", [(0, [-1, 3, 8, 8], "the shape of x is dynamic"), (96, [1, 8, 8, 3], "x takes 96 bytes"),
                                               (192, [1, 3, 8, 8], None)])
def test_dynamic_shapes_and_other_pixels_are_refused(size, shape, text):
    from lib.acl import Om, Value
    tensor = type("TensorDesc", (), {"name": "x", "datatype": 4, "shape": shape, "size": size})
    if text is None:  # the network's shape of RGB888_U8
        assert Om.value(None, "m.om", tensor) == Value("x", "tensor(uint8)", [1, 8, 8, 3])
        return
    with pytest.raises(ValueError, match=text):
        Om.value(None, "m.om", tensor)


@pytest.mark.parametrize("model", ["m.om", "m.onnx"])
def test_stdin_is_answered_line_by_line_by_one_session(model, folder, tmp_path):
    variables = {"PYTHONPATH": RUNTIME, "ACLRUNTIME_CALLS": str(tmp_path / "calls"), "AIS_BENCH_YEAR": "2023"}
    done = run(folder, "tools/predict.py", "images", "--model", model, "--json", tmp_path / "p.json", PYTHONPATH=RUNTIME)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "p.json").read_text())
    os.mkfifo(str(tmp_path / "fifo"))
    (tmp_path / "行 人.png").write_bytes((folder / "images" / "im1.png").read_bytes())
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, "tools", "predict.py"), "--stdin", "--model", model], cwd=str(folder),
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ, **variables))

    def ask(path):
        process.stdin.write(os.fsencode(str(path)) + b"\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline().decode())

    for row in content["images"] * 2:
        for bad in ("absent.png", "images", "image.txt", "", b"a\xff\0", tmp_path / "fifo"):
            bad = os.fsdecode(bad) if isinstance(bad, bytes) else bad
            answer = ask(bad)
            assert set(answer) == {"image", "error"} and answer["image"] == str(bad) and answer["error"]
        assert ask(row["image"]) == {"image": row["image"], "has": row["has"], "logits": dict(zip(content["attributes"], row["logits"]))}
    assert ask(tmp_path / "行 人.png")["has"] == content["images"][1]["has"]
    output, errors = process.communicate()
    assert process.returncode == 0 and output == b"", errors
    if model == "m.om":
        lines = calls(tmp_path / "calls")
        assert lines.count("run output1") == 23 and len([line for line in lines if line.startswith("InferenceSession")]) == 1


def test_stdin_excludes_files(folder):
    for options in ([], ["--stdin", "images"], ["--stdin", "--json", "p.json"]):
        check_error(run(folder, "tools/predict.py", "--model", "m.onnx", *options), "give either images, or --stdin", code=2)
    process = run(folder, "tools/predict.py", "--model", "m.onnx", "--stdin")
    assert process.returncode == 0


def test_the_example_of_a_service_works(folder):
    with open(os.path.join(ROOT, "docs", "accuracy.md"), encoding="utf-8") as f:
        code = f.read().partition("### A service")[2].split("```\n")[1]
    for theirs, ours in (("python3", sys.executable), ("tools/predict.py", os.path.join(ROOT, "tools", "predict.py")),
                         ("deepmar_bs1.om", "m.om"), ("person.png", "images/im1.png")):
        code = code.replace(theirs, ours)
    done = run(folder, "-c", code)
    assert done.returncode == 0 and re.match(r"images/im1.png \['attribute .*\nabsent.png None None no such image file\n$", done.stdout)


def test_progress_bar_without_tqdm_shows_nothing(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(lib.script, "has_module", lambda name: name != "tqdm")
    assert isinstance(lib.script.progress(1, "image"), lib.script.Silent)
