"""What test files share: how a script is run and its error checked, toy models, images, results, the card's stand-ins."""
import contextlib
import ctypes
import gc
import json
import multiprocessing
import os
import re
import runpy
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from unittest import mock

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from lib.script import seen_notes
from lib.session import cpu_session

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
STANDINS = os.path.join(ROOT, "tests", "standins")
sys.path.append(STANDINS)
import om
SIZE = 12  # the number of images in run_all.sh's sample
FLOAT = TensorProto.FLOAT
MACHINE = os.uname().machine


# --- scripts ----------------------------------------------------------------------------------------------------------

def script(name, *arguments, cwd=None):
    """Runs ROOT/name in this process, which need not import libraries again. Returns the finished process, with its output as text.

    What a script changes in its process is undone.
    """
    path, arguments = os.path.join(ROOT, str(name)), [str(argument) for argument in arguments]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output, tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        with redirected("stdout", output), redirected("stderr", errors), own_state(path, arguments, cwd):
            code = 0
            try:
                runpy.run_path(path, run_name="__main__")
            except SystemExit as stop:
                code = stop.code or 0
            except Exception:
                code = traceback.format_exc()
            if isinstance(code, str):  # as Python ends
                print(code, file=sys.stderr)
                code = 1
        output.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess([path] + arguments, code, output.read(), errors.read())


@contextlib.contextmanager
def redirected(name, file):
    """Redirects sys.stdout or sys.stderr to an open file, with what libraries in C and child processes write."""
    stream, number = getattr(sys, name), {"stdout": 1, "stderr": 2}[name]
    copy = os.dup(number)
    os.dup2(file.fileno(), number)
    setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            getattr(sys, name).flush()
        setattr(sys, name, stream)
        os.dup2(copy, number)
        os.close(copy)


@contextlib.contextmanager
def own_state(path, arguments, cwd):
    """Gives a script the state that a new Python would have, as far as scripts notice it; restores this process's state."""
    # A copy of export_onnx.py in another checkout imports that one's network, which a test may change within a second.
    folder, networks = os.getcwd(), {} if path.startswith(ROOT) else taken_networks()
    try:
        with warnings.catch_warnings(), mock.patch.dict(os.environ), mock.patch.multiple(
                sys, dont_write_bytecode=True, path=sys.path[:], argv=[path] + arguments):
            warnings.resetwarnings()  # pytest would collect the warnings
            warnings.showwarning = lambda *warning: sys.stderr.write(warnings.formatwarning(*warning[:4]))
            for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
                warnings.simplefilter("ignore", category)
            seen_notes.clear()
            os.chdir(str(cwd or "."))
            yield
    finally:
        os.chdir(folder)
        gc.enable()
        if not path.startswith(ROOT):
            taken_networks()
            sys.modules.update(networks)


