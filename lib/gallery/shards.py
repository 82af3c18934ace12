"""Splits the input of tools/gallery.py into shards. A shard is a small dict from which a worker reads about 1000 images.

The same input always gives the same shards. The driver keeps no names in memory, but 8 bytes per name, which show repeated ones.
"""
import array
import collections
import contextlib
import fnmatch
import hashlib
import itertools
import os
import re
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor

from lib.files import not_utf8
from lib.gallery.storage import (IMAGE_ERRORS, WEB, absolute, entries, is_folder, is_local, join, of_listing, open_binary,
                                 patiently, read_image, size_and_checksum, split_chain)
from lib.machine import cores
from lib.names import images_in, inside, undecodable
from lib.script import importing, note, one_line, progress, some

with importing():
    import numpy as np

MAX_LINE = 10000  # in bytes; a longer line cannot be a name
MAX_TRIED = 1000  # so many of a list's images are tried until one can be read
MAX_EXAMPLES = 1000  # so many names that are given more than once are looked up
MAX_WITNESSES = 16  # so many files are read on each node before it takes work
REMOTE_REQUESTS = 16  # at a time
# What the endings of files mean
ENDINGS = [(kind, re.compile(ending, re.IGNORECASE)) for kind, ending in (
    ("tar", r"\.(tar|tar\.gz|tgz)$"), ("parquet", r"\.parquet$"),
    ("packed", r"\.(tar\.\w+|tbz2?|txz|tlz|tzst|bz2|xz|zst|lz4|lzma|gz|z|zip|7z|rar)$"))]
# The programs that make a tar of an archive
UNPACK = (("bzip2", r"\.(tar\.bz2|tbz2?)$"), ("xz", r"\.(tar\.xz|txz)$"), ("zstd", r"\.(tar\.zst|tzst)$"))
# settings: the input's entry in the manifest, which says what the shards were made from. images: their number, None if only the
# workers will know it. describe: a function from a shard's number to its dict. count: the number of shards. list: the open list
# file of stretches(), else None. witnesses: what a node must be able to read: {"root": url, "name": image}, or {"file": url}.
Input = collections.namedtuple("Input", "settings images describe count list witnesses")


def find_input(args, copy):
    """Returns the Input for the command line's arguments. Raises OSError or ValueError.

    copy: the path at which the workers will find the list file, if there is one.
    """
    keep = args.duplicates == "keep"
    found = [pair for pattern in args.input for pair in patiently(matching, absolute(pattern), first=True)]
    folders = {name for name, folder in found if folder}
    files = [name for file, folder in found
             for name in (patiently(spark_files, file) if folder and kind_of(file) == "parquet" else [file])]
    twice = [name for name, count in collections.Counter(files).items() if count > 1]
    if twice:
        told_twice(some(args.input), len(twice), "files", twice, keep)
    kinds = {None if name in folders else kind_of(name) for name in files}
    if kinds in ({"tar"}, {"parquet"}) and args.root is None:
        return tars(files) if kinds == {"tar"} else row_groups(files, args.path_column, args.bytes_column, keep)
    if "packed" in kinds:
        name = next(name for name in files if kind_of(name) == "packed" and name not in folders)
        program = next((program for program, ending in UNPACK if re.search(ending, name.lower())), None)
        raise ValueError("%s: archives of this kind are not read; %s" % (
            name, "make a tar of it: %s -d %s" % (program, name.rpartition("/")[2]) if program else
            "unpack it and give the folder of its images, or a tar of them"))
    if len(files) != 1 or kinds != {None}:
        raise ValueError("%s: give a folder, or a list file with --root, or files that all end in .tar or all in .parquet"
                         % some(args.input))
    if not folders:
        if args.root is None:
            raise ValueError("%s: is a list file; give --root, the folder of its images" % files[0])
        file = open(files[0], "rb") if os.path.isfile(files[0]) else patiently(local_copy, files[0])
        return stretches(file, files[0], absolute(args.root), args.shard_size, copy, keep)
    if args.root is not None:
        raise ValueError("%s: is a folder; --root is for a list file" % files[0])
    names = tempfile.TemporaryFile()
    contents = listing(files[0], names)
    found = stretches(names, files[0], files[0], args.shard_size, copy)
    return found._replace(settings=dict(found.settings, kind="folder", contents=contents))


