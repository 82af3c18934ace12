"""aclruntime, the extension module of ais_bench: runs an OM on a card, with the calls of ais_bench's own InferSession.

An Om has the face of an ONNX Runtime session, as far as lib.session uses it. Nothing here needs onnx or onnxruntime.
"""
import atexit
import collections
import functools
import os
import queue
import shutil
import sys
import tempfile
import threading
from concurrent.futures import Future

from lib import om
from lib.models import description
from lib.script import importing, one_line

with importing():
    import numpy as np

PROVIDER = "aclruntime"
WARNINGS = 3  # aclruntime's log level; InferSession's 2 also reports each success
TYPES = {0: ("tensor(float)", 4), 4: ("tensor(uint8)", 1)}  # by ACL's number of a type: ONNX Runtime's name, bytes

Value = collections.namedtuple("Value", "name type shape")  # an input or output, as ONNX Runtime describes it


def is_om(path):
    """Returns whether a file is an OM, by its name or its first bytes."""
    if path.endswith(".om"):
        return True
    try:
        with open(path, "rb") as f:
            return f.read(4) == b"IMOD"
    except OSError:
        return False  # whoever opens it as an ONNX model says so


# --- the thread of all sessions -----------------------------------------------------------------------------------------

class Thread(threading.Thread):
    """The one thread of this process that opens, runs and frees sessions, because aclruntime sets a device's context in the thread
    that opens a session. It frees them when the process ends."""

    def __init__(self):
        super(Thread, self).__init__(daemon=True)
        self.tasks, self.opened = queue.SimpleQueue(), []
        self.start()
        atexit.register(self.call, self.end)

    def run(self):
        while True:
            future, function, arguments = self.tasks.get()
            try:
                future.set_result(function(*arguments))
            except BaseException as error:
                future.set_exception(error)

    def call(self, function, *arguments):
        """Returns what a function returns in the thread, or raises what it raises there."""
        future = Future()
        self.tasks.put((future, function, arguments))
        return future.result()

    def open(self, path, device_id):
        import aclruntime
        options = aclruntime.session_options()
        options.log_level, options.loop = WARNINGS, 1
        session = aclruntime.InferenceSession(path, device_id, options)
        session.set_staticbatch()
        return session

    def compute(self, session, names, batch):
        import aclruntime
        outputs = session.run(names, [aclruntime.BaseTensor(batch.__array_interface__["data"][0], batch.nbytes)])
        for tensor in outputs:
            tensor.to_host()
        return [np.array(tensor) for tensor in outputs]

    def end(self):
        while self.opened:
            last = self.opened.pop()
            session, last.session = last.session, None
            if hasattr(session, "free_resource"):  # since 2024; before, the last reference to a session frees it
                session.free_resource()
            if not self.opened:
                session.finalize()  # this ends all of ACL


@functools.lru_cache(maxsize=None)
def thread():
    """Returns the thread. With it, file descriptor 1 becomes that of stderr, and Python's stdout keeps the output.

    aclruntime prints its messages on C's stdout, some only when the process ends, but results alone belong there.
    """
    before = sys.stdout
    before.flush()
    sys.stdout = open(os.dup(1), "w", encoding=before.encoding, errors=before.errors)
    os.dup2(2, 1)
    return Thread()


# --- a session ------------------------------------------------------------------------------------------------------------

class Om(object):
    """A session of an OM. description: of the JSON file next to it, {} without one.

    Raises OSError, or ValueError if aclruntime is missing, cannot open the OM, or if its batch size is dynamic.
    """

    def __init__(self, path, device_id=0):
        if not os.path.isfile(path):
            raise FileNotFoundError("%s: no such file; give the OM" % path)
        try:
            with importing(ends=False):
                import aclruntime  # noqa: F401 - see whether it is there
        except ImportError as error:
            raise ValueError("%s: an OM runs with ais_bench's aclruntime, which cannot be imported (%s); run: source CANN's set_env.sh, "
                             "and %s -m pip install aclruntime" % (path, one_line(error), sys.executable))
        with open(path, "rb") as f, tempfile.NamedTemporaryFile(suffix=".om") as copy:
            shutil.copyfileobj(f, copy)  # since 2025, aclruntime refuses links, many names, and files that the group may write
            copy.flush()
            try:
                session = thread().call(thread().open, copy.name, device_id)
            except Exception as error:  # aclruntime raises RuntimeError, or TypeError for what pybind11 cannot convert
                chip = om.read(path).get("soc_version")
                raise ValueError("%s: aclruntime cannot open it on device %d: %s%s; see its [ERROR] lines"
                                 % (path, device_id, one_line(error), " (the OM is for %s)" % chip if chip else ""))
        self.session = session
        thread().opened.append(self)
        self.description = description(path) if path.endswith(".om") else {}
        self.description.pop("layout", None)  # the network's; an OM with AIPP takes another one
        self.inputs, self.outputs = ([self.value(path, tensor) for tensor in tensors]
                                     for tensors in (session.get_inputs(), session.get_outputs()))

    def value(self, path, tensor):
        """Returns the Value of one of aclruntime's descriptions of a tensor."""
        kind, size = TYPES.get(int(tensor.datatype), ("ACL type %d" % int(tensor.datatype), None))
        shape = list(tensor.shape)
        if min(shape, default=1) < 1:
            raise ValueError("%s: the shape of %s is dynamic, %s; convert the model with one batch size, as run_all.sh does"
                             % (path, tensor.name, shape))
        if kind == "tensor(uint8)" and len(shape) == 4 and shape[1] == 3 != shape[3]:
            shape = [shape[0], shape[2], shape[3], 3]  # the network's; AIPP takes the pixels of an image together
        if size and tensor.size != size * np.prod(shape):
            raise ValueError("%s: %s takes %d bytes, which is not %s %s; of AIPP, only the input_format RGB888_U8 will do"
                             % (path, tensor.name, tensor.size, kind, shape))
        return Value(tensor.name, kind, shape)

    def get_inputs(self):
        return self.inputs

    def get_outputs(self):
        return self.outputs

    def get_providers(self):
        return [PROVIDER]

    def run(self, _, feeds):
        """Returns all outputs. feeds: {the input's name: its array}. Any thread may call it. Raises aclruntime's errors."""
        batch, = feeds.values()
        return thread().call(thread().compute, self.session, [value.name for value in self.outputs], np.ascontiguousarray(batch))
