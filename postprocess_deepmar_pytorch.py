"""Stage 7: the network's results and the labels -> accuracy, on the screen and in fusion_result.json.

    python3 postprocess_deepmar_pytorch.py result/dumpOutput_device0/ label.json
    python3 postprocess_deepmar_pytorch.py --npu_result=result/dumpOutput_device0 --label_file=label.json

Reads NAME_1.bin (the benchmark tool's) or NAME_0.bin (ais_bench's), float32 logits, one for each attribute; a logit >= 0
says that the image has it. label.json is {image file name: [0 or 1 for each attribute]}. Several result folders count
as one set, with the subfolders device<D> that ais_bench leaves for several devices; an image in a subfolder counts by
its file name alone. The metrics are those of Li et al., "A Richly Annotated Dataset for Pedestrian Attribute
Recognition" (arXiv:1603.07054), section 5. fusion_result.json, written into the current folder, also has the figures of
each attribute; --per-attribute prints them, --attributes FILE names them (one a line; PETA's 35 need none).
--published 78.9 fails where the accuracy is more than 1 % below that.
"""
import argparse
import collections
import contextlib
import gc
import glob
import json
import os
import re
import signal
import sys

if __name__ == "__main__":  # until main(), Ctrl-C ends it at once: a library's import makes other errors of it
    interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)
import numpy as np

RESULT = "fusion_result.json"
MAX_DROP = 0.01  # how far below the published accuracy a converted model may be: the guide's 1 %, as percentage points

# The 35 attributes of PETA in the order of the labels and logits: PETA.mat's [1], picked by its [2].
PETA = """personalLess30 personalLess45 personalLess60 personalLarger60 carryingBackpack carryingOther lowerBodyCasual
upperBodyCasual lowerBodyFormal upperBodyFormal accessoryHat upperBodyJacket lowerBodyJeans footwearLeatherShoes
upperBodyLogo hairLong personalMale carryingMessengerBag accessoryMuffler accessoryNothing carryingNothing
upperBodyPlaid carryingPlasticBags footwearSandals footwearShoes lowerBodyShorts upperBodyShortSleeve
lowerBodyShortSkirt footwearSneaker upperBodyThinStripes accessorySunglasses lowerBodyTrousers upperBodyTshirt
upperBodyOther upperBodyVNeck""".split()


def some(items, most=5):
    """The first few items as text, with the number of the others."""
    items = list(items)
    return ", ".join(items[:most]) + (" and %d more" % (len(items) - most) if len(items) > most else "")


def stem(name):
    """What a file is called in every stage: its name, without folders, up to the first dot."""
    return name.rpartition("/")[2].partition(".")[0]


def label_row(values):
    """Returns one image's label as bytes, which may be beyond 1; raises TypeError or ValueError for no such list."""
    if not isinstance(values, list) or not values:
        raise ValueError
    try:
        return bytes(values)
    except TypeError:  # 1.0, as a numpy array of floats gives
        if not set(values) <= {0, 1}:
            raise ValueError
        return bytes([int(value) for value in values])


def read_labels(path):
    """Returns ({stem: row}, labels uint8 [images, attributes]) of a label file.

    Raises OSError, or ValueError that names the row: values other than 0 and 1, a row of another length, a name twice.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError("%s: no such file; it is the label.json of the images, tools/peta.py writes PETA's" % path)
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
            raise ValueError("%s: %r has %d values, the rows before it %d" % (path, name, len(values), width))
        image = stem(name)
        if image in rows:
            raise ValueError("%s: %r and %r are one image: names count up to the first dot"
                             % (path, pairs[rows[image]][0], name))
        rows[image] = row
    labels = np.frombuffer(b"".join(labels), np.uint8).reshape(-1, width)
    wrong = (labels > 1).any(axis=1)  # of all rows at once, which takes a third of the time
    if wrong.any():
        raise ValueError("%s: %r: its label is not a list of 0 and 1" % (path, pairs[int(wrong.argmax())][0]))
    return rows, labels


def check_images(path, results):
    """Raises ValueError unless the results {stem: path} are those of a list file's images, no fewer and no others."""
    try:
        with open(path, encoding="utf-8-sig") as f:
            listed = {stem(line.strip()) for line in f if line.strip()}
    except UnicodeDecodeError as error:
        raise ValueError("%s: is not UTF-8 text (byte %d)" % (path, error.start))
    missing, others = sorted(listed - set(results)), sorted(set(results) - listed)
    problems = []
    if missing:
        problems.append("%d of its %d images have no result (%s)" % (len(missing), len(listed), some(missing)))
    if others:
        problems.append("%d of %d results are of other images (%s)" % (len(others), len(results), some(others)))
    if problems:
        raise ValueError("%s: %s; run stages 4 to 6 again" % (path, ", and ".join(problems)))


