"""Finds causes for tools/compare.py --rehearsal: the shift by float16, the first layer that differs, and known faults.

Arguments named candidate, float32 and float16 belong to the results under test, to the exact model, and to its float16 twin
(tools/rehearse.py). They are logits [images, attributes] over the same images, or where a function says so, paths of the models.
"""
import functools

from lib.camera import to_rgb
from lib.float16 import FLOAT16_MAX
from lib.images import LAYOUTS, MEAN, NV12, STD
from lib.machine import cores
from lib.models import give, load
from lib.results import as_logits, kind_of
from lib.script import importing, some
from lib.session import cpu_session, empty_batch, input_kind, input_size, run_batches

with importing():
    import numpy as np

FACTOR = 2       # this many times the twin's own shift is allowed, because the card's order of accumulation and kernels differ
SURELY_OTHER = 10  # results that are off by more than this many times the twin's shift in one image are surely of another input
MAX_IMAGES = 8   # this many images are examined
MEANS, STDS = (np.array(values).reshape(3, 1, 1) for values in (MEAN, STD))


def normalised(x, mean=MEANS, std=STDS, scale=255):
    """Returns pixels, [3,height,width], normalised as stage 4 does it, or with other values."""
    return (x / scale - mean) / std


# Known faults of the input. Each function makes the wrong input from the pixels, float64 [3,height,width] from 0 to 255.
WRONG_INPUTS = {
    "BGR instead of RGB (stage 4's channels, or rbuv_swap_switch in aipp.cfg)": lambda x: normalised(x[::-1]),
    "without the mean subtracted (min_chn in aipp.cfg)": lambda x: normalised(x, mean=0),
    "without the division by the standard deviation (var_reci_chn in aipp.cfg)": lambda x: normalised(x, std=1),
    "pixels from 0 to 1, neither mean nor standard deviation applied": lambda x: x / 255,
    "pixels from 0 to 255, not normalised": lambda x: x,
    "not divided by 255 before the mean and standard deviation": lambda x: normalised(x, scale=1),
    "divided by 255 twice": lambda x: normalised(x, scale=255 ** 2),
    "normalised twice": lambda x: normalised(normalised(x), scale=1),
    "with the mean rounded to whole numbers (mean_chn in aipp.cfg)": lambda x: normalised(x, np.rint(255 * MEANS) / 255),
    "with the mean's fraction cut off (mean_chn in aipp.cfg)": lambda x: normalised(x, np.floor(255 * MEANS) / 255),
    "with the mean in the order BGR": lambda x: normalised(x, mean=MEANS[::-1]),
    "with the standard deviation in the order BGR": lambda x: normalised(x, std=STDS[::-1]),
    "with the mean and the standard deviation in the order BGR": lambda x: normalised(x, MEANS[::-1], STDS[::-1]),
    "with the mean and the standard deviation exchanged": lambda x: normalised(x, STDS, MEANS),
    "with a mean and a standard deviation of 0.5": lambda x: normalised(x, 0.5, 0.5),
    "mirrored": lambda x: normalised(x[:, :, ::-1]),
    "upside down": lambda x: normalised(x[:, ::-1]),
    "with height and width exchanged": lambda x: normalised(x).transpose(0, 2, 1).reshape(x.shape),
    "in the order [height,width,3]": lambda x: normalised(x).transpose(1, 2, 0).reshape(x.shape)}


def judge(candidate, float32, float16):
    """Returns how far logits are off, how far float16 alone shifts them, and whether they are off by at most FACTOR times that."""
    def sizes(logits):
        difference = np.abs(logits.astype(np.float64) - float32)
        return float(difference.max()), float(np.sqrt((difference ** 2).mean()))
    (largest, typical), (shift, typical_shift) = sizes(candidate), sizes(float16)
    return {"largest": largest, "typical": typical, "shift": shift, "typical_shift": typical_shift,
            "allowed": FACTOR * shift, "within": largest <= FACTOR * shift and typical <= FACTOR * typical_shift}


# --- layers ---------------------------------------------------------------------------------------------------------

def tensors(path, names, bins):
    """Yields {name: value} of a model's named tensors for each bin. path and bins are paths."""
    model = load(path)
    give(model, names)
    session = cpu_session(model, cores())
    batch_size, height, width = input_size(session)
    if batch_size != 1:  # all tensors of a larger batch might exhaust the memory
        raise ValueError("%s: its batch size is %d, but layers can only be compared at 1; give models of batch size 1"
                         % (path, batch_size))
    batch = empty_batch(session, 1, height, width)
    for path in bins:
        batch[0] = np.fromfile(path, batch.dtype).reshape(batch.shape[1:])
        yield dict(zip(names, session.run(names, {session.get_inputs()[0].name: batch})))


