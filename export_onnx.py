"""Stage 1: a DeepMAR checkpoint -> an ONNX model of opset 11 that atc accepts, checked before it is written.

    python3 export_onnx.py xxx/checkpoint.pth.tar deepmar_bs1.onnx 1
    python3 export_onnx.py --input_file=xxx/checkpoint.pth.tar --output_file=deepmar_bs1.onnx --batch_size=1

The model has the input actual_input_1, float32 [batch size,3,224,224] (RGB, normalised), and the output output1, float32
[batch size, attributes] (logits). It is written only after onnx's checker accepted it and ONNX Runtime gave PyTorch's
logits on random input. Its metadata say how it is to be fed, which checkpoint it was, and, with --attributes FILE, the
attributes' names. Works beside DeepMAR.py, and in the root of the open-source repository, whose
baseline/model/DeepMAR.py is replaced by ours.
"""
import argparse
import contextlib
import glob
import hashlib
import inspect
import json
import os
import re
import signal
import sys
import warnings

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # from 1.29 on, ONNX Runtime reports each model to its makers

VERSION = "1.0"    # of these scripts, as the model's metadata names it
OPSET = 11         # the ONNX operator set that atc supports
SIZE = 224         # height and width of the network's input in pixels
TOLERANCE = 1e-4   # allowed difference between the logits of ONNX Runtime and PyTorch, relative to the largest logit


def export(model, path, batch_size):
    """Writes the network's graph for a fixed batch size to path, constants folded."""
    import torch
    # torch 2.9 changed the default to an exporter that cannot emit opset 11 for this network; 1.6 has no such argument.
    arguments = {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about that exporter's age, and the pooling window becoming a constant
        torch.onnx.export(model, torch.zeros(batch_size, 3, SIZE, SIZE), path, opset_version=OPSET,
                          input_names=["actual_input_1"], output_names=["output1"], do_constant_folding=True,
                          **arguments)


def verify(model, path, batch_size):
    """Compares the ONNX file with the network on seeded random input [batch_size,3,224,224].

    Returns (largest absolute difference of the logits, largest absolute logit); raises ValueError where onnx's checker
    refuses the file, or the logits have another shape, are not finite, or differ by more than TOLERANCE.
    """
    import numpy as np
    import onnx
    import onnxruntime
    import torch
    try:
        onnx.checker.check_model(onnx.shape_inference.infer_shapes(onnx.load(path)), full_check=True)
    except (onnx.checker.ValidationError, RuntimeError) as error:
        raise ValueError("the exported model is not valid: %s" % " ".join(str(error).split()))
    images = np.random.RandomState(0).standard_normal((batch_size, 3, SIZE, SIZE)).astype(np.float32)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    ours, = session.run(["output1"], {"actual_input_1": images})
    with torch.no_grad():
        theirs = model(torch.from_numpy(images)).numpy()
    if ours.shape != theirs.shape:
        raise ValueError("ONNX Runtime gives logits of shape %s, PyTorch %s" % (ours.shape, theirs.shape))
    difference, largest = float(np.abs(ours - theirs).max()), float(np.abs(theirs).max())
    if not difference <= TOLERANCE * max(1.0, largest):  # so written, NaN is a mismatch too
        raise ValueError("ONNX Runtime's logits differ from PyTorch's by %.3g (largest logit %.3g)"
                         % (difference, largest))
    return difference, largest


def read_names(path):
    """Returns the attributes' names in a file, one a line; raises OSError, or ValueError where one is there twice."""
    try:
        with open(path, encoding="utf-8-sig") as f:
            names = [line.strip() for line in f.read().split("\n") if line.strip()]
    except UnicodeDecodeError:
        raise ValueError("%s: is not UTF-8 text; it holds the attributes' names, one a line" % path)
    if len(set(names)) < len(names):
        raise ValueError("%s: holds a name more than once: %s" % (path, max(names, key=names.count)))
    return names


def describe(path, checkpoint, names, size, last_conv_stride):
    """Writes what its user has to know into the ONNX file at path, as metadata, which no tool computes with.

    checkpoint: its path; names: of the attributes, None if unknown; size: (height, width). tools/common.py reads it.
    """
    import onnx
    sha256 = hashlib.sha256()
    with open(checkpoint, "rb") as f:
        for block in iter(lambda: f.read(1 << 20), b""):
            sha256.update(block)
    values = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],  # preprocess_deepmar_pytorch.py's, ImageNet's
              "size": size, "layout": "NCHW RGB", "output": "logits", "last_conv_stride": last_conv_stride,
              "checkpoint_sha256": sha256.hexdigest(), "version": VERSION}
    if names is not None:
        values["attributes"] = names
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {
        "deepmar." + key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in values.items()})
    onnx.save(model, path)


