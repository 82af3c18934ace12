"""95 % intervals: how far the metrics of a run might be off, as its images are only some of all that could be taken.

For the metrics over images it is the bootstrap: DRAWS times, as many images as there are are drawn from them with
replacement, and the interval holds the middle 95 % of what the draws give. Two models over the same images have the same
draws, so that the interval of their difference leaves out what an easy or hard image does to both. An attribute's label_acc
has Wilson's interval instead: where few images have an attribute, or all of them are right, the bootstrap's is far too
narrow (tests/test_intervals.py). The seed is fixed: the same results have the same intervals.
"""
import numpy as np

DRAWS = 2000
SEED = 0
FEW = 10        # of fewer images than this, nothing is said
BLOCK = 10 ** 6  # draws x images that are in memory at a time
Z = 1.959964    # a normal distribution has 95 % within this many standard deviations
DIGITS = 6      # of an interval: 2000 draws tell no more, and BLAS libraries differ in the 16th


def ratio(part, whole):
    """part / whole, NaN where whole is 0."""
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole > 0)


def mean(values):
    """The mean of each row's values that are not NaN, as for attributes that no image has; NaN where all are."""
    defined = ~np.isnan(values)
    return ratio(np.where(defined, values, 0).sum(axis=1), defined.sum(axis=1))


def summands(said, true):
    """What the metrics are sums of: of each image, float64 [images, 4 + 3 * attributes]."""
    both, truths, counted = said & true, true.sum(axis=1), true.any(axis=1)
    hits = both.sum(axis=1) * counted
    return np.column_stack([counted, hits / np.maximum((said | true).sum(axis=1), 1), hits / np.maximum(said.sum(axis=1), 1),
                            hits / np.maximum(truths, 1), both, true, ~said & ~true]).astype(np.float64)


def metrics(sums, images):
    """The metrics {name: one of each row} of sums of summands(), of so many images each.

    Beside those of evaluate() in stage 7 there are label_precision, label_recall and label_F1, the means over the attributes.
    """
    acc, precision, recall = (ratio(column, sums[:, 0]) for column in sums.T[1:4])
    found, positives, refused = np.split(sums[:, 4:], 3, axis=1)  # TP, P and TN of each attribute
    said = images - positives - refused + found
    return {"instance_acc": acc, "instance_precision": precision, "instance_recall": recall,
            "instance_F1": 2 * precision * recall / np.maximum(precision + recall, 1e-300),  # 0 where both are
            "mA": mean((ratio(found, positives) + ratio(refused, images - positives)) / 2),
            "label_precision": mean(ratio(found, said)), "label_recall": mean(ratio(found, positives)),
            "label_F1": mean(2 * ratio(found, said + positives))}


def drawn(sides, true, draws=DRAWS):
    """The metrics in each draw, [{name: array [draws]}]: of each of the sides, which say what images have, on the same draws.

    sides: bool [images, attributes] each; true: the truth of the same shape.
    """
    parts = [summands(said, true) for said in sides]
    columns, images = np.hstack(parts), len(true)
    random = np.random.RandomState(SEED)
    sums, at_once = [], max(1, BLOCK // images)
    for start in range(0, draws, at_once):
        times = [np.bincount(random.randint(images, size=images), minlength=images)  # how often each image is drawn
                 for _ in range(min(at_once, draws - start))]
        sums.append(np.array(times, np.float64) @ columns)
    return [metrics(part, images) for part in np.split(np.concatenate(sums), len(sides), axis=1)]


def interval(values):
    """The interval [low, high] that holds 95 % of the draws' values; None where there are too few to say."""
    values = values[~np.isnan(values)]
    return np.round(np.percentile(values, [2.5, 97.5]), DIGITS).tolist() if len(values) > 1 else None


def metric_intervals(said, true, names):
    """The intervals {name: [low, high]} of these metrics; None of fewer than FEW images, and of an undefined metric."""
    of = drawn([said], true)[0] if len(true) >= FEW else {}
    return {name: interval(of[name]) if of else None for name in names}


def change_intervals(a, b, true, names):
    """The same of a's metrics less b's, paired."""
    of_a, of_b = drawn([a, b], true) if len(true) >= FEW else ({}, {})
    return {name: interval(of_a[name] - of_b[name]) if of_a else None for name in names}


def wilson(share, count):
    """Wilson's interval (low, high) of a share of so many images."""
    centre, half = share + Z ** 2 / (2 * count), Z * np.sqrt(share * (1 - share) / count + Z ** 2 / (4 * count ** 2))
    return (centre - half) / (1 + Z ** 2 / count), (centre + half) / (1 + Z ** 2 / count)


def label_acc_interval(row):
    """The interval [low, high] of an attribute's label_acc, from Wilson's of its two shares; None where it is not defined.

    The distances to the ends of the two intervals add up as standard deviations do (Newcombe's method).
    row: a dict of label_pos_acc, label_neg_acc, positives and negatives, the counts of images that the shares are of.
    """
    if not row["positives"] or not row["negatives"]:
        return None
    shares = [(row["label_pos_acc"], row["positives"]), (row["label_neg_acc"], row["negatives"])]
    (low_p, high_p), (low_n, high_n) = (wilson(*share) for share in shares)
    (positive, _), (negative, _) = shares
    acc = (positive + negative) / 2
    return [round(float(acc - np.hypot(positive - low_p, negative - low_n) / 2), DIGITS),
            round(float(acc + np.hypot(high_p - positive, high_n - negative) / 2), DIGITS)]
