"""Measures each stage and the alternative that a user would have, in turns.

    python3 tests/bench.py --json FILE                 everything, about 10 minutes on two idle cores
    python3 tests/bench.py --only preprocess startup   only these rows
    python3 tests/bench.py --busy                      stage 6, with a busy process on half of the cores
    python3 tests/bench.py --quick                     a small run, which only shows that the benchmark works
    python3 tests/bench.py --markdown FILE FILE        measures nothing; prints one table of the runs in these --json files

The script makes its input (drawn images, a checkpoint, models, bins) in a scratch folder below TMPDIR. A figure is the median of
several rounds. The sides of a comparison take turns in each round, and a ratio is the median of the rounds' ratios: of the speeds for
images/s, else of the figures. The exit status is 0 whether or not the figures reach their goals. Run it on an idle machine.
"""
import argparse
import contextlib
import filecmp
import importlib
import io
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tools")]
from lib.session import calls_at_once, open_session, run
import get_info
import postprocess_deepmar_pytorch as postprocess
import preprocess_deepmar_pytorch as preprocess
from lib.files import write_text
from lib.machine import cores
from lib.metrics import evaluate
from lib.script import command, note

CORES = cores()


# --- measuring ------------------------------------------------------------------------------------------------------

def in_child(function, *arguments, cores=CORES, method="fork"):
    """Runs a function in a new process, on this many cores. Returns its result."""
    places = sorted(os.sched_getaffinity(0))[:cores]
    with ProcessPoolExecutor(1, get_context(method), os.sched_setaffinity, (0, places)) as pool:
        return pool.submit(quietly, function, *arguments).result()


def quietly(function, *arguments):
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*arguments)


def clock(function, *arguments):
    """Returns the seconds that a call takes."""
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def peak_memory(function, *arguments):
    """Returns this process's peak memory in MB, after a call of the function."""
    function(*arguments)
    with open("/proc/self/status") as f:
        return [int(line.split()[1]) * 1024 / 1e6 for line in f if line.startswith("VmHWM")][0]


