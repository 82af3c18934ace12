"""Stage 2: every Pad that pads nothing goes, wherever its pads come from; nothing else changes."""
import os

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from helpers import PADS, POOL, ZEROS, between, check_error, constant, model_of, node, outputs_of, script
from remove_pad import remove_pads

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
SHAPE = [1, 2, 4, 4]


def clean(model, removed, kept=0):
    """Removes the Pads and checks what must always hold; returns the new model."""
    before = outputs_of(model)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    gone, _, stay = remove_pads(result)
    assert (len(gone), len(stay)) == (removed, kept), (gone, stay)
    onnx.checker.check_model(result)
    assert [value.name for value in result.graph.output] == [value.name for value in model.graph.output]
    after = outputs_of(result)
    assert all(a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in zip(before, after))
    return result


def types(model):
    return [node.op_type for node in model.graph.node]


def names(model):
    return {tensor.name for tensor in model.graph.initializer}


@pytest.mark.parametrize("opset", [7, 9, 10])
def test_attribute(opset):
    model = clean(model_of(between(node("Pad", "r", "p", pads=[0] * 8)), opset=opset), 1)
    assert types(model) == ["Relu", "AveragePool"]


def test_initializer():
    model = clean(model_of(between(node("Pad", "r pads", "p")), [("pads", ZEROS)]), 1)
    assert types(model) == ["Relu", "AveragePool"] and not names(model)


def test_initializer_that_is_listed_as_an_input():
    listed = [helper.make_tensor_value_info("pads", INT64, [8])]
    model = clean(model_of(between(node("Pad", "r pads", "p")), [("pads", ZEROS)], inputs=listed), 1)
    assert [value.name for value in model.graph.input] == ["x"] and not names(model)


def test_constant_node_with_a_value_and_an_empty_optional_input():
    middle = [constant("c", ZEROS), node("Pad", "r c", "p", mode="constant")]
    assert types(clean(model_of(between(*middle)), 1)) == ["Relu", "AveragePool"]
    middle = [constant("c", ZEROS), constant("v", np.array(3, np.float32)), node("Pad", "r c v", "p")]
    assert types(clean(model_of(between(*middle)), 1)) == ["Relu", "AveragePool"]


def test_constant_node_with_value_ints():
    """Opset 12's short form. ONNX Runtime 1.10 runs no Pad with it, so the result is compared with plain pooling."""
    middle = [helper.make_node("Constant", [], ["c"], value_ints=[0] * 8), node("Pad", "r c", "p")]
    model = model_of(between(*middle), opset=12)
    assert remove_pads(model) == (["Pad_p"], 1, [])
    plain = model_of([node("Relu", "x", "r"), node("AveragePool", "r", "y", **POOL)], opset=12)
    assert types(model) == types(plain) and outputs_of(model)[0].tobytes() == outputs_of(plain)[0].tobytes()


def chain(values):
    """What torch 1.8 to 1.12 made of F.pad's list: zeros appended, reversed by a Slice, transposed, cast."""
    return [constant("given", np.array(values, np.int64)), constant("four", np.array([4])),
            helper.make_node("ConstantOfShape", ["four"], ["zeros"],
                             value=numpy_helper.from_array(np.zeros(1, np.int64))),
            node("Concat", "given zeros", "all", axis=0), constant("two", np.array([-1, 2])),
            node("Reshape", "all two", "pairs"), constant("start", np.array([-1])),
            constant("end", np.array([-9223372036854775807])), constant("axis", np.array([0])),
            node("Slice", "pairs start end axis start", "reversed"), node("Transpose", "reversed", "t", perm=[1, 0]),
            constant("flat", np.array([-1])), node("Reshape", "t flat", "list"), node("Cast", "list", "pads", to=INT64)]


def test_chain_of_constants():
    model = clean(model_of(between(*(chain([0, 0, 0, 0]) + [node("Pad", "r pads", "p")]))), 1)
    assert types(model) == ["Relu", "AveragePool"]
    model = clean(model_of(between(*(chain([1, 1, 1, 1]) + [node("Pad", "r pads", "p")]))), 0, 1)
    assert "Pad" in types(model) and "ConstantOfShape" in types(model)


def test_a_pad_that_pads_stays_and_one_beside_it_goes():
    nodes = [node("Pad", "x real", "a"), node("Pad", "a none", "b"), node("Relu", "b", "y")]
    model = clean(model_of(nodes, [("real", PADS), ("none", ZEROS)]), 1, 1)
    assert types(model) == ["Pad", "Relu"] and names(model) == {"real"}


def test_negative_pads_stay():
    crop = np.array([0, 0, -1, 0, 0, 0, 0, 1])
    assert types(clean(model_of(between(node("Pad", "r c", "p")), [("c", crop)]), 0, 1)) == types(model_of(
        between(node("Pad", "r c", "p")), [("c", crop)]))


