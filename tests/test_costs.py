"""tools/rehearse.py costs: its figures against twins and bins that are made by hand, a second start, and what it refuses."""
import json

import numpy as np
import onnx
import pytest
from PIL import Image
from helpers import check_error, independent, script, write_images, write_model
from onnx import helper

from lib import costs
from lib.metrics import effect
from lib.models import SIMULATES
from lib.session import cpu_session
from small_network import ATTRIBUTES, IMAGES, SIZE, make_twin, weights, write_network

NAMES = ["float32", "AIPP", "float16", "AIPP + float16", "INT8", "INT8 + AIPP", "plain resize", "plain resize + NV12"]


@pytest.fixture
def folder(tmp_path):
    """A folder with the small network, images with labels, and other images for calibration."""
    names = write_images(tmp_path / "images", IMAGES)
    random = np.random.RandomState(4)
    (tmp_path / "image.txt").write_text("\n".join(names))
    (tmp_path / "label.json").write_text(json.dumps({name: [1] + random.randint(0, 2, ATTRIBUTES - 1).tolist() for name in names}))
    (tmp_path / "val").mkdir()
    for i in range(8):
        Image.fromarray(random.randint(0, 256, (40, 30, 3)).astype(np.uint8)).save(str(tmp_path / "val" / ("v%d.png" % i)))
    (tmp_path / "val.txt").write_text("".join("v%d.png\n" % i for i in range(8)))
    write_network(tmp_path / "m.onnx", weights())
    return tmp_path


@pytest.fixture
def computed(monkeypatch):
    """The rows' logits that were asked for, as a list. They are drawn, and none is like another."""
    found = []

    def compute(model, row, paths, *_):
        found.append(np.random.RandomState(len(found)).standard_normal((len(paths), ATTRIBUTES)).astype(np.float32))
        return found[-1]
    monkeypatch.setattr(costs, "compute", compute)
    return found


def run(folder, *options, model="m.onnx"):
    return script("tools/rehearse.py", "costs", "--onnx", model, "--images", "images", *options, cwd=folder)


def figures(folder, *options, model="m.onnx"):
    """Returns ({row's name: its figures}, what was printed)."""
    done = run(folder, "--json", "costs.json", *options, model=model)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    rows = json.loads((folder / "costs.json").read_text())["rows"]
    assert [row["name"] for row in rows] == NAMES
    return {row["name"]: row for row in rows}, done.stdout


CALIBRATION = ["--calibration-images", "val", "--calibration-list", "val.txt"]


