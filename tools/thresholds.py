"""Finds a threshold for each attribute on a validation split. An image has the attribute if its logit reaches it.

    python3 tools/thresholds.py result/dumpOutput_device0 val.json
    python3 tools/thresholds.py result/dumpOutput_device0 val.json --target-precision 0.9 --output careful.json

If only one image in a hundred has an attribute, its logits seldom reach 0. The script chooses the threshold with the largest F1.
With --target-precision, it chooses the threshold with the largest recall at this precision; --target-recall does the reverse.
Stage 7 and tools/predict.py take the file with --thresholds. Without it, all thresholds are 0.

A threshold always looks good on the images on which it was found. So stage 7 refuses to score these images with it. For the
same reason, the script computes the gain by cross-validation: it judges each fifth of the images with thresholds from the
other four. A note says if the thresholds gain nothing, or make a metric worse.
"""
import argparse
import hashlib
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from lib.files import write_text
from lib.labels import GROUPS_HELP, assumed, attribute_names, image_checksums, label_checksum, read_groups
from lib.metrics import DECIMALS, MIN_IMAGES, SEED, Z, drawn, enough, ratio, score
from lib.results import declared_kind, read_scored
from lib.script import command, importing, note, number

with importing():
    import numpy as np

MAXIMAL_F1 = "maximal F1"  # the goal without a target
FOLDS = 5
RETUNED = 40  # this many draws of the images get thresholds of their own, to see how much the thresholds vary
GAIN_METRICS = ["label_precision", "label_recall", "label_F1", "mA", "instance_acc", "instance_precision", "instance_recall",
                "instance_F1"]
BALANCED = ["label_F1", "mA", "instance_acc", "instance_F1"]  # these weigh what is missed against what is wrongly said


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


def cross_validate(logits, true, tunable, target, groups):
    """Returns the predictions for each image, bool [images, attributes], with thresholds that were found without its group.

    groups: int [images]. Each image may be a group of its own.
    """
    predicted = np.empty(true.shape, bool)
    fold_of = (np.random.RandomState(SEED).permutation(groups.max() + 1) % FOLDS)[groups]
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


def gain(logits, true, tunable, target, groups):
    """Returns the metrics at 0 and with thresholds found on other images, {metric: {"at_0", "tuned", "gain", "interval"}}, and the
    predictions with these thresholds, bool [images, attributes].

    The interval has two causes: other images might be scored (the bootstrap's variance), and other thresholds might be found (the
    variance over RETUNED draws of the images). groups: as in cross_validate().
    """
    tuned, at_0 = cross_validate(logits, true, tunable, target, groups), logits >= 0
    of_tuned, of_0 = score(tuned, true)[0], score(at_0, true)[0]
    drawn_tuned, drawn_0 = drawn([tuned, at_0], true, groups)
    retuned, random, count = [], np.random.RandomState(SEED), groups.max() + 1
    for _ in range(RETUNED):
        images = np.repeat(np.arange(len(true)), np.bincount(random.randint(count, size=count), minlength=count)[groups])
        retuned.append(score(logits >= find_thresholds(logits[images], true[images], tunable, target)[0], true)[0])
    values = {}
    for name in GAIN_METRICS:
        change = of_tuned[name] - of_0[name]
        if not np.isnan(change):
            half = Z * np.sqrt(np.nanvar(drawn_tuned[name] - drawn_0[name]) + np.nanvar([figures[name] for figures in retuned]))
            values[name] = {"at_0": of_0[name], "tuned": of_tuned[name], "gain": change,
                            "interval": np.round([change - half, change + half], DECIMALS).tolist()}
    return values, tuned


def doubt(content):
    """Returns a text if the thresholds make a metric worse, or if their gain may be chance. Otherwise returns None.

    Precision and recall do not count, because thresholds raise one at the cost of the other.
    """
    texts = {name: "%s %+.4f (%+.4f to %+.4f)" % ((name, values["gain"]) + tuple(values["interval"]))
             for name, values in content["gain"].items()}
    worse = [texts[name] for name in BALANCED if content["gain"][name]["interval"][1] < 0]
    if worse:
        return "these thresholds lower %s; to keep 0 (a probability of 0.5), leave out --thresholds" % ", ".join(worse)
    if content["goal"] == MAXIMAL_F1 and content["gain"]["label_F1"]["interval"][0] <= 0:
        return "the gain may be chance, %s; keep 0 (a probability of 0.5), or tune on more images" % texts["label_F1"]
    return None


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
    parser.add_argument("--groups", metavar="FILE", help=GROUPS_HELP)
    parser.add_argument("--attributes", metavar="FILE", help="a file with the attributes' names, one per line")
    parser.add_argument("--model", metavar="FILE", help="the model that made the results; it names the attributes if it can")
    parser.add_argument("--values", choices=["logits", "probabilities"], help="what the results hold, as in stage 7")
    parser.add_argument("--output", default="thresholds.json", metavar="FILE", help="the file to write (default: %(default)s)")
    return parser.parse_args(argv)


def content_of(args, images, logits, labels):
    """Returns the content of the file to write. Raises OSError or ValueError."""
    true, names = labels == 1, attribute_names(labels.shape[1], args.attributes, args.model)
    groups = np.arange(len(true)) if args.groups is None else read_groups(args.groups, images)
    target = {"precision": args.target_precision, "recall": args.target_recall}
    goal = MAXIMAL_F1
    for name, value in target.items():
        if value is not None:
            goal = "%s >= %g" % (name, value)
    positives = true.sum(axis=0)
    tunable = np.minimum(positives, len(true) - positives) >= MIN_IMAGES
    if not tunable.any():
        raise ValueError("%s: has no attribute that at least %d images have and as many do not have; tune on more images"
                         % (args.label_file, MIN_IMAGES))
    if not enough(true, groups):
        raise ValueError("%s: these images are of fewer than %d groups; tune on more images" % (args.groups, MIN_IMAGES))
    thresholds, reached = find_thresholds(logits, true, tunable, target)
    gains, predicted = gain(logits, true, tunable, target, groups)
    tuned_on = {image: label_checksum(row) for image, row in zip(images, labels)}
    lines = "".join("%s %s\n" % item for item in sorted(tuned_on.items()))
    rows = [{"name": name, "threshold": float(threshold), "tuned": tuned, "positives": int(count), "at_0": old,
             "cross_validated": new}
            for name, threshold, tuned, count, old, new in zip(names, thresholds, reached, positives, figures(logits >= 0, true),
                                                           figures(predicted, true))]
    return {"goal": goal, "images": len(images), "checksum": hashlib.sha256(lines.encode("utf-8")).hexdigest(),
            "names_assumed": assumed(names), "attributes": rows, "gain": gains, "tuned_on": tuned_on,
            "image_checksums": image_checksums(args.folders, images)}


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
        yield "  %-18s %.4f -> %.4f  %+.4f (%+.4f to %+.4f)" % (
            (name, values["at_0"], values["tuned"], values["gain"]) + tuple(values["interval"]))


def main(argv=None):
    args = parse(argv)
    images, logits, labels, _ = read_scored(args.folders, args.label_file, declared=declared_kind(args.values, args.model))
    content = content_of(args, images, logits, labels)
    write_text(args.output, json.dumps(content, indent=1, allow_nan=False) + "\n")
    for line in lines_of(content, args.output):
        print(line)
    text = doubt(content)
    if text:
        note("%s: %s" % (args.output, text))


if __name__ == "__main__":
    command(main)
