"""Makes an INT8 model for ONNX Runtime: about three times as fast on a CPU with VNNI, at a small loss of accuracy.

    python3 tools/quantize.py deepmar_bs1_nopad.onnx val_bin deepmar_bs1_cpu_int8.onnx --labels val.json

The script uses static post-training quantization with ONNX Runtime's own quantizer. Weights become int8 with a scale per output
channel. Activations become uint8; their ranges come from bins of training or validation images, not of the test set. These bins
are spread evenly over the folder, and the outermost 0.001 % of an activation's values on each side are clipped.
BatchNormalization is first folded into the convolutions. The first convolution and the classifier stay float32, and the
classifier is fitted anew to what the INT8 layers give for the same bins. The model keeps its inputs and outputs, so stages 6 and 7
take it like the float32 model. With --labels, both models are scored on the folder's other bins, those that did
not calibrate. Nothing is written if instance_acc drops by more than 1 % (percentage points). An INT8 ONNX model is only for ONNX
Runtime: atc takes the float32 model.
"""
import argparse
import collections
import logging
import os
import re
import shutil
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from lib import int8
from lib.files import whole_file
from lib.labels import GROUPS_HELP, labels_of, read_groups
from lib.metrics import MAX_DROP, effect
from lib.models import check_float32, copied, give, load
from lib.providers import CPU
from lib.results import as_logits, kind_of
from lib.script import command, importing, number, one_line, progress
from lib.session import attributes_of, bins_of, compute, empty_batch, input_size, open_session, session_options

with importing():
    import numpy as np

CALIBRATION_IMAGES = 64
CLIPPED = 1e-5  # this part of an activation's values is beyond each end of its range. A few outliers would widen all steps
RIDGE = 1  # regularisation, relative to the mean squared norm of the features. With 1 to 3, it predicted images left out best


def quantize(path, batches, folder, qdq=False):
    """Quantizes the model at path. Returns the path of the INT8 model in folder, which also gets the intermediate files.

    batches: arrays of the model's input, for calibration. qdq: write QuantizeLinear and DequantizeLinear nodes at opset 13, in
    place of ONNX Runtime's own INT8 operators. Raises ValueError if ONNX Runtime cannot quantize the model.
    """
    import onnx
    import onnxruntime
    from onnx import version_converter
    folded, result = os.path.join(folder, "folded.onnx"), os.path.join(folder, "int8.onnx")
    logging.disable(logging.WARNING)  # the quantizer would suggest the folding that was just done
    onnxruntime.set_default_logger_severity(3)
    try:
        fold(path, folded)
        model = onnx.load(folded)
        if qdq:  # its weights per channel need opset 13, QOperator's only 11
            model = version_converter.convert_version(model, 13)
        for i, node in enumerate(model.graph.node):
            node.name = node.name or "node_%d" % i  # a node that stays float32 is known by its name
        if not layers(model.graph.node):
            raise ValueError("%s: has no layers to quantize" % path)
        write_int8(model, find_ranges(model, batches), result, qdq)
        quantized = onnx.load(result)
        fit_classifier(quantized, model, batches)
    except (OSError, ValueError):
        raise
    except Exception as error:  # the quantizer's errors have no common class, and some have many lines
        raise ValueError("%s: ONNX Runtime %s cannot quantize it: %s: %s"
                         % (path, onnxruntime.__version__, type(error).__name__, one_line(error)))
    onnx.helper.set_model_props(quantized, {entry.key: entry.value for entry in load(path).metadata_props})
    onnx.save(quantized, result)
    return result


def fold(path, folded):
    """Writes the model at path with BatchNormalization folded into the convolutions. It still has only standard operators."""
    import onnxruntime
    options = session_options(1)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = folded
    onnxruntime.InferenceSession(path, options, providers=[CPU])


def find_ranges(model, batches):
    """Returns {tensor: (low, high)}, float32, of what a model's nodes take. CLIPPED of a tensor's values are beyond each end.

    ONNX Runtime's own calibrators give the ends of all values, or hold the tensors of all images at once.
    """
    graph, ranges = model.graph, {}
    wanted = {name for node in graph.node for name in node.input} - {tensor.name for tensor in graph.initializer}
    with progress(len(wanted), "tensor") as bar:
        for name, arrays in int8.activations(model, batches, wanted):
            if arrays[0].dtype == np.float32:
                count = int(CLIPPED * sum(array.size for array in arrays))
                low, high = [], []
                for array in arrays:  # the outermost values of all are among those of each
                    values = np.partition(array, [count, array.size - 1 - count], axis=None)
                    low.append(values[:count + 1].copy())
                    high.append(values[-1 - count:].copy())
                low, high = np.sort(np.concatenate(low)), np.sort(np.concatenate(high))
                ranges[name] = low[count], high[-1 - count]
            bar.update()
    return ranges