# --- files and folders -------------------------------------------------------------------------------------------------

def kind_of(url):
    """Returns "tar", "parquet", "packed" (another archive) or None by a file's name."""
    return next((kind for kind, ending in ENDINGS if ending.search(split_chain(url)[0])), None)


def matching(pattern):
    """Returns (url, whether it is a folder) of what matches a url with *, ?, [ or **, in order.

    Raises FileNotFoundError if there is nothing, and OSError if a folder cannot be listed.
    """
    with contextlib.suppress(FileNotFoundError):
        return [(pattern, is_folder(pattern))]
    names, rest = split_chain(pattern)
    magic = re.search("[*[]" if WEB.match(names) else "[*?[]", names)  # in a web address, ? begins a query
    parent = names[:magic.start()].rpartition("/")[0] if magic else ""
    found = list(expanded(parent + rest, names[len(parent) + 1:].split("/"))) if magic else []
    if not found:
        raise FileNotFoundError("%s: no such file or folder" % pattern)
    return found


def expanded(url, parts, folder=True):
    """Yields (url, whether it is a folder) of what matches the parts of a pattern below a url, as a shell does."""
    if not parts:
        yield url, folder
    elif not re.search("[*?[]", parts[0]):
        url = join(url, parts[0])
        with contextlib.suppress(FileNotFoundError):
            yield from expanded(url, parts[1:], None if parts[1:] else is_folder(url))
    else:
        if parts[0] == "**":
            yield from expanded(url, parts[1:])
        for name, folder in children(url):
            if name.startswith(".") and not parts[0].startswith("."):
                continue
            child = join(url, name)
            if parts[0] == "**" and folder and not (is_local(url) and os.path.islink(child)):
                yield from expanded(child, parts)
            elif parts[0] != "**" and fnmatch.fnmatchcase(name, parts[0]) and (folder or not parts[1:]):
                yield from expanded(child, parts[1:], folder)


def children(folder):
    """Returns (name, whether it is a folder) of what a folder holds, in order. Returns [] if there is no such folder."""
    try:
        if is_local(folder):
            return sorted((entry.name, entry.is_dir()) for entry in os.scandir(folder or "/"))
        return sorted((name, entry["type"] == "directory") for name, entry in entries(folder) if name)
    except (FileNotFoundError, NotADirectoryError):
        return []


def spark_files(folder):
    """Returns the Parquet files in a folder and its subfolders. Spark's names that begin with _ or . are no data."""
    found = [url for url, is_dir in expanded(folder, ["**", "*"])
             if kind_of(url) == "parquet" and not is_dir and not re.search("/[_.]", url[len(split_chain(folder)[0]):])]
    if not found:
        raise ValueError("%s: this folder holds no Parquet file" % folder)
    return found


def walk(url, path):
    """Yields (path, its folders' names, {file's name: (size, checksum or None)}) of a remote folder and its subfolders.

    It is like os.walk(path). Raises OSError with the url of the folder that cannot be listed.
    """
    found = patiently(entries, url)
    folders = [name for name, entry in found if entry["type"] == "directory"]
    if "" in folders:
        raise ValueError("%s: it holds names that begin with a slash, so it cannot be listed; give a list file with --root" % url)
    yield path, folders, {name: of_listing(entry) for name, entry in found if entry["type"] != "directory"}
    for name in folders:
        yield from walk(join(url, name), "%s/%s" % (path, name))


