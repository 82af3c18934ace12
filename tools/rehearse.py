"""Predicts what the card will compute, without a card: AIPP's settings for atc, and ONNX models that imitate the card (twins).

    python3 tools/rehearse.py cfg aipp.cfg
    python3 tools/rehearse.py aipp deepmar_bs1_nopad.onnx deepmar_bs1_aipp.onnx
    python3 tools/rehearse.py float16 deepmar_bs1_nopad.onnx deepmar_bs1_float16.onnx

cfg writes the file for atc's --insert_op_conf. The card then takes stage 4's uint8 bins and normalises them itself.
aipp writes a copy of the model that begins with the same arithmetic. Its input is uint8 [N,height,width,3].
float16 writes a copy of the model in which the weights, the input and each node's result are rounded to float16. Products are
summed in float32, as in the card's cube unit. tools/compare.py --rehearsal judges the card's results by this model.

These models run on ONNX Runtime like any other: in stages 6 and 7, compare, predict and quantize. They are a bound on rounding,
not a simulation of the chip: the card's order of accumulation and its kernels are unknown.
"""
import argparse
import os
import sys
import zlib

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from lib.files import whole_file, write_text
from lib.images import MEAN, SIZE, STD
from lib.models import PREFIX, check, load, nested
from lib.providers import CPU
from lib.script import command, importing, note, one_line, pixels
from lib.session import open_session

with importing():
    import numpy as np

MIN = [255 * mean for mean in MEAN]          # AIPP's min_chn and var_reci_chn. AIPP computes (pixel - min) * var_reci
VAR_RECI = [1 / (255 * std) for std in STD]
FLOAT16_MAX = 65504

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


def image_input(model):
    """Returns the input of the model's graph."""
    weights = {tensor.name for tensor in model.graph.initializer}  # older exporters list these as inputs too
    image, = [value for value in model.graph.input if value.name not in weights]
    return image


def add_aipp(model, path):
    """Puts AIPP's arithmetic at the beginning of an onnx.ModelProto, in place. The new nodes' names begin with aipp_."""
    from onnx import TensorProto, helper, numpy_helper
    graph, image = model.graph, image_input(model)
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
    args = parser.parse_args(argv)
    if args.action is None:
        parser.error("give cfg, aipp or float16")
    if args.action != "cfg" and os.path.realpath(args.output) == os.path.realpath(args.model):
        parser.error("OUTPUT is MODEL, which atc still needs; give another name")
    return args


def main(argv=None):
    args = parse(argv)
    if args.action == "cfg":
        write_text(args.output, aipp_cfg(*args.size))
        print("%s: AIPP for uint8 bins of %d x %d, for atc's --insert_op_conf" % (args.output, args.size[1], args.size[0]))
        return
    open_session(args.model, provider=CPU)  # refuses what is not a DeepMAR model
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
