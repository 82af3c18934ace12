"""tools/compare.py: the figures by hand and against independent ones, the tolerances, and the side it computes."""
import json

import numpy as np
import pytest

import compare
from helpers import check_error, independent, run_stage_6, script, write_bins, write_images, write_model
from lib.labels import ASSUMED, PETA
from lib.results import probabilities

TOOL = "tools/compare.py"


def write(folder, logits, output=1):
    folder.mkdir(exist_ok=True)
    for i, row in enumerate(logits):
        (folder / ("im%d_%d.bin" % (i, output))).write_bytes(np.asarray(row, "<f4").tobytes())
    return folder


def random_logits(images=40, attributes=35, seed=0):
    return np.random.RandomState(seed).standard_normal((images, attributes)).astype("<f4")


def test_figures_by_hand():
    a = np.array([[1, -1, 2], [0, -3, 1], [0, 0, 0]], np.float32)
    b = np.array([[1, 1, 2], [-0.5, -3, 1], [0, 0, 0]], np.float32)
    report = compare.compare(a, b, ["x", "y", "z"], ["tall", "old", "wet"])
    assert (report["images"], report["attributes"], report["decisions"]) == (3, 3, 9)
    assert report["max_difference"] == 2 and report["mean_difference"] == pytest.approx(2.5 / 9, abs=1e-15)
    assert report["cosine_similarity"] == pytest.approx((1 - 1 + 4 + 0 + 9 + 1) / np.sqrt(16 * 16.25), abs=1e-15)
    assert report["lowest_cosine_similarity"] == pytest.approx(4 / 6, abs=1e-15)
    assert report["lowest_cosine_similarity_image"] == "x"
    assert (report["flips"], report["images_with_flips"]) == (2, 2)
    assert report["flipped_attributes"] == [{"name": "tall", "flips": 1, "gained": 1, "lost": 0},
                                            {"name": "old", "flips": 1, "gained": 0, "lost": 1}]
    assert [(row["name"], row["max_difference"], row["attribute"], row["flipped"]) for row in report["worst_images"]] == \
        [("x", 2, "old", ["old"]), ("y", 0.5, "tall", ["tall"])]


@pytest.mark.parametrize("a, b, expected", [
    ([0, 0], [0, 0], 1), ([0, 0], [1, 0], 0), ([1, 2], [-1, -2], -1), ([1e38, 1e38], [3e38, 3e38], 1), ([1e-38, 0], [1e-38, 0], 1)])
def test_cosine(a, b, expected):
    with np.errstate(all="raise"):
        value = compare.cosine(np.array(a, np.float64), np.array(b, np.float64))
    assert value == pytest.approx(expected, abs=1e-12) and -1 <= value <= 1


def test_equal_runs(tmp_path):
    logits = random_logits()
    a, b = write(tmp_path / "a", logits), write(tmp_path / "b", logits, output=0)
    done = script(TOOL, a, b, "--max-difference", 0, "--max-flips", 0, "--json", tmp_path / "c.json")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    report = json.loads((tmp_path / "c.json").read_text())
    assert report["max_difference"] == report["mean_difference"] == report["flips"] == 0
    assert report["cosine_similarity"] == 1 and report["within_tolerances"] is True
    assert report["flipped_attributes"] == report["worst_images"] == []
    assert "flips: 0 of 1400, in 0 images" in done.stdout and "within the tolerances" in done.stdout