def listing(folder, file):
    """Writes the names of all images in a folder and its subfolders into a file, one per line, always in the same order.

    Returns the checksum of their sizes, and of the checksums that a remote listing holds.
    """
    bad, digest, of_folder = [], hashlib.sha256(), {}

    def remote():
        for parent, folders, files in walk(folder, ""):
            of_folder.clear()
            of_folder.update(files)
            yield parent, folders, list(files)

    for parent, name in images_in(folder, None if is_local(folder) else remote()):
        content = of_folder.get(name) or (local_size(os.path.join(parent, name)), None)
        name = ((parent[len(folder.rstrip("/")):] if is_local(folder) else parent) + "/" + name).lstrip("/")
        if not inside(name) or name != name.strip() or undecodable(name):
            bad.append(name)
        file.write((name + "\n").encode("utf-8", "replace"))
        digest.update(("%s %s\n" % content).encode("utf-8", "replace"))
    if bad:
        raise ValueError("%s: the names of %d of its images are not UTF-8, or hold control characters, or begin or end with a "
                         "space: %s; rename them (convmv -f GBK -t UTF-8)" % (folder, len(bad), some(map(ascii, bad))))
    return digest.hexdigest()


def local_size(path):
    """Returns a file's size in bytes, None for a link that leads nowhere."""
    try:
        return os.stat(path).st_size
    except OSError:
        return None


# --- a list ------------------------------------------------------------------------------------------------------------

def local_copy(url):
    """Returns an open temporary file with the content of a remote file or a pipe."""
    file = tempfile.TemporaryFile()
    with open_binary(url) as source:
        shutil.copyfileobj(source, file, 2 ** 20)
    return file


def names_of(content, start):
    """Returns the names in a stretch of a list file, by the rules of lib.files.read_lines(). start: its place there."""
    return [line for line in map(str.strip, content.decode("utf-8-sig" if start == 0 else "utf-8").split("\n")) if line]


def stretches(file, source, root, size, copy, keep=None):
    """Returns the Input for a list file. Each shard is a stretch of size lines. Takes one pass and 16 bytes per stretch.

    keep: whether a name may be given twice, which takes 8 bytes per name; None if no name can be.
    """
    ends, counts, lines_read, digest = array.array("Q", [0]), array.array("Q"), 0, hashlib.sha256()
    seen, witnesses, tried = Repeated(), {}, []
    file.seek(0)
    while True:
        lines = list(itertools.islice(iter(lambda: file.readline(MAX_LINE), b""), size))
        if not lines:
            break
        content = b"".join(lines)
        try:
            names = names_of(content, ends[-1])
        except UnicodeDecodeError as error:
            raise not_utf8(source, ends[-1] + error.start, content)
        if b"\0" in content:
            raise not_utf8(source, ends[-1] + content.index(b"\0"), content)
        if max(map(len, lines)) == MAX_LINE:
            raise ValueError("%s: is not a list of file names: line %d or a later one has %d bytes or more"
                             % (source, lines_read + 1, MAX_LINE))
        if not witnesses:
            name = readable(source, root, names, tried)
            if name is not None:
                witnesses[file_system(root, name)] = name
        if witnesses and is_local(root):
            add_witnesses(root, names, witnesses)
        if keep is not None:
            seen.add(names)
        digest.update(content)
        lines_read += len(lines)
        ends.append(ends[-1] + len(content))
        counts.append(len(names))
    if not sum(counts):
        raise ValueError("%s: names no image; it needs one file name per line" % source)
    if not witnesses:
        raise unreadable(source, root, tried)
    if keep is not None:
        seen.check(source, numbered(file), keep)
    settings = {"kind": "list", "root": root, "sha256": digest.hexdigest(), "shards": len(counts), "shard_size": size}
    return Input(settings, sum(counts), lambda i: {"list": copy, "start": ends[i], "end": ends[i + 1], "root": root,
                                                   "images": counts[i]}, len(counts), file,
                 [{"root": root, "name": name} for name in witnesses.values()])


def numbered(file):
    """Yields (name, "line N") for each line of a list file."""
    file.seek(0)
    for number, line in enumerate(file, 1):
        yield line.decode("utf-8-sig" if number == 1 else "utf-8").strip(), "line %d" % number


def file_system(root, name):
    """Returns the number of the file system in which an image's folder lies, None if it is remote."""
    return os.stat(os.path.dirname(os.path.join(root, name))).st_dev if is_local(root) else None


