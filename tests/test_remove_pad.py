"""Stage 2: it removes every Pad that pads nothing, wherever its pads come from, and changes nothing else."""
import os

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from helpers import (FLOAT, PADS, POOL, SHAPE, ZEROS, between, check_error, constant, keep_weights_outside, model_of, node, outputs_of,
                     script, tensor_info)
from remove_pad import remove_pads


def clean(model, removed, kept=0):
    """Removes the Pads, checks what must always hold, and returns the new model."""
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


@pytest.mark.parametrize("middle, initializers, more", [
    ([node("Pad", "r", "p", pads=[0] * 8)], [], {"opset": 7}),
    ([node("Pad", "r", "p", pads=[0] * 8)], [], {"opset": 10}),
    ([node("Pad", "r c", "p")], [("c", ZEROS)], {}),
    ([node("Pad", "r c", "p")], [("c", ZEROS)], {"inputs": [tensor_info("c", [8], TensorProto.INT64)]}),  # as older exporters write it
    ([constant("c", ZEROS), node("Pad", "r c", "p", mode="constant")], [], {}),
    ([constant("c", ZEROS), constant("v", np.array(3, np.float32)), node("Pad", "r c v", "p")], [], {}),
    ([node("Pad", "r c", "p")], [("c", ZEROS)],
     {"value_info": [tensor_info(name, SHAPE) for name in ("r", "p")]})],
    ids=["attribute, opset 7", "attribute, opset 10", "initializer", "initializer listed as an input", "Constant",
         "Constant with a value to pad with", "shapes"])
def test_a_pad_that_pads_nothing_is_removed(middle, initializers, more):
    model = clean(model_of(between(*middle), initializers, **more), 1)
    assert types(model) == ["Relu", "AveragePool"] and not names(model)
    assert [value.name for value in model.graph.input] == ["x"] and "p" not in [value.name for value in model.graph.value_info]


def test_a_pad_with_value_ints_is_removed():
    """Opset 12's short form of a Constant. ONNX Runtime 1.10 runs no Pad with it, so the result is compared with plain pooling."""
    model = model_of(between(helper.make_node("Constant", [], ["c"], value_ints=[0] * 8), node("Pad", "r c", "p")), opset=12)
    assert remove_pads(model) == (["Pad_p"], 1, [])
    plain = model_of([node("Relu", "x", "r"), node("AveragePool", "r", "y", **POOL)], opset=12)
    assert types(model) == types(plain) and outputs_of(model)[0].tobytes() == outputs_of(plain)[0].tobytes()


def chain(values):
    """Returns what torch 1.8 to 1.12 made of F.pad's list: zeros appended, reversed by a Slice, transposed, cast."""
    return [constant("given", np.array(values, np.int64)), constant("four", np.array([4])),
            helper.make_node("ConstantOfShape", ["four"], ["zeros"],
                             value=numpy_helper.from_array(np.zeros(1, np.int64))),
            node("Concat", "given zeros", "all", axis=0), constant("two", np.array([-1, 2])),
            node("Reshape", "all two", "pairs"), constant("start", np.array([-1])),
            constant("end", np.array([-9223372036854775807])), constant("axis", np.array([0])),
            node("Slice", "pairs start end axis start", "reversed"), node("Transpose", "reversed", "t", perm=[1, 0]),
            constant("flat", np.array([-1])), node("Reshape", "t flat", "list"), node("Cast", "list", "pads", to=TensorProto.INT64)]


def test_pads_computed_from_constants_are_known():
    model = clean(model_of(between(*chain([0, 0, 0, 0]), node("Pad", "r pads", "p"))), 1)
    assert types(model) == ["Relu", "AveragePool"]
    model = clean(model_of(between(*chain([1, 1, 1, 1]), node("Pad", "r pads", "p"))), 0, 1)
    assert "Pad" in types(model) and "ConstantOfShape" in types(model)


