"""The output folder of tools/gallery.py: a manifest, which says what belongs to the run, and the parts, each a Parquet file.

OUTPUT/_manifest.json has a random id, and each part has this id in its metadata, beside its counts: {"run": id, "images": n,
"errors": n, "turned": n, "left_out": {ending: n}}. So a part of another run is never taken for one of this run.
"""
import collections
import contextlib
import hashlib
import json
import os
import re
import secrets
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from lib.files import whole_file
from lib.gallery.storage import create, filesystem, is_local, names_in, open_binary, patiently, reached, read_range, write
from lib.script import one_line, progress, some

MANIFEST, LIST = "_manifest.json", "_list.txt"
METADATA = b"gallery"  # the key of a part's id and counts in the metadata of its file
UNCHECKED = ("run", "ray", "pyarrow", "python")  # they may differ between two starts of a run, because no logit depends on them
WORDS = {"input.contents": " (the input's files have other sizes or checksums, so they were replaced)"}
READERS = 32  # threads that read the parts' metadata


# --- the manifest ---------------------------------------------------------------------------------------------------------

def flat(value, name=""):
    """Returns a manifest's values as a flat dict, such as {"model.sha256": "..."}."""
    if not isinstance(value, dict):
        return {name: value}
    return {key: item for part in value for key, item in flat(value[part], name + "." + part if name else part).items()}


def differences(theirs, ours):
    """Returns the differences that show that two manifests belong to different runs, as texts for the user."""
    theirs, ours = (collections.OrderedDict((name, value) for name, value in flat(manifest).items()
                                            if name.rpartition(".")[2] not in UNCHECKED) for manifest in (theirs, ours))
    names = [name for name in list(ours) + [name for name in theirs if name not in ours] if theirs.get(name) != ours.get(name)]
    if "input.kind" in names:  # then everything else about the input differs, too
        names = [name for name in names if name == "input.kind" or not name.startswith("input.")]
    return ["%s: %s there, %s now%s" % (name, short(theirs.get(name)), short(ours.get(name)), WORDS.get(name, "")) for name in names]


def short(value):
    """Returns a value as text, of a checksum only the beginning."""
    return re.sub("^([0-9a-f]{8})[0-9a-f]{56}$", r"\1...", str(value))


def read_manifest(output):
    """Returns a run's manifest. Raises OSError, or ValueError if it is damaged."""
    url = "%s/%s" % (output, MANIFEST)
    try:
        manifest = json.loads(patiently(read_range, url).decode("utf-8"))
        if not isinstance(manifest, dict) or not isinstance(manifest.get("run"), str):
            raise ValueError("it has no id of a run")
    except ValueError as error:
        raise ValueError("%s: is damaged: %s; give another --output" % (url, one_line(error)))
    return manifest


def begin(output, manifest, count):
    """Makes an output folder belong to this run, or finds that it does. Returns (the run's id, the numbers of its parts).

    Of two runs that begin at the same moment, one creates the manifest, and the other one finds it. count: how many parts the
    run has. Raises OSError, or ValueError if the folder belongs to another run.
    """
    if is_local(output):
        os.makedirs(output, exist_ok=True)
    names = patiently(names_in, output)
    numbers = sorted(int(match.group(1)) for match in map(re.compile(r"part-(\d{6,})\.parquet$").match, names) if match)
    if MANIFEST not in names:
        if numbers:
            raise ValueError("%s: holds %d parts but no %s, so it is unknown which run wrote them; give another --output"
                             % (output, len(numbers), MANIFEST))
        text = json.dumps(dict(manifest, run=secrets.token_hex(16)), indent=1, ensure_ascii=False) + "\n"
        create("%s/%s" % (output, MANIFEST), text.encode("utf-8"))
    there = read_manifest(output)
    other = differences(there, manifest)
    if other:
        raise ValueError("%s: was started with other settings: %s. Give another --output%s" % (
            output, "; ".join(other),
            ", or the same settings again" if numbers else "; or delete %s/%s, because no part is written yet" % (output, MANIFEST)))
    for number in numbers:
        if number >= count:
            raise ValueError("%s: is not a part of this run; give another --output" % part_name(output, number))
    return there["run"], numbers


