"""Stage 7: the network's results and the labels -> accuracy, on the screen and in fusion_result.json.

    python3 postprocess_deepmar_pytorch.py result/dumpOutput_device0/ label.json
    python3 postprocess_deepmar_pytorch.py --npu_result=result/dumpOutput_device0 --label_file=label.json

The script reads NAME_1.bin (from the benchmark tool) or NAME_0.bin (from ais_bench): float32 logits, one per attribute.
A logit >= 0 means that the image has the attribute. label.json is {image file name: [0 or 1 for each attribute]}.
Several result folders count as one set. So do the subfolders device<D> that ais_bench makes for several devices. The
folders in an image's name do not count. The metrics are those of Li et al., "A Richly Annotated Dataset for Pedestrian
Attribute Recognition" (arXiv:1603.07054), section 5.

fusion_result.json is written into the current folder and also has the figures of each attribute. --per-attribute prints
them. --attributes FILE names the attributes, one per line; PETA's 35 need no file. With --published 78.9, the script fails
if the accuracy is more than 1 % lower. --intervals adds the 95 % interval of each metric. --thresholds FILE gives each
attribute its own limit in place of 0; tools/thresholds.py finds such limits.
"""
import argparse
import collections
import gc
import json
import os
import re
import sys
import zlib

HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:0] = [os.path.join(HERE, "tools"), HERE]
from common import NUMBER, command, composed, description, importing, read_json, read_lines, some, stem, write_text

with importing():
    import numpy as np
    from intervals import change_intervals, label_acc_interval, metric_intervals, ratio

RESULT = "fusion_result.json"
PROBABILITIES = "all values lie between 0 and 1: they look like probabilities (of a model that ends in a Sigmoid), not logits"
ASSUMED = "PETA's names are assumed; --attributes FILE gives others"
THRESHOLDS = {"attributes": [{"name": str, "threshold": NUMBER}], "names_assumed": bool, "goal": str, "images": int,
              "checksum": str, "tuned_on": dict}  # the parts of tools/thresholds.py's file that are read
MAX_DROP = 0.01  # a converted model may be this far below the published accuracy: the guide's 1 % (percentage points)

# The 35 attributes of PETA in the order of the labels and logits. PETA.mat's [1] has the names, its [2] selects 35.
PETA = """personalLess30 personalLess45 personalLess60 personalLarger60 carryingBackpack carryingOther lowerBodyCasual
upperBodyCasual lowerBodyFormal upperBodyFormal accessoryHat upperBodyJacket lowerBodyJeans footwearLeatherShoes
upperBodyLogo hairLong personalMale carryingMessengerBag accessoryMuffler accessoryNothing carryingNothing
upperBodyPlaid carryingPlasticBags footwearSandals footwearShoes lowerBodyShorts upperBodyShortSleeve
lowerBodyShortSkirt footwearSneaker upperBodyThinStripes accessorySunglasses lowerBodyTrousers upperBodyTshirt
upperBodyOther upperBodyVNeck""".split()


def label_row(values):
    """Returns one image's label as bytes, which may exceed 1. Raises TypeError or ValueError if it cannot be a label."""
    if not isinstance(values, list) or not values:
        raise ValueError
    try:
        return bytes(values)
    except TypeError:  # values such as 1.0, from a numpy array of floats
        if not set(values) <= {0, 1}:
            raise ValueError
        return bytes([int(value) for value in values])