def layers(float32, others, bins):
    """Compares the tensors that several models, given as paths, have in common, over some bins.

    Returns [{"node", "op", "tensor", "largest": the largest absolute value in the float32 model, "reach": the same for each other
    model, "error": the relative error of each other model}], in the order of the graph.
    """
    made = [{name for node in load(path).graph.node for name in node.output} for path in others]
    rows = [{"node": node.name or name, "op": node.op_type, "tensor": name, "inputs": list(node.input), "largest": 0.0,
             "reach": [0.0] * len(others), "error": [0.0] * len(others), "size": 0.0}
            for node in load(float32).graph.node for name in node.output if all(name in names for names in made)]
    names = [row["tensor"] for row in rows]
    for values in zip(*[tensors(path, names, bins) for path in [float32] + others]):
        for row in rows:
            array, *rest = [value[row["tensor"]].astype(np.float64) for value in values]
            for path, other in zip(others, rest):
                if other.shape != array.shape:
                    raise ValueError("%s: is another network than %s: the results of %s (%s) are %s and %s"
                                     % (path, float32, row["node"], row["op"], list(other.shape), list(array.shape)))
            row["largest"] = max(row["largest"], float(np.abs(array).max()))
            row["size"] += float((array ** 2).sum())
            for i, other in enumerate(rest):
                with np.errstate(invalid="ignore"):
                    row["reach"][i] = float(np.maximum(row["reach"][i], np.abs(other).max()))  # np.maximum keeps NaN
                    row["error"][i] += float(((other - array) ** 2).sum())
    for row in rows:
        row["error"] = [float(np.sqrt(error / row["size"])) if row["size"] else 0.0 if not error else float("inf")
                        for error in row["error"]]
        del row["size"]
    return rows


def error_as_text(function):
    """Makes a function return the text of its ValueError, so that the error does not suppress the other messages."""
    @functools.wraps(function)
    def wrapper(*arguments):
        try:
            return function(*arguments)
        except ValueError as error:
            return str(error)
    return wrapper


@error_as_text
def overflow(float32, others, bins):
    """Returns a text about the first node whose values exceed float16's range, or None. float32 and others are models' paths."""
    for row in layers(float32, others, bins):
        beyond = [value for value in [row["largest"]] + row["reach"] if not value <= FLOAT16_MAX]  # NaN counts as too large
        if beyond:
            return "overflow in %s (%s): its values reach %.3g, but float16 ends at %d" % (
                row["node"], row["op"], beyond[0], FLOAT16_MAX)
    return None


def channel_fault(candidate, float32, float16):
    """Returns a text about what is wrong with a tensor [1,channels,...]."""
    candidate, float32, float16 = (array.reshape(array.shape[1], -1) for array in (candidate, float32, float16))
    allowed = FACTOR * np.abs(float16 - float32).max()
    off = np.flatnonzero(~(np.abs(candidate - float32).max(axis=1) <= allowed))
    order = np.array([np.abs(float32 - candidate[i]).max(axis=1).argmin() for i in off], int)
    if len(off) > 1 and sorted(order) == sorted(off) and (np.abs(float32[order] - candidate[off]).max(axis=1) <= allowed).all():
        return "its channels are in another order: %s" % some("%d has the values of %d" % pair for pair in zip(off, order))
    if 0 < len(off) < len(float32):
        return "only %d of its %d channels are off (%s), so one of their weights or biases is wrong" % (
            len(off), len(float32), some(map(str, off)))
    return "all of its channels are off" if len(off) else "each channel is off by only a little"


@error_as_text
def first_fault(candidate, float32, float16, bins):
    """Returns a text about the first layer in which a model differs by more than float16 explains. All three are models' paths."""
    for row in layers(float32, [float16, candidate], bins):
        if not row["error"][1] <= FACTOR * row["error"][0] + 1e-6:
            arrays = [next(tensors(path, [row["tensor"]], bins[:1]))[row["tensor"]] for path in (candidate, float32, float16)]
            return "the first layer to differ is %s (%s): its relative error is %.3g, from float16 alone %.3g; %s" % (
                row["node"], row["op"], row["error"][1], row["error"][0], channel_fault(*arrays))
    return "no layer that both models have differs by more than float16 explains"


# --- results --------------------------------------------------------------------------------------------------------

def network(path):
    """Returns a session of a model without the AIPP nodes at its beginning, so that it takes float32."""
    model = load(path)
    aipp = [node for node in model.graph.node if node.name.startswith("aipp_")]
    if aipp:
        image = next(value for value in model.graph.value_info if value.name == aipp[-1].output[0])
        del model.graph.input[:]
        model.graph.input.add().CopyFrom(image)
        for node in aipp:
            model.graph.node.remove(node)
    return cpu_session(model.SerializeToString(), cores())


def run(session, arrays, path):
    """Returns a session's logits for inputs, arrays [3,height,width]. path: the model's."""
    outputs = np.concatenate([outputs for _, _, outputs in run_batches(session, arrays, lambda array, row: np.copyto(row, array))])
    return as_logits(outputs, path, kind_of(path))[0]


