"""Stands in for atc: the options it knows, its checks of them in its order, its error codes, the files it leaves.

The codes, and the texts up to CANN 8.3, are the real one's. It is stricter in three things, so that a mistake of ours is found:
only opset 11, as the guide says, no Pad, and INT8 by AMCT's nodes alone.
"""
import os
import re
import sys

import aipp
import amct_onnx
import onnx
from om import FAIL, MODEL_DEF, TASKS, WEIGHTS, content, die, model_def

OPTIONS = ("model weight framework output input_format input_shape input_shape_range dynamic_batch_size dynamic_dims log "
           "soc_version insert_op_conf out_nodes output_type precision_mode op_select_implmode enable_small_channel "
           "buffer_optimize fusion_switch_file mode precision_mode_v2").split()
SOC = r"Ascend(310|310P[1-7]|310B[1-4]|610|910(A|B|ProA|ProB|PremiumA|B[1-4]|B2C|B4-1|_93\d\d))$"
FAILURES = {
    "atc": ["E40000: the compiler is out of memory", "TEFUSION: op[Conv2D_0] failed to compile"],
    "atc's operators": ["EZ3003: [PID: 4711] No supported Ops kernel and engine are found for [Conv_0], optype [Conv2D]."] + [
        "        build graph failed"] * 12}


def failed(*lines):
    die("ATC start working now, please wait for a moment.", "...", "ATC run failed, Please check the detail log, Try 'atc --help'"
        " for more information", *lines, status=1)


def invalid(option, reason):
    failed("E10001: Value [%s] for parameter [--%s] is invalid. Reason: %s" % (values[option], option, reason),
           "        Solution: Try again with a valid argument.")


values = {}
for argument in sys.argv[1:]:
    match = re.match("--([a-z0-9_]+)=(.*)$", argument)
    if not match or match.group(1) not in OPTIONS:
        failed("ERROR: unknown command line flag '%s'" % argument.lstrip("-").split("=")[0])
    values[match.group(1)] = match.group(2)
for name in ("soc_version", "output", "model"):
    if not values.get(name):
        failed("E10054: The requied parameter [--%s] for ATC is empty. Another possible reason is that the value of some "
               "parameter is not enclosed by quotation marks (\"\")." % name)  # as it is spelt there
for name in ("model", "output"):
    if not re.match("[A-Za-z0-9\u4e00-\u9fa5./_-]+$", values[name]):
        invalid(name, "The path can only contain 'a-z' 'A-Z' '0-9' '-' '.' '_' and chinese character")
if not os.path.isfile(values["model"]):
    invalid("model", "No such file or directory")
if not os.path.isdir(os.path.dirname(values["output"]) or "."):
    invalid("output", "No such file or directory")
if values["output"].endswith("/"):
    failed("E10022: Path [%s] for parameter [--output] does not include the file name." % values["output"])
if values.get("framework") != "5":
    failed("E10007: [--framework] is required. The value must be [0(Caffe) or 1(MindSpore) or 3(TensorFlow) or 5(Onnx)].")
if values.get("input_format", "NCHW") not in ("NCHW", "ND", "NCDHW"):
    invalid("input_format", "The value must be NCHW, ND or NCDHW in ONNX model.")
if values.get("log", "null") not in ("debug", "info", "warning", "error", "null"):
    failed("E10010: Value [%s] for parameter [--log] is invalid." % values["log"])
if values.get("precision_mode_v2", "fp16") not in ("fp16", "origin", "cube_fp16in_fp32out", "mixed_float16", "mixed_bfloat16"):
    invalid("precision_mode_v2", "The current value is not within the valid range.")
if not re.match(SOC, values["soc_version"]):
    failed("EE1000: Value [%s] is invalid for the SoC version." % values["soc_version"])
model = onnx.load(values["model"])
inputs = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
for part in values.get("input_shape", "").split(";"):
    match = re.match(r"(.+):(-?\d+(,-?\d+)*)$", part)
    if not match:
        failed("E10002: Value [%s] for parameter [--input_shape] is invalid." % part)
    name, shape = match.group(1), [int(size) for size in match.group(2).split(",")]
    if min(shape) <= 0:
        failed("E10011: Value [%s] for parameter [--input_shape] is invalid. Shape values must be positive integers." % part)
    if name not in inputs:
        failed("E10016: Opname [%s] specified in [--input_shape] is not found in the model." % name)
    if shape != inputs[name]:
        failed("the shape %s of [%s] is not the model's %s" % (shape, name, inputs[name]))
if [entry.version for entry in model.opset_import] != [11]:
    failed("E19010: No parser is registered for Op [%s, optype [ai.onnx::%d::%s]]."
           % (model.graph.node[0].name, model.opset_import[0].version, model.graph.node[0].op_type))
if any(node.op_type == "Pad" for node in model.graph.node):
    failed("a Pad is left in the model")  # atc itself would take it
if any(node.op_type == "QuantizeLinear" for node in model.graph.node):
    failed("a QuantizeLinear is in the model, which is for ONNX Runtime")
insert = aipp.settings(values, list(inputs.values())[0], failed)
with open("fusion_result.json", "w") as f:  # as atc does: its own, nothing to do with stage 7's
    f.write('{"graph_fusion": {}}')
if FAIL in FAILURES:
    failed(*FAILURES[FAIL])
if FAIL != "atc leaves nothing":
    weights = amct_onnx.runnable(model).SerializeToString()
    texts = {"soc_version": values["soc_version"], "atc_version": "7.5.0.1.129", "opp_version": "7.5.0.1.129",  # CANN 8.0.RC3's
             "atc_cmdline": " ".join(["atc"] + sys.argv[1:])}
    with open(values["output"] + ".om", "wb") as f:
        f.write(content([(MODEL_DEF, model_def(texts)), (WEIGHTS, weights), (TASKS, insert)]))
print("ATC start working now, please wait for a moment.\n...\nATC run success, welcome to the next use.")