def read_labels(path):
    """Returns ({stem: row}, labels uint8 [images, attributes]) of a label file.

    Raises OSError, or ValueError with the row's name: values other than 0 and 1, a row of another length, a name twice.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError("%s: no such file; give the label.json of the images, which tools/lists.py writes" % path)
    try:
        with open(path, encoding="utf-8-sig") as f:
            pairs = json.load(f, object_pairs_hook=list)  # a dict would keep only the last of two equal names
    except (ValueError, RecursionError) as error:
        raise ValueError("%s: is not JSON: %s" % (path, error))
    if not isinstance(pairs, list) or not pairs or not all(isinstance(pair, tuple) for pair in pairs):
        raise ValueError("%s: is not {image file name: [0 or 1 for each attribute]}" % path)
    rows, labels, width = {}, [], len(pairs[0][1]) if isinstance(pairs[0][1], list) else 0
    for row, (name, values) in enumerate(pairs):
        try:
            labels.append(label_row(values))
        except (TypeError, ValueError):
            raise ValueError("%s: %r: its label is not a list of 0 and 1" % (path, name))
        if len(values) != width:
            raise ValueError("%s: %r has %d values, but the rows before it have %d" % (path, name, len(values), width))
        image = stem(name)
        if image in rows:
            raise ValueError("%s: %r and %r are the same image, because only the name up to the first dot counts"
                             % (path, pairs[rows[image]][0], name))
        rows[image] = row
    labels = np.frombuffer(b"".join(labels), np.uint8).reshape(-1, width)
    wrong = (labels > 1).any(axis=1)  # checking all rows at once takes a third of the time
    if wrong.any():
        raise ValueError("%s: %r: its label is not a list of 0 and 1" % (path, pairs[int(wrong.argmax())][0]))
    return rows, labels


def labels_of(path, images, attributes):
    """Returns the rows of a label file for these images, uint8 [images, attributes].

    Raises OSError, or ValueError for an image without a label.
    """
    rows, labels = read_labels(path)
    unlabelled = [image for image in images if stem(image) not in rows]
    if unlabelled:
        raise ValueError("%s: has no label for %d of %d images: %s"
                         % (path, len(unlabelled), len(images), some(unlabelled)))
    if labels.shape[1] != attributes:
        raise ValueError("%s: its rows have %d attributes, but the model's results have %d" % (path, labels.shape[1], attributes))
    return labels[[rows[stem(image)] for image in images]]


def check_images(path, results):
    """Raises ValueError unless the results {stem: path} are exactly those of a list file's images."""
    listed = {stem(line) for line in read_lines(path) if line}
    missing, others = sorted(listed - set(results)), sorted(set(results) - listed)
    problems = []
    if missing:
        problems.append("%d of its %d images have no result (%s)" % (len(missing), len(listed), some(missing)))
    if others:
        problems.append("%d of %d results are of other images (%s)" % (len(others), len(results), some(others)))
    if problems:
        raise ValueError("%s: %s; run stages 4 to 6 again" % (path, ", and ".join(problems)))


def attribute_names(count, path=None, model=None):
    """Returns the attributes' names from a file with one per line, else from a model, else PETA's if there are 35, else
    attribute0 ...

    Raises OSError, or ValueError if a file does not hold count different names.
    """
    if path is None:
        names = model and description(model).get("attributes")
        if not names:
            return PETA if count == len(PETA) else ["attribute%d" % i for i in range(count)]
        if len(names) != count:
            raise ValueError("%s: is a model of %d attributes, but there are %d; give the model of these results"
                             % (model, len(names), count))
        return names
    if not os.path.isfile(path):
        raise FileNotFoundError("%s: no such file; give a file with the attributes' names, one per line" % path)
    names = [line for line in read_lines(path) if line]
    if len(names) != count:
        raise ValueError("%s: holds %d names, but there are %d attributes; give one name per line" % (path, len(names), count))
    twice = [name for name, number in collections.Counter(names).items() if number > 1]
    if twice:
        raise ValueError("%s: holds a name more than once: %s" % (path, some(twice)))
    return names


def assumed(names):
    """Returns whether names are those that attribute_names() gives without a file and a model."""
    return names is PETA or names[0] == "attribute0"