def test_different_runs(tmp_path):
    logits = random_logits()
    other = logits + 0.05 * random_logits(seed=1)
    other[7, 3] = logits[7, 3] - 4 * np.sign(logits[7, 3])
    labels = (random_logits(seed=2) > 0).astype(int)
    a, b, label = write(tmp_path / "a", logits), write(tmp_path / "b", other), tmp_path / "label.json"
    label.write_text(json.dumps({"x/im%d.jpg" % i: row for i, row in enumerate(labels.tolist() + [[0] * 35])}))
    done = script(TOOL, a, b, "--labels", label, "--json", tmp_path / "c.json")
    flips = (logits >= 0) != (other >= 0)
    check_error(done, "the largest difference 4 is more than 0.1", "%d flips are more than 1 " % flips.sum(), "=mixed_float16, or ")
    report = json.loads((tmp_path / "c.json").read_text())
    assert report["within_tolerances"] is False
    assert {row["name"]: row["flips"] for row in report["flipped_attributes"]} == \
        {name: number for name, number in zip(PETA, flips.sum(axis=0)) if number}
    counts = [row["flips"] for row in report["flipped_attributes"]]
    assert counts == sorted(counts, reverse=True)
    difference = np.abs(logits.astype(float) - other.astype(float))
    assert [row["max_difference"] for row in report["worst_images"]] == sorted(difference.max(axis=1))[:-6:-1]
    of_a, of_b = (independent(values.tolist(), labels.tolist()) for values in (logits, other))
    assert list(report["metrics"]) == ["instance_acc", "instance_precision", "instance_recall", "instance_F1", "mA"]
    for (name, values), x, y in zip(report["metrics"].items(), of_a[0] + [of_a[2]], of_b[0] + [of_b[2]]):
        assert [values["a"], values["b"], values["change"]] == pytest.approx([x, y, x - y], rel=0, abs=1e-12)
        assert values["interval"][0] < values["change"] < values["interval"][1]
        assert "%s: A %.6f, B %.6f, A - B %+.6f (95 %%: %+.6f to %+.6f)\n" % (
            (name, values["a"], values["b"], values["change"]) + tuple(values["interval"])) in done.stdout
    for text in ("  im7: 4 (personalLarger60); flipped: ", "largest difference: 4\n"):
        assert text in done.stdout, done.stdout
    (tmp_path / "groups.txt").write_text("".join("x/im%d.jpg one_person\n" % i for i in range(40)))
    done = script(TOOL, a, b, "--labels", label, "--groups", tmp_path / "groups.txt")
    assert "A - B" in done.stdout and "95 %" not in done.stdout  # there are too few groups


@pytest.mark.parametrize("step, flips, options, code", [
    (0.0625, 1, [], 0), (0.125, 0, [], 1), (0.125, 0, ["--max-difference", "0.125"], 0), (0.0625, 2, [], 1),
    (0.0625, 2, ["--max-flips", 2], 0), (0.0625, 1, ["--max-flips", 0], 1)])
def test_tolerances(tmp_path, step, flips, options, code):
    # 30 images of 35 attributes, 1050 decisions: by default one flip is allowed.
    logits = np.full((30, 35), 2, np.float32)
    logits[5, :3] = step / 2
    other = logits.copy()
    other[9, 9] += step
    other[5, :flips] -= step
    done = script(TOOL, write(tmp_path / "a", logits), write(tmp_path / "b", other), *options)
    assert done.returncode == code, done.stdout + done.stderr
    assert "flips: %d of 1050" % flips in done.stdout
    assert (done.stderr == "") == (code == 0)


