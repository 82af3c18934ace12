"""Measures each stage and the alternative that a user would have, in turns.

    python3 tests/bench.py --json FILE                 everything, about 10 minutes on two idle cores
    python3 tests/bench.py --only preprocess startup   only these rows
    python3 tests/bench.py --busy                      stage 6, with a busy process on half of the cores
    python3 tests/bench.py --quick                     a small run, which only shows that the benchmark works
    python3 tests/bench.py --markdown FILE FILE        measures nothing; prints one table of the runs in these --json files

The input (drawn images, a checkpoint, models, bins) is made in a scratch folder below TMPDIR. A figure is the median of several
rounds. The sides of a comparison take turns in each round. A ratio is the median of the rounds' ratios; 2 means that ours is twice as
fast, or needs half as much. The exit status is 0 whether or not the ratios reach their goals. Run it on an idle machine.
"""
import argparse
import contextlib
import glob
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
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tools")]
import get_info
import postprocess_deepmar_pytorch as postprocess
import preprocess_deepmar_pytorch as preprocess
from lib.files import read_lines, write_text
from lib.machine import cores
from lib.metrics import evaluate
from lib.script import command, note

CORES = cores()


# --- measuring: everything runs in the scratch folder ------------------------------------------------------------------

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


def run(*arguments, **settings):
    """Runs a command and returns its output. Raises ValueError with the output if the command fails."""
    command = [str(argument) for argument in arguments]
    process = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **settings)
    if process.returncode:
        raise ValueError("%s failed: %s" % (" ".join(command), process.stdout[-2000:]))
    return process.stdout


def script(name, *arguments, **settings):
    return run(sys.executable, os.path.join(ROOT, name), *arguments, **settings)


def new_folder():
    """Makes an empty folder. Nothing is deleted between rounds, because ext4 then creates files ten times slower."""
    return tempfile.mkdtemp(dir=".")


def compare(quick, stage, unit, ours, alternatives, rounds=3):
    """Measures a stage and its alternatives {name: (goal, function)} in turns. Yields a row of the result for each of them.

    All functions return seconds: for an image if the unit is images/s, else for the whole.
    """
    functions = [ours] + [function for _, function in alternatives.values()]
    times = {function: [] for function in functions}
    for number in range(1 if quick else rounds):
        for i in range(len(functions)):
            function = functions[(number + i) % len(functions)]
            times[function].append(function())
    for against, (goal, function) in alternatives.items():
        figures = statistics.median(times[function]), statistics.median(times[ours])
        if unit == "images/s":
            figures = [1 / figure for figure in figures]
        yield make_row(stage, against, unit, goal, *figures, statistics.median(a / b for a, b in zip(times[function], times[ours])))


def make_row(stage, against, unit, goal, theirs, ours, ratio):
    return {"stage": stage, "against": against, "unit": unit, "goal": goal, "theirs": theirs, "ours": ours, "ratio": ratio,
            "met": ratio >= goal}


# --- preprocess ------------------------------------------------------------------------------------------------------

def draw_images(quick):
    """Makes the folder 'images' with drawings in PETA's sizes, and the list image.txt. Returns the names."""
    from sample import pedestrians
    names = ["%05d.png" % i for i in range(40 if quick else 500)]
    os.makedirs("images", exist_ok=True)
    for name, image in zip(names, itertools.cycle(pedestrians(min(len(names), 250), 3)[0])):
        image.save(os.path.join("images", name))
    write_text("image.txt", "\n".join(names))
    return names


def guides_preprocess(arguments):
    """The guide's method in plain code: one process, float32, tofile."""
    images, folder, image_txt = arguments
    os.mkdir(folder)
    for name in read_lines(image_txt):
        image = Image.open(os.path.join(images, name)).convert("RGB").resize((224, 224), Image.BILINEAR)
        array = np.array(image, dtype=np.float32).transpose(2, 0, 1) / 255
        for channel, (mean, std) in enumerate(zip([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])):
            array[channel] -= mean
            array[channel] /= std
        array.tofile(os.path.join(folder, name.split(".")[0] + ".bin"))


def decode(name):
    Image.open(os.path.join("images", name)).resize((224, 224), Image.BILINEAR)


def decode_all(names, processes):
    with get_context("fork").Pool(processes) as pool:
        pool.map(decode, names, chunksize=16)


