"""The metrics against an independent computation; their 95 % intervals: how often they hold the truth, and where they are shown."""
import json

import numpy as np
import pytest

from helpers import INSTANCE, POSTPROCESS, independent, random_case, script, write_case
from lib.metrics import (SEED, change_intervals, drawn, evaluate, interval, label_acc_interval, label_counts, metric_intervals,
                         of_attributes, of_images, one_more_error, wilson)

METRICS = INSTANCE + ["mA"]


# --- metrics ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("attributes, seed", [(35, 0), (26, 1), (51, 2), (1, 3)])
def test_metrics_equal_an_independent_computation(attributes, seed):
    logits, labels = random_case(attributes=attributes, seed=seed)
    metrics, figures = evaluate(logits, labels)
    instance, per_attribute, mean = independent(logits.tolist(), labels.tolist())
    assert [metrics[name] for name in INSTANCE] == pytest.approx(instance, rel=0, abs=1e-12)
    assert metrics["mA"] == pytest.approx(mean, rel=0, abs=1e-12)
    positive, negative = np.array(per_attribute, float).T  # None becomes NaN
    for name, expected in (("label_pos_acc", positive), ("label_neg_acc", negative),
                           ("label_acc", (positive + negative) / 2)):
        np.testing.assert_allclose(figures[name], expected, rtol=0, atol=1e-12)
    assert (figures["positives"] == labels.sum(axis=0)).all()
    assert (figures["negatives"] == (1 - labels).sum(axis=0)).all()


def test_metrics_equal_those_by_hand():
    # One true positive of two and a false one; no true attribute (left out); nothing predicted (precision 0); all right.
    labels = [[1, 1, 0], [0, 0, 0], [1, 0, 0], [0, 1, 0]]
    logits = [[2, -2, 1], [5, 5, 5], [-1, -1, -1], [-1, 0, -1]]
    metrics, figures = evaluate(logits, labels)
    assert metrics["instance_acc"] == pytest.approx((1 / 3 + 0 + 1) / 3, abs=1e-15)
    assert metrics["instance_precision"] == pytest.approx((1 / 2 + 0 + 1) / 3, abs=1e-15)
    assert metrics["instance_recall"] == pytest.approx((1 / 2 + 0 + 1) / 3, abs=1e-15)
    assert metrics["mA"] == pytest.approx(((1 / 2 + 1 / 2) / 2 + (1 / 2 + 1 / 2) / 2) / 2, abs=1e-15)
    assert np.isnan(figures["label_acc"][2]) and np.isnan(figures["label_pos_acc"][2])
    assert figures["label_neg_acc"][2] == 0.5
    metrics, _ = evaluate([[1, -1]], [[0, 1]])  # nothing is right
    assert [metrics[name] for name in INSTANCE] == [0, 0, 0, 0] and metrics["mA"] is None


# --- intervals --------------------------------------------------------------------------------------------------------

def population(attributes, size=20000):
    """Returns the truth of many images and the predictions of two models, bool [images, attributes] each.

    An image is as easy for one model as for the other, and its attributes are all as easy.
    """
    random = np.random.RandomState(1)
    true = random.random_sample((size, attributes)) < np.resize([0.05, 0.1, 0.3, 0.5], attributes)
    sign = true * 2 - 1
    sure = 2 * sign + 0.8 * sign * random.standard_normal((size, 1)) + 1.5 * random.standard_normal(true.shape)
    return true, [sure + 0.3 * random.standard_normal(true.shape) >= 0, sure + 0.4 * random.standard_normal(true.shape) >= 0]