def add_witnesses(root, names, witnesses):
    """Adds an image on each further file system to {its number: name}, because a node may lack a mount below the root."""
    for name in {name.rpartition("/")[0]: name for name in reversed(names)}.values():  # the first image in each folder
        with contextlib.suppress(OSError, ValueError):
            number = file_system(root, name)
            if number not in witnesses:
                read_image(root, name, 1)
                witnesses[number] = name


def readable(source, root, names, tried):
    """Returns the first of a list's names whose image can be read, else None. Adds the others to tried as (name, why).

    Raises ValueError after MAX_TRIED names, because then the root is wrong.
    """
    for name in names:
        try:
            patiently(lambda _: read_image(root, name, 1), root, first=is_local(source))
            return name
        except ValueError as error:
            tried.append((name, error))
        except OSError as error:
            if error.errno not in IMAGE_ERRORS:
                raise
            tried.append((name, error))
        if len(tried) == MAX_TRIED:
            raise unreadable(source, root, tried)


def unreadable(source, root, tried):
    """Returns the error for a list or folder of which no image can be read."""
    missing = [name for name, error in tried if isinstance(error, FileNotFoundError)]
    if len(missing) == len(tried):
        return ValueError("%s: none of its first %d images is in %s: %s" % (source, len(tried), root, some(missing, 3)))
    return ValueError("%s: none of its first %d images can be read: %s" % (source, len(tried), some(
        ("%s (%s)" % (name, one_line(error)) for name, error in tried if name not in missing), 3)))


class Repeated(object):
    """Finds the names that are given more than once. Takes 8 bytes of memory per name."""

    def __init__(self):
        self.hashes = array.array("q")

    def add(self, names):
        text = "\n".join(names)
        self.hashes.extend(map(hash, map(plain, names) if "./" in text or "//" in text else names))

    def check(self, source, again, keep):
        """Raises ValueError for repeated names, or prints a note if they may be kept. again: yields all (name, its place)."""
        hashes = np.asarray(self.hashes)
        hashes.sort()
        repeated = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
        if not len(repeated):
            return
        if keep:
            told_twice(source, len(repeated), "images", [], keep)
            return
        wanted, places = set(repeated[:MAX_EXAMPLES].tolist()), {}
        for name, place in again:
            name = plain(name)
            if hash(name) in wanted and name:
                places.setdefault(name, []).append(place)
        found = ["%s (%s)" % (name, some(where, 2)) for name, where in places.items() if len(where) > 1]
        if found:  # else two names have one hash
            told_twice(source, len(found) if len(repeated) <= MAX_EXAMPLES else len(repeated), "images", found, keep)


def plain(name):
    """Returns the shortest form of a path: a/b.png for ./a//b.png."""
    return re.sub(r"(^(?=\.)|(?<=/))\.?/+", "", name) if "./" in name or "//" in name else name


def told_twice(source, count, what, found, keep):
    """Raises ValueError for what is given more than once, or prints a note if that may be."""
    text = "%s: %d %s are given more than once" % (source, count, what)
    if keep:
        note("%s; each gets a row every time" % text)
        return
    raise ValueError("%s: %s%s; each image needs one row, so remove the others, or keep a row for each with --duplicates keep"
                     % (text, ", ".join(found[:5]), " and %d more" % (count - 5) if count > 5 else ""))


# --- tars and Parquet files ---------------------------------------------------------------------------------------------

def of_all(function, files):
    """Returns [function(url)] for files, several at a time."""
    with ThreadPoolExecutor(cores() if is_local(files[0]) else REMOTE_REQUESTS) as pool, progress(len(files), "file") as bar:
        found = []
        for result in pool.map(lambda url: patiently(function, url), files):
            found.append(result)
            bar.update()
        return found


def of_files(kind, files, sizes, shards, images, **settings):
    """Returns the Input for tars or Parquet files. sizes: (bytes, checksum or None) of each file."""
    names, contents = (hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
                       for lines in (["%s\n" % name for name in files], ["%s %s\n" % size for size in sizes]))
    first = {url.rpartition("/")[0]: url for url in reversed(files)}  # one file of each folder
    return Input(dict(settings, kind=kind, names=names, contents=contents, shards=len(shards)), images, shards.__getitem__,
                 len(shards), None, [{"file": url} for url in sorted(first.values())[:MAX_WITNESSES]])


