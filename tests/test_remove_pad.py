"""remove_pad.py: takes out every Pad that pads nothing, wherever its pads come from, and changes no output by a bit."""
import os
import re

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings, strategies
from onnx import TensorProto, helper, numpy_helper

import remove_pad
from conftest import check_error, script

SHAPE = [1, 2, 3, 4]
NOTHING = [0] * 8
SOMETHING = [0, 0, 1, 0, 0, 0, 0, 2]


def floats(name, shape=None):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def ints(name, values):
    return numpy_helper.from_array(np.array(values, np.int64), name)


def make(nodes, outputs=("y",), initializers=(), inputs=(), opset=11, ir_version=7, value_info=()):
    """A model with the input x, float32 of SHAPE, the named float32 outputs, and opset 11 as the pipeline has."""
    graph = helper.make_graph(nodes, "graph", [floats("x", SHAPE)] + list(inputs), [floats(name) for name in outputs],
                              list(initializers), value_info=list(value_info))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = ir_version
    return model


def node(op, inputs, output, **attributes):
    return helper.make_node(op, inputs, [output], name=op + "_" + output, **attributes)


def constant(name, values):
    return helper.make_node("Constant", [], [name], value=ints(name, values))


def graphs(model):
    return list(remove_pad.nested(model.graph))


def ops(model):
    return [n.op_type for graph in graphs(model) for n in graph.node]


def run(model, **feeds):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = np.random.RandomState(0).standard_normal(SHAPE).astype(np.float32)
    x[0, 0, 0, :2] = [-0.0, np.inf]
    return session.run(None, dict(feeds, x=x))


def same(before, after, **feeds):
    """Both models have the same interface, and give the same outputs to the bit."""
    assert [v.name for v in before.graph.output] == [v.name for v in after.graph.output]
    for ours, theirs in zip(run(after, **feeds), run(before, **feeds)):
        assert (ours.shape, ours.dtype, ours.tobytes()) == (theirs.shape, theirs.dtype, theirs.tobytes())


def removed(tmp_path, model, feeds=None, execute=True):
    """Runs the stage on the model, checks the result, and returns it."""
    source, output = str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx")
    before = model.SerializeToString()
    with open(source, "wb") as f:
        f.write(before)
    onnx.checker.check_model(model)
    remove_pad.main([source, output])
    with open(source, "rb") as f:
        assert f.read() == before, "the input was changed"
    assert sorted(os.listdir(str(tmp_path))) == ["in.onnx", "out.onnx"]
    result = onnx.load(output)
    onnx.checker.check_model(result)
    if execute:
        onnx.checker.check_model(onnx.shape_inference.infer_shapes(result))
        same(model, result, **(feeds or {}))
    return result


def around(pad, *before):
    """x -> Relu -> Pad -> Relu -> y, as the pooling in the middle of a network."""
    return [node("Relu", ["x"], "a")] + list(before) + [pad, node("Relu", ["b"], "y")]


PAD = node("Pad", ["a", "pads"], "b")


# --- where the pads come from --------------------------------------------------------------------------------------

def test_pads_in_an_attribute(tmp_path):
    result = removed(tmp_path, make(around(node("Pad", ["a"], "b", pads=NOTHING)), opset=10))
    assert ops(result) == ["Relu", "Relu"]


def test_paddings_of_opset_1(tmp_path):
    pad = node("Pad", ["a"], "b", paddings=NOTHING)
    result = removed(tmp_path, make(around(pad), opset=1), execute=False)  # older than ONNX Runtime
    assert ops(result) == ["Relu", "Relu"]
    assert list(result.graph.node[1].input) == ["a"]


def test_pads_in_an_initializer(tmp_path):
    result = removed(tmp_path, make(around(PAD), initializers=[ints("pads", NOTHING)]))
    assert ops(result) == ["Relu", "Relu"] and not result.graph.initializer


@pytest.mark.parametrize("ir_version", [3, 7])
def test_pads_in_an_initializer_that_is_also_an_input(tmp_path, ir_version):
    pads = helper.make_tensor_value_info("pads", TensorProto.INT64, [8])
    result = removed(tmp_path, make(around(PAD), initializers=[ints("pads", NOTHING)], inputs=[pads],
                                    ir_version=ir_version))
    assert ops(result) == ["Relu", "Relu"] and not result.graph.initializer
    assert [value.name for value in result.graph.input] == ["x"]


