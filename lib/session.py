"""A session of a model, an ONNX model on ONNX Runtime or an OM on a card: opened, checked, and given batches."""
import collections
import contextlib
import itertools
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from lib import providers
from lib.acl import Om, is_om
from lib.bins import fault, list_bins
from lib.images import LAYOUTS, MEAN, NV12, SIZE, STD, empty_input
from lib.machine import check_threads, cores
from lib.models import is_twin, load, metadata
from lib.names import composed
from lib.script import importing, one_line, progress, some

with importing():
    import numpy as np

CALLS_MB = 2048  # all concurrent calls together may use this much memory, in MB
# A call's memory as a multiple of its float32 input. Measured on ONNX Runtime 1.32 at batch sizes 8 to 64: 8.6 MB per image.
ACTIVATIONS = 14.3
TOLERANCE = 1e-3  # a provider's logits may differ from the CPU's by this fraction of the largest logit (the default)
PREFETCH = 2     # this many batches are read ahead of inference
# Kinds of a model's input by its type and its number of dimensions.
INPUTS = {("tensor(float)", 4): "float32", ("tensor(uint8)", 4): "uint8", ("tensor(uint8)", 3): "nv12"}
SIZE_ASSUMED = "neither the model nor its metadata fix the images' size; %d x %d is assumed" % (SIZE, SIZE)
RESULTS_PER_WRITE = 32  # because each wake-up of the writer disturbs inference on busy cores


# --- opening a model --------------------------------------------------------------------------------------------------

def session_options(threads, twin=False):
    """Returns ONNX Runtime's options for this many CPU threads. Raises ValueError if they cannot be started.

    twin: whether the model is an INT8 twin, see is_twin(). Its QuantizeLinear nodes are computed as they stand. ONNX Runtime would
    replace them by INT8 operators of its own, whose results differ from version to version.
    """
    check_threads(threads)
    options = providers.import_onnxruntime().SessionOptions()  # all other options are best at their defaults
    options.intra_op_num_threads = threads  # by itself, ONNX Runtime 1.10 would use half of the cores, and all versions ignore taskset
    options.log_severity_level = 3  # log only errors
    if twin:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


def cpu_session(model, threads=1):
    """Returns a session of any ONNX model, an onnx.ModelProto, a path or bytes, on the CPU. Raises ONNX Runtime's errors."""
    proto = None if isinstance(model, (str, bytes)) else model
    options = session_options(threads, proto is not None and is_twin(proto))
    options.log_severity_level = 4  # the exception already reports an error
    model = model if proto is None else proto.SerializeToString()
    return providers.import_onnxruntime().InferenceSession(model, options, providers=[providers.CPU])


def open_session(path, device_id=0, threads=None, calls=1, provider=None, exact=True, twin=None):
    """Returns a session of a DeepMAR model: an ONNX Runtime session, or for an OM an Om, for which only path and device_id count.

    threads: CPU threads for all calls together (default: one for each core that this process may use). calls: how many calls
    will run at the same time. provider: an execution provider's name (default: the best on this machine). exact: see
    providers.add(). twin: is_twin() of the model, if models.load() has checked it already. Raises OSError, or ValueError if the
    provider does not load or check_interface() refuses the model.
    """
    if is_om(path):
        session = Om(path, device_id)
        check_interface(session, path)
        return session
    onnxruntime = providers.import_onnxruntime()
    if twin is None:
        twin = is_twin(load(path))  # it runs onnx's checker and refuses weights outside the file
    threads = threads or cores()
    options = session_options(max(1, threads - calls + 1), twin)  # the threads that make the calls compute too
    names = providers.default(device_id) if provider is None else \
        providers.add(options, provider, device_id, threads, calls, exact)
    try:
        session = onnxruntime.InferenceSession(path, options, providers=names)
    except Exception as error:  # ONNX Runtime's exceptions have no common class
        raise ValueError("%s: ONNX Runtime %s cannot load it%s: %s" % (
            path, onnxruntime.__version__, "" if provider is None else " with " + provider, one_line(error)))
    if provider not in (None, session.get_providers()[0]):
        raise ValueError("%s did not load; %s" % (provider, providers.REMEDIES.get(provider, "its libraries may be missing")))
    check_interface(session, path)
    return session


