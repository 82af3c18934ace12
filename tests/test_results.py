"""lib/results.py: the one decision between logits and probabilities, by a model's graph, else by its values."""
import json

import numpy as np
import onnx
import pytest
from onnx import helper

from lib.results import as_logits, kind_of, output_kind
from helpers import POSTPROCESS, check_error, end_in, make_model, run_stage_6, script, tensor_info, write_bins, write_images, write_model

FLOAT16, FLOAT = {"to": onnx.TensorProto.FLOAT16}, {"to": onnx.TensorProto.FLOAT}


@pytest.mark.parametrize("operators, kind", [
    ([], "logits"), (["Identity", ("Cast", FLOAT16), ("Cast", FLOAT)], "logits"), (["Sigmoid"], "probabilities"),
    (["Sigmoid", "Identity"], "probabilities"), (["Sigmoid", ("Cast", FLOAT16), ("Cast", FLOAT)], "probabilities"),
    (["Sigmoid", "Dropout", ("Flatten", {"axis": 1}), ("Transpose", {"perm": [0, 1]})], "probabilities"),
    (["Clip", "Sigmoid"], "probabilities"), (["Sigmoid", "Clip"], None), (["Softmax"], None), (["HardSigmoid"], None), (["Neg"], None)])
def test_the_graph_tells_what_a_model_gives(tmp_path, operators, kind):
    path = str(end_in(write_model(tmp_path / "m.onnx", 1), *operators))
    onnx.checker.check_model(onnx.load(path))
    assert kind_of(path) == kind


@pytest.mark.parametrize("nodes, kind", [
    ("MatMul x w m; Add m b y", "logits"), ("MatMul x w m; Add b m y", "logits"), ("MatMul x w m; Add m m y", "logits"),
    ("Conv x w m; Reshape m b y", "logits"), ("Sigmoid x m; Add m b y", None), ("Sigmoid x m; Add m m y", None),
    ("MatMul x w l; Sigmoid l m; Add l m y", None), ("Sigmoid x m; Reshape m b y", "probabilities"),
    ("Sigmoid x m; QuantizeLinear m s q; DequantizeLinear q s y", "probabilities"),
    ("QLinearMatMul x s z w s z s z q; QLinearAdd q s z b s z s z r; DequantizeLinear r s y", "logits"),
    ("QLinearSigmoid x s z s z q; DequantizeLinear q s y", "probabilities"),
    ("If c y", None), ("Identity b y", None), ("Identity y y", None), ("Relu x m", None)])
def test_the_graph_of_several_inputs(nodes, kind):
    nodes = [helper.make_node(words[0], words[1:-1], words[-1:]) for words in (text.split() for text in nodes.split("; "))]
    weights = [(name, np.zeros(1, np.float32)) for name in "wbszc"]
    assert output_kind(make_model(nodes, [tensor_info("x", [1])], [tensor_info("y", [1])], weights)) == kind


def test_the_values_decide_only_if_the_graph_does_not(capsys):
    chances = np.float32([[0, 0.25, 1]])
    logits = np.float32([[-16.118, -1.0986, 16.118]])
    for kind, decided in (("logits", "logits"), ("probabilities", "probabilities"), (None, "probabilities")):
        values, found = as_logits(chances, "m.onnx", kind)
        assert found == decided and values == pytest.approx(chances if decided == "logits" else logits, abs=1e-3)
        told = capsys.readouterr().err
        assert ("its probabilities are converted to logits" in told) == (decided == "probabilities")
        assert ("all values lie between 0 and 1" in told) == (kind is None)
    assert as_logits(logits, "m.onnx")[1] == "logits"


def test_a_sigmoid_is_seen_in_twins_and_by_stage_7(tmp_path):
    """Quantized models and float16 twins end in other operators. Stage 7 asks the model before it asks the user."""
    names = write_images(tmp_path / "images", 20)
    write_bins(tmp_path, names, 32, 32)
    plain = write_model(tmp_path / "plain.onnx", 1, attributes=4, size=(32, 32))
    end_in(write_model(tmp_path / "m.onnx", 1, attributes=4, size=(32, 32)), "Sigmoid", "Identity")
    for command in (["tools/rehearse.py", "float16", "m.onnx", "twin.onnx"], ["tools/quantize.py", "m.onnx", "input_bin", "int8.onnx"]):
        done = script(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    for model in ("m", "twin", "int8"):
        assert kind_of(str(tmp_path / (model + ".onnx"))) == "probabilities"
        done = script("tools/compare.py", model + ".onnx", "--onnx", plain, "--bins", "input_bin", "--max-flips", 5, "--max-difference", 20,
                      cwd=tmp_path)
        assert done.returncode == 0 and "%s.onnx: the model ends in a Sigmoid; its" % model in done.stderr, done.stdout + done.stderr
    (tmp_path / "label.json").write_text(json.dumps({name: [int(i % 3 == j % 3) for j in range(4)] for i, name in enumerate(names)}))
    reports = []
    for model in ("plain.onnx", "m.onnx"):
        run_stage_6(tmp_path, model, 1, 0, 32, 32)
        done = script(POSTPROCESS, "result/dumpOutput_device0", "label.json", "--model", model, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        reports.append(json.loads((tmp_path / "fusion_result.json").read_text()))
    assert reports[1] == dict(reports[0], values="probabilities") and reports[0]["values"] == "logits"
    command = ["tools/thresholds.py", "result/dumpOutput_device0", "label.json"]
    check_error(script(*command, cwd=tmp_path), "they look like probabilities")
    check_error(script(*command, "--model", "m.onnx", cwd=tmp_path), "label.json: has no attribute that at least")
