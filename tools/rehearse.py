"""Predicts what the card will compute, without a card: AIPP's settings for atc, and ONNX models that imitate the card (twins).

    python3 tools/rehearse.py cfg aipp.cfg
    python3 tools/rehearse.py aipp deepmar_bs1_nopad.onnx deepmar_bs1_aipp.onnx
    python3 tools/rehearse.py input images plain_bin image.txt --resize plain --nv12 709
    python3 tools/rehearse.py float16 deepmar_bs1_nopad.onnx deepmar_bs1_float16.onnx
    python3 tools/rehearse.py int8 deepmar_bs1_nopad.onnx val_bin deepmar_bs1_int8.onnx --images 32

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

These models run on ONNX Runtime like any other: in stages 6 and 7, compare, predict and quantize. They are a bound on rounding,
not a simulation of the chip: the card's order of accumulation and its kernels are unknown.
"""
import argparse
import os
import shlex
import sys
import zlib

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from lib import camera, int8
from lib.bins import contents, list_bins
from lib.files import whole_file, write_text
from lib.images import LAYOUTS, MEAN, SIZE, STD, resize, write_bins
from lib.labels import labels_of
from lib.machine import cores
from lib.metrics import effect
from lib.models import PREFIX, check, load, nested
from lib.names import composed
from lib.providers import CPU
from lib.results import as_logits, kind_of
from lib.script import command, has_module, importing, note, number, one_line, pixels, some
from lib.session import attributes_of, compute, cpu_session, empty_batch, input_kind, input_size, open_session

with importing():
    import numpy as np

MIN = [255 * mean for mean in MEAN]          # AIPP's min_chn and var_reci_chn. AIPP computes (pixel - min) * var_reci
VAR_RECI = [1 / (255 * std) for std in STD]
BEYOND = 512  # AIPP's matrices give levels from -290 to 545, which are then limited to 0 to 255
RESIZE = {"pillow": resize, "plain": camera.resized(camera.resize_plain), "opencv": camera.resized(camera.resize_opencv)}
FLOAT16_MAX = 65504
CALIBRATION_IMAGES = 32  # AMCT's guides advise 16 or 32
RANKED_IMAGES = 8        # at least this many calibration images rank the layers

# The results of these operators are not rounded: they only select or move values, which are already rounded.
SELECTING_OPERATORS = {"Relu", "MaxPool", "Flatten", "Reshape", "Transpose", "Identity", "Gather", "Squeeze", "Unsqueeze"}


def aipp_cfg(height, width, nv12=None):
    """Returns AIPP's settings for atc, in protobuf's text format. nv12: for an input of NV12, its key in camera.STANDARDS."""
    fields = ["aipp_mode: static", "related_input_rank: 0", "input_format: %s" % ("YUV420SP_U8" if nv12 else "RGB888_U8"),
              "src_image_size_w: %d" % width, "src_image_size_h: %d" % height, "csc_switch: %s" % ("true" if nv12 else "false"),
              "rbuv_swap_switch: false"]
    if nv12:
        camera.check_even(height, width)
        matrix, _, bias = camera.STANDARDS[nv12]
        fields += ["matrix_r%dc%d: %d" % (i, j, value) for i, row in enumerate(matrix) for j, value in enumerate(row)]
        fields += ["input_bias_%d: %d" % pair for pair in enumerate(bias)]
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


def image_input(model):
    """Returns the input of the model's graph."""
    weights = {tensor.name for tensor in model.graph.initializer}  # older exporters list these as inputs too
    image, = [value for value in model.graph.input if value.name not in weights]
    return image


