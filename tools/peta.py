"""The PETA lists that the guide presupposes: PETA.mat -> image.txt, label.json and attributes.txt.

    python3 tools/peta.py PETA.mat
    python3 tools/peta.py PETA.mat --partition 3 --split trainval --images /home/HwHiAiUser/dataset/peta/images --output lists

PETA.mat comes with the open-source repository's data set. Without options the lists are those of the published accuracy:
the test set of partition 0, 7600 images. With --images, nothing is written unless every image of the list is there.
image.txt has a file name a line, in evaluation order; label.json is {file name: [0 or 1 for each of the 35 attributes]};
attributes.txt has the attributes' names, one a line, in the order of the labels.
"""
import argparse
import json
import os
import sys

HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]
from common import command, importing, joined, note, one_line, write_text
from preprocess_deepmar_pytorch import start_worker, uninterrupted

with importing():
    import numpy as np

PARTITIONS = 5
SPLITS = {"train": ["train"], "val": ["val"], "trainval": ["train", "val"], "test": ["test"]}
FIELDS = ["data", "attribute", "selected_attribute", "partion_attribute"]  # spelt so in the file
FIRST = 4  # the column of data that holds the first attribute; before it are the image's number and three others
NAME = "%05d.png"  # the file of image number n


def integers(value, what):
    """Returns an array of whole numbers as int64 of the same shape; raises ValueError for any other value."""
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "uif" or not np.array_equal(value, np.floor(value)):
        raise ValueError("%s is not an array of whole numbers" % what)
    return value.astype(np.int64)


def read_peta(path, partition):
    """Returns what PETA.mat says: (labels, names, splits).

    labels: {image number: its row of 0 and 1, int64 [selected attributes]}; names: the selected attributes'; splits:
    {"train", "val", "test": int64 array of image numbers, in the partition's order}. Raises OSError, or ValueError with
    what is wrong with the file.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError("%s: no such file; the first argument is PETA.mat of the data set" % path)
    import multiprocessing
    import scipy.io  # noqa: F401 - here, so that its absence is no fault of the file
    # In a process of its own, as some damaged files crash scipy's reader.
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    reader = context.Process(target=send_peta, daemon=True, args=(os.getpid(), theirs, path, partition))
    try:
        with uninterrupted():
            reader.start()
    except OSError as error:  # a limit of processes
        note("no process can be started (%s), so a damaged file may crash this one" % error.strerror)
        return load_peta(path, partition)
    finally:
        theirs.close()
    try:
        result = ours.recv()
    except EOFError:
        raise ValueError("%s: damaged; scipy's reader crashes on it. Get it again" % path)
    finally:
        reader.kill()
        reader.join()
    if isinstance(result, Exception):
        raise result
    return result


def send_peta(parent, pipe, path, partition):
    """The reader's process: sends what load_peta() returns, or its exception."""
    start_worker(parent)
    try:
        pipe.send(load_peta(path, partition))
    except Exception as error:  # whatever it is, the parent raises it
        pipe.send(error)


def load_peta(path, partition):
    """read_peta(), but a damaged file may end the process."""
    from scipy.io import loadmat
    try:
        content = loadmat(path, appendmat=False, variable_names=["peta"])
    except NotImplementedError:  # HDF5, which PETA.mat is not
        raise ValueError("%s: is a MATLAB 7.3 file; give the PETA.mat of the data set" % path)
    except Exception as error:  # a damaged file makes scipy raise nearly anything
        raise ValueError("%s: cannot be read as a .mat file, get it again: %s"
                         % (path, one_line(error)))
    try:
        return parse_peta(content, partition)
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise ValueError("%s: not the PETA.mat of the data set: %s" % (path, error))