def test_pads_in_a_constant_node(tmp_path):
    assert ops(removed(tmp_path, make(around(PAD, constant("pads", NOTHING))))) == ["Relu", "Relu"]


def test_pads_in_a_constant_node_of_integers(tmp_path):
    pads = helper.make_node("Constant", [], ["pads"], value_ints=NOTHING)
    assert ops(removed(tmp_path, make(around(PAD, pads), opset=12))) == ["Relu", "Relu"]


def chain(values):
    """The pads of torch 1.8 to 1.12: F.pad's order, last dimension first, turned into ONNX's by nodes."""
    return [constant("few", values),
            constant("count", [8 - len(values)]),
            helper.make_node("ConstantOfShape", ["count"], ["zeros"], value=ints("", [0])),
            node("Concat", ["few", "zeros"], "all", axis=0),
            constant("pairs", [-1, 2]), node("Reshape", ["all", "pairs"], "two columns"),
            constant("start", [-1]), constant("end", [np.iinfo(np.int64).min + 1]), constant("axis", [0]),
            constant("step", [-1]),
            node("Slice", ["two columns", "start", "end", "axis", "step"], "reversed"),
            node("Transpose", ["reversed"], "two rows", perm=[1, 0]),
            constant("flat", [-1]), node("Reshape", ["two rows", "flat"], "row"),
            node("Cast", ["row"], "pads", to=TensorProto.INT64)]


@pytest.mark.parametrize("ir_version", [3, 7])
def test_pads_at_the_end_of_a_chain(tmp_path, ir_version):
    result = removed(tmp_path, make(around(PAD, *chain([0, 0, 0, 0])), ir_version=ir_version))
    assert ops(result) == ["Relu", "Relu"]


def test_a_chain_that_begins_in_an_initializer(tmp_path):
    for ir_version in (3, 7):
        pads = numpy_helper.from_array(np.array(NOTHING, np.int32), "small")
        inputs = [helper.make_tensor_value_info("small", TensorProto.INT32, [8])] if ir_version == 3 else []
        result = removed(tmp_path, make(around(PAD, node("Cast", ["small"], "pads", to=TensorProto.INT64)),
                                        initializers=[pads], inputs=inputs, ir_version=ir_version))
        assert ops(result) == ["Relu", "Relu"] and not result.graph.initializer and len(result.graph.input) == 1


def test_a_chain_that_pads_something_stays_whole(tmp_path, capsys):
    model = make(around(PAD, *chain([0, 2, 1, 0])))
    assert removed(tmp_path, model).SerializeToString() == model.SerializeToString()
    assert "kept Pad_b: it pads by [0, 0, 1, 0, 0, 0, 0, 2]\n" in capsys.readouterr().out


# --- where the Pad stands ------------------------------------------------------------------------------------------

def test_several_and_chained_pads(tmp_path, capsys):
    model = make([node("Pad", ["x", "pads"], "a"), node("Pad", ["a", "pads"], "b"), node("Relu", ["b"], "c"),
                  node("Pad", ["c", "pads"], "d"), node("Pad", ["d", "pads"], "e"), node("Neg", ["e"], "y")],
                 initializers=[ints("pads", NOTHING)])
    result = removed(tmp_path, model)
    assert ops(result) == ["Relu", "Neg"] and not result.graph.initializer
    assert "removed Pad_a, Pad_b, Pad_d, Pad_e (" in capsys.readouterr().out


def test_a_pad_with_two_consumers(tmp_path):
    model = make([node("Relu", ["x"], "a"), PAD, node("Neg", ["b"], "c"), node("Add", ["b", "c"], "d"),
                  node("Add", ["b", "d"], "y")], initializers=[ints("pads", NOTHING)])
    assert ops(removed(tmp_path, model)) == ["Relu", "Neg", "Add", "Add"]