def test_probabilities_are_converted_to_logits(tmp_path):
    """As of an OM that ends in a Sigmoid, and an ONNX model that does not."""
    logits = random_logits()
    a, b = write(tmp_path / "a", probabilities(logits)), write(tmp_path / "b", logits)
    done = script(TOOL, a, b, "--max-difference", 1e-5, "--max-flips", 0, "--json", tmp_path / "c.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.startswith("note: %s: all values lie between 0 and 1" % a) and done.stderr.count("\n") == 1
    report = json.loads((tmp_path / "c.json").read_text())
    assert "(%s)\n" % ASSUMED in done.stdout and report["names_assumed"] is True
    assert (report["a_output"], report["b_output"]) == ("probabilities", "logits")


def test_attributes_are_named(tmp_path):
    a, b = write(tmp_path / "a", [[2, 1]]), write(tmp_path / "b", [[2, -1]])
    assert "  attribute1: 1 (only A has it: 1, only B: 0)" in script(TOOL, a, b).stdout
    names = tmp_path / "names.txt"
    names.write_text("tall\nin a hurry\n")
    done = script(TOOL, a, b, "--attributes", names, "--json", tmp_path / "c.json")
    assert "  in a hurry: 1 (" in done.stdout and ASSUMED not in done.stdout
    assert json.loads((tmp_path / "c.json").read_text())["names_assumed"] is False


def test_different_images_are_refused(tmp_path):
    a, b = write(tmp_path / "a", random_logits(9)), write(tmp_path / "b", random_logits(2))
    check_error(script(TOOL, a, b), "b: has nothing for 7 images that the other side has: im2, im3", "and 2 more")
    check_error(script(TOOL, b, a), "b: has nothing for 7 images")


def test_errors(tmp_path):
    logits = random_logits(4)
    a, b, label = write(tmp_path / "a", logits), write(tmp_path / "b", logits[:, :26]), tmp_path / "label.json"
    check_error(script(TOOL, a, b), "b/im0_1.bin (104 bytes)", "35 attributes")
    check_error(script(TOOL, a, tmp_path / "absent"), "absent: no such folder")
    write(b, logits)
    label.write_text(json.dumps({"im%d.png" % i: [1] * 35 for i in (0, 1, 3)}))
    check_error(script(TOOL, a, b, "--labels", label), "label.json: has no label for 1 of 4 images: im2")
    label.write_text(json.dumps({"im%d.png" % i: [1] * 26 for i in range(4)}))
    check_error(script(TOOL, a, b, "--labels", label), "label.json: its rows have 26 attributes, but the model's results have 35")
    (a / "im0_1.bin").write_bytes(bytes(139))
    check_error(script(TOOL, a, b), "a/im0_1.bin: holds no float32 logits (139 bytes)")
    (a / "im0_1.bin").write_bytes(np.full(35, np.nan, "<f4").tobytes())
    check_error(script(TOOL, a, b), "hold NaN", "a/im0_1.bin")
    for arguments in ([a], [a, b, "--onnx", "m.onnx", "--bins", "input_bin"], [a, "--onnx", "m.onnx"],
                      [a, "--bins", "input_bin"], [a, b, "--bins", "input_bin"]):
        check_error(script(TOOL, *arguments), "either B, or --model and --bins", code=2)
    check_error(script(TOOL, a, b, "--max-difference", "nan"), "--max-difference", code=2)
    check_error(script(TOOL, a, b, "--max-flips", "-1"), "--max-flips", code=2)


@pytest.mark.parametrize("batch_size, size", [(1, (224, 224)), (4, (256, 128)), ("N", (224, 224))])
def test_other_side_is_computed_from_bins(tmp_path, batch_size, size):
    names = write_images(tmp_path / "images", 6)
    model = write_model(tmp_path / "m.onnx", batch_size, size=size)
    write_bins(tmp_path, names, *size)
    result = run_stage_6(tmp_path, model, 2 if batch_size == "N" else batch_size, 0, *size)
    command = [TOOL, result, "--onnx", model, "--bins", tmp_path / "input_bin", "--max-flips", 0]
    done = script(*command, "--max-difference", 1e-6)
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    file = result / "im3_1.bin"
    file.write_bytes((np.fromfile(str(file), "<f4") + np.float32(1)).tobytes())
    done = script(*command)
    check_error(done, "the largest difference 1 is more than 0.1")
    assert "worst images:\n  im3: 1 (" in done.stdout


def test_errors_of_the_computed_side(tmp_path):
    names = write_images(tmp_path / "images", 2)
    write_bins(tmp_path, names)
    a, bins = write(tmp_path / "a", random_logits(2)), tmp_path / "input_bin"
    model = write_model(tmp_path / "m.onnx", attributes=26)
    check_error(script(TOOL, a, "--onnx", model, "--bins", bins), "m.onnx: gives 26 attributes", "35")
    check_error(script(TOOL, a, "--onnx", model, "--bins", tmp_path / "absent"), "absent: no such folder")
    (bins / "im1.bin").unlink()
    check_error(script(TOOL, a, "--onnx", model, "--bins", bins), "input_bin: has nothing for 1 images", "im1")
