"""Stands in for amct_onnx: `amct_onnx calibration` with the options of its --help, what its guide and protobuf file forbid, and what it
writes. The deploy model has AMCT's nodes and types: AscendQuant, int8 weights, int32 biases, AscendDequant.

The arithmetic is AMCT's (ARQ, IFMR), on at most THINNED values of a tensor in each batch. The texts of its errors are this stand-in's
own. It is stricter in some things, so that a mistake of ours is found: only opset 11, whole names of options, one float32 input.
"""
import argparse
import json
import os
import re

import numpy as np
import onnx
from om import FAIL, die
from onnx import helper, numpy_helper

PATH = "[A-Za-z0-9\u4e00-\u9fa5./_-]+$"
FIELDS = {"batch_num": r"\d+$", "activation_offset": "(true|false)$", "do_fusion": "(true|false)$", "joint_quant": "(true|false)$",
          "skip_layers": '".*"$', "skip_layer_types": '".*"$', "skip_fusion_layers": '".*"$'}  # of calibration_config_onnx.proto
THINNED = 20000
LAYERS = "Conv", "Gemm", "MatMul", "ConvTranspose", "AveragePool"


def failed(text):
    die("[ERROR][AMCT]%s" % text, status=1)


def read_settings(path):
    """The fields of a quant.cfg, protobuf text: {name: [values]}."""
    found = {}
    with open(path) as f:
        for line in filter(None, (line.split("#")[0].strip() for line in f)):
            name, colon, value = (part.strip() for part in line.partition(":"))
            if name not in FIELDS or not colon:
                failed('%s: Message type "AMCTConfig" has no field named "%s", or this stand-in has none' % (path, name))
            if not re.match(FIELDS[name], value):
                failed('%s: the value %s of "%s"' % (path, value, name))
            if name in found and (not name.startswith("skip") or value in found[name]):
                failed('%s: "%s" is there twice, or repeats %s' % (path, name, value))
            found.setdefault(name, []).append(value.strip('"'))
    return found


def batches(args, shape, count):
    """The first count batches of the bins, in the order of their names."""
    names = sorted(os.listdir(args.data_dir))
    if len(names) < count or not count:
        failed("%d batches are wanted, but %s holds %d files" % (count, args.data_dir, len(names)))
    for name in names[:count]:
        path = os.path.join(args.data_dir, name)
        if not name.endswith(".bin") or os.path.getsize(path) != 4 * np.prod(shape):
            failed("%s: cannot be reshaped to %s" % (path, shape))
        yield np.fromfile(path, "<f4").reshape(shape)


def int8_weights(model, layers):
    """{layer: (int8 weights, their scale)} of those that have weights."""
    arrays, found = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}, {}
    for name, node in layers.items():
        if len(node.input) > 1:
            weight = arrays[node.input[1]]
            axes = tuple(range(1, weight.ndim)) if node.op_type == "Conv" else None
            low, high = weight.min(axis=axes, keepdims=True), weight.max(axis=axes, keepdims=True)
            scale = np.where(-low > high, -low / np.float32(128), high / np.float32(127))
            found[name] = np.rint(weight / scale).clip(-128, 127).astype(np.int8), scale
    return found


def search(values):
    """The (scale, offset) of an activation."""
    values = np.sort(np.concatenate(values))
    rank = values.size - int(0.999999 * values.size)
    high, low = max(values[-rank], np.float32(0)), min(values[rank - 1], np.float32(0))
    ends = high * np.arange(0.7, 1.3, 0.01).astype(np.float32)
    scales = [(end - low) / np.float32(255) or np.float32(1) for end in ends]
    losses = [((np.rint(values.clip(low, end) / scale) * scale - values) ** 2).mean(dtype=float) for end, scale in zip(ends, scales)]
    scale = scales[np.argmin(losses)]
    return scale, -np.rint(low / scale) - 128


