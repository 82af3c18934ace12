"""Makes the lists for the stages from a data set's annotations: image.txt, label.json and attributes.txt.

    python3 tools/lists.py peta PETA.mat --images /home/HwHiAiUser/dataset/peta/images
    python3 tools/lists.py rap RAP_annotation.mat --partition 3 --split trainval --output lists

    peta          PETA.mat: 35 attributes, 5 partitions; split train, val, trainval or test
    rap           RAP_annotation.mat of RAP (v1): 51 attributes, 5 partitions; split trainval or test
    rap2          RAP_annotation.mat of RAP v2: 54 attributes, 5 partitions; split train, val, trainval or test
    pa100k        annotation.mat of PA-100K: 26 attributes; split train, val, trainval or test
    pkl           dataset_zs_run0.pkl (the zero-shot PETA and RAP v2) or dataset_all.pkl of "Rethinking of Pedestrian
                  Attribute Recognition", or a pickle of OpenPAR, such as MSP60K's; the attributes have the file's order,
                  which is not that of the .mat file. Nothing in the file is executed
    peta-folders  the folder of PETA's ten sub-sets, each with archive/Label.txt: the 35 attributes, all images
    csv           a table: its first column names the images, each other column is an attribute, 0 or 1, with its name on top
    list          your own image.txt and, with --labels, label.json, to --flatten them

By default, the lists are those of partition 0's test set. image.txt has one file name per line, in evaluation order. label.json is
{file name: [0 or 1 for each attribute]}. attributes.txt has the attributes' names, one per line, in the order of the labels.
With --images, nothing is written unless every listed image exists.

No two images may have the same name up to the first dot, because that is the name of the bin and of the result. If a data set
has 0002.png in several folders, or 0002.png beside 0002.jpg, --flatten DIR makes a folder of links. Each link is named by the
image's whole path (cam1/0002.png: cam1_0002_png.png), and the lists hold these names. DIR is then the images' folder for all stages.
"""
import argparse
import collections
import csv
import json
import os
import re
import resource
import sys
import zlib

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from lib.files import read_lines, write_text
from lib.labels import PETA, read_rows
from lib.machine import worker_pool
from lib.names import check_length, composed, find_listed, inside, stem, undecodable
from lib.pickles import Named, Pickle, Unpickler
from lib.script import command, importing, note, one_line, some

with importing():
    import numpy as np

PETA_COLUMN = 4  # the first attribute's column in PETA's data; the image's number and three others come before it
RAP_COUNT = 51   # RAP's benchmark uses the first 51 of 92 attributes, which are frequent enough
UNCLEAR_LABEL = 2      # RAP's label if the annotators could not decide
PETA_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp")  # the endings in PETA's folders
BITS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}
MAX_CPU_SECONDS = 300    # the most processor time for reading a file. The largest file takes 3, but a hostile one could take for ever
LISTS = ["image.txt", "label.json", "attributes.txt"]

# The content of a file. names: of the images. labels: integers [images, columns]. attributes: the columns' names. used: the
# indexes of the benchmark's attributes. partitions: for each, {"train", "val", "test": rows}, or "trainval" for the first two.
Annotations = collections.namedtuple("Annotations", "names labels attributes used partitions")


# --- .mat files ------------------------------------------------------------------------------------------------------

def load_mat(path, *variables):
    """Reads some variables with scipy's loadmat. Raises ValueError for any file that is not a .mat file with them."""
    from scipy.io import loadmat
    try:
        content = loadmat(path, appendmat=False, variable_names=variables)
    except NotImplementedError:
        raise ValueError("%s: is a MATLAB 7.3 (HDF5) file; get the data set's own file, or save this one again in MATLAB: "
                         "s = load('%s'); save('new.mat', '-struct', 's', '-v7')" % (path, os.path.basename(path)))
    except Exception as error:  # a damaged file makes scipy raise nearly anything
        raise ValueError("%s: cannot be read as a .mat file; download it again: %s" % (path, one_line(error)))
    missing = [name for name in variables if name not in content]
    if missing:
        raise ValueError("it has no %s" % ", ".join(missing))
    return content


def fields(struct, what, count):
    """Returns the values of a struct's fields, in order. Raises ValueError if there are fewer than count."""
    if not isinstance(struct, np.ndarray) or struct.size != 1 or len(struct.dtype.names or ()) < count:
        raise ValueError("%s is not one struct of %d fields" % (what, count))
    return struct.ravel()[0].item()


