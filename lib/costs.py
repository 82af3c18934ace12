"""What deployment costs: the steps from the trained network to the deployed one, and what each does to the logits and the accuracy."""
import collections
import contextlib
import hashlib
import os

from lib import camera, int8
from lib.aipp import add_aipp
from lib.bins import contents
from lib.files import whole_file
from lib.float16 import round_results, round_weights
from lib.images import empty_input, normalise, preprocess, read_image, resize
from lib.machine import cores
from lib.metrics import effect
from lib.models import copied
from lib.names import stem
from lib.script import importing, joined, one_line, progress, some
from lib.session import calls_at_once, cpu_session, run_batches

with importing():
    import numpy as np

# A row of the table. steps: what is done to the model, in this order. kind: of its input, a key of lib.images.LAYOUTS. resized: as of
# lib.images.normalise(). trust: "reference", "exact", "bound" or "estimate". why: more about that.
Row = collections.namedtuple("Row", "name steps kind resized trust why")


def rows(standard, calibrated):
    """Returns the Rows, float32's first. standard: NV12's, a key of camera.STANDARDS. calibrated: a text about INT8's calibration."""
    plain, by_amct = camera.resized(camera.resize_plain), "AMCT's arithmetic, but the card's kernels are unknown; " + calibrated
    rounding = "each node's result is rounded once; a card may move the logits twice as far"
    return [Row("float32", (), "float32", resize, "reference", "stage 4's bins and the model as it is"),
            Row("AIPP", ("aipp",), "uint8", resize, "exact", "the documented formula, in float16"),
            Row("float16", ("float16",), "float32", resize, "bound", rounding),
            Row("AIPP + float16", ("aipp", "float16"), "uint8", resize, "bound", rounding),
            Row("INT8", ("int8",), "float32", resize, "estimate", by_amct),
            Row("INT8 + AIPP", ("int8", "aipp"), "uint8", resize, "estimate", by_amct),
            Row("plain resize", (), "float32", plain, "exact", "OpenCV's INTER_LINEAR to the bit; DVPP may differ by a level"),
            Row("plain resize + NV12", ("aipp",), "nv12-" + standard, plain, "estimate", "standard %s; a camera's colours may lie "
                "elsewhere, and DVPP resizes the NV12 itself" % standard)]


# --- models -----------------------------------------------------------------------------------------------------------

def int8_twin(model, source, paths, shape):
    """Returns the INT8 twin of an onnx.ModelProto with all layers in INT8.

    source: the model's path, for errors. paths: of the image files for calibration. shape: (batch size, height, width). Raises
    ValueError if an image cannot be read.
    """
    folded, batches = copied(model), []
    int8.fold(folded)
    layers = int8.find_layers(folded, source)
    for group in int8.spread(paths, len(paths), shape[0]):
        batches.append(empty_input(shape[1:], images=shape[:1]))
        for path, row in zip(group, batches[-1]):
            try:
                preprocess(path, out=row)
            except Exception as error:  # Pillow raises nearly anything on damaged files
                raise ValueError("%s: cannot be read for INT8's calibration: %s" % (path, one_line(error)))
    return int8.twin(folded, layers, int8.calibrate(folded, layers, batches))


def twin(model, row, source):
    """Returns a copy of an onnx.ModelProto after a Row's steps. With the step "int8", the model is already an INT8 twin."""
    model = copied(model)
    for step in row.steps:
        if step == "float16":
            round_weights(model.graph)
            round_results(model, source)
        elif step != "int8":
            add_aipp(model, source, row.kind.partition("-")[2] or None)
    return model


# --- logits -----------------------------------------------------------------------------------------------------------

def compute(model, row, paths, shape, advance):
    """Runs a Row's model, an onnx.ModelProto, over image files on the CPU. Returns what it gives, float32 [images, attributes].

    shape: (batch size, height, width). Calls advance(images) after every batch. Raises ValueError if an image cannot be read or its
    logits are NaN or infinite.
    """
    calls = calls_at_once(cores(), len(paths), *shape)
    session = cpu_session(model, max(1, cores() - calls + 1))
    found, bad = [], []

    def fill(path, place):
        try:
            normalise(read_image(path)[0], place, row.kind, row.resized)
        except Exception as error:  # Pillow raises nearly anything on damaged files
            return "%s: %s" % (path, one_line(error))

    for batch, reasons, outputs in run_batches(session, paths, fill, calls, shape=shape):
        found.append(outputs)
        bad += [reason for reason in reasons if reason]
        advance(len(batch))
    if bad:
        raise ValueError("%d of %d images cannot be read: %s" % (len(bad), len(paths), joined(sorted(bad), "; ")))
    found = np.concatenate(found)
    wrong = [path for path, finite in zip(paths, np.isfinite(found).all(axis=1)) if not finite]
    if wrong:
        raise ValueError("%s: NaN or infinite logits for %d of %d images: %s%s" % (
            row.name, len(wrong), len(paths), some(wrong), "; tools/compare.py --rehearsal names the layer" * ("float16" in row.steps)))
    return found