def run(*arguments, **settings):
    """Runs a command and returns its output. Raises ValueError with the output if the command fails."""
    process = subprocess.run([str(argument) for argument in arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             universal_newlines=True, **settings)
    if process.returncode:
        raise ValueError("%s failed: %s" % (" ".join(map(str, arguments)), process.stdout[-2000:]))
    return process.stdout


def script(name, *arguments, **settings):
    return run(sys.executable, os.path.join(ROOT, name), *arguments, **settings)


def take_turns(rounds, **sides):
    """Calls every side in each round, in rotating order. A side is a function that returns seconds. Returns {side: [seconds]}."""
    times = {name: [] for name in sides}
    names = list(sides)
    for number in range(rounds):
        for name in names[number % len(names):] + names[:number % len(names)]:
            times[name].append(sides[name]())
    return times


def make_row(stage, against, unit, theirs, ours, ratio, goal, met):
    return {"stage": stage, "against": against, "unit": unit, "theirs": theirs, "ours": ours, "ratio": ratio, "goal": goal,
            "met": bool(met)}


def compare_speed(stage, against, goal, theirs, ours):
    """Returns a row in images/s. theirs and ours: the seconds for an image in each round. goal: the smallest ratio of the speeds."""
    ratio = statistics.median(a / b for a, b in zip(theirs, ours))
    return make_row(stage, against, "images/s", 1 / statistics.median(theirs), 1 / statistics.median(ours), ratio, ">= %g" % goal,
                    ratio >= goal)


def compare_time(stage, against, goal, theirs, ours):
    """Returns a row in seconds. theirs and ours: the seconds of each round. goal: the largest ratio of the times."""
    ratio = statistics.median(b / a for a, b in zip(theirs, ours))
    return make_row(stage, against, "s", statistics.median(theirs), statistics.median(ours), ratio, "<= %g" % goal, ratio <= goal)


# --- input of the rows -----------------------------------------------------------------------------------------------

class Inputs(object):
    """Makes the input of the measurements in a scratch folder, each item when it is first needed."""

    def __init__(self, folder, quick, busy, versions):
        self.folder, self.quick, self.busy, self.versions = folder, quick, busy, versions

    def choose(self, full, quick):
        """Returns the first value for a full run, the second for a quick one."""
        return quick if self.quick else full

    def path(self, name):
        return os.path.join(self.folder, name)

    def new_folder(self):
        """Makes an empty folder. Nothing is deleted between rounds, because ext4 then creates files ten times slower."""
        return tempfile.mkdtemp(dir=self.folder)

    def images(self):
        """Returns (a folder of drawings in PETA's sizes, their list, their names)."""
        folder, image_txt = self.path("images"), self.path("image.txt")
        names = ["%05d.png" % i for i in range(self.choose(1000, 40))]
        if not os.path.exists(folder):
            os.mkdir(folder)
            from sample import pedestrians
            drawings, _ = pedestrians(self.choose(250, 10), 3)
            for name, drawing in zip(names, itertools.cycle(drawings)):
                drawing.save(os.path.join(folder, name))
            write_text(image_txt, "\n".join(names))
        return folder, image_txt, names

    def sample(self, name=""):
        """Returns the path of a file of run_all.sh's sample."""
        if not os.path.exists(self.path("sample")):
            script("tools/sample.py", self.path("sample"), "--images", self.sample_size())
        return os.path.join(self.path("sample"), name)

    def sample_size(self):
        return self.choose(256, 16)  # with two cores, each has two batches at batch size 64

    def model(self, batch):
        """Returns the path of the sample's ONNX model for a batch size."""
        path = self.path("bs%d.onnx" % batch)
        if not os.path.exists(path):
            script("export_onnx.py", self.sample("checkpoint.pth.tar"), path + ".pad", batch)
            script("remove_pad.py", path + ".pad", path)
        return path

    def bins(self):
        """Returns the folder of the sample's bins, which are on the disk and not only in memory."""
        folder = self.path("input_bin")
        if not os.path.exists(folder):
            script("preprocess_deepmar_pytorch.py", self.sample("images"), folder, self.sample("image.txt"))
            os.sync()
        return folder


# --- preprocess ------------------------------------------------------------------------------------------------------

def guides_preprocess(images, folder, names):
    """The guide's method in plain code: one process, float32, tofile."""
    os.mkdir(folder)
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
    with get_context("fork").Pool(processes) as pool:
        pool.map(decode, paths, chunksize=16)


@contextlib.contextmanager
def bin_folder(inputs):
    """Yields the path of a folder for bins, which are emptied at the end.

    The same memory is ready for each measurement: a virtual machine's host takes free memory back every few seconds, and its
    first use after that takes ten times as long as writing a bin.
    """
    np.ones(inputs.choose(10 ** 8, 1))
    folder = os.path.join(inputs.new_folder(), "bins")
    yield folder
    for entry in os.scandir(folder):
        os.truncate(entry.path, 0)


def row_preprocess(inputs):
    images, image_txt, names = inputs.images()
    paths, half = [os.path.join(images, name) for name in names], names[::2]
    bins = [name.replace(".png", ".bin") for name in names]
    with bin_folder(inputs) as theirs, bin_folder(inputs) as ours:
        in_child(guides_preprocess, images, theirs, names)
        in_child(preprocess.main, [images, ours, image_txt])
        equal = len(filecmp.cmpfiles(theirs, ours, bins, shallow=False)[0])
    yield make_row("preprocess, equal bytes", "the guide's bins", "bins", len(bins), equal, equal / len(bins), ">= 1",
                   equal == len(bins))

    def guide():
        with bin_folder(inputs) as folder:
            return in_child(clock, guides_preprocess, images, folder, half) / len(half)

    def ours_on(count):
        with bin_folder(inputs) as folder:
            return in_child(clock, preprocess.main, [images, folder, image_txt], cores=count) / len(names)

    def decode_on(count):
        return in_child(clock, decode_all, paths, count, cores=count) / len(names)

    counts = sorted({1, CORES}, reverse=True)
    sides = {"guide": guide}
    for count in counts:
        sides["ours%d" % count] = lambda count=count: ours_on(count)
        sides["decode%d" % count] = lambda count=count: decode_on(count)
    times = take_turns(inputs.choose(7, 1), **sides)
    for count in counts:
        stage = "preprocess, %s" % ("1 core" if count == 1 else "%d cores" % count)
        ours = times["ours%d" % count]
        yield compare_speed(stage, "the guide's way", 2.3 if count == 1 else 5, times["guide"], ours)
        yield compare_speed(stage, "decode + resize alone", 0.7, times["decode%d" % count], ours)


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
    evaluate(np.array(predicted, np.float32) - 0.5, np.array(true))


def our_postprocess(folder, label_file):
    os.chdir(os.path.dirname(label_file))  # fusion_result.json is written into the current folder
    postprocess.main([folder, label_file])


def write_results(inputs, count):
    """Returns (a folder with count results of stage 6, their label.json)."""
    folder, label_file = inputs.new_folder(), inputs.path("label%d.json" % count)
    random = np.random.RandomState(0)
    names = ["%06d" % i for i in range(count)]
    for name, logits in zip(names, random.standard_normal((count, 35)).astype("<f4")):
        with open(os.path.join(folder, name + "_1.bin"), "wb") as f:
            f.write(logits.tobytes())
    labels = random.randint(0, 2, (count, 35)).tolist()
    write_text(label_file, json.dumps({name + ".png": label for name, label in zip(names, labels)}))
    return folder, label_file


def row_postprocess(inputs):
    for count in inputs.choose((7600, 100000), (100, 1000)):
        folder, label_file = write_results(inputs, count)
        in_child(guides_postprocess, folder, label_file)  # in a virtual machine, the first use of memory is slow
        times = take_turns(
            inputs.choose(5, 1),
            theirs=lambda: in_child(clock, guides_postprocess, folder, label_file) / count,
            ours=lambda: in_child(clock, our_postprocess, folder, label_file) / count)
        stage = "postprocess, {:,} images".format(count)
        yield compare_speed(stage, "the guide's way", 2, **times)
    # A forked process would start with the memory of its parent.
    theirs, ours = (in_child(peak_memory, function, folder, label_file, method="spawn")
                    for function in (guides_postprocess, our_postprocess))
    yield make_row(stage + ", memory", "the guide's way", "MB", theirs, ours, ours / theirs, "300 MB", ours < 300)


def scan(folder):
    with os.scandir(folder) as entries:
        for entry in entries:
            entry.stat()


def row_get_info(inputs):
    folder, count = inputs.new_folder(), inputs.choose(100000, 1000)
    for i in range(count):
        path = os.path.join(folder, "%06d.bin" % i)
        if i % 50000 == 0:  # ext4 allows at most 65,000 links to a file
            first = path
            with open(first, "wb") as f:
                f.truncate(602112)
        else:
            os.link(first, path)
    scan(folder)
    times = take_turns(
        inputs.choose(7, 3),
        theirs=lambda: in_child(clock, scan, folder),
        ours=lambda: in_child(clock, get_info.main, [folder, inputs.path("deepmar.info"), "224", "224"]))
    yield compare_time("get_info, {:,} bins".format(count), "scandir + stat alone", 3, **times)


# --- whole programs ---------------------------------------------------------------------------------------------------

def row_startup(inputs):
    names = [os.path.normpath(os.path.join(folder, name)) for folder in (".", "tools")
             for name in os.listdir(os.path.join(ROOT, folder)) if name.endswith(".py") and name != "DeepMAR.py"]
    times = take_turns(
        inputs.choose(7, 1), numpy=lambda: clock(run, sys.executable, "-c", "import numpy"),
        **{name: lambda name=name: clock(script, name, "--help") for name in names})
    slowest = max(names, key=lambda name: statistics.median(times[name]))
    note("of %d scripts, %s --help is the slowest" % (len(names), slowest))
    yield compare_time("start-up, the slowest script's --help", "python3 -c 'import numpy'", 1.5, times["numpy"], times[slowest])


def row_run(inputs):
    def new_work():
        work = inputs.new_folder()
        os.symlink(inputs.sample(), work + "/sample")
        return work

    def stages(work):
        with open(work + "/sample/accuracy.txt") as f:
            accuracy = f.read().strip()
        for name, *arguments in (
                ("export_onnx.py", "sample/checkpoint.pth.tar", "deepmar_bs1.onnx", "1"),
                ("remove_pad.py", "deepmar_bs1.onnx", "deepmar_bs1_nopad.onnx"),
                ("preprocess_deepmar_pytorch.py", "sample/images", "input_bin", "sample/image.txt"),
                ("get_info.py", "./input_bin", "deepmar.info", "224", "224"),
                ("tools/benchmark.py", "-batch_size=1", "-om_path=deepmar_bs1_nopad.onnx", "-input_text_path=deepmar.info"),
                ("postprocess_deepmar_pytorch.py", "result/dumpOutput_device0", "sample/label.json", "--published", accuracy)):
            script(name, *arguments, cwd=work)

    def run_all(work):
        run("bash", os.path.join(ROOT, "run_all.sh"), "--work-dir", work, "--sample-size", inputs.sample_size(), "--backend",
            "onnxruntime", "--stage", 1, "--stop-stage", 7, env=dict(os.environ, python=sys.executable))
    times = take_turns(inputs.choose(3, 1), theirs=lambda: clock(stages, new_work()), ours=lambda: clock(run_all, new_work()))
    yield compare_time("run_all.sh, stages 1 to 7", "its stages alone", 1.05, **times)


# --- inference -------------------------------------------------------------------------------------------------------

def measure_standin(model, batch, bins, rounds, new_folder):
    """Returns {side: [seconds for an image]} of stage 6's stand-in, the bare session and a plain loop over the bins [(name, path)]."""
    import onnxruntime
    import session
    calls = calls_at_once(CORES, len(bins), batch)
    ours, bare = open_session(model, calls=calls), open_session(model)
    plain = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    parts = [bins[i:i + batch] for i in range(0, len(bins), batch)]

    def read(part):
        return np.stack([np.fromfile(path, "<f4").reshape(3, 224, 224) for _, path in part])

    def run_bare():
        feed = {"actual_input_1": read(parts[0])}
        return clock(lambda: [bare.run(None, feed) for _ in parts]) / len(bins)

    def run_loop():
        def loop(folder):
            for part in parts:
                logits, = plain.run(None, {"actual_input_1": read(part)})
                for (name, _), row in zip(part, logits):
                    row.tofile(os.path.join(folder, name + "_1.bin"))
        return clock(loop, new_folder()) / len(bins)

    def run_ours():
        clocks, _ = run(ours, bins, batch, 224, 224, new_folder(), lambda done: None, calls)
        return clocks["e2e"].seconds / len(bins)

    def run_cold():
        for _, path in bins:
            with open(path, "rb") as f:
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # it is read from the disk again
        return run_ours()

    sides = {"bare": run_bare, "loop": run_loop, "warm": run_ours}
    if batch == 1:
        sides["cold"] = run_cold
    for part in parts:  # all bins are in memory now
        read(part)
    for opened in (bare, plain):
        opened.run(None, {"actual_input_1": read(parts[0])})
    return take_turns(rounds, **sides)


def standin_sides(inputs, batch, rounds):
    folder, count = inputs.bins(), inputs.choose(max(128, 4 * batch), 2 * batch)
    bins = [(name[:-len(".bin")], os.path.join(folder, name)) for name in sorted(os.listdir(folder))[:count]]
    return in_child(measure_standin, inputs.model(batch), batch, bins, rounds, inputs.new_folder)


def row_standin(inputs):
    for batch in inputs.choose((1, 8, 64), (1, 8)):
        times = standin_sides(inputs, batch, inputs.choose(3, 1))
        stage = "stand-in, batch %d" % batch
        goal = 1.3 if inputs.busy and batch == 8 else 0.97
        yield compare_speed(stage, "bare session", goal, times["bare"], times["warm"])
        yield compare_speed(stage, "plain loop", 1.05 if batch == 1 else 1, times["loop"], times["warm"])
        if batch == 1:
            yield compare_speed(stage + ", bins on the disk", "bare session", goal, times["bare"], times["cold"])


def with_onnxruntime(model, array, images):
    """Returns a function that runs a model on the same batch this many times, with calls at the same time as in stage 6."""
    from lib.session import callers, calls_at_once, open_session
    calls = calls_at_once(CORES, images, len(array))
    session = open_session(model, calls=calls)

    def infer(times):
        with callers(calls) as pool:
            list(pool.map(lambda _: run(None, {"actual_input_1": array}), range(times)))
    return infer


def with_pytorch(checkpoint, array, images):
    import torch
    from DeepMAR import load_model
    network, tensor = load_model(checkpoint), torch.from_numpy(array)

    def infer(times):
        with torch.no_grad():
            for _ in range(times):
                network(tensor)
    return infer


def with_openvino(model, array, images):
    """Returns a function like with_onnxruntime()'s, on OpenVINO's own queue in throughput mode."""
    import openvino
    compiled = openvino.Core().compile_model(model, "CPU", {
        "PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_NUM_THREADS": CORES, "INFERENCE_PRECISION_HINT": "f32"})
    queue = openvino.AsyncInferQueue(compiled)

    def infer(times):
        for _ in range(times):
            queue.start_async({0: array})
        queue.wait_all()
    return infer


def measure_models(sides, batch, images, rounds):
    """Returns {side: [seconds for an image]}. sides: {side: (one of the functions above, its file)}."""
    array = np.random.RandomState(0).standard_normal((batch, 3, 224, 224)).astype(np.float32)
    functions = {name: function(path, array, images) for name, (function, path) in sides.items()}
    for infer in functions.values():
        infer(CORES)  # the first calls also allocate memory
    return take_turns(rounds, **{name: lambda infer=infer: clock(infer, images // batch) / images
                                 for name, infer in functions.items()})


def compare_models(inputs, stage, against, goal, batch, theirs, ours):
    images = inputs.choose(32 * CORES, 2 * batch)
    times = in_child(measure_models, {"theirs": theirs, "ours": ours}, batch, images, inputs.choose(5, 1))
    return compare_speed("%s, batch %d" % (stage, batch), against, goal, **times)


def row_inference(inputs):
    for batch in 1, 8:
        yield compare_models(inputs, "inference", "PyTorch eager", 1.6, batch,
                             (with_pytorch, inputs.sample("checkpoint.pth.tar")), (with_onnxruntime, inputs.model(batch)))


def row_int8(inputs):
    float32, int8 = inputs.model(1), inputs.path("int8.onnx")
    text = script("tools/quantize.py", float32, inputs.bins(), int8, "--labels", inputs.sample("label.json"), "--allow-drop")
    theirs, ours = (100 * float(number) for number in re.search(r"float32 ([0-9.]+), int8 ([0-9.]+)", text).groups())
    yield make_row("INT8, instance_acc", "float32", "%", theirs, ours, ours / theirs, "drop <= 0.5", theirs - ours <= 0.5)
    yield compare_models(inputs, "INT8", "float32", 3, 1, (with_onnxruntime, float32), (with_onnxruntime, int8))


def row_openvino(inputs):
    """Compares ONNX Runtime with OpenVINO's own queue, on the same files."""
    if "openvino" not in inputs.versions:
        note("openvino is not installed (pip install openvino, Python 3.10 or later), so it is not measured")
        return
    qdq = inputs.path("qdq.onnx")
    script("tools/quantize.py", inputs.model(1), inputs.bins(), qdq, "--qdq")
    for stage, batch, model in (("float32", 1, inputs.model(1)), ("float32", 8, inputs.model(8)), ("INT8 (QDQ)", 1, qdq)):
        yield compare_models(inputs, stage, "OpenVINO's queue", 1, batch, (with_openvino, model), (with_onnxruntime, model))


def row_gallery(inputs):
    if "ray" not in inputs.versions:
        note("Ray is not installed (pip install -r tools/requirements-gallery.txt, Python 3.10 or later), so the gallery is not measured")
        return
    images, image_txt, names = inputs.images()
    for batch in 1, 8:
        model = inputs.model(batch)

        def gallery():
            text = script("tools/gallery.py", image_txt, "--root", images, "--onnx", model, "--output", inputs.new_folder(),
                          "--shard-size", inputs.choose(128, 8))
            return 1 / float(re.search(r"([0-9.]+) images/s after the start", text).group(1))
        times = take_turns(inputs.choose(2, 1), theirs=lambda: standin_sides(inputs, batch, 1)["warm"][0], ours=gallery)
        yield compare_speed("gallery, batch %d" % batch, "stand-in", 0.9, **times)


# --- the result -------------------------------------------------------------------------------------------------------

ROWS = {name[len("row_"):]: function for name, function in list(globals().items()) if name.startswith("row_")}
BUSY = ["standin", "openvino"]  # the rows of --busy


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


def versions():
    found = {}
    for name in ("numpy", "PIL", "torch", "onnx", "onnxruntime", "openvino", "ray"):
        with contextlib.suppress(ImportError):
            found[name] = importlib.import_module(name).__version__
    return found


def machine(folder):
    """Returns the machine and the versions on which the figures are measured."""
    with open("/proc/cpuinfo") as f:
        models = re.findall("model name\t: (.+)", f.read()) or ["unknown processor"]
    # After many deletions, ext4 creates files up to ten times slower for some minutes. At rest it needs 0.015 ms.
    creation = statistics.median(clock(os.mknod, os.path.join(folder, "created%d" % i)) for i in range(200))
    return dict({"platform": platform.platform(), "processor": models[0], "cores": CORES, "load": os.getloadavg()[0],
                 "file_creation_ms": round(1000 * creation, 3), "python": platform.python_version()}, **in_child(versions))


def print_head(results):
    """Prints the machines of one or several results and the head of a table in Markdown."""
    for result in results:
        print(", ".join("%s %s" % item for item in result["machine"].items()))
    print("\n| %-42s | %-25s | %-8s | %-11s |" % ("stage", "against", "unit", "goal")
          + "".join(" %13s | %9s | %6s | %-3s |" % ("%s theirs" % result["machine"]["python"], "ours", "ratio", "met")
                    for result in results))
    print("|---|---|---|---|" + "--:|--:|--:|---|" * len(results), flush=True)


def print_row(row, same):
    """Prints a line of the table. same: this row in each result, or None where a result lacks it."""
    def number(value):
        return "{:,.0f}".format(value) if value >= 1000 else "%.4g" % value

    text = "| %-42s | %-25s | %-8s | %-11s |" % (row["stage"], row["against"], row["unit"], row["goal"])
    for each in same:
        cells = ("-",) * 4
        if each:
            cells = number(each["theirs"]), number(each["ours"]), "%.2f" % each["ratio"], "yes" if each["met"] else "NO"
        text += " %13s | %9s | %6s | %-3s |" % cells
    print(text, flush=True)


def print_results(results):
    print_head(results)
    found = [{(row["stage"], row["against"]): row for row in result["rows"]} for result in results]
    for key, row in {key: row for rows in reversed(found) for key, row in rows.items()}.items():
        print_row(row, [rows.get(key) for rows in found])


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--only", nargs="+", choices=sorted(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--quick", action="store_true", help="few images and rounds; the figures mean nothing")
    parser.add_argument("--busy", action="store_true", help="run a busy process on half of the cores (%s)" % ", ".join(BUSY))
    parser.add_argument("--json", metavar="FILE", help="also write the result into this file")
    parser.add_argument("--markdown", nargs="+", metavar="FILE", help="only print the results in these files, as one table")
    args = parser.parse_args(argv)
    args.only = args.only or (BUSY if args.busy else list(ROWS))
    if args.busy and not set(args.only) <= set(BUSY):
        parser.error("--busy only works with these rows: %s" % ", ".join(BUSY))
    return args


def main(argv=None):
    args = parse(argv)
    if args.markdown:
        results = []
        for path in args.markdown:
            with open(path) as f:
                results.append(json.load(f))
        print_results(results)
        return
    with tempfile.TemporaryDirectory(prefix="deepmar_bench") as folder:
        result = {"machine": machine(folder), "quick": args.quick, "rows": []}
        print_head([result])
        inputs = Inputs(folder, args.quick, args.busy, result["machine"])
        with busy(max(1, CORES // 2) if args.busy else 0):
            for row in (row for name in args.only for row in ROWS[name](inputs)):
                if args.busy:
                    row["stage"] += ", busy"
                print_row(row, [row])
                result["rows"].append(row)
    if args.json is not None:
        write_text(args.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    command(main)