def taken_networks():
    """Removes DeepMAR and the open-source repository's packages from the imported modules. Returns them."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in ("DeepMAR", "baseline")}


def started(name, *arguments, cwd=None):
    """Runs ROOT/name with a new Python. Returns the finished process. It shows what script() cannot, such as a failed import."""
    return subprocess.run([sys.executable, os.path.join(ROOT, name)] + [str(argument) for argument in arguments],
                          cwd=cwd, capture_output=True, text=True)


def succeeds(function):
    """Calls a function in a child process. Returns whether it raised nothing and was not killed."""
    def call():
        gc.freeze()  # collecting ONNX Runtime's objects would wait for threads that a fork lacks
        function()
    process = multiprocessing.get_context("fork").Process(target=call)
    process.start()
    process.join()
    return process.exitcode == 0


def check_error(process, *texts, code=1):
    """Checks that a script failed with this exit code and one line 'SCRIPT: error: ...' with the texts, without a traceback."""
    assert process.returncode == code, (process.returncode, process.stdout, process.stderr)
    assert "Traceback" not in process.stderr, process.stderr
    lines = [line for line in process.stderr.strip().split("\n") if not line.startswith("note: ")]
    assert ": error: " in lines[-1], process.stderr
    if code == 1:
        assert len(lines) == 1, process.stderr
    for text in texts:
        assert text in process.stderr, process.stderr


# The numbers of system calls on x86_64 and aarch64. None means that there is no such call.
CALLS = {"flock": (73, 32), "clone": (56, 220), "clone3": (435, 435), "fork": (57, None), "vfork": (58, None)}


def refused(error, *calls):
    """Returns a preexec_fn after which these system calls fail with this error, as they do on some machines."""
    load, equal, end, allow, fail = 0x20, 0x15, 0x06, 0x7fff0000, 0x00050000 | error  # of linux/filter.h, linux/seccomp.h
    rules = [(load, 0, 0, 0)]
    for number in filter(None, (CALLS[call][["x86_64", "aarch64"].index(MACHINE)] for call in calls)):
        rules += [(equal, 0, 1, number), (end, 0, 0, fail)]
    rules.append((end, 0, 0, allow))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    program = ctypes.create_string_buffer(struct.pack("HP", len(rules), ctypes.addressof(code)))
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def refuse():
        if prctl(38, 1, 0, 0, 0) or prctl(22, 2, program, 0, 0):  # PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP with a filter
            raise OSError(ctypes.get_errno(), "seccomp")
        assert code
    return refuse


def mounting(options):
    """Returns the beginning of a command that runs in a new Linux namespace, where this is mounted. options: those of mount."""
    command = ["unshare", "--mount"]
    if os.getuid():
        command.append("--map-root-user")
    if subprocess.call(command + ["true"], stderr=subprocess.DEVNULL):
        pytest.skip("NOT RUN: this user may not make namespaces; run it as root")
    return command + ["sh", "-c", 'mount %s && exec "$@"' % options, "sh"]


def run_all(*arguments, root=ROOT, cwd=None, path=None, **variables):
    """Runs run_all.sh with this Python. Returns the finished process."""
    settings = {"PYTHON": sys.executable, "sample_size": str(SIZE), "set_env": "/dev/null"}  # ignore this machine's CANN
    if path:
        settings["PATH"] = "%s:%s" % (path, os.environ["PATH"])
    return subprocess.run(["bash", os.path.join(str(root), "run_all.sh")] + [str(argument) for argument in arguments],
                          cwd=cwd or root, env={**os.environ, **settings, **variables}, capture_output=True, text=True)


def tiny_data(folder):
    """Writes folder/sample like the sample's folder, but with a fake checkpoint, for stages that read no checkpoint."""
    from sample import pedestrians
    sample = folder / "sample"
    (sample / "images").mkdir(parents=True)
    images, labels = pedestrians(SIZE, 0)
    names = ["%05d.png" % (i + 1) for i in range(SIZE)]
    for name, image in zip(names, images):
        image.save(str(sample / "images" / name))
    (sample / "image.txt").write_text("\n".join(names) + "\n")
    (sample / "label.json").write_text(json.dumps(dict(zip(names, labels.tolist()))))
    (sample / "checkpoint.pth.tar").write_bytes(b"none")


def own_data(work, **changes):
    """Returns options that give the sample as the user's own data, with absolute paths."""
    files = {"checkpoint": "checkpoint.pth.tar", "images": "images", "image-list": "image.txt", "label-file": "label.json"}
    options = dict({name: os.path.join(work, "sample", file) for name, file in files.items()}, **changes)
    return [str(text) for name, value in options.items() for text in ("--" + name, value)]


# --- toy models -------------------------------------------------------------------------------------------------------

def tensor_info(name, shape, type=FLOAT):
    """An input or output of a model."""
    return helper.make_tensor_value_info(name, type, shape)


def make_model(nodes, inputs, outputs, weights, opset=11, value_info=()):
    """Returns a model of these nodes. weights: [(name, array)]."""
    graph = helper.make_graph(nodes, "test", inputs, outputs, [numpy_helper.from_array(array, name) for name, array in weights],
                              value_info=list(value_info))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 6  # what onnx 1.7 and the current ONNX Runtime both read
    return model


