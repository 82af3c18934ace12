"""Finds a threshold for each attribute on a validation split. An image has the attribute if its logit reaches it.

    python3 tools/thresholds.py result/dumpOutput_device0 val.json
    python3 tools/thresholds.py result/dumpOutput_device0 val.json --target-precision 0.9 --output careful.json

If only one image in a hundred has an attribute, its logits seldom reach 0. The script chooses the threshold with the largest F1.
With --target-precision, it chooses the threshold with the largest recall at this precision; --target-recall does the reverse.
Stage 7 and tools/predict.py take the file with --thresholds. Without it, all thresholds are 0.

A threshold always looks good on the images on which it was found. So stage 7 refuses to score these images with it. For the
same reason, the script computes the gain by cross-validation: it judges each fifth of the images with thresholds from the
other four.
"""
import argparse
import hashlib
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from lib.files import write_text
from lib.labels import assumed, attribute_names, label_checksum
from lib.metrics import MIN_IMAGES, SEED, change_intervals, ratio, score
from lib.results import declared_kind, read_scored
from lib.script import command, importing, number

with importing():
    import numpy as np

FOLDS = 5
GAIN_METRICS = ["label_precision", "label_recall", "label_F1", "mA", "instance_acc", "instance_precision", "instance_recall",
                "instance_F1"]


def find_threshold(logits, true, precision=None, recall=None):
    """Returns the best threshold for one attribute's logits, float32 [images], or None if no threshold reaches the target.

    true: bool [images]. precision, recall: the target, if there is one. Otherwise the best threshold has the largest F1.
    """
    order = np.argsort(-logits, kind="stable")
    logits, tp = logits[order], np.cumsum(true[order])
    predicted = np.arange(1, len(logits) + 1)  # the number of images that reach a threshold just below each logit
    precisions, recalls = tp / predicted, tp / max(1, tp[-1])
    if precision is not None:
        scores = np.where(precisions >= precision, recalls, -1)
    elif recall is not None:
        scores = np.where(recalls >= recall, precisions, -1)
    else:
        scores = 2 * tp / (predicted + tp[-1])
    scores[:-1][logits[:-1] == logits[1:]] = -1  # no threshold lies between equal logits
    best = int(scores.argmax())
    if scores[best] < 0:
        return None
    if best == len(logits) - 1:
        return logits[best]
    between = np.float32(0.5) * logits[best] + np.float32(0.5) * logits[best + 1]
    return between if between > logits[best + 1] else logits[best]


def find_thresholds(logits, true, tunable, target):
    """Returns (the thresholds of all attributes, float32; whether each was found). One that was not found is 0."""
    found = [find_threshold(logits[:, i], true[:, i], **target) if tunable[i] else None for i in range(len(tunable))]
    return np.array([threshold or 0 for threshold in found], np.float32), [threshold is not None for threshold in found]


def cross_validate(logits, true, tunable, target):
    """Returns the predictions for each image, bool [images, attributes], with thresholds that were found without this image."""
    predicted = np.empty(true.shape, bool)
    fold_of = np.random.RandomState(SEED).permutation(len(true)) % FOLDS
    for fold in range(FOLDS):
        others = fold_of != fold
        predicted[~others] = logits[~others] >= find_thresholds(logits[others], true[others], tunable, target)[0]
    return predicted


def figures(predicted, true):
    """Returns precision, recall and F1 of each attribute, [{name: figure}]. An undefined figure is None."""
    tp, predictions, positives = (predicted & true).sum(axis=0), predicted.sum(axis=0), true.sum(axis=0)
    values = zip(ratio(tp, predictions), ratio(tp, positives), 2 * ratio(tp, predictions + positives))
    return [{name: None if np.isnan(value) else float(value) for name, value in zip(("precision", "recall", "F1"), row)}
            for row in values]


def gain(tuned, at_0, true):
    """Returns the metrics of predictions with tuned thresholds and with 0, {metric: {"at_0", "tuned", "gain", "interval"}}."""
    of_tuned, of_0 = score(tuned, true)[0], score(at_0, true)[0]
    intervals = change_intervals(tuned, at_0, true, GAIN_METRICS)
    return {name: {"at_0": of_0[name], "tuned": of_tuned[name], "gain": of_tuned[name] - of_0[name],
                   "interval": intervals[name]} for name in GAIN_METRICS if not np.isnan(of_tuned[name] + of_0[name])}