def check_run(output, run):
    """Raises ValueError if another run's manifest has replaced the run's own."""
    if read_manifest(output)["run"] != run:
        raise ValueError("%s: another run was started with this --output at the same time; start again with another one" % output)


def publish_list(output, found):
    """Copies the list into the output folder, where the workers read it. Raises ValueError if it has changed meanwhile."""
    digest, url = hashlib.sha256(), "%s/%s" % (output, LIST)
    found.list.seek(0)
    with contextlib.ExitStack() as stack:
        stack.enter_context(reached(url))
        if is_local(url):
            temporary = stack.enter_context(whole_file(url))
            f = stack.enter_context(open(temporary, "wb"))
        else:
            fs, path = filesystem(url)
            f = stack.enter_context(fs.open(path, "wb"))
        for block in iter(lambda: found.list.read(2 ** 20), b""):
            digest.update(block)
            f.write(block)
    if digest.hexdigest() != found.settings["sha256"]:
        raise ValueError("the list of images was changed while it was read; start again")


# --- the parts ------------------------------------------------------------------------------------------------------------

def part_name(output, number):
    return "%s/part-%06d.parquet" % (output, number)


def write_part(output, number, run, names, paths, values, reasons, counts):
    """Writes a part: path, a column of values for each attribute, and error. An image with an error has no values.

    values: float32 [images, attributes]. reasons: for each image None, or why it cannot be read. counts: see above.
    """
    import pyarrow
    import pyarrow.parquet
    bad = np.array([reason is not None for reason in reasons], bool)
    columns = {"path": pyarrow.array(paths, pyarrow.string())}
    columns.update((name, pyarrow.array(np.ascontiguousarray(column), pyarrow.float32(), mask=bad))
                   for name, column in zip(names, values.T))
    columns["error"] = pyarrow.array(reasons, pyarrow.string())
    content = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(
        pyarrow.table(columns).replace_schema_metadata({METADATA: json.dumps(dict(counts, run=run), sort_keys=True)}),
        content, compression="zstd", use_dictionary=False)
    write(part_name(output, number), content.getvalue().to_pybytes())


def footer(url):
    """Returns the metadata of a Parquet file."""
    import pyarrow.parquet
    with open_binary(url) as f:
        return pyarrow.parquet.read_metadata(f)


def read_counts(output, number, run):
    """Returns a part's counts. Raises OSError, or ValueError if the part is damaged or of another run."""
    url = part_name(output, number)
    try:
        metadata = patiently(footer, url)
        counts = json.loads(metadata.metadata[METADATA].decode("utf-8"))
    except (KeyError, TypeError, ValueError) as error:  # pyarrow.ArrowInvalid is a ValueError
        raise ValueError("%s: is not a part of this run (%s); delete it, or give another --output" % (url, one_line(error)))
    if counts.pop("run") != run or counts["images"] != metadata.num_rows:
        raise ValueError("%s: is a part of another run; delete it, or give another --output" % url)
    return counts


def total(output, numbers, run):
    """Returns the sum of the parts' counts. Raises OSError, or ValueError if a part is missing, damaged or of another run."""
    counts = collections.Counter()
    with ThreadPoolExecutor(READERS) as readers, progress(len(numbers), "part") as bar:
        for found in readers.map(lambda number: read_counts(output, number, run), numbers):
            add(counts, found)
            bar.update()
    return counts


def add(counts, found):
    """Adds a part's counts to a Counter, in which an ending that is left out is the key ("left_out", ending)."""
    counts.update({name: number for name, number in found.items() if name != "left_out"})
    counts.update({("left_out", ending): number for ending, number in found["left_out"].items()})


def left_out(counts):
    """Returns the endings that are left out, as text, the most frequent ones first."""
    endings = {name[1]: number for name, number in counts.items() if isinstance(name, tuple)}
    return some(("%s (%d)" % (ending or "none", endings[ending]) for ending in sorted(endings, key=endings.get, reverse=True)), 10)
