"""Compares two runs over the same images: how far the logits differ, which attributes flip, and how the metrics change.

    python3 tools/compare.py result/dumpOutput_device0 result_onnx/dumpOutput_device0
    python3 tools/compare.py result/dumpOutput_device0 --model deepmar_bs1_nopad.onnx --bins input_bin --labels label.json
    python3 tools/compare.py result/dumpOutput_device0 --model deepmar_bs1_nopad.onnx --rehearsal deepmar_bs1_float16.onnx \\
        --bins input_bin
    python3 tools/compare.py deepmar_bs1.om --model deepmar_bs1_nopad.onnx --bins input_bin

Use it when the accuracy drops. It compares the OM's results with ONNX Runtime's (the second command computes these), or the
results of two batch sizes or two software versions. An attribute flips if one run says that an image has it and the other
says that it does not. The script exits with 1 if the runs differ by more than the tolerances:

    --max-difference 0.1   the largest difference of any logit. It moves a probability by at most 0.025. An OM computes in
                           float16, which moves DeepMAR's logits by some hundredths. With float32 on both sides, they move
                           by less than 0.0001.
    --max-flips N          the number of flips over all images and attributes. The default is one in 1000, which changes a
                           metric over many images only a little.

With --rehearsal (the third command), the tolerance is what float16 does on these very images: the runs may differ by twice the
shift of the model's float16 twin (tools/rehearse.py float16), for the largest difference and for the root mean square. A larger
difference has another cause. From the results alone, the script recognises known faults of the input (BGR, no mean ...), another
order of attributes or images, values beyond 65504 and a wrong last layer. To find a fault in another layer, give the ONNX model from
which the OM was made as A. --layers ranks the layers by their loss of precision in float16.
"""
import argparse
import collections
import json
import os
import re
import sys
import zlib

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from lib.faults import FACTOR, MAX_IMAGES, WRONG_INPUTS, explain, judge, layers, overflow
from lib.files import write_text
from lib.labels import ASSUMED, GROUPS_HELP, PETA, attribute_names, check_order, labels_of, read_groups, read_labels
from lib.metrics import effect
from lib.results import as_logits, attributes_in, kind_of, list_results, read_logits
from lib.script import command, importing, number, some
from lib.session import bins_of, compute, described_by, input_size, open_session

with importing():
    import numpy as np

LESS_FLOAT16 = "convert the OM with run_all.sh --atc-options=--precision_mode_v2=mixed_float16, or with origin in place of mixed_float16"
MAX_LOGIT_DIFFERENCE = 0.1
MAX_FLIP_SHARE = 0.001
WORST_IMAGES = 5    # the report names this many
WORST_LAYERS = 10   # --layers names this many

# The logits of A, of B, and of TWIN or None, float32 [images, attributes] each; the images' names; {image: path of its bin} or {};
# what each side gave, "logits" or "probabilities".
Sides = collections.namedtuple("Sides", "a b twin images bins kinds", defaults=[()])


def same_images(a, b, results, others):
    """Raises ValueError unless two runs with the names a and b have results {stem: path} for the same images."""
    for name, missing in ((b, set(results) - set(others)), (a, set(others) - set(results))):
        if missing:
            raise ValueError("%s: has nothing for %d images that the other side has: %s; compare runs over the same "
                             "images" % (name, len(missing), some(sorted(missing))))


def cosine(a, b):
    """Returns the cosine similarity of the rows of two float64 arrays: 1 if both are 0, 0 if only one is."""
    norms = np.sqrt((a * a).sum(axis=-1)) * np.sqrt((b * b).sum(axis=-1))
    both_zero = ~a.any(axis=-1) & ~b.any(axis=-1)
    similarity = (a * b).sum(axis=-1) / np.where(norms > 0, norms, 1)
    return np.where(both_zero, 1.0, np.clip(similarity, -1, 1))  # rounding may exceed 1


