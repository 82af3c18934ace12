"""The ONNX session behind stage 6 and the tools: which provider runs the model, and the pipeline from bins to results."""
import collections
import contextlib
import io
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]
from common import Inline, can_start, cores, importing, one_line, progress, some
from postprocess_deepmar_pytorch import attributes_in, read_logits
from preprocess_deepmar_pytorch import SIZE, fault
from remove_pad import load

with importing():
    import numpy as np

PROVIDERS = ["CANNExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]  # the best first
NEEDS = {"CANNExecutionProvider": "source CANN's set_env.sh, and see that npu-smi info lists the card",
         "CUDAExecutionProvider": "it needs a GPU with its driver, CUDA and cuDNN"}
AHEAD = 2    # batches that are read ahead of inference
WRITE = 32   # results written at a time: where inference keeps every core busy, few wake-ups disturb it least


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
        with importing(ends=False), contextlib.redirect_stderr(said):
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


def open_session(path, device_id=0, threads=None, provider=None):
    """Returns an ONNX Runtime session of a DeepMAR model on the best execution provider that this machine has.

    threads: of a call, on the CPU provider; by default one a core that this process may use. provider: the one to take, by its
    name. Raises OSError, or ValueError if the file is no such model: one input float32 [N,3,height,width], or uint8
    [N,height,width,3] with AIPP, one output float32 [N,attributes].
    """
    onnxruntime = import_onnxruntime()
    load(path)  # for its checks: onnx's checker, and no weights outside of the file
    options = onnxruntime.SessionOptions()  # all else is best as it is (tests/bench.py: session options)
    # ONNX Runtime 1.10 alone would take half of the cores, and every version ignores taskset's choice of them.
    threads = threads or cores()
    options.intra_op_num_threads = threads if can_start(threads) else 1
    options.log_severity_level = 3  # errors
    try:
        session = onnxruntime.InferenceSession(path, options, providers=[
            entry for entry in providers(device_id) if provider in (None, entry[0])] or ["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no base class of their own
        raise ValueError("%s: ONNX Runtime %s cannot load it: %s"
                         % (path, onnxruntime.__version__, one_line(error)))
    if provider not in (None, session.get_providers()[0]):
        raise ValueError("%s did not load; %s" % (provider, NEEDS.get(provider, "its libraries may be missing")))
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or len(outputs) != 1 or len(inputs[0].shape) != 4 or len(outputs[0].shape) != 2 \
            or inputs[0].type not in ("tensor(float)", "tensor(uint8)") or outputs[0].type != "tensor(float)":
        raise ValueError("%s: not a DeepMAR model (one input float32 [N,3,224,224], one output float32 [N,attributes]); "
                         "its inputs are %s, its outputs %s"
                         % (path, [(i.name, i.type, i.shape) for i in inputs], [(o.name, o.type, o.shape) for o in outputs]))
    return session


def takes_uint8(session):
    """Whether a model takes pixels, uint8 [N,height,width,3], and normalises them itself: AIPP's twin (tools/rehearse.py)."""
    return session.get_inputs()[0].type == "tensor(uint8)"


def input_size(session):
    """The (batch size, height, width) of a model's input; 1 and 224 where it takes any."""
    shape = session.get_inputs()[0].shape
    height, width = shape[1:3] if takes_uint8(session) else shape[2:]
    return tuple(size if isinstance(size, int) else default
                 for size, default in ((shape[0], 1), (height, SIZE), (width, SIZE)))


def empty_batch(session, batch_size, height, width):
    """A batch of the model's input, all 0."""
    if takes_uint8(session):
        return np.zeros((batch_size, height, width, 3), np.uint8)
    return np.zeros((batch_size, 3, height, width), "<f4")


def check_shape(session, path, batch_size, height, width):
    """Raises ValueError unless the model takes input of this batch size and size; symbolic sizes take any."""
    shape, wanted = session.get_inputs()[0].shape, empty_batch(session, batch_size, height, width).shape
    if any(isinstance(has, int) and has != size for has, size in zip(shape, wanted)):
        raise ValueError("%s: its input is %s, not [%d,%d,%d,%d]; export it again with this batch size and size"
                         % ((path, shape) + wanted))


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
    if not can_start(1):  # then Ctrl-C does wait for the batch
        yield options
        return
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
    clocks = {name: Clock() for name in ("e2e", "data read", "preprocess", "infer", "interface", "post")}
    input_name, output_name = session.get_inputs()[0].name, session.get_outputs()[0].name
    batches = [bins[i:i + batch_size] for i in range(0, len(bins), batch_size)]
    buffers = [empty_batch(session, batch_size, height, width) for _ in range(min(calls + AHEAD, len(batches)))]

    def read(index):
        batch, buffer = batches[index], buffers[index % len(buffers)]
        with clocks["data read"]:
            for (_, path), row in zip(batch, buffer):
                with open(path, "rb", buffering=0) as f:
                    if f.readinto(row) != row.nbytes:
                        raise ValueError("%s: is shorter than %d bytes" % (path, row.nbytes))
        with clocks["preprocess"]:
            buffer[len(batch):] = 0
            faults = [fault(row) for row in buffer[:len(batch)]]
            if any(faults):
                raise ValueError("%s in %s" % (next(filter(None, faults)), some(path for (_, path), why in zip(batch, faults) if why)))

    def write(results):
        with clocks["post"]:
            for name, logits in results:
                with open(os.path.join(folder, name + "_1.bin"), "wb") as f:
                    f.write(logits.astype("<f4").data)

    def infer(index, reading):
        reading.result()
        with clocks["infer"], clocks["interface"]:
            return session.run([output_name], {input_name: buffers[index % len(buffers)]}, options)[0]

    pool = ThreadPoolExecutor if can_start(calls + 3) else Inline
    with interruptible() as options, pool(1) as reader, pool(1) as writer, pool(calls) as runner:
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


def compute(session, bins, finite=True):
    """Runs the model over the bins [(name, path)] as stage 6 does; returns the logits, float32 [bins, attributes].

    Raises ValueError for NaN or infinite logits, if they must be finite.
    """
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        with progress(len(bins), "image") as bar:
            run(session, bins, *input_size(session), folder, bar.update)
        results = [os.path.join(folder, name + "_1.bin") for name, _ in bins]
        return read_logits(results, attributes_in(results[0]), finite)
