"""Opens ONNX Runtime sessions for stage 6 and the tools, and runs the pipeline from bins to results."""
import collections
import contextlib
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]
import providers
from common import Inline, can_start, cores, importing, one_line, progress, some
from postprocess_deepmar_pytorch import attributes_in, read_logits
from preprocess_deepmar_pytorch import SIZE, fault
from remove_pad import load

with importing():
    import numpy as np

CALLS_MB = 2048  # all concurrent calls together may use this much memory, in MB
# A call's memory as a multiple of its float32 input. Measured on ONNX Runtime 1.32 at batch sizes 8 to 64: 8.6 MB per image.
ACTIVATIONS = 14.3
TOLERANCE = 1e-3  # a provider's logits may differ from the CPU's by this fraction of the largest logit (the default)
AHEAD = 2    # this many batches are read ahead of inference
WRITE = 32   # this many results are written at once, because each wake-up of the writer disturbs inference on busy cores


def calls_at_once(threads, images, batch_size, height=SIZE, width=SIZE):
    """Returns how many calls of session.run() should run at the same time on the CPU.

    Threads that share a call wait for each other at each layer. If one of them loses its core to another process, all wait.
    So each thread gets its own call, within two limits. All calls together may use about CALLS_MB of memory. No thread may
    idle for more than a tenth of the run, as one of two threads would with three batches.
    """
    megabytes = batch_size * 3 * height * width * 4 * ACTIVATIONS / 1e6
    batches = -(-images // batch_size)
    calls = max(1, min(threads, batches, int(CALLS_MB / megabytes)))
    while -(-batches // calls) * calls > 1.1 * batches:
        calls -= 1
    return calls


def callers(calls):
    """Returns a pool of threads that call session.run(). If there is one for each core, each stays on a core of its own.

    Beside a busy process on one of two cores, Linux gives two threads that may move two thirds of the cores, but two that stay
    three quarters. Processes that share the cores by -threads would choose the same cores, so their threads may move.
    """
    places = sorted(os.sched_getaffinity(0))
    if calls != len(places):
        return ThreadPoolExecutor(calls)
    free = iter(places)

    def stay():
        with contextlib.suppress(OSError):  # a container may forbid it
            os.sched_setaffinity(0, {next(free)})  # of this thread alone
    return ThreadPoolExecutor(calls, initializer=stay)


def open_session(path, device_id=0, threads=None, calls=1, provider=None, exact=True):
    """Returns an ONNX Runtime session of a DeepMAR model.

    threads: CPU threads for all calls together (default: one for each core that this process may use). calls: how many calls
    will run at the same time. provider: an execution provider's name (default: the best on this machine). exact: see
    providers.add(). Raises OSError, or ValueError if the provider does not load or the file is not such a model: one input
    float32 [N,3,height,width], or uint8 [N,height,width,3] with AIPP, and one output float32 [N,attributes].
    """
    onnxruntime = providers.import_onnxruntime()
    load(path)  # it runs onnx's checker and refuses weights outside the file
    options = onnxruntime.SessionOptions()  # all other options are best at their defaults (tests/bench.py: session options)
    # By itself, ONNX Runtime 1.10 would use half of the cores, and every version ignores taskset.
    threads = threads or cores()
    pool = max(1, threads - calls + 1)  # the threads that make the calls compute too
    options.intra_op_num_threads = pool if can_start(pool) else 1
    options.log_severity_level = 3  # log only errors
    names = providers.default(device_id) if provider is None else \
        providers.add(options, provider, device_id, threads, calls, exact)
    try:
        session = onnxruntime.InferenceSession(path, options, providers=names)
    except Exception as error:  # ONNX Runtime's exceptions have no common class
        raise ValueError("%s: ONNX Runtime %s cannot load it%s: %s" % (
            path, onnxruntime.__version__, "" if provider is None else " with " + provider, one_line(error)))
    if provider not in (None, session.get_providers()[0]):
        raise ValueError("%s did not load; %s" % (provider, providers.NEEDS.get(provider, "its libraries may be missing")))
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or len(outputs) != 1 or len(inputs[0].shape) != 4 or len(outputs[0].shape) != 2 \
            or inputs[0].type not in ("tensor(float)", "tensor(uint8)") or outputs[0].type != "tensor(float)":
        raise ValueError("%s: is not a DeepMAR model (one input float32 [N,3,224,224], one output float32 [N,attributes]); "
                         "its inputs are %s, its outputs are %s"
                         % (path, [(i.name, i.type, i.shape) for i in inputs], [(o.name, o.type, o.shape) for o in outputs]))
    return session


def check_precision(session, path, batch, tolerance):
    """Raises ValueError if a provider's logits of a batch differ too much from the CPU provider's.

    tolerance: the allowed difference, as a fraction of the largest logit. Some providers silently use bfloat16 or float16.
    """
    name = session.get_providers()[0]
    if name == providers.CPU:
        return
    feed = {session.get_inputs()[0].name: batch}
    theirs, = session.run(None, feed)
    ours, = open_session(path, provider=providers.CPU).run(None, feed)
    difference, largest = np.abs(theirs - ours).max(), np.abs(ours).max()
    if not difference <= tolerance * largest:
        raise ValueError("%s: in the first batch, the logits of %s differ from the CPU's by up to %.3g. That is %.2g of the largest "
                         "logit, %.3g; up to %g is allowed. The provider may compute in float16 or bfloat16. If that is intended, "
                         "give a -tolerance above %.2g; otherwise choose another -provider"
                         % (path, name, difference, difference / largest, largest, tolerance, difference / largest))


def measure(session, batch, calls, seconds=1.0):
    """Measures a session on the same batch for this many seconds. Returns images per second."""
    feed = {session.get_inputs()[0].name: batch}
    calls = calls if session.get_providers()[0] in providers.SHARED else 1
    with callers(calls) as runner:
        def call_all():
            list(runner.map(lambda _: session.run(None, feed), range(calls)))
        call_all()  # this also allocates memory
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            call_all()
            count += calls * len(batch)
        return count / (time.perf_counter() - start)


def takes_uint8(session):
    """Returns whether a model takes pixels, uint8 [N,height,width,3], and normalises them itself (see tools/rehearse.py aipp)."""
    return session.get_inputs()[0].type == "tensor(uint8)"


def input_size(session):
    """Returns (batch size, height, width) of a model's input. Symbolic sizes become 1 and 224."""
    shape = session.get_inputs()[0].shape
    height, width = shape[1:3] if takes_uint8(session) else shape[2:]
    return tuple(size if isinstance(size, int) else default
                 for size, default in ((shape[0], 1), (height, SIZE), (width, SIZE)))


def empty_batch(session, batch_size, height, width):
    """Returns a batch of the model's input, filled with 0."""
    if takes_uint8(session):
        return np.zeros((batch_size, height, width, 3), np.uint8)
    return np.zeros((batch_size, 3, height, width), "<f4")


def check_shape(session, path, batch_size, height, width):
    """Raises ValueError unless the model takes this batch size and image size. A symbolic size takes any number."""
    shape, wanted = session.get_inputs()[0].shape, empty_batch(session, batch_size, height, width).shape
    if any(isinstance(has, int) and has != size for has, size in zip(shape, wanted)):
        raise ValueError("%s: its input is %s, not [%d,%d,%d,%d]; export it again with this batch size and size"
                         % ((path, shape) + wanted))


class Clock(object):
    """Adds up the seconds in which at least one thread is inside the with block."""

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
    """Yields run options with which Ctrl-C ends session.run() at once, not only at the end of its batch."""
    from onnxruntime import RunOptions
    options = RunOptions()
    if not can_start(1):  # without a watching thread, Ctrl-C waits for the batch
        yield options
        return
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)

    def watch():
        if os.read(receiver, 1):
            options.terminate = True

    watcher = threading.Thread(target=watch, daemon=True)  # a daemon, because Ctrl-C may come before the try below
    watcher.start()
    before = signal.set_wakeup_fd(sender)  # Python's own handler runs only after session.run()
    try:
        yield options
    finally:
        signal.set_wakeup_fd(before)
        os.close(sender)
        watcher.join()
        os.close(receiver)


def read_batch(bins, batch):
    """Reads the first bins [(name, path)] into a batch until it is full. Raises OSError or ValueError."""
    for (_, path), row in zip(bins, batch):
        with open(path, "rb", buffering=0) as f:
            if f.readinto(row) != row.nbytes:
                raise ValueError("%s: is shorter than %d bytes" % (path, row.nbytes))


class Pipeline(object):
    """Takes the bins [(name, path)] through a model: reads and checks them, infers, and writes folder/NAME_1.bin.

    The steps overlap: one thread reads, one writes, and several calls of session.run() run at the same time.
    """

    def __init__(self, session, bins, batch_size, height, width, folder, calls):
        self.session, self.folder, self.calls = session, folder, calls
        self.output, self.input = session.get_outputs()[0].name, session.get_inputs()[0].name
        self.batches = [bins[i:i + batch_size] for i in range(0, len(bins), batch_size)]
        self.buffers = [empty_batch(session, batch_size, height, width) for _ in range(min(calls + AHEAD, len(self.batches)))]
        self.clocks = {name: Clock() for name in ("e2e", "data read", "preprocess", "infer", "interface", "post")}
        self.seconds = []  # the time of each call

    def read(self, index):
        """Reads a batch into its buffer. Raises ValueError for a bin that has shrunk or holds NaN."""
        batch, buffer = self.batches[index], self.buffers[index % len(self.buffers)]
        with self.clocks["data read"]:
            read_batch(batch, buffer)
        with self.clocks["preprocess"]:
            buffer[len(batch):] = 0
            faults = [fault(row) for row in buffer[:len(batch)]]
            if any(faults):
                raise ValueError("%s in %s" % (next(filter(None, faults)), some(path for (_, path), why in zip(batch, faults) if why)))

    def infer(self, index, reading, options):
        """Waits until a batch is read. Returns its logits."""
        reading.result()
        with self.clocks["infer"], self.clocks["interface"]:
            return self.call(self.buffers[index % len(self.buffers)], options)

    def call(self, batch, options):
        start = time.perf_counter()
        logits, = self.session.run([self.output], {self.input: batch}, options)
        self.seconds.append(time.perf_counter() - start)
        return logits

    def write(self, results):
        with self.clocks["post"]:
            for name, logits in results:
                with open(os.path.join(self.folder, name + "_1.bin"), "wb") as f:
                    f.write(logits.astype("<f4").data)

    def run(self, report):
        """Runs all batches. Calls report(images) after each."""
        pool, call_pool = (ThreadPoolExecutor, callers) if can_start(self.calls + 3) else (Inline, Inline)
        with interruptible() as options, pool(1) as reader, pool(1) as writer, call_pool(self.calls) as runner:
            for warm_up in [runner.submit(self.call, buffer, options) for buffer in self.buffers[:self.calls]]:
                warm_up.result()  # the first calls also allocate memory
            del self.seconds[:]
            with self.clocks["e2e"]:
                running = collections.deque()

                def start(index):
                    running.append(runner.submit(self.infer, index, reader.submit(self.read, index), options))

                for index in range(len(self.buffers)):
                    start(index)
                results, writing = [], None
                for index, batch in enumerate(self.batches):
                    logits = running.popleft().result()
                    if index + len(self.buffers) < len(self.batches):
                        start(index + len(self.buffers))
                    results += [(name, row) for (name, _), row in zip(batch, logits)]
                    if len(results) >= WRITE or index == len(self.batches) - 1:
                        if writing:
                            writing.result()
                        writing, results = writer.submit(self.write, results), []
                    report(len(batch))
                writing.result()


def run(session, bins, batch_size, height, width, folder, report, calls=1):
    """Runs the model over the bins [(name, path)] and writes folder/NAME_1.bin for each, float32 [attributes].

    Zeros fill up the last batch, and their outputs are dropped. calls: how many calls of session.run() run at the same time.
    Calls report(images) after every batch. Returns {module: Clock} and the seconds of each call. Raises ValueError for a bin
    that has shrunk or holds NaN.
    """
    pipeline = Pipeline(session, bins, batch_size, height, width, folder, calls)
    pipeline.run(report)
    return pipeline.clocks, pipeline.seconds


def compute(session, bins, finite=True):
    """Runs the model over the bins [(name, path)] as stage 6 does. Returns the logits, float32 [bins, attributes].

    Raises ValueError for NaN or infinite logits if finite is set.
    """
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        with progress(len(bins), "image") as bar:
            run(session, bins, *input_size(session), folder, bar.update)
        results = [os.path.join(folder, name + "_1.bin") for name, _ in bins]
        return read_logits(results, attributes_in(results[0]), finite)