def test_95_percent_of_the_intervals_hold_the_truth():
    """In runs over 300 images, 93 to 95 % of the intervals hold the figure of all images. 300 runs measure that to 1.3 %."""
    true, sides = population(attributes=8)
    (of_a, per_attribute), (of_b, _) = (evaluate(predicted * 2 - 1, true) for predicted in sides)
    held, held_change, held_label = [], [], []
    random = np.random.RandomState(2)
    for _ in range(300):
        images = random.randint(len(true), size=300)
        predicted, truth = [side[images] for side in sides], true[images]
        a, b = drawn(predicted, truth, draws=300)
        low, high = np.array([interval(a[name]) for name in METRICS]).T
        truths = np.array([of_a[name] for name in METRICS])
        held.append((low <= truths) & (truths <= high))
        low, high = np.array([interval(a[name] - b[name]) for name in METRICS]).T
        change = np.array([of_a[name] - of_b[name] for name in METRICS])
        held_change.append((low <= change) & (change <= high))
        figures = evaluate(predicted[0] * 2 - 1, truth)[1]
        low, high = np.array([label_acc_interval({key: value[i] for key, value in figures.items()})
                              for i in range(8)]).T
        held_label.append((low <= per_attribute["label_acc"]) & (per_attribute["label_acc"] <= high))
    for shares in (np.mean(held, axis=0), np.mean(held_change, axis=0), np.mean(held_label, axis=0)):
        assert ((0.88 < shares) & (shares < 0.99)).all(), shares


def test_wilsons_interval_holds_the_truth_of_a_rare_attribute():
    """The bootstrap's does so far less often if only about ten images have the attribute."""
    random, held = np.random.RandomState(3), []
    for _ in range(200):
        true = random.random_sample((400, 1)) < 0.025
        predicted = random.random_sample(true.shape) < np.where(true, 0.9, 0.02)
        figures = evaluate(predicted * 2 - 1, true)[1]
        low, high = label_acc_interval({key: value[0] for key, value in figures.items()})
        of_draws = interval(drawn([predicted], true, draws=200)[0]["mA"])  # the label_acc of the only attribute
        held.append((low <= 0.94 <= high, of_draws[0] <= 0.94 <= of_draws[1]))
    wilson, bootstrap = np.mean(held, axis=0)
    assert 0.92 < wilson < 0.99 and bootstrap < 0.85


def test_wilsons_intervals_are_as_published():
    # Newcombe (1998), Statistics in Medicine 17, 857-872, table I, method 3
    for hits, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611),
                                   (1, 29, 0.0061, 0.1718)):
        assert np.round(wilson(hits / count, count), 4).tolist() == [low, high]


def test_a_draw_is_a_run_over_its_images():
    logits, labels = random_case()
    predicted, true = logits >= 0, labels == 1
    a, b = drawn([predicted, ~predicted], true, draws=300)
    units = len(true) + 4  # the images, and one more for each model and kind of error
    chosen = np.random.RandomState(SEED).randint(units, size=(300, units))
    without = [i for i, images in enumerate(chosen) if images.max() < len(true)]
    assert without
    for i, images in zip(without, chosen[without]):
        for of, values in ((a, logits), (b, np.where(predicted, -1, 1))):
            metrics, _ = evaluate(values[images], labels[images])
            assert [of[name][i] for name in METRICS] == pytest.approx([metrics[name] for name in METRICS], rel=0, abs=1e-12)


def test_one_more_error_is_spread_over_the_right_decisions():
    true, predicted = np.array([[1, 1, 0, 0], [1, 0, 0, 0]], bool), np.array([[1, 1, 0, 0], [0, 1, 0, 0]], bool)
    lost, said = one_more_error(predicted, true)
    assert lost.tolist() == [[0.5, 0.5, 0, 0], [0, 1, 0, 0]] and said.tolist() == [[1, 1, 0.5, 0.5], [0, 1, 0.5, 0.5]]
    assert of_images(lost, true)[:, 0].tolist() == [1, 1 / 2, 1, 1 / 2] and of_images(said, true)[:, 0].tolist() == [1, 2 / 3, 2 / 3, 1]
    assert [values[0].tolist() for values in of_attributes(said, true)] == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0.5, 0.5]]


