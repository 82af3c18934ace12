"""Stage 2: removes the Pad nodes that pad nothing from an ONNX model.

    python3 remove_pad.py deepmar_bs1.onnx deepmar_bs1_nopad.onnx
    python3 remove_pad.py --model_name=deepmar_bs1.onnx --output_name=deepmar_bs1_nopad.onnx

F.avg_pool2d counts its padding (count_include_pad=True). Exporters up to about torch 1.12 therefore put a Pad before the
AveragePool, even if all pads are 0. The card then spends time on copying the feature map. The script finds nodes by their
type and follows tensor names, never positions. The model's outputs stay the same to the bit.
"""
import argparse
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
from lib.files import whole_file
from lib.models import check, load, nested, subgraphs
from lib.script import command, in_order_or_by_name, note, one_line
from lib.session import cpu_session

RANDOM_OPERATORS = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}


def chain_of(name, scopes):
    """Returns (the nodes that compute a tensor, in order; the initializers that they need), or None if it is not constant.

    scopes: the graphs whose tensors are visible, the innermost last.
    """
    initializers = {tensor.name: tensor for graph in scopes for tensor in graph.initializer}
    nodes = [node for graph in scopes for node in graph.node]
    producer = {output: i for i, node in enumerate(nodes) for output in node.output}
    chain, tensors, todo = set(), {}, [name]
    while todo:
        needed = todo.pop()
        if needed in initializers:
            tensors[needed] = initializers[needed]
        elif needed not in producer:
            return None  # it is an input of the graph
        elif producer[needed] not in chain:
            node = nodes[producer[needed]]
            if node.op_type in RANDOM_OPERATORS or subgraphs(node):
                return None
            chain.add(producer[needed])
            todo += [input_ for input_ in node.input if input_]
    return [nodes[i] for i in sorted(chain)], list(tensors.values())


def value_of(name, chain, tensors, model):
    """Returns the value of a tensor, an ndarray. chain, tensors: from chain_of(). Raises the errors of onnx and ONNX Runtime."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper
    if not chain:
        return numpy_helper.to_array(tensors[0])
    if len(chain) == 1 and chain[0].op_type == "Constant":
        attribute = chain[0].attribute[0]
        if attribute.name == "value":
            return numpy_helper.to_array(attribute.t)
        if attribute.name == "value_ints":  # ONNX Runtime 1.10 cannot read it
            return np.array(attribute.ints)
    # ONNX Runtime computes longer chains, because it knows every operator.
    output = helper.make_tensor_value_info(name, TensorProto.INT64, None)
    part = helper.make_model(helper.make_graph(chain, "constant", [], [output], tensors), opset_imports=model.opset_import)
    part.ir_version = model.ir_version
    return cpu_session(part.SerializeToString()).run([name], {})[0]


def pads_of(node, scopes, model):
    """Returns a Pad's pads as a list of int, or None if they are known only at run time. Raises ValueError if a constant cannot
    be computed. scopes: the graphs around the Pad, the innermost last."""
    for attribute in node.attribute:
        if attribute.name in ("pads", "paddings"):  # the name in opset 2 to 10, and in opset 1
            return list(attribute.ints)
    name = node.input[1]
    found = chain_of(name, scopes)
    if found is None:
        return None
    try:
        return value_of(name, *found, model).ravel().tolist()
    except ImportError:
        raise
    except Exception as error:  # ONNX Runtime's exceptions have no common class
        raise ValueError("the constant %s cannot be computed: %s" % (name, one_line(error)))


def rename(graph, old, new):
    """Renames a tensor in the graph and in the graphs inside it."""
    for inner in nested(graph):
        for node in inner.node:
            for names in (node.input, node.output):
                for i, name in enumerate(names):
                    if name == old:
                        names[i] = new


def bypass(graph, pad):
    """Removes a Pad from its graph. Whatever read the Pad's output then reads its input."""
    import onnx
    source, output = pad.input[0], pad.output[0]
    outputs = {value.name for value in graph.output}
    position = list(graph.node).index(pad)
    del graph.node[position]
    if output not in outputs:
        rename(graph, output, source)
        gone = output
    elif source not in outputs and any(source in node.output for node in graph.node):
        rename(graph, source, output)  # the graph's output keeps its name
        gone = source
    else:  # source is an input or another output of the graph, so both names must stay
        graph.node.insert(position, onnx.helper.make_node("Identity", [source], [output], name=pad.name))
        return
    for value in [value for value in graph.value_info if value.name == gone]:
        graph.value_info.remove(value)


