"""INT8 as the card's quantizer, AMCT, computes it: the scales of weights and activations, a model that imitates the result, which
layers to leave in float, and what AMCT itself needs.

AMCT is the tool that makes an INT8 model for atc. Its default arithmetic is public (hicann/amct, amct_pytorch/classic/graph_based).
All constants here are from it. BatchNormalization is folded first. A weight's scale comes from its largest value (ARQ), an
activation's from a search over calibration images (IFMR), in which the weights are already quantized and the activations are not.
"""
import collections
import os
import shutil

from lib.files import replaced_folder, write_text
from lib.machine import cores
from lib.models import SIMULATES, check_float32, copied, image_input
from lib.script import importing, note, progress
from lib.session import check_bin, cpu_session, read_bin

with importing():
    import numpy as np

PERCENTILE = 0.999999                                # this part of an activation's values is below its maximum
RATIOS = np.arange(0.7, 1.3, 0.01).astype("<f4")     # of the maximum: the candidates for the end of the range
EPSILON = np.float32(2 ** -23)                       # a scale below this becomes 1

# A node that AMCT quantizes. weight, bias: the names of initializers, or None.
Layer = collections.namedtuple("Layer", "name op tensor weight bias")


def find_layers(model, path):
    """Returns the Layers of an onnx.ModelProto in the order of its graph. path: the file for an error.

    Raises ValueError if there are none, if the model is quantized, or if a layer has no name or keeps its weights elsewhere than in
    an initializer.
    """
    check_float32(model, path)
    weights, layers = {tensor.name for tensor in model.graph.initializer}, []
    for node in model.graph.node:
        constant = [name if name in weights else None for name in list(node.input[1:]) + ["", ""]]
        if node.op_type == "AveragePool":
            layers.append(Layer(node.name, node.op_type, node.input[0], None, None))
        elif node.op_type in ("Conv", "Gemm", "MatMul"):
            if constant[0] is None or len(node.input) > 2 and constant[1] is None:
                raise ValueError("%s: the weights of %s (%s) are not among the model's initializers" % (path, node.name, node.op_type))
            layers.append(Layer(node.name, node.op_type, node.input[0], constant[0], constant[1]))
    if not layers or len({layer.name for layer in layers} - {""}) < len(layers):
        raise ValueError("%s: has no layers to quantize, or they lack names of their own" % path)
    return layers


def fold(model):
    """Folds each BatchNormalization that follows a convolution into its weights, in place, in float32."""
    from onnx import helper, numpy_helper
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    made = {name: node for node in graph.node for name in node.output}
    uses = collections.Counter(name for node in graph.node for name in node.input)
    uses.update(value.name for value in graph.output)
    for norm in [node for node in graph.node if node.op_type == "BatchNormalization"]:
        conv = made.get(norm.input[0])
        if conv is None or conv.op_type != "Conv" or uses[norm.input[0]] > 1:
            continue
        scale, shift, mean, variance = (numpy_helper.to_array(tensors[name]) for name in norm.input[1:])
        epsilon = {a.name: helper.get_attribute_value(a) for a in norm.attribute}.get("epsilon", 1e-5)
        factor = scale / np.sqrt(variance + np.float32(epsilon))
        weight = numpy_helper.to_array(tensors[conv.input[1]])
        bias = numpy_helper.to_array(tensors[conv.input[2]]) if len(conv.input) > 2 else np.float32(0)
        folded = {"weight": weight * factor.reshape(-1, 1, 1, 1), "bias": (bias - mean) * factor + shift}
        del conv.input[1:]
        for kind, array in folded.items():  # under new names, because others may use the old tensors
            conv.input.append("%s/%s" % (norm.output[0], kind))
            graph.initializer.append(numpy_helper.from_array(array, conv.input[-1]))
        conv.output[0] = norm.output[0]
        graph.node.remove(norm)
    used = {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)
        for value in [value for value in graph.input if value.name == tensor.name]:  # older exporters list weights as inputs, too
            graph.input.remove(value)


# --- weights and activations ------------------------------------------------------------------------------------------

def usable(scale):
    """Returns scales, or 1 in place of those that are too small."""
    return np.where(scale < EPSILON, np.float32(1), scale)


def weight_scale(weight, op):
    """Returns a weight's scale, float32, in a shape for weight / scale. A convolution has one for each output channel."""
    axes = tuple(range(1, weight.ndim)) if op == "Conv" else None
    low, high = weight.min(axis=axes, keepdims=True), weight.max(axis=axes, keepdims=True)
    return usable(np.maximum(abs(low), abs(high)) / np.where(abs(high) < abs(low), np.float32(128), np.float32(127)))


def rounded(weight, scale):
    """Returns a weight, float32, rounded to multiples of its scale. Beside an extreme of -128, a value may round to 128."""
    return np.rint(weight / scale).clip(-128, 127) * scale


