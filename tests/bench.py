"""Measures each stage side by side with the alternative that a user would have.

    python3 tests/bench.py                             everything, about 40 minutes on two cores
    python3 tests/bench.py --only preprocess startup   only these rows
    python3 tests/bench.py --busy                      stage 6, with a busy process on half of the cores
    python3 tests/bench.py --quick                     a small run, which only shows that the benchmark works

The script makes its input (drawn images, a checkpoint, models, bins) in a scratch folder below TMPDIR. The sides of a
comparison take turns for several rounds. A figure is the median of the rounds. A ratio is the median of the rounds' ratios.
"limit" is the part of the work that nobody can avoid, measured alone. The exit status is 0 whether or not the figures reach
their goals. Run it on an idle machine.
"""
import argparse
import contextlib
import glob
import io
import itertools
import json
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tools")]
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # as in all scripts
import export_onnx  # noqa: E402
import get_info  # noqa: E402
import intervals  # noqa: E402
import postprocess_deepmar_pytorch as postprocess  # noqa: E402
import preprocess_deepmar_pytorch as preprocess  # noqa: E402

CORES = len(os.sched_getaffinity(0))
SLOW_CREATION = 0.03  # milliseconds to create a file; ext4 at rest needs 0.015
MANY = 10 ** 6  # images in a long run; it decides the number of calls at a time
FLOP = 2 * 4.09e9  # operations of a ResNet-50 at 224x224: two for each multiply-add


# --- measuring ------------------------------------------------------------------------------------------------------

def in_child(function, *arguments, cores=CORES):
    """Runs a function in a new process, on this many cores. Returns its result."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def work():
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
        with contextlib.redirect_stdout(io.StringIO()):
            sender.send(function(*arguments))

    process = context.Process(target=work)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise ValueError("a measurement failed, see above")
    finally:
        process.join()


def clock(function, *arguments):
    """Returns the seconds that a call takes."""
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def command(*arguments, **settings):
    """Runs a command and returns its output. Raises ValueError with the output if the command fails."""
    process = subprocess.run([str(argument) for argument in arguments], stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, universal_newlines=True, **settings)
    if process.returncode:
        raise ValueError("%s failed: %s" % (" ".join(map(str, arguments)), process.stdout[-2000:]))
    return process.stdout


def take_turns(rounds, **sides):
    """Calls every side in each round, in rotating order. A side is a function from the round's number to seconds.

    Returns {side: [seconds]}.
    """
    times = {name: [] for name in sides}
    names = list(sides)
    for number in range(rounds):
        for name in names[number % len(names):] + names[:number % len(names)]:
            times[name].append(sides[name](number))
    return times


def compared(stage, against, reach, ours, theirs, limit=None, bound="", count=None, slower=False):
    """Returns a row of the result from the seconds that each side took in each round.

    Its figures are rates if there is a count of images, else seconds. reach is the goal: the smallest ratio of the speeds or,
    with slower=True, the largest ratio of the times.
    """
    def figure(times):
        return times and (count / statistics.median(times) if count else statistics.median(times))

    ratio = statistics.median(a / b if slower else b / a for a, b in zip(ours, theirs))
    return {"stage": stage, "against": against, "unit": "images/s" if count else "s", "theirs": figure(theirs),
            "ours": figure(ours), "limit": figure(limit), "limit_is": bound, "ratio": ratio,
            "reach": ("<= %g" if slower else ">= %g") % reach,
            "met": ratio <= reach if slower else ratio >= reach}


def figures(stage, against, unit, theirs, ours, ratio, reach, met):
    """Returns a row of the result that does not compare times."""
    return {"stage": stage, "against": against, "unit": unit, "theirs": theirs, "ours": ours, "limit": None, "limit_is": "",
            "ratio": ratio, "reach": reach, "met": bool(met)}


def peak(path):
    """Returns the peak memory of a process, /proc/PID, in MB."""
    with open(path + "/status") as f:
        return [int(line.split()[1]) * 1024 / 1e6 for line in f if line.startswith("VmHWM")][0]


# --- input of the rows -----------------------------------------------------------------------------------------------

class Scene(object):
    """Makes the input of the measurements in a scratch folder, each item when it is first needed."""

    def __init__(self, folder, quick, busy=False):
        self.folder, self.quick, self.busy = folder, quick, busy

    def path(self, name):
        return os.path.join(self.folder, name)

    def new_folder(self):
        """Makes an empty folder. Nothing is deleted between rounds, because ext4 then creates files ten times slower."""
        return tempfile.mkdtemp(dir=self.folder)

    def sample(self):
        """Returns a folder with run_all.sh's sample."""
        path = self.path("work")
        if not os.path.exists(path):
            if self.quick:  # a small network, also in forked children
                import DeepMAR
                DeepMAR.BLOCKS = [1, 1, 1, 1]

            def make():
                import sample
                if self.quick:
                    sample.TRAIN, sample.STATISTICS = 24, 16
                sample.main([os.path.join(path, "sample"), "--images", str(12 if self.quick else 200)])
            os.mkdir(path)
            in_child(make)
        return path

    def model(self, batch_size):
        """Returns the path of the sample's ONNX model for a batch size."""
        path = self.path("bs%d.onnx" % batch_size)
        if not os.path.exists(path):
            checkpoint = self.sample() + "/sample/checkpoint.pth.tar"
            in_child(lambda: export_onnx.main([checkpoint, path + ".pad", str(batch_size)]))
            command(sys.executable, os.path.join(ROOT, "remove_pad.py"), path + ".pad", path)
        return path

    def int8(self):
        """Returns (the path of the INT8 model for batch size 1, the float32 model's instance_acc, the INT8 model's)."""
        path, work, bins = self.path("int8.onnx"), self.sample(), self.path("sample_bin")
        if not os.path.exists(path):
            in_child(preprocess.main, [work + "/sample/images", bins, work + "/sample/image.txt"])
            text = command(sys.executable, os.path.join(ROOT, "tools", "quantize.py"), self.model(1), bins, path, "--labels",
                           work + "/sample/label.json", "--allow-drop")
            self.accuracies = [float(word.rstrip(",")) for word in text.split("float32 ")[1].split()[:3:2]]
        return [path] + self.accuracies

    def images(self):
        """Returns (folder of PNGs in PETA's sizes, their list file, their names)."""
        folder, image_txt, count = self.path("images"), self.path("image.txt"), 40 if self.quick else 1000
        names = ["%05d.png" % i for i in range(count)]
        if not os.path.exists(folder):
            os.mkdir(folder)
            from sample import pedestrians
            drawn = pedestrians(min(count, 250), 3)[0]
            for name, image in zip(names, itertools.cycle(drawn)):
                image.save(os.path.join(folder, name))
            with open(image_txt, "w") as f:
                f.write("\n".join(names))
        return folder, image_txt, names

    def bins(self):
        """Returns [(name, path)] of up to 384 bins, which are on the disk and not only in memory."""
        images, image_txt, names = self.images()
        folder, image_txt = self.path("input_bin"), self.path("bins.txt")
        names = names[:8 if self.quick else 384]
        bins = [(name[:5], os.path.join(folder, name[:5] + ".bin")) for name in names]
        if not os.path.exists(folder):
            with open(image_txt, "w") as f:
                f.write("\n".join(names))
            in_child(preprocess.main, [images, folder, image_txt])
            for _, path in bins:
                with open(path, "rb") as f:
                    os.fsync(f.fileno())
        return bins