def test_a_pad_that_is_the_output(tmp_path):
    model = make([node("Relu", ["x"], "a"), node("Neg", ["a"], "z"), node("Pad", ["a", "pads"], "y")], ["y", "z"],
                 [ints("pads", NOTHING)], value_info=[floats("a", SHAPE)])
    result = removed(tmp_path, model)
    assert ops(result) == ["Relu", "Neg"] and not result.graph.value_info


def test_a_pad_between_input_and_output(tmp_path):
    result = removed(tmp_path, make([node("Pad", ["x", "pads"], "y")], initializers=[ints("pads", NOTHING)]))
    assert ops(result) == ["Identity"] and not result.graph.initializer


def test_a_pad_between_two_outputs(tmp_path):
    model = make([node("Relu", ["x"], "y"), node("Pad", ["y", "pads"], "z")], ["y", "z"], [ints("pads", NOTHING)])
    assert ops(removed(tmp_path, model)) == ["Relu", "Identity"]


def test_two_pads_of_one_tensor_that_are_both_outputs(tmp_path):
    model = make([node("Relu", ["x"], "a"), node("Pad", ["a", "pads"], "y"), node("Pad", ["a", "pads"], "z")],
                 ["y", "z"], [ints("pads", NOTHING)])
    assert ops(removed(tmp_path, model)) == ["Relu", "Identity"]


def test_the_shape_noted_for_a_pad_goes_with_it(tmp_path):
    model = make(around(PAD), initializers=[ints("pads", NOTHING)],
                 value_info=[floats("a", SHAPE), floats("b", SHAPE)])
    assert [value.name for value in removed(tmp_path, model).graph.value_info] == ["a"]


@pytest.mark.parametrize("condition", [True, False])
def test_pads_in_the_branches_of_an_if(tmp_path, condition):
    inner = helper.make_graph([node("Pad", ["b", "outer"], "in"), node("Neg", ["in"], "inner")], "inner", [],
                              [floats("inner")])
    other = helper.make_graph([node("Identity", ["x"], "other")], "other", [], [floats("other")])
    yes = helper.make_graph(
        [node("Pad", ["a", "outer"], "b"), node("If", ["condition"], "c", then_branch=inner, else_branch=other),
         node("Cast", ["small"], "wide", to=TensorProto.INT64), node("Pad", ["c", "wide"], "d")],
        "yes", [], [floats("d")])
    no = helper.make_graph([constant("own", NOTHING), node("Pad", ["a", "own"], "e")], "no", [], [floats("e")])
    model = make([node("Relu", ["x"], "a"), node("If", ["condition"], "y", then_branch=yes, else_branch=no)],
                 initializers=[ints("outer", NOTHING), numpy_helper.from_array(np.zeros(8, np.int32), "small")],
                 inputs=[helper.make_tensor_value_info("condition", TensorProto.BOOL, [])])
    result = removed(tmp_path, model, {"condition": np.array(condition)})
    # The second branch has nothing but a tensor of the outer graph to give, which takes a node.
    assert ops(result) == ["Relu", "If", "If", "Neg", "Identity", "Identity"] or \
        sorted(ops(result)) == sorted(["Relu", "If", "If", "Neg", "Identity", "Identity"])
    assert not any(graph.initializer for graph in graphs(result)), "a constant is left that only a Pad used"


def test_a_pad_whose_output_only_a_branch_reads(tmp_path):
    branches = [helper.make_graph([node(op, ["b"], op)], op, [], [floats(op)]) for op in ("Neg", "Relu")]
    model = make([node("Relu", ["x"], "a"), PAD,
                  node("If", ["condition"], "y", then_branch=branches[0], else_branch=branches[1])],
                 initializers=[ints("pads", NOTHING)],
                 inputs=[helper.make_tensor_value_info("condition", TensorProto.BOOL, [])])
    assert "Pad" not in ops(removed(tmp_path, model, {"condition": np.array(True)}))


# --- what stays ----------------------------------------------------------------------------------------------------

