"""Finds a separate threshold (limit) for each attribute on a validation split. An image has the attribute if its logit reaches it.

    python3 tools/thresholds.py result/dumpOutput_device0 val.json
    python3 tools/thresholds.py result/dumpOutput_device0 val.json --target-precision 0.9 --output careful.json

If only one image in a hundred has an attribute, its logits seldom reach 0. The script chooses the limit with the largest F1.
With --target-precision, it chooses the limit with the largest recall at this precision; --target-recall does the reverse. Stage 7
and tools/predict.py take the file with --thresholds. Without it, all limits are 0.

A limit always looks good on the images on which it was found. So stage 7 refuses to score these images with it. For the same
reason, the script computes the gain by cross-validation: it judges each fifth of the images with limits from the other four.
"""
import argparse
import hashlib
import json
import os
import sys

HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]
from common import command, importing, write_text
from postprocess_deepmar_pytorch import assumed, attribute_names, label_checksum, read_run

with importing():
    import numpy as np
    from intervals import FEW, SEED, change_intervals, metrics, ratio, summands

FOLDS = 5
METRICS = ["label_precision", "label_recall", "label_F1", "mA", "instance_acc", "instance_precision", "instance_recall",
           "instance_F1"]


def find_limit(logits, true, precision=None, recall=None):
    """Returns the best limit for one attribute's logits, float32 [images], or None if no limit reaches the target.

    true: bool [images]. precision, recall: the target, if there is one. Otherwise the best limit has the largest F1.
    """
    order = np.argsort(-logits, kind="stable")
    logits, found = logits[order], np.cumsum(true[order])
    said = np.arange(1, len(logits) + 1)  # the number of images that reach a limit just below each logit
    precisions, recalls = found / said, found / max(1, found[-1])
    if precision is not None:
        score = np.where(precisions >= precision, recalls, -1)
    elif recall is not None:
        score = np.where(recalls >= recall, precisions, -1)
    else:
        score = 2 * found / (said + found[-1])
    score[:-1][logits[:-1] == logits[1:]] = -1  # no limit lies between equal logits
    best = int(score.argmax())
    if score[best] < 0:
        return None
    if best == len(logits) - 1:
        return logits[best]
    between = np.float32(0.5) * logits[best] + np.float32(0.5) * logits[best + 1]
    return between if between > logits[best + 1] else logits[best]


def find_limits(logits, true, tunable, target):
    """Returns (the limits of all attributes, float32; whether each was found). The limit is 0 if it was not found."""
    limits = [find_limit(logits[:, i], true[:, i], **target) if tunable[i] else None for i in range(len(tunable))]
    return np.array([limit or 0 for limit in limits], np.float32), [limit is not None for limit in limits]


def cross_validate(logits, true, tunable, target):
    """Returns the decisions on each image, bool [images, attributes], with limits that were found without this image."""
    said = np.empty(true.shape, bool)
    fold_of = np.random.RandomState(SEED).permutation(len(true)) % FOLDS
    for fold in range(FOLDS):
        others = fold_of != fold
        said[~others] = logits[~others] >= find_limits(logits[others], true[others], tunable, target)[0]
    return said


def figures(said, true):
    """Returns precision, recall and F1 of each attribute, [{name: figure}]. An undefined figure is None."""
    found, said, positives = (said & true).sum(axis=0), said.sum(axis=0), true.sum(axis=0)
    values = zip(ratio(found, said), ratio(found, positives), 2 * ratio(found, said + positives))
    return [{name: None if np.isnan(value) else float(value) for name, value in zip(("precision", "recall", "F1"), row)}
            for row in values]


def score(said, true):
    """Returns the metrics {name: figure} of these decisions. An undefined metric is NaN."""
    return {name: float(value) for name, (value,) in metrics(summands(said, true).sum(axis=0)[None], len(true)).items()}


def gain(said, at_0, true):
    """Returns the metrics with tuned limits and with 0, {metric: {"at_0", "tuned", "gain", "interval"}}. said: tuned decisions."""
    of_tuned, of_0 = score(said, true), score(at_0, true)
    intervals = change_intervals(said, at_0, true, METRICS)
    return {name: {"at_0": of_0[name], "tuned": of_tuned[name], "gain": of_tuned[name] - of_0[name],
                   "interval": intervals[name]} for name in METRICS if not np.isnan(of_tuned[name] + of_0[name])}