def read_pixels(path, kind, height, width, swapped=False):
    """Returns the pixels of a bin, float64 [3,height,width] from 0 to 255. swapped: with U and V of NV12 exchanged."""
    if kind == "float32":
        return (np.fromfile(path, "<f4").reshape(3, height, width) * STDS + MEANS) * 255
    pixels = np.fromfile(path, np.uint8)
    if kind in NV12:
        pixels = pixels.reshape(-1, width)
        if swapped:
            pixels[height:] = pixels[height:].reshape(-1, 2)[:, ::-1].reshape(-1, width)
        pixels = to_rgb(pixels, kind[len("nv12-"):])
    return pixels.reshape(height, width, 3).transpose(2, 0, 1).astype(np.float64)


def wrong_inputs(candidate, float32, float16, bins):
    """Yields texts about the wrong inputs that would give the candidate's logits. float32 and float16 are the models' paths."""
    exact, twin = network(float32), network(float16)
    _, height, width = input_size(exact)
    kind = input_kind(cpu_session(float32))
    precision = np.float32 if kind == "float32" else np.float16
    wrong = [(text, change, [kind]) for text, change in WRONG_INPUTS.items()]
    if kind in NV12:
        wrong += [("with the colours of %s (matrix_* and input_bias_* in aipp.cfg)" % LAYOUTS[other], normalised, [other])
                  for other in NV12 if other != kind]
        wrong.append(("with U and V exchanged (rbuv_swap_switch in aipp.cfg)", normalised, [kind, True]))

    def judged(change, count, kind, swapped=False):
        images = [read_pixels(path, kind, height, width, swapped) for path in bins[:count]]
        arrays = [change(image).astype(precision).astype(np.float32) for image in images]
        with np.errstate(invalid="ignore"):  # logits may be infinite
            return judge(candidate[:count], run(exact, arrays, float32), run(twin, arrays, float16))

    for text, change, reading in wrong:
        first = judged(change, 1, *reading)  # one image is enough to exclude most of them
        if first["largest"] <= SURELY_OTHER * first["shift"] and judged(change, len(bins), *reading)["within"]:
            yield "these are the results for an input %s" % text


def wrong_order(candidate, float16, near, worst, images, attributes):
    """Yields texts about results that are those of other attributes or images. near: equal results may differ by this much.

    Several attributes or images may have equal results. So a result that may be its own is, and the others prefer a place that no
    other result takes. Without one, results are there twice, and the order is not at fault.
    """
    for what, names, results, twin, chosen in (("attributes", attributes, candidate.T, float16.T, range(len(attributes))),
                                               ("images", images, candidate, float16, worst)):
        free, places, repeated = ~(np.abs(results - twin).max(axis=1) <= near), [], False
        wrong = [i for i in chosen if free[i]]
        for i in wrong:
            off = np.abs(twin - results[i]).max(axis=1)
            place = np.where(free, off, np.inf).argmin()
            if not off[place] <= near:
                place, repeated = off.argmin(), True
            if not off[place] <= near:
                break
            free[place] = False
            places.append("%s has the results of %s" % (names[i], names[place]))
        else:
            if wrong:
                yield "the %s are %s: %s" % (what, "repeated" if repeated else "in another order", some(places))


def outliers(difference, allowed, axis):
    """Returns the indexes of the few attributes or images that are off by far more than the others, and so alone are wrong."""
    off, size = (difference > allowed).any(axis=axis), np.sqrt((difference ** 2).mean(axis=axis))
    alone = 0 < off.sum() <= len(off) / 2 and size[off].min() > 5 * size[~off].max()
    return np.flatnonzero(off) if alone else []


def wrong_few(candidate, float32, float16, allowed, images, attributes):
    """Yields a text if only some attributes or only some images are off."""
    difference = np.abs(candidate.astype(np.float64) - float32)
    columns, rows = (outliers(difference, allowed, axis) for axis in (0, 1))
    if len(columns):
        parts = []
        for i in columns:
            shift = (candidate - float16)[:, i]
            constant = len(shift) > 2 and shift.max() - shift.min() <= allowed
            parts.append("%s (%s)" % (attributes[i], "by %+.3g in all images: its bias" % shift.mean() if constant else
                                      "by at most %.3g: its weights" % np.abs(shift).max()))
        yield "only %d of %d attributes are off, so look at the last layer: %s" % (len(columns), len(attributes), some(parts))
    elif len(rows):
        yield "only %d of %d images are off: %s" % (len(rows), len(images), some(images[i] for i in rows))


def explain(candidate, float32, float16, models, bins, attributes):
    """Returns texts about possible causes of results that exceed the bound. The list is empty if none is found.

    models: the paths of the model that gave the candidate, or None, of the float32 model, and of its twin. bins: {image: path},
    in the order of the logits' rows.
    """
    judged = judge(candidate, float32, float16)
    worst = np.argsort(-np.abs(candidate - float32).max(axis=1), kind="stable")[:MAX_IMAGES]
    images = list(bins)
    paths = [bins[images[i]] for i in worst]
    texts = list(wrong_order(candidate, float16, judged["allowed"] + judged["shift"], worst, images, attributes))
    texts += wrong_inputs(candidate[worst], models[1], models[2], paths)
    if models[0] is not None:
        texts.append(first_fault(*models, paths))
    return texts or list(wrong_few(candidate, float32, float16, judged["allowed"], images, attributes))
