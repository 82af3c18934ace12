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
attribute its own threshold in place of 0; tools/thresholds.py finds such thresholds.
"""
import argparse
import gc
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
from lib.files import write_text
from lib.labels import (ASSUMED, GROUPS_HELP, PETA, attribute_names, check_not_tuned_on, image_checksums, read_groups,
                        read_thresholds)
from lib.metrics import MAX_DROP, METRICS, evaluate, label_acc_interval, label_counts, metric_intervals
from lib.results import declared_kind, read_scored
from lib.script import command, importing, in_order_or_by_name

with importing():
    import numpy as np

RESULT = "fusion_result.json"


def range_text(interval):
    """Returns an interval as text, '-' for None."""
    return "-" if interval is None else "%.4f to %.4f" % tuple(interval)


def attribute_table(rows):
    """Yields the lines of a table of the attributes in fusion_result.json. An undefined figure is '-'."""
    width = max(len(row["name"]) for row in rows + [{"name": "attribute"}])
    with_intervals = any(row["label_acc_interval"] for row in rows)
    heading = "%-*s  positives  negatives  label_pos_acc  label_neg_acc  label_acc" % (width, "attribute")
    yield heading + "  95 % interval" if with_intervals else heading
    for row in rows:
        accuracies = ["-" if row[key] is None else "%.6f" % row[key]
                      for key in ("label_pos_acc", "label_neg_acc", "label_acc")]
        line = "%-*s  %9d  %9d  %13s  %13s  %9s" % (width, row["name"], row["positives"], row["negatives"], *accuracies)
        yield line + "  " + range_text(row["label_acc_interval"]) if with_intervals else line


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
    parser.add_argument("--groups", metavar="FILE", help=GROUPS_HELP)
    parser.add_argument("--thresholds", metavar="FILE",
                        help="each attribute's own threshold, from tools/thresholds.py on other images (default: a logit of 0 for "
                             "all). --published still judges the accuracy at 0, because the published one is at 0")
    parser.add_argument("--values", choices=["logits", "probabilities"],
                        help="what the results hold: logits (>= 0 means yes), or probabilities of a model that ends in a Sigmoid "
                             "(>= 0.5 means yes). The default is probabilities if --model gives these, else logits. It is required "
                             "if all values lie between 0 and 1 and --model does not explain it")
    args = parser.parse_intermixed_args(argv)
    if args.positional:
        args.positional = [args.positional[:-1] or None, args.positional[-1]]
    args.folders, args.label_file = in_order_or_by_name(parser, args, ["npu_result", "label_file"], "give RESULT_DIR and LABEL")
    return args


def report_of(args, images, logits, labels, without):
    """Returns the content of fusion_result.json. Raises OSError or ValueError."""
    names = attribute_names(labels.shape[1], args.attributes, args.model)
    names, thresholds, tuned = read_thresholds(args.thresholds, names)
    metrics, figures = evaluate(logits - thresholds, labels)
    acc_at_0 = metrics["instance_acc"]
    if tuned:
        check_not_tuned_on(args.thresholds, tuned, images, labels, image_checksums(args.folders, images))
        acc_at_0 = evaluate(logits, labels)[0]["instance_acc"]
        tuned = {key: tuned[key] for key in ("goal", "images", "checksum")}
    groups = read_groups(args.groups, images)
    counts = [None] * len(names) if groups is None else label_counts(labels == 1, groups).T
    rows = []
    for i, name in enumerate(names):
        row = {key: None if np.isnan(values[i]) else values[i].item() for key, values in figures.items()}
        rows.append(dict(row, name=name, threshold=thresholds[i].item(),
                         label_acc_interval=label_acc_interval(row, counts[i]) if args.intervals else None))
    return dict(metrics, images=len(logits), labelled_images_without_result=without, published_acc=args.published,
                drop=None if args.published is None else args.published - acc_at_0,
                attributes_without_label_acc=[row["name"] for row in rows if row["label_acc"] is None],
                values=args.values or "logits", names_assumed=names is PETA,
                intervals=metric_intervals(logits >= thresholds, labels == 1, metrics, groups) if args.intervals else None,
                attributes=rows, instance_acc_at_0=acc_at_0, thresholds=tuned)


def lines_of(report, args):
    """Yields the lines to print about a report."""
    for name in METRICS:
        yield "%s: %s" % (name, "undefined" if report[name] is None else report[name])
    if report["intervals"]:
        yield "95 %% intervals: %s" % ", ".join("%s %s" % (name.replace("instance_", ""), range_text(report["intervals"][name]))
                                               for name in METRICS)
    tuned, undefined = report["thresholds"], report["attributes_without_label_acc"]
    if tuned:
        yield "thresholds: %s, tuned for %s on %d other images" % (args.thresholds, tuned["goal"], tuned["images"])
    if args.per_attribute:
        yield from attribute_table(report["attributes"])
    yield "scored %d images; %d labelled images had no result" % (report["images"], report["labelled_images_without_result"])
    if undefined:
        yield "left out of mA, because no image or every image has them: %s" % ", ".join(undefined)
    if report["names_assumed"] and (args.per_attribute or undefined):
        yield ASSUMED
    if report["drop"] is not None:
        yield "accuracy%s %.2f %%, published %.2f %%, drop %.2f %%" % (
            " at a logit of 0" if tuned else "", 100 * report["instance_acc_at_0"], 100 * report["published_acc"],
            round(100 * report["drop"], 2) + 0)  # no -0.00


def main(argv=None):
    args = parse(argv)
    gc.disable()  # the garbage collector would scan all labels many times, which takes a tenth of the whole time
    args.values = declared_kind(args.values, args.model)
    report = report_of(args, *read_scored(args.folders, args.label_file, args.image_list, args.values))
    write_text(RESULT, json.dumps(report, indent=1, allow_nan=False) + "\n")
    for line in lines_of(report, args):
        print(line)
    if report["drop"] is not None and report["drop"] > MAX_DROP + 1e-9:  # in floating point, 0.789 - 0.779 is more than 0.01
        raise ValueError("instance_acc %.4f is more than 1 %% below the published %.4f"
                         % (report["instance_acc_at_0"], args.published))


if __name__ == "__main__":
    command(main)