def check_interface(session, path):
    """Raises ValueError for a model that the tools would feed wrongly.

    It must have one input float32 [N,3,height,width], or with AIPP uint8 [N,height,width,3] or NV12 [N,1.5 x height,width], and one
    output float32 [N,attributes]. Where its metadata describe the input and the attributes, they must say the same as the model and
    stage 4.
    """
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or len(outputs) != 1 or len(outputs[0].shape) != 2 \
            or (inputs[0].type, len(inputs[0].shape)) not in INPUTS or outputs[0].type != "tensor(float)":
        raise ValueError("%s: is not a DeepMAR model (one input float32 [N,3,224,224], one output float32 [N,attributes]); "
                         "its inputs are %s, its outputs are %s; export it with export_onnx.py"
                         % (path, [(i.name, i.type, i.shape) for i in inputs], [(o.name, o.type, o.shape) for o in outputs]))
    kind, shape, attributes = input_kind(session), inputs[0].shape, outputs[0].shape[1]
    if kind is None:
        raise ValueError("%s: its input is uint8 %s, but its metadata do not say that it is NV12, and by which standard; make it with "
                         "tools/rehearse.py aipp --nv12" % (path, text_of(shape)))
    if kind not in NV12 and shape[1 if kind == "float32" else 3] != 3:
        raise ValueError("%s: its input is %s %s, but the tools give float32 [N,3,height,width], or uint8 [N,height,width,3] to a "
                         "model with AIPP; export it with export_onnx.py, or with the 3 in that place (tf2onnx: --inputs-as-nchw %s)"
                         % (path, kind, text_of(shape), inputs[0].name))
    described = described_by(session, path)
    names = len(described.get("attributes", []))
    if names and isinstance(attributes, int) and names != attributes:
        raise ValueError("%s: its metadata name %d attributes, but its output has %d; export it again" % (path, names, attributes))
    given = {"layout": LAYOUTS[kind], "mean": list(MEAN), "std": list(STD),
             "size": list(input_size(session)[1:])}
    for key, value in given.items():
        if described.get(key, value) != value:
            raise ValueError("%s: its metadata say %s %s, but the tools would give it %s; export it again, or correct its metadata"
                             % (path, key, described[key], value))


def described_by(session, path="the model"):
    """Returns the description in a model's metadata, or next to an OM. Raises ValueError if it is damaged."""
    return session.description if isinstance(session, Om) else metadata(session.get_modelmeta().custom_metadata_map, path)


def text_of(shape):
    """Returns a shape as text, with a ? for a size without a name."""
    return "[%s]" % ",".join("?" if size is None else str(size) for size in shape)


def check_precision(session, path, batch, tolerance):
    """Raises ValueError if a provider's logits of a batch differ too much from the CPU provider's.

    tolerance: the allowed difference, as a fraction of the largest logit. Some providers silently use bfloat16 or float16.
    """
    name = session.get_providers()[0]
    if name == providers.CPU:
        return
    theirs, ours = infer(session, batch), infer(open_session(path, provider=providers.CPU), batch)
    difference, largest = np.abs(theirs - ours).max(), np.abs(ours).max()
    if not difference <= tolerance * largest:
        raise ValueError("%s: in the first batch, the logits of %s differ from the CPU's by up to %.3g. That is %.2g of the largest "
                         "logit, %.3g; up to %g is allowed. The provider may compute in float16 or bfloat16. If that is intended, "
                         "give a -tolerance above %.2g; otherwise choose another -provider"
                         % (path, name, difference, difference / largest, largest, tolerance, difference / largest))


def input_kind(session):
    """Returns the kind of a model's input, a key of LAYOUTS. All but "float32" are for a model with AIPP (tools/rehearse.py aipp).

    NV12's standard is in the model's metadata. Without it, the kind is None.
    """
    value = session.get_inputs()[0]
    kind = INPUTS[value.type, len(value.shape)]
    if kind == "nv12":
        layout = described_by(session).get("layout")
        kind = next((kind for kind in NV12 if LAYOUTS[kind] == layout), None)
    return kind


def fixed_size(session):
    """Returns (batch size, height, width) of a model's input. What neither the input nor the model's metadata fix is None."""
    shape = session.get_inputs()[0].shape
    kind = input_kind(session)
    height, width = shape[2:] if kind == "float32" else shape[1:3]
    if kind in NV12 and isinstance(height, int):
        height = height * 2 // 3
    described = described_by(session).get("size", (None, None))
    return tuple(size if isinstance(size, int) else other
                 for size, other in ((shape[0], None), (height, described[0]), (width, described[1])))


def input_size(session):
    """Returns (batch size, height, width) of a model's input. What is not fixed becomes 1, 224 and 224."""
    return tuple(size or default for size, default in zip(fixed_size(session), (1, SIZE, SIZE)))


