"""tools/thresholds.py: the best threshold by trying all, an honest gain, and what the other scripts do with its file."""
import json

import numpy as np
import pytest
from PIL import Image

import thresholds
from helpers import INSTANCE, POSTPROCESS, check_error, independent, parse_predictions, script, write_case, write_images, write_model
from lib import metrics

TOOL = "tools/thresholds.py"


def random_run(images, attributes=6, seed=0):
    """Returns logits and labels whose best thresholds lie between 0 and -3. The rarer an attribute, the lower is its threshold."""
    random = np.random.RandomState(seed)
    rare = np.linspace(0.5, 0.04, attributes)
    true = random.random_sample((images, attributes)) < rare
    logits = 1.5 * true * 2 + np.log(rare / (1 - rare)) - 1.5 + random.standard_normal(true.shape)
    return logits.astype("<f4"), true.astype(int)


def run(name, folder, *arguments):
    """Runs a script; returns what it prints. Raises ValueError with its error."""
    process = script(name, *arguments, cwd=folder)
    if process.returncode:
        check_error(process)
        raise ValueError(process.stderr)
    return process.stdout


def tune(folder, *arguments):
    screen = run(TOOL, folder, *arguments)
    return json.loads((folder / "thresholds.json").read_text()), screen


def score(folder, *arguments):
    screen = run(POSTPROCESS, folder, *arguments)
    return json.loads((folder / "fusion_result.json").read_text()), screen


@pytest.mark.parametrize("goal", [{}, {"precision": 0.7}, {"recall": 0.9}], ids=str)
def test_no_other_threshold_is_better(goal):
    """Tries every logit as the threshold; several are equal."""
    random = np.random.RandomState(0)
    for _ in range(40):
        logits = np.round(random.standard_normal(30), 1).astype(np.float32)
        true = random.random_sample(30) < 0.3
        true[:1] = True

        def value(threshold):
            predicted = logits >= threshold
            tp = (predicted & true).sum()
            precision, recall = tp / max(1, predicted.sum()), tp / true.sum()
            if "precision" in goal:
                return recall if precision >= 0.7 else -1
            if "recall" in goal:
                return precision if recall >= 0.9 else -1
            return 2 * precision * recall / (precision + recall) if precision + recall else 0

        best = max(map(value, np.unique(logits)))
        found = thresholds.find_threshold(logits, true, **goal)
        assert found is None if best < 0 else value(found) == pytest.approx(best, abs=1e-12)
        assert found is None or found.dtype == np.float32 and (found not in logits or found == logits.min())


def test_thresholds_of_neighbouring_and_of_huge_logits_are_right():
    low = np.float32(1)
    high = np.nextafter(low, np.float32(2))
    assert thresholds.find_threshold(np.array([low, high]), np.array([False, True])) == high  # nothing lies between them
    huge = np.array([3e38, 2e38], np.float32)
    assert 2e38 < thresholds.find_threshold(huge, np.array([True, False])) < 3e38


def test_the_gain_is_honest():
    """On average, it is a little less than on new images, because four fifths of the images give worse thresholds than all.

    The gain on the images that the thresholds were found on is larger than that on new ones.
    """
    def mean_f1(predicted, true):
        return metrics.score(predicted, true)[0]["label_F1"]

    new_logits, new_labels = random_run(20000, seed=99)
    new_true, tunable, gains = new_labels == 1, np.ones(6, bool), []
    new_at_0 = mean_f1(new_logits >= 0, new_true)
    for seed in range(40):
        logits, labels = random_run(400, seed=seed)
        true = labels == 1
        found, _ = thresholds.find_thresholds(logits, true, tunable, {})
        at_0 = mean_f1(logits >= 0, true)
        gains.append([mean_f1(thresholds.cross_validate(logits, true, tunable, {}, np.arange(400)), true) - at_0,
                      mean_f1(logits >= found, true) - at_0, mean_f1(new_logits >= found, new_true) - new_at_0])
    reported, optimistic, real = np.mean(gains, axis=0)
    assert 0.15 < real - 0.02 < reported < real + 0.005 < real + 0.015 < optimistic