def texts(cells, what):
    """Returns the strings of a cell array."""
    values = [np.asarray(cell) for cell in np.asarray(cells).ravel()]
    if any(value.size != 1 or not isinstance(value.item(), str) for value in values):
        raise ValueError("%s is not a list of names" % what)
    return [value.item() for value in values]


def integers(value, what):
    """Returns an array of whole numbers, or of booleans, as int64 in the same shape. Raises ValueError for any other value."""
    whole = isinstance(value, np.ndarray) and (
        value.dtype.kind in "bui" or value.dtype.kind == "f" and np.array_equal(value, np.floor(value)))
    if not whole:
        raise ValueError("%s is not an array of whole numbers" % what)
    return value.astype(np.int64)


def read_partitions(cells, parts, rows):
    """Returns the five partitions in a cell array of structs of image numbers. rows: {image number: row}."""
    cells = np.asarray(cells).ravel()
    if len(cells) != 5:
        raise ValueError("it has %d partitions, not 5" % len(cells))
    return [{part: rows_of(integers(numbers, "partition %d" % i), rows, "partition %d's %s" % (i, part))
             for part, numbers in zip(parts, fields(cell, "partition %d" % i, len(parts)))} for i, cell in enumerate(cells)]


def rows_of(numbers, rows, what):
    """Returns the rows for an array of image numbers. Raises ValueError for an unknown number."""
    numbers = numbers.ravel().tolist()
    unknown = [number for number in numbers if number not in rows]
    if unknown:
        raise ValueError("%s holds image %s, which the file does not have" % (what, some(map(str, unknown))))
    return [rows[number] for number in numbers]


def rows_by_number(first, count):
    """Returns {image number: row} for count images that are numbered from first on."""
    return dict(zip(range(first, first + count), range(count)))


def read_peta(path):
    data, attributes, selected, partitions = fields(load_mat(path, "peta")["peta"], "peta", 4)[:4]
    data, selected = integers(data, "data"), integers(selected, "selected_attribute")
    if data.ndim != 2 or data.shape[1] < PETA_COLUMN:
        raise ValueError("data has the shape %s" % list(data.shape))
    numbers = data[:, 0].tolist()
    return Annotations(["%05d.png" % number for number in numbers], data[:, PETA_COLUMN:], texts(attributes, "attribute"),
                       selected.ravel() - 1 - PETA_COLUMN,
                       read_partitions(partitions, ["train", "val", "test"], dict(zip(numbers, range(len(numbers))))))


def read_rap(path):
    partitions, labels, _, _, _, names, attributes = fields(load_mat(path, "RAP_annotation")["RAP_annotation"],
                                                            "RAP_annotation", 7)[:7]
    names, attributes = texts(names, "field 6"), texts(attributes, "field 7")
    return Annotations(names, integers(labels, "field 2")[:, :len(attributes)], attributes, np.arange(RAP_COUNT),
                       read_partitions(partitions, ["trainval", "test"], rows_by_number(1, len(names))))


def read_rap2(path):
    names, labels, attributes, selected, partitions = fields(load_mat(path, "RAP_annotation")["RAP_annotation"],
                                                             "RAP_annotation", 5)[:5]
    names = texts(names, "name")
    return Annotations(names, integers(labels, "data"), texts(attributes, "attribute"),
                       integers(selected, "selected_attribute").ravel() - 1,
                       read_partitions(partitions, ["train", "val", "test"], rows_by_number(1, len(names))))


def read_pa100k(path):
    parts = ["train", "val", "test"]
    content = load_mat(path, "attributes", *["%s_%s" % (part, what) for part in parts for what in ("images_name", "label")])
    names, labels, rows = [], [], {}
    for part in parts:
        first = len(names)
        names += texts(content[part + "_images_name"], part + "_images_name")
        labels.append(integers(content[part + "_label"], part + "_label"))
        rows[part] = list(range(first, len(names)))
        if len(labels[-1]) != len(rows[part]):
            raise ValueError("it has %d names but %d labels for %s" % (len(rows[part]), len(labels[-1]), part))
    attributes = texts(content["attributes"], "attributes")
    return Annotations(names, np.concatenate(labels), attributes, np.arange(len(attributes)), [rows])


# --- the pickles of "Rethinking of Pedestrian Attribute Recognition" and OpenPAR ------------------------------------------

