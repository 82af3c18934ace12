"""Writes the report of a run: accuracy, throughput, attributes and the worst pictures in one HTML file that opens offline.

    python3 tools/report.py --images /home/HwHiAiUser/dataset/peta/images --perf result/perf_vision_*
    python3 tools/report.py --images sample/images --list sample/image.txt --labels sample/label.json \\
        --results result/dumpOutput_device0 --throughput throughput.csv --compare compare.json --costs costs.json

The script reads the images, image.txt, label.json, stage 6's result files and stage 7's fusion_result.json. The throughput comes
from run_all.sh's throughput.csv or from the benchmark tool's perf files. --compare takes a file of tools/compare.py --json, and
--costs one of tools/rehearse.py costs --json. The script computes the metrics again from the results and labels. Files that do not
belong together are an error. The page shows a few hundred pictures: the worst of all, and the worst of each attribute.
"""
import argparse
import base64
import csv
import hashlib
import io
import itertools
import math
import os
import re
import sys
import time
import warnings

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from lib import costs
from lib.files import NUMBER, fits, read_json, read_text, whole_file
from lib.images import check_image
from lib.labels import GROUPS_HELP, assumed, attribute_names, read_groups, read_thresholds
from lib.metrics import MAX_DROP, METRICS, evaluate, label_acc_interval, label_counts, metric_intervals
from lib.models import description
from lib.names import find_listed, read_list, stem
from lib.rates import COLUMNS, figure, read_perf
from lib.results import PROBABILITIES, look_like_probabilities, probabilities, read_scored
from lib.script import command, importing, note, one_line, progress, some

with importing():
    import numpy as np

PICTURES = 300     # the page shows at most this many
WORST_PICTURES = 150        # this many of them have the lowest accuracy; the others are the worst of each attribute
THUMB = (128, 256)  # largest width and height of a picture, in pixels; PETA's images are not much larger
WEAK_ATTRIBUTES = 5        # this many attributes are marked
KINDS = [("missed", "○", "Missed"), ("wrong", "✗", "Wrongly predicted"), ("right", "✓", "Right")]
SPEEDS = [name for name in COLUMNS if name.endswith(("images_per_s", "_ms"))]
UNKNOWN = "not recorded"

# The parts of the JSON files that are read, as shapes for fits().
NUMBER_OR_NULL = NUMBER + (type(None),)
FUSION = {"instance_acc": NUMBER, "instance_precision": NUMBER, "instance_recall": NUMBER, "instance_F1": NUMBER,
          "mA": NUMBER_OR_NULL, "images": int, "published_acc": NUMBER_OR_NULL,
          "attributes": [{"name": str, "positives": int, "negatives": int, "label_pos_acc": NUMBER_OR_NULL,
                          "label_neg_acc": NUMBER_OR_NULL, "label_acc": NUMBER_OR_NULL}]}
TUNING_SHAPE = {"goal": str, "images": int}  # present if the thresholds are not 0
COMPARISON = {"a": str, "b": str, "images": int, "attributes": int, "max_difference": NUMBER, "mean_difference": NUMBER,
              "cosine_similarity": NUMBER, "lowest_cosine_similarity": NUMBER, "lowest_cosine_similarity_image": str,
              "flips": int, "decisions": int, "images_with_flips": int, "allowed_difference": NUMBER,
              "allowed_flips": int, "within_tolerances": bool, "metrics": (dict, type(None)),
              "flipped_attributes": [{"name": str, "flips": int, "gained": int, "lost": int}],
              "worst_images": [{"name": str, "max_difference": NUMBER, "attribute": str, "flipped": [str]}]}
COSTS = {"model": str, "checkpoint_sha256": (str, type(None)), "scored": str, "images": int, "decisions": int, "rows": [
    {"name": str, "bytes": int, "max_difference": NUMBER, "rms_difference": NUMBER, "flips": int, "instance_acc": NUMBER,
     "drop": NUMBER, "trust": str, "why": str}]}
CHANGE = {"a": NUMBER_OR_NULL, "b": NUMBER_OR_NULL, "change": NUMBER_OR_NULL}


def same(a, b):
    """Returns whether two figures are equal except for rounding. None and NaN stand for undefined."""
    undefined = [value is None or math.isnan(value) for value in (a, b)]
    return all(undefined) or not any(undefined) and abs(a - b) < 1e-9


