"""AIPP for the stand-ins: what atc refuses in the file of --insert_op_conf, and the arithmetic, in numpy's float16.

The file's message of ValidateParams has atc's code E10043; the texts of other failures are this stand-in's own.
"""
import json
import os
import re

import numpy as np

INTEGER, NUMBER, TRUTH = r"[-+]?\d+$", r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$", "(true|false)$"
FIELDS = {"aipp_mode": "(undefined|static|dynamic)$", "related_input_rank": INTEGER, "input_edge_idx": INTEGER,
          "max_src_image_size": INTEGER, "support_rotation": TRUTH, "cpadding_value": NUMBER,
          "input_format": "(YUV420SP_U8|XRGB8888_U8|RGB888_U8|YUV400_U8)$"}
FIELDS.update(dict.fromkeys("csc_switch rbuv_swap_switch ax_swap_switch single_line_mode crop resize padding".split(), TRUTH))
FIELDS.update(dict.fromkeys(
    "src_image_size_w src_image_size_h load_start_pos_w load_start_pos_h crop_size_w crop_size_h resize_output_w resize_output_h "
    "left_padding_size right_padding_size top_padding_size bottom_padding_size".split(), INTEGER))
FIELDS.update(("%s_chn_%d" % (name, i), pattern) for name, pattern in (("mean", INTEGER), ("min", NUMBER), ("var_reci", NUMBER))
              for i in range(4))
COLOURS = {"matrix_r%dc%d" % (i, j) for i in range(3) for j in range(3)}
COLOURS |= {"%s_bias_%d" % (name, i) for name in ("input", "output") for i in range(3)}
FIELDS.update(dict.fromkeys(COLOURS, INTEGER))


def settings(options, shape, failed):
    """The bytes that the "OM" holds of AIPP, b"" without it. Calls failed() with what atc would refuse; shape is the model's."""
    if options.get("enable_small_channel", "0") not in ("0", "1"):
        failed("E10006: Value [%s] for parameter [--enable_small_channel] is invalid." % options["enable_small_channel"])
    path = options.get("insert_op_conf", "")
    if not path:
        return b""
    if not os.path.isfile(path):
        failed("E10001: Value [%s] for parameter [--insert_op_conf] is invalid. Reason: No such file or directory" % path)
    with open(path) as f:
        tokens = re.findall(r"[{}:]|[^\s{}:]+", re.sub("#.*", "", f.read()))

    def unreadable(why):
        failed("Parse file [%s] through [google::protobuf::TextFormat::Parse] failed: %s" % (path, why))
    if tokens[:2] != ["aipp_op", "{"] or tokens[-1:] != ["}"]:
        unreadable("no aipp_op { ... }, or several, and the model has one input")
    fields, body = {}, tokens[2:-1]
    while body:
        name, colon, value = (body + ["", ""])[:3]
        del body[:3]
        if name not in FIELDS:
            unreadable('Message type "domi.AippOpParams" has no field named "%s".' % name)
        if colon != ":" or not re.match(FIELDS[name], value):
            unreadable('the value "%s" of "%s"' % (value, name))
        if name in fields and name.startswith(("var_reci", "matrix", "input_", "output_")) and name != "input_format":
            failed("E10043: AIPP config error: The parameter %s can not be configed repeatedly" % name)
        if name in fields:
            unreadable('Non-repeated field "%s" is specified multiple times.' % name)
        fields[name] = value
    if fields.get("aipp_mode", "undefined") == "undefined":
        failed("E10043: AIPP config error: When insert AIPP op, aipp_mode must be configured as static or dynamic")
    if fields["aipp_mode"] == "dynamic" or fields.get("crop") == "true":
        failed("this stand-in has static AIPP alone, without crop")
    if "input_format" not in fields:
        failed("E10043: AIPP config error: Input format of AIPP conf is undefined")
    nv12 = fields["input_format"] == "YUV420SP_U8"
    if not nv12 and fields["input_format"] != "RGB888_U8":
        failed("this stand-in has RGB888_U8 and YUV420SP_U8 alone")
    if nv12 != (fields.get("csc_switch") == "true"):
        failed("csc_switch %s: the model takes RGB, and the input is %s" % (fields.get("csc_switch"), fields["input_format"]))
    for name in sorted(COLOURS):
        if nv12 and name not in fields and not name.startswith("output"):  # atc would fill in a matrix of its own
            failed("%s is missing" % name)
        low, high = (-32677, 32676) if name.startswith("matrix") else (0, 255)
        if not low <= int(fields.get(name, 0)) <= high:
            failed("%s: %s is not from %d to %d" % (name, fields[name], low, high))
    if nv12 and any(int(fields.get("src_image_size_" + side, 0)) % 2 for side in "hw"):
        failed("EZ0034: When input_format is YUV420SP_U8, src_image_size_h and src_image_size_w must be even numbers")
    if int(fields.get("related_input_rank", 0)) != 0:
        failed("related_input_rank %s: the model has one input" % fields["related_input_rank"])
    for name, value in fields.items():
        if re.match("(mean|min)_chn", name) and not 0 <= float(value) <= 255:
            failed("%s: %s is not from 0 to 255" % (name, value))
    for name, size in zip(("src_image_size_h", "src_image_size_w"), shape[2:]):
        if int(fields.get(name, 0)) not in (0, size):
            failed("%s: %s is not the model's %d, and neither crop nor padding is on" % (name, fields[name], size))
    return json.dumps(fields).encode()


def bytes_of(fields, shape):
    """How many bytes an image has for a model of this shape [N,3,H,W]."""
    if fields is None:
        return 4 * 3 * shape[2] * shape[3]
    return shape[2] * shape[3] * 3 // (2 if fields["input_format"] == "YUV420SP_U8" else 1)


def from_nv12(data, fields, shape):
    """The RGB pixels, uint8 [N,H,W,3], as CANN's source of AIPP for the Ascend950 computes them, in float."""
    batch, _, height, width = shape
    data = np.frombuffer(data, np.uint8).reshape(batch, height * 3 // 2, width).astype(float)
    rows, columns = np.arange(height)[:, None], np.arange(width)
    yuv = [data[:, rows, columns]] + [data[:, height + rows // 2, columns // 2 * 2 + i] for i in (0, 1)]
    if fields.get("rbuv_swap_switch") == "true":
        yuv[1:] = yuv[:0:-1]
    yuv = [plane - int(fields["input_bias_%d" % i]) for i, plane in enumerate(yuv)]
    sums = [sum(int(fields["matrix_r%dc%d" % (i, j)]) * 2 * yuv[j] for j in range(3)) + 1 for i in range(3)]
    return np.rint(np.stack(sums, axis=3) / 512).clip(0, 255).astype(np.uint8)


def network_input(data, fields, shape):
    """What the network is given, of its shape [N,3,H,W], for the bytes of a batch: after AIPP where there are fields."""
    if fields is None:
        return np.frombuffer(data, "<f4").reshape(shape)
    if fields["input_format"] == "YUV420SP_U8":
        pixels = from_nv12(data, fields, shape)
    else:
        pixels = np.frombuffer(data, np.uint8).reshape(shape[0], shape[2], shape[3], 3)
        if fields.get("rbuv_swap_switch") == "true":
            pixels = pixels[..., ::-1]
    mean, low, factor = (np.array([fields.get("%s_chn_%d" % (name, i), default) for i in range(3)], np.float64).astype(np.float16)
                         for name, default in (("mean", 0), ("min", 0), ("var_reci", 1)))
    return np.ascontiguousarray(((pixels.astype(np.float16) - mean - low) * factor).astype(np.float32).transpose(0, 3, 1, 2))
