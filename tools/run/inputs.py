"""Checks the lists of a run before any work, and records what each file was made from. Only run_all.sh calls this script.

    inputs.py lists --image-list image.txt --images images --label-file label.json
    inputs.py card_model deepmar_deploy_model.onnx 1 3 224 224
    inputs.py spread /data/train.txt calibration_bin.txt
    inputs.py made STAGE input_bin image_list images size -- image_list=/data/image.txt images=/data/images size="224 224"
    inputs.py verify input_bin=4 deepmar.info=5 -- image_list=/data/image.txt images=/data/images size="224 224"
    inputs.py get deepmar_bs1.om model

lists checks the user's lists against each other and stops at the first fault. It prints the number of attributes in the labels.
card_model stops unless a file is a model of amct_onnx for atc that takes this input.
spread writes a list of the images that calibrate INT8, 32 or all, evenly spread over the given list.

The other commands run in the work folder. After -- come the run's variables and their values.
made records in .made_from/ what a stage made a product from: variables of the run and files in the work folder. NAME=VALUE
is a fact to remember. Without inputs and facts, it records that the product is being replaced.
verify stops unless each PRODUCT is still what its STAGE made. It also stops if a variable or file of this run differs from the
one that the product was made from. Files that other stages made are verified in the same way.
get prints facts that made has recorded, on one line.

Names, sizes and checksums identify an input, so a copied work folder stays valid on another machine. A file is not read again
if its size, times and inode are the same as before. A product without a record belongs to the user and is accepted, such as an
OM that was converted elsewhere. An input that no longer exists is not compared, such as a deleted checkpoint.
"""
import argparse
import functools
import json
import os
import shlex
import sys
import zlib

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__)))))
from lib.files import write_text
from lib.names import find_listed, read_list, stem
from lib.script import command, note, some

RECORDS = ".made_from"
CHECKSUMS = os.path.join(RECORDS, "checksums.json")
LISTS = {"images": "image_list", "calibration_images": "calibration_list"}  # a folder's variable in run_all.sh, and its list's
PATHS = ("checkpoint", "card_model") + tuple(LISTS) + tuple(LISTS.values())  # these variables are paths, the others settings
CALIBRATION_IMAGES = 32  # AMCT's guides advise 16 or 32. More would be used at large batch sizes alone, which would then differ


# --- checksums ------------------------------------------------------------------------------------------------------

def load(path):
    """Returns the content of a JSON file that this script wrote, or {} if the file is missing or damaged."""
    try:
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


@functools.lru_cache(maxsize=None)
def checksums():
    """Returns the checksums of earlier checks, {path: [size, mtime, ctime, inode, checksum]}. Reads them only once."""
    return load(CHECKSUMS)


def checksum(path):
    """Returns the CRC-32 of a file's content as 8 hexadecimal digits. It finds accidental changes, not deliberate forgery."""
    value = 0
    with open(path, "rb", buffering=0) as f:
        while True:
            data = f.read(1 << 20)
            if not data:
                return "%08x" % value
            value = zlib.crc32(data, value)