def check_fusion(path, fusion, images, metrics, figures):
    """Raises ValueError unless stage 7's figures are of this many images, and equal metrics and figures, the result of evaluate()."""
    if not 0 <= (fusion["published_acc"] or 0) <= 1:
        raise ValueError("%s: published_acc %r is not between 0 and 1" % (path, fusion["published_acc"]))
    pairs = [(name, fusion[name], value) for name, value in metrics.items()]
    if len(fusion["attributes"]) != len(figures["positives"]):
        pairs.append(("number of attributes", len(fusion["attributes"]), len(figures["positives"])))
    for i, row in enumerate(fusion["attributes"]):
        pairs += [("%s of %s" % (key, row["name"]), row[key], float(values[i])) for key, values in figures.items()
                  if i < len(values)]
    for name, theirs, ours in pairs:
        if not same(theirs, ours):
            raise ValueError("%s: its %s is %s, but the results and labels give %s; run postprocess_deepmar_pytorch.py "
                             "on these results again" % (path, name, theirs, ours))
    if fusion["images"] != images:
        raise ValueError("%s: is of %d images, but the results are of %d; run postprocess_deepmar_pytorch.py on these "
                         "results again" % (path, fusion["images"], images))


def read_throughput(path, images, accuracy):
    """Returns the rows of a throughput.csv, sorted by batch size. Each is a dict of COLUMNS; an unknown rate is None.

    Raises OSError, or ValueError with the line number. It is also an error if the rows are not from a run over this many images
    with this instance_acc.
    """
    rows = []
    with io.StringIO(read_text(path)) as f:
        reader = csv.DictReader(f, strict=True)
        try:
            if reader.fieldnames != COLUMNS:
                raise ValueError("%s: its first line is not %s; run_all.sh writes this file"
                                 % (path, ",".join(COLUMNS)))
            for row in reader:
                try:
                    if None in row or None in row.values() or not re.match(r"\d+( \d+)*$", row["devices"]):
                        raise ValueError
                    row.update({name: figure(row[name]) if row[name] else None for name in SPEEDS},
                               batch_size=int(row["batch_size"]), images=int(row["images"]),
                               instance_acc=figure(row["instance_acc"]))
                except ValueError:
                    raise ValueError("%s: line %d is not of the form %s; run_all.sh writes this file"
                                     % (path, reader.line_num, ",".join(COLUMNS)))
                if row["images"] != images:
                    raise ValueError("%s: line %d is of a run over %d images, but the results are of %d; run all batch "
                                     "sizes over the same list" % (path, reader.line_num, row["images"], images))
                rows.append(row)
        except csv.Error as error:
            raise ValueError("%s: is not a CSV file: %s" % (path, error))
    # The file may have few digits.
    if not any(abs(row["instance_acc"] - accuracy) < 1e-4 for row in rows):
        raise ValueError("%s: no line has the results' instance_acc %.6f; it is of another run" % (path, accuracy))
    return sorted(rows, key=lambda row: (row["batch_size"], row["devices"]))


def read_perf_files(paths):
    """Returns the benchmark tool's perf files as rows like those of read_throughput(). Raises OSError or ValueError."""
    rows = []
    for path in paths:
        name = re.match(r"perf_vision_batchsize_(\d+)_device_(\d+)\.txt$", os.path.basename(path))
        e2e, interface = read_perf(path)
        if not name:
            raise ValueError("%s: is not a perf_vision_batchsize_<N>_device_<ID>.txt of the benchmark tool" % path)
        rows.append(dict(dict.fromkeys(COLUMNS), batch_size=int(name.group(1)), devices=name.group(2), backend=UNKNOWN,
                         model=UNKNOWN, e2e_images_per_s=e2e, interface_images_per_s=interface))
    return sorted(rows, key=lambda row: (row["batch_size"], row["devices"]))


def is_interval(value):
    return value is None or fits(value, [NUMBER]) and len(value) == 2


def read_comparison(path, stems, attributes, accuracy):
    """Reads a file of tools/compare.py --json. Raises OSError, or ValueError if it is about other images or results."""
    report = read_json(path, COMPARISON, "tools/compare.py --json")
    metrics = report["metrics"] or {}
    if not all(fits(values, CHANGE) and is_interval(values.setdefault("interval", None)) for values in metrics.values()):
        raise ValueError("%s: is not what tools/compare.py --json writes" % path)
    ours = metrics.get("instance_acc", {"a": accuracy, "b": accuracy})
    if (report["images"], report["attributes"]) != (len(stems), attributes) \
            or not {row["name"] for row in report["worst_images"]} <= set(stems) \
            or not (same(ours["a"], accuracy) or same(ours["b"], accuracy)):
        raise ValueError("%s: does not compare these results with others; run tools/compare.py on them again" % path)
    return report


