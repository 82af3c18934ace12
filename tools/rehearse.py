"""Predicts what the card will compute, without a card: AIPP's settings for atc, and ONNX models that imitate the card (twins).

    python3 tools/rehearse.py cfg aipp.cfg
    python3 tools/rehearse.py aipp deepmar_bs1_nopad.onnx deepmar_bs1_aipp.onnx
    python3 tools/rehearse.py float16 deepmar_bs1_nopad.onnx deepmar_bs1_float16.onnx
    python3 tools/rehearse.py int8 deepmar_bs1_nopad.onnx val_bin deepmar_bs1_int8.onnx --images 32

cfg writes the file for atc's --insert_op_conf. The card then takes stage 4's uint8 bins and normalises them itself.
aipp writes a copy of the model that begins with the same arithmetic. Its input is uint8 [N,height,width,3].
float16 writes a copy of the model in which the weights, the input and each node's result are rounded to float16. Products are
summed in float32, as in the card's cube unit. tools/compare.py --rehearsal judges the card's results by this model.
int8 writes a copy of the model with the arithmetic of AMCT, the tool that makes an INT8 model for atc. Bins of training or
validation images give the ranges. Beside the copy, in OUTPUT_amct, it writes what AMCT itself needs: its settings and its
calibration bins. --within leaves in float what costs most.

These models run on ONNX Runtime like any other: in stages 6 and 7, compare, predict and quantize. They are a bound on rounding,
not a simulation of the chip: the card's order of accumulation and its kernels are unknown.
"""
import argparse
import os
import shlex
import sys
import zlib

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from lib import int8
from lib.bins import list_bins
from lib.files import whole_file, write_text
from lib.images import MEAN, SIZE, STD
from lib.labels import labels_of
from lib.machine import cores
from lib.metrics import effect
from lib.models import PREFIX, check, load, nested
from lib.names import composed
from lib.script import command, importing, note, number, pixels, some
from lib.session import compute, cpu_session, empty_batch, input_size, open_session, takes_uint8

with importing():
    import numpy as np

MIN = [255 * mean for mean in MEAN]          # AIPP's min_chn and var_reci_chn. AIPP computes (pixel - min) * var_reci
VAR_RECI = [1 / (255 * std) for std in STD]
FLOAT16_MAX = 65504
CALIBRATION_IMAGES = 32  # AMCT's guides advise 16 or 32
RANKED_IMAGES = 8        # at least this many calibration images rank the layers

# The results of these operators are not rounded: they only select or move values, which are already rounded.
SELECTING_OPERATORS = {"Relu", "MaxPool", "Flatten", "Reshape", "Transpose", "Identity", "Gather", "Squeeze", "Unsqueeze"}


def aipp_cfg(height, width):
    """Returns AIPP's settings for atc, in protobuf's text format."""
    fields = ["aipp_mode: static", "related_input_rank: 0", "input_format: RGB888_U8", "src_image_size_w: %d" % width,
              "src_image_size_h: %d" % height, "csc_switch: false", "rbuv_swap_switch: false"]
    for name, values in (("min", MIN), ("var_reci", VAR_RECI)):
        fields += ["%s_chn_%d: %.15g" % (name, i, value) for i, value in enumerate(values)]
    return "aipp_op {\n    %s\n}\n" % "\n    ".join(fields)


def aipp_table():
    """Returns AIPP's result for each pixel value, float32 [3 channels,256]. Its settings and both operations are float16."""
    pixel = np.arange(256).astype(np.float16)
    return np.stack([(pixel - np.float16(low)) * np.float16(factor) for low, factor in zip(MIN, VAR_RECI)]).astype(np.float32)


def aipp_differences():
    """Returns the largest difference between AIPP's and stage 4's values over all pixel values, for each channel."""
    pixel = np.arange(256, dtype=np.float32) / np.float32(255)
    exact = [(pixel - np.float32(mean)) / np.float32(std) for mean, std in zip(MEAN, STD)]
    return np.abs(aipp_table() - exact).max(axis=1)


def image_input(model, path):
    """Returns the input of the model's graph. Raises ValueError if there are several."""
    weights = {tensor.name for tensor in model.graph.initializer}  # older exporters list these as inputs too
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1 or len(inputs[0].type.tensor_type.shape.dim) != 4:
        raise ValueError("%s: is not a DeepMAR model, which has one input [N,3,224,224]" % path)
    return inputs[0]


