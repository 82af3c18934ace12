"""Splits the input of tools/gallery.py into shards. A shard is a small dict from which a worker reads about 1000 images.

The same input always gives the same shards. The driver keeps no image names in memory: it reads a list file only once.
"""
import array
import collections
import hashlib
import io
import itertools
import os
import re
import tempfile

from lib.files import not_utf8
from lib.gallery.worker import filesystem, is_local
from lib.names import images_in, inside, undecodable
from lib.script import one_line, some

MAX_LINE = 10000  # in bytes; a longer line cannot be a name
# settings: the input's entry in the manifest. images: their number, None if only the workers will know it. describe: a function
# from a shard's number to its dict. count: the number of shards. list: the open list file of stretches(), else None.
Input = collections.namedtuple("Input", "settings images describe count list")


def absolute(url):
    return os.path.abspath(url) if is_local(url) else url.rstrip("/")


def open_binary(url):
    """Opens a file on any file system for reading. Raises OSError or ValueError."""
    fs, path = filesystem(url)
    return open(path, "rb") if is_local(url) else io.BufferedReader(fs.open(path, "rb"), 2 ** 20)


def find_input(args, copy):
    """Returns the Input for the command line's arguments. Raises OSError or ValueError.

    copy: the path at which the workers will find the list file, if there is one.
    """
    files = [name for pattern in args.input for name in matching(absolute(pattern))]
    kinds = {"parquet" if name.endswith(".parquet") else "tar" if re.search(r"\.(tar|tar\.gz|tgz)$", name) else None
             for name in files}
    if kinds in ({"tar"}, {"parquet"}) and args.root is None:
        return tars(files) if kinds == {"tar"} else row_groups(files, args.path_column, args.bytes_column)
    if len(files) != 1 or kinds != {None}:
        raise ValueError("%s: give a folder, or a list file with --root, or files that all end in .tar or all in .parquet"
                         % some(args.input))
    fs, path = filesystem(files[0])
    if not fs.isdir(path):
        if args.root is None:
            raise ValueError("%s: is a list file; give --root, the folder of its images" % files[0])
        return stretches(open_binary(files[0]), files[0], absolute(args.root), args.shard_size, copy)
    if args.root is not None:
        raise ValueError("%s: is a folder; --root is for a list file" % files[0])
    names = tempfile.TemporaryFile()
    listing(files[0], names)
    return stretches(names, files[0], files[0], args.shard_size, copy)


def matching(pattern):
    """Returns the files that match a path with *, ? or [, in order. Raises FileNotFoundError if there are none."""
    fs, path = filesystem(pattern)
    found = [path] if fs.exists(path) else sorted(fs.glob(path)) if re.search(r"[*?\[]", path) else []
    if not found:
        raise FileNotFoundError("%s: no such file or folder" % pattern)
    if is_local(pattern):
        return found
    return [pattern.partition("://")[0] + "://" + name.lstrip("/") for name in found]


def listing(folder, file):
    """Writes the names of all images in a folder and its subfolders into a file, one per line, always in the same order."""
    fs, path = filesystem(folder)
    bad = []
    for parent, name in images_in(folder, None if is_local(folder) else fs.walk(path)):
        name = (parent[len(path.rstrip("/")):] + "/" + name).lstrip("/")
        if not inside(name) or name != name.strip() or undecodable(name):
            bad.append(name)
        file.write((name + "\n").encode("utf-8", "replace"))
    if bad:
        raise ValueError("%s: the names of %d of its images are not UTF-8, or hold control characters, or begin or end with a "
                         "space: %s; rename them (convmv -f GBK -t UTF-8)" % (folder, len(bad), some(map(ascii, bad))))


def stretches(file, source, root, size, copy):
    """Returns the Input for a list file. Each shard is a stretch of size lines. Takes one pass and 8 bytes per stretch."""
    ends, images, digest = array.array("Q"), 0, hashlib.sha256()
    file.seek(0)
    while True:
        lines = list(itertools.islice(iter(lambda: file.readline(MAX_LINE), b""), size))
        if not lines:
            break
        content = b"".join(lines)
        try:
            content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(source, (ends[-1] if ends else 0) + error.start, content)
        if max(map(len, lines)) == MAX_LINE:
            raise ValueError("%s: is not a list of file names: line %d or a later one has %d bytes or more"
                             % (source, images + 1, MAX_LINE))
        if not ends:
            check_root(source, root, content.decode("utf-8-sig").split("\n"))
        digest.update(content)
        images += len(lines)
        ends.append(len(content) + (ends[-1] if ends else 0))
    if not images:
        raise ValueError("%s: names no image; it needs one file name per line" % source)
    return Input({"kind": "list", "root": root, "sha256": digest.hexdigest(), "shards": len(ends), "shard_size": size}, images,
                 lambda i: {"list": copy, "start": ends[i - 1] if i else 0, "end": ends[i], "root": root}, len(ends), file)


def check_root(source, root, lines):
    """Raises ValueError if none of a list's first images exists, because then the root is wrong."""
    fs, path = filesystem(root)
    names = [line.strip() for line in lines if line.strip()]
    if names and all(name.isascii() and not fs.exists("%s/%s" % (path.rstrip("/"), name)) for name in filter(inside, names)):
        raise ValueError("%s: none of its first %d images is in %s: %s" % (source, len(names), root, some(names, 3)))


def of_files(kind, lines, shards, images):
    """Returns the Input for tars or Parquet files. The manifest identifies them by names and sizes."""
    digest = hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
    return Input({"kind": kind, "sha256": digest, "shards": len(shards)}, images, shards.__getitem__, len(shards), None)


def tars(files):
    """Returns the Input for tars. Each tar is a shard."""
    lines = ["%s %d\n" % (name, filesystem(name)[0].size(name)) for name in files]
    return of_files("tar", lines, [{"tar": name} for name in files], None)


def row_groups(files, path_column, bytes_column):
    """Returns the Input for Parquet files. Each row group is a shard."""
    import pyarrow.parquet
    lines, shards, images = [], [], 0
    for name in files:
        try:
            with open_binary(name) as f:
                metadata = pyarrow.parquet.read_metadata(f)
        except pyarrow.ArrowInvalid as error:
            raise ValueError("%s: is not a Parquet file: %s" % (name, one_line(error)))
        columns = {metadata.schema.column(i).path for i in range(metadata.num_columns)}
        if not {path_column, bytes_column} <= columns:
            raise ValueError("%s: has the columns %s, not %s and %s; give --path-column and --bytes-column"
                             % (name, some(sorted(columns)), path_column, bytes_column))
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            lines.append("%s %d %d\n" % (name, group, rows))
            shards.append({"parquet": name, "group": group, "path_column": path_column, "bytes_column": bytes_column})
            images += rows
    if not images:
        raise ValueError("%s: these files have no rows" % some(files))
    return of_files("parquet", lines, shards, images)
