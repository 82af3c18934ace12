"""Makes an INT8 model for ONNX Runtime: about three times as fast on a CPU with VNNI, at a small loss of accuracy.

    python3 tools/quantize.py deepmar_bs1_nopad.onnx input_bin deepmar_bs1_int8.onnx --labels label.json

The script uses static post-training quantization with ONNX Runtime's own quantizer. Weights become int8 with a scale per output
channel. Activations become uint8; their ranges come from a sample of the bins, spread evenly over the folder.
BatchNormalization is first folded into the convolutions. The model keeps its inputs and outputs, so stages 6 and 7 take it like
the float32 model. With --labels, both models are scored on all bins, and nothing is written if instance_acc drops by more than
1 % (percentage points). An INT8 ONNX model is only for ONNX Runtime: atc takes the float32 model.
"""
import argparse
import contextlib
import logging
import os
import re
import shutil
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from lib.bins import list_bins
from lib.files import whole_file
from lib.labels import GROUPS_HELP, labels_of, read_groups
from lib.machine import check_threads
from lib.metrics import MAX_DROP, effect
from lib.models import load
from lib.names import composed
from lib.providers import CPU
from lib.results import as_logits, kind_of
from lib.script import command, importing, number, one_line
from lib.session import attributes_of, compute, empty_batch, input_kind, input_size, open_session, session_options

with importing():
    import numpy as np

CALIBRATION_IMAGES = 64  # the drop was nearly twice as large with 32, and the same with 128


