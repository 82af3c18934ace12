"""What the stand-ins of the toolkit's tools share. Their "OM" is the ONNX model behind a magic number, so that stages which
were handed the ONNX model instead, or no model at all, are found out. FAIL in the environment names what is to go wrong."""
import os
import sys

MAGIC = b"IMOD"
FAIL = os.environ.get("FAIL", "")


def die(*lines, **settings):
    """Ends as a tool does that has failed: its lines on its output, a status other than 0."""
    print("\n".join(lines), flush=True)
    sys.exit(settings.get("status", 255))


def devices():
    """The devices of the machine: as many as DEVICES says."""
    return range(int(os.environ.get("DEVICES", 1)))


class Model(object):
    """An "OM" on the CPU: batch_size, shape, run() and run_bytes(); raises RuntimeError where a file does not fit."""

    def __init__(self, path):
        with open(path, "rb") as f:
            content = f.read()
        if not content.startswith(MAGIC):
            raise RuntimeError("load model from file failed, model file is %s" % path)
        import aipp
        import numpy as np
        import onnxruntime
        self.network_input = aipp.network_input
        self.aipp, content = aipp.split(content[len(MAGIC):])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self.input, self.outputs = self.session.get_inputs()[0], self.session.get_outputs()
        self.shape = self.input.shape
        self.batch_size = self.shape[0]
        self.bin_bytes = (1 if self.aipp else 4) * int(np.prod(self.shape[1:]))

    def run(self, paths):
        """Returns the outputs, float32 [len(paths), attributes], for at most batch_size bins."""
        data = bytearray(self.batch_size * self.bin_bytes)
        for i, path in enumerate(paths):
            with open(path, "rb") as f:
                content = f.read()
            if len(content) != self.bin_bytes:
                raise RuntimeError("size of %s is %d, the model's input needs %d" % (path, len(content), self.bin_bytes))
            data[i * self.bin_bytes:(i + 1) * self.bin_bytes] = content
        return self.run_bytes(data)[0][:len(paths)]

    def run_bytes(self, data):
        """Returns all outputs for the input of a whole batch."""
        return self.session.run(None, {self.input.name: self.network_input(data, self.aipp, self.shape)})