def drop_unused(graph, names):
    """Removes the named tensors that nothing uses, and everything that was needed only to compute them.

    Returns how many nodes and initializers it removed. Adds their inputs, which an outer graph may hold, to the set names.
    """
    dropped = 0
    while True:
        used = {name for inner in nested(graph) for node in inner.node for name in node.input}
        used |= {value.name for inner in nested(graph) for value in inner.output}
        names -= used
        initializers = [tensor for tensor in graph.initializer if tensor.name in names]
        nodes = [node for node in graph.node if set(node.output) & names and not set(node.output) & used]
        if not initializers and not nodes:
            return dropped
        for tensor in initializers:
            graph.initializer.remove(tensor)
        for node in nodes:
            names.update(name for name in node.input if name)
            graph.node.remove(node)
        gone = {tensor.name for tensor in initializers} | {name for node in nodes for name in node.output}
        for values in (graph.input, graph.value_info):  # older exporters also list initializers as inputs
            for value in [value for value in values if value.name in gone]:
                values.remove(value)
        dropped += len(initializers) + len(nodes)


def remove_pads(model):
    """Removes every Pad whose pads are constant and all 0 from an onnx.ModelProto, in place.

    Returns (names of the Pads removed, how many constants went with them, [(name, why)] of the Pads kept).
    """
    removed, constants, kept = [], 0, []

    def clean(scopes):
        nonlocal constants
        graph = scopes[-1]
        for node in list(graph.node):
            for inner in subgraphs(node):
                clean(scopes + [inner])
        for pad in [node for node in graph.node if node.op_type == "Pad" and node.domain in ("", "ai.onnx")]:
            pads = pads_of(pad, scopes, model)
            if pads is None:
                kept.append((pad.name, "its pads are known only at run time"))
            elif any(pads):
                kept.append((pad.name, "it pads by %s" % pads))
            else:
                inputs = set(pad.input[1:]) - {""}  # "" stands for an absent optional input
                bypass(graph, pad)
                removed.append(pad.name)
                constants += sum(drop_unused(scope, inputs) for scope in reversed(scopes))

    clean([model.graph])
    return removed, constants, kept


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        usage="remove_pad.py MODEL OUTPUT\n"
              "       remove_pad.py --model_name MODEL --output_name OUTPUT")
    parser.add_argument("positional", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--model_name", metavar="MODEL", help="the ONNX model")
    parser.add_argument("--output_name", metavar="OUTPUT", help="the ONNX file to write")
    path, output = in_order_or_by_name(parser, parser.parse_args(argv), ["model_name", "output_name"], "give MODEL and OUTPUT")

    model = load(path)
    before = len(model.graph.node)
    removed, constants, kept = remove_pads(model)
    if removed:
        check(model, path, " without its Pads")
        data = model.SerializeToString()
    else:
        with open(path, "rb") as f:
            data = f.read()
    with whole_file(output) as temporary, open(temporary, "wb") as f:
        f.write(data)
    for name, reason in kept:
        print("kept %s: %s" % (name or "a Pad without a name", reason))
    if removed:
        print("%s: removed %s (pads nothing) and the constants that only it used (%d); %d of %d nodes are left"
              % (output, ", ".join(name or "a Pad without a name" for name in removed), constants,
                 len(model.graph.node), before))
    else:
        print("%s: no Pad to remove; the model is unchanged" % output)
    if not output.endswith(".onnx"):
        note("%s does not end in .onnx, as the name in the guide's atc command does" % output)


if __name__ == "__main__":
    command(main)