def table(rows):
    """Yields the lines of a table of the attributes. An undefined figure is '-'."""
    width = max(len(row["name"]) for row in rows + [{"name": "attribute"}])
    yield "%-*s  images  threshold  F1 at 0      F1  precision  recall" % (width, "attribute")
    for row in rows:
        new = row["cross_validated"]
        cells = tuple("-" if value is None else "%.4f" % value
                      for value in (row["at_0"]["F1"], new["F1"], new["precision"], new["recall"]))
        yield "%-*s  %6d  %9.4f  %7s  %6s  %9s  %6s" % ((width, row["name"], row["positives"], row["threshold"]) + cells)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("folders", metavar="RESULT_DIR", nargs="+", help="the results of a validation split")
    parser.add_argument("label_file", metavar="LABEL", help="its label.json")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--target-precision", type=number(float, 0.01, 1), metavar="P",
                        help="choose the largest recall at this precision, such as 0.9")
    target.add_argument("--target-recall", type=number(float, 0.01, 1), metavar="R",
                        help="choose the largest precision at this recall")
    parser.add_argument("--attributes", metavar="FILE", help="a file with the attributes' names, one per line")
    parser.add_argument("--model", metavar="FILE", help="the model that made the results; it names the attributes if it can")
    parser.add_argument("--values", choices=["logits", "probabilities"], help="what the results hold, as in stage 7")
    parser.add_argument("--output", default="thresholds.json", metavar="FILE", help="the file to write (default: %(default)s)")
    return parser.parse_args(argv)


def content_of(args, images, logits, labels):
    """Returns the content of the file to write. Raises OSError or ValueError."""
    true, names = labels == 1, attribute_names(labels.shape[1], args.attributes, args.model)
    target = {"precision": args.target_precision, "recall": args.target_recall}
    goal = "maximal F1"
    for name, value in target.items():
        if value is not None:
            goal = "%s >= %g" % (name, value)
    positives = true.sum(axis=0)
    tunable = np.minimum(positives, len(true) - positives) >= MIN_IMAGES
    if not tunable.any():
        raise ValueError("%s: has no attribute that at least %d images have and as many do not have; tune on more images"
                         % (args.label_file, MIN_IMAGES))
    thresholds, reached = find_thresholds(logits, true, tunable, target)
    predicted, at_0 = cross_validate(logits, true, tunable, target), logits >= 0
    tuned_on = {image: label_checksum(row) for image, row in zip(images, labels)}
    lines = "".join("%s %s\n" % item for item in sorted(tuned_on.items()))
    rows = [{"name": name, "threshold": float(threshold), "tuned": tuned, "positives": int(count), "at_0": old,
             "cross_validated": new}
            for name, threshold, tuned, count, old, new in zip(names, thresholds, reached, positives, figures(at_0, true),
                                                           figures(predicted, true))]
    return {"goal": goal, "images": len(images), "checksum": hashlib.sha256(lines.encode("utf-8")).hexdigest(),
            "names_assumed": assumed(names), "attributes": rows, "gain": gain(predicted, at_0, true), "tuned_on": tuned_on}


def lines_of(content, path):
    """Yields the lines to print about the content of the file at path."""
    rows, images = content["attributes"], content["images"]
    yield from table(rows)
    yield "%s: %s, %d of %d attributes tuned on %d images" % (
        path, content["goal"], sum(row["tuned"] for row in rows), len(rows), images)
    few = [row["name"] for row in rows if min(row["positives"], images - row["positives"]) < MIN_IMAGES]
    missed = [row["name"] for row in rows if not row["tuned"] and row["name"] not in few]
    if missed:
        yield "stay at 0 (target not reached): %s" % ", ".join(missed)
    if few:
        yield "stay at 0 (fewer than %d images have it, or do not have it): %s" % (MIN_IMAGES, ", ".join(few))
    yield "gain on images that were not used to find the thresholds (%d-fold cross-validation; 95 %% intervals):" % FOLDS
    for name, values in content["gain"].items():
        line = "  %-18s %.4f -> %.4f  %+.4f" % (name, values["at_0"], values["tuned"], values["gain"])
        yield line + " (%+.4f to %+.4f)" % tuple(values["interval"]) if values["interval"] else line


def main(argv=None):
    args = parse(argv)
    images, logits, labels, _ = read_scored(args.folders, args.label_file, declared=declared_kind(args.values, args.model))
    content = content_of(args, images, logits, labels)
    write_text(args.output, json.dumps(content, indent=1, allow_nan=False) + "\n")
    for line in lines_of(content, args.output):
        print(line)


if __name__ == "__main__":
    command(main)