def test_intervals_hold_the_truth_where_few_images_decide():
    """A change in one of 2000 attributes, and an accuracy near 1. Draws of the images alone would hold it in half of the runs."""
    true, (b, _) = population(attributes=8)
    random = np.random.RandomState(4)
    a, right = (side ^ (random.random_sample(true.shape) < 1 / 2000) for side in (b, true))
    (of_a, of_b, of_right), held = ([evaluate(side * 2 - 1, true)[0] for side in (a, b, right)]), []
    for _ in range(60):
        images = random.randint(len(true), size=300)
        drawn_a, drawn_b = drawn([a[images], b[images]], true[images], draws=200)
        alone, = drawn([right[images]], true[images], draws=200)
        for name in METRICS:
            for low, high, value in ((*interval(drawn_a[name] - drawn_b[name]), of_a[name] - of_b[name]),
                                     (*interval(alone[name]), of_right[name])):
                held.append(low <= value <= high)
    assert (np.reshape(held, (60, 10)).mean(axis=0) > 0.85).all() and np.mean(held) > 0.93


def test_groups_are_drawn_as_a_whole():
    """Two copies of each image say no more than one."""
    true, (a, b) = population(10, size=200)
    groups = np.random.RandomState(0).permutation(np.repeat(np.arange(200), 2))
    twice = [side[groups] for side in (a, b, true)]
    assert metric_intervals(*twice[1:], METRICS, groups) == metric_intervals(b, true, METRICS)
    assert change_intervals(*twice, METRICS, groups) == change_intervals(a, b, true, METRICS)
    assert metric_intervals(*twice[1:], METRICS, groups // 25) == dict.fromkeys(METRICS)  # too few groups
    figures = evaluate(b * 2 - 1, true)[1]
    row = {key: value[0] for key, value in figures.items()}
    assert label_acc_interval(dict(row, positives=1, negatives=1), label_counts(twice[2], groups)[:, 0]) == label_acc_interval(row)


def test_intervals_of_changes_are_paired():
    """They are far narrower than those of the two sides. Equal sides have one, too: in other images, they might differ."""
    true, (a, _) = population(10, size=1000)
    b = a.copy()
    b[:5] = ~b[:5]
    low, high = change_intervals(a, b, true, METRICS)["mA"]
    assert 0 < low < high and high - low < np.ptp(metric_intervals(a, true, METRICS)["mA"]) / 2
    for low, high in change_intervals(a, a, true, METRICS).values():
        assert -0.002 < low < 0 < high < 0.002


def test_undefined_metrics_and_few_images_have_no_interval():
    true = np.array([[True, False]] * 9)
    assert metric_intervals(true, true, METRICS) == dict.fromkeys(METRICS)  # too few images
    of = metric_intervals(np.repeat(true, 2, axis=0), np.repeat(true, 2, axis=0), METRICS)
    assert of.pop("mA") is None and {high for _, high in of.values()} == {1}
    assert label_acc_interval({"label_pos_acc": None, "positives": 0, "label_neg_acc": 1, "negatives": 9}) is None


def test_stage_7_adds_the_intervals_and_changes_nothing_else(tmp_path):
    result, label = write_case(tmp_path, *random_case())
    plain = script(POSTPROCESS, result, label, "--per-attribute", cwd=tmp_path).stdout.split("\n")
    figures = json.loads((tmp_path / "fusion_result.json").read_text())
    assert figures["intervals"] is None and {row["label_acc_interval"] for row in figures["attributes"]} == {None}
    done = script(POSTPROCESS, result, label, "--per-attribute", "--intervals", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    lines, report = done.stdout.split("\n"), json.loads((tmp_path / "fusion_result.json").read_text())
    of = report["intervals"]
    assert lines.pop(5) == "95 % intervals: " + ", ".join(
        "%s %.4f to %.4f" % tuple([name.replace("instance_", "")] + of[name]) for name in METRICS)
    assert lines[5].endswith("label_acc  95 % interval") and lines[6].endswith("%.4f to %.4f" % tuple(
        report["attributes"][0]["label_acc_interval"]))
    lines[5:41] = [line[:len(other)] for line, other in zip(lines[5:41], plain[5:41])]
    assert lines == plain
    for name in METRICS:
        assert of[name][0] < report[name] < of[name][1] < of[name][0] + 0.2
    for row in report["attributes"]:
        assert row["label_acc_interval"][0] < row["label_acc"] < row["label_acc_interval"][1]
        row["label_acc_interval"] = None
    assert dict(report, intervals=None) == figures
