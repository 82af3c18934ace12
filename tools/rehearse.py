"""Predicts what the card will compute, without a card: AIPP's settings for atc, and ONNX models that imitate the card (twins).

    python3 tools/rehearse.py cfg aipp.cfg
    python3 tools/rehearse.py aipp deepmar_bs1_nopad.onnx deepmar_bs1_aipp.onnx
    python3 tools/rehearse.py input images plain_bin image.txt --resize plain --nv12 709
    python3 tools/rehearse.py float16 deepmar_bs1_nopad.onnx deepmar_bs1_float16.onnx
    python3 tools/rehearse.py int8 deepmar_bs1_nopad.onnx val_bin deepmar_bs1_int8.onnx --images 32
    python3 tools/rehearse.py costs --model deepmar_bs1_nopad.onnx --images images --list image.txt --labels label.json

cfg writes the file for atc's --insert_op_conf. The card then takes stage 4's uint8 bins and normalises them itself.
aipp writes a copy of the model that begins with the same arithmetic. Its input is uint8 [N,height,width,3].
input writes bins as stage 4 does, but from the pixels that a deployment would have: resized as OpenCV and DVPP do it, through NV12, or
through JPEG. tools/compare.py and stages 5 to 7 then show what this does to the logits and the accuracy.
With --nv12, cfg and aipp are for an input of NV12, uint8 [N,1.5 x height,width], of which stage 4 writes bins with --nv12.
float16 writes a copy of the model in which the weights, the input and each node's result are rounded to float16. Products are
summed in float32, as in the card's cube unit. tools/compare.py --rehearsal judges the card's results by this model.
int8 writes a copy of the model with the arithmetic of AMCT, the tool that makes an INT8 model for atc. Bins of training or
validation images give the ranges. Beside the copy, in OUTPUT_amct, it writes what AMCT itself needs: its settings and its
calibration bins. --within leaves in float what costs most.
costs compares all of these with float32, and the pixels of a camera with stage 4's, in one table: the bytes of an image's input, the
shift of the logits, the flips, and the drop of the accuracy. It keeps each row's logits in a folder, so a second start goes on.

These models run on ONNX Runtime like any other: in stages 6 and 7, compare, predict and quantize. They are a bound on rounding,
not a simulation of the chip: the card's order of accumulation and its kernels are unknown.
"""
import argparse
import json
import os
import shlex
import sys
import zlib

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from lib import camera, costs, int8
from lib.aipp import add_aipp, aipp_cfg, aipp_differences
from lib.bins import contents
from lib.files import whole_file, write_text
from lib.float16 import round_results, round_weights
from lib.images import SIZE, resize, write_bins
from lib.labels import GROUPS_HELP, labels_of, read_groups
from lib.machine import cores
from lib.metrics import effect
from lib.models import check, load, nested, output_kind
from lib.names import find_listed, read_list
from lib.providers import CPU
from lib.results import as_logits
from lib.script import command, has_module, importing, note, number, pixels, some
from lib.session import (attributes_of, bins_of, compute, cpu_session, described_by, empty_batch, input_kind, input_size,
                         open_session)

with importing():
    import numpy as np

RESIZE = {"pillow": resize, "plain": camera.resized(camera.resize_plain), "opencv": camera.resized(camera.resize_opencv)}
CALIBRATION_IMAGES = 32  # AMCT's guides advise 16 or 32
RANKED_IMAGES = 8        # at least this many calibration images rank the layers


def add_input(actions):
    """Adds the action input to the command line."""
    action = actions.add_parser("input", help="write bins with the pixels of a deployment", allow_abbrev=False)
    action.add_argument("images", metavar="IMAGES", help="the folder of the images")
    action.add_argument("bins", metavar="BIN_DIR", help="the folder of bins to write")
    action.add_argument("image_txt", metavar="IMAGE_TXT", help="the list of images, one file name per line")
    action.add_argument("--size", nargs=2, type=pixels, default=(SIZE, SIZE), metavar=("H", "W"),
                        help="height and width of the network's input (default: 224 224)")
    action.add_argument("--jpeg", type=number(int, 1, 100), metavar="QUALITY", help="save each image as JPEG and read it again first")
    action.add_argument("--resize", choices=sorted(RESIZE), default="pillow",
                        help="pillow: as stage 4 (default); plain: bilinear without averaging, as OpenCV and DVPP; opencv: OpenCV itself")
    action.add_argument("--nv12", choices=sorted(camera.STANDARDS),
                        help="convert the resized image to NV12 by this standard, and back as AIPP does it")
    action.add_argument("--kind", choices=["float32", "uint8", "nv12"], default="float32",
                        help="what the bins hold: input for the model (default), RGB pixels or NV12 for one with AIPP")