def checksums(paths):
    """Returns the SHA-256 of each file. It is that of nothing for what is no regular file, because reading a FIFO would wait."""
    found = []
    for path in paths:
        content = b""
        if os.path.isfile(path):
            with open(path, "rb") as f:
                content = f.read()
        found.append(hashlib.sha256(content).hexdigest())
    return found


def kept(path, made_from):
    """Returns the logits in a row's file, or None if there are none or if they were made from something else."""
    with contextlib.suppress(OSError, ValueError, EOFError), open(path, "rb") as f:
        if f.readline() == made_from.encode() + b"\n":
            return np.load(f)
    return None


def keep(path, logits, made_from):
    """Writes a row's file: a line about what it was made from, then the logits in numpy's own format."""
    with whole_file(path) as temporary, open(temporary, "wb") as f:
        f.write(made_from.encode() + b"\n")
        np.save(f, logits)


def all_logits(table, model, source, paths, calibration, checks, shape, folder):
    """Returns ({row's name: what its model gives, float32 [images, attributes]}, how many rows were kept in folder).

    Every row is kept as soon as it is computed. One that was made from the same contents is not computed again. table: of rows().
    source: the model's path. paths, calibration: of image files. checks: checksums() of the model, of paths and of calibration. shape:
    (batch size, height, width).
    """
    whole = [hashlib.sha256("".join(check).encode()).hexdigest() for check in checks]
    files = [os.path.join(folder, row.name.replace(" + ", "_").replace(" ", "_") + ".logits") for row in table]
    made_from = [" ".join([row.kind] + whole[:3 if "int8" in row.steps else 2]) for row in table]
    found = {row.name: kept(*entry) for row, *entry in zip(table, files, made_from)}
    left = [entry for entry in zip(table, files, made_from) if found[entry[0].name] is None]
    quantized = None
    if any("int8" in row.steps for row, _, _ in left):
        quantized = int8_twin(model, source, calibration, shape)
    with progress(len(left) * len(paths), "image") as bar:
        for row, path, made in left:
            made_by = twin(quantized if "int8" in row.steps else model, row, source)
            found[row.name] = compute(made_by, row, paths, shape, bar.update)
            keep(path, found[row.name], made)
    return found, len(table) - len(left)


# --- figures ----------------------------------------------------------------------------------------------------------

def figures(row, logits, reference, labels, groups, size):
    """Returns a row's figures as a dict for JSON. drop: of instance_acc, a share. interval: the drop's, or None.

    logits, reference: of the row and of float32, float32 [images, attributes]. size: (height, width).
    """
    change = effect(logits, reference, labels, groups)["instance_acc"]
    return {"name": row.name, "bytes": contents(row.kind, *size)[1],
            "max_difference": float(np.abs(logits - reference).max()), "rms_difference": int8.rms(logits, reference),
            "flips": int(((logits >= 0) != (reference >= 0)).sum()), "instance_acc": change["a"],
            "drop": -change["change"] + 0.0, "interval": change["interval"] and [-value + 0.0 for value in change["interval"][::-1]],
            "trust": row.trust, "why": row.why}


def trust(rows):
    """Returns [(names of rows, how far they can be trusted and why)] of the rows that figures() returned."""
    found = {}
    for row in rows:
        found.setdefault("%(trust)s: %(why)s" % row, []).append(row["name"])
    return [(", ".join(names), why) for why, names in found.items()]


def identity(names, labels):
    """Returns a checksum of a list's images and their labels, [images, attributes], in any order."""
    images = sorted(zip(map(stem, names), np.asarray(labels, bool)), key=lambda item: item[0])
    return hashlib.sha256(b"".join(name.encode("utf-8", "surrogateescape") + b"\0" + row.tobytes() for name, row in images)).hexdigest()
