"""Stage 6 without a card: stands in for benchmark.x86_64 and runs the ONNX model on ONNX Runtime.

    python3 tools/benchmark.py -model_type=vision -batch_size=1 -device_id=0 -om_path=deepmar_bs1_nopad.onnx \\
        -input_width=224 -input_height=224 -input_text_path=deepmar.info -useDvpp=false -output_binary=true
    python3 tools/benchmark.py -round=20 -om_path=deepmar_bs1_nopad.onnx -device_id=0 -batch_size=1

Takes the options of the benchmark binary and writes what it writes: result/dumpOutput_device<ID>/NAME_1.bin for each bin of
the info file and result/perf_vision_batchsize_<N>_device_<ID>.txt; with -round, pure inference on random input,
result/PureInfer_perf_of_<model>_in_device_<ID>.txt. Reading, inference and writing overlap. The folder of results is
replaced as a whole, so it never holds those of an earlier run.
"""
import argparse
import collections
import contextlib
import io
import os
import re
import signal
import sys
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
if __name__ == "__main__":  # until main(), Ctrl-C ends it at once: a library's import makes other errors of it
    interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)
import numpy as np
from preprocess_deepmar_pytorch import replaced_folder
from remove_pad import importing, load, whole_file

PROVIDERS = ["CANNExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]  # the best first
NEEDS = {"CANNExecutionProvider": "source CANN's set_env.sh, and see that npu-smi info lists the card",
         "CUDAExecutionProvider": "it needs a GPU with its driver, CUDA and cuDNN"}
AHEAD = 2    # batches that are read ahead of inference
WRITE = 32   # results written at a time: where inference keeps every core busy, few wake-ups disturb it least


def cores():
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def calls_at_once(batch_size, threads):
    """How many calls of session.run() these threads serve best, an equal share each, on the CPU provider.

    Threads that share a single image wait for each other at each layer; with an image each they were 4 to 10 % faster on
    two cores (tests/bench.py: stand-in, batch 1). With larger batches that made no difference, and takes more memory.
    """
    return threads if batch_size == 1 else 1


def import_onnxruntime():
    """Returns the module onnxruntime; raises ImportError, with the remedy where it was built for NumPy 1 and finds NumPy 2."""
    said = io.StringIO()
    try:
        with importing(), contextlib.redirect_stderr(said):
            import onnxruntime
        return onnxruntime
    except ImportError:
        if "compiled using NumPy 1" in said.getvalue():  # at the head of NumPy's page about it, with a traceback
            said = io.StringIO()
            raise ImportError("the installed ONNX Runtime was built for NumPy 1 and cannot be imported with NumPy %s; run: "
                              "%s -m pip install 'numpy<2'" % (np.__version__, sys.executable))
        raise
    finally:
        sys.stderr.write(said.getvalue())


def providers(device_id=0):
    """The execution providers that this ONNX Runtime was built with, for a session to try: the best first, with their options."""
    available = import_onnxruntime().get_available_providers()
    return [(name, {} if name.startswith("CPU") else {"device_id": str(device_id)}) for name in PROVIDERS if name in available]


def provider_note(session, available):
    """Returns "CANNExecutionProvider did not load" where the CPU runs the model but ONNX Runtime was built for more; else ''."""
    better = [name for name in PROVIDERS[:-1] if name in available]
    return better[0] + " did not load" if better and session.get_providers()[0] == PROVIDERS[-1] else ""


def open_session(path, device_id=0, threads=None):
    """Returns an ONNX Runtime session of a DeepMAR model on the best execution provider that this machine has.

    threads: of a call, on the CPU provider; by default one a core that this process may use. Raises OSError, or
    ValueError if the file is no such model: one input float32 [N,3,height,width], one output float32 [N,attributes].
    """
    onnxruntime = import_onnxruntime()
    load(path)  # for its checks: onnx's checker, and no weights outside of the file
    options = onnxruntime.SessionOptions()  # all else is best as it is (tests/bench.py: session options)
    # ONNX Runtime 1.10 alone would take half of the cores, and every version ignores taskset's choice of them.
    options.intra_op_num_threads = threads or cores()
    options.log_severity_level = 3  # errors
    try:
        session = onnxruntime.InferenceSession(path, options, providers=providers(device_id))
    except Exception as error:  # ONNX Runtime's exceptions have no base class of their own
        raise ValueError("%s: ONNX Runtime %s cannot load it: %s"
                         % (path, onnxruntime.__version__, str(error).replace("\n", " ")))
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or len(outputs) != 1 or len(inputs[0].shape) != 4 or len(outputs[0].shape) != 2 \
            or {inputs[0].type, outputs[0].type} != {"tensor(float)"}:
        raise ValueError("%s: not a DeepMAR model (one input float32 [N,3,224,224], one output float32 [N,attributes]); "
                         "its inputs are %s, its outputs %s"
                         % (path, [(i.name, i.type, i.shape) for i in inputs], [(o.name, o.type, o.shape) for o in outputs]))
    return session


def check_shape(session, path, batch_size, height, width):
    """Raises ValueError unless the model takes input [batch_size,3,height,width]; symbolic sizes take any."""
    shape = session.get_inputs()[0].shape
    for has, wanted in zip(shape, (batch_size, 3, height, width)):
        if isinstance(has, int) and has != wanted:
            raise ValueError("%s: its input is %s, not [%d,3,%d,%d]; export it again with this batch size and size"
                             % (path, shape, batch_size, height, width))


def read_info(path, height, width):
    """Returns the bins of an info file, [(name, path)]; raises OSError or ValueError, as for a bin of the wrong size."""
    size = 4 * 3 * height * width
    try:
        with open(path, encoding="utf-8") as f:
            lines = f.read().split("\n")
    except UnicodeDecodeError as error:
        raise ValueError("%s: is not UTF-8 text (byte %d)" % (path, error.start))
    bins, seen, bad = [], set(), []
    for line in lines:
        if not line.strip():
            continue
        match = re.match(r"(\d{1,9}) ([^\0]+) (\d{1,9}) (\d{1,9})$", line)
        if not match or int(match.group(1)) != len(bins):
            raise ValueError("%s: line %d is not 'INDEX PATH WIDTH HEIGHT' with INDEX %d; get_info.py writes this file: %r"
                             % (path, len(bins) + 1, len(bins), line[:200]))
        if (int(match.group(3)), int(match.group(4))) != (width, height):
            raise ValueError("%s: line %d is for %s x %s, not %d x %d"
                             % (path, len(bins) + 1, match.group(3), match.group(4), width, height))
        name = os.path.splitext(os.path.basename(match.group(2)))[0]
        if name in seen:
            raise ValueError("%s: two bins are called %s, so their results would be one file" % (path, name))
        seen.add(name)
        bins.append((name, match.group(2)))
        if not os.path.isfile(match.group(2)):
            bad.append("%s (no such file)" % match.group(2))
        elif os.path.getsize(match.group(2)) != size:
            bad.append("%s (%d bytes)" % (match.group(2), os.path.getsize(match.group(2))))
    if bad:
        raise ValueError("%s: %d of %d bins are not float32 [3,%d,%d] (%d bytes): %s%s"
                         % (path, len(bad), len(bins), height, width, size, ", ".join(bad[:5]), ", ..." * (len(bad) > 5)))
    if not bins:
        raise ValueError("%s: names no bin; get_info.py writes this file" % path)
    return bins


class Clock(object):
    """Adds up the seconds in which at least one thread is in the with block."""

    def __init__(self):
        self.seconds, self.inside, self.lock = 0.0, 0, threading.Lock()

    def __enter__(self):
        with self.lock:
            if self.inside == 0:
                self.start = time.perf_counter()
            self.inside += 1

    def __exit__(self, *_):
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                self.seconds += time.perf_counter() - self.start


@contextlib.contextmanager
def interruptible():
    """Yields run options with which session.run() ends at Ctrl-C, instead of with its batch."""
    from onnxruntime import RunOptions
    options = RunOptions()
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)

    def watch():
        if os.read(receiver, 1):
            options.terminate = True

    watcher = threading.Thread(target=watch, daemon=True)  # Ctrl-C may come before the try below
    watcher.start()
    before = signal.set_wakeup_fd(sender)  # Python's own handler only runs once session.run() has returned
    try:
        yield options
    finally:
        signal.set_wakeup_fd(before)
        os.close(sender)
        watcher.join()
        os.close(receiver)