def write_int8(model, ranges, result, qdq):
    """Writes the INT8 model of a folded one. ranges: of find_ranges()."""
    from onnxruntime.quantization import CalibrationMethod, QuantType, calibrate, registry
    from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    from onnxruntime.quantization.quant_utils import QuantizationMode
    if hasattr(calibrate, "TensorsData"):
        ranges = calibrate.TensorsData(CalibrationMethod.MinMax, ranges)
    else:  # ONNX Runtime 1.10 takes Python's floats
        ranges = {name: (float(low), float(high)) for name, (low, high) in ranges.items()}
    # AIPP is not quantized: ONNX Runtime 1.10 would convert its table to int8, which its convolution does not accept.
    # The first convolution and the classifier, with what follows it, are not, either: the logits move a sixth less, at the same
    # speed. With 3 channels, INT8 is no faster. A logit that is rounded to 0 would count as positive.
    nodes = list(model.graph.node)
    left = [node.name for node in nodes if node.name.startswith("aipp_")]
    *inner, last = layers(nodes)
    left += [nodes[i].name for i in inner[:1] if len(inner) > 1] + [node.name for node in nodes[last:]]
    # Without VNNI, an x86 CPU adds two products in 16 bits, which overflow unless the weights have 7 bits. A ResNet's shortcuts then
    # stay float32, too, which is only half as fast there.
    # https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
    per_channel, reduce_range = True, not multiplies_exactly()
    left += shortcuts(model) if reduce_range else []
    operators = list(registry.QDQRegistry if qdq else registry.QLinearOpsRegistry)
    settings = QuantType.QInt8, QuantType.QUInt8, ranges, [], left, operators, {}
    if qdq:
        quantizer = QDQQuantizer(model, per_channel, reduce_range, *settings)
    else:
        quantizer = ONNXQuantizer(model, per_channel, reduce_range, QuantizationMode.QLinearOps, True, *settings)
    quantizer.quantize_model()
    quantizer.model.save_model_to_file(result)


def layers(nodes):
    """Returns the indexes of the nodes with weights, without AIPP's."""
    return [i for i, node in enumerate(nodes) if node.op_type in ("Conv", "Gemm", "MatMul") and not node.name.startswith("aipp_")]


def shortcuts(model):
    """Returns the names of the convolutions beside a ResNet's blocks: of those that take one tensor, the one with most channels."""
    channels = {tensor.name: tensor.dims[0] for tensor in model.graph.initializer if tensor.dims}
    takers = collections.defaultdict(list)
    for node in model.graph.node:
        if node.op_type == "Conv":
            takers[node.input[0]].append(node)
    return [max(nodes, key=lambda node: channels.get(node.input[1], 0)).name for nodes in takers.values() if len(nodes) > 1]


def fit_classifier(model, float32, batches):
    """Changes the classifier of an INT8 model, in place, so that its results come closer to the float32 model's.

    Ridge regression from the features, what the classifier takes, to what its results miss. Only a Gemm with weights [attributes,
    features] and a bias, as in export_onnx.py's models, is changed.
    """
    from onnx import helper, numpy_helper
    name = float32.graph.node[layers(float32.graph.node)[-1]].name
    node, = [node for node in model.graph.node if node.name == name]
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    weights = [numpy_helper.to_array(tensors[name]).astype(np.float64) for name in node.input[1:] if name in tensors]
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if len(weights) < 2 or attributes.get("transB") != 1:
        return

    def values(model, name):
        copy = copied(model)
        give(copy, [name])
        return int8.run(copy, batches).astype(np.float64)

    features = values(model, node.input[0])
    missed = values(float32, node.output[0]) - features.dot(weights[0].T) - weights[1]
    mean, by_mean = features.mean(axis=0), missed.mean(axis=0)
    centred = features - mean
    kernel = centred.dot(centred.T)  # in the dual form, there is one unknown for an image
    ridge = RIDGE * np.trace(kernel) / len(kernel) or 1
    change = centred.T.dot(np.linalg.solve(kernel + ridge * np.eye(len(kernel)), missed - by_mean)).T
    for name, array in zip(node.input[1:], (weights[0] + change, weights[1] + by_mean - change.dot(mean))):
        tensors[name].CopyFrom(numpy_helper.from_array(array.astype(np.float32), name))


