"""Computes 95 % intervals: how far a run's metrics might be off, because its images are only a sample.

The metrics over images get a bootstrap interval. DRAWS times, as many images as the run has are drawn from it with
replacement. The interval holds the middle 95 % of the draws' metrics. Two models over the same images get the same draws, so
that an image that is easy or hard for both does not widen the interval of their difference.

An attribute's label_acc gets Wilson's interval. The bootstrap's would be far too narrow if few images have the attribute or
if all are right (tests/test_intervals.py). The seed is fixed, so the same results have the same intervals.
"""
import numpy as np

DRAWS = 2000
SEED = 0
FEW = 10        # with fewer images than this, there is no interval
BLOCK = 10 ** 6  # this many draws x images are in memory at a time
Z = 1.959964    # a normal distribution has 95 % within this many standard deviations
DIGITS = 6      # intervals are rounded to this: 2000 draws give no more, and BLAS libraries differ in the 16th digit


def ratio(part, whole):
    """Returns part / whole, NaN where whole is 0."""
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole > 0)


def mean(values):
    """Returns the mean of each row without its NaN values, which undefined attributes have. It is NaN if all are NaN."""
    defined = ~np.isnan(values)
    return ratio(np.where(defined, values, 0).sum(axis=1), defined.sum(axis=1))


def summands(said, true):
    """Returns each image's summands of the metrics, float64 [images, 4 + 3 * attributes]."""
    both, truths, counted = said & true, true.sum(axis=1), true.any(axis=1)
    hits = both.sum(axis=1) * counted
    return np.column_stack([counted, hits / np.maximum((said | true).sum(axis=1), 1), hits / np.maximum(said.sum(axis=1), 1),
                            hits / np.maximum(truths, 1), both, true, ~said & ~true]).astype(np.float64)


def metrics(sums, images):
    """Returns the metrics {name: one value per row} from rows of sums over summands(). images: how many each row sums up.

    They are those of evaluate() in stage 7, and label_precision, label_recall and label_F1, the means over the attributes.
    """
    acc, precision, recall = (ratio(column, sums[:, 0]) for column in sums.T[1:4])
    found, positives, refused = np.split(sums[:, 4:], 3, axis=1)  # TP, P and TN of each attribute
    said = images - positives - refused + found
    return {"instance_acc": acc, "instance_precision": precision, "instance_recall": recall,
            "instance_F1": 2 * precision * recall / np.maximum(precision + recall, 1e-300),  # 0 if both are 0
            "mA": mean((ratio(found, positives) + ratio(refused, images - positives)) / 2),
            "label_precision": mean(ratio(found, said)), "label_recall": mean(ratio(found, positives)),
            "label_F1": mean(2 * ratio(found, said + positives))}


def drawn(sides, true, draws=DRAWS):
    """Returns the metrics of several models in the same draws, [{name: array [draws]}], one dict per model.

    sides: what each model says, bool [images, attributes] each. true: the truth in the same shape.
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
    """Returns the interval [low, high] that holds 95 % of the draws' values, or None if there are too few values."""
    values = values[~np.isnan(values)]
    return np.round(np.percentile(values, [2.5, 97.5]), DIGITS).tolist() if len(values) > 1 else None


def metric_intervals(said, true, names):
    """Returns these metrics' intervals {name: [low, high]}. One is None for an undefined metric or fewer than FEW images."""
    of = drawn([said], true)[0] if len(true) >= FEW else {}
    return {name: interval(of[name]) if of else None for name in names}


def change_intervals(a, b, true, names):
    """Returns the same for the difference of a's and b's metrics, a - b, in paired draws."""
    of_a, of_b = drawn([a, b], true) if len(true) >= FEW else ({}, {})
    return {name: interval(of_a[name] - of_b[name]) if of_a else None for name in names}


def wilson(share, count):
    """Returns Wilson's interval (low, high) of a share among count images."""
    centre, half = share + Z ** 2 / (2 * count), Z * np.sqrt(share * (1 - share) / count + Z ** 2 / (4 * count ** 2))
    return (centre - half) / (1 + Z ** 2 / count), (centre + half) / (1 + Z ** 2 / count)


def label_acc_interval(row):
    """Returns the interval [low, high] of an attribute's label_acc from the Wilson intervals of its two shares.

    The distances to the ends of the two intervals add up like standard deviations (Newcombe's method). Returns None if
    label_acc is undefined. row: a dict of label_pos_acc and label_neg_acc, and of positives and negatives, their image counts.
    """
    if not row["positives"] or not row["negatives"]:
        return None
    shares = [(row["label_pos_acc"], row["positives"]), (row["label_neg_acc"], row["negatives"])]
    (low_p, high_p), (low_n, high_n) = (wilson(*share) for share in shares)
    (positive, _), (negative, _) = shares
    acc = (positive + negative) / 2
    return [round(float(acc - np.hypot(positive - low_p, negative - low_n) / 2), DIGITS),
            round(float(acc + np.hypot(high_p - positive, high_n - negative) / 2), DIGITS)]