def add_aipp(model, path, nv12=None):
    """Puts AIPP's arithmetic at the beginning of an onnx.ModelProto, in place. The new nodes' names begin with aipp_."""
    from onnx import TensorProto, helper, numpy_helper
    graph, image = model.graph, image_input(model)
    if image.type.tensor_type.elem_type != TensorProto.FLOAT:
        raise ValueError("%s: does not take float32; it may already have AIPP" % path)
    batch, _, height, width = image.type.tensor_type.shape.dim
    if nv12:
        rows, columns = height.dim_value, width.dim_value
        if not rows or not columns:
            raise ValueError("%s: does not fix the height and width, which NV12 needs; export it with --size" % path)
        camera.check_even(rows, columns)
        uint8 = helper.make_tensor_value_info("aipp_pixels", TensorProto.UINT8, [1, rows * 3 // 2, columns])
        nodes, constants = nv12_nodes(rows, columns, nv12)
    else:
        uint8 = helper.make_tensor_value_info("aipp_pixels", TensorProto.UINT8, [1, 1, 1, 3])
        for dim, source in zip(uint8.type.tensor_type.shape.dim[1:], (height, width)):
            dim.CopyFrom(source)
        nodes, constants = [helper.make_node("Cast", ["aipp_pixels"], ["aipp_levels"], "aipp_cast", to=TensorProto.INT32)], {}
    uint8.type.tensor_type.shape.dim[0].CopyFrom(batch)
    graph.value_info.add().CopyFrom(image)
    graph.input.remove(image)
    graph.input.insert(0, uint8)
    layouts = [entry for entry in model.metadata_props if entry.key == PREFIX + "layout"]
    if nv12 and not layouts:  # only the layout tells the standard
        layouts = [model.metadata_props.add(key=PREFIX + "layout")]
    for entry in layouts:
        entry.value = LAYOUTS["nv12-" + nv12 if nv12 else "uint8"]
    # A table is enough, because a channel has only 256 levels. That for NV12 begins at -BEYOND and also limits the levels to these.
    table = np.pad(aipp_table(), ((0, 0), (BEYOND, BEYOND)), "edge") if nv12 else aipp_table()
    constants.update(aipp_table=table.ravel(), aipp_rows=np.arange(3, dtype=np.int32) * table.shape[1])
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    nodes += [helper.make_node("Add", ["aipp_levels", "aipp_rows"], ["aipp_places"], "aipp_add"),
              helper.make_node("Gather", ["aipp_table", "aipp_places"], ["aipp_nhwc"], "aipp_gather", axis=0),
              helper.make_node("Transpose", ["aipp_nhwc"], [image.name], "aipp_transpose", perm=[0, 3, 1, 2])]
    nodes += graph.node
    del graph.node[:]
    graph.node.extend(nodes)


def nv12_nodes(height, width, standard):
    """Returns (nodes that convert NV12 as camera.to_rgb() does, but without its limits; their constants, {name: array}).

    aipp_pixels: uint8 [N,1.5 x height,width]. aipp_levels: int32 [N,height,width,3], the levels of RGB + BEYOND.
    """
    from onnx import TensorProto, helper
    matrix, _, bias = camera.STANDARDS[standard]
    of_y, of_u, of_v = np.array(matrix, np.int32).T
    # Half of 256 makes the division round. ONNX's division truncates, so the sum is made positive.
    rest = 128 + 256 * BEYOND - np.array(matrix).dot(bias)
    constants = {"aipp_y": of_y, "aipp_u": of_u, "aipp_v": of_v, "aipp_rest": rest.astype(np.int32), "aipp_256": np.int32([256])}
    # A pixel's Y and its block's U and V meet as [N,height / 2,2,width / 2,2,3].
    shapes = {"aipp_pairs": [0, height // 2, 1, width // 2, 1, 2], "aipp_blocks": [0, height // 2, 2, width // 2, 2, 1],
              "aipp_image": [0, height, width, 3], "aipp_0": [0], "aipp_1": [1], "aipp_2": [2], "aipp_height": [height],
              "aipp_end": [height * 3 // 2], "aipp_axis_1": [1], "aipp_axis_5": [5]}
    constants.update((name, np.array(values, np.int64)) for name, values in shapes.items())
    nodes = [helper.make_node("Cast", ["aipp_pixels"], ["aipp_values"], "aipp_cast", to=TensorProto.INT32)]
    nodes += [helper.make_node(op, ["aipp_" + name for name in inputs.split()], ["aipp_" + output], "aipp_to_" + output)
              for op, inputs, output in (
                  ("Slice", "values 0 height axis_1", "luma"), ("Slice", "values height end axis_1", "chroma"),
                  ("Reshape", "luma blocks", "luma_blocks"), ("Reshape", "chroma pairs", "chroma_pairs"),
                  ("Slice", "chroma_pairs 0 1 axis_5", "u_level"), ("Slice", "chroma_pairs 1 2 axis_5", "v_level"),
                  ("Mul", "luma_blocks y", "from_y"), ("Mul", "u_level u", "from_u"), ("Mul", "v_level v", "from_v"),
                  ("Add", "from_u from_v", "from_uv"), ("Add", "from_uv rest", "colour"), ("Add", "from_y colour", "sum"),
                  ("Div", "sum 256", "blocks_of_levels"), ("Reshape", "blocks_of_levels image", "levels"))]
    return nodes, constants


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


def tensor_types(model, path):
    """Returns {name: type} of the tensors in a model's graph, as far as onnx can infer them. Raises ValueError if these contradict
    those that the model states."""
    import onnx
    from onnx import helper
    model = onnx.ModelProto.FromString(model.SerializeToString())
    graph = model.graph
    listed = {value.name for value in graph.input}
    graph.input.extend(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
                       for tensor in graph.initializer if tensor.name not in listed)  # onnx 1.7 only sees initializers that are also inputs
    try:
        graph = onnx.shape_inference.infer_shapes(model).graph
    except RuntimeError as error:
        raise ValueError("%s: is not a valid ONNX model: %s" % (path, one_line(error)))
    return {value.name: value.type.tensor_type for values in (graph.input, graph.value_info, graph.output) for value in values}


def round_results(model, path):
    """Rounds the input and each node's result to float16, in place. A rounded result keeps its name. Returns their number."""
    from onnx import TensorProto, numpy_helper
    graph, types = model.graph, tensor_types(model, path)
    image, nodes, ranks = image_input(model), [], set()

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
    if input_kind(session) != "float32":
        raise ValueError("%s: does not take float32; give the model without AIPP, and run aipp on OUTPUT" % args.model)
    batch_size, height, width = input_size(session)
    shape = "%s:%d,3,%d,%d" % (session.get_inputs()[0].name, batch_size, height, width)
    empty, count = empty_batch(session, batch_size, height, width), attributes_of(session)
    del session  # the activations need its memory
    bins = [(composed(name[:-len(".bin")]), os.path.join(args.bins, name)) for name in list_bins(args.bins, width, height, "float32")]
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
            (exact, kind), measure = as_logits(compute(open_session(args.model), bins), args.model, kind_of(args.model)), \
                "drop of instance_acc in points"

            def logits(layers, ranges):
                return as_logits(compute(cpu_session(int8.twin(model, layers, ranges), cores()), bins), args.model, kind)[0]

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
    args = parser.parse_args(argv)
    if args.action is None:
        parser.error("give cfg, aipp, float16, int8 or input")
    if args.action == "input" and args.kind == "nv12" and not args.nv12:
        parser.error("--kind nv12 needs --nv12, the standard")
    if args.action == "int8" and args.labels is not None and args.within is None:
        parser.error("--labels goes with --within")
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
    open_session(args.model, provider=CPU)  # refuses what is not a DeepMAR model
    model = load(args.model)
    if len(list(nested(model.graph))) > 1:
        raise ValueError("%s: has graphs inside its graph, so it is not a DeepMAR model" % args.model)
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