def test_pads_known_at_run_time_stay():
    middle = [node("Shape", "r", "s"), node("Sub", "s s", "d"), node("Concat", "d d", "c", axis=0),
              node("Pad", "r c", "p")]
    clean(model_of(between(*middle)), 0, 1)


def test_several_share_one_constant_which_another_node_needs_too():
    nodes = [constant("c", ZEROS), node("Pad", "x c", "a"), node("Pad", "a c", "b"), node("Relu", "b", "r"),
             node("Pad", "r c", "d"), node("Cast", "c", "f", to=FLOAT), node("ReduceSum", "f", "s"),
             node("Add", "d s", "y")]
    model = clean(model_of(nodes), 3)
    assert types(model) == ["Constant", "Relu", "Cast", "ReduceSum", "Add"]
    assert types(clean(model_of(nodes[:5] + [node("Identity", "d", "y")]), 3)) == ["Relu", "Identity"]


def test_two_consumers():
    nodes = [node("Relu", "x", "r"), node("Pad", "r c", "p"), node("Sigmoid", "p", "a"), node("Tanh", "p", "b"),
             node("Add", "a b", "y")]
    assert types(clean(model_of(nodes, [("c", ZEROS)]), 1)) == ["Relu", "Sigmoid", "Tanh", "Add"]


def test_the_graphs_output():
    zeros = [("c", ZEROS)]
    assert types(clean(model_of([node("Relu", "x", "r"), node("Pad", "r c", "y")], zeros), 1)) == ["Relu"]
    # between the graph's input and its output, and where its input is an output too: the name stays, so must a node
    assert types(clean(model_of([node("Pad", "x c", "y")], zeros), 1)) == ["Identity"]
    nodes = [node("Relu", "x", "r"), node("Pad", "r c", "y")]
    assert types(clean(model_of(nodes, zeros, outputs=("r", "y")), 1)) == ["Relu", "Identity"]
    nodes = [node("Relu", "x", "r"), node("Pad", "r c", "y"), node("Pad", "r c", "z"), node("Tanh", "r", "t")]
    assert types(clean(model_of(nodes, zeros, outputs=("y", "z", "t")), 2)) == ["Relu", "Identity", "Tanh"]


def test_stale_shape_information_goes():
    info = [helper.make_tensor_value_info(name, FLOAT, SHAPE) for name in ("r", "p")]
    model = clean(model_of(between(node("Pad", "r c", "p")), [("c", ZEROS)], value_info=info), 1)
    assert [value.name for value in model.graph.value_info] == ["r"]


def test_in_the_branches_of_an_if():
    def branch(name, *nodes):
        return helper.make_graph(list(nodes), name, [], [helper.make_tensor_value_info("o", FLOAT, list("nchw"))])
    then = branch("then", node("Pad", "q outer", "i"), node("Relu", "i", "o"))
    other = branch("else", constant("own", ZEROS), node("Tanh", "q", "i"), node("Pad", "i own", "o"))
    nodes = [node("Pad", "x outer", "q"), constant("condition", np.array(True)),
             helper.make_node("If", ["condition"], ["y"], then_branch=then, else_branch=other)]
    model = clean(model_of(nodes, [("outer", ZEROS)]), 3)
    assert types(model) == ["Constant", "If"] and not names(model)


@st.composite
def graphs(draw):
    """A random graph: Pads (padding or not, from every source), Identity, Relu, Add; several outputs."""
    nodes, initializers, tensors = [], [("c0", ZEROS), ("c1", PADS)], {"x": 0}  # tensor -> how much it has grown
    for i in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from(["Pad", "Pad", "Pad", "Identity", "Relu", "Add", "Constant"]))
        source = draw(st.sampled_from(sorted(tensors)))
        name = "t%d" % i
        if kind == "Pad":
            grows = draw(st.booleans()) and tensors[source] < 2
            origin = draw(st.sampled_from(["shared", "own", "node", "identity", "sum"]))
            pads = "c%d" % grows
            if origin == "own":
                pads = "own%d" % i
                initializers.append((pads, PADS if grows else ZEROS))
            elif origin == "node":
                pads = "n%d" % i
                nodes.append(constant(pads, PADS if grows else ZEROS))
            elif origin == "identity":
                nodes.append(node("Identity", pads, "i%d" % i))
                pads = "i%d" % i
            elif origin == "sum":
                nodes.append(node("Mul", pads + " c1", "m%d" % i))
                pads = "m%d" % i
            nodes.append(node("Pad", "%s %s" % (source, pads), name))
            tensors[name] = tensors[source] + grows
        elif kind == "Add":
            same = [tensor for tensor in sorted(tensors) if tensors[tensor] == tensors[source]]
            nodes.append(node("Add", "%s %s" % (source, draw(st.sampled_from(same))), name))
            tensors[name] = tensors[source]
        elif kind == "Constant":
            nodes.append(constant(name, np.ones(SHAPE, np.float32)))
            tensors[name] = 0
        else:
            nodes.append(node(kind, source, name))
            tensors[name] = tensors[source]
    made = sorted(set(tensors) - {"x"})
    outputs = draw(st.lists(st.sampled_from(made), min_size=1, max_size=4, unique=True))
    zero = {name for name, array in initializers if not array.any()}
    for item in nodes:  # which tensors are zeros
        if item.op_type == "Constant" and not numpy_helper.to_array(item.attribute[0].t).any() \
                or item.op_type in ("Identity", "Mul") and item.input[0] in zero:
            zero.add(item.output[0])
    pads = [item for item in nodes if item.op_type == "Pad"]
    return model_of(nodes, initializers, outputs), sum(item.input[1] in zero for item in pads), len(pads)