class DataSet(Unpickler):
    """Refuses names that no data set needs."""

    def find_class(self, module, name):
        if module.split(".")[0] not in ("numpy", "easydict") and name not in ("range", "xrange"):
            raise ValueError("it refers to %s.%s, which no data set needs" % (module, name))
        return super().find_class(module, name)


def entries(value):
    """Returns the dict that a value is or, if it is an EasyDict, stands for."""
    return value.entries if isinstance(value, Named) else value


def type_of(named):
    """Returns the numpy type, such as '<U12', that a Named stands for. Raises ValueError unless it is a number or text."""
    code = "%s%s" % (named.state[1].replace("|", ""), named.arguments[0])
    if not re.match("[<>]?([biuf][1248]|U[0-9]{1,4})$", code):
        raise ValueError("it has values of the type %s" % code)
    return code


def array_of(named):
    """Returns the array that a Named stands for."""
    _, shape, dtype, fortran, data = named.state
    return np.frombuffer(data, type_of(dtype)).reshape(shape, order="F" if fortran else "C")


def text_of(value):
    """Returns a text, which may be a Named of numpy."""
    return value if isinstance(value, str) else str(np.frombuffer(value.arguments[1], type_of(value.arguments[0]))[0])


def texts_of(values):
    """Returns the texts of a list or array, without spaces at their ends."""
    values = array_of(values).tolist() if isinstance(values, Named) else map(text_of, values)
    return [value.strip() for value in values]


def read_pkl(path):
    with open(path, "rb") as f:
        content = entries(DataSet(Pickle(f.read())).load())
    # OpenPAR's labels are in the order of attributes, its own words. attr_name, the data set's words, has the same order, except
    # in a file with sentences. Only "Rethinking", which has no attributes, still has to apply label_idx.
    key = "attributes" if "sentences" in content or "attr_name" not in content else "attr_name"
    missing = [name for name in ("image_name", "label", "partition", key) if name not in content]
    if missing:
        raise ValueError("it has no %s" % ", ".join(missing))
    names, attributes = texts_of(content["image_name"]), texts_of(content[key])
    used = np.arange(len(attributes))
    if "label_idx" in content and "attributes" not in content:
        used = entries(content["label_idx"])["eval"]
    splits = entries(content["partition"])
    parts = [part for part in (["train", "val", "test"] if "train" in splits else ["trainval", "test"]) if part in splits]
    arrays = [splits[part] for part in parts]  # each is an array, or a list with one array per partition
    partitions = list(zip(*arrays)) if isinstance(arrays[0], list) else [arrays]
    return Annotations(names, integers(array_of(content["label"]), "label"), attributes, integers(np.array(used), "eval"), [
        {part: rows_of(integers(array_of(array), part), rows_by_number(0, len(names)), part) for part, array in zip(parts, partition)}
        for partition in partitions])


# --- other forms ----------------------------------------------------------------------------------------------------

def read_folders(path):
    """Reads PETA's sub-sets. A line of Label.txt has a person's number, or a file name, and the person's attributes.

    The number before the first underscore of an image's name is the person's.
    """
    folders = [folder for folder in sorted(os.listdir(path)) if os.path.isfile(os.path.join(path, folder, "archive/Label.txt"))]
    if not folders:
        raise ValueError("no folder in it has an archive/Label.txt")
    names, people, unlabelled = [], [], []
    for folder in folders:
        archive = os.path.join(path, folder, "archive")
        lines = [line.split() for line in read_lines(os.path.join(archive, "Label.txt"))]
        # PETA.mat calls this attribute footwearSneaker.
        words = {line[0]: {word.replace("footwearSneakers", "footwearSneaker") for word in line[1:]} for line in lines if line}
        for file in sorted(file for file in os.listdir(archive) if file.lower().endswith(PETA_ENDINGS)):
            root = os.path.splitext(file)[0]
            found = [words[key] for key in (file, root, root.split("_")[0]) if key in words]
            names.append("%s/archive/%s" % (folder, file))
            people += found[:1]
            unlabelled += [] if found else names[-1:]
    if unlabelled:
        raise ValueError("%d images have no line in Label.txt: %s" % (len(unlabelled), some(unlabelled)))
    if not any(words.intersection(PETA) for words in people):
        raise ValueError("none of its images has any of PETA's attributes")
    attributes = PETA + sorted(set().union(*people).difference(PETA))
    labels = [[name in words for name in attributes] for words in people]
    return Annotations(names, np.array(labels, int), attributes, np.arange(len(PETA)), [])


