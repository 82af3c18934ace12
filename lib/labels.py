"""Labels, the attributes' names, and the threshold of each attribute."""
import collections
import contextlib
import json
import os
import zlib

from lib.files import NUMBER, read_json, read_lines, read_text
from lib.models import description
from lib.names import stem
from lib.script import importing, note, some

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
MAX_SEEN = 0.01  # thresholds may have been tuned on this share of the images that are scored: data sets hold some images twice
GROUPS_HELP = ("a file with an image's name and its group a line, such as the person's; the 95%% intervals then draw whole groups, "
               "because images of one person are not independent")


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


def attribute_names(count, path=None, model=None, described=None):
    """Returns the attributes' names from a file with one per line, else from a model, else PETA's if there are 35, else
    attribute0 ...

    described: the model's description, if the caller has it. Raises OSError, or ValueError if a file does not hold count different
    names, or if it holds a name of the model in another place than the model. Entirely other names, such as a translation, are right.
    """
    if described is None:
        described = description(model) if model else {}
    known = described.get("attributes")
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
    check_order(path, names, model, known or [], "put them in the model's order, or leave out --attributes")
    return names


def check_order(path, names, model, known, remedy):
    """Raises ValueError if a file holds a name of a model, whose names are known, in another place than the model."""
    places = {name: place for place, name in enumerate(known, 1)}
    moved = ["%s (%d, not %d)" % (name, places[name], place) for place, name in enumerate(names, 1) if places.get(name, place) != place]
    if moved:
        raise ValueError("%s: holds the names of %s in another order, so figures would get a wrong name: %s; %s"
                         % (path, model, some(moved), remedy))


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
    if not isinstance(content.setdefault("image_checksums", {}), dict):  # earlier files have none
        raise ValueError("%s: is not what tools/thresholds.py writes" % path)
    thresholds = np.array([row["threshold"] for row in content["attributes"]], np.float32)
    theirs = names if content["names_assumed"] else [row["name"] for row in content["attributes"]]
    if len(thresholds) != len(names) or theirs != names and not assumed(names):
        raise ValueError("%s: holds the thresholds of other attributes (%s) than these (%s)"
                         % (path, some(row["name"] for row in content["attributes"]), some(names)))
    return theirs, thresholds, content


def label_checksum(row):
    """Returns the checksum of an image's label, which tools/thresholds.py records for each image that it tunes on."""
    return "%08x" % zlib.crc32(row.tobytes())


def image_checksums(folders, images):
    """Returns what run_all.sh recorded of the image files behind some results, {image: 'SIZE CRC32'}, or {} if a record is missing.

    folders: those of the results. images: their names. tools/run/inputs.py writes the records into the work folder: the results
    were made from the info file, this from the bins, and these from the images.
    """
    found = {}
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):  # no record, or a damaged one
        for folder in folders:
            folder = os.path.realpath(folder)
            work, product = os.path.dirname(os.path.dirname(folder)), "_".join(folder.split(os.sep)[-2:])
            records = []
            for name in (product, "deepmar.info", "input_bin"):
                with open(os.path.join(work, ".made_from", name + ".json"), encoding="utf-8") as f:
                    records.append(json.load(f))
            result, info, bins = records
            if result["inputs"]["deepmar.info"] == info["product"] and info["inputs"]["input_bin"] == bins["product"]:
                found.update((stem(name), checksum) for name, checksum in bins["inputs"]["images"].items())
        return {image: found[image] for image in images}
    return {}


def check_not_tuned_on(path, content, images, labels, checksums):
    """Raises ValueError if thresholds were tuned on these images, because their figures would be too good.

    path, content: of the thresholds' file. checksums: of image_checksums(). Without them or the file's own, only names and labels
    can tell, and the error or a note says so: other images may have the same names by chance, such as 0001.jpg, but few of those
    also have the same labels.
    """
    theirs, tuned_on, hint = content["image_checksums"], content["tuned_on"], ""
    if checksums and theirs:
        known = set(map(str, theirs.values()))
        seen = [image for image in images if checksums[image] in known]
        refused, what = len(seen) > MAX_SEEN * len(images), "was tuned on %d of these %d images%s"
    else:
        named = [image for image in images if image in tuned_on]
        seen = [image for image, row in zip(images, labels) if tuned_on.get(image) == label_checksum(row)]
        refused, what = 2 * len(seen) > len(named), "was tuned on images with the names and labels of %d of these %d%s"
        hint = "; there are no checksums of %s to tell more: run_all.sh records them" % (
            "these images" if theirs else "the images that it was tuned on")
    what = "%s: " % path + what % (len(seen), len(images), " (%s)" % some(seen) if seen else "")
    if refused:
        raise ValueError("%s, whose figures would be too good; score others, such as the test split's%s" % (what, hint))
    if seen or hint:
        note(what + hint)


def read_groups(path, images):
    """Returns the group of each image, int [images], from a file with 'NAME GROUP' a line. Returns None without a path.

    Groups are numbered from 0. Raises OSError, or ValueError for an image without a group.
    """
    if path is None:
        return None
    if not os.path.isfile(path):
        raise FileNotFoundError("%s: no such file; give a file with an image's name and its group a line" % path)
    groups = {}
    for number, line in enumerate(read_lines(path), 1):
        words = line.rsplit(None, 1)
        if len(words) == 1:
            raise ValueError("%s: line %d is not 'NAME GROUP': %r" % (path, number, line[:200]))
        if words and groups.setdefault(stem(words[0]), words[1]) != words[1]:
            raise ValueError("%s: line %d: %s already has another group" % (path, number, words[0]))
    lost = [image for image in images if stem(image) not in groups]
    if lost:
        raise ValueError("%s: has no group for %d of %d images: %s" % (path, len(lost), len(images), some(lost)))
    numbers = {}
    return np.array([numbers.setdefault(groups[stem(image)], len(numbers)) for image in images])
