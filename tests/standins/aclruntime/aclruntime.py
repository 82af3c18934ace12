"""Stands in for aclruntime, the extension module of ais_bench, with what its front ends of 2023 to 2025 call. It runs the
stand-ins' "OM" on ONNX Runtime, and tells which device was opened, as the module does."""
import ctypes
import os
import sys
import time

import numpy as np

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from om import Model, devices  # noqa: E402


class Milliseconds(float):
    """The time of a run, which the front end of 2023 takes as a number and later ones as a pair (start, end)."""

    def __iter__(self):
        return iter((0.0, float(self)))


class session_options(object):
    loop, log_level, acl_json_path = 1, 2, ""


class BaseTensor(object):
    """Memory of the host."""

    def __init__(self, address, size):
        self.data = ctypes.string_at(address, size)


class Tensor(object):
    """An array, on the host or the device."""

    def __init__(self, array):
        self.array = array

    @property
    def data(self):
        return self.array.tobytes()

    def __array__(self, dtype=None, copy=None):
        return self.array

    def to_device(self, device):
        pass

    def to_host(self):
        pass


class TensorDesc(object):
    def __init__(self, value, size=None):
        self.name, self.shape = value.name, value.shape
        self.size = self.realsize = size or 4 * int(np.prod(value.shape))


class Summary(object):
    def __init__(self):
        self.exec_time_list = []


class MemorySummary(object):
    H2D_time_list, D2H_time_list = [], []

    def reset(self):
        pass


class InferenceSession(object):
    def __init__(self, path, device, options):
        if device not in devices():
            print("[ERROR] aclrtSetDevice failed, device %d, errorCode 107001\n" % device, end="", flush=True)
            raise RuntimeError("open device %d failed" % device)
        print("[INFO] open device %d success\n" % device, end="", flush=True)  # the lines of several processes must not mix
        self.model, self._options, self._summary = Model(path), options, Summary()

    def get_inputs(self):
        return [TensorDesc(self.model.input, self.model.batch_size * self.model.bin_bytes)]

    def get_outputs(self):
        return [TensorDesc(value) for value in self.model.outputs]

    def options(self):
        return self._options

    def sumary(self):
        return self._summary

    def reset_sumaryinfo(self):
        self._summary.exec_time_list.clear()

    def set_staticbatch(self):
        pass

    def get_dym_aipp_input_exist(self):
        return 0

    def run(self, names, feeds):
        feed, = feeds
        for _ in range(self._options.loop):
            before = time.time()
            outputs = self.model.run_bytes(feed.data)
            self._summary.exec_time_list.append(Milliseconds(1000 * (time.time() - before)))
        return [Tensor(array) for array in outputs]

    def free_resource(self):
        pass

    @staticmethod
    def finalize():
        pass
