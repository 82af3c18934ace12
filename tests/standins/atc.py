"""Stands in for atc (CANN 5.1): the options it knows, its checks of the model's input, its error codes, the files it leaves."""
import os
import re
import sys

import aipp
import onnx
from om import FAIL, MAGIC, die

OPTIONS = ("model weight framework output input_format input_shape input_shape_range dynamic_batch_size dynamic_dims log "
           "soc_version insert_op_conf out_nodes output_type precision_mode op_select_implmode enable_small_channel "
           "buffer_optimize fusion_switch_file mode").split()


def failed(*lines):
    die("ATC start working now, please wait for a moment.", "ATC run failed, Please check the detail log, Try 'atc --help'"
        " for more information", *lines, status=1)


values = {}
for argument in sys.argv[1:]:
    match = re.match("--([a-z_]+)=(.*)$", argument)
    if not match or match.group(1) not in OPTIONS:
        failed("ERROR: unknown command line flag '%s'" % argument.lstrip("-").split("=")[0])
    values[match.group(1)] = match.group(2)
for name in ("model", "framework", "output", "soc_version"):
    if not values.get(name):
        failed("E10004: Value for [--%s] is empty." % name)
if not os.path.isfile(values["model"]):
    failed("E10001: Value [%s] for parameter [--model] is invalid. Reason: file does not exist" % values["model"])
if values["framework"] != "5":
    failed("E10007: [--framework] is required. The value must be [0(Caffe) or 1(MindSpore) or 3(TensorFlow) or 5(Onnx)]")
if not re.match(r"Ascend(310|310P[1-7]|310B[1-4]|610|910[A-Z]?[1-4]?|910Pro[AB])$", values["soc_version"]):
    failed("E10001: Value [%s] for parameter [--soc_version] is invalid." % values["soc_version"])
if values.get("input_format", "NCHW") not in ("NCHW", "ND"):
    failed("E10001: Value [%s] for parameter [--input_format] is invalid." % values["input_format"])
if values.get("log", "null") not in ("debug", "info", "warning", "error", "null"):
    failed("E10001: Value [%s] for parameter [--log] is invalid." % values["log"])
if not os.path.isdir(os.path.dirname(values["output"]) or "."):
    failed("E10001: Value [%s] for parameter [--output] is invalid. Reason: path does not exist" % values["output"])
model = onnx.load(values["model"])
inputs = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
for part in values.get("input_shape", "").split(";"):
    name, _, shape = part.rpartition(":")
    if name not in inputs:
        failed("E10016: Opname [%s] specified in [--input_shape] is not found in the model" % name)
    if [int(size) for size in shape.split(",")] != inputs[name]:
        failed("E10014: the shape %s of [%s] is not the model's %s" % (shape, name, inputs[name]))
if [entry.version for entry in model.opset_import] != [11]:
    failed("E19010: No parser is registered for the operators of opset %s" % model.opset_import)
if any(node.op_type == "Pad" for node in model.graph.node):
    failed("a Pad is left in the model")  # atc itself would take it
insert = aipp.settings(values, list(inputs.values())[0], failed)
with open("fusion_result.json", "w") as f:  # as atc does: its own, nothing to do with stage 7's
    f.write('{"graph_fusion": {}}')
if FAIL == "atc":
    failed("E40000: the compiler is out of memory", "TEFUSION: op[Conv2D_0] failed to compile")
if FAIL != "atc leaves nothing":
    with open(values["model"], "rb") as f:
        content = f.read()
    with open(values["output"] + ".om", "wb") as f:
        f.write(MAGIC + insert + content)
print("ATC start working now, please wait for a moment.\n...\nATC run success, welcome to the next use.")