def read_costs(path, names, true, model):
    """Reads a file of tools/rehearse.py costs --json. Raises OSError, or ValueError if it is about other images, labels or another model.

    names, true: the images and their truth, bool [images, attributes]. model: the page's model or None; its checkpoint must be the same,
    if both are known.
    """
    found = read_json(path, COSTS, "tools/rehearse.py costs --json")
    if not found["rows"] or not all(is_interval(row.setdefault("interval", None)) for row in found["rows"]):
        raise ValueError("%s: is not what tools/rehearse.py costs --json writes" % path)
    if found["scored"] != costs.identity(names, true):
        raise ValueError("%s: is of other images or labels than these; run tools/rehearse.py costs on these" % path)
    checkpoint = model and description(model).get("checkpoint_sha256")
    if checkpoint and found["checkpoint_sha256"] not in (None, checkpoint):
        raise ValueError("%s: is of another model, %s, whose checkpoint is not that of %s; run tools/rehearse.py costs on this one"
                         % (path, found["model"], model))
    ends = [0] + [row["drop"] for row in found["rows"]] + [end for row in found["rows"] for end in row["interval"] or []]
    return dict(found, low=min(ends), width=max(ends) - min(ends) or 1, trust=costs.trust(found["rows"]))


def images_to_show(accuracy, logits, true):
    """Returns the indexes of at most PICTURES images, the worst first.

    accuracy: of each image. logits, true: [images, attributes]; a logit >= 0 means yes. The WORST_PICTURES images of all come first. Then
    come in turn, for each attribute, the image where the model is surest of a wrong no and the one where it is surest of a wrong
    yes. Then the others.
    """
    wrong = (logits >= 0) != true
    order = np.lexsort((-np.where(wrong, np.abs(logits), 0).max(axis=1), -wrong.sum(axis=1), accuracy)).tolist()
    queues = []
    for column in range(true.shape[1]):
        for mistaken in (wrong & true, wrong & ~true):
            images = np.flatnonzero(mistaken[:, column])
            queues.append(images[np.argsort(-np.abs(logits[images, column]), kind="stable")][:PICTURES].tolist())
    turns = (image for turn in itertools.zip_longest(*queues) for image in turn if image is not None)
    chosen = set(list(dict.fromkeys(itertools.chain(order[:WORST_PICTURES], turns, order)))[:PICTURES])
    return [image for image in order if image in chosen]