def attribute_names(count, path=None):
    """Returns the attributes' names: those in a file, one a line; without one PETA's if there are 35, else attribute0 ...

    Raises OSError, or ValueError where the file does not hold count different names.
    """
    if path is None:
        return PETA if count == len(PETA) else ["attribute%d" % i for i in range(count)]
    if not os.path.isfile(path):
        raise FileNotFoundError("%s: no such file; it holds the attributes' names, one a line" % path)
    try:
        with open(path, encoding="utf-8-sig") as f:
            names = [line.strip() for line in f if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError("%s: is not UTF-8 text (byte %d)" % (path, error.start))
    if len(names) != count:
        raise ValueError("%s: holds %d names, but there are %d attributes; give one a line" % (path, len(names), count))
    twice = [name for name, number in collections.Counter(names).items() if number > 1]
    if twice:
        raise ValueError("%s: holds a name more than once: %s" % (path, some(twice)))
    return names


def list_results(folders):
    """Returns {stem: path} of the result files in the folders; raises OSError or ValueError, as for two of one image."""
    results, twice = {}, []
    for folder in folders:
        if not os.path.isdir(folder):
            raise FileNotFoundError("%s: no such folder; it is the one that the benchmark tool writes" % folder)
    pending = list(folders)
    for folder in pending:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if not name.endswith(".bin"):
                    # ais_bench leaves a subfolder for each of several devices
                    if re.match("device[0-9]", name) and folder in folders and entry.is_dir():
                        pending.append(entry.path)
                    continue
                image, ending = name[:-len("_1.bin")], name[-len("_1.bin"):]
                if not image or ending not in ("_1.bin", "_0.bin") or not entry.is_file():
                    raise ValueError("%s: is no result file NAME_1.bin or NAME_0.bin" % entry.path)
                if image in results:
                    twice.append("%s and %s" % (results[image], entry.path))
                results[image] = entry.path
    if twice:
        raise ValueError("%d images have two results: %s" % (len(twice), some(sorted(twice))))
    if not results:
        raise ValueError("%s: no result file NAME_1.bin or NAME_0.bin; stage 6 writes them" % ", ".join(folders))
    return results


def read_logits(paths, attributes):
    """Returns the result files' logits, float32 [files, attributes]; raises ValueError for a wrong size or NaN."""
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
    finite = np.isfinite(logits).all(axis=1)
    if not finite.all():
        raise ValueError("%d of %d results hold NaN or infinite logits: %s"
                         % ((~finite).sum(), len(paths), some(np.array(paths)[~finite])))
    return logits


def ratio(part, whole):
    """part / whole of two arrays, NaN where whole is 0."""
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)


def evaluate(logits, labels):
    """The metrics of Li et al. for logits [images, attributes] and labels 0/1 of the same shape.

    Returns (dict of the instance metrics and mA, dict of the arrays per attribute: positives, negatives, label_pos_acc
    = TP/P, label_neg_acc = TN/N, label_acc = their mean; NaN where an attribute has no positive or no negative image).
    Images without a true attribute are left out of the instance metrics, undefined attributes out of mA. Raises
    ValueError where nothing is left.
    """
    predicted, true = np.asarray(logits) >= 0, np.asarray(labels) == 1
    both = (predicted & true).sum(axis=1)
    counted = true.any(axis=1)
    if not counted.any():
        raise ValueError("no image has any true attribute, so the instance metrics are not defined")
    union, predictions, truths = (array.sum(axis=1)[counted] for array in (predicted | true, predicted, true))
    both = both[counted]
    precision = float(np.mean(both / np.maximum(predictions, 1)))  # 0 where nothing is predicted
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


def attribute_table(rows):
    """Returns the lines of a table of the attributes, as fusion_result.json holds them; '-' where a figure is undefined."""
    width = max(len(row["name"]) for row in rows + [{"name": "attribute"}])
    lines = ["%-*s  positives  negatives  label_pos_acc  label_neg_acc  label_acc" % (width, "attribute")]
    for row in rows:
        accuracies = ["-" if row[key] is None else "%.6f" % row[key]
                      for key in ("label_pos_acc", "label_neg_acc", "label_acc")]
        lines.append("%-*s  %9d  %9d  %13s  %13s  %9s" % ((width, row["name"], row["positives"], row["negatives"])
                                                          + tuple(accuracies)))
    return lines