def test_the_file_and_the_screen_show_the_thresholds_and_the_gain(tmp_path):
    logits, labels = random_run(300)
    labels[:, 4] = 0
    labels[:9, 4] = 1
    result, label = write_case(tmp_path, logits, labels)
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\ne\nf\n")
    content, screen = tune(tmp_path, result, label, "--attributes", "names.txt")
    assert [row["name"] for row in content["attributes"]] == list("abcdef") and content["names_assumed"] is False
    assert (content["goal"], content["images"], len(content["tuned_on"])) == ("maximal F1", 300, 300)
    row = content["attributes"][4]
    assert row["threshold"] == 0 and row["tuned"] is False and row["at_0"] == row["cross_validated"]
    assert "thresholds.json: maximal F1, 5 of 6 attributes tuned on 300 images\n" in screen
    assert "stay at 0 (fewer than 10 images have it, or do not have it): e\n" in screen
    values = content["gain"]["label_F1"]
    assert values["interval"][0] < values["gain"] < values["interval"][1] and values["gain"] > 0.05
    assert values["gain"] == values["tuned"] - values["at_0"]
    assert "  label_F1           %.4f -> %.4f  %+.4f (%+.4f to %+.4f)\n" % (
        (values["at_0"], values["tuned"], values["gain"]) + tuple(values["interval"])) in screen
    of_0, _ = score(tmp_path, result, label)
    for name in INSTANCE + ["mA"]:
        assert content["gain"][name]["at_0"] == pytest.approx(of_0[name], abs=1e-12)
    logits[np.flatnonzero(labels[:, 5] == 0)[0], 5] = 9  # the largest logit is wrong, and few images have the attribute
    result, label = write_case(tmp_path / "other", logits, labels)
    other, screen = tune(tmp_path, result, label, "--target-precision", 0.95)
    assert other["names_assumed"] is True
    assert other["goal"] == "precision >= 0.95" and "stay at 0 (target not reached): attribute5\n" in screen
    content, _ = tune(tmp_path, result, label, "--target-recall", 0.9)
    found = [row["cross_validated"]["recall"] for row in content["attributes"] if row["tuned"]]
    assert content["goal"] == "recall >= 0.9" and abs(np.mean(found) - 0.9) < 0.05


def test_the_interval_of_the_gain_holds_the_true_one():
    """That of these thresholds on new images."""
    new_logits, new_labels = random_run(20000, seed=99)
    of_0, held = metrics.score(new_logits >= 0, new_labels == 1)[0], []
    for seed in range(20):
        logits, labels = random_run(400, seed=seed)
        run_of = logits, labels == 1, np.ones(6, bool), {}
        values, _ = thresholds.gain(*run_of, np.arange(400))
        truth = metrics.score(new_logits >= thresholds.find_thresholds(*run_of)[0], new_labels == 1)[0]
        for name in thresholds.GAIN_METRICS:
            low, high = values[name]["interval"]
            held.append(low <= truth[name] - of_0[name] <= high)
    assert np.mean(held) > 0.94  # without the variance of the thresholds, 0.90


def test_groups_are_not_divided():
    """Two copies of each image say no more than one."""
    logits, labels = random_run(200)
    groups = np.random.RandomState(0).permutation(np.repeat(np.arange(200), 2))
    of_one, predicted = thresholds.gain(logits, labels == 1, np.ones(6, bool), {}, np.arange(200))
    of_two, twice = thresholds.gain(logits[groups], labels[groups] == 1, np.ones(6, bool), {}, groups)
    assert (twice == predicted[groups]).all()
    assert [values["interval"] for values in of_two.values()] == [values["interval"] for values in of_one.values()]


def test_thresholds_without_a_gain_are_doubted(tmp_path):
    logits, labels = random_run(300)
    assert script(TOOL, *write_case(tmp_path / "at_0", logits, labels), cwd=tmp_path).stderr == ""
    best, _ = thresholds.find_thresholds(logits, labels == 1, np.ones(6, bool), {})
    for images, options, text in ((100, [], "the gain may be chance, label_F1 "),
                                  (300, ["--target-recall", 0.99], "these thresholds lower label_F1 -0.")):
        case = write_case(tmp_path / str(images), (logits - best)[:images], labels[:images])
        done = script(TOOL, *case, *options, "--output", "found.json", cwd=tmp_path)
        assert done.returncode == 0 and (tmp_path / "found.json").exists()
        assert "note: found.json: " + text in done.stderr and "keep 0 (a probability of 0.5)" in done.stderr, done.stderr