def read_thresholds(path, names):
    """Reads a file of tools/thresholds.py. Returns (names, limits float32 [attributes], content). Limits are 0 without a path.

    names: the attributes' names from attribute_names(). The file's names replace assumed ones. Raises OSError or ValueError.
    """
    if path is None:
        return names, np.zeros(len(names), np.float32), None
    content = read_json(path, THRESHOLDS, "tools/thresholds.py")
    limits = np.array([row["threshold"] for row in content["attributes"]], np.float32)
    theirs = names if content["names_assumed"] else [row["name"] for row in content["attributes"]]
    if len(limits) != len(names) or theirs != names and not assumed(names):
        raise ValueError("%s: holds the thresholds of other attributes (%s) than these (%s)"
                         % (path, some(row["name"] for row in content["attributes"]), some(names)))
    return theirs, limits, content


def label_checksum(row):
    """Returns the checksum of an image's label, which tools/thresholds.py records for each image that it tunes on."""
    return "%08x" % zlib.crc32(row.tobytes())


def check_not_tuned_on(path, tuned_on, images, labels):
    """Raises ValueError if thresholds were tuned on any of these images, because their figures would be too good.

    Other images may have the same names by chance, such as 0001.jpg. Few of those also have the same labels.
    """
    seen = [image for image in images if image in tuned_on]
    same = [image for image, row in zip(images, labels) if tuned_on.get(image) == label_checksum(row)]
    if 2 * len(same) > len(seen):
        raise ValueError("%s: was tuned on %d of these %d images (%s), whose figures would be too good; score others, such as "
                         "the test split's" % (path, len(seen), len(images), some(seen)))


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
    return bool(((values >= 0) & (values <= 1)).all())


def logits_from(chances):
    """Returns the logits of probabilities, float32. Those of 0 and 1 are limited to about -16 and 16."""
    chances = np.clip(chances.astype(np.float64), 1e-7, 1 - 1e-7)
    return np.log(chances / (1 - chances)).astype(np.float32)


def evaluate(logits, labels):
    """Computes the metrics of Li et al. for logits [images, attributes] and labels 0/1 of the same shape.

    Returns (dict of the instance metrics and mA, dict of the arrays per attribute: positives, negatives, label_pos_acc
    = TP/P, label_neg_acc = TN/N, label_acc = their mean). A figure is NaN if no image has the attribute, or if all have it.
    The instance metrics leave out images without a true attribute. mA leaves out attributes without a label_acc. Raises
    ValueError if no image has a true attribute.
    """
    predicted, true = np.asarray(logits) >= 0, np.asarray(labels) == 1
    both = (predicted & true).sum(axis=1)
    counted = true.any(axis=1)
    if not counted.any():
        raise ValueError("no image has any true attribute, so the instance metrics are not defined")
    union, predictions, truths = (array.sum(axis=1)[counted] for array in (predicted | true, predicted, true))
    both = both[counted]
    precision = float(np.mean(both / np.maximum(predictions, 1)))  # 0 if nothing is predicted
    recall = float(np.mean(both / truths))
    positives = true.sum(axis=0)
    negatives = len(true) - positives
    attributes = {"positives": positives, "negatives": negatives,
                  "label_pos_acc": ratio((predicted & true).sum(axis=0), positives),
                  "label_neg_acc": ratio((~predicted & ~true).sum(axis=0), negatives)}
    attributes["label_acc"] = (attributes["label_pos_acc"] + attributes["label_neg_acc"]) / 2
    defined = ~np.isnan(attributes["label_acc"])
    metrics = {"instance_acc": float(np.mean(both / union)),
               "instance_precision": precision,
               "instance_recall": recall,
               "instance_F1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
               "mA": float(attributes["label_acc"][defined].mean()) if defined.any() else None}
    return metrics, attributes


def effect(a, b, labels):
    """Returns the metrics of logits a and b and their change a - b, {metric: {"a", "b", "change", "interval"}}.

    An undefined mA is None. interval: the change's paired 95 % interval, or None for too few images.
    """
    of_a, of_b = evaluate(a, labels)[0], evaluate(b, labels)[0]
    intervals = change_intervals(np.asarray(a) >= 0, np.asarray(b) >= 0, np.asarray(labels) == 1, of_a)
    return {name: {"a": of_a[name], "b": of_b[name], "interval": intervals[name],
                   "change": None if of_a[name] is None else of_a[name] - of_b[name]} for name in of_a}