def read_csv(path):
    reader = csv.reader(read_lines(path))
    try:
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(row)]
    except csv.Error as error:
        raise ValueError("line %d: %s" % (reader.line_num, error))
    if len(rows) < 2 or len(rows[0][1]) < 2:
        raise ValueError("its first line is not image,attribute,attribute ... (separated by commas), or no line follows")
    labels, width = [], len(rows[0][1])
    for line, (name, *values) in rows[1:]:
        if len(values) != width - 1 or any(value.lower() not in BITS for value in values):
            raise ValueError("line %d (%s) is not a name and %d values, 0 or 1, separated by commas" % (line, name, width - 1))
        labels.append([BITS[value.lower()] for value in values])
    return Annotations([row[0] for _, row in rows[1:]], np.array(labels), rows[0][1][1:], np.arange(width - 1), [])


def read_own(labels_path, path):
    names = [line for line in read_lines(path) if line]
    if labels_path is None:
        return Annotations(names, None, None, None, [])
    labelled, labels = read_rows(labels_path)
    rows = dict(zip(labelled, range(len(labelled))))
    if len(rows) < len(labelled):
        raise ValueError("%s: holds %r twice" % (labels_path, max(labelled, key=labelled.count)))
    missing = [name for name in names if name not in rows]
    if missing:
        raise ValueError("%s: has no label for %d of its %d images: %s" % (labels_path, len(missing), len(names), some(missing)))
    return Annotations(names, labels[[rows[name] for name in names]], None, None, [])


SPLITS = ["train", "val", "trainval", "test"]
# set: (its reader, what it reads, its splits, its partitions)
SETS = {"peta": (read_peta, "PETA.mat", SPLITS, 5),
        "rap": (read_rap, "RAP_annotation.mat", ["trainval", "test"], 5),
        "rap2": (read_rap2, "RAP_annotation.mat", SPLITS, 5),
        "pa100k": (read_pa100k, "annotation.mat", SPLITS, 1),
        "pkl": (read_pkl, "pickle", SPLITS, 5),
        "peta-folders": (read_folders, "folder", [], 0),
        "csv": (read_csv, "table", [], 0),
        "list": (read_own, "list", [], 0)}


# --- for all data sets ------------------------------------------------------------------------------------------------

def select_attributes(annotations, wanted):
    """Returns (labels 0 and 1 as uint8 [images, attributes], names) of the wanted attributes (default: the benchmark's)."""
    names, labels, attributes, used, _ = annotations
    if labels is None:
        return None, None
    if labels.ndim != 2 or len(labels) != len(names) or attributes and labels.shape[1] != len(attributes):
        raise ValueError("it has %d images, %d attributes and labels of the shape %s"
                         % (len(names), len(attributes or ()), list(labels.shape)))
    if wanted:
        unknown = [name for name in wanted if name not in attributes]
        if unknown:
            raise ValueError("it has no attribute %s; it has %s" % (some(unknown), ", ".join(attributes)))
        used = [attributes.index(name) for name in wanted]
    if attributes:
        if not len(used) or min(used) < 0 or max(used) >= len(attributes):
            raise ValueError("its benchmark has attributes that it does not have")
        labels, attributes = labels[:, used], [attributes[i] for i in used]
    wrong = ((labels < 0) | (labels > UNCLEAR_LABEL)).any(axis=1)
    if wrong.any():
        raise ValueError("%s has a label that is neither 0 nor 1" % names[wrong.argmax()])
    unclear = labels == UNCLEAR_LABEL
    if annotations.partitions:  # of the thousands of images, some lack each attribute; but some codings have 1 for no and 2 for yes
        for value in (0, 1):
            bad = ~(labels == value).any(axis=0) & (unclear.any(axis=0) | (value == 0))
            if bad.any():
                found = np.unique(labels[:, bad.argmax()])
                raise ValueError("attribute %s has no %d at all, only %s; a label must be 1 for yes, 0 for no, or RAP's %d for "
                                 "unclear; write the labels so" % (attributes[bad.argmax()], value, " and ".join(map(str, found)),
                                                                  UNCLEAR_LABEL))
    if unclear.any():
        note("%d of %d labels are %d (unclear); they count as 0" % (unclear.sum(), labels.size, UNCLEAR_LABEL))
    return (labels == 1).astype(np.uint8), attributes