# --- preprocess ------------------------------------------------------------------------------------------------------

def guides_preprocess(images, folder, names):
    """The guide's method in plain code: one process, float32, tofile."""
    for name in names:
        image = Image.open(os.path.join(images, name)).convert("RGB").resize((224, 224), Image.BILINEAR)
        array = np.array(image, dtype=np.float32).transpose(2, 0, 1)
        array = array / 255
        for channel, (mean, std) in enumerate(zip([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])):
            array[channel] -= mean
            array[channel] /= std
        array.tofile(os.path.join(folder, name.split(".")[0] + ".bin"))


def decode(path):
    with Image.open(path) as image:
        image.resize((224, 224), Image.BILINEAR)


def decode_all(paths, processes):
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        pool.map(decode, paths, chunksize=16)


def row_preprocess(scene):
    images, image_txt, names = scene.images()
    paths = [os.path.join(images, name) for name in names]
    written = []

    def theirs(_, some=names[::2]):
        """Measures half of the images, which is enough for a loop and fits into the memory that settled() keeps ready."""
        written.append(scene.new_folder())
        return in_child(clock, guides_preprocess, images, written[-1], some) * len(names) / len(some)

    def ours(cores):
        def measure(_):
            written.append(os.path.join(scene.new_folder(), "input_bin"))
            return in_child(clock, preprocess.main, [images, written[-1], image_txt], cores=cores)
        return measure

    def empty(folder):
        for name in os.listdir(folder):
            os.truncate(os.path.join(folder, name), 0)

    def settled(side):
        """Keeps the same memory ready for each measurement. A virtual machine's host takes free memory back every few
        seconds, and the next first use of it takes ten times as long as the write itself."""
        def measure(number):
            time.sleep(0 if scene.quick else 2.5)
            folder = scene.new_folder()
            for name in names:
                with open(os.path.join(folder, name), "wb") as f:
                    f.write(content)
            empty(folder)
            seconds = side(number)
            empty(written[-1])
            return seconds
        return measure

    theirs(0, names)
    ours(CORES)(0)
    equal = 0
    for name in os.listdir(written[0]):
        with open(os.path.join(written[0], name), "rb") as a, open(os.path.join(written[1], name), "rb") as b:
            content = a.read()
            equal += content == b.read()
    for folder in written:
        empty(folder)
    yield figures("preprocess", "the guide's bytes", "bins", len(names), equal, equal / len(names), ">= 1", equal == len(names))

    cores = sorted({1, CORES}, reverse=True)
    sides = {"theirs": settled(theirs)}
    for n in cores:
        sides["ours%d" % n] = settled(ours(n))
        sides["limit%d" % n] = lambda _, n=n: in_child(clock, decode_all, paths, n, cores=n)
    times = take_turns(2 if scene.quick else 7, **sides)
    for n in cores:
        stage, mine, limit = "preprocess, %d core%s" % (n, "s" * (n > 1)), times["ours%d" % n], times["limit%d" % n]
        yield compared(stage, "the guide's way", 2.3 if n == 1 else 5, mine, times["theirs"], limit, "decode + resize",
                       len(names))
        yield compared(stage, "decode + resize alone", 0.7, mine, limit, limit, "decode + resize", len(names))


