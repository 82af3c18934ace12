"""What the stand-ins of the toolkit's tools share. Their "OM" is laid out as a real one, but its weights are the ONNX model and its
tasks are AIPP's fields. FAIL in the environment names what is to go wrong."""
import json
import os
import struct
import sys

HEADER = 256
MODEL_DEF, WEIGHTS, TASKS = range(3)  # types of partitions
FAIL = os.environ.get("FAIL", "")


def die(*lines, **settings):
    """Ends as a tool does that has failed: its lines on its output, a status other than 0."""
    print("\n".join(lines), flush=True)
    sys.exit(settings.get("status", 255))


def devices():
    """The devices of the machine: as many as DEVICES says."""
    return range(int(os.environ.get("DEVICES", 1)))


def message(*parts):
    """A protobuf message of fields (number, content): bytes, or an integer."""
    def number(value):
        return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + number(value >> 7)

    return b"".join(number(field << 3) + number(value) if isinstance(value, int) else
                    number(field << 3 | 2) + number(len(value)) + value for field, value in parts)


def model_def(texts):
    """A ModelDef with a graph of one node and these attributes, and others as an OM has them."""
    values = dict({name: [(2, text.encode())] for name, text in texts.items()}, stream_num=[(3, 1)], om_info_list=[(1, b"")])
    return message((1, b"deepmar"), (2, 1), (7, message((1, b"deepmar"), (6, message((1, b"input"), (2, b"Data"))))),
                   *((11, message((1, name.encode()), (2, message(*value)))) for name, value in values.items()))


def content(partitions, old=False):
    """An OM's bytes, of partitions [(type, bytes)]; old: with the partition table of older versions."""
    rows, offset = [], 0
    for kind, data in partitions:
        rows.append(struct.pack("<III" if old else "<I4xQQ", kind, offset, len(data)))
        offset += len(data)
    body = struct.pack("<I" if old else "<I4x", len(rows)) + b"".join(rows) + b"".join(data for _, data in partitions)
    header = b"IMOD" + struct.pack("<II64xI4x32s", HEADER, 0x20000000, len(body), b"deepmar")
    return header.ljust(184, b"\0") + struct.pack("<Q", 0 if old else len(body)).ljust(HEADER - 184, b"\0") + body


def partition(data, kind):
    """The bytes of a partition of such an OM."""
    count, = struct.unpack_from("<I", data, HEADER)
    start = HEADER + 8 + 24 * count
    rows = {row[0]: row[1:] for row in struct.iter_unpack("<I4xQQ", data[HEADER + 8:start])}
    return data[start + rows[kind][0]:start + sum(rows[kind])]


class Model(object):
    """An "OM" on the CPU: batch_size, shape, run() and run_bytes(); raises RuntimeError where a file does not fit."""

    def __init__(self, path):
        with open(path, "rb") as f:
            data = f.read()
        if not data.startswith(b"IMOD"):
            raise RuntimeError("load model from file failed, model file is %s" % path)
        import aipp
        import onnxruntime
        self.network_input = aipp.network_input
        self.aipp = json.loads(partition(data, TASKS).decode() or "null")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(partition(data, WEIGHTS), options, providers=["CPUExecutionProvider"])
        self.input, self.outputs = self.session.get_inputs()[0], self.session.get_outputs()
        self.shape = self.input.shape
        self.batch_size = self.shape[0]
        self.bin_bytes = aipp.bytes_of(self.aipp, self.shape)

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