def compare(a, b, images, attributes):
    """Compares logits, float32 [images, attributes] each. Returns a dict for JSON. images, attributes: their names.

    Flips count from b to a: "gained" is an attribute that a has and b does not have.
    """
    has_a, has_b = a >= 0, b >= 0
    a, b = a.astype(np.float64), b.astype(np.float64)
    difference = np.abs(a - b)
    flips = has_a != has_b
    similarity = cosine(a, b)
    order = np.argsort(-difference.max(axis=1), kind="stable")[:WORST_IMAGES]
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
    """Yields the report as lines of text."""
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
    if "rehearsal" in report:
        yield "float16 alone (%s): largest difference %.6g, flips %d" % tuple(
            report["rehearsal"][name] for name in ("twin", "shift", "flips"))
        yield ("  this is a bound on rounding, not a simulation of the chip: the card's order of accumulation and its kernels are "
               "unknown, so up to %d times as much is allowed" % FACTOR)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("a", metavar="A",
                        help="a folder of results from the benchmark tool or ais_bench, or a model, NAME.onnx or NAME.om")
    parser.add_argument("b", metavar="B", nargs="?", help="the folder to compare A with")
    parser.add_argument("--model", "--onnx", help="instead of B: the model, .onnx or .om, that computes the other side")
    parser.add_argument("--device", type=number(int, 0), default=0, metavar="ID", help="the card's or GPU's number (default: 0)")
    parser.add_argument("--bins", metavar="BIN_DIR", help="the models' input, the folder that stage 4 wrote")
    parser.add_argument("--rehearsal", metavar="TWIN", help="the float16 twin of MODEL, an ONNX model; it sets how far A may be off")
    parser.add_argument("--layers", action="store_true",
                        help="rank the layers by the relative error in A, if A is an ONNX model, or in TWIN")
    parser.add_argument("--labels", metavar="LABEL", help="label.json, for the effect on each metric")
    parser.add_argument("--groups", metavar="FILE", help=GROUPS_HELP)
    parser.add_argument("--attributes", metavar="FILE",
                        help="a file with the attributes' names, one per line (default: MODEL's, else PETA's if there are 35)")
    parser.add_argument("--max-difference", type=number(float, 0), metavar="X",
                        help="allowed difference of a logit (default: %s)" % MAX_LOGIT_DIFFERENCE)
    parser.add_argument("--max-flips", type=number(int, 0), metavar="N",
                        help="allowed number of flips (default: one in 1000 of images x attributes)")
    parser.add_argument("--json", metavar="FILE", help="also write the result here")
    args = parser.parse_args(argv)
    if (args.b is None) == (args.model is None) or (args.model is None) != (args.bins is None):
        parser.error("give either B, or --model and --bins")
    args.a_model = args.a if args.a.endswith((".onnx", ".om")) else None
    args.a_onnx = args.a if args.a.endswith(".onnx") else None
    if args.model is None and (args.a_model or args.rehearsal):
        parser.error("a model as A, or --rehearsal, needs --model MODEL and --bins BIN_DIR")
    if args.layers and not (args.a_onnx or args.rehearsal):
        parser.error("--layers needs --rehearsal, or an ONNX model as A")
    if (args.layers or args.rehearsal) and any(path.endswith(".om") for path in (args.model, args.rehearsal or "")):
        parser.error("--layers and --rehearsal need ONNX models as MODEL and TWIN; give the OM as A")
    if args.rehearsal and (args.max_difference, args.max_flips) != (None, None):
        parser.error("--rehearsal sets the tolerances; leave out --max-difference and --max-flips")
    return args


def check_twin(session, path, model):
    """Raises ValueError unless a session of the model at path is the float16 twin of another model, given by its path."""
    with open(model, "rb") as f:
        made_from = "%08x" % zlib.crc32(f.read())
    if session.get_modelmeta().custom_metadata_map.get("rehearsal_of") != made_from:
        raise ValueError("%s: is not the float16 twin of %s; make it: python3 tools/rehearse.py float16 %s %s"
                         % (path, model, model, path))