def check(names, attributes, partitions):
    """Raises ValueError for a name that a list cannot hold, and for a name that occurs twice."""
    if not names:
        raise ValueError("it has no image")
    for name in names:
        if not inside(name) or name != name.strip() or not stem(name) or undecodable(name):
            raise ValueError("%r is not a file name that a list can hold" % name[:200])
    if any(name != name.strip() or not name.isprintable() or not name for name in attributes or ()):
        raise ValueError("an attribute's name is empty or not a printable line: %r" % some(attributes))
    rows = [("partition %d" % i, [names[row] for rows in part.values() for row in rows]) for i, part in enumerate(partitions)]
    for what, values in [("it", names), ("it", attributes or ())] + rows:
        twice = [value for value, count in collections.Counter(values).items() if count > 1]
        if twice:
            raise ValueError("%s holds %s twice" % (what, some(twice)))


def read(data_set, path, labels_path=None, wanted=None):
    """Returns (names, labels, attributes, partitions) of a file or folder. select_attributes() returns the labels and attributes.

    labels_path: the label.json for a list. Raises OSError or ValueError.
    """
    reader, form = SETS[data_set][:2]
    try:
        annotations = reader(labels_path, path) if reader is read_own else reader(path)
        labels, attributes = select_attributes(annotations, wanted)
        check(annotations.names, attributes, annotations.partitions)
    except (OSError, ImportError):
        raise
    except Exception as error:  # a damaged file makes scipy and pickle raise nearly anything
        if str(error).startswith((path, labels_path or path)):
            raise ValueError(str(error))
        kind = "" if isinstance(error, ValueError) else type(error).__name__ + ": "
        raise ValueError("%s: is not the %s that lists.py %s takes: %s%s" % (path, form, data_set, kind, one_line(error)[:500]))
    return annotations.names, labels, attributes, annotations.partitions


def read_apart(data_set, path, *more):
    """Runs read() in another process, because some damaged files crash scipy's reader or keep it busy for ever."""
    from concurrent.futures.process import BrokenProcessPool
    if SETS[data_set][1].endswith(".mat"):
        import scipy.io  # noqa: F401 - import it here, so that a missing package is not reported as a bad file
    with worker_pool(1, read_in_worker) as run:
        try:
            result, = run([(data_set, path) + more])
        except BrokenProcessPool:
            raise ValueError("%s: is damaged, and the library that reads it crashes; download it again" % path)
    return result


def read_in_worker(arguments):
    """Runs read() in the worker process. The kernel kills the process if read() takes too long."""
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_SECONDS, MAX_CPU_SECONDS))
    return read(*arguments)


def flat_names(names):
    """Returns a name for each image's link: its path with _ for slashes and dots, and then its ending.

    a/b_c and a_b/c would get the same name, so a checksum is added to such names.
    """
    flat = [re.sub("[/.]", "_", name) for name in names]
    count = collections.Counter(map(composed, flat))
    return [new + ("_%08x" % zlib.crc32(name.encode()) if count[composed(new)] > 1 else "") + os.path.splitext(name)[1]
            for name, new in zip(names, flat)]


def link(folder, names, paths):
    """Makes a folder of links with these names to these paths. Keeps a correct link that already exists."""
    os.makedirs(folder, exist_ok=True)
    for name, path in zip(names, paths):
        place, target = os.path.join(folder, name), os.path.abspath(path)
        try:
            os.symlink(target, place)
        except FileExistsError:
            if not os.path.islink(place) or os.readlink(place) != target:
                raise ValueError("%s: exists already and is not a link to %s; give --flatten a new folder" % (place, target))


def check_stems(path, names):
    """Raises ValueError if two images would have the same bin, or if a result's name would be too long."""
    first, pairs = {}, []
    for name in names:
        check_length(stem(name), path)
        if first.setdefault(stem(name), name) is not name:
            pairs.append("%s and %s" % (first[stem(name)], name))
    if pairs:
        raise ValueError("%s: %d images share their name up to the first dot, and so their bin: %s; --flatten DIR gives each its "
                         "own name" % (path, len(pairs), some(pairs)))