def range_text(interval):
    """Returns an interval as text, '-' for None."""
    return "-" if interval is None else "%.4f to %.4f" % tuple(interval)


def attribute_table(rows):
    """Returns the lines of a table of the attributes in fusion_result.json. An undefined figure is '-'."""
    width = max(len(row["name"]) for row in rows + [{"name": "attribute"}])
    with_intervals = any(row["label_acc_interval"] for row in rows)
    lines = ["%-*s  positives  negatives  label_pos_acc  label_neg_acc  label_acc%s"
             % (width, "attribute", "  95 % interval" * with_intervals)]
    for row in rows:
        accuracies = ["-" if row[key] is None else "%.6f" % row[key]
                      for key in ("label_pos_acc", "label_neg_acc", "label_acc")]
        lines.append("%-*s  %9d  %9d  %13s  %13s  %9s" % ((width, row["name"], row["positives"], row["negatives"])
                                                          + tuple(accuracies))
                     + ("  " + range_text(row["label_acc_interval"])) * with_intervals)
    return lines


def fraction(text):
    """Returns an accuracy as a fraction. The text is a fraction (0.789) or a percentage (78.9)."""
    value = float(text)
    if not 0 <= value <= 100:
        raise ValueError
    return value / 100 if value > 1 else value


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        usage="postprocess_deepmar_pytorch.py RESULT_DIR [RESULT_DIR ...] LABEL [option ...]\n"
              "       postprocess_deepmar_pytorch.py --npu_result RESULT_DIR [RESULT_DIR ...] --label_file LABEL "
              "[option ...]")
    parser.add_argument("positional", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--npu_result", nargs="+", metavar="RESULT_DIR", help="the folders of the result files")
    parser.add_argument("--label_file", metavar="LABEL", help="the labels")
    parser.add_argument("--image_list", metavar="IMAGE_TXT",
                        help="stage 4's list of images; the results must be of exactly these images")
    parser.add_argument("--attributes", metavar="FILE",
                        help="a file with the attributes' names, one per line (default: PETA's, if there are 35)")
    parser.add_argument("--model", metavar="FILE",
                        help="the model of the results, .onnx, or .om with its .json beside it; without --attributes, it names "
                             "the attributes")
    parser.add_argument("--per-attribute", action="store_true",
                        help="also print each attribute's recall of the images that have it, and of those that do not")
    parser.add_argument("--published", type=fraction, metavar="ACC",
                        help="instance_acc to compare with, as 0.789 or 78.9; a drop of more than 1 %% (percentage "
                             "points) is an error")
    parser.add_argument("--intervals", action="store_true",
                        help="also compute each metric's 95 %% interval, by bootstrap over the images (7600 take half a second)")
    parser.add_argument("--thresholds", metavar="FILE",
                        help="each attribute's own limit, from tools/thresholds.py on other images (default: a logit of 0 for "
                             "all). --published still judges the accuracy at 0, because the published one is at 0")
    parser.add_argument("--values", choices=["logits", "probabilities"],
                        help="what the results hold: logits (default; >= 0 means yes), or probabilities of a model that "
                             "ends in a Sigmoid (>= 0.5 means yes). It is required if all values lie between 0 and 1")
    args = parser.parse_intermixed_args(argv)
    named = [args.npu_result, args.label_file]
    if args.positional and any(value is not None for value in named):
        parser.error("give the arguments either in their order or by name, not both")
    args.folders, args.label_file = (args.positional[:-1], args.positional[-1]) if args.positional else named
    if not args.folders or args.label_file is None:
        parser.error("give RESULT_DIR and LABEL")
    return args


def read_run(args):
    """Reads a run's results. Returns (the images' names, logits, labels, how many labelled images have no result).

    Raises OSError or ValueError.
    """
    rows, labels = read_labels(args.label_file)
    results = list_results(args.folders)
    if args.image_list is not None:
        check_images(args.image_list, results)
    unlabelled = sorted(name for name in results if name not in rows)
    if unlabelled:
        raise ValueError("%d of %d results have no label in %s: %s"
                         % (len(unlabelled), len(results), args.label_file, some(results[name] for name in unlabelled)))
    names = sorted(results)
    logits = read_logits([results[name] for name in names], labels.shape[1])
    if args.values == "probabilities":
        if not look_like_probabilities(logits):
            raise ValueError("%s: holds values below 0 or above 1, so they are not probabilities; leave out --values"
                             % args.folders[0])
        logits = logits_from(logits)
    elif args.values is None and look_like_probabilities(logits):
        raise ValueError("%s: %s. Score them with --values probabilities, or with --values logits if they are really "
                         "logits" % (", ".join(args.folders), PROBABILITIES))
    return names, logits, labels[[rows[name] for name in names]], len(rows) - len(results)


def main(argv=None):
    args = parse(argv)
    gc.disable()  # the garbage collector would scan all labels many times, which takes a tenth of the whole time
    images, logits, labels, without = read_run(args)
    names = attribute_names(labels.shape[1], args.attributes, args.model)
    names, limits, thresholds = read_thresholds(args.thresholds, names)
    if thresholds:
        check_not_tuned_on(args.thresholds, thresholds["tuned_on"], images, labels)
    metrics, figures = evaluate(logits - limits, labels)
    at_0 = evaluate(logits, labels)[0]["instance_acc"] if thresholds else metrics["instance_acc"]
    table = [dict({"name": name}, **{key: None if np.isnan(values[i]) else values[i].item()
                                     for key, values in figures.items()})
             for i, name in enumerate(names)]
    for row, limit in zip(table, limits.tolist()):
        row.update(threshold=limit, label_acc_interval=label_acc_interval(row) if args.intervals else None)
    intervals = metric_intervals(logits >= limits, labels == 1, metrics) if args.intervals else None
    undefined = [row["name"] for row in table if row["label_acc"] is None]
    drop = None if args.published is None else args.published - at_0
    report = dict(metrics, images=len(logits), labelled_images_without_result=without, published_acc=args.published,
                  drop=drop, attributes_without_label_acc=undefined, values=args.values or "logits",
                  names_assumed=names is PETA, intervals=intervals, attributes=table, instance_acc_at_0=at_0,
                  thresholds=thresholds and {key: thresholds[key] for key in ("goal", "images", "checksum")})
    write_text(RESULT, json.dumps(report, indent=1, allow_nan=False) + "\n")

    for name in ("instance_acc", "instance_precision", "instance_recall", "instance_F1", "mA"):
        print("%s: %s" % (name, "undefined" if metrics[name] is None else metrics[name]))
    if intervals:
        print("95 %% intervals: %s" % ", ".join("%s %s" % (name.replace("instance_", ""), range_text(intervals[name]))
                                               for name in metrics))
    if thresholds:
        print("thresholds: %s, tuned for %s on %d other images" % (args.thresholds, thresholds["goal"], thresholds["images"]))
    if args.per_attribute:
        for line in attribute_table(table):
            print(line)
    print("scored %d images; %d labelled images had no result" % (len(logits), without))
    if undefined:
        print("left out of mA, because no image or every image has them: %s" % ", ".join(undefined))
    if names is PETA and (args.per_attribute or undefined):
        print(ASSUMED)
    if drop is not None:
        print("accuracy%s %.2f %%, published %.2f %%, drop %.2f %%"
              % (" at a logit of 0" if thresholds else "", 100 * at_0, 100 * args.published, 100 * drop))
        if drop > MAX_DROP + 1e-9:  # 0.789 - 0.779 is a little more than 0.01 in floating point
            raise ValueError("instance_acc %.4f is more than 1 %% below the published %.4f"
                             % (at_0, args.published))


if __name__ == "__main__":
    command(main)