def batches(paths, count, empty):
    """Yields count bins, evenly spread, as batches in the form of the empty one. The first bins fill up the last batch.

    Raises ValueError for a bin that holds NaN or infinite values, because these would become the ends of a range.
    """
    chosen = np.linspace(0, len(paths) - 1, min(count, len(paths))).round().astype(int)
    size = len(empty)
    chosen = np.resize(chosen, -(-len(chosen) // size) * size)
    for start in range(0, len(chosen), size):
        batch = np.stack([np.fromfile(paths[i], empty.dtype) for i in chosen[start:start + size]])
        finite = np.isfinite(batch).all(axis=1)
        if not finite.all():
            raise ValueError("NaN or infinite values in %s" % paths[chosen[start + int(finite.argmin())]])
        yield batch.reshape(empty.shape)


def quantize(path, feeds, folder, qdq=False):
    """Quantizes the model at path. Returns the path of the INT8 model in folder, which also gets the intermediate files.

    feeds: [{input name: array}] for calibration. qdq: write QuantizeLinear and DequantizeLinear nodes at opset 13, in place of
    ONNX Runtime's own INT8 operators. Raises ValueError if ONNX Runtime cannot quantize the model.
    """
    import onnx
    import onnxruntime
    from onnx import version_converter
    check_threads(os.cpu_count())  # the quantizer starts one for each core
    folded, result = os.path.join(folder, "folded.onnx"), os.path.join(folder, "int8.onnx")
    path = os.path.abspath(path)
    try:
        with quiet_in(folder):
            fold(path, folded)
            if qdq:  # its weights per channel need opset 13, QOperator's only 11
                onnx.save(version_converter.convert_version(onnx.load(folded), 13), folded)
            calibrate(folded, result, feeds, qdq)
    except (OSError, ValueError):
        raise
    except Exception as error:  # the quantizer's errors have no common class, and some have many lines
        raise ValueError("%s: ONNX Runtime %s cannot quantize it: %s: %s"
                         % (path, onnxruntime.__version__, type(error).__name__, one_line(error)))
    model = onnx.load(result)
    onnx.helper.set_model_props(model, {entry.key: entry.value for entry in load(path).metadata_props})
    onnx.save(model, result)
    return result


@contextlib.contextmanager
def quiet_in(folder):
    """Silences the quantizer, and makes folder the current one, because ONNX Runtime 1.10 writes an extra file there."""
    import onnxruntime
    before = os.getcwd()
    logging.disable(logging.WARNING)  # the quantizer would suggest the folding that was just done
    onnxruntime.set_default_logger_severity(3)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def fold(path, folded):
    """Writes the model at path with BatchNormalization folded into the convolutions. It still has only standard operators."""
    import onnxruntime
    options = session_options(1)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = folded
    onnxruntime.InferenceSession(path, options, providers=[CPU])


def calibrate(folded, result, feeds, qdq):
    """Writes the INT8 model of a folded one."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        rest = list(feeds)

        def get_next(self):
            return self.rest.pop() if self.rest else None

    # Without VNNI, an x86 CPU adds two products in 16 bits, which overflow unless the weights have 7 bits.
    # https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
    # AIPP is not quantized: ONNX Runtime 1.10 would convert its table to int8, which its convolution does not accept.
    aipp = [node.name for node in load(folded).graph.node if node.name.startswith("aipp_")]
    quantize_static(folded, result, Reader(), quant_format=QuantFormat.QDQ if qdq else QuantFormat.QOperator, per_channel=True,
                    activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, nodes_to_exclude=aipp,
                    reduce_range=not multiplies_exactly())


def multiplies_exactly(cpuinfo="/proc/cpuinfo"):
    """Returns whether this CPU multiplies uint8 by int8 without overflow: one with VNNI, or one that is not x86."""
    with open(cpuinfo) as f:
        flags = re.search(r"^flags\s*: (.*)", f.read(), re.MULTILINE)
    return not flags or bool({"avx512_vnni", "avx_vnni"} & set(flags.group(1).split()))


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", help="the float32 model that stage 2 wrote")
    parser.add_argument("bins", metavar="BIN_DIR", help="the bins that stage 4 wrote")
    parser.add_argument("output", metavar="OUTPUT", help="the INT8 model to write")
    parser.add_argument("--images", type=number(int, 1), default=CALIBRATION_IMAGES, metavar="N",
                        help="number of bins for calibration (default: %(default)s)")
    parser.add_argument("--labels", metavar="LABEL", help="label.json: score both models on all bins")
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
    if {node.op_type for node in load(path).graph.node} & {"QLinearConv", "QuantizeLinear"}:
        raise ValueError("%s: is already quantized; give the float32 model" % path)
    return session


def score(int8, float32, bins, labels, groups, model):
    """Prints the accuracy of two sessions over the bins [(name, path)]. Returns (float32's accuracy, int8's drop).

    model: the path of the float32 model, which decides for both whether they give logits or probabilities.
    """
    of_float32, kind = as_logits(compute(float32, bins), model, kind_of(model))
    of_int8, _ = as_logits(compute(int8, bins), model, kind)
    accuracy = effect(of_int8, of_float32, labels, groups)["instance_acc"]
    drop, interval = -accuracy["change"], accuracy["interval"]
    print("instance_acc: float32 %r, int8 %r, drop %.2f %%%s; %d of %d attributes flip" % (
        accuracy["b"], accuracy["a"], 100 * drop,
        " (95 %%: %.2f to %.2f %%)" % (-100 * interval[1], -100 * interval[0]) if interval else "",
        ((of_int8 >= 0) != (of_float32 >= 0)).sum(), of_int8.size))
    return accuracy["b"], drop


def main(argv=None):
    args = parse(argv)
    session = open_float32(args.model)
    batch_size, height, width = input_size(session)
    bins = [(composed(name[:-len(".bin")]), os.path.join(args.bins, name))
            for name in list_bins(args.bins, width, height, input_kind(session))]
    labels = None
    if args.labels is not None:
        labels = labels_of(args.labels, [name for name, _ in bins], attributes_of(session))
    groups = read_groups(args.groups, [name for name, _ in bins])
    accuracy = "FLOAT32_ACCURACY"
    with whole_file(args.output) as temporary:
        with tempfile.TemporaryDirectory() as folder:
            empty = empty_batch(session, batch_size, height, width)
            feeds = [{session.get_inputs()[0].name: batch} for batch in batches([path for _, path in bins], args.images, empty)]
            shutil.copyfile(quantize(args.model, feeds, folder, args.qdq), temporary)
        if labels is not None:
            accuracy, drop = score(open_session(temporary), session, bins, labels, groups, args.model)
            if drop > MAX_DROP + 1e-9 and not args.allow_drop:
                raise ValueError("%s: was not written, because instance_acc drops by more than 1 %%; calibrate on more bins "
                                 "(--images), or accept it (--allow-drop)" % args.output)
    print("%s: int8, %.1f MB (float32: %.1f MB), calibrated on %d of %d bins; for ONNX Runtime, not for atc"
          % (args.output, os.path.getsize(args.output) / 1e6, os.path.getsize(args.model) / 1e6,
             min(args.images, len(bins)), len(bins)))
    print("next: python3 tools/benchmark.py -batch_size=%d -om_path=%s -input_text_path=deepmar.info\n"
          "      python3 postprocess_deepmar_pytorch.py result/dumpOutput_device0 %s --published %s"
          % (batch_size, args.output, args.labels or "label.json", accuracy))


if __name__ == "__main__":
    command(main)