def add_costs(actions):
    """Adds the action costs to the command line."""
    action = actions.add_parser("costs", help="compare all of them with float32 in one table", allow_abbrev=False)
    action.add_argument("--model", "--onnx", required=True, help="the model that stage 2 wrote")
    action.add_argument("--images", required=True, metavar="DIR", help="the folder of the images")
    action.add_argument("--list", default="image.txt", metavar="FILE", help="the images, one file name per line (default: %(default)s)")
    action.add_argument("--labels", default="label.json", metavar="FILE", help="their labels (default: %(default)s)")
    action.add_argument("--groups", metavar="FILE", help=GROUPS_HELP)
    action.add_argument("--calibration-images", metavar="DIR", help="the folder of INT8's calibration images (default: some of --images)")
    action.add_argument("--calibration-list", metavar="FILE",
                        help="their list, of training or validation images; %d spread over it are taken" % CALIBRATION_IMAGES)
    action.add_argument("--nv12", choices=sorted(camera.STANDARDS), default="709", help="the standard of NV12 (default: %(default)s)")
    action.add_argument("--output", default="costs", metavar="DIR", help="the folder that keeps each row's logits (default: %(default)s)")
    action.add_argument("--json", metavar="FILE", help="also write the figures here, for tools/report.py --costs")


def deployed(image, size, args):
    """Returns a PIL image as a deployment would resize it. size: (height, width). args: those of the action input."""
    from PIL import Image
    if args.jpeg:
        image = camera.through_jpeg(image, args.jpeg)
    image = RESIZE[args.resize](image, size)
    if args.nv12 and args.kind != "nv12":
        image = Image.fromarray(camera.to_rgb(camera.to_nv12(np.asarray(image), args.nv12), args.nv12))
    return image


def write_input(args):
    """Writes the bins of the action input."""
    if args.resize == "opencv" and not has_module("cv2"):
        raise ValueError("--resize opencv needs OpenCV; run: pip install opencv-python-headless")
    if args.nv12:
        camera.check_even(*args.size)
    kind = "nv12-" + args.nv12 if args.kind == "nv12" else args.kind
    count, _ = write_bins(args.images, args.bins, args.image_txt, tuple(args.size), kind, lambda *image: deployed(*image, args))
    steps = ["%s %s" % (name, value) for name, value in (("jpeg", args.jpeg), ("resize", args.resize), ("nv12", args.nv12)) if value]
    print("%s: %d images -> %d bins of %s (%s)" % (args.bins, count, count, contents(kind, *args.size)[0], ", ".join(steps)))
    print("next: python3 tools/compare.py result/dumpOutput_device0 --model MODEL --bins %s" % args.bins)


def layers_to_quantize(model, args):
    """Returns a folded model's layers without those of --skip, and the names of these."""
    layers = int8.find_layers(model, args.model)
    known = {name for layer in layers for name in (layer.name, layer.op)}
    for name in args.skip:
        if name not in known:
            raise ValueError("%s: has no layer or type %s; it has %s" % (args.model, name, some(sorted(known), len(known))))
    skipped = [layer for layer in layers if {layer.name, layer.op} & set(args.skip)]
    return [layer for layer in layers if layer not in skipped], [layer.name for layer in skipped]


def keep_within(limit, ranking, ranges, loss, measure):
    """Returns the layers that stay in float, the shortest beginning of a ranking that keeps the loss within a limit.

    loss(layers, ranges): of the network with these layers in INT8, in a unit, measure. Prints why.
    """
    layers = [layer for _, layer in ranking]
    losses = {}

    def lost(count):
        if count not in losses:
            losses[count] = loss(layers[count:], ranges)
        return losses[count]

    count = 0 if lost(0) <= limit else int8.shortest(len(layers), lost, limit)
    print("%s: %.4f with %d layers in int8, %.4f with %d of them in float (allowed: %g)"
          % (measure, lost(0), len(layers), lost(count), count, limit))
    for moved, layer in ranking[:count]:
        print("  in float: %s (%s), which alone moves the logits by %.3g" % (layer.name, layer.op, moved))
    return layers[:count]


