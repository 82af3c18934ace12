"""Labels, the attributes' names, and the threshold of each attribute."""
import collections
import json
import os
import zlib

from lib.files import NUMBER, read_json, read_lines, read_text
from lib.models import description
from lib.names import stem
from lib.script import importing, some

with importing():
    import numpy as np

# The 35 attributes of PETA in the order of the labels and logits. PETA.mat's [1] has the names, its [2] selects 35.
PETA = """personalLess30 personalLess45 personalLess60 personalLarger60 carryingBackpack carryingOther lowerBodyCasual
upperBodyCasual lowerBodyFormal upperBodyFormal accessoryHat upperBodyJacket lowerBodyJeans footwearLeatherShoes
upperBodyLogo hairLong personalMale carryingMessengerBag accessoryMuffler accessoryNothing carryingNothing
upperBodyPlaid carryingPlasticBags footwearSandals footwearShoes lowerBodyShorts upperBodyShortSleeve
lowerBodyShortSkirt footwearSneaker upperBodyThinStripes accessorySunglasses lowerBodyTrousers upperBodyTshirt
upperBodyOther upperBodyVNeck""".split()
ASSUMED = "PETA's names are assumed; --attributes FILE gives others"
# The parts of tools/thresholds.py's file that are read, as a shape for fits().
THRESHOLDS_SHAPE = {"attributes": [{"name": str, "threshold": NUMBER}], "names_assumed": bool, "goal": str, "images": int,
                   "checksum": str, "tuned_on": dict}


def label_row(values):
    """Returns one image's label as bytes. Raises TypeError or ValueError if it cannot be a label.

    It does not check for values above 1; read_rows() does so for all rows at once.
    """
    if not isinstance(values, list) or not values:
        raise ValueError
    try:
        return bytes(values)
    except TypeError:  # values such as 1.0, from a numpy array of floats
        if not set(values) <= {0, 1}:
            raise ValueError
        return bytes([int(value) for value in values])


def read_rows(path):
    """Returns (names, labels uint8 [images, attributes]) of a label file, whose names may occur twice.

    Raises OSError, or ValueError with the row's name: values other than 0 and 1, a row of another length.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError("%s: no such file; give the label.json of the images, which tools/lists.py writes" % path)
    text = read_text(path)
    try:
        pairs = json.loads(text, object_pairs_hook=list)  # a dict would keep only the last of two equal names
    except (ValueError, RecursionError) as error:
        raise ValueError("%s: is not JSON: %s" % (path, error))
    if not isinstance(pairs, list) or not pairs or not all(isinstance(pair, tuple) for pair in pairs):
        raise ValueError("%s: is not {image file name: [0 or 1 for each attribute]}" % path)
    labels, width = [], len(pairs[0][1]) if isinstance(pairs[0][1], list) else 0
    for name, values in pairs:
        try:
            labels.append(label_row(values))
        except (TypeError, ValueError):
            raise ValueError("%s: %r: its label is not a list of 0 and 1" % (path, name))
        if len(values) != width:
            raise ValueError("%s: %r has %d values, but the rows before it have %d" % (path, name, len(values), width))
    labels = np.frombuffer(b"".join(labels), np.uint8).reshape(-1, width)
    wrong = (labels > 1).any(axis=1)  # checking all rows at once takes a third of the time
    if wrong.any():
        raise ValueError("%s: %r: its label is not a list of 0 and 1" % (path, pairs[int(wrong.argmax())][0]))
    return [name for name, _ in pairs], labels


def read_labels(path):
    """Returns ({stem: row}, labels uint8 [images, attributes]) of a label file. Raises read_rows()'s errors, also for a name twice."""
    names, labels = read_rows(path)
    rows = {}
    for row, name in enumerate(names):
        first = rows.setdefault(stem(name), row)
        if first != row:
            raise ValueError("%s: %r and %r are the same image, because only the name up to the first dot counts"
                             % (path, names[first], name))
    return rows, labels


