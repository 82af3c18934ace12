"""ONNX files: opened and checked, what their output holds, and the description of a model."""
import json
import os
import warnings

from lib.files import fits, read_json
from lib.script import importing, note, one_line

PREFIX = "deepmar."  # the names of our entries in an ONNX file's metadata begin with this
SIMULATES = "simulates"  # an INT8 twin has this entry, "int8"
TEXTS = ("layout", "output", "checkpoint_sha256", "version")  # these entries are plain text, the others JSON

# The operators by which a model's output is known, with their twins in quantized models. Those that pass a value on round,
# move or select it.
PASS_ON = {"Identity", "Cast", "Dropout", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Gather", "Slice",
           "QuantizeLinear", "DequantizeLinear"}
SIGMOIDS = {"Sigmoid", "QLinearSigmoid"}
LINEAR = {"Gemm", "MatMul", "Conv", "BatchNormalization", "QGemm", "QLinearMatMul", "QLinearConv"}
SUMS = {"Add", "QLinearAdd"}


def read_unchecked(path):
    """Returns the onnx.ModelProto in a file, unchecked. Raises OSError, or ValueError if it is not a model."""
    with importing():
        import onnx
        from google.protobuf.message import DecodeError
    if not os.path.isfile(path):
        raise FileNotFoundError("%s: no such file; give the ONNX model" % path)
    model = onnx.ModelProto()
    try:
        with open(path, "rb") as f, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an old protobuf warns about a file that is not a model
            model.ParseFromString(f.read())
        if not model.HasField("graph"):
            raise DecodeError("it has no graph")
    except DecodeError as error:
        raise ValueError("%s: is not a valid ONNX model: %s" % (path, one_line(error)))
    return model


def subgraphs(node):
    """Returns the graphs inside a node's attributes (the branches of an If, the body of a Loop)."""
    graphs = []
    for attribute in node.attribute:
        if attribute.HasField("g"):
            graphs.append(attribute.g)
        graphs += attribute.graphs
    return graphs


def nested(graph):
    """Yields the graph and every graph inside it."""
    yield graph
    for node in graph.node:
        for inner in subgraphs(node):
            yield from nested(inner)


def tensors_of(graph):
    """Returns a graph's tensors: initializers, and those in nodes' attributes; of sparse ones their two parts."""
    tensors, sparse = list(graph.initializer), list(graph.sparse_initializer)
    for node in graph.node:
        for attribute in node.attribute:
            tensors += [attribute.t] + list(attribute.tensors)
            sparse += [attribute.sparse_tensor] + list(attribute.sparse_tensors)
    return tensors + [part for tensor in sparse for part in (tensor.values, tensor.indices)]


def load(path):
    """Reads an ONNX file and checks it with onnx's checker.

    Raises OSError if it cannot be read, ValueError if it is not a valid model or keeps its weights in other files. Such a
    model could make its reader open any file, and a DeepMAR easily fits into one file.
    """
    model = read_unchecked(path)
    check(model, path)
    return model


def check(model, path, what=""):
    """Raises ValueError if an onnx.ModelProto is not valid. path: the file for the message. what: says more about the model."""
    import onnx
    for graph in nested(model.graph):
        if any(tensor.external_data or tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in tensors_of(graph)):
            raise ValueError("%s: keeps its weights in other files; save it as one file" % path)
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, UnicodeDecodeError) as error:  # the second one: a name that is not UTF-8
        raise ValueError("%s: is not a valid ONNX model%s: %s" % (path, what, one_line(error)))


def is_twin(model):
    """Returns whether an onnx.ModelProto imitates arithmetic that ONNX Runtime must not replace by its own (tools/rehearse.py int8)."""
    return any(entry.key == SIMULATES for entry in model.metadata_props)


def check_float32(model, path):
    """Raises ValueError for a quantized onnx.ModelProto. path: the file for the message."""
    if {node.op_type for node in model.graph.node} & {"QLinearConv", "QuantizeLinear"}:
        raise ValueError("%s: is already quantized; give the float32 model" % path)


def copied(model):
    """Returns a copy of an onnx.ModelProto."""
    copy = type(model)()
    copy.CopyFrom(model)
    return copy


def give(model, names):
    """Makes these tensors the outputs of an onnx.ModelProto, in place."""
    from onnx import ValueInfoProto
    del model.graph.output[:]
    model.graph.output.extend(ValueInfoProto(name=name) for name in names)


def image_input(model):
    """Returns the input of the model's graph."""
    weights = {tensor.name for tensor in model.graph.initializer}  # older exporters list these as inputs too
    image, = [value for value in model.graph.input if value.name not in weights]
    return image


def output_kind(model):
    """Returns what an onnx.ModelProto's output holds by its graph: "logits", "probabilities", or None if the graph does not tell.

    The output's way back through operators that pass it on ends at a Sigmoid, at an operator that multiplies by weights, or
    at any other one, such as a Clip or a Softmax. Only the output's values can then tell.
    """
    made_by = {name: node for node in model.graph.node for name in node.output}
    constants = {tensor.name for tensor in model.graph.initializer}
    constants.update(name for name, node in made_by.items() if node.op_type == "Constant")
    pending, seen, kinds = [value.name for value in model.graph.output[:1]], set(), set()
    for name in pending:
        if name in constants or name in seen:
            continue
        seen.add(name)
        node = made_by.get(name)
        kind = node and node.op_type
        if kind in PASS_ON:
            pending += node.input[:1]
        elif kind in SUMS:
            pending += node.input
            kinds.add("logits")  # a probability with anything added is none
        else:
            kinds.add("probabilities" if kind in SIGMOIDS else "logits" if kind in LINEAR else None)
    return kinds.pop() if len(kinds) == 1 else None


def metadata(entries, source):
    """Returns the description in the entries of an ONNX file's metadata, {key: text}. source: the file, for messages."""
    found = {key[len(PREFIX):]: value for key, value in entries.items() if key.startswith(PREFIX)}
    try:
        found = {key: value if key in TEXTS else json.loads(value) for key, value in found.items()}
    except (ValueError, RecursionError) as error:
        raise ValueError("%s: its metadata is damaged: %s" % (source, one_line(error)))
    return checked(found, source)


def checked(found, source):
    """Returns a description. Raises ValueError for entries that cannot be right. source: its file, for the message."""
    names, size = found.get("attributes", []), found.get("size", [1, 1])
    if not fits(names, [str]) or len(set(names)) < len(names) or not all(len(name.splitlines()) == 1 for name in names):
        raise ValueError("%s: its attributes are not a list of different names, each on one line" % source)
    if not fits(size, [int]) or len(size) != 2 or min(size) < 1:
        raise ValueError("%s: its size is not [height, width] in pixels" % source)
    return found


def description(path):
    """Returns a model's description: an ONNX file's metadata, or the .json file of an OM. It is {} if there is none.

    The keys are those that export_onnx.py writes: attributes, mean, std, size, layout, output, last_conv_stride,
    checkpoint_sha256, version. An ONNX file's output is what its graph tells. Raises OSError or ValueError.
    """
    if path.endswith(".om"):
        om, path = path, path[:-len(".om")] + ".json"
        if os.path.isfile(om) and not os.path.exists(path):
            note("%s: there is no description, a .json file of the same name, next to it" % om)
            return {}
    if path.endswith(".json"):
        return checked(read_json(path, {}, "tools/describe.py"), path)
    model = read_unchecked(path)
    found, kind = metadata({entry.key: entry.value for entry in model.metadata_props}, path), output_kind(model)
    if kind:
        found["output"] = kind
    return found
