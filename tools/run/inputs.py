"""Checks the input of a run before any work, and keeps records of what each file was made from.

    python3 tools/run/inputs.py check --image-list image.txt --images images --label-file label.json
    python3 tools/run/inputs.py record input_bin image_list=image.txt images=images size="224 224"
    python3 tools/run/inputs.py fresh input_bin 4 image_list=image.txt images=images size="224 224"

run_all.sh calls this script in the work folder.

check reads the lists and stops at the first fault. It prints the number of attributes in the labels.
record writes into .made_from/ what a stage has made its product from: ROLE=PATH for a file or folder, images=FOLDER for the
images of the image_list before it, and settings such as size="224 224".
fresh fails unless a product is unchanged since its stage made it, from the same inputs as now. -- separates several products.
get prints settings, one per line.

Names, sizes and checksums identify an input, so a work folder stays valid after it was copied to another machine. A file is not
read again if its size, times and inode are unchanged since the last check. A product without a record, such as an OM that was
converted elsewhere, belongs to the user and is accepted.
"""
import argparse
import functools
import json
import os
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__)))))
from lib.files import read_lines, write_text
from lib.machine import cores
from lib.names import stem
from lib.script import command, some

RECORDS = ".made_from"
SEEN = os.path.join(RECORDS, "checksums.json")
SETTINGS = ("size", "aipp", "last_conv_stride", "state_dict", "backend", "model_name")


# --- checksums ------------------------------------------------------------------------------------------------------

def load(path):
    """Returns the content of a JSON file that this script wrote, or {} if the file is missing or damaged."""
    try:
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError):
        return {}