def parse_peta(content, partition):
    """read_peta() on what scipy's loadmat returns; raises an error where it is not PETA's."""
    peta = content.get("peta")
    if peta is None or peta.size != 1 or any(field not in (peta.dtype.names or ()) for field in FIELDS):
        raise ValueError("it has no struct 'peta' with the fields %s" % ", ".join(FIELDS))
    data, attribute, selected, partitions = (peta.ravel()[0][field] for field in FIELDS)
    data, selected = integers(data, "data"), integers(selected, "selected_attribute").ravel()
    if data.ndim != 2 or data.shape[0] < 1 or data.shape[1] <= FIRST:
        raise ValueError("data has the shape %s, not [images, %d + attributes]" % (list(data.shape), FIRST))
    names = [str(np.asarray(cell).item()) for cell in attribute.ravel()]
    if len(names) != data.shape[1] - FIRST:
        raise ValueError("it has %d attribute names, but data has %d attributes" % (len(names), data.shape[1] - FIRST))
    # selected_attribute counts data's columns from 1.
    if not len(selected) or selected.min() <= FIRST or selected.max() > data.shape[1]:
        raise ValueError("selected_attribute names columns that hold no attribute")
    labels = data[:, selected - 1]
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("image %d has an attribute that is neither 0 nor 1"
                         % data[~np.isin(labels, (0, 1)).all(axis=1), 0][0])
    numbers = data[:, 0].tolist()
    if len(set(numbers)) != len(numbers):
        raise ValueError("an image's number is there twice")
    if partitions.size != PARTITIONS:
        raise ValueError("it has %d partitions, not %d" % (partitions.size, PARTITIONS))
    chosen = partitions.ravel()[partition]
    if chosen.size != 1 or any(name not in (chosen.dtype.names or ()) for name in ("train", "val", "test")):
        raise ValueError("partition %d is not train, val and test" % partition)
    splits = {name: integers(chosen.ravel()[0][name], "partition %d's %s" % (partition, name)).ravel()
              for name in ("train", "val", "test")}
    known, seen = set(numbers), set()
    for name, images in splits.items():
        for number in images.tolist():
            if number not in known or number in seen:
                raise ValueError("partition %d's %s holds image %d, which %s" % (
                    partition, name, number, "is there twice" if number in seen else "data does not have"))
            seen.add(number)
    return dict(zip(numbers, labels)), [names[column - 1 - FIRST] for column in selected], splits


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("peta", metavar="PETA.mat", help="the data set's description")
    parser.add_argument("--partition", type=int, choices=range(PARTITIONS), default=0,
                        help="one of the five random partitions (default: 0)")
    parser.add_argument("--split", choices=list(SPLITS), default="test", help="which images of it (default: test)")
    parser.add_argument("--images", metavar="DIR", help="the images' folder, to check that every image is there")
    parser.add_argument("--output", metavar="DIR", default=".", help="where to write (default: the current folder)")
    args = parser.parse_args(argv)

    labels, attributes, splits = read_peta(args.peta, args.partition)
    numbers = [number for name in SPLITS[args.split] for number in splits[name].tolist()]
    if not numbers:
        raise ValueError("%s: partition %d has no image in %s" % (args.peta, args.partition, args.split))
    names = [NAME % number for number in numbers]
    if args.images is not None:
        if not os.path.isdir(args.images):
            raise FileNotFoundError("%s: no such folder; --images is the images' folder" % args.images)
        missing = [name for name in names if not os.path.isfile(os.path.join(args.images, name))]
        if missing:
            raise FileNotFoundError("%s: %d of %d images are not there, so nothing was written: %s"
                                    % (args.images, len(missing), len(names), joined(missing)))
    os.makedirs(args.output, exist_ok=True)
    write_text(os.path.join(args.output, "image.txt"), "".join(name + "\n" for name in names))
    write_text(os.path.join(args.output, "label.json"),
               json.dumps({name: labels[number].tolist() for name, number in zip(names, numbers)}))
    write_text(os.path.join(args.output, "attributes.txt"), "".join(name + "\n" for name in attributes))
    print("%s: image.txt, label.json and attributes.txt of %d images (partition %d, %s) and %d attributes"
          % (args.output, len(names), args.partition, args.split, len(attributes)))


if __name__ == "__main__":
    command(main)