def add_aipp(model, path):
    """Puts AIPP's arithmetic at the beginning of an onnx.ModelProto, in place. The new nodes' names begin with aipp_."""
    from onnx import TensorProto, helper, numpy_helper
    graph, image = model.graph, image_input(model, path)
    if image.type.tensor_type.elem_type != TensorProto.FLOAT:
        raise ValueError("%s: does not take float32; it may already have AIPP" % path)
    batch, _, height, width = image.type.tensor_type.shape.dim
    uint8 = helper.make_tensor_value_info("aipp_pixels", TensorProto.UINT8, [1, 1, 1, 3])
    for dim, source in zip(uint8.type.tensor_type.shape.dim, (batch, height, width)):
        dim.CopyFrom(source)
    graph.value_info.add().CopyFrom(image)
    graph.input.remove(image)
    graph.input.insert(0, uint8)
    for entry in model.metadata_props:
        if entry.key == PREFIX + "layout":
            entry.value = "NHWC RGB uint8"
    # A table is enough, because a channel has only 256 values.
    graph.initializer.extend([numpy_helper.from_array(aipp_table().ravel(), "aipp_table"),
                              numpy_helper.from_array(np.array([0, 256, 512], np.int32), "aipp_rows")])
    nodes = [helper.make_node("Cast", ["aipp_pixels"], ["aipp_values"], "aipp_cast", to=TensorProto.INT32),
             helper.make_node("Add", ["aipp_values", "aipp_rows"], ["aipp_places"], "aipp_add"),
             helper.make_node("Gather", ["aipp_table", "aipp_places"], ["aipp_nhwc"], "aipp_gather", axis=0),
             helper.make_node("Transpose", ["aipp_nhwc"], [image.name], "aipp_transpose", perm=[0, 3, 1, 2])]
    nodes += graph.node
    del graph.node[:]
    graph.node.extend(nodes)


def round_weights(graph):
    """Rounds the graph's float32 initializers to float16, in place. Returns their number."""
    from onnx import TensorProto, numpy_helper
    weights = [tensor for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT]
    for tensor in weights:
        values = numpy_helper.to_array(tensor)
        with np.errstate(over="ignore"):
            rounded = values.astype(np.float16).astype(np.float32)
        if not np.isfinite(rounded).all():
            note("%s: %d weights are larger than float16's maximum, %d" % (tensor.name, (~np.isfinite(rounded)).sum(), FLOAT16_MAX))
        tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))
    return len(weights)


def rounding(source, target, rank):
    """Returns the nodes that round a float32 tensor to float16.

    ONNX Runtime 1.10 would drop a Cast to float16 that is followed by a Cast back. It keeps them if a Reshape is between them.
    This Reshape keeps every size and copies nothing.
    """
    from onnx import TensorProto, helper
    half, same = target + "/float16", target + "/float16_kept"
    return [helper.make_node("Cast", [source], [half], half, to=TensorProto.FLOAT16),
            helper.make_node("Reshape", [half, "shape_of_rank_%d" % rank], [same], same),
            helper.make_node("Cast", [same], [target], target + "/float32", to=TensorProto.FLOAT)]


def tensor_types(model):
    """Returns {name: type} of the tensors in a model's graph, as far as onnx can infer them."""
    import onnx
    from onnx import helper
    model = onnx.ModelProto.FromString(model.SerializeToString())
    graph = model.graph
    listed = {value.name for value in graph.input}
    graph.input.extend(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
                       for tensor in graph.initializer if tensor.name not in listed)  # onnx 1.7 only sees initializers that are also inputs
    graph = onnx.shape_inference.infer_shapes(model).graph
    return {value.name: value.type.tensor_type for values in (graph.input, graph.value_info, graph.output) for value in values}


def round_results(model, path):
    """Rounds the input and each node's result to float16, in place. A rounded result keeps its name. Returns their number."""
    from onnx import TensorProto, numpy_helper
    graph, types = model.graph, tensor_types(model)
    image, nodes, ranks = image_input(model, path), [], set()

    def add_rounding(source, target, name):
        rank = len(types[name].shape.dim)
        ranks.add(rank)
        nodes.extend(rounding(source, target, rank))

    rounded = image.name
    if types[image.name].elem_type == TensorProto.FLOAT:
        rounded = image.name + "/rounded"
        add_rounding(image.name, rounded, image.name)
    for node in graph.node:
        inputs = [rounded if name == image.name else name for name in node.input]
        del node.input[:]
        node.input.extend(inputs)
        nodes.append(node)
        for i, name in enumerate(node.output):
            if name and not types.get(name):
                raise ValueError("%s: the type of %s, from a node %s, is unknown" % (path, name, node.op_type))
            if name and types[name].elem_type == TensorProto.FLOAT and node.op_type not in SELECTING_OPERATORS:
                node.output[i] = name + "/unrounded"
                add_rounding(node.output[i], name, name)
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(numpy_helper.from_array(np.zeros(rank, np.int64), "shape_of_rank_%d" % rank)
                             for rank in sorted(ranks))
    return sum(node.name.endswith("/float16_kept") for node in nodes)


def layers_to_quantize(model, args):
    """Returns a folded model's layers without those of --skip, and the names of these."""
    layers = int8.find_layers(model, args.model)
    known = {name for layer in layers for name in (layer.name, layer.op)}
    for name in args.skip:
        if name not in known:
            raise ValueError("%s: has no layer or type %s; it has %s" % (args.model, name, some(sorted(known), len(known))))
    skipped = [layer for layer in layers if {layer.name, layer.op} & set(args.skip)]
    return [layer for layer in layers if layer not in skipped], [layer.name for layer in skipped]