@contextlib.contextmanager
def whole_file(path):
    """Yields the name of a new file beside path, which becomes path if the block succeeds, and goes if it fails."""
    for left in glob.glob(glob.escape(path) + ".[0-9]*.partial"):
        if not os.path.exists("/proc/" + left.split(".")[-2]):  # by a run that was killed
            with contextlib.suppress(FileNotFoundError):  # another run took it away
                os.remove(left)
    temporary = "%s.%d.partial" % (path, os.getpid())
    try:
        open(temporary, "wb").close()
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise OSError("%s: cannot be written: %s" % (path, error.strerror or error))
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        usage="export_onnx.py CHECKPOINT OUTPUT BATCH_SIZE [--attributes FILE]\n"
              "       export_onnx.py --input_file CHECKPOINT --output_file OUTPUT [--batch_size N] [--attributes FILE]")
    parser.add_argument("positional", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--input_file", metavar="CHECKPOINT", help="the trained checkpoint")
    parser.add_argument("--output_file", metavar="OUTPUT", help="the ONNX file to write")
    parser.add_argument("--batch_size", metavar="N", help="images per inference (default: 1)")
    parser.add_argument("--attributes", metavar="FILE",
                        help="the attributes' names, one a line, to be kept in the model's metadata")
    args = parser.parse_intermixed_args(argv)
    named = [args.input_file, args.output_file, args.batch_size]
    if args.positional and any(value is not None for value in named):
        parser.error("give the arguments either in their order or by name, not both")
    values = args.positional or named
    if len(values) != 3 or None in values[:2]:
        parser.error("give CHECKPOINT, OUTPUT and BATCH_SIZE")
    checkpoint, output, batch_size = values
    batch_size = "1" if batch_size is None else batch_size
    if not re.fullmatch("[1-9][0-9]{0,8}", batch_size):
        parser.error("BATCH_SIZE must be a positive whole number, not %r" % batch_size)
    batch_size = int(batch_size)

    # Until these imports end, Ctrl-C ends the process at once: torch makes errors of its own of a KeyboardInterrupt.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    if os.path.exists(os.path.join(os.path.dirname(os.path.abspath(__file__)), "DeepMAR.py")):
        from DeepMAR import load_model
    else:
        from baseline.model.DeepMAR import load_model
    import onnxruntime  # noqa: F401 - its absence shows before the work is done
    signal.signal(signal.SIGINT, before)
    names = None if args.attributes is None else read_names(args.attributes)
    model = load_model(checkpoint)
    if names is not None and len(names) != model.num_att:
        raise ValueError("%s: holds %d names, but %s has %d attributes" % (args.attributes, len(names), checkpoint, model.num_att))
    try:
        with whole_file(output) as temporary:
            export(model, temporary, batch_size)
            describe(temporary, checkpoint, names, (SIZE, SIZE), 2)
            difference, largest = verify(model, temporary, batch_size)
    except (OSError, ValueError):
        raise
    except Exception as error:  # torch, onnx and onnxruntime have kinds of their own, some of many lines
        raise ValueError("%s: not exported: %s: %s" % (output, type(error).__name__, " ".join(str(error).split())))
    print("%s: batch size %d, %d attributes, opset %d; ONNX Runtime and PyTorch differ by at most %.3g "
          "(largest logit %.3g)" % (output, batch_size, model.num_att, OPSET, difference, largest))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, ImportError) as error:
        sys.exit("export_onnx.py: error: %s" % error)
    except KeyboardInterrupt:
        sys.exit("export_onnx.py: interrupted; no file is half written")
