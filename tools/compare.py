"""Two runs over the same images: how far their logits differ, which attributes flip, and what that does to the metrics.

    python3 tools/compare.py result/dumpOutput_device0 result_onnx/dumpOutput_device0
    python3 tools/compare.py result/dumpOutput_device0 --onnx deepmar_bs1_nopad.onnx --bins input_bin --labels label.json

For an accuracy that drops: the OM's results against ONNX Runtime's (the second line computes those), those of two batch
sizes, of two stacks. An attribute flips where one run says that an image has it and the other that it has not. Exits with
1 where the runs differ by more than the tolerances:

    --max-difference 0.1   of any logit. A probability is then off by at most 0.025. An OM computes in float16, which
                           moves DeepMAR's logits by some hundredths; float32 on both sides, by less than 0.0001.
    --max-flips N          of all images' attributes together; one in 1000 unless given, which cannot move a metric
                           over many images by much.
"""
import argparse
import json
import os
import sys

HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]
from common import command, composed, importing, note, some, write_text
from get_info import list_bins
from postprocess_deepmar_pytorch import (ASSUMED, PETA, PROBABILITIES, attribute_names, attributes_in, effect, labels_of,
                                         list_results, logits_from, look_like_probabilities, read_logits)
from session import compute, input_size, open_session

with importing():
    import numpy as np

MAX_DIFFERENCE = 0.1
MAX_FLIP_SHARE = 0.001
WORST = 5  # images to name


def same_images(a, b, results, others):
    """Raises ValueError unless two runs, called a and b, have results {stem: path} of the same images."""
    for name, missing in ((b, set(results) - set(others)), (a, set(others) - set(results))):
        if missing:
            raise ValueError("%s: has nothing for %d images that the other side has: %s; compare runs over the same "
                             "images" % (name, len(missing), some(sorted(missing))))


def cosine(a, b):
    """The cosine similarity of the rows of two float64 arrays; 1 where both are 0, 0 where one of them is."""
    norms = np.sqrt((a * a).sum(axis=-1)) * np.sqrt((b * b).sum(axis=-1))
    both_zero = ~a.any(axis=-1) & ~b.any(axis=-1)
    similarity = (a * b).sum(axis=-1) / np.where(norms > 0, norms, 1)
    return np.where(both_zero, 1.0, np.clip(similarity, -1, 1))  # rounding would go beyond


def compare(a, b, images, attributes):
    """Compares logits, float32 [images, attributes] each; returns a dict for JSON. images, attributes: their names.

    Flips are told from b to a: "gained" are attributes that a has and b has not.
    """
    has_a, has_b = a >= 0, b >= 0
    a, b = a.astype(np.float64), b.astype(np.float64)
    difference = np.abs(a - b)
    flips = has_a != has_b
    similarity = cosine(a, b)
    order = np.argsort(-difference.max(axis=1), kind="stable")[:WORST]
    return {"images": len(images), "attributes": len(attributes),
            "max_difference": float(difference.max()), "mean_difference": float(difference.mean()),
            "cosine_similarity": float(cosine(a.ravel(), b.ravel())),
            "lowest_cosine_similarity": float(similarity.min()),
            "lowest_cosine_similarity_image": images[int(similarity.argmin())],
            "flips": int(flips.sum()), "decisions": flips.size, "images_with_flips": int(flips.any(axis=1).sum()),
            "flipped_attributes": [{"name": attributes[i], "flips": int(flips[:, i].sum()),
                                    "gained": int((has_a & ~has_b)[:, i].sum()),
                                    "lost": int((has_b & ~has_a)[:, i].sum())}
                                   for i in np.argsort(-flips.sum(axis=0), kind="stable") if flips[:, i].any()],
            "worst_images": [{"name": images[i], "max_difference": float(difference[i].max()),
                              "attribute": attributes[int(difference[i].argmax())],
                              "cosine_similarity": float(similarity[i]),
                              "flipped": [attributes[j] for j in np.flatnonzero(flips[i])]}
                             for i in order if difference[i].any()]}


def lines(report):
    """The report as lines of text."""
    yield "A: %s" % report["a"]
    yield "B: %s" % report["b"]
    yield "images: %d with %d attributes each%s" % (report["images"], report["attributes"],
                                                    " (%s)" % ASSUMED if report["names_assumed"] else "")
    yield "largest difference: %.6g" % report["max_difference"]
    yield "mean difference: %.6g" % report["mean_difference"]
    yield "cosine similarity: %.9f, lowest of an image: %.9f (%s)" % (
        report["cosine_similarity"], report["lowest_cosine_similarity"], report["lowest_cosine_similarity_image"])
    yield "flips: %d of %d, in %d images" % (report["flips"], report["decisions"], report["images_with_flips"])
    for row in report["flipped_attributes"]:
        yield "  %s: %d (only A has it: %d, only B: %d)" % (row["name"], row["flips"], row["gained"], row["lost"])
    if report["worst_images"]:
        yield "worst images:"
    for row in report["worst_images"]:
        yield "  %s: %.6g (%s)%s" % (row["name"], row["max_difference"], row["attribute"],
                                     "; flipped: " + ", ".join(row["flipped"]) if row["flipped"] else "")
    for name, values in (report["metrics"] or {}).items():
        if values["change"] is None:
            yield "%s: undefined" % name
        else:
            yield "%s: A %.6f, B %.6f, A - B %+.6f%s" % (
                name, values["a"], values["b"], values["change"],
                " (95 %%: %+.6f to %+.6f)" % tuple(values["interval"]) if values["interval"] else "")