def keep_within(limit, ranking, ranges, logits, loss, measure):
    """Returns the layers that stay in float, the shortest beginning of a ranking that keeps the loss within a limit.

    logits(layers, ranges): of the network with these layers in INT8. loss(logits): in a unit, measure. Prints why.
    """
    layers = [layer for _, layer in ranking]
    losses = {}

    def lost(count):
        if count not in losses:
            losses[count] = loss(logits(layers[count:], ranges))
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
    if takes_uint8(session):
        raise ValueError("%s: does not take float32; give the model without AIPP, and run aipp on OUTPUT" % args.model)
    batch_size, height, width = input_size(session)
    shape = "%s:%d,3,%d,%d" % (session.get_inputs()[0].name, batch_size, height, width)
    empty, count = empty_batch(session, batch_size, height, width), session.get_outputs()[0].shape[1]
    del session  # the activations need its memory
    bins = [(composed(name[:-len(".bin")]), os.path.join(args.bins, name)) for name in list_bins(args.bins, width, height, False)]
    labels = args.labels and labels_of(args.labels, [name for name, _ in bins], count)
    if int8.is_test_set(args.bins):
        note("%s: deepmar.info lists these bins, so they are the test set; give bins of training or validation images" % args.bins)
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

            def logits(layers, ranges):
                return int8.run(int8.twin(model, layers, ranges), batches)

            def loss(found):
                return int8.rms(found, exact)
        else:
            exact, measure = compute(open_session(args.model), bins), "drop of instance_acc in points"

            def logits(layers, ranges):
                return compute(cpu_session(int8.twin(model, layers, ranges), cores()), bins)

            def loss(found):
                return -100 * effect(found, exact, labels)["instance_acc"]["change"]
        left = keep_within(args.within, ranking, ranges, logits, loss, measure)
        if left:
            layers = [layer for layer in layers if layer not in left]
            in_float += [layer.name for layer in left]
            ranges = int8.calibrate(model, layers, batches)
            lost = loss(logits(layers, ranges))
            print("%s, calibrated anew: %.4f" % (measure, lost))
            if lost > args.within:
                note("the new calibration loses more than %g; allow less, or also give --skip" % args.within)
    save(int8.twin(model, layers, ranges), temporary)
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


def save(model, path):
    """Checks a model and writes it, whole or not at all."""
    check(model, path)
    with whole_file(path) as temporary, open(temporary, "wb") as f:
        f.write(model.SerializeToString())


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    action = actions.add_parser("cfg", help="write AIPP's settings for atc", allow_abbrev=False)
    action.add_argument("output", metavar="FILE", help="the file to write")
    action.add_argument("--size", nargs=2, type=pixels, default=(SIZE, SIZE), metavar=("H", "W"),
                        help="height and width of the network's input (default: 224 224)")
    for name, text in (("aipp", "write the model with AIPP before it"), ("float16", "write the model rounded to float16")):
        action = actions.add_parser(name, help=text, allow_abbrev=False)
        action.add_argument("model", metavar="MODEL", help="the model that stage 2 wrote")
        action.add_argument("output", metavar="OUTPUT", help="the model to write")
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
    args = parser.parse_args(argv)
    if args.action is None:
        parser.error("give cfg, aipp, float16 or int8")
    if args.action == "int8" and args.labels is not None and args.within is None:
        parser.error("--labels goes with --within")
    if args.action != "cfg" and os.path.realpath(args.output) == os.path.realpath(args.model):
        parser.error("OUTPUT is MODEL, which atc still needs; give another name")
    return args


def main(argv=None):
    args = parse(argv)
    if args.action == "cfg":
        write_text(args.output, aipp_cfg(*args.size))
        print("%s: AIPP for uint8 bins of %d x %d, for atc's --insert_op_conf" % (args.output, args.size[1], args.size[0]))
        return
    if args.action == "int8":
        with whole_file(args.output) as temporary:  # fail before the work if it cannot be written
            write_int8(args, temporary)
        return
    model = load(args.model)
    if len(list(nested(model.graph))) > 1:
        raise ValueError("%s: has graphs inside its graph, so it is not a DeepMAR model" % args.model)
    if args.action == "aipp":
        add_aipp(model, args.model)
        save(model, args.output)
        print("%s: takes uint8 bins; AIPP's values differ from stage 4's by at most %s (red, green, blue), over all pixel values"
              % (args.output, ", ".join("%.2g" % value for value in aipp_differences())))
        return
    weights = round_weights(model.graph)
    results = round_results(model, args.model)
    with open(args.model, "rb") as f:
        model.metadata_props.add(key="rehearsal_of", value="%08x" % zlib.crc32(f.read()))
    save(model, args.output)
    print("%s: %d tensors of weights and %d results are rounded to float16; a bound on rounding, not a simulation of the chip"
          % (args.output, weights, results))
    print("next: python3 tools/compare.py %s --onnx %s --bins input_bin\n"
          "      python3 tools/compare.py result/dumpOutput_device0 --onnx %s --rehearsal %s --bins input_bin"
          % (args.output, args.model, args.model, args.output))


if __name__ == "__main__":
    command(main)