@settings(max_examples=150, deadline=None, database=None)
@given(graphs())
def test_random_graphs(case):
    model, removable, pads = case
    result = clean(model, removable, pads - removable)
    assert types(result).count("Pad") == pads - removable


@settings(max_examples=60, deadline=None, database=None)
@given(graphs(), st.booleans())
def test_random_graphs_in_the_branches_of_an_if(case, constants_outside):
    """Pads in a branch, of constants in the branch or around it."""
    model, removable, pads = case
    branch = model.graph
    outside = []
    if constants_outside:
        outside = [(tensor.name, numpy_helper.to_array(tensor)) for tensor in branch.initializer]
        del branch.initializer[:]
    del branch.input[:]  # x is the outer graph's
    other = onnx.GraphProto()
    other.name = "other"
    other.node.extend(helper.make_node("Identity", ["x"], ["else_%s" % value.name]) for value in branch.output)
    for value in branch.output:
        other.output.add().CopyFrom(value)
        other.output[-1].name = "else_" + value.name
    outputs = ["if_" + value.name for value in branch.output]
    nodes = [helper.make_node("If", ["condition"], outputs, then_branch=branch, else_branch=other)]
    whole = model_of(nodes, [("condition", np.array(True))] + outside, outputs)
    result = clean(whole, removable, pads - removable)
    branches = {attribute.name: attribute.g for attribute in result.graph.node[0].attribute}
    assert [item.op_type for item in branches["then_branch"].node].count("Pad") == pads - removable


def test_script(tmp_path):
    onnx.save(model_of(between(node("Pad", "r c", "p")), [("c", ZEROS)]), str(tmp_path / "a.onnx"))
    onnx.save(model_of(between(node("Pad", "r c", "p")), [("c", PADS)]), str(tmp_path / "pads.onnx"))
    onnx.save(model_of([node("Relu", "x", "y")]), str(tmp_path / "none.onnx"))
    process = script("remove_pad.py", "a.onnx", "b.onnx", cwd=tmp_path)
    assert process.returncode == 0 and process.stderr == "" and "removed Pad_p" in process.stdout
    assert "Pad" not in types(onnx.load(str(tmp_path / "b.onnx")))
    process = script("remove_pad.py", "--model_name=pads.onnx", "--output_name=c.onnx", cwd=tmp_path)
    assert process.returncode == 0 and "kept Pad_p: it pads by [0, 0, 1, 1, 0, 0, 1, 1]" in process.stdout
    assert "unchanged" in process.stdout
    process = script("remove_pad.py", "none.onnx", "d.pnnx", cwd=tmp_path)
    assert process.returncode == 0 and "no Pad to remove" in process.stdout and "d.pnnx" in process.stderr
    for a, b in (("pads.onnx", "c.onnx"), ("none.onnx", "d.pnnx")):
        assert (tmp_path / a).read_bytes() == (tmp_path / b).read_bytes()
    assert script("remove_pad.py", "a.onnx", "a.onnx", cwd=tmp_path).returncode == 0
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert not [name for name in os.listdir(str(tmp_path)) if "partial" in name]


def test_errors(tmp_path):
    good = model_of(between(node("Pad", "r c", "p")), [("c", ZEROS)])
    data = good.SerializeToString()
    outside = onnx.ModelProto()
    outside.CopyFrom(good)
    tensor = outside.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    broken = model_of([node("Relu", "x", "y")])
    broken.graph.node[0].op_type = "Nonsense"
    bad = {"empty": b"", "text": b"<html>", "cut": data[:-30], "outside": outside.SerializeToString(),
           "broken": broken.SerializeToString()}
    (tmp_path / "out.onnx").write_text("earlier")
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        check_error(script("remove_pad.py", name, "out.onnx", cwd=tmp_path), name)
    check_error(script("remove_pad.py", "nowhere", "out.onnx", cwd=tmp_path), "nowhere")
    check_error(script("remove_pad.py", ".", "out.onnx", cwd=tmp_path), ".")
    for wrong in ([], ["a"], ["a", "b", "c"], ["a", "--output_name=b"], ["--model_name=a"]):
        check_error(script("remove_pad.py", *wrong, cwd=tmp_path), code=2)
    assert (tmp_path / "out.onnx").read_text() == "earlier"