def run(session, bins, batch_size, height, width, folder, report, calls=1):
    """Runs the model over the bins [(name, path)] and writes folder/NAME_1.bin for each, float32 [attributes].

    The last batch is filled up with zeros for the model; their outputs are dropped. So many calls of session.run() are
    under way at a time. Calls report(images) after every batch. Returns {module: Clock}. Raises ValueError for a bin that
    has shrunk or holds NaN.
    """
    from concurrent.futures import ThreadPoolExecutor
    clocks = {name: Clock() for name in ("e2e", "data read", "preprocess", "infer", "interface", "post")}
    input_name, output_name = session.get_inputs()[0].name, session.get_outputs()[0].name
    batches = [bins[i:i + batch_size] for i in range(0, len(bins), batch_size)]
    buffers = [np.zeros((batch_size, 3, height, width), "<f4") for _ in range(min(calls + AHEAD, len(batches)))]

    def read(index):
        batch, buffer = batches[index], buffers[index % len(buffers)]
        with clocks["data read"]:
            for (_, path), row in zip(batch, buffer):
                with open(path, "rb", buffering=0) as f:
                    if f.readinto(row) != row.nbytes:
                        raise ValueError("%s: is shorter than %d bytes" % (path, row.nbytes))
        with clocks["preprocess"]:
            buffer[len(batch):] = 0
            if not np.isfinite(buffer).all():
                bad = [path for (_, path), row in zip(batch, buffer) if not np.isfinite(row).all()]
                raise ValueError("NaN or infinite values in %s%s" % (", ".join(bad[:5]), ", ..." * (len(bad) > 5)))

    def write(results):
        with clocks["post"]:
            for name, logits in results:
                with open(os.path.join(folder, name + "_1.bin"), "wb") as f:
                    f.write(logits.astype("<f4").data)

    def infer(index, reading):
        reading.result()
        with clocks["infer"], clocks["interface"]:
            return session.run([output_name], {input_name: buffers[index % len(buffers)]}, options)[0]

    with interruptible() as options, ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer, \
            ThreadPoolExecutor(calls) as runner:
        session.run([output_name], {input_name: buffers[0]}, options)  # the first run also allocates memory
        with clocks["e2e"]:
            running = collections.deque()

            def start(index):
                running.append(runner.submit(infer, index, reader.submit(read, index)))

            for index in range(len(buffers)):
                start(index)
            results, writing = [], None
            for index, batch in enumerate(batches):
                logits = running.popleft().result()
                if index + len(buffers) < len(batches):
                    start(index + len(buffers))
                results += [(name, row) for (name, _), row in zip(batch, logits)]
                if len(results) >= WRITE or index == len(batches) - 1:
                    if writing:
                        writing.result()
                    writing, results = writer.submit(write, results), []
                report(len(batch))
            writing.result()
    return clocks


