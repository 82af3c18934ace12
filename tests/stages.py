"""The input and output of every script that writes files, small enough to run the script hundreds of times."""
import json
import os
import shutil
import subprocess
import sys

import numpy as np

from DeepMAR import load_checkpoint
from helpers import NETWORK, ROOT, ZEROS, between, model_of, node, write_images, write_model

IMAGES = 20

# tools/sample.py with fewer drawings and a smaller network.
SMALL_SAMPLE = """
import sys
sys.path.insert(0, %r)
import sample, DeepMAR
DeepMAR.BLOCKS = [1, 1, 1, 1]
sample.TRAIN, sample.STATISTICS = 6, 2
try:
    sample.main(["sample", "--images=2"])
except (OSError, ValueError) as error:
    sys.exit("sample.py: error: %%s" %% error)
except KeyboardInterrupt:
    sys.exit("sample.py: interrupted")
""" % os.path.join(ROOT, "tools")

# name -> (arguments of Python, the files and folders that the script writes, which are the same after each run)
STAGES = {
    "export_onnx": (["export_onnx.py", "any.pth", "out.onnx", "2"], ["out.onnx"]),
    "remove_pad": ([ROOT + "/remove_pad.py", "pad.onnx", "nopad.onnx"], ["nopad.onnx"]),
    "preprocess": ([ROOT + "/preprocess_deepmar_pytorch.py", "images", "bins", "image.txt"], ["bins"]),
    "get_info": ([ROOT + "/get_info.py", "input_bin", "new.info", "224", "224"], ["new.info"]),
    "benchmark": ([ROOT + "/tools/benchmark.py", "-batch_size=4", "-om_path=model.onnx",
                   "-input_text_path=deepmar.info"], ["result/dumpOutput_device0"]),
    "postprocess": ([ROOT + "/postprocess_deepmar_pytorch.py", "logits", "label.json", "--image_list=image.txt"],
                    ["fusion_result.json"]),
    "predict": ([ROOT + "/tools/predict.py", "images/im0.png", "images/im1.png", "--onnx=model.onnx",
                 "--save=pictures"], ["pictures/im0_attributes.png", "pictures/im1_attributes.png"]),
    "compare": ([ROOT + "/tools/compare.py", "logits", "logits", "--json=compare.json"], ["compare.json"]),
    "sample": (["small_sample.py"], ["sample"]),
}


def start(folder, stage, before=(), more=(), prefix=(), script=None, **settings):
    """Starts a stage in its folder, in a new process group. before: arguments of Python. more: arguments of the stage.

    prefix: goes before the whole command. script: replaces the stage's script.
    """
    command = [script or STAGES[stage][0][0]] + STAGES[stage][0][1:] + list(more)
    return subprocess.Popen(list(prefix) + [sys.executable, "-B"] + list(before) + command, cwd=str(folder),
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
                            start_new_session=True, **settings)


def run(folder, stage):
    """Runs a stage and checks that it succeeds."""
    process = start(folder, stage)
    _, errors = process.communicate()
    assert process.returncode == 0 and "Traceback" not in errors, errors


def prepare(folder):
    """Makes the input of all stages in a new folder."""
    (folder / "baseline" / "model").mkdir(parents=True)
    (folder / "baseline" / "model" / "DeepMAR.py").write_text(NETWORK % "x")
    shutil.copy(os.path.join(ROOT, "export_onnx.py"), str(folder))
    (folder / "any.pth").write_bytes(b"")
    (folder / "small_sample.py").write_text(SMALL_SAMPLE)
    with open(str(folder / "pad.onnx"), "wb") as f:
        f.write(model_of(between(node("Pad", "r c", "p")), [("c", ZEROS)]).SerializeToString())
    write_model(folder / "model.onnx", batch_size=4)
    names = write_images(folder / "images", IMAGES)
    random = np.random.RandomState(0)
    (folder / "image.txt").write_text("".join(name + "\n" for name in names))
    (folder / "label.json").write_text(json.dumps({name: random.randint(0, 2, 35).tolist() for name in names}))
    for folder_, ending, size in (("input_bin", ".bin", 3 * 224 * 224), ("logits", "_1.bin", 35)):
        (folder / folder_).mkdir()
        for name in names:
            (folder / folder_ / (name[:-len(".png")] + ending)).write_bytes(
                random.standard_normal(size).astype("<f4").tobytes())
    (folder / "deepmar.info").write_text("".join(
        "%d ./input_bin/%s.bin 224 224\n" % (i, name[:-len(".png")]) for i, name in enumerate(names)))


def contents(folder):
    """Returns {path: bytes} for all files below a folder, and {path: None} for the folders."""
    found = {}
    for parent, folders, files in os.walk(str(folder)):
        for name in folders + files:
            path = os.path.join(parent, name)
            content = None
            if name.endswith(".pth.tar"):  # torch 1.6 writes memory addresses into it
                content = b"".join(value.numpy().tobytes() for value in load_checkpoint(path).values())
            elif name in files:
                with open(path, "rb") as f:
                    content = f.read()
            found[os.path.relpath(path, str(folder))] = content
    return found


def output(folder, stage):
    """Returns a stage's output, [{path: bytes}]. Each dict is a file or folder that must be whole."""
    paths = [folder / name for name in STAGES[stage][1]]
    return [contents(path) if path.is_dir() else {path.name: path.read_bytes()} if path.exists() else {}
            for path in paths]


def put_earlier(folder, stage):
    """Replaces a stage's output by an earlier one with other content. Returns output()."""
    for name in STAGES[stage][1]:
        path = folder / name
        if os.path.isdir(str(path)):
            shutil.rmtree(str(path))
        path.parent.mkdir(exist_ok=True)
        if name in ("bins", "result/dumpOutput_device0", "sample"):
            path.mkdir()
            for i in range(3):
                (path / ("earlier%d_1.bin" % i)).write_bytes(b"earlier")
            if name == "sample":
                (path / "made_with.txt").write_text("earlier\n")
                (path / "images").mkdir()
                (path / "images" / "00001.png").write_bytes(b"earlier")
        else:
            path.write_bytes(b"earlier")
    return output(folder, stage)
