"""A model's description: export_onnx.py writes it, later stages keep it, and tools take the attributes' names from it."""
import hashlib
import json
import shutil

import numpy as np
import onnx
import pytest

from lib.models import description
from helpers import (NETWORK, POSTPROCESS, ROOT, ZEROS, between, check_error, end_in, model_of, node, parse_predictions, put, random_case,
                     run_stage_6, script, write_bins, write_case, write_images, write_model)
from lib.images import MEAN, STD

NAMES = ["hat", "a bag, on wheels", "\u5e3d\u5b50"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with out.onnx, exported of a small network with 35 names, and the names."""
    folder = tmp_path_factory.mktemp("exported")
    (folder / "baseline" / "model").mkdir(parents=True)
    (folder / "baseline" / "model" / "DeepMAR.py").write_text(NETWORK % "x")
    shutil.copy(ROOT + "/export_onnx.py", str(folder))
    (folder / "any.pth").write_bytes(b"checkpoint")
    names = NAMES + ["trait %d" % i for i in range(32)]
    (folder / "names.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n\n".join(names).encode("utf-8"))
    process = export(folder, "--attributes", "names.txt", "--size", 64, 32, "--last-conv-stride", 1)
    assert process.returncode == 0, process.stderr
    return folder, names


def export(folder, *options):
    return script(folder / "export_onnx.py", "any.pth", "out.onnx", 1, *options, cwd=folder)


def test_export_writes_the_description(exported):
    folder, names = exported
    assert description(str(folder / "out.onnx")) == {
        "attributes": names, "mean": list(MEAN), "std": list(STD), "size": [64, 32], "layout": "NCHW RGB", "output": "logits",
        "last_conv_stride": 1, "checkpoint_sha256": hashlib.sha256(b"checkpoint").hexdigest(), "version": "1.0"}
    model = onnx.load(str(folder / "out.onnx"))
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(model), full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 11)]
    assert {entry.key: entry.value for entry in model.metadata_props}["deepmar.size"] == "[64, 32]"


def test_export_refuses_wrong_names(exported, tmp_path):
    for text, message in (("one\ntwo\n", "names.txt: holds 2 names, but any.pth has 35 attributes"),
                          ("hat\nbag\nhat\n", "names.txt: holds a name more than once: hat")):
        (tmp_path / "names.txt").write_text(text)
        check_error(export(exported[0], "--attributes", tmp_path / "names.txt"), message)


def test_remove_pad_and_quantize_keep_the_description(tmp_path):
    onnx.save(model_of(between(node("Pad", "r c", "p")), [("c", ZEROS)]), str(tmp_path / "pad.onnx"))
    put(tmp_path / "pad.onnx", attributes=json.dumps(NAMES), version="1.0")
    process = script("remove_pad.py", "pad.onnx", "nopad.onnx", cwd=tmp_path)
    assert "removed" in process.stdout and description(str(tmp_path / "nopad.onnx")) == {"attributes": NAMES, "version": "1.0"}
    write_model(tmp_path / "bs1.onnx", attributes=5)
    put(tmp_path / "bs1.onnx", attributes=json.dumps(NAMES + ["x", "y"]), size="[224, 224]")
    (tmp_path / "bins").mkdir()
    for i in range(2):
        (tmp_path / "bins" / ("%d.bin" % i)).write_bytes(np.full(3 * 224 * 224, i, "<f4").tobytes())
    process = script("tools/quantize.py", "bs1.onnx", "bins", "int8.onnx", cwd=tmp_path)
    assert process.returncode == 0 and process.stderr == "", process.stderr
    assert description(str(tmp_path / "int8.onnx")) == {"attributes": NAMES + ["x", "y"], "size": [224, 224], "output": "logits"}


def test_describe_writes_the_json_of_an_om(exported, tmp_path):
    folder, names = exported
    process = script("tools/describe.py", folder / "out.onnx", tmp_path / "out.json")
    assert process.returncode == 0 and process.stdout == process.stderr == ""
    assert description(str(tmp_path / "out.json")) == description(str(folder / "out.onnx"))
    assert "\u5e3d\u5b50" in (tmp_path / "out.json").read_text(encoding="utf-8")
    assert json.loads(script("tools/describe.py", tmp_path / "out.json").stdout)["attributes"] == names
    write_model(tmp_path / "plain.onnx")
    assert json.loads(script("tools/describe.py", tmp_path / "plain.onnx").stdout) == {"output": "logits"}
    put(end_in(tmp_path / "plain.onnx", "Sigmoid", "Identity"), output="logits")  # as exported, before the Sigmoid was added
    assert json.loads(script("tools/describe.py", tmp_path / "plain.onnx").stdout) == {"output": "probabilities"}
    (tmp_path / "bad.onnx").write_bytes(b"<html>")
    (tmp_path / "bad.json").write_text("<html>")
    (tmp_path / "bad.om").write_bytes(b"<html>")
    for name, message in (("bad.onnx", "bad.onnx: is not a valid ONNX model"), ("bad.om", "bad.json: is not JSON"), ("no.json", "no.json")):
        check_error(script("tools/describe.py", tmp_path / name), message)


def test_predict_takes_the_models_names(tmp_path):
    """--attributes, then the model's names, then PETA's. The file may have any name."""
    image, = write_images(tmp_path / "images", 1)
    model = write_model(tmp_path / "m", attributes=3)

    def names(*options):
        process = script("tools/predict.py", "images/" + image, "--onnx", model, *options, cwd=tmp_path)
        assert process.returncode == 0 and process.stderr == "", process.stderr
        return {row[2] for row in parse_predictions(process.stdout)["images/" + image]}

    assert names() == {"attribute0", "attribute1", "attribute2"}
    put(model, attributes=json.dumps(NAMES))
    assert names() == set(NAMES)
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    assert names("--attributes", "names.txt") == {"a", "b", "c"}


def test_the_models_names_in_another_order_are_refused_by_every_tool(tmp_path):
    """Other names, such as a translation, are taken."""
    model = put(write_model(tmp_path / "m.onnx", attributes=3, size=(8, 8)), attributes='["hat", "bag", "coat"]')
    write_bins(tmp_path, write_images(tmp_path / "images", 2), 8, 8)
    run_stage_6(tmp_path, model, 1, 0, 8, 8)
    (tmp_path / "label.json").write_text('{"im0.png": [0, 1, 0], "im1.png": [1, 0, 1]}')
    result = "result/dumpOutput_device0"
    commands = [["tools/predict.py", "images", "--onnx", model], [POSTPROCESS, result, "label.json", "--model", model],
                ["tools/compare.py", result, "--onnx", model, "--bins", "input_bin"]]
    for text, wrong in (("bag\nhat\ncoat", "hat (1, not 2)"), ("hat\ncoat\nscarf", "coat (3, not 2)"), ("Hut\nTasche\nMantel", None),
                        ("hat\nTasche\ncoat", None)):
        (tmp_path / "names.txt").write_text(text)
        for command in commands:
            process = script(*command, "--attributes", "names.txt", cwd=tmp_path)
            if wrong:
                check_error(process, "names.txt: holds the names of %s in another order" % model, wrong)
            else:
                assert process.returncode == 0, process.stderr
    other = put(write_model(tmp_path / "other.onnx", attributes=3, size=(8, 8)), attributes='["bag", "hat", "coat"]')
    process = script("tools/compare.py", other, "--onnx", model, "--bins", "input_bin", cwd=tmp_path)
    check_error(process, "other.onnx: holds the names of %s in another order" % model, "bag (2, not 1)")


def test_stage_7_and_report_take_the_models_names(exported, tmp_path):
    """--attributes, then the model's names, then fusion_result.json's."""
    folder, names = exported
    logits, labels = random_case()
    result, label = write_case(tmp_path, logits[:20], labels[:20])
    images = ["%05d.png" % i for i in range(20)]
    (tmp_path / "image.txt").write_text("\n".join(images))
    for written, name in zip(write_images(tmp_path / "images", 20), images):
        (tmp_path / "images" / written).rename(tmp_path / "images" / name)
    script("tools/describe.py", folder / "out.onnx", tmp_path / "out.json")
    (tmp_path / "others.txt").write_text("\n".join("other %d" % i for i in range(35)))

    def page(*options):
        process = script("tools/report.py", "--images", "images", "--labels", label, "--results", result, *options, cwd=tmp_path)
        assert process.returncode == 0 and process.stderr == "", process.stderr
        return (tmp_path / "report.html").read_text(encoding="utf-8")

    for options, first in ((["--model", "out.json"], "hat"), (["--model", folder / "out.onnx"], "hat"),
                           (["--model", "out.json", "--attributes", "others.txt"], "other 0"), ([], "personalLess30")):
        assert script(POSTPROCESS, result, label, *options, cwd=tmp_path).returncode == 0
        assert json.loads((tmp_path / "fusion_result.json").read_text())["attributes"][0]["name"] == first
    assert "PETA's names are assumed" in page() and 'data-value="personalLess30"' in page()
    text = page("--model", "out.json")
    assert 'data-value="hat"' in text and "PETA's names are assumed" not in text
    assert "SHA-256 " + hashlib.sha256(b"checkpoint").hexdigest() in text
    assert 'data-value="other 0"' in page("--model", "out.json", "--attributes", "others.txt")
    (tmp_path / "none.json").write_text("{}")
    assert 'data-value="personalLess30"' in page("--model", "none.json")


@pytest.mark.parametrize("entries, message", [
    ({"attributes": '["hat", "bag"]'}, "is a model of 2 attributes, but there are 3"),
    ({"attributes": '["hat", "bag", "hat"]'}, "its attributes are not a list of different names"),
    ({"attributes": '["hat", "bag", "a\\nb"]'}, "its attributes are not"), ({"attributes": '{"hat": 1}'}, "its attributes are not"),
    ({"attributes": "[" * 100000}, "its metadata is damaged"), ({"size": ""}, "its metadata is damaged"),
    ({"size": '["224", 224]'}, "its size is not [height, width]"), ({"size": "[0, 224]"}, "its size is not [height, width]")])
def test_damaged_metadata_is_refused(tmp_path, entries, message):
    from lib.labels import attribute_names
    model = str(put(write_model(tmp_path / "m.onnx", attributes=3), **entries))
    with pytest.raises(ValueError) as error:
        attribute_names(3, None, model)
    assert str(error.value).startswith(model) and message in str(error.value) and "\n" not in str(error.value)