def thumbnail(path):
    """Returns an image file as a small JPEG, (data: URI, width, height). Raises Pillow's errors, or ValueError."""
    from PIL import Image
    if not os.path.isfile(path):
        raise ValueError("not a regular file")
    with Image.open(path) as image:
        check_image(image)
        image.draft("RGB", (2 * THUMB[0], 2 * THUMB[1]))
        picture = image.convert("RGB")
    picture.thumbnail(THUMB, Image.BICUBIC)
    picture.info.clear()  # a comment or colour profile would be copied
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    return ("data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode(),) + picture.size


def pictures_of(names, paths, logits, thresholds, true):
    """Returns the pictures to show, as dicts for the template. Raises ValueError with the names of unreadable files.

    names, paths: of the images. logits, true: [images, attributes]. thresholds: the smallest logit that means yes, per attribute.
    """
    import PIL  # noqa: F401 - import it here, so that a missing package is not reported as a bad picture
    predicted = logits >= thresholds
    either = (predicted | true).sum(axis=1)
    accuracy = (predicted & true).sum(axis=1) / np.maximum(either, 1)
    accuracy[either == 0] = 1  # the image has no attribute, and the model predicts none
    chances = probabilities(logits)
    cards, bad = [], []
    chosen = images_to_show(accuracy, logits - thresholds, true)
    with progress(len(chosen), "picture") as bar, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about odd files that it can read
        for image in chosen:
            bar.update()
            path = paths[image]
            try:
                source, width, height = thumbnail(path)
            except Exception as error:  # Pillow raises nearly anything on damaged files
                bad.append("%s (%s)" % (path, one_line(error)))
                continue
            card = {"name": names[image], "source": source, "width": width, "height": height,
                    "accuracy": float(accuracy[image])}
            for kind, which in (("missed", true & ~predicted), ("wrong", predicted & ~true), ("right", predicted & true)):
                card[kind] = [(int(i), float(chances[image, i])) for i in np.flatnonzero(which[image])]
            cards.append(card)
    if bad:
        raise ValueError("%d of %d pictures cannot be read: %s; give the folder that stage 4 read as --images"
                         % (len(bad), len(chosen), some(bad)))
    return cards


def percent(value, digits=2):
    return "–" if value is None else "%.*f\N{NO-BREAK SPACE}%%" % (digits, round(100 * value, digits) + 0)


def between(interval):
    return "%s to %s" % tuple(map(percent, interval))


def rate(value):
    return "–" if value is None else "%.2f" % value


def source_hash(text):
    """Returns the name of an inline script or style in a content security policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(str(text).encode()).digest()).decode()


def render(values):
    """Returns the page, made from the template beside this file."""
    import jinja2
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(os.path.dirname(os.path.abspath(__file__))),
                                     autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters.update(percent=percent, between=between, rate=rate, source_hash=source_hash)
    return environment.get_template("report_template.html").render(values)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--images", required=True, metavar="DIR", help="the folder of the images")
    parser.add_argument("--list", default="image.txt", metavar="FILE",
                        help="the images of the run (default: %(default)s)")
    parser.add_argument("--labels", default="label.json", metavar="FILE", help="the truth (default: %(default)s)")
    parser.add_argument("--results", nargs="+", default=["result/dumpOutput_device0"], metavar="DIR",
                        help="the folders of the result files (default: result/dumpOutput_device0)")
    parser.add_argument("--fusion", default="fusion_result.json", metavar="FILE",
                        help="stage 7's file for these results (default: %(default)s)")
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument("--throughput", metavar="FILE", help="the throughput.csv of run_all.sh")
    speed.add_argument("--perf", nargs="+", default=[], metavar="FILE",
                       help="the benchmark tool's perf_vision_batchsize_<N>_device_<ID>.txt")
    parser.add_argument("--compare", metavar="FILE", help="the file of tools/compare.py --json")
    parser.add_argument("--costs", metavar="FILE", help="the file of tools/rehearse.py costs --json")
    parser.add_argument("--attributes", metavar="FILE",
                        help="a file with the attributes' names, one per line (default: those in fusion_result.json)")
    parser.add_argument("--model", metavar="FILE",
                        help="the model, .onnx, or .om with its .json beside it; the page shows its checkpoint and its names of "
                             "the attributes")
    parser.add_argument("--thresholds", metavar="FILE",
                        help="the file of tools/thresholds.py that stage 7 used (default: the values in fusion_result.json)")
    parser.add_argument("--groups", metavar="FILE", help=GROUPS_HELP)
    parser.add_argument("--output", default="report.html", metavar="FILE",
                        help="the page to write (default: %(default)s)")
    return parser.parse_args(argv)


def read_results(args, declared):
    """Returns (image names, logits float32, truth bool) of a run; both arrays are [images, attributes], in the list's order.

    declared: what the results hold, as stage 7 noted it. Raises OSError, or ValueError if the list, results and labels are not
    of the same images.
    """
    names = read_list(args.list)
    images, logits, labels, _ = read_scored(args.results, args.labels, args.list, declared)
    rows = {image: row for row, image in enumerate(images)}
    order = [rows[stem(name)] for name in names]
    return names, logits[order], labels[order] == 1


def read_fusion(path):
    """Returns the content of stage 7's fusion_result.json. Raises OSError or ValueError."""
    fusion = read_json(path, FUSION, "postprocess_deepmar_pytorch.py")
    tuned = fusion.get("thresholds")
    if not fits([row.get("threshold", 0) for row in fusion["attributes"]], [NUMBER]) or tuned is not None and not fits(tuned, TUNING_SHAPE):
        raise ValueError("%s: is not what postprocess_deepmar_pytorch.py writes" % path)
    return fusion


def check_run(args, fusion, logits, true, groups):
    """Computes a run's accuracy from its logits and truth. Raises ValueError if it is not that of fusion_result.json.

    Returns (thresholds, scores). thresholds: the smallest logit that means yes, float32 [attributes]. scores: what
    fusion_result.json holds, with what the page shows besides. groups: of read_groups(), in the images' order.
    """
    count = true.shape[1]
    names = attribute_names(count, args.attributes, args.model)
    thresholds, tuned = [row.get("threshold", 0) for row in fusion["attributes"]], fusion.get("thresholds")
    if args.thresholds is not None:
        names, thresholds, tuned = read_thresholds(args.thresholds, names)
    if len(thresholds) != count:
        thresholds = np.zeros(count)  # check_fusion() will report the difference
    thresholds = np.array(thresholds, np.float32)
    check_fusion(args.fusion, fusion, len(true), *evaluate(logits - thresholds, true))
    counts = [None] * count if groups is None else label_counts(true, groups).T
    attributes = [dict(row, threshold=threshold, label_acc_interval=label_acc_interval(row, counted))
                  for row, threshold, counted in zip(fusion["attributes"], thresholds.tolist(), counts)]
    names_assumed = fusion.get("names_assumed", False)
    if args.attributes is not None or not assumed(names):
        attributes = [dict(row, name=name) for row, name in zip(attributes, names)]
        names_assumed = False
    return thresholds, dict(fusion, attributes=attributes, names_assumed=names_assumed, thresholds=tuned,
                            intervals=metric_intervals(logits >= thresholds, true, METRICS, groups),
                            instance_acc_at_0=evaluate(logits, true)[0]["instance_acc"])


def page_values(args, scores, doubt, speeds, comparison, deployment, pictures):
    """Returns the values for the template. doubt: what is odd about the results, or None."""
    def used(column):
        return ", ".join(dict.fromkeys(row[column] for row in speeds)) or UNKNOWN

    by_accuracy = sorted(scores["attributes"], key=lambda row: 2 if row["label_acc"] is None else row["label_acc"])
    published = scores["published_acc"]
    drop = None if published is None else published - scores["instance_acc_at_0"]
    described = {} if args.model is None else description(args.model)
    facts = [("Model", used("model")), ("Backend", used("backend")), ("Device", used("devices")), ("Images scored", scores["images"])]
    if "checkpoint_sha256" in described:
        facts.append(("Checkpoint", "SHA-256 %s" % described["checkpoint_sha256"]))
    if scores["thresholds"]:
        facts.append(("Thresholds", "each attribute's own, tuned for %(goal)s on %(images)d other images" % scores["thresholds"]))
    facts += [("Results", ", ".join(args.results)),
              ("Scored", time.strftime("%Y-%m-%d %H:%M", time.localtime(os.path.getmtime(args.fusion))))]
    return {
        "scores": scores, "drop": drop, "max_drop": MAX_DROP, "passed": drop is None or drop <= MAX_DROP + 1e-9,
        "metrics": [(name, scores[name], scores["intervals"][name]) for name in METRICS], "run": facts, "rows": speeds,
        "attributes": by_accuracy, "weakest": [row for row in by_accuracy if row["label_acc"] not in (None, 1)][:WEAK_ATTRIBUTES],
        "comparison": comparison, "deployment": deployment, "doubt": doubt, "cards": pictures, "kinds": KINDS}


def main(argv=None):
    args = parse(argv)
    fusion = read_fusion(args.fusion)
    declared = "probabilities" if fusion.get("values") == "probabilities" else "logits"
    names, logits, true = read_results(args, declared)
    doubt = PROBABILITIES if declared == "logits" and look_like_probabilities(logits) else None
    thresholds, scores = check_run(args, fusion, logits, true, read_groups(args.groups, names))
    speeds = read_perf_files(args.perf)
    if args.throughput is not None:
        speeds = read_throughput(args.throughput, len(names), scores["instance_acc"])
    comparison = None
    if args.compare is not None:
        comparison = read_comparison(args.compare, [stem(name) for name in names], true.shape[1], scores["instance_acc"])
    deployment = None if args.costs is None else read_costs(args.costs, names, true, args.model)
    if doubt:
        note("%s: %s" % (", ".join(args.results), doubt))
    pictures = pictures_of(names, find_listed(args.images, names, args.list), logits, thresholds, true)
    page = render(page_values(args, scores, doubt, speeds, comparison, deployment, pictures))
    data = page.encode("utf-8", "replace")  # names in JSON may hold half a surrogate pair
    with whole_file(args.output) as temporary, open(temporary, "wb") as f:
        f.write(data)
    print("%s: %d images, %d pictures, %.1f MB" % (args.output, len(names), len(pictures), len(data) / 1e6))


if __name__ == "__main__":
    command(main)
