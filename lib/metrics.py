"""The metrics of Li et al., and their 95 % intervals: how far they might be off, because a run's images are only a sample.

Li et al., "A Richly Annotated Dataset for Pedestrian Attribute Recognition" (arXiv:1603.07054), section 5.

The metrics over images get a bootstrap interval. Each of DRAWS draws takes as many images as the run has, with
replacement. The interval holds the middle 95 % of the draws' metrics. Two models over the same images get the same draws, so
that an image that is easy or hard for both does not widen the interval of their difference.

Errors, or differences of two models, may be so rare that a run has none by chance. Draws of its images alone would then hardly
differ. So each model adds two images to those that are drawn. They are like the mean of all images, but in one of them the
model loses one more attribute, and in the other it wrongly says one more. The images of a group, such as one person's, are not
independent. If groups are given, each draw takes whole groups.

An attribute's label_acc gets Wilson's interval. The bootstrap's would be far too narrow if few images have the attribute or
if all are right (tests/test_metrics.py). The seed is fixed, so the same results have the same intervals.
"""
from lib.script import importing

with importing():
    import numpy as np

METRICS = ["instance_acc", "instance_precision", "instance_recall", "instance_F1", "mA"]
MAX_DROP = 0.01  # a converted model may be this far below the published accuracy: the guide's 1 % (percentage points)
DRAWS = 2000     # the number of draws of the bootstrap
SEED = 0
MIN_IMAGES = 10  # with fewer images than this, there is no interval
BLOCK = 10 ** 6  # this many draws x images are in memory at a time
Z = 1.959964     # a normal distribution has 95 % within this many standard deviations
DECIMALS = 6     # intervals are rounded to this: 2000 draws give no more, and BLAS libraries differ in the 16th digit


# --- metrics ----------------------------------------------------------------------------------------------------------

def ratio(part, whole):
    """Returns part / whole, NaN where whole is 0."""
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole > 0)


def mean(values):
    """Returns the mean of each row without its NaN values, which undefined attributes have. It is NaN if all are NaN."""
    defined = ~np.isnan(values)
    return ratio(np.where(defined, values, 0).sum(axis=1), defined.sum(axis=1))


def of_images(predicted, true):
    """Returns four figures of each image, float64 [4, images]: whether it counts, and its accuracy, precision and recall.

    An image without a true attribute does not count. predicted: bool or, from one_more_error(), shares from 0 to 1, [images,
    attributes]. true: bool in the same shape.
    """
    counted, tp = true.any(axis=1), np.minimum(predicted, true).sum(axis=1)
    return np.array([counted, tp / np.maximum(np.maximum(predicted, true).sum(axis=1), 1),
                     tp / np.maximum(predicted.sum(axis=1), 1), tp / np.maximum(true.sum(axis=1), 1)], np.float64)


def of_attributes(predicted, true):
    """Returns three figures for each attribute, [3 x [images, attributes]]. Their sums over images are TP, P and TN."""
    return [np.minimum(predicted, true), true, 1 - np.maximum(predicted, true)]


def metrics(sums, images):
    """Returns the metrics {name: one value per row} from sums over images, float64 [rows, 4 + 3 * attributes].

    The columns are the sums of of_images() and of_attributes(). images: how many images each row sums up, a number or [rows, 1].
    label_precision, label_recall and label_F1 are means over the attributes, as mA is.
    """
    acc, precision, recall = (ratio(column, sums[:, 0]) for column in sums.T[1:4])
    tp, positives, tn = np.split(sums[:, 4:], 3, axis=1)
    predicted = images - positives - tn + tp
    return {"instance_acc": acc, "instance_precision": precision, "instance_recall": recall,
            "instance_F1": 2 * precision * recall / np.maximum(precision + recall, 1e-300),  # 0 if both are 0
            "mA": mean((ratio(tp, positives) + ratio(tn, images - positives)) / 2),
            "label_precision": mean(ratio(tp, predicted)), "label_recall": mean(ratio(tp, positives)),
            "label_F1": mean(2 * ratio(tp, predicted + positives))}


def score(predicted, true):
    """Returns (the metrics {name: figure}, TP, P and TN of each attribute). An undefined metric is NaN."""
    counts = [decisions.sum(axis=0) for decisions in of_attributes(predicted, true)]
    sums = np.concatenate([of_images(predicted, true).sum(axis=1)] + counts)
    return {name: float(value) for name, (value,) in metrics(sums[None], len(true)).items()}, counts


def evaluate(logits, labels):
    """Computes the metrics of Li et al. for logits [images, attributes] and labels 0/1 of the same shape.

    Returns (dict of the instance metrics and mA, dict of the arrays per attribute: positives, negatives, label_pos_acc
    = TP/P, label_neg_acc = TN/N, label_acc = their mean). A figure is NaN if no image has the attribute, or if all have it.
    The instance metrics leave out images without a true attribute. mA leaves out attributes without a label_acc. It is None if
    no attribute has one. Raises ValueError if no image has a true attribute.
    """
    true = np.asarray(labels) == 1
    if not true.any():
        raise ValueError("no image has any true attribute, so the instance metrics are not defined")
    figures, (tp, positives, tn) = score(np.asarray(logits) >= 0, true)
    negatives = len(true) - positives
    of_positives, of_negatives = ratio(tp, positives), ratio(tn, negatives)
    return ({name: None if np.isnan(figures[name]) else figures[name] for name in METRICS},
            {"positives": positives, "negatives": negatives, "label_pos_acc": of_positives, "label_neg_acc": of_negatives,
             "label_acc": (of_positives + of_negatives) / 2})


