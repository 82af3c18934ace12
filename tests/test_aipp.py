"""uint8 bins and AIPP: stage 4's pixels, the file for atc, the model with AIPP's arithmetic, and bins that are never mixed."""
import os

import numpy as np
import onnx
import pytest
from PIL import Image

from lib.aipp import aipp_cfg, aipp_differences
from lib.bins import fault
from lib.faults import tensors
from lib.models import description
from lib.session import input_kind, input_size, open_session
from helpers import check_error, parse_predictions, script, write_images, write_model
from small_network import IMAGES, NAMES, SIZE, Scene, compute, make_twin, normalised, weights, write_bins, write_network

import aipp  # the stand-ins'

# --- stages 4 and 5 --------------------------------------------------------------------------------------------------

CFG = """aipp_op {
    aipp_mode: static
    related_input_rank: 0
    input_format: RGB888_U8
    src_image_size_w: 224
    src_image_size_h: 224
    csc_switch: false
    rbuv_swap_switch: false
    min_chn_0: 123.675
    min_chn_1: 116.28
    min_chn_2: 103.53
    var_reci_chn_0: 0.0171247538316637
    var_reci_chn_1: 0.0175070028011204
    var_reci_chn_2: 0.0174291938997821
}
"""


def test_uint8_bins_are_the_resized_pixels(tmp_path):
    names = write_images(tmp_path / "images", 5)
    (tmp_path / "image.txt").write_text("\n".join(names))
    done = script("preprocess_deepmar_pytorch.py", "images", "bins", "image.txt", "--uint8", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == "bins: 5 images -> 5 bins of uint8 [224,224,3]\n", done.stderr
    for name in names:
        with Image.open(str(tmp_path / "images" / name)) as image:
            expected = np.asarray(image.convert("RGB").resize((224, 224), Image.BILINEAR))
        content = (tmp_path / "bins" / (name[:-4] + ".bin")).read_bytes()
        assert len(content) == 150528 and content == expected.tobytes()
    done = script("get_info.py", "bins", "deepmar.info", 224, 224, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == "deepmar.info: 5 bins of bins, 224 x 224, uint8\n", done.stderr
    (tmp_path / "bins" / "im3.bin").write_bytes(bytes(602112))
    check_error(script("get_info.py", "bins", "deepmar.info", 224, 224, cwd=tmp_path),
                "1 of 5 bins are not uint8 [224,224,3] (150528 bytes): im3.bin (602112 bytes); that is the size of float32")


def test_bins_of_another_size_do_not_pass_for_the_other_kind(tmp_path):
    """float32 at half the height and width has as many bytes as uint8."""
    (tmp_path / "image.txt").write_text("\n".join(write_images(tmp_path / "images", 2)))
    make_twin(write_network(tmp_path / "m.onnx", weights()), tmp_path / "a.onnx", "aipp")
    for kind, size, more, other, om, text in (
            ("float32", 8, [], "uint8 [16,16,3]", "a.onnx", "float32 values, not pixels"),
            ("uint8", 32, ["--uint8"], "float32 [3,16,16]", "m.onnx", "NaN or infinite values")):
        script("preprocess_deepmar_pytorch.py", "images", kind, "image.txt", "--size", size, size, *more, cwd=tmp_path)
        assert script("get_info.py", kind, "deepmar.info", size, size, cwd=tmp_path).returncode == 0
        check_error(script("get_info.py", kind, "deepmar.info", 16, 16, cwd=tmp_path), "%s/im0.bin" % kind,
                    "is not %s, although it has that size: it holds %s" % (other, text))
        # and in stage 6
        (tmp_path / "info").write_text("0 %s/im0.bin 16 16\n" % kind)
        check_error(script("tools/benchmark.py", "-batch_size=1", "-input_width=16", "-input_height=16", "-input_text_path=info",
                           "-om_path=" + om, cwd=tmp_path), text, "in %s/im0.bin" % kind)
    assert fault(np.zeros((16, 16, 3), np.uint8)) is None and fault(np.full((16, 16, 3), 255, np.uint8)) is None


# --- atc's file ------------------------------------------------------------------------------------------------------

def test_cfg_is_atcs_file(tmp_path):
    assert script("tools/rehearse.py", "cfg", tmp_path / "aipp.cfg").returncode == 0
    assert (tmp_path / "aipp.cfg").read_text() == CFG
    assert aipp.settings({"insert_op_conf": str(tmp_path / "aipp.cfg")}, [1, 3, 224, 224], pytest.fail).startswith(b"{")
    assert script("tools/rehearse.py", "cfg", tmp_path / "aipp.cfg", "--size", 256, 128).returncode == 0
    assert "src_image_size_w: 128\n    src_image_size_h: 256\n" in (tmp_path / "aipp.cfg").read_text()


NV12 = """    csc_switch: true
    rbuv_swap_switch: false
    matrix_r0c0: 298
    matrix_r0c1: 0
    matrix_r0c2: 459
    matrix_r1c0: 298
    matrix_r1c1: -55
    matrix_r1c2: -136
    matrix_r2c0: 298
    matrix_r2c1: 541
    matrix_r2c2: 0
    input_bias_0: 16
    input_bias_1: 128
    input_bias_2: 128
    min_chn_0: 123.675
"""


def test_cfg_for_nv12(tmp_path):
    assert script("tools/rehearse.py", "cfg", tmp_path / "aipp.cfg", "--nv12", 709).returncode == 0
    text = CFG.replace("    csc_switch: false\n    rbuv_swap_switch: false\n    min_chn_0: 123.675\n", NV12)
    assert (tmp_path / "aipp.cfg").read_text() == text.replace("RGB888_U8", "YUV420SP_U8")
    check_error(script("tools/rehearse.py", "cfg", tmp_path / "aipp.cfg", "--nv12", 601, "--size", 223, 224), "NV12 needs an even height")


@pytest.mark.parametrize("line, other, text", [
    ("csc_switch: true", "csc_switch: false", "csc_switch false: the model takes RGB"),
    ("YUV420SP_U8", "RGB888_U8", "csc_switch true: the model takes RGB"),
    ("    matrix_r2c1: 541\n", "", "matrix_r2c1 is missing"), ("    input_bias_0: 16\n", "", "input_bias_0 is missing"),
    ("input_bias_0: 16", "input_bias_0: -16", "input_bias_0: -16 is not from 0 to 255"),
    ("matrix_r2c1: 541", "matrix_r2c1: 54100", "54100 is not from"), ("matrix_r2c1: 541", "matrix_r2c1: 2.1", 'the value "2.1"'),
    ("src_image_size_w: 224", "src_image_size_w: 223", "must be even numbers")])
def test_strict_about_nv12(tmp_path, line, other, text):
    cfg = aipp_cfg(224, 224, "709")
    assert line in cfg
    (tmp_path / "aipp.cfg").write_text(cfg.replace(line, other))
    with pytest.raises(pytest.fail.Exception) as error:
        aipp.settings({"insert_op_conf": str(tmp_path / "aipp.cfg")}, [1, 3, 224, 224], pytest.fail)
    assert text in str(error.value)


# --- the model with AIPP ------------------------------------------------------------------------------------------------

def fields(nv12, **changes):
    """The fields of the file that we write, with changes."""
    lines = [line.split(": ") for line in aipp_cfg(SIZE, SIZE, nv12).splitlines() if ": " in line]
    return dict({name.strip(): value for name, value in lines}, **changes)


def after_aipp(bins, nv12=None, **changes):
    """What the network is given for the bins, by the stand-in's arithmetic: float32 [images,3,height,width]."""
    data = b"".join(np.fromfile(os.path.join(bins, name + ".bin"), np.uint8).tobytes() for name in NAMES)
    return aipp.network_input(data, fields(nv12, **changes), [IMAGES, 3, SIZE, SIZE])


@pytest.fixture(scope="module")
def aipp_scene(tmp_path_factory):
    """A model with AIPP, its float16 twin, and uint8 bins that have every pixel value."""
    scene = Scene(tmp_path_factory.mktemp("aipp"))
    scene.pixels[0] = np.arange(SIZE * SIZE).reshape(SIZE, SIZE, 1)
    scene.bins = write_bins(scene.folder / "uint8", scene.pixels)
    scene.float_model, scene.model = scene.model, make_twin(scene.model, scene.folder / "aipp.onnx", "aipp")
    scene.twin = make_twin(scene.model, scene.folder / "aipp_float16.onnx")
    return scene


def test_aipp_arithmetic_is_numpys_float16(aipp_scene):
    bins = [os.path.join(aipp_scene.bins, name + ".bin") for name in NAMES]
    expected = after_aipp(aipp_scene.bins)
    for path in (aipp_scene.model, aipp_scene.twin):
        for value, wanted in zip(tensors(path, ["actual_input_1"], bins), expected):
            assert np.array_equal(value["actual_input_1"][0], wanted)
    difference = np.abs(expected[0] - normalised(aipp_scene.pixels)[0]).max(axis=(1, 2))
    assert aipp_differences() == pytest.approx(difference, rel=1e-3) and difference.max() < 0.003
    logits = compute(aipp_scene.values, expected)["output1"]
    found = np.concatenate([value["output1"] for value in tensors(aipp_scene.twin, ["output1"], bins)])
    assert np.abs(found - logits).max() < 0.01


def test_all_tools_take_a_model_with_aipp(aipp_scene, tmp_path):
    """stage 6, compare, predict and quantize; with float32 bins, each says that they are the other kind."""
    names = write_images(tmp_path / "images", IMAGES)
    (tmp_path / "image.txt").write_text("\n".join(names))
    for more in (["bins", "--uint8"], ["float_bins"]):
        assert script("preprocess_deepmar_pytorch.py", "images", more[0], "image.txt", "--size", SIZE, SIZE, *more[1:],
                      cwd=tmp_path).returncode == 0
    assert script("get_info.py", "bins", "deepmar.info", SIZE, SIZE, cwd=tmp_path).returncode == 0
    command = ["tools/benchmark.py", "-batch_size=1", "-input_width=%d" % SIZE, "-input_height=%d" % SIZE]
    run = command + ["-input_text_path=deepmar.info"]
    assert script(*run, "-om_path=%s" % aipp_scene.model, cwd=tmp_path).returncode == 0
    assert script(*command, "-round=2", "-om_path=%s" % aipp_scene.model, cwd=tmp_path).returncode == 0
    result = tmp_path / "result" / "dumpOutput_device0"
    done = script("tools/compare.py", result, "--onnx", aipp_scene.model, "--bins", tmp_path / "bins", "--max-difference", 1e-6)
    assert done.returncode == 0, done.stderr
    done = script("tools/compare.py", result, "--onnx", aipp_scene.float_model, "--bins", tmp_path / "float_bins")  # today's bins
    assert done.returncode == 0 and "largest difference: 0\n" not in done.stdout, done.stderr
    done = script("tools/predict.py", "images/im3.png", "--onnx", aipp_scene.model, cwd=tmp_path)
    logits = np.fromfile(str(result / "im3_1.bin"), "<f4")
    assert [row[3] for row in parse_predictions(done.stdout)["images/im3.png"]] == sorted(logits, reverse=True), done.stderr
    done = script("tools/quantize.py", aipp_scene.model, "bins", "int8.onnx", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "QLinearConv" in {node.op_type for node in onnx.load(str(tmp_path / "int8.onnx")).graph.node}
    done = script("tools/compare.py", result, "--onnx", "int8.onnx", "--bins", "bins", "--max-difference", 1, "--max-flips", 9,
                  cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = "bins are not uint8 [16,16,3] (768 bytes)"
    check_error(script("tools/compare.py", result, "--onnx", aipp_scene.model, "--bins", "float_bins", cwd=tmp_path), wrong)
    check_error(script("tools/quantize.py", aipp_scene.model, "float_bins", "i.onnx", cwd=tmp_path), wrong, "with --uint8")
    check_error(script("tools/compare.py", result, "--onnx", aipp_scene.float_model, "--bins", "bins", cwd=tmp_path),
                "bins are not float32 [3,16,16] (3072 bytes)", "without --uint8")
    script("get_info.py", "float_bins", "deepmar.info", SIZE, SIZE, cwd=tmp_path)
    check_error(script(*run, "-om_path=%s" % aipp_scene.model, cwd=tmp_path), wrong)


@pytest.mark.parametrize("changes, text", [
    ({"rbuv_swap_switch": "true"}, "BGR instead of RGB (stage 4's channels, or rbuv_swap_switch in aipp.cfg)"),
    ({"min_chn_0": 0, "min_chn_1": 0, "min_chn_2": 0}, "without the mean subtracted (min_chn in aipp.cfg)"),
    ({"var_reci_chn_0": 1 / 255, "var_reci_chn_1": 1 / 255, "var_reci_chn_2": 1 / 255}, "without the division by")])
def test_wrong_aipp_settings_are_recognised(aipp_scene, changes, text):
    aipp_scene.compare(aipp_scene.card(inputs=after_aipp(aipp_scene.bins)))  # the right ones are accepted
    message = aipp_scene.refused(aipp_scene.card(inputs=after_aipp(aipp_scene.bins, **changes)))
    assert "these are the results for an input " + text in message


def test_model_with_aipp_describes_its_layout(tmp_path):
    model = onnx.load(str(write_model(tmp_path / "m.onnx", size=(16, 16))))
    onnx.helper.set_model_props(model, {"deepmar.layout": "NCHW RGB", "deepmar.output": "logits"})
    onnx.save(model, str(tmp_path / "m.onnx"))
    assert script("tools/rehearse.py", "aipp", "m.onnx", "twin.onnx", cwd=tmp_path).returncode == 0
    assert description(str(tmp_path / "twin.onnx")) == {"layout": "NHWC RGB uint8", "output": "logits"}


# --- the model with AIPP for NV12 ------------------------------------------------------------------------------------------

def nv12_bins(folder):
    """Bins of any bytes: every one is a picture in NV12."""
    return write_bins(folder, np.random.RandomState(3).randint(0, 256, (IMAGES, SIZE * 3 // 2, SIZE)).astype(np.uint8))


@pytest.mark.parametrize("standard", ["601", "709", "jpeg"])
def test_nv12_arithmetic_is_aipps(aipp_scene, tmp_path, standard):
    bins = nv12_bins(tmp_path / "bins")
    model = make_twin(aipp_scene.float_model, tmp_path / "nv12.onnx", "aipp", "--nv12", standard)
    expected = after_aipp(bins, standard)
    for path in (model, make_twin(model, tmp_path / "float16.onnx")):
        for value, wanted in zip(tensors(path, ["actual_input_1"], [os.path.join(bins, name + ".bin") for name in NAMES]), expected):
            assert np.array_equal(value["actual_input_1"][0], wanted)
    session = open_session(model)
    assert (input_kind(session), input_size(session)) == ("nv12-" + standard, (1, SIZE, SIZE))


def test_all_tools_take_a_model_for_nv12(aipp_scene, tmp_path):
    """stages 4 to 6, compare, predict and quantize; with other bins, each says which ones they are."""
    model = make_twin(aipp_scene.float_model, tmp_path / "nv12.onnx", "aipp", "--nv12", "601")
    names = write_images(tmp_path / "images", IMAGES)
    (tmp_path / "image.txt").write_text("\n".join(names))
    for folder, more in (("bins", ["--nv12", 601]), ("uint8", ["--uint8"]), ("float32", [])):
        done = script("preprocess_deepmar_pytorch.py", "images", folder, "image.txt", "--size", SIZE, SIZE, *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert script("get_info.py", folder, folder + ".info", SIZE, SIZE, cwd=tmp_path).returncode == 0
    command = ["tools/benchmark.py", "-batch_size=1", "-input_width=%d" % SIZE, "-input_height=%d" % SIZE]
    for more in ("-input_text_path=bins.info", "-round=2"):
        done = script(*command, more, "-om_path=%s" % model, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    check_error(script(*command[:2], "-input_width=16", "-input_height=32", "-input_text_path=bins.info", "-om_path=%s" % model,
                       cwd=tmp_path), "nv12.onnx: its input is [1,24,16], not [1,48,16]")
    result = tmp_path / "result" / "dumpOutput_device0"
    done = script("tools/compare.py", result, "--onnx", model, "--bins", tmp_path / "bins", "--max-difference", 1e-6)
    assert done.returncode == 0, done.stderr
    done = script("tools/predict.py", "images/im3.png", "--onnx", model, cwd=tmp_path)
    logits = np.fromfile(str(result / "im3_1.bin"), "<f4")
    assert [row[3] for row in parse_predictions(done.stdout)["images/im3.png"]] == sorted(logits, reverse=True), done.stderr
    done = script("tools/quantize.py", model, "bins", "int8.onnx", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "QLinearConv" in {node.op_type for node in onnx.load(str(tmp_path / "int8.onnx")).graph.node}
    done = script("tools/compare.py", result, "--onnx", "int8.onnx", "--bins", "bins", "--max-difference", 1, "--max-flips", 9,
                  cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for folder, text in (("uint8", "uint8 [16,16,3]"), ("float32", "float32 [3,16,16]")):
        check_error(script("tools/compare.py", result, "--onnx", model, "--bins", folder, cwd=tmp_path),
                    "bins are not NV12 uint8 [24,16] (384 bytes)", "that is the size of %s: run stage 4 again with --nv12 601" % text)
        check_error(script(*command, "-input_text_path=%s.info" % folder, "-om_path=%s" % model, cwd=tmp_path), "not NV12 uint8 [24,16]")
    for other, text in ((aipp_scene.model, "with --uint8"), (aipp_scene.float_model, "without --uint8")):
        check_error(script("tools/compare.py", result, "--onnx", other, "--bins", "bins", cwd=tmp_path),
                    "that is the size of NV12 uint8 [24,16]: run stage 4 again " + text)


def test_standard_of_nv12_is_in_the_metadata(aipp_scene, tmp_path):
    model = onnx.load(make_twin(aipp_scene.float_model, tmp_path / "nv12.onnx", "aipp", "--nv12", "jpeg"))
    del model.metadata_props[:]
    onnx.save(model, str(tmp_path / "nv12.onnx"))
    with pytest.raises(ValueError) as error:
        open_session(str(tmp_path / "nv12.onnx"))
    assert "its input is uint8 [1,24,16], but its metadata do not say that it is NV12, and by which standard" in str(error.value)
    write_model(tmp_path / "odd.onnx", size=(16, 15))
    check_error(script("tools/rehearse.py", "aipp", tmp_path / "odd.onnx", tmp_path / "t.onnx", "--nv12", "601"), "even height and width")


@pytest.mark.parametrize("nv12, changes, text", [
    ("709", {}, "with the colours of NV12 BT.709 uint8 (matrix_* and input_bias_* in aipp.cfg)"),
    ("601", {"rbuv_swap_switch": "true"}, "with U and V exchanged (rbuv_swap_switch in aipp.cfg)"),
    ("601", {"var_reci_chn_0": 1 / 255, "var_reci_chn_1": 1 / 255, "var_reci_chn_2": 1 / 255}, "without the division by")])
def test_wrong_settings_for_nv12_are_recognised(tmp_path, nv12, changes, text):
    scene = Scene(tmp_path)
    scene.model = make_twin(scene.model, tmp_path / "nv12.onnx", "aipp", "--nv12", "601")
    scene.twin, scene.bins = make_twin(scene.model, tmp_path / "nv12_float16.onnx"), nv12_bins(tmp_path / "nv12")
    scene.compare(scene.card(inputs=after_aipp(scene.bins, "601")))  # the right ones are accepted
    assert "these are the results for an input " + text in scene.refused(scene.card(inputs=after_aipp(scene.bins, nv12, **changes)))