@functools.lru_cache(maxsize=None)
def checksums():
    """Returns the checksums of earlier checks, {path: [size, mtime, ctime, inode, checksum]}. Reads them only once."""
    return load(SEEN)


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
    """Returns 'SIZE CHECKSUM' of each file. Remembers these in the work folder, with the file's times and inode."""
    seen = checksums()
    keys = [os.path.relpath(path) if os.path.realpath(path).startswith(os.getcwd() + os.sep) else os.path.abspath(path)
            for path in paths]
    stats = [os.stat(path) for path in paths]
    states = [[s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for s in stats]
    unknown = [i for i, (key, state) in enumerate(zip(keys, states)) if seen.get(key, [])[:4] != state]
    if unknown:
        with ThreadPoolExecutor(cores()) as readers:
            for i, value in zip(unknown, readers.map(checksum, [paths[i] for i in unknown])):
                seen[keys[i]] = states[i] + [value]
        os.makedirs(RECORDS, exist_ok=True)
        write_text(SEEN, json.dumps(seen))
    return ["%d %s" % (state[0], seen[key][4]) for key, state in zip(keys, states)]


def content(role, path, image_list=None):
    """Returns the identity of an input: a text for a file or setting, {name: text} for a folder or its listed images."""
    if role in SETTINGS:
        return path
    if role == "images":
        from lib.names import find_listed, read_list
        names = read_list(image_list)
        return dict(zip(names, identities(find_listed(path, names, image_list))))
    if os.path.isdir(path):
        names = sorted(entry.name for entry in os.scandir(path) if entry.is_file())
        return dict(zip(names, identities([os.path.join(path, name) for name in names])))
    return identities([path])[0]


def parse_inputs(arguments):
    """Yields (role, path or setting, content) for arguments ROLE=PATH. Leaves out inputs that do not exist."""
    image_list = None
    for argument in arguments:
        role, _, path = argument.partition("=")
        if role == "image_list":
            image_list = path
        if role in SETTINGS or path and os.path.exists(path):
            yield role, path, content(role, path, image_list)


# --- records --------------------------------------------------------------------------------------------------------

def record_path(product):
    return os.path.join(RECORDS, product.replace("/", "_") + ".json")


def record(product, *arguments):
    """Records what a product is and what it was made from. Without arguments, it records that the product is being replaced."""
    record = {"product": content("product", product) if arguments else None,
              "inputs": {role: value for role, _, value in parse_inputs(arguments)}}
    os.makedirs(RECORDS, exist_ok=True)
    write_text(record_path(product), json.dumps(record, indent=1))


def difference(before, now):
    """Returns a text about how two contents of a folder differ. It is '' if they are equal or not folders."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return ""
    changed = [name for name in now if before.get(name, now[name]) != now[name]]
    texts = [(changed, "changed"), (sorted(set(now) - set(before)), "new"), (sorted(set(before) - set(now)), "gone")]
    return "".join("; %d %s: %s" % (len(names), text, some(names)) for names, text in texts if names)


def fresh(product, stage, *arguments):
    """Raises ValueError unless a product exists and is still what its stage made from these inputs."""
    where = os.path.abspath(product)
    if not os.path.exists(product):
        raise ValueError("%s is missing; run stage %s first" % (where, stage))
    if not os.path.exists(record_path(product)):
        return
    made = load(record_path(product))
    if "inputs" not in made or made["product"] is None:
        raise ValueError("%s: stage %s did not finish; run stage %s again" % (where, stage, stage))
    now = content("product", product)
    if made["product"] != now:
        raise ValueError("%s is not what stage %s made here%s; run stage %s again, or delete %s if it is your own"
                         % (where, stage, difference(made["product"], now), stage, os.path.abspath(record_path(product))))
    for role, path, now in parse_inputs(arguments):
        if role not in made["inputs"] or made["inputs"][role] == now:
            continue
        if role in SETTINGS:
            raise ValueError("%s was made with %s %s, not %s; run stage %s again, or give --%s %s" % (
                where, role, made["inputs"][role] or "(none)", now or "(none)", stage, role.replace("_", "-"),
                made["inputs"][role]))
        if role == "images":
            raise ValueError("%s was made from other images than those in %s now%s; run stage %s again"
                             % (where, path, difference(made["inputs"][role], now), stage))
        raise ValueError("%s was made from another %s%s; run stage %s again"
                         % (where, os.path.basename(path), difference(made["inputs"][role], now), stage))


# --- the user's data ------------------------------------------------------------------------------------------------

def check(arguments):
    """Checks the lists against each other. Returns the number of attributes, or None without labels. Raises OSError or ValueError."""
    parser = argparse.ArgumentParser(prog="inputs.py check")
    for name in ("image-list", "images", "label-file", "attributes", "thresholds"):
        parser.add_argument("--" + name)
    args = parser.parse_args(arguments)
    from lib.labels import attribute_names, check_not_tuned_on, labels_of, read_labels, read_thresholds
    from lib.names import find_listed, read_list
    names = read_list(args.image_list) if args.image_list else []
    if args.images and names:
        find_listed(args.images, names, args.image_list)
    count = None
    if args.label_file:
        count = read_labels(args.label_file)[1].shape[1]
        labels = labels_of(args.label_file, names, count)
        if args.thresholds:
            _, _, thresholds = read_thresholds(args.thresholds, attribute_names(count, args.attributes))
            check_not_tuned_on(args.thresholds, thresholds["tuned_on"], [stem(name) for name in names], labels)
    if args.attributes:
        attribute_names(count or len([line for line in read_lines(args.attributes) if line]), args.attributes)
    return count


def groups(arguments):
    """Yields the parts of a list of arguments between --."""
    part = []
    for argument in list(arguments) + ["--"]:
        if argument != "--":
            part.append(argument)
        elif part:
            yield part
            part = []


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, usage="inputs.py check|record|fresh|get ARGUMENT [ARGUMENT ...]")
    parser.add_argument("command", choices=["check", "record", "fresh", "get"], help=argparse.SUPPRESS)
    argv = sys.argv[1:] if argv is None else argv
    args, arguments = parser.parse_args(argv[:1]), argv[1:]  # argparse must not see the rest, because it would drop a --
    if args.command == "check":
        count = check(arguments)
        if count is not None:
            print(count)
    elif args.command == "get":
        made = load(record_path(arguments[0])).get("inputs", {})
        print("\n".join(made.get(role, "") for role in arguments[1:]))
    else:
        for group in groups(arguments):
            (record if args.command == "record" else fresh)(*group)


if __name__ == "__main__":
    command(main)