def write_int8(args, temporary):
    """Writes the INT8 twin to a temporary file, and AMCT's files. Prints what it did."""
    session = open_session(args.model)
    if input_kind(session) != "float32":
        raise ValueError("%s: does not take float32; give the model without AIPP, and run aipp on OUTPUT" % args.model)
    batch_size, height, width = input_size(session)
    shape = "%s:%d,3,%d,%d" % (session.get_inputs()[0].name, batch_size, height, width)
    empty, count = empty_batch(session, batch_size, height, width), attributes_of(session)
    bins = bins_of(args.bins, session)
    del session  # the activations need its memory
    labels = args.labels and labels_of(args.labels, [name for name, _ in bins], count)
    int8.note_test_set(args.bins)
    model = load(args.model)
    int8.fold(model)
    layers, in_float = layers_to_quantize(model, args)
    chosen = int8.spread([path for _, path in bins], args.images, batch_size)
    batches = [int8.read(paths, empty) for paths in chosen]
    ranges = int8.calibrate(model, layers, batches)
    if args.layers or args.within is not None:
        ranking = int8.rank(model, layers, ranges, batches[:-(-RANKED_IMAGES // batch_size)])
    if args.layers:
        print("how far each layer, alone in int8, moves the logits (root mean square):")
        for moved, layer in ranking:
            print("  %-8.3g %s (%s)" % (moved, layer.name, layer.op))
    if args.within is not None:
        if labels is None:
            exact, measure = int8.run(model, batches), "root mean square of the logits' shift"

            def loss(layers, ranges):
                return int8.rms(int8.run(int8.twin(model, layers, ranges), batches), exact)
        else:
            (exact, kind), measure = as_logits(compute(open_session(args.model), bins), args.model, output_kind(model)), \
                "drop of instance_acc in points"

            def loss(layers, ranges):
                found, _ = as_logits(compute(cpu_session(int8.twin(model, layers, ranges), cores()), bins), args.model, kind)
                return -100 * effect(found, exact, labels)["instance_acc"]["change"]
        left = keep_within(args.within, ranking, ranges, loss, measure)
        if left:
            layers = [layer for layer in layers if layer not in left]
            in_float += [layer.name for layer in left]
            ranges = int8.calibrate(model, layers, batches)
            lost = loss(layers, ranges)
            print("%s, calibrated anew: %.4f" % (measure, lost))
            if lost > args.within:
                note("the new calibration loses more than %g; allow less, or also give --skip" % args.within)
    write(int8.twin(model, layers, ranges), args.output, temporary)
    stem = os.path.splitext(args.output)[0]
    folder, prefix = stem + "_amct", os.path.join(stem + "_amct", os.path.basename(stem))
    int8.write_amct_files(folder, chosen, in_float)
    print("%s: %d layers in int8%s, %d in float, calibrated on %d of %d bins; a rehearsal of AMCT's arithmetic, not a simulation of "
          "the chip" % (args.output, len(layers), ", AveragePool among them" if "AveragePool" in {layer.op for layer in layers} else "",
                        len(in_float), len(chosen) * batch_size, len(bins)))
    print("next: python3 tools/benchmark.py -batch_size=%d -om_path=%s -input_text_path=deepmar.info" % (batch_size, args.output))
    print("for a card, with AMCT and CANN:")
    print("  amct_onnx calibration --model %s --save_path %s --input_shape %s --data_dir %s/calibration --data_types float32 "
          "--calibration_config %s/quant.cfg" % tuple(map(shlex.quote, (args.model, prefix, shape, folder, folder))))
    print("  atc --model=%s_deploy_model.onnx --framework=5 --output=%s --input_format=NCHW --input_shape=%s --log=error "
          "--soc_version=Ascend310P3" % tuple(map(shlex.quote, (prefix, stem, shape))))


def write_costs(args, session, model):
    """Computes all rows of the action costs that are not in its folder yet, and prints and writes their figures."""
    if input_kind(session) != "float32":
        raise ValueError("%s: does not take float32; give the model without AIPP, which costs adds itself" % args.model)
    shape = input_size(session)
    names = read_list(args.list)
    paths = find_listed(args.images, names, args.list)
    labels, groups = labels_of(args.labels, names, attributes_of(session)), read_groups(args.groups, names)
    given = paths
    if args.calibration_list:
        given = find_listed(args.calibration_images, read_list(args.calibration_list), args.calibration_list)
    calibration = [path for path, in int8.spread(given, CALIBRATION_IMAGES, 1)]
    checks = [costs.checksums(files) for files in ([args.model], paths, calibration)]
    seen = len(set(checks[1]) & set(checks[2]))
    calibrated = "calibrated on %d images" % len(calibration)
    if seen:
        calibrated += ", %d of them among these, so the drop may be too small" % seen
    table = costs.rows(args.nv12, calibrated)
    costs.twin(model, table[-1], args.model)  # refuses a size that NV12 cannot have, before the work
    os.makedirs(args.output, exist_ok=True)
    outputs, kept = costs.all_logits(table, model, args.model, paths, calibration, checks, shape, args.output)
    reference, kind = as_logits(outputs["float32"], args.model, output_kind(model))
    rows = [costs.figures(row, as_logits(outputs[row.name], args.model, kind)[0], reference, labels, groups, shape[1:])
            for row in table]
    for line in costs_lines(rows):
        print(line)
    worst = max(rows, key=lambda row: row["drop"])
    print("%d images, %d decisions; the largest drop is %s points (%s); no speed was measured; %d of %d rows were in %s"
          % (len(names), reference.size, points(worst["drop"]), worst["name"], kept, len(rows), args.output))
    if args.json is not None:
        write_text(args.json, json.dumps({
            "model": args.model, "model_sha256": checks[0][0],
            "checkpoint_sha256": described_by(session, args.model).get("checkpoint_sha256"), "list": args.list,
            "scored": costs.identity(names, labels), "images": len(names), "decisions": reference.size, "rows": rows}, indent=1) + "\n")


def points(share):
    """Returns a share in percentage points, as text without a -0.00."""
    return "%.2f" % (round(100 * share, 2) + 0)


def costs_lines(rows):
    """Yields the lines of a table of the rows that costs.figures() returned, and how far each can be trusted."""
    cells = [("", "bytes", "largest shift", "rms shift", "flips", "instance_acc", "drop in points", "95 %", "trust")]
    for row in rows:
        shift = ("%.4f" % row["max_difference"], "%.5f" % row["rms_difference"], "%d" % row["flips"])
        drop = (points(row["drop"]), " to ".join(map(points, row["interval"])) if row["interval"] else "-")
        if row["trust"] == "reference":
            shift, drop = ("-",) * 3, ("-",) * 2
        cells.append((row["name"], "%d" % row["bytes"]) + shift + ("%.6f" % row["instance_acc"],) + drop + (row["trust"],))
    widths = [max(map(len, column)) for column in zip(*cells)]
    for name, *middle, trust in cells:
        yield "  ".join([name.ljust(widths[0])] + [text.rjust(width) for text, width in zip(middle, widths[1:])] + [trust])
    for names, why in costs.trust(rows):
        yield "%s: %s" % (names, why)


def write(model, path, temporary):
    """Checks a model and writes it to the temporary file that will become path."""
    check(model, path)
    with open(temporary, "wb") as f:
        f.write(model.SerializeToString())


def save(model, path):
    """Checks a model and writes it, whole or not at all."""
    with whole_file(path) as temporary:
        write(model, path, temporary)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    action = actions.add_parser("cfg", help="write AIPP's settings for atc", allow_abbrev=False)
    action.add_argument("output", metavar="FILE", help="the file to write")
    action.add_argument("--size", nargs=2, type=pixels, default=(SIZE, SIZE), metavar=("H", "W"),
                        help="height and width of the network's input (default: 224 224)")
    action.add_argument("--nv12", choices=sorted(camera.STANDARDS), help="take NV12 of this standard instead of RGB")
    add_input(actions)
    for name, text in (("aipp", "write the model with AIPP before it"), ("float16", "write the model rounded to float16")):
        action = actions.add_parser(name, help=text, allow_abbrev=False)
        action.add_argument("model", metavar="MODEL", help="the model that stage 2 wrote")
        action.add_argument("output", metavar="OUTPUT", help="the model to write")
        if name == "aipp":
            action.add_argument("--nv12", choices=sorted(camera.STANDARDS), help="take NV12 of this standard instead of RGB")
    action = actions.add_parser("int8", help="write the model with AMCT's INT8 arithmetic", allow_abbrev=False)
    action.add_argument("model", metavar="MODEL", help="the model that stage 2 wrote")
    action.add_argument("bins", metavar="BIN_DIR", help="bins of training or validation images, as stage 4 writes them")
    action.add_argument("output", metavar="OUTPUT", help="the model to write")
    action.add_argument("--images", type=number(int, 1), default=CALIBRATION_IMAGES, metavar="N",
                        help="number of bins for calibration, spread over the folder (default: %(default)s)")
    action.add_argument("--skip", nargs="+", default=[], metavar="LAYER",
                        help="leave these layers in float: nodes' names, or types such as AveragePool")
    action.add_argument("--layers", action="store_true", help="rank the layers by how far each alone moves the logits")
    action.add_argument("--within", type=number(float, 0), metavar="X",
                        help="leave as few layers of this ranking in float as keep the loss within X: the root mean square of the "
                             "logits' shift, or with --labels, points of instance_acc")
    action.add_argument("--labels", metavar="LABEL", help="the bins' label.json, for --within")
    add_costs(actions)
    args = parser.parse_args(argv)
    if args.action is None:
        parser.error("give cfg, aipp, float16, int8, input or costs")
    if args.action == "input" and args.kind == "nv12" and not args.nv12:
        parser.error("--kind nv12 needs --nv12, the standard")
    if args.action == "int8" and args.labels is not None and args.within is None:
        parser.error("--labels goes with --within")
    if args.action == "costs" and (args.calibration_images is None) != (args.calibration_list is None):
        parser.error("--calibration-images and --calibration-list go together")
    if args.action in ("aipp", "float16", "int8") and os.path.realpath(args.output) == os.path.realpath(args.model):
        parser.error("OUTPUT is MODEL, which atc still needs; give another name")
    return args


def main(argv=None):
    args = parse(argv)
    if args.action == "input":
        write_input(args)
        return
    if args.action == "int8":
        with whole_file(args.output) as temporary:  # fail before the work if it cannot be written
            write_int8(args, temporary)
        return
    if args.action == "cfg":
        write_text(args.output, aipp_cfg(*args.size, args.nv12))
        print("%s: AIPP for %s bins of %d x %d, for atc's --insert_op_conf"
              % (args.output, "NV12 (%s)" % args.nv12 if args.nv12 else "uint8", args.size[1], args.size[0]))
        return
    session = open_session(args.model, provider=CPU)  # refuses what is not a DeepMAR model
    model = load(args.model)
    if len(list(nested(model.graph))) > 1:
        raise ValueError("%s: has graphs inside its graph, so it is not a DeepMAR model" % args.model)
    if args.action == "costs":
        write_costs(args, session, model)
        return
    if args.action == "aipp":
        add_aipp(model, args.model, args.nv12)
        save(model, args.output)
        print("%s: takes %s bins; AIPP's values differ from stage 4's by at most %s (red, green, blue), over all pixel values"
              % (args.output, "NV12 (%s)" % args.nv12 if args.nv12 else "uint8",
                 ", ".join("%.2g" % value for value in aipp_differences())))
        return
    weights = round_weights(model.graph)
    results = round_results(model, args.model)
    with open(args.model, "rb") as f:
        model.metadata_props.add(key="rehearsal_of", value="%08x" % zlib.crc32(f.read()))
    save(model, args.output)
    print("%s: %d tensors of weights and %d results are rounded to float16; a bound on rounding, not a simulation of the chip"
          % (args.output, weights, results))
    print("next: python3 tools/compare.py %s --model %s --bins input_bin\n"
          "      python3 tools/compare.py result/dumpOutput_device0 --model %s --rehearsal %s --bins input_bin"
          % (args.output, args.model, args.model, args.output))


if __name__ == "__main__":
    command(main)