def multiplies_exactly(cpuinfo="/proc/cpuinfo"):
    """Returns whether this CPU multiplies uint8 by int8 without overflow: one with VNNI, or one that is not x86."""
    with open(cpuinfo) as f:
        flags = re.search(r"^flags\s*: (.*)", f.read(), re.MULTILINE)
    return not flags or bool({"avx512_vnni", "avx_vnni"} & set(flags.group(1).split()))


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", help="the float32 model that stage 2 wrote")
    parser.add_argument("bins", metavar="BIN_DIR", help="bins of training or validation images, as stage 4 writes them")
    parser.add_argument("output", metavar="OUTPUT", help="the INT8 model to write")
    parser.add_argument("--images", type=number(int, 1), default=CALIBRATION_IMAGES, metavar="N",
                        help="number of bins for calibration, spread over the folder (default: %(default)s)")
    parser.add_argument("--labels", metavar="LABEL", help="the bins' label.json: score both models on the bins that do not calibrate")
    parser.add_argument("--groups", metavar="FILE", help=GROUPS_HELP)
    parser.add_argument("--qdq", action="store_true",
                        help="write QuantizeLinear and DequantizeLinear nodes, opset 13, which OpenVINO reads too; needs a current "
                             "ONNX")
    parser.add_argument("--allow-drop", action="store_true", help="write the model even if the accuracy drops by more")
    args = parser.parse_args(argv)
    if args.qdq and sys.version_info < (3, 8):
        parser.error("--qdq needs a current ONNX and ONNX Runtime; the guide's versions lack weights per channel in opset 13")
    if os.path.realpath(args.output) == os.path.realpath(args.model):
        parser.error("OUTPUT is MODEL, which atc still needs; give another name")
    return args


def open_float32(path):
    """Opens a model that is not quantized yet. Returns its session. Raises OSError or ValueError."""
    session = open_session(path)
    check_float32(load(path), path)
    return session


def score(int8, float32, bins, labels, groups, model):
    """Prints the accuracy of two sessions over the bins [(name, path)]. Returns int8's drop of instance_acc.

    model: the path of the float32 model, which decides for both whether they give logits or probabilities.
    """
    of_float32, kind = as_logits(compute(float32, bins), model, kind_of(model))
    of_int8, _ = as_logits(compute(int8, bins), model, kind)
    accuracy = effect(of_int8, of_float32, labels, groups)["instance_acc"]
    drop, interval = 0 - accuracy["change"], accuracy["interval"]
    print("instance_acc: float32 %r, int8 %r, drop %.2f %%%s; %d of %d attributes flip" % (
        accuracy["b"], accuracy["a"], 100 * drop,
        " (95 %%: %.2f to %.2f %%)" % (-100 * interval[1], -100 * interval[0]) if interval else "",
        ((of_int8 >= 0) != (of_float32 >= 0)).sum(), of_int8.size))
    return drop


def main(argv=None):
    args = parse(argv)
    session = open_float32(args.model)
    batch_size, height, width = input_size(session)
    bins = bins_of(args.bins, session)
    int8.note_test_set(args.bins)
    chosen = int8.spread([path for _, path in bins], args.images, batch_size)
    used = {path for paths in chosen for path in paths}
    others = [(name, path) for name, path in bins if path not in used]
    if args.labels is not None:
        if not others:
            raise ValueError("%s: all %d bins calibrate, and none is left to score; give fewer --images" % (args.bins, len(bins)))
        labels = labels_of(args.labels, [name for name, _ in others], attributes_of(session))
        groups = read_groups(args.groups, [name for name, _ in others])
    scored = ""
    with whole_file(args.output) as temporary:
        with tempfile.TemporaryDirectory() as folder:
            empty = empty_batch(session, batch_size, height, width)
            del session  # the activations need its memory
            batches = [int8.read(paths, empty) for paths in chosen]
            shutil.copyfile(quantize(args.model, batches, folder, args.qdq), temporary)
        if args.labels is not None:
            drop = score(open_session(temporary), open_session(args.model), others, labels, groups, args.model)
            scored = ", scored on the %d others" % len(others)
            if drop > MAX_DROP + 1e-9 and not args.allow_drop:
                raise ValueError("%s: was not written, because instance_acc drops by more than 1 %%; calibrate on more bins "
                                 "(--images), or accept it (--allow-drop)" % args.output)
    print("%s: int8, %.1f MB (float32: %.1f MB), calibrated on %d of %d bins%s; for ONNX Runtime, not for atc"
          % (args.output, os.path.getsize(args.output) / 1e6, os.path.getsize(args.model) / 1e6, len(used), len(bins), scored))
    print("next: python3 tools/benchmark.py -batch_size=%d -om_path=%s -input_text_path=deepmar.info\n"
          "      python3 postprocess_deepmar_pytorch.py result/dumpOutput_device0 label.json --published FLOAT32_ACCURACY"
          % (batch_size, args.output))


if __name__ == "__main__":
    command(main)
