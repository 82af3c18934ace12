"""Stage 7: what it prints and writes, and the label and result files that it refuses."""
import json

import numpy as np
import pytest

from helpers import INSTANCE, POSTPROCESS, check_error, independent, random_case, script, write_case
from lib.labels import ASSUMED, PETA, attribute_names, read_labels
from lib.results import probabilities


def test_the_screen_and_the_file_show_the_metrics(tmp_path):
    logits, labels = random_case()
    labels[:, 3], labels[:, 7] = 0, 1
    result, label = write_case(tmp_path, logits[:280], labels)
    done = script(POSTPROCESS, result + "/", label, "--per-attribute", "--published", "20", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    instance, per_attribute, mean = independent(logits[:280].tolist(), labels[:280].tolist())
    lines = done.stdout.split("\n")
    assert [line.split(": ")[0] for line in lines[:5]] == INSTANCE + ["mA"]
    assert [float(line.split(": ")[1]) for line in lines[:5]] == pytest.approx(instance + [mean], rel=0, abs=1e-12)
    assert [line.split()[0] for line in lines[6:41]] == PETA
    assert lines[6].split()[3] == "%.6f" % per_attribute[0][0] and lines[9].split()[3] == "-"
    assert lines[41] == "scored 280 images; 20 labelled images had no result"
    assert lines[42].endswith(": personalLarger60, upperBodyCasual") and lines[43] == ASSUMED

    def constant(name):
        raise AssertionError(name)  # NaN and Infinity are not JSON
    report = json.loads((tmp_path / "fusion_result.json").read_text(), parse_constant=constant)
    assert [report[name] for name in INSTANCE + ["mA"]] == [float(line.split(": ")[1]) for line in lines[:5]]
    assert (report["images"], report["labelled_images_without_result"]) == (280, 20)
    assert report["published_acc"] == 0.2 and report["drop"] == 0.2 - report["instance_acc"]
    assert report["attributes_without_label_acc"] == ["personalLarger60", "upperBodyCasual"]
    assert [row["name"] for row in report["attributes"]] == PETA and report["names_assumed"] is True
    for row, (positive, negative), column in zip(report["attributes"], per_attribute, labels[:280].T):
        assert (row["positives"], row["negatives"]) == (column.sum(), (1 - column).sum())
        assert (row["label_pos_acc"] is None) == (positive is None) and (row["label_neg_acc"] is None) == (negative is None)
        both = positive is not None and negative is not None
        assert row["label_acc"] == (pytest.approx((positive + negative) / 2, rel=0, abs=1e-12) if both else None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fusion_result.json", "label.json", "result"]


def test_both_interfaces_give_the_same(tmp_path):
    result, label = write_case(tmp_path, *random_case())
    first = script(POSTPROCESS, result, label, cwd=tmp_path)
    text = (tmp_path / "fusion_result.json").read_text()
    second = script(POSTPROCESS, "--npu_result=" + result, "--label_file=" + label, cwd=tmp_path)
    assert first.returncode == second.returncode == 0
    assert first.stdout == second.stdout and text == (tmp_path / "fusion_result.json").read_text()
    check_error(script(POSTPROCESS, result, cwd=tmp_path), "RESULT_DIR and LABEL", code=2)
    check_error(script(POSTPROCESS, result, label, "--label_file", label, cwd=tmp_path), "not both", code=2)


@pytest.mark.parametrize("published, images, drop", [(1.0, 5, 0.0), (0.79, 4, 0.01), (0.795, 4, 0.015)])
def test_a_drop_of_more_than_1_percent_is_an_error(tmp_path, published, images, drop):
    hits = int(round(100 * (published - drop)))  # each image has 100 attributes, of which the model finds this many
    logits = np.where(np.arange(100) < hits, 2, -1)[None].repeat(images, axis=0)
    result, label = write_case(tmp_path, logits, np.ones((images, 100), int))
    done = script(POSTPROCESS, result, label, "--published", published, cwd=tmp_path)
    assert json.loads((tmp_path / "fusion_result.json").read_text())["drop"] == pytest.approx(drop, abs=1e-12)
    assert ("drop %.2f %%" % (100 * drop)) in done.stdout
    if drop > 0.011:
        check_error(done, "more than 1 % below the published 0.7950")
    else:
        assert done.returncode == 0, done.stderr


def test_probabilities_must_be_declared(tmp_path):
    logits, labels = random_case()
    result, label = write_case(tmp_path, logits, labels)

    def scored(*options):
        assert script(POSTPROCESS, result, label, *options, cwd=tmp_path).returncode == 0
        return json.loads((tmp_path / "fusion_result.json").read_text())

    expected = scored()
    check_error(script(POSTPROCESS, result, label, "--values=probabilities", cwd=tmp_path), "values below 0 or above 1")
    write_case(tmp_path, probabilities(logits), labels)
    check_error(script(POSTPROCESS, result, label, cwd=tmp_path), "look like probabilities", "--values probabilities")
    assert scored("--values", "probabilities") == dict(expected, values="probabilities") and expected["values"] == "logits"
    assert scored("--values=logits")["instance_recall"] == 1  # every image is predicted to have every attribute


@pytest.mark.parametrize("attributes, extension, output, prefix", [(26, ".png", 0, ""), (51, ".a.jpeg", 1, "train/seq1/")])
def test_data_sets_with_other_attributes_and_names_are_scored(tmp_path, attributes, extension, output, prefix):
    logits, labels = random_case(attributes=attributes)
    result, label = write_case(tmp_path, logits, labels, extension, output, prefix)
    names = tmp_path / "names.txt"
    names.write_text("".join("a %d\n" % i for i in range(attributes)) + "\n")
    done = script(POSTPROCESS, result, label, "--attributes", names, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "fusion_result.json").read_text())
    assert [row["name"] for row in report["attributes"]] == ["a %d" % i for i in range(attributes)]
    assert report["names_assumed"] is False and ASSUMED not in done.stdout
    assert report["instance_acc"] == pytest.approx(independent(logits.tolist(), labels.tolist())[0][0], abs=1e-12)


def test_the_names_of_attributes_are_checked(tmp_path):
    assert attribute_names(35) == PETA and attribute_names(2) == ["attribute0", "attribute1"]
    names = tmp_path / "names.txt"
    for content, message in ((b"a\nb\n", "names.txt: holds 2 names, but there are 3 attributes"),
                             (b"a\nb\na\n", "names.txt: holds a name more than once: a"), (b"a\nb\n\xff\n", "names.txt: is not UTF-8")):
        names.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            attribute_names(3, str(names))


def test_labels_are_read(tmp_path):
    path = tmp_path / "label.json"
    path.write_text('\ufeff{"a.png": [0.0, 1], "b.png": [1, 1e0]}', encoding="utf-8")
    rows, labels = read_labels(str(path))
    assert rows == {"a": 0, "b": 1} and labels.tolist() == [[0, 1], [1, 1]] and labels.dtype == np.uint8


@pytest.mark.parametrize("text, message", [
    ('{"a.png": [0, 1], "b.png": [0, 2]}', "'b.png': its label is not a list of 0 and 1"),
    ('{"a.png": [0, 1], "b.png": [0, 1%s]}' % ("0" * 400), "'b.png'"),
    ('{"a.png": [0, 1], "b.png": [0, NaN]}', "'b.png'"),
    ('{"a.png": [0, 1], "b.png": ["0", "1"]}', "'b.png'"),
    ('{"a.png": [0, 1], "b.png": {"0": 1}}', "'b.png'"),
    ('{"a.png": []}', "'a.png'"),
    ('{"a.png": [0, 1], "b.png": [0, 1, 1]}', "'b.png' has 3 values, but the rows before it have 2"),
    ('{"a.png": [0, 1], "b.png": [1, 1], "a.png": [0, 1]}', "'a.png' and 'a.png' are the same image"),
    ('{"a.png": [0, 1], "x/a.jpg": [0, 1]}', "'a.png' and 'x/a.jpg' are the same image"),
    ('{}', "is not {image file name"),
    ('[[0, 1]]', "is not {image file name"),
    ('{"a.png": [0, 1]', "is not JSON"),
    ('{"a.png": ' + "[" * 100000, "is not JSON"),
])
def test_wrong_labels_are_refused(tmp_path, text, message):
    path = tmp_path / "label.json"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        read_labels(str(path))
    assert str(error.value).startswith(str(path)) and message in str(error.value) and "\n" not in str(error.value)


def test_errors_of_the_label_file_are_one_line(tmp_path):
    result, label = write_case(tmp_path, [[2, 2]], [[0, 1]])
    check_error(script(POSTPROCESS, result, tmp_path / "absent.json", cwd=tmp_path), "absent.json: no such file")
    (tmp_path / "label.json").write_text('{"00000.png": [0, 0]}')
    check_error(script(POSTPROCESS, result, label, cwd=tmp_path), "no image has any true attribute")
    check_error(script(POSTPROCESS, result, label, "--attributes", label, cwd=tmp_path), "holds 1 names, but there are 2")
    assert not (tmp_path / "fusion_result.json").exists()


def test_several_folders_are_one_set(tmp_path):
    logits, labels = random_case(images=40)
    result, label = write_case(tmp_path, logits, labels)
    other = tmp_path / "other"
    other.mkdir()
    whole = script(POSTPROCESS, result, label, cwd=tmp_path).stdout
    for i in range(0, 40, 3):
        (tmp_path / "result" / ("%05d_1.bin" % i)).rename(other / ("%05d_0.bin" % i))
    assert script(POSTPROCESS, result, other, label, cwd=tmp_path).stdout == whole
    (tmp_path / "result" / "00003_1.bin").write_bytes(logits[3].tobytes())
    check_error(script(POSTPROCESS, result, other, label, cwd=tmp_path), "1 images have two results", "00003_1.bin",
                "00003_0.bin")


def test_wrong_results_are_refused(tmp_path):
    logits, labels = random_case(images=8)
    result, label = write_case(tmp_path, logits, labels[:6])
    check_error(script(POSTPROCESS, result, label, cwd=tmp_path), "2 of 8 results have no label", "00006_1.bin", "00007_1.bin")
    result, label = write_case(tmp_path, logits, labels)
    file = tmp_path / "result" / "00002_1.bin"
    nan, infinite = (np.full(35, value, "<f4").tobytes() for value in (np.nan, -np.inf))
    for content, message in ((bytes(136), "00002_1.bin (136 bytes)"), (b"", "00002_1.bin (0 bytes)"),
                             (nan, "hold NaN or infinite"), (infinite, "hold NaN or infinite")):
        file.write_bytes(content)
        check_error(script(POSTPROCESS, result, label, cwd=tmp_path), "1 of 8 results ", "00002_1.bin", message)
    file.write_bytes(logits[2].tobytes())
    for stray in ("_1.bin", "00002.bin", "00002_2.bin"):
        (tmp_path / "result" / stray).write_bytes(bytes(140))
        check_error(script(POSTPROCESS, result, label, cwd=tmp_path), stray + ": is not a result file")
        (tmp_path / "result" / stray).unlink()
    assert not (tmp_path / "fusion_result.json").exists()
    (tmp_path / "empty").mkdir()
    check_error(script(POSTPROCESS, tmp_path / "empty", label, cwd=tmp_path), "empty: has no result file")
    check_error(script(POSTPROCESS, tmp_path / "absent", label, cwd=tmp_path), "absent: no such folder")


def test_results_must_be_of_the_listed_images(tmp_path):
    result, label = write_case(tmp_path, np.full((8, 2), 2), [[0, 1]] * 20)
    command = [POSTPROCESS, result, label, "--image_list=image.txt"]
    for images, message in (
            (range(7), "image.txt: 1 of 8 results are of other images (00007); run stages 4 to 6 again"),
            (range(20), "image.txt: 12 of its 20 images have no result (00008, 00009, 00010, 00011, 00012 and 7 more); run"),
            (range(3, 9), "1 of its 6 images have no result (00008), and 3 of 8 results are of other images (00000, 00001, 00002); run"),
            ([], "names no image")):
        (tmp_path / "image.txt").write_text("".join("%05d.png\n" % i for i in images))
        check_error(script(*command, cwd=tmp_path), message)
    assert not (tmp_path / "fusion_result.json").exists()
    (tmp_path / "image.txt").write_bytes(b"\xef\xbb\xbf" + b"".join(b"sub/%05d.png\r\n\r\n" % i for i in range(8)))
    process = script(*command, cwd=tmp_path)
    assert process.returncode == 0 and "scored 8 images" in process.stdout, process.stderr