def tolerance(text):
    value = float(text)
    if not value >= 0:
        raise ValueError
    return value


def count(text):
    value = int(text)
    if value < 0:
        raise ValueError
    return value


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("a", metavar="A", help="a folder of results, of the benchmark tool or ais_bench")
    parser.add_argument("b", metavar="B", nargs="?", help="the folder to compare it with")
    parser.add_argument("--onnx", metavar="MODEL", help="instead of B: the model that computes the other side")
    parser.add_argument("--bins", metavar="BIN_DIR", help="with --onnx: its input, the folder that stage 4 wrote")
    parser.add_argument("--labels", metavar="LABEL", help="label.json, for the effect on each metric")
    parser.add_argument("--attributes", metavar="FILE",
                        help="the attributes' names, one a line (default: PETA's, if there are 35)")
    parser.add_argument("--max-difference", type=tolerance, default=MAX_DIFFERENCE, metavar="X",
                        help="allowed difference of a logit (default: %(default)s)")
    parser.add_argument("--max-flips", type=count, metavar="N",
                        help="allowed number of flips (default: one in 1000 of images x attributes)")
    parser.add_argument("--json", metavar="FILE", help="also write the result here")
    args = parser.parse_args(argv)
    if (args.b is None) == (args.onnx is None) or (args.onnx is None) != (args.bins is None):
        parser.error("give either B, or --onnx and --bins")
    return args


def read_both(args):
    """Returns (logits of A, logits of B, the images' names) of the two sides; raises OSError or ValueError."""
    results = list_results([args.a])
    names = sorted(results)
    session = None
    if args.onnx is None:
        others = list_results([args.b])
    else:
        session = open_session(args.onnx)
        _, height, width = input_size(session)
        others = {composed(name[:-len(".bin")]): os.path.join(args.bins, name)
                  for name in list_bins(args.bins, width, height)}
    same_images(args.a, args.b or args.bins, results, others)
    logits = read_logits([results[name] for name in names], attributes_in(results[names[0]]))
    if session is None:
        other_logits = read_logits([others[name] for name in names], logits.shape[1])
    else:
        other_logits = compute(session, [(name, others[name]) for name in names])
        if other_logits.shape != logits.shape:
            raise ValueError("%s: gives %d attributes, the results in %s have %d"
                             % (args.onnx, other_logits.shape[1], args.a, logits.shape[1]))
    sides = []
    for side, values in ((args.a, logits), (args.b or args.onnx, other_logits)):
        if look_like_probabilities(values):
            note("%s: %s; compared are the logits that belong to them" % (side, PROBABILITIES))
            values = logits_from(values)
        sides.append(values)
    return sides + [names]


def judge(report, args):
    """Adds to a report whether its runs are within the tolerances; returns what is beyond them, as a list of texts."""
    max_flips = int(MAX_FLIP_SHARE * report["decisions"]) if args.max_flips is None else args.max_flips
    beyond = []
    if report["max_difference"] > args.max_difference:
        beyond.append("the largest difference %.6g is beyond %.6g (--max-difference)"
                      % (report["max_difference"], args.max_difference))
    if report["flips"] > max_flips:
        beyond.append("%d flips are more than %d (--max-flips)" % (report["flips"], max_flips))
    report.update(allowed_difference=args.max_difference, allowed_flips=max_flips, within_tolerances=not beyond)
    return beyond


def main(argv=None):
    args = parse(argv)
    logits, other_logits, names = read_both(args)
    attributes = attribute_names(logits.shape[1], args.attributes)
    labels = None if args.labels is None else labels_of(args.labels, names, logits.shape[1])
    report = dict({"a": args.a, "b": args.b or "%s on %s" % (args.onnx, args.bins)},
                  **compare(logits, other_logits, names, attributes))
    report["metrics"] = None if labels is None else effect(logits, other_logits, labels)
    report["names_assumed"] = attributes is PETA
    beyond = judge(report, args)
    for line in lines(report):
        print(line)
    if args.json is not None:
        write_text(args.json, json.dumps(report, indent=1, allow_nan=False) + "\n")
    if beyond:
        raise ValueError("%s and %s differ: %s; the worst images above are where to look"
                         % (report["a"], report["b"], " and ".join(beyond)))
    print("within the tolerances: difference %.6g, flips %d" % (args.max_difference, report["allowed_flips"]))


if __name__ == "__main__":
    command(main)