def attributes_of(session):
    """Returns the number of a model's attributes."""
    count = session.get_outputs()[0].shape[1]
    return count if isinstance(count, int) else infer(session, empty_batch(session, *input_size(session))).shape[1]


def bins_of(folder, session):
    """Returns [(name, path)] of the bins in a folder, which must be of the type that the session's model takes."""
    _, height, width = input_size(session)
    return [(composed(name[:-len(".bin")]), os.path.join(folder, name)) for name in list_bins(folder, width, height, input_kind(session))]


def empty_batch(session, batch_size, height, width):
    """Returns a batch of the model's input, filled with 0."""
    return empty_input((height, width), input_kind(session), (batch_size,))


def check_shape(session, path, batch_size, height, width):
    """Raises ValueError unless the model takes this batch size and image size. What is not fixed may be any number."""
    fixed, wanted = fixed_size(session), (batch_size, height, width)
    if any(has not in (None, size) for has, size in zip(fixed, wanted)):
        kind = input_kind(session)
        has, wanted = (text_of((n, 3, h, w) if kind == "float32" else (n, h, w, 3) if kind == "uint8" else (n, h * 3 // 2, w))
                       for n, h, w in (fixed, wanted))
        raise ValueError("%s: its input is %s, not %s; give this size, or export it again" % (path, has, wanted))


def calls_at_once(threads, images, batch_size, height=SIZE, width=SIZE):
    """Returns how many calls of session.run() should run at the same time on the CPU.

    Threads that share a call wait for each other at each layer. If one of them loses its core to another process, all wait.
    So each thread gets its own call, with two exceptions. All calls together may use about CALLS_MB of memory. No thread may
    idle for more than a tenth of the run, as one of two threads would with three batches.
    """
    megabytes = batch_size * 3 * height * width * 4 * ACTIVATIONS / 1e6
    batches = -(-images // batch_size)
    calls = max(1, min(threads, batches, int(CALLS_MB / megabytes)))
    while -(-batches // calls) * calls > 1.1 * batches:
        calls -= 1
    return calls


def callers(calls):
    """Returns a pool of threads that call session.run(). If there is one for each core, each is pinned to one core.

    Measured with another process busy on one of two cores: two free threads get 2/3 of the CPU time, two pinned threads get 3/4.
    Several processes that share the cores (-threads) would pin to the same cores, so their threads stay free.
    """
    free = sorted(os.sched_getaffinity(0))
    if calls != len(free):
        return ThreadPoolExecutor(calls)
    free = iter(free)

    def pin():
        with contextlib.suppress(OSError):  # a container may forbid it
            os.sched_setaffinity(0, {next(free)})  # of this thread alone
    return ThreadPoolExecutor(calls, initializer=pin)


# --- running batches --------------------------------------------------------------------------------------------------

def infer(session, batch):
    """Returns what a model gives for a batch, float32 [N,attributes]. Raises ValueError if it cannot compute the batch, or if it
    gives another shape than it states."""
    options = []
    if not isinstance(session, Om):
        import onnxruntime
        options.append(onnxruntime.RunOptions())
        options[0].log_severity_level = 4  # the exception already reports an error
    try:
        outputs, = session.run(None, {session.get_inputs()[0].name: batch}, *options)
    except Exception as error:  # ONNX Runtime's exceptions have no common class
        raise ValueError("the model cannot compute a batch of %s: %s" % (text_of(batch.shape), one_line(error)))
    attributes = session.get_outputs()[0].shape[1]
    if outputs.ndim != 2 or len(outputs) != len(batch) or isinstance(attributes, int) and outputs.shape[1] != attributes:
        raise ValueError("the model gives %s for a batch of %d images, not %s; export it again"
                         % (text_of(outputs.shape), len(batch), text_of([len(batch), attributes])))
    return outputs


def run_batches(session, items, fill, calls=1, call=None, shape=None, runner=None, reader=None):
    """Runs a model over any number of items. Yields (items, reasons, logits) of each batch, in order.

    A reason is None, or says why an item has no input. items: an iterable. fill(item, row) writes an item's input into a row of
    a batch and returns None, or why it cannot; the row is then 0. Zeros also fill up the last batch. call(batch) returns the
    logits, float32 [N,attributes] (default: infer()). calls: how many of these run at the same time. shape: (batch size,
    height, width) (default: the model's). runner, reader: the pools of threads for call() and fill(), if the caller has them.
    Raises what items, fill and call raise.
    """
    shape = shape or input_size(session)
    call = call or (lambda batch: infer(session, batch))

    def read(item, row):
        why = fill(item, row)
        if why is not None:
            row[...] = 0
        return why

    def filled(buffer, filling):
        reasons = [future.result() for future in filling]
        buffer[len(reasons):] = 0
        return reasons, call(buffer)[:len(reasons)]

    items, free, running = iter(items), [empty_batch(session, *shape) for _ in range(calls + PREFETCH)], collections.deque()
    with contextlib.ExitStack() as pools:
        runner = runner or pools.enter_context(callers(calls))
        reader = reader or pools.enter_context(ThreadPoolExecutor(1))
        try:
            while True:
                batch = list(itertools.islice(items, shape[0])) if free else []
                if batch:
                    buffer = free.pop()
                    filling = [reader.submit(read, item, row) for item, row in zip(batch, buffer)]
                    running.append((batch, buffer, filling, runner.submit(filled, buffer, filling)))
                elif running:
                    batch, buffer, _, result = running[0]
                    reasons, logits = result.result()
                    free.append(buffer)
                    running.popleft()
                    yield batch, reasons, logits
                else:
                    return
        finally:
            for _, _, filling, result in running:  # after an error, nobody needs the batches that were read ahead
                for future in filling + [result]:
                    future.cancel()


def read_bin(path, row):
    """Reads a bin into a row of a batch. Raises OSError or ValueError."""
    with open(path, "rb", buffering=0) as f:
        if f.readinto(row) != row.nbytes:
            raise ValueError("%s: is shorter than %d bytes" % (path, row.nbytes))


def check_bin(path, row):
    """Raises ValueError if a row of a batch, read from path, holds NaN or values of another type."""
    why = fault(row)
    if why:
        raise ValueError("%s in %s" % (why, path))


def compute(session, bins, finite=True):
    """Runs the model over the bins [(name, path)] as stage 6 does. Returns the logits, float32 [bins, attributes].

    Raises ValueError for NaN or infinite logits if finite is set.
    """
    def fill(item, row):
        read_bin(item[1], row)
        check_bin(item[1], row)

    parts = []
    with progress(len(bins), "image") as bar:
        for batch, _, logits in run_batches(session, bins, fill):
            parts.append(logits)
            bar.update(len(batch))
    logits = np.concatenate(parts)
    bad = ~np.isfinite(logits).all(axis=1)
    if finite and bad.any():
        raise ValueError("%d of %d results hold NaN or infinite logits: %s"
                         % (bad.sum(), len(bins), some(path for (_, path), wrong in zip(bins, bad) if wrong)))
    return logits


# --- stage 6 ----------------------------------------------------------------------------------------------------------

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


def run(session, bins, shape, folder, advance, calls=1):
    """Runs the model over the bins [(name, path)] and writes folder/NAME_1.bin for each, float32 [attributes].

    shape: (batch size, height, width). calls: how many calls of session.run() run at the same time. Reading, inference and writing
    overlap. Calls advance(images) after every batch. Returns {module: Clock} and the seconds of each call. Raises ValueError for
    a bin that has shrunk or holds NaN.
    """
    seconds = []
    clocks = {module: Clock() for module in ("e2e", "data read", "preprocess", "infer", "interface", "post")}

    def fill(item, row):
        with clocks["data read"]:
            read_bin(item[1], row)
        with clocks["preprocess"]:
            check_bin(item[1], row)

    def call(batch):
        with clocks["infer"], clocks["interface"]:
            start = time.perf_counter()
            logits = infer(session, batch)
            seconds.append(time.perf_counter() - start)
        return logits

    def write(results):
        with clocks["post"]:
            for image, logits in results:
                with open(os.path.join(folder, image + "_1.bin"), "wb") as f:
                    f.write(logits.astype("<f4").data)

    with callers(calls) as runner, ThreadPoolExecutor(1) as writer:
        warm_up = empty_batch(session, *shape)  # the first calls also allocate memory
        list(runner.map(lambda _: infer(session, warm_up), range(calls)))
        with clocks["e2e"]:
            results, writing = [], None
            for batch, _, logits in run_batches(session, bins, fill, calls, call, shape, runner):
                results += [(image, row) for (image, _), row in zip(batch, logits)]
                if len(results) >= RESULTS_PER_WRITE:
                    if writing:
                        writing.result()
                    writing, results = writer.submit(write, results), []
                advance(len(batch))
            if writing:
                writing.result()
            write(results)
    return clocks, seconds