def activation_scale(values):
    """Returns (scale, offset) of an activation: float32, and an integer from -128 to 127. values: float32 [N], sorted here, in place.

    The candidate with the least squared error wins. The error is computed exactly, from the sums of the values that share an
    integer, so that no candidate needs a pass over the values. The values' own squares are the same for all candidates.
    """
    values.sort()
    rank = values.size - int(PERCENTILE * values.size)
    high, low = max(values[-rank], np.float32(0)), min(values[rank - 1], np.float32(0))
    scales = usable((RATIOS * high - low) / np.float32(255))
    levels = [np.arange(np.rint(low / scale), np.rint(end / scale) + 1) for scale, end in zip(scales, RATIOS * high)]
    cuts = [np.concatenate([[0], np.searchsorted(values, ((level[1:] - 0.5) * scale).astype("<f4")), [values.size]])
            for level, scale in zip(levels, scales)]
    edges = np.unique(np.concatenate(cuts))
    below = np.concatenate([[0], np.add.reduceat(values, edges[:-1], dtype=np.float64).cumsum()])  # the sum of values[:edge]
    errors = []
    for level, scale, cut in zip(levels, scales, cuts):
        value = level * float(scale)
        errors.append((value * (value * np.diff(cut) - 2 * np.diff(below[np.searchsorted(edges, cut)]))).sum())
    scale = scales[np.argmin(errors)]
    return scale, int(-np.rint(low / scale)) - 128


def activations(model, batches, wanted):
    """Computes a model's tensors for all batches together, a node at a time. Yields (name, arrays) of the wanted ones.

    A tensor is forgotten as soon as no node needs it: the tensors of 32 images together would take 2 GB. batches: arrays of the
    model's input. The yielded list has an array for each, and is only valid until the next one.
    """
    import onnx
    from onnx import helper, numpy_helper
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    image = image_input(model).name
    last = {name: i for i, node in enumerate(graph.node) for name in node.input}
    held = {image: list(batches)}
    if image in wanted:
        yield image, held[image]
    for i, node in enumerate(graph.node):
        names = [name for name in dict.fromkeys(node.input) if name in held]
        alone = helper.make_model(helper.make_graph(
            [node], "node", [helper.make_tensor_value_info(name, numpy_helper.from_array(held[name][0]).data_type, None) for name in names],
            [onnx.ValueInfoProto(name=name) for name in node.output], [constants[name] for name in node.input if name in constants]))
        alone.ir_version = model.ir_version
        del alone.opset_import[:]
        alone.opset_import.extend(model.opset_import)
        session = cpu_session(alone, cores())
        made, done = [], [name for name in names if last[name] == i]
        for k in range(len(batches)):
            made.append(session.run(None, {name: held[name][k] for name in names}))
            for name in done:
                held[name][k] = None
        held.update((name, [result[j] for result in made]) for j, name in enumerate(node.output) if name in last)
        del made
        for name in done:
            del held[name]
        for name in node.output:
            if name in wanted:
                yield name, held[name]


# --- models -----------------------------------------------------------------------------------------------------------

def with_quantized_weights(model, layers):
    """Returns a copy of a model in which these layers' weights are rounded to int8, and {layer's name: scale}."""
    from onnx import numpy_helper
    copy, scales = copied(model), {}
    tensors = {tensor.name: tensor for tensor in copy.graph.initializer}
    for layer in layers:
        if layer.weight:
            weight = numpy_helper.to_array(tensors[layer.weight])
            scales[layer.name] = weight_scale(weight, layer.op)
            tensors[layer.weight].CopyFrom(numpy_helper.from_array(rounded(weight, scales[layer.name]), layer.weight))
    return copy, scales


def calibrate(model, layers, batches):
    """Returns {tensor: (scale, offset)} of what these layers of a folded model take. batches: arrays of the model's input."""
    copy, _ = with_quantized_weights(model, layers)
    tensors, scales = {layer.tensor for layer in layers}, {}
    with progress(len(tensors), "tensor") as bar:
        for name, arrays in activations(copy, batches, tensors):
            scales[name] = activation_scale(np.concatenate([array.ravel() for array in arrays]))
            bar.update()
    return scales