def test_a_pad_that_pads_stays_and_is_said_so(tmp_path, capsys):
    model = make(around(PAD, node("Pad", ["x", "none"], "unread")), initializers=[ints("pads", SOMETHING),
                                                                                ints("none", NOTHING)])
    result = removed(tmp_path, model)
    assert ops(result) == ["Relu", "Pad", "Relu"]
    assert [tensor.name for tensor in result.graph.initializer] == ["pads"]
    out = capsys.readouterr().out
    assert "kept Pad_b: it pads by [0, 0, 1, 0, 0, 0, 0, 2]\n" in out and "removed Pad_unread (" in out


def test_negative_pads_crop_and_stay(tmp_path):
    model = make(around(PAD), initializers=[ints("pads", [0, 0, 1, 0, 0, 0, -1, 0])])
    assert ops(removed(tmp_path, model)) == ["Relu", "Pad", "Relu"]


def test_pads_of_run_time_stay(tmp_path, capsys):
    model = make(around(PAD), inputs=[helper.make_tensor_value_info("pads", TensorProto.INT64, [8])])
    feeds = {"pads": np.array(SOMETHING)}
    assert removed(tmp_path, model, feeds).SerializeToString() == model.SerializeToString()
    out = capsys.readouterr().out
    assert "kept Pad_b: its pads are known only at run time\n" in out and "no Pad to remove" in out


@pytest.mark.parametrize("source", ["input", "random"])
def test_pads_that_are_computed_from_what_is_not_constant_stay(tmp_path, source):
    shape = helper.make_node("Shape", ["x"], ["four"])
    if source == "random":
        shape = helper.make_node("RandomUniform", [], ["four"], shape=[4])
    before = [shape, node("Cast", ["four"], "cast", to=TensorProto.INT64),
              node("Sub", ["cast", "cast"], "zero"), node("Concat", ["zero", "zero"], "pads", axis=0)]
    model = make(around(PAD, *before))
    assert removed(tmp_path, model).SerializeToString() == model.SerializeToString()


def test_constants_that_others_use_stay(tmp_path):
    model = make(around(PAD, constant("cells", [1, 2, 3, 4]), node("Pad", ["x", "others"], "z"),
                        node("Concat", ["zeros", "zeros"], "pads", axis=0),
                        node("Reshape", ["x", "zeros"], "v"), node("Reshape", ["x", "cells"], "w"),
                        node("Concat", ["zeros", "zeros"], "others", axis=0)) if False else
                 [node("Relu", ["x"], "a"), node("Concat", ["zeros", "zeros"], "pads", axis=0),
                  node("Pad", ["a", "pads", "value"], "b"), node("Reshape", ["b", "zeros"], "c"),
                  node("Add", ["c", "value"], "y")],
                 initializers=[ints("zeros", [0] * 4), numpy_helper.from_array(np.float32(3), "value")])
    result = removed(tmp_path, model)
    assert ops(result) == ["Relu", "Reshape", "Add"]
    assert [tensor.name for tensor in result.graph.initializer] == ["zeros", "value"]


def test_the_value_that_only_the_pad_used_goes(tmp_path):
    model = make(around(node("Pad", ["a", "pads", "value"], "b"), constant("pads", NOTHING)),
                 initializers=[numpy_helper.from_array(np.float32(3), "value")])
    result = removed(tmp_path, model)
    assert ops(result) == ["Relu", "Relu"] and not result.graph.initializer


def test_an_input_that_only_the_pad_read_stays(tmp_path):
    value = helper.make_tensor_value_info("value", TensorProto.FLOAT, [])
    model = make(around(node("Pad", ["a", "pads", "value"], "b")), initializers=[ints("pads", NOTHING)],
                 inputs=[value])
    result = removed(tmp_path, model, {"value": np.float32(3)})
    assert ops(result) == ["Relu", "Relu"] and [v.name for v in result.graph.input] == ["x", "value"]


def test_an_absent_optional_input_is_no_name(tmp_path):
    # "" stands for an input or output that is not there; a node with such an output must not be taken for unused.
    model = make(around(node("Pad", ["a", "pads", ""], "b"),
                        helper.make_node("TopK", ["x", "k"], ["", "places"]),
                        helper.make_node("Cast", ["places"], ["z"], to=TensorProto.FLOAT)), ["y", "z"],
                 [ints("pads", NOTHING), ints("k", [1])])
    result = removed(tmp_path, model)
    assert ops(result) == ["Relu", "TopK", "Cast", "Relu"]