def test_figures_are_those_of_twins_and_bins_made_by_hand(folder):
    rows, out = figures(folder, *CALIBRATION)
    stage_4, camera = ["preprocess_deepmar_pytorch.py"], ["tools/rehearse.py", "input"]
    sources = {"images": ["images", "image.txt"], "val": ["val", "val.txt"]}

    def bins(name, command, *more, source="images"):
        images, listed = sources[source]
        done = script(*command, images, name, listed, "--size", SIZE, SIZE, *more, cwd=folder)
        assert done.returncode == 0, done.stderr
        return name

    float32, uint8 = bins("float32", stage_4), bins("uint8", stage_4, "--uint8")
    bins("val_bin", stage_4, source="val")
    model, aipp = str(folder / "m.onnx"), make_twin(folder / "m.onnx", folder / "a.onnx", "aipp")
    int8 = str(folder / "i.onnx")
    assert script("tools/rehearse.py", "int8", model, "val_bin", int8, cwd=folder).returncode == 0
    by_hand = {"float32": (model, float32), "AIPP": (aipp, uint8), "float16": (make_twin(model, folder / "f.onnx"), float32),
               "AIPP + float16": (make_twin(aipp, folder / "af.onnx"), uint8), "INT8": (int8, float32),
               "INT8 + AIPP": (make_twin(int8, folder / "ia.onnx", "aipp"), uint8),
               "plain resize": (model, bins("plain", camera, "--resize", "plain")),
               "plain resize + NV12": (make_twin(model, folder / "n.onnx", "aipp", "--nv12", "709"),
                                       bins("nv12", camera, "--resize", "plain", "--nv12", "709", "--kind", "nv12"))}
    names = (folder / "image.txt").read_text().split()
    labels = [json.loads((folder / "label.json").read_text())[name] for name in names]
    logits = {}
    for name, (path, source) in by_hand.items():
        session = cpu_session(onnx.load(path))
        value, = session.get_inputs()
        files = [folder / source / name.replace(".png", ".bin") for name in names]
        inputs = np.stack([np.fromfile(str(file), "<f4" if "float" in value.type else np.uint8) for file in files])
        logits[name] = np.concatenate([session.run(None, {value.name: row.reshape(value.shape)})[0] for row in inputs])
        assert rows[name]["bytes"] == files[0].stat().st_size
    accuracy = {name: independent(array.tolist(), labels)[0][0] for name, array in logits.items()}
    for name, row in rows.items():
        shift = logits[name].astype(np.float64) - logits["float32"]
        assert row["max_difference"] == pytest.approx(np.abs(shift).max(), rel=1e-4, abs=1e-6), name
        assert row["rms_difference"] == pytest.approx(np.sqrt((shift ** 2).mean()), rel=1e-4, abs=1e-6), name
        assert row["flips"] == sum(a != b for a, b in zip((logits[name] >= 0).ravel(), (logits["float32"] >= 0).ravel()))
        assert row["instance_acc"] == pytest.approx(accuracy[name])
        assert row["drop"] == pytest.approx(accuracy["float32"] - accuracy[name], abs=1e-12)
        low, high = effect(logits[name], logits["float32"], np.array(labels))["instance_acc"]["interval"]
        assert row["interval"] == pytest.approx([-high, -low], abs=1e-12)
    assert rows["float16"]["max_difference"] < rows["INT8"]["max_difference"] and rows["plain resize + NV12"]["flips"] > 0
    lines = out.splitlines()
    assert len(set(map(len, (line[:lines[0].index("trust")] for line in lines[:9])))) == 1 and max(map(len, lines[:9])) <= 130
    for name, line in zip(NAMES[1:], lines[2:]):
        row = rows[name]
        assert line.startswith(name) and line.endswith(row["trust"]) and " %d " % row["bytes"] in line
        assert "%.4f" % row["max_difference"] in line and "%.2f to %.2f" % tuple(100 * end for end in row["interval"]) in line
    assert "estimate: AMCT's arithmetic, but the card's kernels are unknown; calibrated on 8 images\n" in out
    assert "12 images, 72 decisions; the largest drop is " in lines[-1] and "0 of 8 rows were in costs" in lines[-1]
    (folder / "groups.txt").write_text("".join("%s %d\n" % (name, i // 2) for i, name in enumerate(names)))
    in_groups, out = figures(folder, *CALIBRATION, "--groups", "groups.txt")
    assert in_groups == {name: dict(row, interval=None) for name, row in rows.items()}  # six groups are too few
    assert out.splitlines()[2].split()[-2:] == ["-", "exact"]


def test_only_what_is_new_is_computed(folder, computed):
    rows, _ = figures(folder, *CALIBRATION)
    assert len(computed) == 8

    def again(*options, model="m.onnx"):
        before = len(computed)
        found, out = figures(folder, *options, model=model)
        assert "%d of 8 rows were in costs" % (8 - len(computed) + before) in out
        return found, len(computed) - before

    assert again(*CALIBRATION) == (rows, 0)
    assert again(*CALIBRATION + ["--nv12", "jpeg"])[1] == 1
    found, count = again("--nv12", "jpeg")
    assert count == 2 and "calibrated on 12 images, 12 of them among these, so the drop may be too small" in found["INT8"]["why"]
    (folder / "costs" / "AIPP.logits").write_bytes((folder / "costs" / "AIPP.logits").read_bytes()[:300])  # damaged
    assert again("--nv12", "jpeg")[1] == 1
    write_network(folder / "other.onnx", dict(weights(), **{"classifier.bias": np.zeros(ATTRIBUTES, np.float32)}))
    assert again(model="other.onnx")[1] == 8
    assert again(*CALIBRATION)[1] == 8
    with Image.open(str(folder / "images" / "im5.png")) as image:
        image.rotate(180).save(str(folder / "images" / "im5.png"))
    assert again(*CALIBRATION)[1] == 8


def test_an_interrupted_run_goes_on(folder, computed, monkeypatch):
    compute = costs.compute
    with monkeypatch.context() as patch:
        patch.setattr(costs, "compute", lambda *more: compute(*more) if len(computed) < 3 else pytest.fail("stopped"))
        with pytest.raises(pytest.fail.Exception):
            run(folder)
    assert "3 of 8 rows were in costs" in figures(folder)[1] and len(computed) == 8


def test_models_of_a_batch_and_of_probabilities_have_the_same_figures(folder):
    expected, _ = figures(folder, *CALIBRATION)
    write_network(folder / "bs8.onnx", weights(), 8)
    model = onnx.load(str(folder / "m.onnx"))
    model.graph.node[-1].output[0] = "logits"
    model.graph.node.append(helper.make_node("Sigmoid", ["logits"], ["output1"], "sigmoid"))
    onnx.save(model, str(folder / "sigmoid.onnx"))
    for name in ("bs8.onnx", "sigmoid.onnx"):
        done = run(folder, "--json", "other.json", *CALIBRATION, model=name)
        assert done.returncode == 0 and ("probabilities are converted" in done.stderr) == (name == "sigmoid.onnx")
        for row in json.loads((folder / "other.json").read_text())["rows"]:
            if name == "bs8.onnx" or "float16" not in row["name"]:  # a probability's float16 is another
                assert row["max_difference"] == pytest.approx(expected[row["name"]]["max_difference"], rel=1e-3, abs=1e-5), row["name"]


def test_an_int8_twin_with_aipp_still_simulates(folder):
    model = onnx.load(str(folder / "m.onnx"))
    quantized = costs.int8_twin(model, "m.onnx", [str(folder / "val" / "v0.png")], (1, SIZE, SIZE))
    row, = (row for row in costs.rows("709", "") if row.name == "INT8 + AIPP")
    both = costs.twin(quantized, row, "m.onnx")
    assert SIMULATES in {entry.key for entry in both.metadata_props}
    assert [node.op_type for node in both.graph.node].count("QuantizeLinear") == 4
    assert len(model.graph.node) == 9  # it is not changed itself


def test_what_cannot_be_compared_is_refused(folder):
    check_error(run(folder, "--calibration-list", "val.txt"), "--calibration-images and --calibration-list go together", code=2)
    make_twin(folder / "m.onnx", folder / "a.onnx", "aipp")
    check_error(run(folder, model="a.onnx"), "a.onnx: does not take float32; give the model without AIPP")
    (folder / "image.txt").write_text("im0.png\nim1.png\nim2.png")
    (folder / "images" / "im1.png").write_bytes(b"no image")
    (folder / "images" / "im2.png").write_bytes(b"")
    check_error(run(folder, *CALIBRATION), "2 of 3 images cannot be read: images/im1.png: ", "images/im2.png: ")
    check_error(run(folder), "images/im1.png: cannot be read for INT8's calibration")
    (folder / "image.txt").write_text("im0.png\n")
    (folder / "label.json").write_text("{}")
    check_error(run(folder), "label.json: ")
    (folder / "label.json").write_text(json.dumps({"im0.png": [1] * ATTRIBUTES}))
    large = {name: array * np.float32(2.0 ** (15 if name.startswith("conv1") else 0)) for name, array in weights().items()}
    write_network(folder / "large.onnx", large)
    check_error(run(folder, *CALIBRATION, model="large.onnx"), "float16: NaN or infinite logits for 1 of 1 images: images/im0.png; tools/")
    write_model(folder / "odd.onnx", size=(16, 15), attributes=ATTRIBUTES)
    check_error(run(folder, model="odd.onnx"), "NV12 needs an even height and width")
    assert not (folder / "costs.json").exists()