def perf_lines(clocks, images):
    """The perf file of the benchmark binary: rates in samples per second, e2e latency in ms, others in ms per sample."""
    rate = {name: images / clock.seconds for name, clock in clocks.items()}
    return ["[e2e] throughputRate: %.6g, latency: %.6g" % (rate["e2e"], 1000 * clocks["e2e"].seconds),
            "[data read] throughputRate: %.6g, moduleLatency: %.6g" % (rate["data read"], 1000 / rate["data read"]),
            "[preprocess] throughputRate: %.6g, moduleLatency: %.6g" % (rate["preprocess"], 1000 / rate["preprocess"]),
            "[infer] throughputRate: %.6g, Interface throughputRate: %.6g, moduleLatency: %.6g"
            % (rate["infer"], rate["interface"], 1000 / rate["infer"]),
            "[post] throughputRate: %.6g, moduleLatency: %.6g" % (rate["post"], 1000 / rate["post"])]


def write_text(path, text):
    """Writes a small file whole or not at all."""
    with whole_file(path) as temporary, open(temporary, "w") as f:
        f.write(text)


def progress(total, unit):
    """A progress bar on a terminal, once the work has taken two seconds."""
    from tqdm import tqdm
    return tqdm(total=total, unit=unit, disable=None, delay=2, leave=False)