def row_preprocess(quick):
    names = draw_images(quick)

    def write_bins(main, count):
        # A virtual machine's host takes free memory back every few seconds, and the first use after that takes ten times as long as
        # writing a bin. So the memory is used once before the measurement, and the bins are emptied after it.
        np.ones(len(names) * 3 * 224 * 224, np.float32)
        folder = os.path.join(new_folder(), "bins")
        seconds = in_child(clock, main, ["images", folder, "image.txt"], cores=count)
        for entry in os.scandir(folder):
            os.truncate(entry.path, 0)
        return seconds / len(names)

    for count in sorted({CORES, 1}, reverse=True):
        yield from compare(quick, "preprocess, cores: %d" % count, "images/s", lambda: write_bins(preprocess.main, count), {
            "the guide's way": (2.3 if count == 1 else 5, lambda: write_bins(guides_preprocess, count)),
            "decode + resize alone": (0.7, lambda: in_child(clock, decode_all, names, count, cores=count) / len(names))}, rounds=5)


# --- lists and results ------------------------------------------------------------------------------------------------

def guides_postprocess(arguments):
    """The guide's method: a loop over the folder with an array for each file, then the metrics."""
    folder, label_file = arguments
    labels = json.loads(Path(label_file).read_text())
    predicted, true = [], []
    for name in os.listdir(folder):
        logits = np.fromfile(os.path.join(folder, name), dtype=np.float32)
        predicted.append(logits >= 0)
        true.append(labels[name.replace("_1.bin", ".png")])
    evaluate(np.array(predicted, np.float32) - 0.5, np.array(true))


