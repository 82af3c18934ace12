"""Stage 6's results as logits. Every tool decides here whether a model gives logits or probabilities."""
import os
import re

from lib.labels import read_labels
from lib.models import description, output_kind, read_unchecked
from lib.names import composed, read_list, stem
from lib.script import importing, note, some

with importing():
    import numpy as np

PROBABILITIES = "all values lie between 0 and 1: they look like probabilities (of a model that ends in a Sigmoid), not logits"
SIGMOID = "the model ends in a Sigmoid"


def list_results(folders):
    """Returns {stem: path} of the result files in the folders. Raises OSError, or ValueError if an image has two."""
    results, twice = {}, []
    for folder in folders:
        if not os.path.isdir(folder):
            raise FileNotFoundError("%s: no such folder; the benchmark tool writes it in stage 6" % folder)
    pending = list(folders)
    for folder in pending:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if not name.endswith(".bin"):
                    # with several devices, ais_bench makes a subfolder for each
                    if re.match("device[0-9]", name) and folder in folders and entry.is_dir():
                        pending.append(entry.path)
                    continue
                image, ending = composed(name[:-len("_1.bin")]), name[-len("_1.bin"):]
                if not image or ending not in ("_1.bin", "_0.bin") or not entry.is_file():
                    raise ValueError("%s: is not a result file NAME_1.bin or NAME_0.bin" % entry.path)
                if image in results:
                    twice.append("%s and %s" % (results[image], entry.path))
                results[image] = entry.path
    if twice:
        raise ValueError("%d images have two results: %s" % (len(twice), some(sorted(twice))))
    if not results:
        raise ValueError("%s: has no result file NAME_1.bin or NAME_0.bin; stage 6 writes them" % ", ".join(folders))
    return results


def check_images(path, results):
    """Raises ValueError unless the results {stem: path} are exactly those of a list file's images."""
    listed = set(map(stem, read_list(path)))
    missing, others = sorted(listed - set(results)), sorted(set(results) - listed)
    problems = []
    if missing:
        problems.append("%d of its %d images have no result (%s)" % (len(missing), len(listed), some(missing)))
    if others:
        problems.append("%d of %d results are of other images (%s)" % (len(others), len(results), some(others)))
    if problems:
        raise ValueError("%s: %s; run stages 4 to 6 again" % (path, ", and ".join(problems)))


def read_logits(paths, attributes, finite=True):
    """Returns the result files' logits, float32 [files, attributes]. Raises ValueError for a wrong size or, if finite, NaN."""
    size = 4 * attributes
    data = []
    for path in paths:
        file = os.open(path, os.O_RDONLY)  # Python's file objects would take twice as long
        data.append(os.read(file, size + 1))
        os.close(file)
    wrong = ["%s (%d bytes)" % (path, os.path.getsize(path)) for path, read in zip(paths, data) if len(read) != size]
    if wrong:
        raise ValueError("%d of %d results are not float32 logits of %d attributes (%d bytes): %s"
                         % (len(wrong), len(paths), attributes, size, some(wrong)))
    logits = np.frombuffer(b"".join(data), "<f4").reshape(len(paths), attributes)
    bad = ~np.isfinite(logits).all(axis=1)
    if finite and bad.any():
        raise ValueError("%d of %d results hold NaN or infinite logits: %s"
                         % (bad.sum(), len(paths), some(np.array(paths)[bad])))
    return logits


def attributes_in(path):
    """Returns the number of logits in a result file. Raises ValueError if its size cannot be that of float32 values."""
    size = os.path.getsize(path)
    if size == 0 or size % 4:
        raise ValueError("%s: holds no float32 logits (%d bytes)" % (path, size))
    return size // 4


def probabilities(logits):
    """Returns the sigmoid of logits as float64. It uses tanh, which does not overflow for large logits."""
    return (1 + np.tanh(logits.astype(np.float64) / 2)) / 2


def look_like_probabilities(values):
    """Returns whether all values lie between 0 and 1. Logits would not, because most of them are negative."""
    with np.errstate(invalid="ignore"):  # NaN is neither
        return bool(((values >= 0) & (values <= 1)).all())


def logits_from(chances):
    """Returns the logits of probabilities, float32. Probabilities of 0 and 1 become about -16 and 16."""
    chances = np.clip(chances.astype(np.float64), 1e-7, 1 - 1e-7)
    return np.log(chances / (1 - chances)).astype(np.float32)


def kind_of(path):
    """Returns output_kind() of an ONNX model, or what an OM's description says. Raises OSError or ValueError."""
    if path.endswith(".om"):
        found = description(path).get("output")
        return found if found in ("logits", "probabilities") else None
    return output_kind(read_unchecked(path))


def as_logits(values, source, kind=None):
    """Returns (a model's output as logits, "logits" or "probabilities": what it holds). Prints a note if it converts.

    kind: what output_kind() says. If it is None, the values decide, so they must be those of all images of a run. source: the
    file or folder of the values, for the note.
    """
    why = SIGMOID if kind == "probabilities" else PROBABILITIES
    kind = kind or ("probabilities" if look_like_probabilities(values) else "logits")
    if kind == "logits":
        return values, kind
    note("%s: %s; its probabilities are converted to logits" % (source, why))
    return logits_from(values), kind


def declared_kind(values, model):
    """Returns what results hold: values if the user says it, else "probabilities" if their model's description does, else None.

    model: the model's file for description(), or None.
    """
    return values or ("probabilities" if model and description(model).get("output") == "probabilities" else None)


def read_scored(folders, label_file, image_list=None, declared=None):
    """Reads a run's results and their labels. Returns (the images' names, logits, labels, how many labelled images have no result).

    The arrays are [images, attributes]. image_list: the file of exactly these images. declared: what the results hold, from
    declared_kind(). Without it, values that look like probabilities are an error, because a wrong guess would give a wrong
    accuracy. Raises OSError or ValueError.
    """
    rows, labels = read_labels(label_file)
    results = list_results(folders)
    if image_list is not None:
        check_images(image_list, results)
    unlabelled = sorted(name for name in results if name not in rows)
    if unlabelled:
        raise ValueError("%d of %d results have no label in %s: %s"
                         % (len(unlabelled), len(results), label_file, some(results[name] for name in unlabelled)))
    names = sorted(results)
    logits, source = read_logits([results[name] for name in names], labels.shape[1]), ", ".join(folders)
    likely = look_like_probabilities(logits)
    if likely and declared is None:
        raise ValueError("%s: %s. Score them with --values probabilities, or with --values logits if they are really logits"
                         % (source, PROBABILITIES))
    if declared == "probabilities":
        if not likely:
            raise ValueError("%s: holds values below 0 or above 1, so they are not probabilities; score them with --values logits"
                             % source)
        logits = logits_from(logits)
    return names, logits, labels[[rows[name] for name in names]], len(rows) - len(results)