def identities(paths):
    """Returns 'SIZE CHECKSUM' of each file. Remembers them in the work folder, with the file's times and inode."""
    seen = checksums()
    keys = [os.path.relpath(path) if os.path.realpath(path).startswith(os.getcwd() + os.sep) else os.path.abspath(path)
            for path in paths]
    stats = [os.stat(path) for path in paths]
    states = [[s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for s in stats]
    unknown = [i for i, (key, state) in enumerate(zip(keys, states)) if seen.get(key, [])[:4] != state]
    if unknown:
        from concurrent.futures import ThreadPoolExecutor  # most calls find nothing new to read, and run_all.sh makes many of them
        from lib.machine import cores
        with ThreadPoolExecutor(cores()) as readers:
            for i, value in zip(unknown, readers.map(checksum, [paths[i] for i in unknown])):
                seen[keys[i]] = states[i] + [value]
        os.makedirs(RECORDS, exist_ok=True)
        write_text(CHECKSUMS, json.dumps(seen))
    return ["%d %s" % (state[0], seen[key][4]) for key, state in zip(keys, states)]


def content(path):
    """Returns the identity of a file, or {name: identity} of the files in a folder."""
    if os.path.isdir(path):
        names = sorted(entry.name for entry in os.scandir(path) if entry.is_file())
        return dict(zip(names, identities([os.path.join(path, name) for name in names])))
    return identities([path])[0]


def spread(names):
    """Returns those of the names that calibrate INT8: CALIBRATION_IMAGES, evenly spread, or all if there are fewer."""
    count = min(len(names), CALIBRATION_IMAGES)
    return [names[i * len(names) // count] for i in range(count)]


def present(name, variables):
    """Returns what an input is now, or None if it no longer exists. name: a variable of the run, or a file's path."""
    path = variables.get(name, name)
    if name in variables and name not in PATHS:
        return path
    if not path or not os.path.exists(path) or name in LISTS and not variables[LISTS[name]]:
        return None
    if name not in LISTS:
        return content(path)
    listed = variables[LISTS[name]]
    names = read_list(listed) if name == "images" else spread(read_list(listed))
    return dict(zip(names, identities(find_listed(path, names, listed))))


# --- records --------------------------------------------------------------------------------------------------------

def record_path(product):
    return os.path.join(RECORDS, product.replace("/", "_") + ".json")


def made(stage, product, inputs, variables):
    """Records what a product is and what its stage made it from."""
    facts = dict(text.split("=", 1) for text in inputs if "=" in text)
    inputs = {name: present(name, variables) for name in inputs if "=" not in name}
    os.makedirs(RECORDS, exist_ok=True)
    write_text(record_path(product), json.dumps({
        "stage": stage, "product": content(product) if inputs else None, "inputs": inputs, "facts": facts}, indent=1))


def difference(before, now):
    """Returns a text about how two contents of a folder differ. It is '' if they are equal or not folders."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return ""
    changed = [name for name in now if before.get(name, now[name]) != now[name]]
    texts = [(changed, "changed"), (sorted(set(now) - set(before)), "new"), (sorted(set(before) - set(now)), "gone")]
    return "".join("; %d %s: %s" % (len(names), text, some(names)) for names, text in texts if names)


def verify(product, stage, variables, seen):
    """Raises ValueError unless a product exists and is still what its stage made from this run's inputs.

    seen: the products that were verified before.
    """
    where = os.path.abspath(product)
    if not os.path.exists(product):
        raise ValueError("%s is missing; run stage %s first" % (where, stage))
    if product in seen or not os.path.exists(record_path(product)):
        return
    seen.add(product)
    record = load(record_path(product))
    if not record.get("product") or not isinstance(record.get("inputs"), dict):
        raise ValueError("%s: stage %s did not finish; run stage %s again" % (where, stage, stage))
    for name in record["inputs"]:
        if name not in variables and os.path.exists(name):  # before the product itself: the error must name the earliest stage
            verify(name, load(record_path(name)).get("stage", stage), variables, seen)
    now = content(product)
    if record["product"] != now:
        raise ValueError("%s is not what stage %s made here%s; run stage %s again, or delete %s if it is your own"
                         % (where, stage, difference(record["product"], now), stage, os.path.abspath(record_path(product))))
    for name, before in record["inputs"].items():
        now = present(name, variables)
        if now is None or before == now:
            continue
        if name in variables and name not in PATHS:
            raise ValueError("%s was made with %s %s, not %s; run stage %s again, or give --%s %s" % (
                where, name, before or "(none)", now or "(none)", stage, name.replace("_", "-"), shlex.quote(before)))
        path = variables.get(name, name)
        what = "other images than those in %s now" % path if name in LISTS else "another %s" % os.path.basename(path)
        raise ValueError("%s was made from %s%s; run stage %s again" % (where, what, difference(before, now), stage))


# --- the user's data ------------------------------------------------------------------------------------------------

def check_lists(arguments):
    """Checks the lists against each other. Returns the number of attributes, or None without labels. Raises OSError or ValueError."""
    parser = argparse.ArgumentParser(prog="inputs.py lists")
    for name in ("image-list", "images", "calibration-list", "calibration-images", "label-file", "attributes", "thresholds", "groups"):
        parser.add_argument("--" + name)
    args = parser.parse_args(arguments)
    from lib.labels import attribute_names, check_not_tuned_on, labels_of, read_groups, read_labels, read_thresholds
    names = read_list(args.image_list) if args.image_list else []
    paths = find_listed(args.images, names, args.image_list) if args.images and names else []
    if args.calibration_list:
        chosen, tested = spread(read_list(args.calibration_list)), set(map(os.path.realpath, paths))
        calibrating = find_listed(args.calibration_images, chosen, args.calibration_list)
        common = [name for name, path in zip(chosen, calibrating) if os.path.realpath(path) in tested]
        if common:
            note("%s and %s both name %s; calibrate INT8 with training or validation images, or the accuracy looks too good"
                 % (args.calibration_list, args.image_list, some(common)))
    read_groups(args.groups, names)
    count = None
    if args.label_file:
        count = read_labels(args.label_file)[1].shape[1]
        labels = labels_of(args.label_file, names, count)
        if args.thresholds:
            _, _, thresholds = read_thresholds(args.thresholds, attribute_names(count, args.attributes))
            stems, checksums = list(map(stem, names)), {}
            if args.images and thresholds["image_checksums"]:
                checksums = dict(zip(stems, identities(find_listed(args.images, names, args.image_list))))
            check_not_tuned_on(args.thresholds, thresholds, stems, labels, checksums)
    if args.attributes:
        attribute_names(count, args.attributes)
    return count


def check_card_model(path, shape):
    """Raises ValueError unless a file is a deploy model of amct_onnx with an input of this shape, or of an open one."""
    from lib.models import read_unchecked
    graph = read_unchecked(path).graph
    if "AscendQuant" not in {node.op_type for node in graph.node}:
        raise ValueError("%s: has no AscendQuant, so it is no INT8 model for atc; give NAME_deploy_model.onnx of amct_onnx" % path)
    weights = {tensor.name for tensor in graph.initializer}
    for value in graph.input:
        found = [dim.dim_value or size for dim, size in zip(value.type.tensor_type.shape.dim, shape)]
        if value.name not in weights and found != shape:
            raise ValueError("%s: takes %s, but batch_size and size make it %s; change these, or give another model" % (path, found, shape))


def main(argv=None):
    actions = ["lists", "card_model", "spread", "made", "verify", "get"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, usage="inputs.py %s ARGUMENT ... [-- NAME=VALUE ...]" % "|".join(actions))
    parser.add_argument("action", choices=actions, help=argparse.SUPPRESS)
    argv = sys.argv[1:] if argv is None else argv
    action, arguments = parser.parse_args(argv[:1]).action, argv[1:]
    if action == "lists":
        count = check_lists(arguments)
        if count is not None:
            print(count)
        return
    if action == "card_model":
        check_card_model(arguments[0], list(map(int, arguments[1:])))
        return
    if action == "spread":
        write_text(arguments[1], "".join(name + "\n" for name in spread(read_list(arguments[0]))))
        return
    end = arguments.index("--") if "--" in arguments else len(arguments)
    arguments, variables = arguments[:end], dict(text.split("=", 1) for text in arguments[end + 1:])
    if action == "made":
        made(arguments[0], arguments[1], arguments[2:], variables)
    elif action == "verify":
        seen = set()
        for argument in arguments:
            product, _, stage = argument.rpartition("=")
            verify(product, stage, variables, seen)
    else:
        facts = load(record_path(arguments[0])).get("facts", {})
        print(" ".join(facts.get(name, "unknown") for name in arguments[1:]))


if __name__ == "__main__":
    command(main)