def test_a_pad_of_another_domain_is_another_operator(tmp_path):
    model = make(around(node("Pad", ["a", "pads"], "b", domain="my.own")), initializers=[ints("pads", NOTHING)])
    model.opset_import.extend([helper.make_opsetid("my.own", 1)])
    assert removed(tmp_path, model, execute=False).SerializeToString() == model.SerializeToString()


# --- files ---------------------------------------------------------------------------------------------------------

def saved(path, model):
    path.write_bytes(model.SerializeToString())
    return str(path)


@pytest.fixture
def padded(tmp_path):
    return saved(tmp_path / "padded.onnx", make(around(PAD), initializers=[ints("pads", NOTHING)]))


def test_a_model_without_pad_passes_through(tmp_path, capsys):
    # An unknown field and an unusual order would not survive being parsed and written.
    content = make([node("Relu", ["x"], "y")]).SerializeToString() + b"\xfa\x3f\x03abc"
    (tmp_path / "in.onnx").write_bytes(content)
    remove_pad.main([str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx")])
    assert (tmp_path / "out.onnx").read_bytes() == content
    assert capsys.readouterr().out == "%s: no Pad to remove; the model is unchanged\n" % (tmp_path / "out.onnx")


@pytest.mark.parametrize("named", [False, True])
def test_both_interfaces(tmp_path, padded, named):
    output = tmp_path / "out.onnx"
    process = script("remove_pad.py", *(["--model_name=" + padded, "--output_name=%s" % output] if named
                                       else [padded, output]))
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout == ("%s: removed Pad_b (pads nothing) and the constants that only it used (1); 2 of 3 nodes "
                              "are left\n" % output)
    assert ops(onnx.load(str(output))) == ["Relu", "Relu"]


def test_the_second_run_and_the_same_path(padded):
    remove_pad.main([padded, padded])
    with open(padded, "rb") as f:
        once = f.read()
    assert ops(onnx.load(padded)) == ["Relu", "Relu"]
    remove_pad.main(["--model_name", padded, "--output_name", padded])
    with open(padded, "rb") as f:
        assert f.read() == once


def test_the_guides_misspelt_suffix_is_noted(tmp_path, padded):
    process = script("remove_pad.py", padded, tmp_path / "out.pnnx")
    assert process.returncode == 0 and (tmp_path / "out.pnnx").exists()
    assert process.stderr == ("note: %s does not end in .onnx, as the name in the guide's atc command does\n"
                              % (tmp_path / "out.pnnx"))


@pytest.mark.parametrize("arguments", [
    [], ["{}"], ["{}", "out", "more"], ["{}", "--output_name", "out"], ["{}", "out", "--model_name", "{}"],
    ["--model_name", "{}"], ["--output_name", "out"], ["--model", "{}", "--output_name", "out"]])
def test_wrong_usage(tmp_path, padded, arguments, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        remove_pad.main([argument.format(padded) for argument in arguments])
    assert exit_.value.code == 2 and ": error: " in capsys.readouterr().err.strip().split("\n")[-1]
    assert os.listdir(str(tmp_path)) == ["padded.onnx"]


def test_usage_error_of_the_script(padded):
    check_error(script("remove_pad.py", padded), "remove_pad.py: error: give MODEL and OUTPUT", code=2)


def test_help_needs_no_onnx(tmp_path, monkeypatch):
    (tmp_path / "onnx.py").write_text("raise SystemExit('onnx was imported')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = script("remove_pad.py", "--help")
    assert process.returncode == 0 and "--model_name" in process.stdout, process.stderr


def test_what_is_no_model_is_refused(tmp_path, padded):
    whole = open(padded, "rb").read()
    random = np.random.RandomState(0)
    files = {"empty": b"", "html": b"<!DOCTYPE html><html>404</html>", "text": b"deepmar\n" * 99,
             "noise": random.bytes(3000), "nulls": bytes(100), "zip": b"PK\x03\x04" + bytes(99)}
    # Not at a field's end near the start, where a cut leaves a valid model: the checker is what stands in between.
    files.update(("cut at %d" % at, whole[:at]) for at in range(1, len(whole) - 20, 7))
    for name, content in files.items():
        (tmp_path / "bad.onnx").write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / "bad.onnx")) + ": no valid ONNX model: ") as error:
            remove_pad.main([str(tmp_path / "bad.onnx"), str(tmp_path / "out.onnx")])
        assert "\n" not in str(error.value), name
        assert sorted(os.listdir(str(tmp_path))) == ["bad.onnx", "padded.onnx"], name


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><html>404</html>", b"garbage" * 50])
def test_what_is_no_model_is_one_line(tmp_path, content):
    (tmp_path / "bad.onnx").write_bytes(content)
    (tmp_path / "out.onnx").write_bytes(b"of yesterday")
    check_error(script("remove_pad.py", tmp_path / "bad.onnx", tmp_path / "out.onnx"),
                "remove_pad.py: error: ", "bad.onnx: no valid ONNX model")
    assert (tmp_path / "out.onnx").read_bytes() == b"of yesterday"


@pytest.mark.parametrize("missing", ["nowhere.onnx", "."])
def test_a_missing_file_or_a_folder(tmp_path, missing):
    check_error(script("remove_pad.py", tmp_path / missing, tmp_path / "out.onnx"), "no such file")


def test_an_output_that_cannot_be_written(tmp_path, padded):
    for output in ("nowhere/out.onnx", "padded.onnx/out.onnx"):
        check_error(script("remove_pad.py", padded, tmp_path / output), output)
    (tmp_path / "folder.onnx").mkdir()
    check_error(script("remove_pad.py", padded, tmp_path / "folder.onnx"), "folder.onnx")
    assert sorted(os.listdir(str(tmp_path))) == ["folder.onnx", "padded.onnx"]


def test_what_a_killed_run_left_is_taken_away(tmp_path, padded):
    (tmp_path / "out.onnx.123.partial").write_bytes(b"half")
    (tmp_path / "other.onnx.123.partial").write_bytes(b"half")
    remove_pad.main([padded, str(tmp_path / "out.onnx")])
    assert sorted(os.listdir(str(tmp_path))) == ["other.onnx.123.partial", "out.onnx", "padded.onnx"]


@pytest.mark.parametrize("place", ["initializer", "constant", "sparse", "branch"])
def test_weights_in_another_file_are_refused(tmp_path, place):
    tensor = ints("pads", NOTHING)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "/etc/passwd"
    if place == "initializer":
        model = make(around(PAD), initializers=[tensor])
    elif place == "constant":
        model = make(around(PAD, helper.make_node("Constant", [], ["pads"], value=tensor)))
    elif place == "sparse":
        pads = helper.make_node("Constant", [], ["pads"])
        attribute = pads.attribute.add()
        attribute.name, attribute.type = "sparse_value", onnx.AttributeProto.SPARSE_TENSOR
        attribute.sparse_tensor.values.CopyFrom(tensor)
        attribute.sparse_tensor.dims.extend([8])
        model = make(around(PAD, pads))
    else:
        branch = helper.make_graph([node("Pad", ["x", "pads"], "z")], "branch", [], [floats("z")], [tensor])
        model = make([node("If", ["c"], "y", then_branch=branch, else_branch=branch)],
                     inputs=[helper.make_tensor_value_info("c", TensorProto.BOOL, [])])
    check_error(script("remove_pad.py", saved(tmp_path / "in.onnx", model), tmp_path / "out.onnx"),
                "in.onnx: keeps its weights in other files")
    assert os.listdir(str(tmp_path)) == ["in.onnx"]


def test_a_chain_that_cannot_be_computed_is_one_line(tmp_path):
    model = make(around(PAD, constant("three", [0, 0, 0]), constant("eight", [8]),
                        node("Reshape", ["three", "eight"], "pads")))
    check_error(script("remove_pad.py", saved(tmp_path / "in.onnx", model), tmp_path / "out.onnx"),
                "remove_pad.py: error: the constant pads cannot be computed")
    assert os.listdir(str(tmp_path)) == ["in.onnx"]


# --- any graph -----------------------------------------------------------------------------------------------------

@strategies.composite
def models(draw):
    """A small graph of Pads, Identity, Relu, Add and If, and how many of its Pads pad something."""
    shapes, nodes, initializers, inputs, sources = {"x": tuple(SHAPE)}, [], [], [], {}
    padding = [0]

    def pads(values, into):
        """The name of constant pads, made in one of the known ways or shared with an earlier Pad."""
        known = sources.setdefault(tuple(values), [])
        if known and draw(strategies.booleans()):
            return draw(strategies.sampled_from(known))
        name = "pads%d" % sum(map(len, sources.values()))
        kind = draw(strategies.sampled_from(["initializer", "input", "constant", "chain", "mixed"]))
        if kind == "constant":
            into.append(constant(name, values))
        elif kind in ("initializer", "input"):
            initializers.append(ints(name, values))
            if kind == "input":
                inputs.append(helper.make_tensor_value_info(name, TensorProto.INT64, [8]))
        else:
            half = constant(name + "a", values[:4])
            initializers.append(ints(name + "b", values[4:]))
            into += [half, node("Concat", [name + "a", name + "b"], name, axis=0)]
        if into is nodes or kind in ("initializer", "input"):  # what a branch makes is not seen outside
            known.append(name)
        return name

    def pad(source, output, into):
        values = NOTHING
        if draw(strategies.integers(0, 3)) == 0:
            values = draw(strategies.sampled_from([SOMETHING, [0, 1] + [0] * 6, [0] * 7 + [-1]]))
            padding[0] += 1
        more = draw(strategies.sampled_from([[], [""], ["half"]]))
        into.append(node("Pad", [source, pads(values, into)] + more, output,
                         **draw(strategies.sampled_from([{}, {"mode": "constant"}]))))
        return tuple(a + b + c for a, b, c in zip(shapes[source], values[:4], values[4:]))

    for i in range(draw(strategies.integers(1, 8))):
        source, output = draw(strategies.sampled_from(sorted(shapes))), "t%d" % i
        op = draw(strategies.sampled_from(["Pad", "Pad", "Pad", "Identity", "Relu", "Add", "If"]))
        if min(shapes[source]) < 2 and op == "Pad":
            op = "Relu"  # nothing is left to crop
        if op == "Pad":
            shapes[output] = pad(source, output, nodes)
            continue
        if op == "Add":
            others = sorted(name for name in shapes if shapes[name] == shapes[source])
            nodes.append(node("Add", [source, draw(strategies.sampled_from(others))], output))
        elif op == "If":
            inner = []
            values = pads(NOTHING, inner)
            inner.append(node("Pad", [source, values], output + "then"))
            yes = helper.make_graph(inner, "yes", [], [floats(output + "then")])
            no = helper.make_graph([node("Neg", [source], output + "else")], "no", [], [floats(output + "else")])
            nodes.append(node("If", ["condition"], output, then_branch=yes, else_branch=no))
        else:
            nodes.append(node(op, [source], output))
        shapes[output] = shapes[source]
    made = sorted(set(shapes) - {"x"})
    outputs = draw(strategies.lists(strategies.sampled_from(made), min_size=1, unique=True))
    initializers.append(numpy_helper.from_array(np.float32(0.5), "half"))
    inputs.append(helper.make_tensor_value_info("condition", TensorProto.BOOL, []))
    return make(nodes, outputs, initializers, inputs), padding[0]


@settings(max_examples=300, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(drawn=models(), condition=strategies.booleans())
def test_any_graph_keeps_its_outputs(drawn, condition):
    model, padding = drawn
    onnx.checker.check_model(model)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    names, _, kept = remove_pad.remove_pads(result)
    onnx.checker.check_model(result)
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(result))
    assert ops(result).count("Pad") == padding == len(kept)
    assert len(names) == ops(model).count("Pad") - padding
    used = {name for graph in graphs(result) for n in graph.node for name in n.input}
    left = {tensor.name for tensor in result.graph.initializer} | {
        name for graph in graphs(result) for n in graph.node if n.op_type in ("Constant", "Concat") for name in n.output}
    assert left - used <= {"half"}, "a constant is left that nothing uses"
    same(model, result, condition=np.array(condition))