def read_sides(args):
    """Reads or computes the logits of all sides. Raises OSError or ValueError. With --rehearsal, logits may be NaN or infinite."""
    sessions = {path: open_session(path, args.device) for path in (args.a_model, args.model, args.rehearsal) if path}
    if args.rehearsal:
        check_twin(sessions[args.rehearsal], args.rehearsal, args.model)
    if args.a_model:
        a, b = (described_by(sessions[path], path).get("attributes", []) for path in (args.a_model, args.model))
        check_order(args.a_model, a, args.model, b, "export one of them again")
    bins, sizes = {}, {}
    for path, session in sessions.items():  # all models must take these bins
        bins, sizes[path] = dict(bins_of(args.bins, session)), "%d x %d" % input_size(session)[1:]
    if len(set(sizes.values())) > 1:  # bins of 128 x 256 are as large as those of 256 x 128
        raise ValueError("the models take images of different sizes (height x width): %s"
                         % ", ".join("%s %s" % item for item in sizes.items()))
    paths = [args.a, args.b or args.model]
    files = [bins if path in sessions else list_results([path]) for path in paths]
    same_images(args.a, args.b or args.bins, *files)
    if args.rehearsal:
        paths.append(args.rehearsal)
        files.append(bins)
    images, logits, kinds = sorted(files[0]), [], []
    for path, found in zip(paths, files):
        inputs = [found[image] for image in images]
        if path in sessions:
            values = compute(sessions[path], list(zip(images, inputs)), not args.rehearsal)
        else:
            values = read_logits(inputs, logits[0].shape[1] if logits else attributes_in(inputs[0]), not args.rehearsal)
        if logits and values.shape != logits[0].shape:
            raise ValueError("%s: gives %d attributes, but the results in %s have %d"
                             % (path, values.shape[1], args.a, logits[0].shape[1]))
        if np.isfinite(values).all():
            values, kind = as_logits(values, path, kind_of(path) if path in sessions else None)
            kinds.append(kind)
        logits.append(values)
    return Sides(logits[0], logits[1], logits[2] if args.rehearsal else None, images, bins, kinds)


def check_overflow(sides, args):
    """Raises ValueError if a side's logits are NaN or infinite. The error names the layer that overflows in float16."""
    logits, names = sides[:3], np.array(sides.images)
    bad = ~np.isfinite(logits).all(axis=(0, 2))
    if bad.any():
        path = next(path for path, values in zip((args.a, args.model, args.rehearsal), logits) if not np.isfinite(values).all())
        models = [path for path in (args.rehearsal, args.a_onnx) if path]
        why = overflow(args.model, models, [sides.bins[name] for name in names[bad][:MAX_IMAGES]])
        why = why and "%s; %s" % (why, LESS_FLOAT16)
        raise ValueError("%s: NaN or infinite logits for %d of %d images (%s): %s" % (
            path, bad.sum(), len(names), some(names[bad]),
            why or "no value of %s exceeds float16, so these results are of another model or another input" % args.model))


def rank(args, images, bins):
    """Yields the lines of a ranking of the layers of A, if it is an ONNX model, or of TWIN, over images spread over the folder."""
    chosen = sorted({round(i * (len(images) - 1) / (MAX_IMAGES - 1)) for i in range(MAX_IMAGES)})
    rows = layers(args.model, [args.a_onnx or args.rehearsal], [bins[images[i]] for i in chosen])
    error = {row["tensor"]: row["error"][0] for row in rows}
    yield "relative error of each layer's result, the largest first, and its ratio to the error of the layer's input:"
    for row in sorted((row for row in rows if row["op"] != "Relu"), key=lambda row: -row["error"][0])[:WORST_LAYERS]:
        before = max([error[name] for name in row["inputs"] if name in error] or [0])
        times = "x %.2f" % (row["error"][0] / before) if before else "-"
        yield "  %.3g %8s  %s (%s), values up to %.3g" % (row["error"][0], times, row["node"], row["op"], row["largest"])
    yield "the same layers on the card: %s" % vendors_command(args, bins[images[0]])


def vendors_command(args, path):
    """Returns the command of the vendor's tool that compares the layers of an OM and an ONNX model on the card's machine."""
    onnx = re.sub(r"_aipp\.onnx$", "_nopad.onnx", args.model)
    return "msprobe compare -m offline_model -gp %s -tp %s --input_data %s -o msprobe_output" % (
        onnx, re.sub(r"(_nopad)?(\.onnx)?$", "", onnx) + ".om", path)