def rows_of_split(path, partitions, partition, split):
    """Returns the rows of a split. Raises ValueError if the split does not exist or is empty."""
    if partition >= len(partitions):
        raise ValueError("%s: has no partition %d; it has %d" % (path, partition, len(partitions)))
    rows = partitions[partition]
    parts = ["train", "val"] if split == "trainval" and "train" in rows else [split]
    if not all(rows.get(part) for part in parts):
        raise ValueError("%s: partition %d has no image in %s; it has %s"
                         % (path, partition, split, ", ".join(part for part in rows if rows[part])))
    return [row for part in parts for row in rows[part]]


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    sets = parser.add_subparsers(dest="set", metavar="SET", help="one of the data sets above; lists.py SET --help lists its options")
    sets.required = True
    for name, (_, form, splits, partitions) in SETS.items():
        one = sets.add_parser(name, allow_abbrev=False)
        one.set_defaults(partition=0, split=None, labels=None, attributes=None)
        one.add_argument("file", metavar=form.upper() if form.islower() else form, help="the data set's annotations")
        if partitions > 1:
            one.add_argument("--partition", type=int, choices=range(partitions), default=0,
                             help="one of the %d random partitions (default: 0)" % partitions)
        if splits:
            one.add_argument("--split", choices=splits, default="test", help="the split to list (default: test)")
        if name != "list":
            one.add_argument("--attributes", metavar="FILE", help="the attributes to list, in this order, one per line; give "
                             "those of the model's training (default: the benchmark's, in the file's order)")
        else:
            one.add_argument("--labels", metavar="FILE", help="the label.json of these images")
        one.add_argument("--images", metavar="DIR", help="the images' folder, to check that every image is there")
        one.add_argument("--flatten", metavar="DIR", help="a folder to make, with links to the images under unique names")
        one.add_argument("--output", metavar="DIR", default=".", help="the folder for the lists (default: the current folder)")
    args = parser.parse_args(argv)
    if args.set == "peta-folders" and args.images is None:
        args.images = args.file
    if args.flatten is not None and args.images is None:
        parser.error("--flatten needs --images, the folder of the images to link to")
    return args


def read_split(args):
    """Returns (names, labels, attributes) of the chosen split, as read() does. Raises OSError or ValueError."""
    form = SETS[args.set][1]
    if not os.path.exists(args.file) or os.path.isdir(args.file) != (form == "folder"):
        raise FileNotFoundError("%s: no such %s; lists.py %s takes the data set's %s"
                                % (args.file, "folder" if form == "folder" else "file", args.set, form))
    wanted = args.attributes and [line for line in read_lines(args.attributes) if line]
    names, labels, attributes, partitions = read_apart(args.set, args.file, args.labels, wanted)
    if args.split:
        rows = rows_of_split(args.file, partitions, args.partition, args.split)
        names, labels = [names[row] for row in rows], labels[rows]
    inputs = {os.path.realpath(path) for path in (args.file, args.labels) if path}
    for path in (os.path.join(args.output, name) for name in LISTS):
        if os.path.realpath(path) in inputs:
            raise ValueError("%s: would be overwritten; give --output another folder" % path)
    return names, labels, attributes


def find_images(folder, names, path):
    """Returns the paths of the images in a folder. path: the file that names them. Raises OSError or ValueError."""
    paths = find_listed(folder, names, path)
    others = [path for path in paths if not os.path.isfile(path)]
    if others:
        raise ValueError("%d of the %d images are not files: %s" % (len(others), len(names), some(others)))
    return paths


def write_lists(folder, names, labels, attributes):
    """Writes the lists, without those of labels or attributes that are None. Returns the files' names."""
    texts = ["".join(name + "\n" for name in names),
             None if labels is None else json.dumps(dict(zip(names, labels.tolist()))),
             None if attributes is None else "".join(name + "\n" for name in attributes)]
    os.makedirs(folder, exist_ok=True)
    written = [(name, text) for name, text in zip(LISTS, texts) if text is not None]
    for name, text in written:
        write_text(os.path.join(folder, name), text)
    return [name for name, _ in written]


def main(argv=None):
    args = parse(argv)
    names, labels, attributes = read_split(args)
    paths = None if args.images is None else find_images(args.images, names, args.file)
    if args.flatten is not None:
        names = flat_names(names)
    check_stems(args.file, names)

    if args.flatten is not None:
        link(args.flatten, names, paths)
        print("%s: links to %d images" % (args.flatten, len(names)))
    files = write_lists(args.output, names, labels, attributes)
    print("%s: %s of %d images%s%s" % (
        args.output, ", ".join(files), len(names),
        " (partition %d, %s)" % (args.partition, args.split) if args.split else "",
        "" if labels is None else " and %d attributes" % labels.shape[1]))


if __name__ == "__main__":
    command(main)