def peak_memory(main, arguments):
    """Returns this process's peak memory in MB after a call."""
    main(arguments)
    return int(re.search(r"VmHWM:\s+([0-9]+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024 / 1e6


def row_postprocess(quick):
    random = np.random.RandomState(0)
    for count in (100, 1000) if quick else (7600, 100000):
        folder, stage = new_folder(), "postprocess, {:,} images".format(count)
        for i, logits in enumerate(random.standard_normal((count, 35)).astype("<f4")):
            logits.tofile(os.path.join(folder, "%06d_1.bin" % i))
        labels = random.randint(0, 2, (count, 35)).tolist()
        write_text("label.json", json.dumps({"%06d.png" % i: label for i, label in enumerate(labels)}))
        arguments = [folder, "label.json"]
        in_child(guides_postprocess, arguments)  # in a virtual machine, the first use of memory is slow
        yield from compare(quick, stage, "images/s", lambda: in_child(clock, postprocess.main, arguments) / count, {
            "the guide's way": (2, lambda: in_child(clock, guides_postprocess, arguments) / count)}, rounds=5)
    # A forked process would start with its parent's memory.
    theirs, ours = (in_child(peak_memory, main, arguments, method="spawn") for main in (guides_postprocess, postprocess.main))
    yield make_row(stage + ", memory", "the guide's way", "MB", 1, theirs, ours, theirs / ours)


def row_get_info(quick):
    folder, count = new_folder(), 1000 if quick else 100000
    for i in range(count):
        with open(os.path.join(folder, "%06d.bin" % i), "wb") as f:
            f.truncate(602112)
    arguments = [folder, "deepmar.info", "224", "224"]
    yield from compare(quick, "get_info, {:,} bins".format(count), "images/s", lambda: in_child(clock, get_info.main, arguments) / count, {
        "scandir + stat alone": (0.33, lambda: clock(lambda: [entry.stat() for entry in os.scandir(folder)]) / count)}, rounds=5)


# --- whole programs ---------------------------------------------------------------------------------------------------

def row_startup(quick):
    rows = []
    for path in glob.glob(ROOT + "/*.py") + glob.glob(ROOT + "/tools/*.py"):
        if os.path.basename(path) != "DeepMAR.py":  # it has no options
            rows += compare(quick, os.path.relpath(path, ROOT), "s", lambda: clock(run, sys.executable, path, "--help"), {
                "python3 -c 'import numpy'": (0.67, lambda: clock(run, sys.executable, "-c", "import numpy"))}, rounds=5)
    slowest = min(rows, key=lambda row: row["ratio"])
    note("of %d scripts, %s --help is the slowest" % (len(rows), slowest["stage"]))
    yield dict(slowest, stage="start-up, the slowest --help")


def make_sample(quick):
    """Makes the folder 'sample' with run_all.sh's sample. Returns the number of its images."""
    count = 16 if quick else 256  # at batch size 64, each of two cores has two batches
    script("tools/sample.py", "sample", "--images", count, "--keep")
    return count


def run_stages(work):
    accuracy = Path(work, "sample", "accuracy.txt").read_text().strip()
    for name, *arguments in (
            ("export_onnx.py", "sample/checkpoint.pth.tar", "deepmar_bs1.onnx", "1"),
            ("remove_pad.py", "deepmar_bs1.onnx", "deepmar_bs1_nopad.onnx"),
            ("preprocess_deepmar_pytorch.py", "sample/images", "input_bin", "sample/image.txt"),
            ("get_info.py", "./input_bin", "deepmar.info", "224", "224"),
            ("tools/benchmark.py", "-batch_size=1", "-om_path=deepmar_bs1_nopad.onnx", "-input_text_path=deepmar.info"),
            ("postprocess_deepmar_pytorch.py", "result/dumpOutput_device0", "sample/label.json", "--published", accuracy)):
        script(name, *arguments, cwd=work)


def row_run(quick):
    count = make_sample(quick)

    def new_work():
        work = new_folder()
        os.symlink(os.path.abspath("sample"), os.path.join(work, "sample"))
        return work

    def run_all(work):
        run("bash", os.path.join(ROOT, "run_all.sh"), "--work-dir", work, "--sample-size", count, "--backend", "onnxruntime",
            "--stage", 1, "--stop-stage", 7, env=dict(os.environ, python=sys.executable))
    yield from compare(quick, "run_all.sh, stages 1 to 7", "s", lambda: clock(run_all, new_work()), {
        "its stages alone": (0.95, lambda: clock(run_stages, new_work()))}, rounds=2)


# --- inference -------------------------------------------------------------------------------------------------------

def make_model(quick, batch):
    """Returns the path of the sample's ONNX model for a batch size."""
    path = os.path.abspath("bs%d.onnx" % batch)
    if not os.path.exists(path):
        make_sample(quick)
        script("export_onnx.py", "sample/checkpoint.pth.tar", "pad.onnx", batch)
        script("remove_pad.py", "pad.onnx", path)
    return path


def make_bins(quick):
    """Makes the folder 'input_bin' with the sample's bins. Returns their paths."""
    if not os.path.exists("input_bin"):
        make_sample(quick)
        script("preprocess_deepmar_pytorch.py", "sample/images", "input_bin", "sample/image.txt")
    return [os.path.abspath(os.path.join("input_bin", name)) for name in sorted(os.listdir("input_bin"))]


def rate_in(text, pattern):
    """Returns the seconds for an image, from the rate in a script's output."""
    return 1 / float(re.search(pattern, text).group(1))


def stage_6(model, batch, bins):
    """Returns the stand-in's seconds for an image, from end to end."""
    write_text("deepmar.info", "".join("%d %s 224 224\n" % item for item in enumerate(bins)))
    return rate_in(script("tools/benchmark.py", "-batch_size=%d" % batch, "-om_path=" + model, "-input_text_path=deepmar.info"),
                   r"e2e\] throughputRate: (\S+),")


def pure_inference(model, batch, images):
    """Returns the stand-in's seconds for an image, of the model alone."""
    return rate_in(script("tools/benchmark.py", "-batch_size=%d" % batch, "-om_path=" + model, "-round=%d" % (images // batch)),
                   r"ave_throughputRate = ([0-9.]+)")


def bare_session(model, batch, images):
    """Runs ONNX Runtime on the same batch, with all threads on each. Returns the seconds for an image, as the next functions do."""
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = CORES  # by itself, ONNX Runtime 1.10 would use half of the cores
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {"actual_input_1": random_batch(batch)}
    return measure(lambda times: [session.run(None, feed) for _ in range(times)], batch, images)


def plain_loop(model, batch, bins):
    """Reads bins, runs ONNX Runtime as it is by itself, and writes the results, one after the other."""
    import onnxruntime
    session, folder = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]), new_folder()

    def loop(times):
        for i in range(0, times * batch, batch):
            arrays = [np.fromfile(path, dtype=np.float32).reshape(3, 224, 224) for path in bins[i:i + batch]]
            logits, = session.run(None, {"actual_input_1": np.stack(arrays)})
            for path, row in zip(bins[i:i + batch], logits):
                row.tofile(os.path.join(folder, os.path.basename(path).replace(".bin", "_1.bin")))
    return measure(loop, batch, len(bins))


def pytorch(checkpoint, batch, images):
    import torch
    from DeepMAR import load_model
    network, tensor = load_model(checkpoint), torch.from_numpy(random_batch(batch))
    with torch.no_grad():
        return measure(lambda times: [network(tensor) for _ in range(times)], batch, images)


def openvino(model, batch, images):
    """Runs OpenVINO's own queue in throughput mode."""
    from openvino import AsyncInferQueue, Core
    queue = AsyncInferQueue(Core().compile_model(model, "CPU", {
        "PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_NUM_THREADS": CORES, "INFERENCE_PRECISION_HINT": "f32"}))
    array = random_batch(batch)

    def infer(times):
        for _ in range(times):
            queue.start_async({0: array})
        queue.wait_all()
    return measure(infer, batch, images)


def random_batch(batch):
    return np.random.RandomState(0).standard_normal((batch, 3, 224, 224)).astype(np.float32)


def measure(infer, batch, images):
    """Returns the seconds for an image. infer: a function that runs this many batches."""
    infer(1 if batch == 64 else 2)  # the first runs also allocate memory
    return clock(infer, images // batch) / images


def row_standin(quick):
    bins = make_bins(quick)
    for batch in (1, 8) if quick else (1, 8, 64):
        model, some = make_model(quick, batch), bins[:max(96, 4 * batch)]
        yield from compare(quick, "stand-in, batch %d" % batch, "images/s", lambda: stage_6(model, batch, some), {
            "bare session": (0.97, lambda: in_child(bare_session, model, batch, len(some))),
            "plain loop": (1.05 if batch == 1 else 1, lambda: in_child(plain_loop, model, batch, some))})


def row_inference(quick):
    images = 16 if quick else 32 * CORES
    for batch in 1, 8:
        model = make_model(quick, batch)
        yield from compare(quick, "inference, batch %d" % batch, "images/s", lambda: pure_inference(model, batch, images), {
            "PyTorch eager": (1.6, lambda: in_child(pytorch, "sample/checkpoint.pth.tar", batch, images))})


def row_int8(quick):
    make_bins(quick)
    model, images = make_model(quick, 1), 16 if quick else 64 * CORES
    text = script("tools/quantize.py", model, "input_bin", "int8.onnx", "--images", 8 if quick else 64, "--labels", "sample/label.json",
                  "--allow-drop")
    theirs, ours = (100 * float(number) for number in re.search(r"float32 ([0-9.]+), int8 ([0-9.]+)", text).groups())
    yield make_row("INT8, instance_acc", "float32", "%", 0.995, theirs, ours, ours / theirs)
    yield from compare(quick, "INT8, batch 1", "images/s", lambda: pure_inference("int8.onnx", 1, images), {
        "float32": (3, lambda: pure_inference(model, 1, images))})


def row_openvino(quick):
    if not find_spec("openvino"):
        note("no rows against OpenVINO, which is not installed (pip install openvino)")
        return
    make_bins(quick)
    images = 16 if quick else 32 * CORES
    script("tools/quantize.py", make_model(quick, 1), "input_bin", "qdq.onnx", "--qdq")
    for stage, batch, model in (("float32", 1, "bs1.onnx"), ("float32", 8, make_model(quick, 8)), ("INT8 (QDQ)", 1, "qdq.onnx")):
        yield from compare(quick, "%s, batch %d" % (stage, batch), "images/s", lambda: pure_inference(model, batch, images), {
            "OpenVINO's queue": (1, lambda: in_child(openvino, model, batch, images))})


def row_gallery(quick):
    if not find_spec("pyarrow"):
        note("no rows of the gallery, because pyarrow is not installed (pip install -r tools/requirements-gallery.txt)")
        return
    draw_images(quick)
    bins = make_bins(quick)

    def gallery(model):
        return rate_in(script("tools/gallery.py", "image.txt", "--root", "images", "--onnx", model, "--output", new_folder()),
                       r"([0-9.]+) images/s after the start")
    for batch in 1, 8:
        model = make_model(quick, batch)
        yield from compare(quick, "gallery, batch %d" % batch, "images/s", lambda: gallery(model), {
            "stand-in": (0.95, lambda: stage_6(model, batch, bins))})


ROWS = {name[len("row_"):]: function for name, function in list(globals().items()) if name.startswith("row_")}
BUSY_ROWS = ["standin", "openvino"]


# --- the result -------------------------------------------------------------------------------------------------------

def machine():
    """Returns the machine and the versions on which the figures are measured."""
    processor = re.search("model name\t: (.+)|$", Path("/proc/cpuinfo").read_text()).group(1)
    # After many deletions, ext4 creates files up to ten times slower for some minutes. At rest it needs 0.015 ms.
    creation = statistics.median(clock(os.mknod, "created%d" % i) for i in range(200))
    found = {"platform": platform.platform(), "processor": processor, "cores": CORES, "load": os.getloadavg()[0],
             "file_creation_ms": round(1000 * creation, 3), "python": platform.python_version()}
    for name in ("numpy", "PIL", "torch", "onnx", "onnxruntime", "openvino", "ray"):
        with contextlib.suppress(ImportError):
            found[name] = importlib.import_module(name).__version__
    return found


def print_line(texts):
    """Prints a line of a table in Markdown."""
    print("| %s |" % " | ".join(text.ljust(width) for text, width in zip(texts, [35, 25, 8, 8] + [9] * len(texts))), flush=True)


def print_head(results):
    """Prints the machines of one or several results and the head of their table."""
    texts = ["stage", "against", "unit", "goal"]
    for result in results:
        print(", ".join("%s %s" % item for item in result["machine"].items()) + "\n")
        texts += [result["machine"]["python"], "ours", "ratio", "met"]
    print_line(texts)
    print("|---|---|---|---|" + "--:|--:|--:|---|" * len(results))


def print_row(rows):
    """Prints the same row of each result, or None where a result lacks it."""
    first = next(filter(None, rows))
    texts = [first["stage"], first["against"], first["unit"], ">= %g" % first["goal"]]
    for row in rows:
        if row is None:
            texts += ["-"] * 4
        else:
            texts += [format(row[name], ",.0f" if row[name] >= 1000 else ".4g") for name in ("theirs", "ours")]
            texts += ["%.2f" % row["ratio"], "yes" if row["met"] else "NO"]
    print_line(texts)


def print_results(paths):
    """Prints the results in these files as one table."""
    results = [json.loads(Path(path).read_text()) for path in paths]
    print_head(results)
    found = [{(row["stage"], row["against"]): row for row in result["rows"]} for result in results]
    for key in {key: None for rows in found for key in rows}:
        print_row([rows.get(key) for rows in found])


def keep_busy(parent):
    while os.getppid() == parent:
        pass


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--quick", action="store_true", help="few images and rounds; the figures mean nothing")
    parser.add_argument("--busy", action="store_true", help="run a busy process on half of the cores (%s)" % ", ".join(BUSY_ROWS))
    parser.add_argument("--json", metavar="FILE", type=os.path.abspath, help="also write the result into this file")
    parser.add_argument("--markdown", nargs="+", metavar="FILE", help="only print the results in these files")
    args = parser.parse_args(argv)
    if args.busy and not set(args.only or []) <= set(BUSY_ROWS):
        parser.error("--busy only works with these rows: %s" % ", ".join(BUSY_ROWS))
    if args.markdown:
        print_results(args.markdown)
        return
    with tempfile.TemporaryDirectory(prefix="deepmar_bench") as folder:
        os.chdir(folder)
        result = {"quick": args.quick, "machine": in_child(machine), "rows": []}
        print_head([result])
        for _ in range(max(1, CORES // 2) if args.busy else 0):
            get_context("fork").Process(target=keep_busy, args=(os.getpid(),), daemon=True).start()  # it ends with the benchmark
        for name in args.only or (BUSY_ROWS if args.busy else ROWS):
            for row in ROWS[name](args.quick):
                if args.busy:
                    row["stage"] += ", busy"
                print_row([row])
                result["rows"].append(row)
    if args.json is not None:
        write_text(args.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    command(main)