def tars(files):
    """Returns the Input for tars. Each tar is a shard."""
    return of_files("tar", files, of_all(size_and_checksum, files), [{"tar": name} for name in files], None)


def row_groups(files, path_column, bytes_column, keep):
    """Returns the Input for Parquet files. Each row group is a shard."""
    groups = of_all(lambda url: rows_of(url, path_column, bytes_column), files)
    shards = [{"parquet": name, "group": group, "images": rows, "path_column": path_column, "bytes_column": bytes_column}
              for name, rows_of_groups in zip(files, groups) for group, rows in enumerate(rows_of_groups) if rows]
    if not shards:
        raise ValueError("%s: these files have no rows" % some(files))
    seen = Repeated()
    if not keep:
        with progress(len(shards), "row group") as bar:
            for shard in shards:
                seen.add(patiently(lambda _: paths_of(shard), shard["parquet"]))
                bar.update()
        seen.check(some(files), ((path, "%s row group %d" % (shard["parquet"], shard["group"])) for shard in shards
                                 for path in paths_of(shard)), keep)
    return of_files("parquet", files, of_all(size_and_checksum, files), shards, sum(shard["images"] for shard in shards),
                    path_column=path_column, bytes_column=bytes_column)


def rows_of(url, path_column, bytes_column):
    """Returns the number of rows of each row group. Raises ValueError if the columns are not there or of other types."""
    import pyarrow
    import pyarrow.parquet
    try:
        with open_binary(url) as f:
            file = pyarrow.parquet.ParquetFile(f)
            schema, metadata = file.schema_arrow, file.metadata
    except (pyarrow.ArrowException, OSError) as error:
        if str(error).startswith(url + ": "):  # it was not read at all
            raise
        raise ValueError("%s: is not a Parquet file: %s" % (url, one_line(error)))
    types = columns(schema)
    if not {path_column, bytes_column} <= set(types):
        raise ValueError("%s: has the columns %s, not %s and %s; give --path-column and --bytes-column"
                         % (url, some(sorted(types)), path_column, bytes_column))
    kinds = pyarrow.types
    path_type = types[path_column].value_type if kinds.is_dictionary(types[path_column]) else types[path_column]
    if str(path_type) not in ("string", "large_string", "binary", "large_binary") and not kinds.is_integer(path_type):
        raise ValueError("%s: the column %s holds %s, not paths; give --path-column" % (url, path_column, path_type))
    of_bytes = [name for name, kind in types.items()
                if str(kind) in ("binary", "large_binary") or kinds.is_fixed_size_binary(kind)]
    if bytes_column not in of_bytes:
        raise ValueError("%s: the column %s holds %s, not the bytes of images; give --bytes-column%s" % (
            url, bytes_column, types[bytes_column],
            " (%s)" % some(of_bytes) if of_bytes else ", or for paths a list file with --root"))
    return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


def columns(schema):
    """Returns {name: type} of a schema's columns. A field of a struct has the name column.field."""
    found = {}
    for field in schema:
        found[field.name] = field.type
        if str(field.type).startswith("struct"):
            found.update(("%s.%s" % (field.name, part.name), part.type) for part in field.type)
    return found


def paths_of(shard):
    """Returns the paths of a row group, without null. Returns [] if this column is damaged, as the worker finds that, too."""
    import pyarrow
    import pyarrow.parquet
    with open_binary(shard["parquet"]) as f:
        try:
            file = pyarrow.parquet.ParquetFile(f, buffer_size=2 ** 20)
            table = file.read_row_group(shard["group"], [shard["path_column"]], use_threads=False).flatten()
        except (pyarrow.ArrowException, OSError) as error:
            if str(error).startswith(shard["parquet"] + ": "):  # it was not read at all
                raise
            return []
    paths = table.column(shard["path_column"]).to_pylist()
    return [path.decode("utf-8", "surrogateescape") if isinstance(path, bytes) else str(path)
            for path in paths if path is not None]