def labels_of(path, images, attributes):
    """Returns the rows of a label file for these images, uint8 [images, attributes].

    Raises OSError, or ValueError for an image without a label.
    """
    rows, labels = read_labels(path)
    unlabelled = [image for image in images if stem(image) not in rows]
    if unlabelled:
        raise ValueError("%s: has no label for %d of %d images: %s"
                         % (path, len(unlabelled), len(images), some(unlabelled)))
    if labels.shape[1] != attributes:
        raise ValueError("%s: its rows have %d attributes, but the model's results have %d" % (path, labels.shape[1], attributes))
    return labels[[rows[stem(image)] for image in images]]


def attribute_names(count, path=None, model=None):
    """Returns the attributes' names from a file with one per line, else from a model, else PETA's if there are 35, else
    attribute0 ...

    Raises OSError, or ValueError if a file does not hold count different names, or if it holds a name of the model in another
    place than the model. Entirely other names, such as a translation, are right.
    """
    known = model and description(model).get("attributes")
    if known and len(known) != count:
        raise ValueError("%s: is a model of %d attributes, but there are %d; give the model of these results"
                         % (model, len(known), count))
    if path is None:
        return known or (PETA if count == len(PETA) else ["attribute%d" % i for i in range(count)])
    if not os.path.isfile(path):
        raise FileNotFoundError("%s: no such file; give a file with the attributes' names, one per line" % path)
    names = [line for line in read_lines(path) if line]
    if count not in (None, len(names)):
        raise ValueError("%s: holds %d names, but there are %d attributes; give one name per line" % (path, len(names), count))
    twice = [name for name, number in collections.Counter(names).items() if number > 1]
    if twice:
        raise ValueError("%s: holds a name more than once: %s" % (path, some(twice)))
    places = {name: place for place, name in enumerate(known or [], 1)}
    moved = ["%s (%d, not %d)" % (name, places[name], place) for place, name in enumerate(names, 1) if places.get(name, place) != place]
    if moved:
        raise ValueError("%s: holds the names of %s in another order, so figures would get a wrong name: %s; put them in the model's "
                         "order, or leave out --attributes" % (path, model, some(moved)))
    return names


def assumed(names):
    """Returns whether names are those that attribute_names() gives without a file and a model."""
    return names is PETA or names[0] == "attribute0"


def read_thresholds(path, names):
    """Reads a file of tools/thresholds.py. Returns (names, thresholds float32 [attributes], content).

    Without a path, the thresholds are 0. names: the attributes' names from attribute_names(). The file's names replace assumed
    ones. Raises OSError or ValueError.
    """
    if path is None:
        return names, np.zeros(len(names), np.float32), None
    content = read_json(path, THRESHOLDS_SHAPE, "tools/thresholds.py")
    thresholds = np.array([row["threshold"] for row in content["attributes"]], np.float32)
    theirs = names if content["names_assumed"] else [row["name"] for row in content["attributes"]]
    if len(thresholds) != len(names) or theirs != names and not assumed(names):
        raise ValueError("%s: holds the thresholds of other attributes (%s) than these (%s)"
                         % (path, some(row["name"] for row in content["attributes"]), some(names)))
    return theirs, thresholds, content


def label_checksum(row):
    """Returns the checksum of an image's label, which tools/thresholds.py records for each image that it tunes on."""
    return "%08x" % zlib.crc32(row.tobytes())


def check_not_tuned_on(path, tuned_on, images, labels):
    """Raises ValueError if thresholds were tuned on any of these images, because their figures would be too good.

    Other images may have the same names by chance, such as 0001.jpg. Few of those also have the same labels.
    """
    seen = [image for image in images if image in tuned_on]
    same = [image for image, row in zip(images, labels) if tuned_on.get(image) == label_checksum(row)]
    if 2 * len(same) > len(seen):
        raise ValueError("%s: was tuned on %d of these %d images (%s), whose figures would be too good; score others, such as "
                         "the test split's" % (path, len(seen), len(images), some(seen)))