def calibrate(model, layers, weights, images):
    """{tensor: (scale, offset)} of what the layers take, in the network with these weights."""
    import onnxruntime
    network, tensors = onnx.ModelProto(), {node.input[0]: [] for node in layers.values()}
    network.CopyFrom(model)
    own = {layers[name].input[1]: values * scale for name, (values, scale) in weights.items()}
    for tensor in network.graph.initializer:
        if tensor.name in own:
            tensor.CopyFrom(numpy_helper.from_array(own[tensor.name], tensor.name))
    known = {value.name for value in list(network.graph.input) + list(network.graph.output)}
    network.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors if name not in known)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(network.SerializeToString(), options, providers=["CPUExecutionProvider"])
    taken, outputs = session.get_inputs()[0].name, [value.name for value in session.get_outputs()]
    for image in images:
        for name, values in [(taken, image)] + list(zip(outputs, session.run(None, {taken: image}))):
            if name in tensors:
                tensors[name].append(values.ravel()[::-(-values.size // THINNED)])
    return {name: search(values) for name, values in tensors.items()}


def deploy_model(model, layers, weights, ranges):
    """The model with these nodes in INT8."""
    made, graph = onnx.ModelProto(), model.graph
    made.CopyFrom(model)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    del made.graph.node[:]
    for node in graph.node:
        node, name = onnx.NodeProto.FromString(node.SerializeToString()), node.name
        if name not in layers:
            made.graph.node.append(node)
            continue
        scale, offset = ranges[node.input[0]]
        quant = helper.make_node("AscendQuant", [node.input[0]], [name + ".quant.output0"], name + ".quant", scale=float(1 / scale),
                                 offset=float(offset), dst_type="INT8")
        node.input[0], output, factors, added = quant.output[0], node.output[0], np.array([scale]), {}
        if name in weights:
            added[name + ".weight"], step = weights[name]
            factors = (step * scale).ravel()
            if len(node.input) > 2:
                added[name + ".bias"] = np.rint(arrays[node.input[2]] / factors).astype(np.int32)
            node.input[1:] = list(added)
        node.output[0] = name + ".dequant.input0"
        added[name + ".dequant.param"] = factors.astype(np.float32).view(np.uint32).astype(np.uint64)
        made.graph.initializer.extend(numpy_helper.from_array(array, key) for key, array in added.items())
        made.graph.node.extend([quant, node, helper.make_node("AscendDequant", [node.output[0], name + ".dequant.param"], [output],
                                                              name + ".dequant", dtype=0)])
    return without_unused(made)


def without_unused(model):
    """The model without initializers that no node takes."""
    used = {name for node in model.graph.node for name in node.input}
    for values in (model.graph.initializer, model.graph.input):
        for value in [value for value in values if value.name not in used]:
            values.remove(value)
    return model


def runnable(model):
    """A model in ONNX's own operators. A deploy model's computes with its int8 weights and scales: the integers are float32."""
    if not any(node.op_type == "AscendQuant" for node in model.graph.node):
        return model
    made = onnx.ModelProto()
    made.CopyFrom(model)
    del made.graph.initializer[:], made.graph.node[:]
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        values = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.op_type == "AscendQuant":
            assert values["dst_type"] == b"INT8"
            scale, low, high, product, rounded = (node.name + end for end in (".scale", ".low", ".high", ".product", ".rounded"))
            arrays.update({scale: np.float32(values["scale"]), low: np.float32(-128 - values["offset"]),
                           high: np.float32(127 - values["offset"])})
            made.graph.node.extend([helper.make_node("Mul", [node.input[0], scale], [product]),
                                    helper.make_node("Round", [product], [rounded]),
                                    helper.make_node("Clip", [rounded, low, high], node.output)])
        elif node.op_type == "AscendDequant":
            assert values["dtype"] == 0 and arrays[node.input[1]].dtype == np.uint64
            scale = arrays[node.input[1]].astype(np.uint32).view(np.float32)
            arrays[node.input[1] + ".float"] = scale.reshape([] if scale.size == 1 else [1, -1, 1, 1])
            made.graph.node.append(helper.make_node("Mul", [node.input[0], node.input[1] + ".float"], node.output))
        else:
            made.graph.node.append(node)
    made.graph.initializer.extend(numpy_helper.from_array(array.astype(np.float32) if array.dtype in (np.int8, np.int32) else array, name)
                                  for name, array in arrays.items())
    return without_unused(made)


def parse():
    parser = argparse.ArgumentParser("amct_onnx", allow_abbrev=False)
    calibration = parser.add_subparsers(dest="command", required=True).add_parser("calibration", allow_abbrev=False)
    for name in ("model", "save_path"):
        calibration.add_argument("--" + name, required=True)
    for name in ("input_shape", "data_dir", "data_types", "evaluator", "calibration_config"):
        calibration.add_argument("--" + name)
    calibration.add_argument("--batch_num", type=int)
    args = parser.parse_args()
    if args.evaluator or not (args.input_shape and args.data_dir and args.data_types):
        failed("--input_shape, --data_dir and --data_types belong together, without --evaluator, which this stand-in has not")
    if args.calibration_config and args.batch_num is not None:
        failed("--calibration_config and --batch_num exclude each other")
    for name in ("model", "save_path", "data_dir", "calibration_config"):
        if not re.match(PATH, getattr(args, name) or "."):
            failed("--%s: the path %s has other characters than letters, digits, _ - and ." % (name, getattr(args, name)))
    for path in (args.model, args.calibration_config):
        if path and not os.path.isfile(path):
            failed("%s: no such file" % path)
    if not os.path.isdir(args.data_dir):
        failed("%s: no such folder" % args.data_dir)
    return args


def main():
    args = parse()
    model = onnx.load(args.model)
    settings = read_settings(args.calibration_config) if args.calibration_config else {}
    weights = {tensor.name for tensor in model.graph.initializer}
    image, = [value for value in model.graph.input if value.name not in weights]
    shape = [dim.dim_value for dim in image.type.tensor_type.shape.dim]
    if args.input_shape != "%s:%s" % (image.name, ",".join(map(str, shape))):
        failed("--input_shape %s, but the model has %s:%s" % (args.input_shape, image.name, shape))
    if args.data_types != "float32":
        failed("--data_types %s, but the model takes float32" % args.data_types)
    if [entry.version for entry in model.opset_import] != [11]:
        failed("the model's opset is not 11")
    layers = {node.name: node for node in model.graph.node if node.op_type in LAYERS}
    for name in settings.get("skip_layers", []) + settings.get("skip_fusion_layers", []):
        if name not in layers:
            failed("Layer %s does not exist in the model" % name)
    for kind in settings.get("skip_layer_types", []):
        if kind not in LAYERS:
            failed("the type %s does not exist or is not supported" % kind)
    if any(node.op_type in ("BatchNormalization", "QuantizeLinear", "AscendQuant") for node in model.graph.node) or "" in layers:
        failed("the model is quantized already, has nodes without a name, or a BatchNormalization, which this stand-in does not fold")
    chosen = {name: node for name, node in layers.items() if name not in settings.get("skip_layers", [])
              and node.op_type not in settings.get("skip_layer_types", [])}
    os.makedirs("amct_log", exist_ok=True)
    count = int(settings["batch_num"][0]) if "batch_num" in settings else args.batch_num or 1
    int8 = int8_weights(model, chosen)
    ranges = calibrate(model, chosen, int8, batches(args, shape, count))
    made = deploy_model(model, chosen, int8, ranges)
    if FAIL != "amct_onnx leaves nothing":
        os.makedirs(os.path.dirname(args.save_path) or ".", exist_ok=True)
        onnx.save(made, args.save_path + "_deploy_model.onnx")
        onnx.save(runnable(made), args.save_path + "_fake_quant_model.onnx")
        with open(args.save_path + "_quant.json", "w") as f:
            json.dump({"nodes": sorted(chosen)}, f)
    print("[INFO][AMCT] %d layers, %d batches" % (len(chosen), count))


if __name__ == "__main__":
    main()