def fraction(text):
    """An accuracy given as a fraction (0.789) or in percent (78.9), as a fraction."""
    value = float(text)
    if not 0 <= value <= 100:
        raise ValueError
    return value / 100 if value > 1 else value


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
        usage="postprocess_deepmar_pytorch.py RESULT_DIR [RESULT_DIR ...] LABEL [option ...]\n"
              "       postprocess_deepmar_pytorch.py --npu_result RESULT_DIR [RESULT_DIR ...] --label_file LABEL "
              "[option ...]")
    parser.add_argument("positional", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--npu_result", nargs="+", metavar="RESULT_DIR", help="the folders of the result files")
    parser.add_argument("--label_file", metavar="LABEL", help="the labels")
    parser.add_argument("--image_list", metavar="IMAGE_TXT",
                        help="stage 4's list of images: results of fewer or of other images are an error")
    parser.add_argument("--attributes", metavar="FILE",
                        help="the attributes' names, one a line (default: PETA's, if there are 35)")
    parser.add_argument("--per-attribute", action="store_true",
                        help="also print each attribute's recall of the images that have it, and of those that do not")
    parser.add_argument("--published", type=fraction, metavar="ACC",
                        help="instance_acc to compare with, as 0.789 or 78.9; a drop of more than 1 %% (of percentage "
                             "points) is an error")
    args = parser.parse_intermixed_args(argv)
    named = [args.npu_result, args.label_file]
    if args.positional and any(value is not None for value in named):
        parser.error("give the arguments either in their order or by name, not both")
    folders, label_file = (args.positional[:-1], args.positional[-1]) if args.positional else named
    if not folders or label_file is None:
        parser.error("give RESULT_DIR and LABEL")

    gc.disable()  # it would look through all of the labels many times, for a tenth of the whole time
    rows, labels = read_labels(label_file)
    attributes = attribute_names(labels.shape[1], args.attributes)
    results = list_results(folders)
    if args.image_list is not None:
        check_images(args.image_list, results)
    unlabelled = sorted(name for name in results if name not in rows)
    if unlabelled:
        raise ValueError("%d of %d results have no label in %s: %s"
                         % (len(unlabelled), len(results), label_file, some(results[name] for name in unlabelled)))
    names = sorted(results)
    logits = read_logits([results[name] for name in names], labels.shape[1])
    metrics, figures = evaluate(logits, labels[[rows[name] for name in names]])

    table = [dict({"name": name}, **{key: None if np.isnan(values[i]) else values[i].item()
                                     for key, values in figures.items()})
             for i, name in enumerate(attributes)]
    undefined = [row["name"] for row in table if row["label_acc"] is None]
    without = len(rows) - len(results)
    drop = None if args.published is None else args.published - metrics["instance_acc"]
    report = dict(metrics, images=len(results), labelled_images_without_result=without, published_acc=args.published,
                  drop=drop, attributes_without_label_acc=undefined, attributes=table)
    with whole_file(RESULT) as temporary, open(temporary, "w", encoding="utf-8") as f:
        json.dump(report, f, indent=1, allow_nan=False)
        f.write("\n")

    for name in ("instance_acc", "instance_precision", "instance_recall", "instance_F1", "mA"):
        print("%s: %s" % (name, "undefined" if metrics[name] is None else metrics[name]))
    if args.per_attribute:
        for line in attribute_table(table):
            print(line)
    print("scored %d images; %d labelled images had no result" % (len(results), without))
    if undefined:
        print("left out of mA, as no image or every image has them: %s" % ", ".join(undefined))
    if drop is not None:
        print("accuracy %.2f %%, published %.2f %%, drop %.2f %%" % (100 * metrics["instance_acc"],
                                                                   100 * args.published, 100 * drop))
        if drop > MAX_DROP + 1e-9:  # 0.789 - 0.779 is a little more than 0.01 in floating point
            raise ValueError("instance_acc %.4f is more than 1 %% below the published %.4f"
                             % (metrics["instance_acc"], args.published))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupt)
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit("postprocess_deepmar_pytorch.py: error: %s" % error)
    except KeyboardInterrupt:
        sys.exit("postprocess_deepmar_pytorch.py: interrupted; no file is half written")
