"""An INT8 model for ONNX Runtime: about three times as fast on a CPU with VNNI, at a small loss of accuracy.

    python3 tools/quantize.py deepmar_bs1_nopad.onnx input_bin deepmar_bs1_int8.onnx --labels label.json

Static post-training quantization with ONNX Runtime's own quantizer: weights int8 per output channel, activations uint8
with the ranges that they take over a sample of the bins, spread evenly over the folder. BatchNormalization is folded
into the convolutions first. The model keeps its inputs and outputs, so that stages 6 and 7 take it as they take the
other. With --labels, both models are scored on all bins, and nothing is written where instance_acc drops by more than
1 % (percentage points). An INT8 ONNX is for ONNX Runtime only: atc takes the float32 one.
"""
import argparse
import os
import shutil
import signal
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
if __name__ == "__main__":  # until main(), Ctrl-C ends it at once: a library's import makes other errors of it
    interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)
import numpy as np
from benchmark import check_shape, open_session
from compare import SIZE, compute, effect, labels_of
from get_info import list_bins, whole_file
from postprocess_deepmar_pytorch import MAX_DROP
from remove_pad import load

IMAGES = 64  # calibration images; with 32 the drop was nearly twice as large, with 128 as large as with 64


def batches(paths, count, batch_size):
    """Yields count of the bins, evenly spread, as float32 [batch_size,3,224,224]; the last is filled up from the first.

    Raises ValueError for a bin that holds NaN or infinite values, which would become a range.
    """
    chosen = np.linspace(0, len(paths) - 1, min(count, len(paths))).round().astype(int)
    chosen = np.resize(chosen, -(-len(chosen) // batch_size) * batch_size)
    for start in range(0, len(chosen), batch_size):
        batch = np.stack([np.fromfile(paths[i], "<f4") for i in chosen[start:start + batch_size]])
        finite = np.isfinite(batch).all(axis=1)
        if not finite.all():
            raise ValueError("NaN or infinite values in %s" % paths[chosen[start + int(finite.argmin())]])
        yield batch.reshape(batch_size, 3, SIZE, SIZE)


def quantize(path, feeds, folder):
    """Quantizes the model at path; returns the path of the INT8 model, a file in folder, as are those made on the way.

    feeds: [{input name: array}] of calibration. Raises ValueError where ONNX Runtime cannot do it.
    """
    import logging
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        rest = list(feeds)

        def get_next(self):
            return self.rest.pop() if self.rest else None

    folded, result = os.path.join(folder, "folded.onnx"), os.path.join(folder, "int8.onnx")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC  # standard operators only
    options.optimized_model_filepath = folded
    options.log_severity_level = 3  # errors
    here = os.getcwd()
    path = os.path.abspath(path)
    logging.disable(logging.WARNING)  # the quantizer asks for the folding that was just done
    onnxruntime.set_default_logger_severity(3)
    os.chdir(folder)  # where ONNX Runtime 1.10 leaves a file of its own
    try:
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        # QOperator, as its per-channel weights need no newer opset than 11; QDQ's need 13.
        quantize_static(folded, result, Reader(), quant_format=QuantFormat.QOperator, per_channel=True,
                        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)
    except (OSError, ValueError):
        raise
    except Exception as error:  # the quantizer's own kinds have no base class, and some many lines
        raise ValueError("%s: ONNX Runtime %s cannot quantize it: %s: %s"
                         % (path, onnxruntime.__version__, type(error).__name__, " ".join(str(error).split())))
    finally:
        os.chdir(here)
    return result


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", help="the float32 model that stage 2 wrote")
    parser.add_argument("bins", metavar="BIN_DIR", help="the bins that stage 4 wrote")
    parser.add_argument("output", metavar="OUTPUT", help="the INT8 model to write")
    parser.add_argument("--images", type=int, default=IMAGES, metavar="N",
                        help="bins to calibrate with (default: %(default)s)")
    parser.add_argument("--labels", metavar="LABEL", help="label.json: score both models on all bins")
    parser.add_argument("--allow-drop", action="store_true", help="write the model whatever it drops")
    args = parser.parse_args(argv)
    if args.images < 1:
        parser.error("--images must be positive")
    if os.path.realpath(args.output) == os.path.realpath(args.model):
        parser.error("OUTPUT is MODEL, which atc still needs; give another name")

    bins = list_bins(args.bins, SIZE, SIZE)
    paths = [os.path.join(args.bins, name) for name in bins]
    names = [name[:-len(".bin")] for name in bins]
    if args.labels is not None:
        labels = labels_of(args.labels, names)
    session = open_session(args.model)
    if {node.op_type for node in load(args.model).graph.node} & {"QLinearConv", "QuantizeLinear"}:
        raise ValueError("%s: is quantized already; give the float32 model" % args.model)
    node = session.get_inputs()[0]
    batch_size = node.shape[0] if isinstance(node.shape[0], int) else 1
    check_shape(session, args.model, batch_size, SIZE, SIZE)
    if args.labels is not None and session.get_outputs()[0].shape[1] != labels.shape[1]:
        raise ValueError("%s: gives %s attributes, the rows of %s have %d"
                         % (args.model, session.get_outputs()[0].shape[1], args.labels, labels.shape[1]))
    with whole_file(args.output) as temporary:
        with tempfile.TemporaryDirectory() as folder:
            feeds = [{node.name: batch} for batch in batches(paths, args.images, batch_size)]
            shutil.copyfile(quantize(args.model, feeds, folder), temporary)
        if args.labels is not None:
            int8, float32 = (compute(of, list(zip(names, paths)), batch_size, names)
                             for of in (open_session(temporary), session))
            accuracy = effect(int8, float32, labels)["instance_acc"]
            drop = -accuracy["change"]
            print("instance_acc: float32 %r, int8 %r, drop %.2f %%; %d of %d attributes flip"
                  % (accuracy["b"], accuracy["a"], 100 * drop, ((int8 >= 0) != (float32 >= 0)).sum(), int8.size))
            if drop > MAX_DROP + 1e-9 and not args.allow_drop:
                raise ValueError("%s: not written, as instance_acc drops by more than 1 %%; calibrate on more bins "
                                 "(--images), or accept it (--allow-drop)" % args.output)
    print("%s: int8, %.1f MB (float32: %.1f MB), calibrated on %d of %d bins; for ONNX Runtime, not for atc"
          % (args.output, os.path.getsize(args.output) / 1e6, os.path.getsize(args.model) / 1e6,
             min(args.images, len(bins)), len(bins)))
    print("next: python3 tools/benchmark.py -batch_size=%d -om_path=%s -input_text_path=deepmar.info\n"
          "      python3 postprocess_deepmar_pytorch.py result/dumpOutput_device0 %s --published %s"
          % (batch_size, args.output, args.labels or "label.json",
             "FLOAT32_ACCURACY" if args.labels is None else accuracy["b"]))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupt)
    try:
        main()
    except (OSError, ValueError, ImportError) as error:
        sys.exit("quantize.py: error: %s" % error)
    except KeyboardInterrupt:
        sys.exit("quantize.py: interrupted; nothing was written")
