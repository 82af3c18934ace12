"""Stage 1: a DeepMAR checkpoint -> an ONNX model of opset 11 that atc accepts, checked before it is written.

    python3 export_onnx.py xxx/checkpoint.pth.tar deepmar_bs1.onnx 1
    python3 export_onnx.py --input_file=xxx/checkpoint.pth.tar --output_file=deepmar_bs1.onnx --batch_size=1

The model has the input actual_input_1, float32 [batch size,3,224,224] (RGB, normalised), and the output output1, float32
[batch size, attributes] (logits). The script writes it only if onnx's checker accepts it and ONNX Runtime computes the same
logits as PyTorch on random input. The model's metadata record its input format, its checkpoint and, with --attributes FILE,
the attributes' names. The script needs DeepMAR.py beside it. In the open-source repository, DeepMAR.py may instead replace
baseline/model/DeepMAR.py.

The training script has the options --last_conv_stride and --resize. A checkpoint does not record their values, and any
values can be exported. Give the training's values as --last-conv-stride and --size.
"""
import argparse
import contextlib
import errno
import fcntl
import glob
import hashlib
import inspect
import io
import json
import os
import re
import signal
import sys
import warnings

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # otherwise ONNX Runtime >= 1.29 reports each model to its makers

VERSION = "1.0"    # the version of these scripts, for the model's metadata
OPSET = 11         # the ONNX operator set that atc supports
TOLERANCE = 1e-4   # allowed difference between the logits of ONNX Runtime and PyTorch, relative to the largest logit


def export(model, shape):
    """Returns the network as the bytes of an ONNX file, with the fixed input shape [N,3,H,W] and folded constants."""
    import torch
    # torch 2.9 changed the default to an exporter that cannot emit opset 11 for this network; 1.6 has no such argument.
    arguments = {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its age and about the pooling window, which becomes a constant
        torch.onnx.export(model, torch.zeros(shape), content, opset_version=OPSET, input_names=["actual_input_1"],
                          output_names=["output1"], do_constant_folding=True, **arguments)
    return content.getvalue()


def verify(model, content, shape):
    """Compares an ONNX file's bytes with the network on seeded random input of the shape [N,3,H,W].

    Returns (largest absolute difference of the logits, largest absolute logit). Raises ValueError if onnx's checker
    refuses the model, or if the logits have another shape, are not finite, or differ by more than TOLERANCE.
    """
    import numpy as np
    import onnx
    import onnxruntime
    import torch
    try:
        onnx.checker.check_model(onnx.shape_inference.infer_shapes(onnx.load_from_string(content)), full_check=True)
    except (onnx.checker.ValidationError, RuntimeError) as error:
        raise ValueError("the exported model is not valid: %s" % " ".join(str(error).split()))
    images = np.random.RandomState(0).standard_normal(shape).astype(np.float32)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    ours, = session.run(["output1"], {"actual_input_1": images})
    with torch.no_grad():
        theirs = model(torch.from_numpy(images)).numpy()
    if ours.shape != theirs.shape:
        raise ValueError("ONNX Runtime gives logits of shape %s, PyTorch %s" % (ours.shape, theirs.shape))
    difference, largest = float(np.abs(ours - theirs).max()), float(np.abs(theirs).max())
    if not difference <= TOLERANCE * max(1.0, largest):  # written this way, NaN is a mismatch too
        raise ValueError("ONNX Runtime's logits differ from PyTorch's by %.3g (largest logit %.3g)"
                         % (difference, largest))
    return difference, largest


def read_text(path):
    """Returns the content of a UTF-8 text file without a byte order mark. Each line ends with \\n, whatever the file has.

    Raises OSError or ValueError.
    """
    try:
        with open(path, encoding="utf-8-sig") as f:
            text = f.read()
    except UnicodeDecodeError as error:
        raise not_utf8(path, error.start, error.object)
    if "\0" in text:  # English text in UTF-16 is valid UTF-8
        raise not_utf8(path, len(text[:text.index("\0")].encode()), text.encode())
    return text


def not_utf8(path, byte, content):
    """Returns the error for a text file that is not UTF-8. byte: the first wrong one. content: the file's, or some lines of it."""
    zeros = [content[i::2].count(0) for i in (0, 1)]  # in UTF-16, one byte of each Latin letter and of each line's end is 0
    encoding = "GBK"
    if content[:4] == b"\xff\xfe\0\0":
        encoding = "UTF-32"
    elif content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        encoding = "UTF-16"
    elif max(zeros) > max(20 * min(zeros), len(content) / 20, 1):
        encoding = "UTF-16BE" if zeros[0] > zeros[1] else "UTF-16LE"
    elif any(zeros):
        return ValueError("%s: is not text (byte %d)" % (path, byte))
    else:
        try:
            content.decode("gb18030")
        except UnicodeDecodeError:
            encoding = "ITS_ENCODING"
    return ValueError("%s: is not UTF-8 text (byte %d); convert it: iconv -f %s -t UTF-8" % (path, byte, encoding))


def read_names(path):
    """Reads the attributes' names from a file, one per line. Raises OSError, or ValueError if a name occurs twice."""
    names = [line.strip() for line in read_text(path).split("\n") if line.strip()]
    if len(set(names)) < len(names):
        raise ValueError("%s: holds a name more than once: %s" % (path, max(names, key=names.count)))
    return names


def describe(content, checkpoint, names, size, last_conv_stride):
    """Adds what a user must know to an ONNX file's metadata. Returns the file's new bytes.

    checkpoint: its path. names: the attributes' names, or None. size: (height, width). lib/models.py reads the metadata.
    """
    import onnx
    sha256 = hashlib.sha256()
    with open(checkpoint, "rb") as f:
        for block in iter(lambda: f.read(1 << 20), b""):
            sha256.update(block)
    values = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],  # ImageNet's, as in stage 4
              "size": size, "layout": "NCHW RGB", "output": "logits", "last_conv_stride": last_conv_stride,
              "checkpoint_sha256": sha256.hexdigest(), "version": VERSION}
    if names is not None:
        values["attributes"] = names
    model = onnx.ModelProto.FromString(content)
    onnx.helper.set_model_props(model, {
        "deepmar." + key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in values.items()})
    return model.SerializeToString()


