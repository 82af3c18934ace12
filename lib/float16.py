"""A model's float16 twin: the weights, the input and each node's result are rounded to float16.

Products are summed in float32, as in the card's cube unit. The twin is a bound on rounding, not a simulation of the chip: the card's
order of accumulation and its kernels are unknown.
"""
from lib.models import copied, image_input
from lib.script import importing, note, one_line

with importing():
    import numpy as np

FLOAT16_MAX = 65504

# The results of these operators are not rounded: they only select or move values, which are already rounded.
SELECTING_OPERATORS = {"Relu", "MaxPool", "Flatten", "Reshape", "Transpose", "Identity", "Gather", "Squeeze", "Unsqueeze"}


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
    model = copied(model)
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