def effect(a, b, labels, groups=None):
    """Returns the metrics of logits a and b and their change a - b, {metric: {"a", "b", "change", "interval"}}.

    An undefined mA is None. interval: the change's paired 95 % interval, or None for too few images. groups: see drawn().
    """
    of_a, of_b = evaluate(a, labels)[0], evaluate(b, labels)[0]
    intervals = change_intervals(np.asarray(a) >= 0, np.asarray(b) >= 0, np.asarray(labels) == 1, of_a, groups)
    return {name: {"a": of_a[name], "b": of_b[name], "interval": intervals[name],
                   "change": None if of_a[name] is None else of_a[name] - of_b[name]} for name in of_a}


# --- intervals --------------------------------------------------------------------------------------------------------

def one_more_error(predicted, true):
    """Yields predictions with one more error in each image, float64 [images, attributes]: one attribute lost, one wrongly said.

    All right decisions of the image have an equal share of the error.
    """
    for right, change in ((predicted & true, -1), (~(predicted | true), 1)):
        yield predicted + change * right / np.maximum(right.sum(axis=1, keepdims=True), 1)


def drawn(sides, true, groups=None, draws=DRAWS):
    """Returns the metrics of several models in the same draws, [{name: array [draws]}], one dict per model.

    sides: what each model predicts, bool [images, attributes] each. true: the truth in the same shape. groups: the group of each
    image as lib.labels.read_groups() gives it, or None if each image is drawn by itself.
    """
    def columns_of(sides):  # a row per image: 1 for the image, then its figures for each side
        return np.hstack([np.ones((len(true), 1))] + [part for predicted in sides
                                                      for part in [of_images(predicted, true).T] + of_attributes(predicted, true)])

    columns = columns_of(sides)
    more = [columns_of(sides[:i] + [worse] + sides[i + 1:]).mean(axis=0)
            for i, predicted in enumerate(sides) for worse in one_more_error(predicted, true)]
    if groups is not None:  # a row per group, and groups of mean size with one more error in each image
        members = np.argsort(groups, kind="stable")
        columns = np.add.reduceat(columns[members], np.flatnonzero(np.diff(groups[members], prepend=-1)))
        more = np.multiply(more, len(true) / len(columns))
    columns = np.vstack([columns, more])
    units = len(columns)
    random = np.random.RandomState(SEED)
    sums, at_once = [], max(1, BLOCK // units)
    for start in range(0, draws, at_once):
        times = [np.bincount(random.randint(units, size=units), minlength=units)  # how often each image or group is drawn
                 for _ in range(min(at_once, draws - start))]
        sums.append(np.array(times, np.float64) @ columns)
    images, sums = np.split(np.concatenate(sums), [1], axis=1)
    return [metrics(part, images) for part in np.split(sums, len(sides), axis=1)]


def enough(true, groups):
    """Returns whether there are enough images, or groups of images, for an interval."""
    return len(true if groups is None else set(groups)) >= MIN_IMAGES


def interval(values):
    """Returns the interval [low, high] that holds 95 % of the draws' values, or None if there are too few values."""
    values = values[~np.isnan(values)]
    return np.round(np.percentile(values, [2.5, 97.5]), DECIMALS).tolist() if len(values) > 1 else None


def metric_intervals(predicted, true, names, groups=None):
    """Returns these metrics' intervals {name: [low, high]}. One is None for an undefined metric or fewer than MIN_IMAGES images.

    groups: of lib.labels.read_groups(). With them, MIN_IMAGES is the smallest number of groups.
    """
    of = drawn([predicted], true, groups)[0] if enough(true, groups) else {}
    return {name: interval(of[name]) if of else None for name in names}


def change_intervals(a, b, true, names, groups=None):
    """Returns the same for the difference of a's and b's metrics, a - b, in paired draws."""
    of_a, of_b = drawn([a, b], true, groups) if enough(true, groups) else ({}, {})
    return {name: interval(of_a[name] - of_b[name]) if of_a else None for name in names}


def wilson(share, count):
    """Returns Wilson's interval (low, high) of a share among count images."""
    centre, half = share + Z ** 2 / (2 * count), Z * np.sqrt(share * (1 - share) / count + Z ** 2 / (4 * count ** 2))
    return (centre - half) / (1 + Z ** 2 / count), (centre + half) / (1 + Z ** 2 / count)


def label_counts(true, groups):
    """Returns how many groups have an image with each attribute, and an image without it, int [2, attributes]."""
    return np.array([[len(np.unique(groups[images])) for images in side.T] for side in (true, ~true)])


def label_acc_interval(row, counts=None):
    """Returns the interval [low, high] of an attribute's label_acc from the Wilson intervals of its two shares.

    The distances to the ends of the two intervals add up like standard deviations (Newcombe's method). Returns None if
    label_acc is undefined. row: a dict of label_pos_acc and label_neg_acc, and of positives and negatives, their image counts.
    counts: of label_counts(), in place of these. A group then counts once, as if all its images had the same result.
    """
    positives, negatives = (row["positives"], row["negatives"]) if counts is None else counts
    if not positives or not negatives:
        return None
    shares = [(row["label_pos_acc"], positives), (row["label_neg_acc"], negatives)]
    (low_p, high_p), (low_n, high_n) = (wilson(*share) for share in shares)
    (positive, _), (negative, _) = shares
    acc = (positive + negative) / 2
    return [round(float(acc - np.hypot(positive - low_p, negative - low_n) / 2), DECIMALS),
            round(float(acc + np.hypot(high_p - positive, high_n - negative) / 2), DECIMALS)]