def test_pads_that_pad_crop_or_are_known_at_run_time_stay():
    nodes = [node("Pad", "x real", "a"), node("Pad", "a none", "b"), node("Relu", "b", "y")]
    model = clean(model_of(nodes, [("real", PADS), ("none", ZEROS)]), 1, 1)
    assert types(model) == ["Pad", "Relu"] and names(model) == {"real"}
    clean(model_of(between(node("Pad", "r c", "p")), [("c", np.array([0, 0, -1, 0, 0, 0, 0, 1]))]), 0, 1)
    clean(model_of(between(node("Shape", "r", "s"), node("Sub", "s s", "d"), node("Concat", "d d", "c", axis=0),
                           node("Pad", "r c", "p"))), 0, 1)


def test_a_constant_that_another_node_needs_stays():
    nodes = [constant("c", ZEROS), node("Pad", "x c", "a"), node("Pad", "a c", "b"), node("Relu", "b", "r"),
             node("Pad", "r c", "d"), node("Cast", "c", "f", to=FLOAT), node("ReduceSum", "f", "s"),
             node("Add", "d s", "y")]
    model = clean(model_of(nodes), 3)
    assert types(model) == ["Constant", "Relu", "Cast", "ReduceSum", "Add"]
    assert types(clean(model_of(nodes[:5] + [node("Identity", "d", "y")]), 3)) == ["Relu", "Identity"]


def test_the_graphs_outputs_keep_their_names():
    zeros = [("c", ZEROS)]
    assert types(clean(model_of([node("Relu", "x", "r"), node("Pad", "r c", "y")], zeros), 1)) == ["Relu"]
    # Between the graph's input and an output, or between two outputs, both names must stay, and so a node must.
    assert types(clean(model_of([node("Pad", "x c", "y")], zeros), 1)) == ["Identity"]
    nodes = [node("Relu", "x", "r"), node("Pad", "r c", "y")]
    assert types(clean(model_of(nodes, zeros, outputs=("r", "y")), 1)) == ["Relu", "Identity"]
    nodes = [node("Relu", "x", "r"), node("Pad", "r c", "y"), node("Pad", "r c", "z"), node("Tanh", "r", "t")]
    assert types(clean(model_of(nodes, zeros, outputs=("y", "z", "t")), 2)) == ["Relu", "Identity", "Tanh"]


def test_pads_in_the_branches_of_an_if_are_removed():
    def branch(name, *nodes):
        return helper.make_graph(list(nodes), name, [], [tensor_info("o", list("nchw"))])
    then = branch("then", node("Pad", "q outer", "i"), node("Relu", "i", "o"))
    other = branch("else", constant("own", ZEROS), node("Tanh", "q", "i"), node("Pad", "i own", "o"))
    nodes = [node("Pad", "x outer", "q"), constant("condition", np.array(True)),
             helper.make_node("If", ["condition"], ["y"], then_branch=then, else_branch=other)]
    model = clean(model_of(nodes, [("outer", ZEROS)]), 3)
    assert types(model) == ["Constant", "If"] and not names(model)


@st.composite
def graphs(draw):
    """Returns (a random graph of Pads, Identity, Relu and Add; how many Pads pad nothing; how many Pads it has)."""
    nodes, initializers, tensors = [], [("c0", ZEROS), ("c1", PADS)], {"x": 0}  # {tensor: how many Pads have enlarged it}
    removable = pad_count = 0
    for i in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from(["Pad", "Pad", "Pad", "Identity", "Relu", "Add", "Constant"]))
        source = draw(st.sampled_from(sorted(tensors)))
        name = "t%d" % i
        if kind == "Pad":
            grows = draw(st.booleans()) and tensors[source] < 2
            shared, pads = "c%d" % grows, "pads%d" % i
            origin = draw(st.sampled_from(["shared", "initializer", "Constant", "Identity", "Mul"]))
            if origin == "shared":
                pads = shared
            elif origin == "initializer":
                initializers.append((pads, PADS if grows else ZEROS))
            elif origin == "Constant":
                nodes.append(constant(pads, PADS if grows else ZEROS))
            else:
                nodes.append(node(origin, {"Identity": shared, "Mul": shared + " c1"}[origin], pads))
            nodes.append(node("Pad", "%s %s" % (source, pads), name))
            tensors[name] = tensors[source] + grows
            removable += not grows
            pad_count += 1
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
    return model_of(nodes, initializers, outputs), removable, pad_count


