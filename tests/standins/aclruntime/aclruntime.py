"""Stands in for aclruntime, the extension module of ais_bench, with what its front ends of 2023 to 2025 call. It runs the
stand-ins' "OM" on ONNX Runtime, and tells which device was opened, as the module does. AIS_BENCH_YEAR: as which year it behaves.
ACLRUNTIME_CALLS: a file for the calls, one per line.

It is stricter than the module in one thing: a session may only be used in the thread that made it. That of 2023 sets the device's
context in that thread alone, later ones in each call.
"""
import ctypes
import enum
import os
import re
import sys
import threading
import time

import numpy as np

YEAR, CALLS = int(os.environ.get("AIS_BENCH_YEAR", 2025)), os.environ.get("ACLRUNTIME_CALLS")
sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from om import Model, devices  # noqa: E402


def say(text):
    """Prints as C does, past Python's sys.stdout, and at once, so that the lines of several processes do not mix."""
    os.write(1, text.encode() + b"\n")


def call(*words, thread=None):
    """Notes a call. Refuses one that needs a context, in another thread than the session's."""
    if CALLS:
        with open(CALLS, "a") as f:
            print(*words, file=f)
    if thread not in (None, threading.get_ident()):
        say("[ERROR] aclrtGetCurrentContext failed, errorCode 107002")
        raise RuntimeError("no context in this thread")


class Milliseconds(float):
    """The time of a run, which the front end of 2023 takes as a number and later ones as a pair (start, end)."""

    def __iter__(self):
        return iter((0.0, float(self)))


class session_options(object):
    loop, log_level, acl_json_path = 1, 2, ""

    def __init__(self):
        call("session_options")


class dtype(enum.IntEnum):
    float32, float16, uint8 = 0, 1, 4


class BaseTensor(object):
    """Memory of the host."""

    def __init__(self, address, size):
        call("BaseTensor", size)
        self.data = ctypes.string_at(address, size)


class Tensor(object):
    """An array, on the host or the device."""

    def __init__(self, array, thread=None):
        self.array, self.thread, self.on_host = array, thread, thread is None

    @property
    def data(self):
        return self.array.tobytes()

    def __array__(self, dtype=None, copy=None):
        if not self.on_host:
            raise RuntimeError("tensor is in npu. can't convert to numpy array")
        return self.array

    def to_device(self, device):
        pass

    def to_host(self):
        call("to_host", thread=self.thread)
        self.on_host = True


class TensorDesc(object):
    def __init__(self, value, size=None):
        floats = 4 * int(np.prod(value.shape))
        self.name, self.shape, self.datatype = value.name, value.shape, dtype.float32
        self.size = self.realsize = size or floats
        if self.size != floats:  # AIPP takes pixels
            self.shape, self.datatype = [self.shape[i] for i in (0, 2, 3, 1)], dtype.uint8


class Summary(object):
    def __init__(self):
        self.exec_time_list = []


class MemorySummary(object):
    H2D_time_list, D2H_time_list = [], []

    def reset(self):
        pass


class InferenceSession(object):
    def __init__(self, path, device, options):
        call("InferenceSession", os.path.splitext(path)[1], device, "loop", options.loop, "log_level", options.log_level)
        if YEAR > 2024 and (not re.match(r"[\w./-]+\.om$", os.path.abspath(path), re.ASCII) or os.path.islink(path)
                            or os.stat(path).st_mode & 0o022):
            say("[ERROR] model path illegal, please check.")
            raise RuntimeError("please check model path")
        if device not in devices():
            say("[ERROR] aclrtSetDevice failed, device %d, errorCode 107001" % device)
            raise RuntimeError("open device %d failed" % device)
        if YEAR < 2024 or options.log_level <= 2:
            say("[INFO] open device %d success" % device)
        self.model, self._options, self._summary, self.thread = Model(path), options, Summary(), threading.get_ident()

    def get_inputs(self):
        call("get_inputs")
        return [TensorDesc(self.model.input, self.model.batch_size * self.model.bin_bytes)]

    def get_outputs(self):
        call("get_outputs")
        return [TensorDesc(value) for value in self.model.outputs]

    def options(self):
        return self._options

    def sumary(self):
        return self._summary

    def reset_sumaryinfo(self):
        self._summary.exec_time_list.clear()

    def set_staticbatch(self):
        call("set_staticbatch", thread=self.thread)

    def get_dym_aipp_input_exist(self):
        return 0

    def run(self, names, feeds):
        call("run", *names, thread=self.thread)
        feed, = feeds
        for _ in range(self._options.loop):
            before = time.time()
            outputs = self.model.run_bytes(feed.data)
            self._summary.exec_time_list.append(Milliseconds(1000 * (time.time() - before)))
        return [Tensor(array, self.thread) for array in outputs]

    if YEAR > 2023:
        def free_resource(self):
            call("free_resource", thread=self.thread)
            del self.model

        @staticmethod
        def finalize():
            call("finalize")
    else:
        def finalize(self):
            call("finalize", thread=self.thread)
            del self.model