def table(rows):
    """Yields the lines of a table of the attributes. An undefined figure is '-'."""
    width = max(len(row["name"]) for row in rows + [{"name": "attribute"}])
    yield "%-*s  images  threshold  F1 at 0      F1  precision  recall" % (width, "attribute")
    for row in rows:
        new = row["cross_validated"]
        cells = tuple("-" if value is None else "%.4f" % value
                      for value in (row["at_0"]["F1"], new["F1"], new["precision"], new["recall"]))
        yield "%-*s  %6d  %9.4f  %7s  %6s  %9s  %6s" % ((width, row["name"], row["positives"], row["threshold"]) + cells)


def share(text):
    value = float(text)
    if not 0 < value <= 1:
        raise ValueError
    return value


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("folders", metavar="RESULT_DIR", nargs="+", help="the results of a validation split")
    parser.add_argument("label_file", metavar="LABEL", help="its label.json")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--target-precision", type=share, metavar="P", help="choose the largest recall at this precision, such as 0.9")
    target.add_argument("--target-recall", type=share, metavar="R", help="choose the largest precision at this recall")
    parser.add_argument("--attributes", metavar="FILE", help="a file with the attributes' names, one per line")
    parser.add_argument("--model", metavar="FILE", help="the model that made the results; it names the attributes if it can")
    parser.add_argument("--values", choices=["logits", "probabilities"], help="what the results hold, as in stage 7")
    parser.add_argument("--output", default="thresholds.json", metavar="FILE", help="the file to write (default: %(default)s)")
    parser.set_defaults(image_list=None)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    images, logits, labels, _ = read_run(args)
    true, names = labels == 1, attribute_names(labels.shape[1], args.attributes, args.model)
    target = {"precision": args.target_precision, "recall": args.target_recall}
    goal = ["%s >= %g" % item for item in target.items() if item[1]] + ["maximal F1"]
    tunable = np.minimum(true.sum(axis=0), (~true).sum(axis=0)) >= FEW
    if not tunable.any():
        raise ValueError("%s: has no attribute that at least %d images have and as many do not have; tune on more images"
                         % (args.label_file, FEW))
    limits, reached = find_limits(logits, true, tunable, target)
    said, at_0 = cross_validate(logits, true, tunable, target), logits >= 0
    tuned_on = {image: label_checksum(row) for image, row in zip(images, labels)}
    lines = "".join("%s %s\n" % item for item in sorted(tuned_on.items()))
    rows = [{"name": name, "threshold": float(limit), "tuned": tuned, "positives": int(count), "at_0": old,
             "cross_validated": new}
            for name, limit, tuned, count, old, new in zip(names, limits, reached, true.sum(axis=0), figures(at_0, true),
                                                           figures(said, true))]
    content = {"goal": goal[0], "images": len(images), "checksum": hashlib.sha256(lines.encode("utf-8")).hexdigest(),
               "names_assumed": assumed(names), "attributes": rows, "gain": gain(said, at_0, true), "tuned_on": tuned_on}
    write_text(args.output, json.dumps(content, indent=1, allow_nan=False) + "\n")
    for line in table(rows):
        print(line)
    print("%s: %s, %d of %d attributes tuned on %d images" % (args.output, goal[0], sum(reached), len(names), len(images)))
    for wanted, text in ((tunable, "target not reached"), (~tunable, "fewer than %d images have it, or do not have it" % FEW)):
        at = [name for name, tuned, kind in zip(names, reached, wanted) if kind and not tuned]
        if at:
            print("stay at 0 (%s): %s" % (text, ", ".join(at)))
    print("gain on images that the thresholds were not found on (%d-fold cross-validation; 95 %% intervals):" % FOLDS)
    for name, values in content["gain"].items():
        print("  %-18s %.4f -> %.4f  %+.4f%s" % (name, values["at_0"], values["tuned"], values["gain"],
                                                " (%+.4f to %+.4f)" % tuple(values["interval"]) if values["interval"] else ""))


if __name__ == "__main__":
    command(main)