# The same whole_file() and lock(), and above read_text() and not_utf8(), as in lib/files.py, because this file is also copied alone.

@contextlib.contextmanager
def whole_file(path):
    """Yields the name of a new file next to path. Renames it to path if the block succeeds, deletes it if the block fails."""
    if os.path.exists(path) and not os.path.isfile(path):  # root could replace even /dev/null
        raise OSError("%s: is no regular file, so it cannot be replaced; give another name" % path)
    sweep(glob.escape(path) + ".%s.partial" % ("[0-9a-f]" * 8))
    temporary = "%s.%s.partial" % (path, os.urandom(4).hex())
    try:
        with open(temporary, "x+b") as file:
            lock(file)
            yield temporary
            os.replace(temporary, path)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise OSError("%s: something is mounted there, so it cannot be replaced as a whole; mount the folder that holds it, or "
                          "give another name" % path)
        raise OSError("%s: cannot be written: %s" % (path, error.strerror or error))
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def sweep(pattern):
    """Removes the files of a pattern that no process locks: killed runs left them."""
    for path in glob.glob(pattern):
        with contextlib.suppress(OSError), open(path, "r+b") as file:  # NFS cannot lock a file that is open only for reading
            if lock(file):
                os.remove(path)


def lock(file):
    """Locks an open file or folder. Returns True, or False if another process holds the lock, or None if there are no locks.

    Some file systems have none: Lustre without -o flock, some NFS and FUSE mounts.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:
        return None


def parse(argv):
    """Returns the arguments, after checking args.checkpoint, output, batch_size, size and num_att."""
    parser = argparse.ArgumentParser(
        prog="export_onnx.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        usage="export_onnx.py CHECKPOINT OUTPUT BATCH_SIZE [options]\n"
              "       export_onnx.py --input_file CHECKPOINT --output_file OUTPUT [--batch_size N] [options]")
    parser.add_argument("positional", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--input_file", metavar="CHECKPOINT", help="the trained checkpoint")
    parser.add_argument("--output_file", metavar="OUTPUT", help="the ONNX file to write")
    parser.add_argument("--batch_size", metavar="N", help="images per inference (default: 1)")
    parser.add_argument("--last-conv-stride", "--last_conv_stride", metavar="N", type=int, choices=(1, 2), default=2,
                        help="the network's stride in layer4, 1 or 2, as in training (default: 2)")
    parser.add_argument("--size", metavar=("H", "W"), nargs=2, default=("224", "224"),
                        help="height and width of the images in pixels, as in training (default: 224 224)")
    parser.add_argument("--num-att", "--num_att", metavar="N",
                        help="the number of attributes that the checkpoint must have (default: any)")
    parser.add_argument("--state-dict", "--state_dict", metavar="NAME",
                        help="the state dict to use if the checkpoint has several, e.g. state_dict_ema or ema.module")
    parser.add_argument("--attributes", metavar="FILE",
                        help="a file with the attributes' names, one per line, for the model's metadata")
    args = parser.parse_intermixed_args(argv)
    named = [args.input_file, args.output_file, args.batch_size]
    if args.positional and any(value is not None for value in named):
        parser.error("give the arguments either in their order or by name, not both")
    values = args.positional or named
    if len(values) != 3 or None in values[:2]:
        parser.error("give CHECKPOINT, OUTPUT and BATCH_SIZE")

    def number(name, text):
        if not re.fullmatch("[1-9][0-9]{0,8}", text):
            parser.error("%s must be a positive whole number, not %r" % (name, text))
        return int(text)

    args.checkpoint, args.output, batch_size = values
    args.batch_size = number("BATCH_SIZE", "1" if batch_size is None else batch_size)
    args.size = tuple(number("--size", text) for text in args.size)
    args.num_att = None if args.num_att is None else number("--num-att", args.num_att)
    return args


def import_network():
    """Imports the libraries that stage 1 needs. Returns DeepMAR.load_model."""
    # Python may not search the script's folder: PYTHONSAFEPATH excludes it, and the script may be started through a link.
    folder = os.path.dirname(os.path.realpath(__file__))
    sys.path.insert(0, folder)
    # During its import, torch turns a KeyboardInterrupt into other errors. Until it is loaded, Ctrl-C ends the process.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    if os.path.exists(os.path.join(folder, "DeepMAR.py")):
        from DeepMAR import load_model
    else:
        from baseline.model.DeepMAR import load_model
    import onnxruntime  # noqa: F401 - if it is missing, the script fails here and not after the work
    signal.signal(signal.SIGINT, before)
    return load_model


def main(argv=None):
    args = parse(argv)
    names = None if args.attributes is None else read_names(args.attributes)
    shape = (args.batch_size, 3) + args.size
    notes = []
    model = import_network()(args.checkpoint, args.last_conv_stride, args.state_dict, notes.append)
    if args.num_att not in (None, model.num_att):
        raise ValueError("%s: was trained for %d attributes, but --num-att asks for %d; take the checkpoint and the labels "
                         "from the same data set" % (args.checkpoint, model.num_att, args.num_att))
    if names is not None and len(names) != model.num_att:
        raise ValueError("%s: holds %d names, but %s has %d attributes"
                         % (args.attributes, len(names), args.checkpoint, model.num_att))
    try:
        with whole_file(args.output) as temporary:
            content = describe(export(model, shape), args.checkpoint, names, args.size, args.last_conv_stride)
            difference, largest = verify(model, content, shape)
            with open(temporary, "wb") as f:
                f.write(content)
    except (OSError, ValueError):
        raise
    except Exception as error:  # torch, onnx and onnxruntime have their own kinds of errors, some with many lines
        raise ValueError("%s: was not exported: %s: %s" % (args.output, type(error).__name__, " ".join(str(error).split())))
    for text in notes:
        print("%s: %s" % (args.checkpoint, text))
    print("%s: batch size %d, images of %d x %d (height x width), last_conv_stride %d, %d attributes, opset %d; ONNX Runtime and "
          "PyTorch differ by at most %.3g (largest logit %.3g)" % ((args.output, args.batch_size) + args.size + (
              args.last_conv_stride, model.num_att, OPSET, difference, largest)))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # the terminal may not be able to show every name
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the program that reads the output has ended, as head does; the file is written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # 128 + SIGPIPE, as a shell reports it
    except (OSError, ValueError, ImportError) as error:
        sys.exit("export_onnx.py: error: %s" % error)
    except KeyboardInterrupt:
        sys.exit("export_onnx.py: interrupted; no file is half written")