def twin(model, layers, ranges):
    """Returns a copy of a folded float32 model that computes these layers in INT8. ranges: what calibrate() returned.

    The weights and biases are rounded and stay float32. Each activation goes through QuantizeLinear and DequantizeLinear.
    Raises ValueError for a bias beyond int32.
    """
    from onnx import helper, numpy_helper
    copy, scales = with_quantized_weights(model, layers)
    graph = copy.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    by_name, nodes, done = {layer.name: layer for layer in layers}, [], set()
    for layer in layers:
        if layer.bias:
            bias, scale = numpy_helper.to_array(tensors[layer.bias]), ranges[layer.tensor][0] * scales[layer.name].ravel()
            if not np.abs(bias / scale).max() < 2 ** 31 - 1:
                raise ValueError("the bias of %s is beyond int32; leave this layer in float (--skip %s)" % (layer.name, layer.name))
            tensors[layer.bias].CopyFrom(numpy_helper.from_array(np.rint(bias / scale) * scale, layer.bias))
    for node in graph.node:
        layer = by_name.get(node.name)
        if layer:
            name = layer.tensor
            stored, limits, result = name + "/int8", [name + "/scale", name + "/offset"], name + "/dequantized"
            if name not in done:  # layers that take the same tensor share its nodes
                done.add(name)
                scale, offset = ranges[name]
                graph.initializer.extend([numpy_helper.from_array(np.array(scale), limits[0]),
                                          numpy_helper.from_array(np.array(offset, np.int8), limits[1])])
                nodes += [helper.make_node("QuantizeLinear", [name] + limits, [stored], stored),
                          helper.make_node("DequantizeLinear", [stored] + limits, [result], result)]
            node.input[0] = result
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    copy.metadata_props.add(key=SIMULATES, value="int8")
    return copy


# --- layers left in float ---------------------------------------------------------------------------------------------

def rms(a, b):
    """Returns the root mean square of the differences of two arrays."""
    return float(np.sqrt(((a.astype(np.float64) - b) ** 2).mean()))


def run(model, batches):
    """Returns what a model computes of all batches, float32 [images, attributes]."""
    session = cpu_session(model, cores())
    return np.concatenate([session.run(None, {session.get_inputs()[0].name: batch})[0] for batch in batches])


def rank(model, layers, ranges, batches):
    """Returns [(rms, layer)], the largest first: how far each layer, alone in INT8, moves the logits of the batches."""
    exact, found = run(model, batches), []
    with progress(len(layers), "layer") as bar:
        for layer in layers:
            found.append((rms(run(twin(model, [layer], ranges), batches), exact), layer))
            bar.update()
    return sorted(found, key=lambda item: -item[0])


def shortest(count, loss, limit):
    """Returns the smallest number for which loss(number) <= limit, by bisection. loss falls, and loss(count) is within the limit."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if loss(middle) <= limit else (middle + 1, high)
    return high


# --- calibration images and AMCT's files ------------------------------------------------------------------------------

def spread(paths, count, batch_size):
    """Returns at least count of the paths, if there are as many, evenly spread, as lists of batch_size. The first ones fill the last
    list."""
    count = min(-(-count // batch_size) * batch_size, len(paths))
    chosen = [paths[i] for i in np.linspace(0, len(paths) - 1, count).round().astype(int)]
    return [[chosen[i % count] for i in range(start, start + batch_size)] for start in range(0, count, batch_size)]


def read(paths, empty):
    """Returns bins as a batch in the form of the empty one. Raises ValueError for NaN or infinite values, which would become the
    ends of a range."""
    batch = empty.copy()
    for row, path in zip(batch, paths):
        read_bin(path, row)
        check_bin(path, row)
    return batch


def note_test_set(folder):
    """Prints a note if the bins in a folder are those that stage 6 runs: deepmar.info beside the folder, or here, lists them."""
    for info in {os.path.join(os.path.dirname(os.path.realpath(folder)), "deepmar.info"), os.path.realpath("deepmar.info")}:
        if os.path.isfile(info):
            with open(info, encoding="utf-8", errors="replace") as f:
                path = f.readline().rpartition(" ")[0].rpartition(" ")[0].partition(" ")[2]
            if os.path.realpath(os.path.join(os.path.dirname(info), os.path.dirname(path))) == os.path.realpath(folder):
                note("%s: deepmar.info lists these bins, so they are the test set; give bins of training or validation images" % folder)


def linked(source, target):
    """Makes target a hard link to a file. Returns whether that is possible: both must be on one file system that has links."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        return False
    return True


def write_amct_files(folder, batches, skipped):
    """Writes folder/quant.cfg and folder/calibration, whose bins hold one batch each. batches: lists of paths. skipped: nodes' names."""
    os.makedirs(folder, exist_ok=True)
    with replaced_folder(os.path.join(folder, "calibration")) as calibration:
        for batch in batches:
            target = os.path.join(calibration, os.path.basename(batch[0]))
            if len(batch) > 1 or not linked(batch[0], target):
                with open(target, "wb") as f:
                    for path in batch:
                        with open(path, "rb") as part:
                            shutil.copyfileobj(part, f)
    fields = ["batch_num: %d" % len(batches), "activation_offset: true", "do_fusion: true"]
    fields += ['skip_layers: "%s"' % name for name in skipped]
    write_text(os.path.join(folder, "quant.cfg"), "\n".join(fields) + "\n")