def vision(session, calls, args):
    """Runs the model over the info file's bins; returns what to print."""
    bins = read_info(args.input_text_path, args.input_height, args.input_width)
    folder = os.path.join("result", "dumpOutput_device%d" % args.device_id)
    with replaced_folder(folder) as partial, progress(len(bins), "image") as bar:
        clocks = run(session, bins, args.batch_size, args.input_height, args.input_width, partial, bar.update,
                     calls)
    lines = perf_lines(clocks, len(bins))
    write_text("result/perf_vision_batchsize_%d_device_%d.txt" % (args.batch_size, args.device_id),
               "\n".join(lines) + "\n")
    return lines + ["[INFO] %d results in %s" % (len(bins), folder)]


def pure_inference(session, calls, args):
    """Runs the model on random input; returns what to print."""
    from concurrent.futures import ThreadPoolExecutor
    shape = [args.batch_size, 3] + [size if isinstance(size, int) else 224 for size in session.get_inputs()[0].shape[2:]]
    feed = {session.get_inputs()[0].name: np.random.RandomState(0).standard_normal(shape).astype(np.float32)}
    clock = Clock()

    def infer(_):
        with clock:
            session.run(None, feed, options)

    with interruptible() as options, progress(args.round, "round") as bar, ThreadPoolExecutor(calls) as runner:
        session.run(None, feed, options)
        for _ in runner.map(infer, range(args.round)):
            bar.update()
    images = args.round * args.batch_size
    line = "ave_throughputRate = %.6gsamples/s, ave_latency = %.6gms" % (images / clock.seconds,
                                                                        1000 * clock.seconds / images)
    model = os.path.splitext(os.path.basename(args.om_path))[0]
    path = "./result/PureInfer_perf_of_%s_in_device_%d.txt" % (model, args.device_id)
    os.makedirs("result", exist_ok=True)
    write_text(path, line + "\n")
    return ["[INFO] PureInfer result saved in %s" % path, line]


def positive(text):
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)

    def option(name, **settings):
        parser.add_argument("-" + name, "--" + name, **settings)

    option("model_type", choices=["vision"], default="vision", help="(default: vision)")
    option("batch_size", type=positive, required=True, help="images per inference; the model's own")
    option("device_id", type=int, default=0, help="names the result files; the card, if the provider has one (default: 0)")
    option("om_path", required=True, help="the model: the ONNX file that the OM would be made from")
    option("input_width", type=positive, default=224, help="in pixels (default: 224)")
    option("input_height", type=positive, default=224, help="in pixels (default: 224)")
    option("input_text_path", help="the info file")
    option("useDvpp", choices=["false"], default="false", help="images are decoded by stage 4 (default: false)")
    option("output_binary", choices=["true"], default="true", help="results are .bin files (default: true)")
    option("round", type=positive, help="pure inference on random input, so many times")
    option("threads", type=positive, help="threads of the CPU provider; at batch size 1 each has an image of its own "
                                          "(default: one a core)")
    option("strict", action="store_true", help="an error where ONNX Runtime has a card's provider that does not load")
    args = parser.parse_args(argv)
    if (args.input_text_path is None) == (args.round is None):
        parser.error("give -input_text_path for inference on data, or -round for pure inference")
    if args.device_id < 0:
        parser.error("-device_id cannot be negative")
    if args.om_path.endswith(".om"):
        parser.error("-om_path: %s is an OM, which only the card runs; give the ONNX model" % args.om_path)

    threads = args.threads or cores()
    calls = calls_at_once(args.batch_size, threads)
    session = open_session(args.om_path, args.device_id, threads // calls)
    check_shape(session, args.om_path, args.batch_size, args.input_height, args.input_width)
    import onnxruntime
    provider = session.get_providers()[0]
    note = provider_note(session, onnxruntime.get_available_providers())
    if note:
        remedy = NEEDS[note.split()[0]]
        if args.strict:
            raise ValueError("%s; %s" % (note, remedy))
        print("[WARN] %s, so the CPU runs the model; %s" % (note, remedy))
    print("[INFO] ONNX Runtime %s, %s%s, %s" % (onnxruntime.__version__, provider, " (%s)" % note if note else "", args.om_path),
          flush=True)
    if provider != "CPUExecutionProvider":  # a device takes one call at a time
        calls = 1
    for line in (vision if args.round is None else pure_inference)(session, calls, args):
        print(line)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupt)
    try:
        main()
    except (OSError, ValueError, ImportError) as error:
        sys.exit("benchmark.py: error: %s" % error)
    except KeyboardInterrupt:
        sys.exit("benchmark.py: interrupted; no file is half written")