def test_groups_come_from_a_file(tmp_path):
    case = write_case(tmp_path, *random_run(120))
    (tmp_path / "groups.txt").write_text("".join("%05d.png person%d\n" % (i, i // 2) for i in range(120)))
    plain, _ = tune(tmp_path, *case)
    content, _ = tune(tmp_path, *case, "--groups", "groups.txt")
    assert content["gain"]["mA"] != plain["gain"]["mA"]
    alone, _ = score(tmp_path, *case, "--intervals")
    report, _ = score(tmp_path, *case, "--intervals", "--groups", "groups.txt")
    assert report["intervals"] != alone["intervals"] and report["instance_acc"] == alone["instance_acc"]
    assert report["attributes"][0]["label_acc_interval"][0] < alone["attributes"][0]["label_acc_interval"][0]
    for text, message in (("00000.png\n", "line 1 is not 'NAME GROUP': '00000.png'"),
                          ("00000 a\n", "no group for 119 of 120 images: 00001"),
                          ("00000 a\n00000.jpg b\n", "line 2: 00000.jpg already has another group")):
        (tmp_path / "groups.txt").write_text(text)
        for name in (TOOL, POSTPROCESS):
            check_error(script(name, *case, "--groups", "groups.txt", cwd=tmp_path), "groups.txt: ", message)
    (tmp_path / "groups.txt").write_text("".join("%05d a\n" % i for i in range(120)))
    check_error(script(TOOL, *case, "--groups", "groups.txt", cwd=tmp_path), "fewer than 10 groups")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Thresholds that were tuned on val/, for the images of test/: (thresholds, logits, labels, stage 7's arguments)."""
    folder = tmp_path_factory.mktemp("tuned")
    content, _ = tune(folder, *write_case(folder / "val", *random_run(300)))
    found = np.array([row["threshold"] for row in content["attributes"]])
    assert (found < 0).all()
    logits, labels = random_run(120, seed=1)
    return found, logits, labels, write_case(folder / "test", logits, labels, first=5000) + ("--thresholds", folder / "thresholds.json")


def test_stage_7_scores_with_the_thresholds_and_judges_the_drop_at_0(tmp_path, tuned):
    found, logits, labels, options = tuned
    report, screen = score(tmp_path, *options)
    instance, _, mean = independent((logits - found).tolist(), labels.tolist())
    assert [report[name] for name in INSTANCE + ["mA"]] == pytest.approx(instance + [mean], rel=0, abs=1e-12)
    at_0, plain = score(tmp_path, *options[:2])
    assert report["instance_acc"] > at_0["instance_acc"] + 0.05 and report["instance_acc_at_0"] == at_0["instance_acc"]
    assert [row["threshold"] for row in report["attributes"]] == found.tolist()
    assert {row["threshold"] for row in at_0["attributes"]} == {0} and at_0["thresholds"] is None
    assert report["thresholds"]["images"] == 300 and ", tuned for maximal F1 on 300 other images\n" in screen
    assert "thresholds" not in plain
    # The published accuracy is at 0, so better thresholds must not hide a drop by the conversion.
    done = script(POSTPROCESS, *options, "--published", at_0["instance_acc"] + 0.02, cwd=tmp_path)
    check_error(done, "instance_acc %.4f is more than 1 %% below" % at_0["instance_acc"])
    assert "accuracy at a logit of 0 %.2f %%, " % (100 * at_0["instance_acc"]) in done.stdout


def test_probabilities_are_scored_with_the_thresholds(tmp_path, tuned):
    _, logits, labels, options = tuned
    expected, _ = score(tmp_path, *options)
    write_case(tmp_path / "p", 1 / (1 + np.exp(-logits)), labels, first=5000)
    report, _ = score(tmp_path, tmp_path / "p" / "result", *options[1:], "--values", "probabilities")
    assert [report[name] for name in INSTANCE] == [expected[name] for name in INSTANCE]


def test_images_that_thresholds_were_tuned_on_are_not_scored(tmp_path, tuned):
    _, logits, labels, options = tuned
    val = options[3].parent / "val"
    both = dict(json.loads((val / "label.json").read_text()), **{"%05d" % i: row.tolist() for i, row in enumerate(labels, 5000)})
    (tmp_path / "both.json").write_text(json.dumps(both))
    message = "thresholds.json: was tuned on images with the names and labels of 300 of these %d (00000, 000"
    for images, *files in ((300, val / "result", val / "label.json"), (420, options[0], val / "result", tmp_path / "both.json")):
        done = script(POSTPROCESS, *files, *options[2:], cwd=tmp_path)
        check_error(done, message % images, "the test split's", "run_all.sh records them")
    assert not (tmp_path / "fusion_result.json").exists()
    # Other images may have the same names.
    score(tmp_path, *write_case(tmp_path / "same_names", logits, labels), *options[2:])
    # run_all.sh checks this before any work.
    (tmp_path / "image.txt").write_text("".join("%05d.png\n" % i for i in range(300)))
    lists = ["lists", "--image-list", "image.txt", "--label-file", val / "label.json"]
    check_error(script("tools/run/inputs.py", *lists, *options[2:], cwd=tmp_path), message % 300)


def work_folder(folder, prefix, contents, logits, labels):
    """Writes a work folder of run_all.sh with its records. Returns its folder of results and its labels."""
    result = folder / "result" / "dumpOutput_device0"
    for path in (folder / "images", folder / "input_bin", result):
        path.mkdir(parents=True)
    names = ["%s%05d.png" % (prefix, i) for i in range(len(logits))]
    for name, content, row in zip(names, contents, logits):
        (folder / "images" / name).write_text(content)
        (result / name.replace(".png", "_1.bin")).write_bytes(row.tobytes())
    (folder / "image.txt").write_text("".join(name + "\n" for name in names))
    (folder / "deepmar.info").write_text(prefix)
    (folder / "label.json").write_text(json.dumps(dict(zip(names, labels.tolist()))))
    for made in ((4, "input_bin", "image_list", "images"), (5, "deepmar.info", "input_bin"),
                 (6, "result/dumpOutput_device0", "deepmar.info")):
        run("tools/run/inputs.py", folder, "made", *made, "--", "image_list=image.txt", "images=images")
    return result, folder / "label.json"


def test_checksums_tell_the_images_that_thresholds_were_tuned_on(tmp_path):
    logits, labels = random_run(300)
    contents = ["image %d" % i for i in range(300)]
    tune(tmp_path, *work_folder(tmp_path / "val", "", contents, logits, labels))
    options = ["--thresholds", tmp_path / "thresholds.json"]
    # The same images under other names and with other labels are known.
    renamed = work_folder(tmp_path / "renamed", "a_", contents, logits, 1 - labels)
    message = "thresholds.json: was tuned on 300 of these 300 images (a_00000, "
    check_error(script(POSTPROCESS, *renamed, *options, cwd=tmp_path), message)
    lists = ["lists", "--image-list", "image.txt", "--images", "images", "--label-file", "label.json"]
    check_error(script("tools/run/inputs.py", *lists, *options, cwd=tmp_path / "renamed"), message)
    # Others of the same names and with the same labels are not refused. A data set may hold a few images twice.
    contents[3:] = ["other %d" % i for i in range(3, 300)]
    others = work_folder(tmp_path / "others", "", contents, logits, labels)
    done = script(POSTPROCESS, *others, *options, cwd=tmp_path)
    assert done.returncode == 0 and "was tuned on 3 of these 300 images (00000, 00001, 00002)\n" in done.stderr, done.stderr
    # Without the records of just these results, names and labels decide.
    (tmp_path / "others" / "deepmar.info").write_text("of other bins")
    run("tools/run/inputs.py", tmp_path / "others", "made", 5, "deepmar.info", "input_bin")
    done = script(POSTPROCESS, *others, *options, cwd=tmp_path)
    check_error(done, "names and labels of 300 of these 300", "no checksums of these images")


def test_predict_marks_attributes_by_the_thresholds(tmp_path):
    paths = [tmp_path / "images" / name for name in write_images(tmp_path / "images", 3)]
    options = ["--onnx", write_model(tmp_path / "m.onnx", attributes=3)]
    plain = parse_predictions(run("tools/predict.py", tmp_path, *paths + options))[str(paths[0])]
    middle = float(sorted(logit for _, _, _, logit in plain)[1])
    (tmp_path / "t.json").write_text(json.dumps({
        "attributes": [{"name": name, "threshold": middle} for name in ("hat", "bag", "coat")], "names_assumed": False,
        "goal": "maximal F1", "images": 5, "checksum": "0", "tuned_on": {}}))
    rows = parse_predictions(run("tools/predict.py", tmp_path, *paths + options, "--thresholds", "t.json", "--save", "out"))[str(paths[0])]
    assert [row[3] for row in rows] == [row[3] for row in plain]
    assert [row[0] for row in rows] == [True, True, False] and {row[2] for row in rows} == {"hat", "bag", "coat"}


def test_report_shows_the_thresholds(tmp_path, tuned):
    found, _, _, options = tuned
    names = ["%05d.png" % i for i in range(5000, 5120)]
    (tmp_path / "image.txt").write_text("".join(name + "\n" for name in names))
    (tmp_path / "images").mkdir()
    for name in names:
        Image.new("RGB", (6, 15)).save(str(tmp_path / "images" / name))
    fusion, _ = score(tmp_path, *options, "--published", "0.5")

    def page(*more):
        run("tools/report.py", tmp_path, "--images", "images", "--results", options[0], "--labels", options[1], *more)
        return (tmp_path / "report.html").read_text()

    expected = page()
    for text in ("tuned for maximal F1 on 300 other images", ">%.3f</td>" % found[0], " at a logit of 0, published 50.00",
                 'data-metric="mA">%s<' % fusion["mA"]):
        assert text in expected, text
    assert page("--thresholds", options[3]) == expected
    score(tmp_path, *options[:2])
    assert "tuned for" not in page()
    with pytest.raises(ValueError, match="fusion_result.json: its instance_acc is "):
        page("--thresholds", options[3])


def test_thresholds_of_other_attributes_and_bad_files_are_refused(tmp_path, tuned):
    options = tuned[3][:3] + (tmp_path / "thresholds.json",)
    good = json.loads(tuned[3][3].read_text())
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\ne\nf\n")

    def names(content, *more):
        options[3].write_text(json.dumps(content))
        return "".join(row["name"] for row in score(tmp_path, *(options + more))[0]["attributes"])

    assert names(good, "--attributes", "names.txt") == "abcdef"  # those of the thresholds were only assumed
    good["names_assumed"] = False
    with pytest.raises(ValueError, match=r"holds the thresholds of other attributes \(attribute0, .* than these \(a, b"):
        names(good, "--attributes", "names.txt")
    for row, name in zip(good["attributes"], "ABCDEF"):
        row["name"] = name
    assert names(good) == "ABCDEF"  # and here those of the results
    text = json.dumps(good)
    for change in (lambda c: c.pop("tuned_on"), lambda c: c["attributes"].pop(), lambda c: c["attributes"][0].update(threshold="1"),
                   lambda c: c["attributes"][0].update(threshold=float("nan"))):
        content = json.loads(text)
        change(content)
        with pytest.raises(ValueError, match="thresholds.json: (is not what tools|holds the thresholds of other)"):
            names(content)


def test_too_few_images_and_wrong_arguments_are_errors(tmp_path):
    few = write_case(tmp_path / "few", *random_run(19))
    check_error(script(TOOL, *few, cwd=tmp_path), "label.json: has no attribute that at least 10 images have and as many do not have")
    for wrong in (["--target-precision", "0"], ["--target-recall", "1.1"], ["--target-recall", "0.5", "--target-precision", "1"]):
        check_error(script(TOOL, *few, *wrong), code=2)
    assert not (tmp_path / "thresholds.json").exists()