def judge_fixed(report, max_difference, max_flips):
    """Judges a report by fixed tolerances, None for the default. Returns (entries for the report, texts about what exceeds them)."""
    if max_difference is None:
        max_difference = MAX_LOGIT_DIFFERENCE
    if max_flips is None:
        max_flips = int(MAX_FLIP_SHARE * report["decisions"])
    problems = []
    if report["max_difference"] > max_difference:
        problems.append("the largest difference %.6g is more than %.6g (--max-difference)" % (report["max_difference"], max_difference))
    if report["flips"] > max_flips:
        problems.append("%d flips are more than %d (--max-flips)" % (report["flips"], max_flips))
    return {"allowed_difference": max_difference, "allowed_flips": max_flips, "within_tolerances": not problems}, problems


def judge_by_twin(sides, attributes, twin):
    """Judges A by the twin's logits. Returns (entries for the report, texts about what float16 does not explain)."""
    judged = judge(*sides[:3])
    within, allowed = judged.pop("within"), judged["allowed"]
    shifts, flips = np.abs(sides.twin - sides.b).max(axis=0), (sides.twin >= 0) != (sides.b >= 0)
    rehearsal = dict(judged, twin=twin, flips=int(flips.sum()), attributes=[
        {"name": name, "shift": float(shift), "flips": int(count)}
        for name, shift, count in zip(attributes, shifts, flips.sum(axis=0))])
    problems = ["%s %.6g; float16 alone: %.6g" % (name, off, shift)
                for name, off, shift in (("largest difference", judged["largest"], judged["shift"]),
                                         ("root mean square", judged["typical"], judged["typical_shift"])) if off > FACTOR * shift]
    return {"allowed_difference": allowed, "allowed_flips": int((np.abs(sides.b) <= allowed).sum()), "within_tolerances": within,
            "rehearsal": rehearsal}, problems


def causes_by_twin(sides, attributes, args):
    """Returns texts about possible causes of a difference that float16 does not explain, and what to do."""
    bins = {image: sides.bins[image] for image in sides.images}
    worst = sides.images[np.abs(sides.a - sides.b).max(axis=1).argmax()]
    return explain(*sides[:3], (args.a_onnx, args.model, args.rehearsal), bins, attributes) or [
        "none of the %d known faults of the input explains it, nor another order of the results: A may have had other bins or "
        "another aipp.cfg, or a layer or its weights are wrong. To look at the layers, give the ONNX model from which the OM was "
        "made in place of %s, or run on the card: %s" % (len(WRONG_INPUTS), args.a, vendors_command(args, bins[worst]))]


def main(argv=None):
    args = parse(argv)
    if args.labels is not None:  # fail before the work
        read_labels(args.labels)
    if args.attributes is not None:
        attribute_names(None, args.attributes)
    sides = read_sides(args)
    count = sides.a.shape[1]
    attributes = attribute_names(count, args.attributes, args.model)
    labels = None if args.labels is None else labels_of(args.labels, sides.images, count)
    groups = read_groups(args.groups, sides.images)
    if args.rehearsal:
        check_overflow(sides, args)
    report = dict({"a": args.a, "b": args.b or "%s on %s" % (args.model, args.bins),
                   "a_output": sides.kinds[0], "b_output": sides.kinds[1]},
                  **compare(sides.a, sides.b, sides.images, attributes))
    report["metrics"] = None if labels is None else effect(sides.a, sides.b, labels, groups)
    report["names_assumed"] = attributes is PETA
    if args.rehearsal:
        verdict, problems = judge_by_twin(sides, attributes, args.rehearsal)
        explained, explanation = "what float16 explains", " by more than float16 explains, which is up to %d times its own shift" % FACTOR
    else:
        verdict, problems = judge_fixed(report, args.max_difference, args.max_flips)
        explained, explanation = "the tolerances", ""
    report.update(verdict)
    for line in lines(report):
        print(line)
    if args.layers:
        for line in rank(args, sides.images, sides.bins):
            print(line)
    if args.json is not None:
        write_text(args.json, json.dumps(report, indent=1, allow_nan=False) + "\n")
    if problems:
        causes = causes_by_twin(sides, attributes, args) if args.rehearsal else [
            "look at the worst images above; if float16 is the cause (--rehearsal), " + LESS_FLOAT16]
        raise ValueError("%s and %s differ%s: %s" % (report["a"], report["b"], explanation, "; ".join(problems + causes)))
    print("within %s: difference %.6g, flips %d" % (explained, report["allowed_difference"], report["allowed_flips"]))


if __name__ == "__main__":
    command(main)