@settings(max_examples=150, deadline=None, database=None)
@given(graphs())
def test_pads_of_random_graphs_are_removed(case):
    model, removable, pads = case
    assert types(clean(model, removable, pads - removable)).count("Pad") == pads - removable


@settings(max_examples=60, deadline=None, database=None)
@given(graphs(), st.booleans())
def test_pads_of_random_graphs_in_an_if_are_removed(case, constants_outside):
    model, removable, pads = case
    branch = model.graph
    outside = []
    if constants_outside:
        outside = [(tensor.name, numpy_helper.to_array(tensor)) for tensor in branch.initializer]
        del branch.initializer[:]
    del branch.input[:]  # x is the outer graph's
    other = helper.make_graph([node("Identity", "x", "else_" + value.name) for value in branch.output], "other", [],
                              [tensor_info("else_" + value.name, list("nchw")) for value in branch.output])
    outputs = ["if_" + value.name for value in branch.output]
    nodes = [helper.make_node("If", ["condition"], outputs, then_branch=branch, else_branch=other)]
    whole = model_of(nodes, [("condition", np.array(True))] + outside, outputs)
    result = clean(whole, removable, pads - removable)
    branches = {attribute.name: attribute.g for attribute in result.graph.node[0].attribute}
    assert [item.op_type for item in branches["then_branch"].node].count("Pad") == pads - removable


def test_the_script_writes_the_model_and_names_the_pads(tmp_path):
    models = {"a": model_of(between(node("Pad", "r c", "p")), [("c", ZEROS)]),
              "pads": model_of(between(node("Pad", "r c", "p")), [("c", PADS)]), "none": model_of([node("Relu", "x", "y")])}
    for name, model in models.items():
        onnx.save(model, str(tmp_path / (name + ".onnx")))
    for arguments, text in ((["a.onnx", "b.onnx"], "removed Pad_p"),
                            (["--model_name=pads.onnx", "--output_name=c.onnx"], "kept Pad_p: it pads by [0, 0, 1, 1, 0, 0, 1, 1]\n"),
                            (["none.onnx", "d.pnnx"], "no Pad to remove; the model is unchanged"), (["a.onnx", "a.onnx"], "removed Pad_p")):
        process = script("remove_pad.py", *arguments, cwd=tmp_path)
        assert process.returncode == 0 and text in process.stdout, (process.stdout, process.stderr)
        assert ("note: d.pnnx does not end in .onnx" in process.stderr) == ("d.pnnx" in arguments)
    assert "Pad" not in types(onnx.load(str(tmp_path / "b.onnx")))
    for before, after in (("pads.onnx", "c.onnx"), ("none.onnx", "d.pnnx"), ("a.onnx", "b.onnx")):
        assert (tmp_path / before).read_bytes() == (tmp_path / after).read_bytes()
    assert not [name for name in os.listdir(str(tmp_path)) if "partial" in name]


def test_bad_models_and_arguments_are_errors(tmp_path):
    model = model_of(between(node("Pad", "r c", "p")), [("c", ZEROS)])
    data = model.SerializeToString()
    keep_weights_outside(model)
    broken = model_of([node("Relu", "x", "y")])
    broken.graph.node[0].op_type = "Nonsense"
    bad = {"empty": b"", "text": b"<html>", "cut": data[:-30], "outside": model.SerializeToString(), "broken": broken.SerializeToString()}
    (tmp_path / "out.onnx").write_text("earlier")
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    for name in list(bad) + ["nowhere", "."]:
        check_error(script("remove_pad.py", name, "out.onnx", cwd=tmp_path), "error: " + name + ": ")
    for wrong in ([], ["a"], ["a", "b", "c"], ["a", "--output_name=b"], ["--model_name=a"]):
        check_error(script("remove_pad.py", *wrong, cwd=tmp_path), code=2)
    assert (tmp_path / "out.onnx").read_text() == "earlier"