def write_model(path, batch_size=1, attributes=35, size=(224, 224), bias=0.0, sigmoid=False, type=FLOAT):
    """Writes a model of a DeepMAR's interface that mixes the averages of each channel's quarters; returns path."""
    weight = np.random.RandomState(0).standard_normal((attributes, 12))
    quarter = [side // 2 for side in size]
    nodes = [helper.make_node("AveragePool", ["actual_input_1"], ["pooled"], kernel_shape=quarter, strides=quarter),
             helper.make_node("Flatten", ["pooled"], ["features"]),
             helper.make_node("Gemm", ["features", "weight", "bias"], ["logits" if sigmoid else "output1"], transB=1)]
    if sigmoid:
        nodes.append(helper.make_node("Sigmoid", ["logits"], ["output1"]))
    kind = np.float32 if type == FLOAT else np.float64
    onnx.save(make_model(nodes, [tensor_info("actual_input_1", [batch_size, 3] + list(size), type)],
                         [tensor_info("output1", [batch_size, attributes], type)],
                         [("weight", weight.astype(kind)), ("bias", np.full(attributes, bias, kind))]), str(path))
    return path


def end_in(path, *operators):
    """Puts operators of one input behind a model's output, such as "Sigmoid"; ("Cast", {"to": 1}) has attributes. Returns path."""
    model = onnx.load(str(path))
    graph, output = model.graph, model.graph.output[0].name
    made = next(node for node in graph.node if output in node.output)
    names = ["before_%d" % i for i in range(len(operators))] + [output]
    made.output[list(made.output).index(output)] = names[0]
    for operator, source, target in zip(operators, names, names[1:]):
        kind, attributes = operator if isinstance(operator, tuple) else (operator, {})
        graph.node.append(helper.make_node(kind, [source], [target], **attributes))
    onnx.save(model, str(path))
    return path


def put(path, **values):
    """Writes entries of a description into a model's metadata. Returns path."""
    model = onnx.load(str(path))
    onnx.helper.set_model_props(model, {"deepmar." + key: value for key, value in values.items()})
    onnx.save(model, str(path))
    return path


def write_means(path, shape, axes=(2, 3), type=FLOAT, outputs=None):
    """Writes a model whose three results are the means of x over these axes. outputs: {name: shape}. Returns path."""
    outputs = outputs or {"means": ["N", 3]}
    nodes = [helper.make_node("Cast", ["x"], ["float"], to=FLOAT), helper.make_node("ReduceMean", ["float"], ["m"], axes=axes, keepdims=0)]
    nodes += [helper.make_node("Identity", ["m"], [name]) for name in outputs]
    onnx.save(make_model(nodes, [tensor_info("x", shape, type)], [tensor_info(*item) for item in outputs.items()], []), str(path))
    return path


SHAPE = [1, 2, 4, 4]
ZEROS, PADS = np.zeros(8, np.int64), np.array([0, 0, 1, 1, 0, 0, 1, 1])
POOL = {"kernel_shape": [4, 4]}


def model_of(nodes, initializers=(), outputs=("y",), opset=11, inputs=(), value_info=()):
    """Returns a valid model of these nodes, from x of SHAPE to outputs of four dimensions."""
    model = make_model(nodes, [tensor_info("x", SHAPE)] + list(inputs), [tensor_info(name, list("nchw")) for name in outputs], initializers,
                       opset, value_info)
    onnx.checker.check_model(model)
    return model


def node(op_type, inputs, outputs, **attributes):
    return helper.make_node(op_type, inputs.split(), outputs.split(), name="%s_%s" % (op_type, outputs), **attributes)


def constant(name, array):
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array))


def between(*middle):
    """Returns these nodes from r to p, between a Relu and an AveragePool."""
    return [node("Relu", "x", "r")] + list(middle) + [node("AveragePool", "p", "y", **POOL)]


def keep_weights_outside(model):
    """Changes a model, so that its first weight is in a file of this machine, which nobody may read through a model."""
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")


def outputs_of(model):
    """Returns what a model of model_of() computes of random values."""
    x = np.random.RandomState(0).standard_normal(SHAPE).astype(np.float32)
    return cpu_session(model.SerializeToString()).run(None, {"x": x})