# --- inference -------------------------------------------------------------------------------------------------------

def infer(session, feed, runs, calls):
    """Runs the model on the same input again and again, with this many calls at a time, as tools/benchmark.py does."""
    from session import callers
    with callers(calls) as pool:
        for _ in pool.map(lambda _: session.run(None, feed), range(runs)):
            pass


def runs_of(scene, batch):
    """Returns a number of calls that keeps all cores at work to the end, with as many calls at a time as there are cores."""
    return 2 if scene.quick else CORES * max(1, 32 // batch)


def forget(bins):
    """Removes bins from the page cache, so that they are read from the disk again."""
    for _, path in bins:
        with open(path, "rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_standin(model, batch, bins, rounds, new_folder):
    """Measures the stand-in with bins in memory and on the disk, the bare session and, at batch size 1, a plain loop."""
    import onnxruntime
    from session import calls_at_once, open_session, run
    session, calls = open_session(model), calls_at_once(CORES, MANY, batch)
    ours = open_session(model, calls=calls)
    array = np.stack([np.fromfile(path, "<f4").reshape(3, 224, 224) for _, path in bins[:batch]])
    feed = {"actual_input_1": array}
    plain = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    folders = iter([new_folder() for _ in range(4 * rounds)])

    def remember():
        for _, path in bins:
            with open(path, "rb") as f:
                f.read()

    def bare(_):
        return clock(lambda: [session.run(None, feed) for _ in range(len(bins) // batch)])

    def standin(_):
        return run(ours, bins, batch, 224, 224, next(folders), lambda done: None, calls)[0]["e2e"].seconds

    def loop(_):
        def work(folder):
            for name, path in bins:
                image = np.fromfile(path, dtype=np.float32).reshape(1, 3, 224, 224)
                logits, = plain.run(None, {"actual_input_1": image})
                logits.tofile(os.path.join(folder, name + "_1.bin"))
        return clock(work, next(folders))

    sides = {"bare": bare, "warm": lambda i: (remember(), standin(i))[1], "cold": lambda i: (forget(bins), standin(i))[1]}
    if batch == 1:
        sides.update(loop=lambda i: (remember(), loop(i))[1], cold_loop=lambda i: (forget(bins), loop(i))[1])
    for warmed in (session, plain):
        warmed.run(None, feed)
    return take_turns(rounds, **sides)


def row_standin(scene):
    for batch in (1,) if scene.quick else (1, 8, 64):
        bins = scene.bins()
        bins = bins[:len(bins) // batch * batch]
        times = in_child(measure_standin, scene.model(batch), batch, bins, 1 if scene.quick else 3, scene.new_folder)
        for state in ("warm", "cold"):
            yield compared("stand-in, batch %d, %s bins" % (batch, state), "bare session, all threads",
                           1.3 if scene.busy and batch == 8 else 0.97, times[state], times["bare"], times["bare"],
                           "bare session", len(bins))
        if batch == 1:
            for state, loop in (("warm", "loop"), ("cold", "cold_loop")):
                yield compared("stand-in, batch 1, %s bins" % state, "plain loop", 1.05, times[state], times[loop],
                               times["bare"], "bare session", len(bins))


def measure_uint8(kinds, rounds, new_folder):
    """Measures the stand-in on both types of bins, on the disk. kinds: {side: (model, bins)}."""
    from session import calls_at_once, open_session, run
    calls = calls_at_once(CORES, MANY, 1)

    def side(model, bins):
        session = open_session(model, calls=calls)

        def measure(_):
            forget(bins)
            return run(session, bins, 1, 224, 224, new_folder(), lambda done: None, calls)[0]["e2e"].seconds
        return measure
    return take_turns(rounds, **{name: side(*kind) for name, kind in kinds.items()})


def row_uint8(scene):
    """Compares uint8 bins, and the model with AIPP that takes them, with float32 bins."""
    images, image_txt, names = scene.images()

    def stage_4(*more):
        return lambda _: in_child(clock, preprocess.main, [images, os.path.join(scene.new_folder(), "bins"), image_txt] + list(more))
    times = take_turns(2 if scene.quick else 5, theirs=stage_4(), ours=stage_4("--uint8"))
    yield compared("preprocess, uint8 bins", "float32 bins", 1, times["ours"], times["theirs"], count=len(names))

    bins, model, twin = scene.bins(), scene.model(1), scene.path("aipp.onnx")
    command(sys.executable, os.path.join(ROOT, "tools", "rehearse.py"), "aipp", model, twin)
    folder = scene.path("uint8_bin")
    in_child(preprocess.main, [images, folder, scene.path("bins.txt"), "--uint8"])
    pixels = [(name, os.path.join(folder, name + ".bin")) for name, _ in bins]
    for _, path in pixels:
        with open(path, "rb") as f:
            os.fsync(f.fileno())
    theirs, ours = (sum(os.path.getsize(path) for _, path in kind) / len(kind) for kind in (bins, pixels))
    yield figures("uint8 bins, bytes an image", "float32 bins", "bytes", theirs, ours, theirs / ours, ">= 4", theirs == 4 * ours)
    times = in_child(measure_uint8, {"theirs": (model, bins), "ours": (twin, pixels)}, 1 if scene.quick else 5, scene.new_folder)
    yield compared("stand-in, batch 1, cold uint8 bins", "float32 bins", 0.95, times["ours"], times["theirs"], count=len(bins))


def measure_options(model, runs, rounds):
    """Measures our session and others at batch size 8. Each of the others differs from ours in one option."""
    import onnxruntime
    from session import open_session
    feed = {"actual_input_1": np.random.RandomState(0).standard_normal((8, 3, 224, 224)).astype(np.float32)}

    def side(change):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = CORES, 3
        change(options)
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    levels = onnxruntime.GraphOptimizationLevel
    sessions = {
        "ours": open_session(model),
        "half the threads": side(lambda o: setattr(o, "intra_op_num_threads", max(1, CORES // 2))),
        "threads that do not spin": side(lambda o: o.add_session_config_entry("session.intra_op.allow_spinning", "0")),
        "no memory arena": side(lambda o: setattr(o, "enable_cpu_mem_arena", False)),
        "no memory pattern": side(lambda o: setattr(o, "enable_mem_pattern", False)),
        "graph level extended": side(lambda o: setattr(o, "graph_optimization_level", levels.ORT_ENABLE_EXTENDED)),
    }
    for session in sessions.values():
        session.run(None, feed)
    return take_turns(rounds, **{name: lambda _, session=session: clock(
        lambda: [session.run(None, feed) for _ in range(runs)]) for name, session in sessions.items()})


def row_options(scene):
    runs = 1 if scene.quick else 6
    times = in_child(measure_options, scene.model(8), runs, 1 if scene.quick else 5)
    mine = times.pop("ours")
    for name, theirs in times.items():
        yield compared("session options, batch 8", name, 0.97, mine, theirs, count=8 * runs)


def measure_inference(checkpoint, model, batch, runs, rounds):
    """Measures ONNX Runtime and PyTorch on one batch, and ONNX Runtime's product of two matrices."""
    import onnx
    from onnx import numpy_helper
    import onnxruntime
    import torch
    from session import calls_at_once, open_session
    from DeepMAR import load_model
    calls = calls_at_once(CORES, MANY, batch)
    network, session = load_model(checkpoint), open_session(model, calls=calls)
    array = np.random.RandomState(0).standard_normal((batch, 3, 224, 224)).astype(np.float32)
    # The matrices fit into the processor's caches, and the weights are constant as in a convolution.
    tensor, matrix = torch.from_numpy(array), np.ones((512, 512), np.float32)
    a, c = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, matrix.shape) for name in "ac")
    graph = onnx.helper.make_graph([onnx.helper.make_node("MatMul", ["a", "b"], ["c"])], "product", [a], [c],
                                   [numpy_helper.from_array(matrix, "b")])
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 11)])
    proto.ir_version = 6  # ONNX Runtime 1.10 supports at most 8
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = CORES
    multiply = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def theirs(_):
        with torch.no_grad():
            return clock(lambda: [network(tensor) for _ in range(runs)])

    def ours(_):
        return clock(infer, session, {"actual_input_1": array}, runs, calls)

    def limit(_):
        seconds = statistics.median(clock(multiply.run, None, {"a": matrix}) for _ in range(200))
        return seconds / (2 * 512.0 ** 3) * FLOP * batch * runs

    for side in (theirs, ours, limit):
        side(0)
    return take_turns(rounds, theirs=theirs, ours=ours, limit=limit)


def row_inference(scene):
    for batch in (1,) if scene.quick else (1, 8, 64):
        runs = runs_of(scene, batch)
        times = in_child(measure_inference, scene.sample() + "/sample/checkpoint.pth.tar", scene.model(batch), batch,
                         runs, 2 if scene.quick else 5)
        for against, reach, theirs in (("PyTorch eager", 1.6, times["theirs"]), ("float32 matrix rate", 0.95, times["limit"])):
            yield compared("inference, batch %d" % batch, against, reach, times["ours"], theirs, times["limit"],
                           "float32 matrix rate", batch * runs)


def openvino(model, batch, configuration):
    """Returns a function of a number of runs, which runs a model on OpenVINO's own queue in throughput mode."""
    import openvino
    compiled = openvino.Core().compile_model(model, "CPU", dict({"PERFORMANCE_HINT": "THROUGHPUT",
                                                                 "INFERENCE_NUM_THREADS": CORES}, **configuration))
    queue = openvino.AsyncInferQueue(compiled)

    def run(runs):
        for _ in range(runs):
            queue.start_async({0: batch})
        queue.wait_all()
    run(len(queue))
    return run


def measure_openvino(models, batch, runs, rounds):
    """Returns {side: [seconds]} of ONNX Runtime, called as in stage 6, and of OpenVINO, for each of the models {kind: path}."""
    from session import calls_at_once, open_session
    calls = calls_at_once(CORES, MANY, batch)
    array = np.random.RandomState(0).standard_normal((batch, 3, 224, 224)).astype(np.float32)
    sides = {}
    for kind, model in models.items():
        session, theirs = open_session(model, calls=calls), openvino(model, array, {"INFERENCE_PRECISION_HINT": "f32"})
        infer(session, {"actual_input_1": array}, calls, calls)
        sides[kind] = lambda _, session=session: clock(infer, session, {"actual_input_1": array}, runs, calls)
        sides[kind + " openvino"] = lambda _, theirs=theirs: clock(theirs, runs)
    return take_turns(rounds, **sides)


def row_openvino(scene):
    """Compares ONNX Runtime with OpenVINO, an optional package: float32 at batch sizes 1 and 8, INT8 on the same QDQ model."""
    import importlib.util
    if not importlib.util.find_spec("openvino"):
        print("note: OpenVINO is not installed (pip install openvino), so this row is left out")
        return
    for batch in (1,) if scene.quick else (1, 8):
        models, runs = {"float32": scene.model(batch)}, runs_of(scene, batch)
        if batch == 1:
            models["INT8 (QDQ)"] = scene.path("qdq.onnx")
            scene.bins()
            command(sys.executable, os.path.join(ROOT, "tools", "quantize.py"), scene.model(1), scene.path("input_bin"),
                    models["INT8 (QDQ)"], "--qdq")
        times = in_child(measure_openvino, models, batch, runs, 1 if scene.quick else 5)
        for kind in models:
            yield compared("%s, batch %d" % (kind, batch), "OpenVINO's queue", 1, times[kind], times[kind + " openvino"],
                           count=batch * runs)


def measure_int8(models, runs, rounds):
    """Measures the float32 and the INT8 model at batch size 1."""
    from session import calls_at_once, open_session
    calls = calls_at_once(CORES, MANY, 1)
    feed = {"actual_input_1": np.random.RandomState(0).standard_normal((1, 3, 224, 224)).astype(np.float32)}

    def side(model):
        session = open_session(model, calls=calls)
        infer(session, feed, calls, calls)
        return lambda _: clock(infer, session, feed, runs, calls)
    return take_turns(rounds, theirs=side(models[0]), ours=side(models[1]))


def row_int8(scene):
    model = scene.model(1)
    int8, float32, accuracy = scene.int8()
    runs = runs_of(scene, 1)
    times = in_child(measure_int8, (model, int8), runs, 2 if scene.quick else 5)
    yield compared("INT8, batch 1", "float32", 3, times["ours"], times["theirs"], count=runs)
    yield figures("INT8, drop of instance_acc", "float32", "%", 100 * float32, 100 * accuracy, 100 * (float32 - accuracy), "<= 0.5",
                  float32 - accuracy <= 0.005)


# --- lists and results ------------------------------------------------------------------------------------------------

def guides_postprocess(folder, label_file):
    """The guide's method: a loop over the folder with an array for each file, then the metrics."""
    with open(label_file) as f:
        labels = json.load(f)
    predicted, true = [], []
    for name in os.listdir(folder):
        logits = np.fromfile(os.path.join(folder, name), dtype=np.float32)
        predicted.append(logits >= 0)
        true.append(labels[name.replace("_1.bin", ".png")])
    return postprocess.evaluate(np.array(predicted, np.float32) - 0.5, np.array(true))


def read_all(folder):
    for name in os.listdir(folder):
        file = os.open(os.path.join(folder, name), os.O_RDONLY)
        os.read(file, 200)
        os.close(file)


PEAK = """import sys
sys.path.insert(0, sys.argv[1] + "/tests")
import bench
_, _, folder, labels, call = sys.argv
eval(call)
print(bench.peak("/proc/self"))
"""


def row_postprocess(scene):
    for count in (100, 1000) if scene.quick else (7600, 100000):
        folder, label_file = scene.new_folder(), scene.path("label%d.json" % count)
        random = np.random.RandomState(0)
        names = ["%06d" % i for i in range(count)]
        for name, logits in zip(names, random.standard_normal((count, 35)).astype("<f4")):
            with open(os.path.join(folder, name + "_1.bin"), "wb") as f:
                f.write(logits.tobytes())
        labels = random.randint(0, 2, (count, 35)).tolist()
        with open(label_file, "w") as f:
            json.dump({name + ".png": label for name, label in zip(names, labels)}, f)
        del labels

        def ours(_):
            os.chdir(scene.folder)  # fusion_result.json is written here
            return clock(postprocess.main, [folder, label_file])

        in_child(guides_postprocess, folder, label_file)  # in a virtual machine, the first use of memory is slow
        times = take_turns(2 if scene.quick else 5, ours=lambda i: in_child(ours, i), theirs=lambda _: in_child(
            clock, guides_postprocess, folder, label_file), limit=lambda _: in_child(clock, read_all, folder))
        stage = "postprocess, {:,}".format(count)
        yield compared(stage, "the guide's way", 2, times["ours"], times["theirs"], times["limit"],
                       "open, read, close", count)
    # Each side is a new program, because a forked process would start with its parent's memory.
    theirs, mine = (
        float(command(sys.executable, "-c", PEAK, ROOT, folder, label_file, call, cwd=scene.folder).split()[-1])
        for call in ("bench.guides_postprocess(folder, labels)", "bench.postprocess.main([folder, labels])"))
    yield figures(stage + ", memory", "the guide's way", "MB", theirs, mine, mine / theirs, "300 MB", mine < 300)


def loop_over_draws(logits, labels, draws):
    """The plain method: computes the metrics of each draw's images."""
    random = np.random.RandomState(0)
    for _ in range(draws):
        chosen = random.randint(len(labels), size=len(labels))
        postprocess.evaluate(logits[chosen], labels[chosen])


def row_intervals(scene):
    count = 1000 if scene.quick else 7600
    random = np.random.RandomState(0)
    logits, labels = random.standard_normal((count, 35)).astype("<f4"), random.randint(0, 2, (count, 35))
    metrics = list(postprocess.evaluate(logits, labels)[0])
    times = take_turns(2 if scene.quick else 5, theirs=lambda _: 50 * in_child(
        clock, loop_over_draws, logits, labels, intervals.DRAWS // 50), ours=lambda _: in_child(
            clock, intervals.metric_intervals, logits >= 0, labels == 1, metrics))
    row = compared("intervals, {:,}".format(count), "a loop over the draws", 1, times["ours"], times["theirs"])
    yield dict(row, reach="3 s", met=row["ours"] < 3)


def scan(folder):
    with os.scandir(folder) as entries:
        for entry in entries:
            entry.stat()


def row_get_info(scene):
    folder, count = scene.new_folder(), 1000 if scene.quick else 100000
    for i in range(count):
        if i % 50000 == 0:  # ext4 allows at most 65,000 links to a file
            first = os.path.join(folder, "%06d.bin" % i)
            with open(first, "wb") as f:
                f.truncate(602112)
        else:
            os.link(first, os.path.join(folder, "%06d.bin" % i))
    scan(folder)
    arguments = [folder, scene.path("deepmar.info"), "224", "224"]
    times = take_turns(3 if scene.quick else 7, theirs=lambda _: in_child(clock, scan, folder),
                       ours=lambda _: in_child(clock, get_info.main, arguments))
    yield compared("get_info, {:,}".format(count), "scandir + stat alone", 3, times["ours"], times["theirs"],
                   times["theirs"], "scandir + stat", count, slower=True)


# --- the gallery ------------------------------------------------------------------------------------------------------

def run_gallery(*arguments):
    """Runs tools/gallery.py. Returns {"rate": images/s after the start, "seconds": the driver's CPU time, "memory": the driver's
    MB, "worker": the largest worker's MB}."""
    seen = {"seconds": 0, "memory": 0, "worker": 0}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([sys.executable, os.path.join(ROOT, "tools", "gallery.py")] + [str(text) for text in arguments],
                                   stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            time.sleep(0.5)
            for path in glob.glob("/proc/[0-9]*"):
                with contextlib.suppress(OSError, IndexError):  # a process may have ended
                    if path == "/proc/%d" % process.pid:
                        with open(path + "/stat") as f:
                            seen["seconds"] = sum(map(int, f.read().rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")
                        seen["memory"] = peak(path)
                    with open(path + "/cmdline", "rb") as f:
                        if f.read().startswith(b"ray::Worker"):
                            seen["worker"] = max(seen["worker"], peak(path))
        log.seek(0)
        output = log.read()
    if process.returncode:
        raise ValueError("tools/gallery.py failed: %s" % output[-2000:])
    return dict(seen, rate=float(re.search(r"([0-9.]+) images/s after the start", output).group(1)))


def measure_on_bins(model, batch, bins, folder):
    """Returns the stand-in's seconds from end to end for an image, as tools/benchmark.py runs it."""
    from session import calls_at_once, open_session, run
    calls = calls_at_once(CORES, MANY, batch)
    return run(open_session(model, calls=calls), bins, batch, 224, 224, folder, lambda done: None, calls)[0]["e2e"].seconds / len(bins)


def long_list(scene, count):
    """Returns (a list file with count images, their folder, a model that needs nearly no time)."""
    from onnx import TensorProto, helper, save_model
    root, model, image_txt = scene.path("long"), scene.path("tiny.onnx"), scene.path("long%d.txt" % count)
    if not os.path.exists(root):
        os.makedirs(os.path.join(root, "0"))
        for i in range(1000):
            Image.new("RGB", (8, 16), (i % 256, i // 4, 0)).save(os.path.join(root, "0", "%03d.png" % i))
        for i in range(1, MANY // 1000):
            os.symlink("0", os.path.join(root, str(i)))
        nodes = [helper.make_node("AveragePool", ["actual_input_1"], ["pooled"], kernel_shape=[32, 32]),
                 helper.make_node("Flatten", ["pooled"], ["output1"])]
        graph = helper.make_graph(
            nodes, "tiny", [helper.make_tensor_value_info("actual_input_1", TensorProto.FLOAT, [64, 3, 32, 32])],
            [helper.make_tensor_value_info("output1", TensorProto.FLOAT, [64, 3])])
        save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=6), model)
    with open(image_txt, "w") as f:
        f.writelines("%d/%03d.png\n" % (i // 1000, i % 1000) for i in range(count))
    return image_txt, root, model


def row_gallery(scene):
    """Measures tools/gallery.py: speed with the real model, memory with a long list, and speed on several nodes."""
    import importlib.util
    if sys.version_info < (3, 10) or not importlib.util.find_spec("ray"):
        print("note: Ray is not installed (pip install -r tools/requirements-gallery.txt, Python 3.10 or later), so the gallery "
              "is not measured")
        return
    bins, (images, image_txt, _) = scene.bins(), scene.images()
    for batch in (1,) if scene.quick else (1, 8):
        model = scene.model(batch)
        times = take_turns(  # for an image
            1 if scene.quick else 3,
            ours=lambda _: 1 / run_gallery(image_txt, "--root", images, "--onnx", model, "--output", scene.new_folder(),
                                           "--shard-size", 4 if scene.quick else 200)["rate"],
            theirs=lambda _: in_child(measure_on_bins, model, batch, bins, scene.new_folder()))
        yield compared("gallery, batch %d" % batch, "stand-in on bins", 0.9, times["ours"], times["theirs"], count=1)

    counts = (100, 1000) if scene.quick else (10000, MANY)
    names = ["{:,}".format(count) for count in counts]
    few, many = (run_gallery(image_txt, "--root", root, "--onnx", model, "--output", scene.new_folder(), "--attributes",
                             attributes(scene)) for image_txt, root, model in (long_list(scene, count) for count in counts))
    for who, name in (("driver", "memory"), ("worker", "worker")):
        yield figures("gallery, memory of the %s, %s" % (who, names[1]), "%s images" % names[0], "MB", few[name], many[name],
                      many[name] / few[name], "<= 1.1", many[name] <= 1.1 * few[name])
    cost = max(many["seconds"] - few["seconds"], 0) / (counts[1] - counts[0]) * 1e6
    yield figures("gallery, the driver's CPU time", "a million images", "us/image", None, cost, cost / 100, "<= 100 us", cost <= 100)

    first = None
    for nodes in (1,) if scene.quick else (1, 2, 4):
        rate = on_nodes(scene, nodes, images)
        first = first or rate
        reach = 0.9 * min(nodes, CORES)
        yield figures("gallery, %d nodes of one core" % nodes, "one node", "images/s", first, rate, rate / first,
                      ">= %g" % reach, rate >= reach * first)


def attributes(scene):
    """Writes a file with the attributes' names for long_list()'s model. Returns its path."""
    with open(scene.path("attributes.txt"), "w") as f:
        f.write("red\ngreen\nblue\n")
    return f.name


def on_nodes(scene, count, images):
    """Returns the images/s on a cluster of count nodes on this machine."""
    from ray.cluster_utils import Cluster
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as short:  # a socket's path must be short
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "temp_dir": short})
        try:
            for _ in range(count):
                cluster.add_node(num_cpus=1)
            return run_gallery(scene.path("bins.txt"), "--root", images, "--onnx", scene.model(1), "--output", scene.new_folder(),
                               "--shard-size", 4 if scene.quick else 24, "--address", cluster.address)["rate"]
        finally:
            cluster.shutdown()


# --- whole programs ---------------------------------------------------------------------------------------------------

def row_startup(scene):
    scripts = [os.path.normpath(os.path.join(folder, name)) for folder in (".", "tools")
               for name in sorted(os.listdir(os.path.join(ROOT, folder)))
               if name.endswith(".py") and name != "DeepMAR.py"]

    def side(*arguments):
        return lambda _: clock(lambda: command(sys.executable, *arguments))
    sides = {name: side(os.path.join(ROOT, name), "--help") for name in scripts}
    times = take_turns(1 if scene.quick else 9, theirs=side("-c", "import numpy"), empty=side("-c", "pass"), **sides)
    for name in scripts:
        yield compared("start-up, %s --help" % name, "python3 -c 'import numpy'", 1.5, times[name], times["theirs"],
                       times["empty"], "python3 -c pass", slower=True)


def row_run(scene):
    def stages(_):
        work = scene.new_folder()
        os.symlink(scene.sample() + "/sample", work + "/sample")
        with open(work + "/sample/accuracy.txt") as f:
            accuracy = f.read().strip()

        def work_through():
            for name, arguments in (
                    ("export_onnx.py", ["sample/checkpoint.pth.tar", "deepmar_bs1.onnx", "1"]),
                    ("remove_pad.py", ["deepmar_bs1.onnx", "deepmar_bs1_nopad.onnx"]),
                    ("preprocess_deepmar_pytorch.py", ["sample/images", "input_bin", "sample/image.txt"]),
                    ("get_info.py", ["./input_bin", "deepmar.info", "224", "224"]),
                    ("tools/benchmark.py", ["-batch_size=1", "-om_path=deepmar_bs1_nopad.onnx",
                                            "-input_text_path=deepmar.info"]),
                    ("postprocess_deepmar_pytorch.py", ["result/dumpOutput_device0", "sample/label.json", "--published",
                                                        accuracy])):
                command(sys.executable, os.path.join(ROOT, name), *arguments, cwd=work)
        return clock(work_through)

    def whole(_):
        work = scene.new_folder()
        os.symlink(scene.sample() + "/sample", work + "/sample")
        return clock(lambda: command("bash", os.path.join(ROOT, "run_all.sh"), "--work-dir", work, "--sample-size",
                                     12 if scene.quick else 200, "--stage", 1, "--stop-stage", 7,
                                     env=dict(os.environ, python=sys.executable)))
    times = take_turns(1 if scene.quick else 3, theirs=stages, ours=whole)
    yield compared("run_all.sh, stages 1 to 7", "its stages alone", 1.05, times["ours"], times["theirs"],
                   times["theirs"], "its stages", slower=True)


BUSY = ["standin", "openvino"]  # the rows of --busy
ROWS = {name[len("row_"):]: function for name, function in list(globals().items()) if name.startswith("row_")}


@contextlib.contextmanager
def busy(processes):
    """Keeps this many processes busy during the block."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def machine():
    """Returns the machine and the versions on which the figures are measured."""
    model = "unknown processor"
    with open("/proc/cpuinfo") as f:
        for line in f:
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break

    def versions():
        import onnx
        import onnxruntime
        import torch
        return {"torch": torch.__version__, "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}
    return dict({"platform": platform.platform(), "processor": model, "cores": CORES,
                 "load": os.getloadavg()[0], "python": platform.python_version(), "numpy": np.__version__,
                 "pillow": Image.__version__}, **in_child(versions))


def creation(folder):
    """Returns the milliseconds that it takes to create a file in a folder."""
    def create(name):
        os.close(os.open(os.path.join(folder, name), os.O_CREAT | os.O_WRONLY))
    return 1000 * statistics.median(clock(create, "created%d" % i) for i in range(200))


LINE = "%-50s  %-26s  %9s  %9s  %9s  %-8s  %6s  %-7s  %-3s  %s"
HEAD = LINE % ("stage", "against", "theirs", "ours", "limit", "", "ratio", "reach", "met", "limit is")


def line(row):
    """Returns a row as a line of the table."""
    def number(value):
        return "-" if value is None else "{:,.0f}".format(value) if value >= 1000 else "%.4g" % value
    return (LINE % (row["stage"], row["against"], number(row["theirs"]), number(row["ours"]), number(row["limit"]),
                    row["unit"], "%.3f" % row["ratio"], row["reach"], "yes" if row["met"] else "NO",
                    row["limit_is"])).rstrip()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--only", nargs="+", choices=sorted(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--quick", action="store_true", help="few images and rounds; the figures mean nothing")
    parser.add_argument("--busy", action="store_true", help="run a busy process on half of the cores (%s)" % ", ".join(BUSY))
    parser.add_argument("--json", metavar="FILE", help="also write the result into this file")
    args = parser.parse_args(argv)
    rows = args.only or (BUSY if args.busy else ROWS)
    if args.busy and not set(rows) <= set(BUSY):
        parser.error("--busy only works with these rows: %s" % ", ".join(BUSY))
    with tempfile.TemporaryDirectory(prefix="deepmar_bench") as folder:
        scene = Scene(folder, args.quick, args.busy)
        result = {"machine": dict(machine(), file_creation_ms=round(creation(folder), 3)), "quick": args.quick, "rows": []}
        print(", ".join("%s %s" % item for item in result["machine"].items()))
        if result["machine"]["file_creation_ms"] > SLOW_CREATION:
            print("note: creating a file in %s is slow, as on ext4 for some minutes after many deletions. The figures of "
                  "preprocess and the stand-in are too low; wait five minutes, or set TMPDIR" % tempfile.gettempdir())
        print(HEAD, flush=True)
        for batch in (1, 8, 64) if args.busy and not args.quick else ():
            scene.model(batch)  # make it before the machine is busy
        with busy(max(1, CORES // 2) if args.busy else 0):
            for row in (row for name in rows for row in ROWS[name](scene)):
                row["stage"] += ", busy" * args.busy
                print(line(row), flush=True)
                result["rows"].append(row)
    if args.json is not None:
        with get_info.whole_file(args.json) as temporary, open(temporary, "w") as f:
            json.dump(result, f, indent=1)
            f.write("\n")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, ImportError) as error:
        sys.exit("bench.py: error: %s" % error)
    except KeyboardInterrupt:
        sys.exit("bench.py: interrupted")