# What stands in for the network where export_onnx.py is tested: % what it returns for x, an expression
NETWORK = """
import torch

class Small(torch.nn.Module):
    num_att = 35

    def forward(self, x):
        x = x.mean((2, 3)).repeat(1, 12)[:, :35]
        return %s

def load_model(path, last_conv_stride, state_dict, say):
    torch.manual_seed(0)
    return Small().eval()
"""


# --- images, bins, results --------------------------------------------------------------------------------------------

def guide(path, width=224, height=224):
    """The guide's arithmetic, written down plainly: float32 throughout."""
    image = Image.open(str(path)).convert("RGB").resize((width, height), Image.BILINEAR)
    array = np.array(image, dtype=np.float32).transpose(2, 0, 1) / 255
    for channel, (mean, std) in enumerate(zip([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])):
        array[channel] -= mean
        array[channel] /= std
    return array


def write_images(folder, number):
    """Writes folder/NAME.png of random colours and sizes; returns the names."""
    random = np.random.RandomState(1)
    folder.mkdir(exist_ok=True)
    names = ["im%d.png" % i for i in range(number)]
    for name in names:
        height, width = random.randint(20, 120, 2)
        pixels = random.randint(0, 256, 3) + random.randint(-40, 40, (height, width, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(str(folder / name))
    return names


def write_bins(folder, names, height=224, width=224, *options):
    """Runs stages 4 and 5 on folder/images; leaves folder/input_bin and folder/deepmar.info. options: those of stage 4."""
    (folder / "image.txt").write_text("\n".join(names))
    for command in (["preprocess_deepmar_pytorch.py", "images", "input_bin", "image.txt", "--size", height, width] + list(options),
                    ["get_info.py", "input_bin", "deepmar.info", width, height]):
        done = script(*command, cwd=folder)
        assert done.returncode == 0, done.stderr


def run_stage_6(folder, model, batch_size, device=0, height=224, width=224):
    """Runs the benchmark's stand-in on folder/deepmar.info; returns the folder of results."""
    done = script("tools/benchmark.py", "-batch_size=%s" % batch_size, "-om_path=%s" % model, "-device_id=%d" % device,
                  "-input_text_path=deepmar.info", "-input_height=%d" % height, "-input_width=%d" % width, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "result" / ("dumpOutput_device%d" % device)


def parse_predictions(text):
    """What predict.py prints -> {image: [(marked, percent, name, logit)]}."""
    images, current = {}, None
    for line in text.splitlines():
        match = re.match(r"  ([+ ]) +([\d.]+) %  (.+?) +logit (\S+)$", line)
        if match:
            mark, percent, name, logit = match.groups()
            images[current].append((mark == "+", float(percent), name, np.float32(logit)))
        elif line.endswith(" attributes"):
            current, found = line.rsplit(": ", 1)
            images[current] = []
            images[current + " found"] = int(found.split()[0])
    return images


POSTPROCESS = "postprocess_deepmar_pytorch.py"
INSTANCE = ["instance_acc", "instance_precision", "instance_recall", "instance_F1"]


def contents(folder):
    """Returns {path: bytes} of the files in a folder and in its folders."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def independent(logits, labels):
    """The published definition, one image and one attribute at a time; logits and labels as nested lists."""
    accs, precisions, recalls = [], [], []
    for scores, row in zip(logits, labels):
        predicted = {i for i, score in enumerate(scores) if score >= 0}
        true = {i for i, value in enumerate(row) if value == 1}
        if true:
            hits = len(predicted & true)
            accs.append(hits / len(predicted | true))
            precisions.append(hits / len(predicted) if predicted else 0.0)
            recalls.append(hits / len(true))
    acc, precision, recall = (sum(values) / len(values) for values in (accs, precisions, recalls))
    per_attribute = []
    for i in range(len(labels[0])):
        pos = [scores[i] >= 0 for scores, row in zip(logits, labels) if row[i] == 1]
        neg = [scores[i] < 0 for scores, row in zip(logits, labels) if row[i] == 0]
        per_attribute.append((sum(pos) / len(pos) if pos else None, sum(neg) / len(neg) if neg else None))
    means = [(p + n) / 2 for p, n in per_attribute if p is not None and n is not None]
    return [acc, precision, recall, 2 * precision * recall / (precision + recall)], per_attribute, sum(means) / len(means)


def random_case(images=300, attributes=35, seed=0):
    """Logits and labels with images that have nothing, images that are given nothing, logits of exactly 0 and -0."""
    random = np.random.RandomState(seed)
    labels = (random.rand(images, attributes) < random.rand(attributes)).astype(np.uint8)
    logits = (random.randn(images, attributes) + labels - 0.5).astype("<f4")
    labels[::10] = 0
    logits[1::10] = -1
    logits[2::10, :5] = 0.0
    logits[3::10, :5] = -0.0
    return logits, labels


def write_case(folder, logits, labels, extension=".png", output=1, prefix="", first=0):
    """Writes folder/result/*.bin and folder/label.json for images numbered from first; returns the two paths as text."""
    result, label = folder / "result", folder / "label.json"
    result.mkdir(parents=True, exist_ok=True)
    for i, row in enumerate(logits, first):
        (result / ("%05d_%d.bin" % (i, output))).write_bytes(np.asarray(row, "<f4").tobytes())
    label.write_text(json.dumps({"%s%05d%s" % (prefix, i, extension): [int(v) for v in row] for i, row in enumerate(labels, first)}))
    return str(result), str(label)


# --- the card's stand-ins ---------------------------------------------------------------------------------------------

BINARY = "benchmark." + MACHINE
RUNTIME = os.path.join(STANDINS, "aclruntime")
PACKAGES = "%s:%s" % (os.path.join(STANDINS, "packages"), RUNTIME)
GENUINE = [folder for folder in os.environ.get("AIS_BENCH", "").split(":") if folder]


def standin(path, name):
    """Makes a command of a stand-in."""
    path.write_text('#!/bin/sh\nexec "%s" "%s" "$@"\n' % (sys.executable, os.path.join(STANDINS, name)))
    path.chmod(0o755)


def write_om(path, onnx, old=False, **texts):
    """Makes an OM of the stand-ins of an ONNX model. texts: what it says of itself. old: with the older table, which they cannot run."""
    path.write_bytes(om.content([(om.MODEL_DEF, om.model_def(texts)), (om.WEIGHTS, onnx.read_bytes()), (om.TASKS, b"")], old))


class FrontEnd(object):
    """A version of ais_bench: its package's folder, the year that it behaves as, and how to run it."""

    def __init__(self, folder, year=None):
        self.folder, self.genuine = folder, year is None
        self.name = os.path.basename(folder.rstrip("/")) if self.genuine else "standin%d" % year
        infer = os.path.join(folder, "ais_bench", "infer")
        self.year = year or (2025 if os.path.isdir(os.path.join(infer, "common")) else
                             2024 if os.path.exists(os.path.join(infer, "path_security_check.py")) else 2023)

    def variables(self, **more):
        return {"PYTHONPATH": "%s:%s" % (self.folder, RUNTIME), "AIS_BENCH_YEAR": str(self.year), "DEVICES": "3", **more}

    def run(self, folder, **options):
        """Runs it in a folder by hand; options replace the usual ones, and one of None goes."""
        command = [sys.executable, "-m", "ais_bench"]
        for name, value in {"model": "m.om", "input": "in", "output": "out", "output_dirname": "d", "outfmt": "BIN", "batchsize": 2,
                            **options}.items():
            command += [] if value is None else ["--" + name, str(value)]
        return subprocess.run(command, cwd=folder, env=dict(os.environ, **self.variables()), stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, errors="replace", timeout=300)


FRONT_ENDS = [FrontEnd(os.path.join(STANDINS, "packages"), year) for year in (2023, 2024, 2025)]
FRONT_ENDS += [FrontEnd(os.path.abspath(folder)) for folder in GENUINE]


def check_stopped(process, *texts):
    """A run that a tool's failure stopped: the last lines of the tool, its log, the stage."""
    assert process.returncode == 1, process.stdout + process.stderr
    assert "Traceback" not in process.stderr.replace("    Traceback", "")  # a tool's own may be shown
    for text in texts:
        assert text in process.stderr, process.stderr
    log = re.search(r"above are the errors and the last lines of (\S+)", process.stderr)
    assert log and os.path.getsize(log.group(1)), process.stderr


# --- an S3 server -----------------------------------------------------------------------------------------------------

class S3Server(object):
    """moto's S3 server in this process, whose faults a test chooses.

    fault: a function of a request, such as "GET /bucket/a.png?", that returns None, the status of a refusal, or "reset".
    """

    def __init__(self):
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server
        handler = type("Quiet", (WSGIRequestHandler,), {"log": lambda *_: None})
        self.app = DomainDispatcherApplication(create_backend_app)
        self.server = make_server("127.0.0.1", 0, self.answer, threaded=True, request_handler=handler)
        self.address = "http://127.0.0.1:%d" % self.server.server_port
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.reset()

    def reset(self):
        self.requests, self.sent, self.fault = [], 0, lambda request: None  # sent: bytes

    def answer(self, environ, start):
        request = "%s %s?%s" % (environ["REQUEST_METHOD"], environ["PATH_INFO"], environ["QUERY_STRING"])
        self.requests.append(request)
        fault = self.fault(request)
        if fault:
            start("%s Fault" % (500 if fault == "reset" else fault), [("Content-Type", "application/xml")])
            if fault == "reset":
                environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            code = {403: "AccessDenied", 503: "ServiceUnavailable"}.get(fault, "Fault")
            answer = "<Error><Code>%s</Code><Message>refused by the test</Message></Error>" % code
            return [] if request.startswith("HEAD") else [answer.encode()]
        body = b"".join(self.app(environ, start))
        self.sent += len(body)
        return [body]


# --- tools/gallery.py -------------------------------------------------------------------------------------------------

GALLERY = os.path.join(ROOT, "tools", "gallery.py")


def run_gallery(folder, *arguments, tool=GALLERY, runner=subprocess.run, **environment):
    """Runs the tool with m.onnx in a folder. Returns the finished process, or with subprocess.Popen the running one."""
    return runner([sys.executable, tool, "--onnx", "m.onnx"] + [str(argument) for argument in arguments], cwd=str(folder),
                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, env=dict(os.environ, **environment))


def all_images(path):
    return sorted(str(name.relative_to(path)) for name in path.rglob("*.*g"))


def check_once(output, names):
    """Returns {path: (error, values)} of all parts. Every image is in exactly one, and nothing else is in the folder."""
    from pyarrow import parquet
    found = {}
    for part in sorted(map(str, output.glob("part-*.parquet"))):
        for row in parquet.read_table(part).to_pylist():
            path, error = row.pop("path"), row.pop("error")
            assert path not in found and {value is None for value in row.values()} == {error is not None}
            found[path] = error, np.array(list(row.values()), np.float32)
    assert sorted(found) == sorted(names)
    assert not [name for name in os.listdir(str(output)) if not re.match(r"part-\d{6}\.parquet$|_manifest.json$|_list.txt$", name)]
    return found


def finish_gallery(process, output, names, lost, again):
    """Waits for the end of a run over many/. Every image must be there once, with its values. Returns (workers, places, text).

    lost, again: the expected lost workers and repeated shards.
    """
    text, errors = process.communicate()
    assert process.returncode == 0 and all(line.startswith("note: ") for line in errors.splitlines()), (text, errors)
    found = check_once(output, names)
    for number, name in enumerate(sorted(names)):  # each tenth is the same picture
        assert found[name][0] is None and found[name][1].tobytes() == found["%04d.png" % (number % 10)][1].tobytes()
    workers, places, lost_workers, repeated = map(int, re.search(
        r"(\d+) workers on (\d+) \w+, (\d+) lost; (\d+) parts started again", text).groups())
    assert lost_workers == lost and repeated in again, text
    return workers, places, text
