"""Lists of images, and the files that they name."""
import contextlib
import os
import re
import sys
import unicodedata

from lib.files import read_lines
from lib.script import joined, note, some

MAX_BYTES = 255  # of a file's name in bytes, on Linux's file systems (NAME_MAX)
RUN_OF_DIGITS = re.compile("[0-9]+")
# In a folder, files with these endings are images.
ENDINGS = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def composed(text):
    """Returns text in Unicode's composed form (NFC) for comparing names: a Mac writes an accent as a second character."""
    if not text.isascii() and sys.getfilesystemencoding() != "utf-8":  # for example in the locale zh_CN.GBK
        note("Python takes file names to be %s here, but the lists and the info file are UTF-8; run: export PYTHONUTF8=1"
             % sys.getfilesystemencoding())
    return unicodedata.normalize("NFC", text)


def stem(name):
    """Returns the name that a file has in every stage: without folders, up to the first dot, in composed form."""
    return composed(name.rpartition("/")[2].partition(".")[0])


def natural(name):
    """Returns a sort key that orders runs of up to 20 digits by their value: 2.bin, 10.bin."""
    return RUN_OF_DIGITS.sub(lambda run: run.group().zfill(20), name)


def undecodable(name):
    """Returns whether a file's name has bytes that are not UTF-8. Python represents them by these characters."""
    return re.search("[\ud800-\udfff]", name) is not None


def inside(name):
    """Returns whether a line of a list can be the name of a file inside the images' folder."""
    return len(name) <= 1000 and not re.search(r"[\0-\x1f\x7f-\x9f]|^/|(^|/)\.\.(/|$)", name)


def check_length(image, source, ending="_1.bin"):
    """Raises ValueError if the file of an image's result would have too long a name. image: its stem. source: what names it."""
    longest = MAX_BYTES - len(ending)
    if len(image.encode("utf-8", "surrogateescape")) > longest:
        raise ValueError("%s: %r is too long: a file's name has at most %d bytes, and one would be NAME%s; give the image a name of "
                         "at most %d bytes up to its first dot" % (source, image, MAX_BYTES, ending, longest))


def read_list(path):
    """Returns the image names in a list file, one per line. Ignores blank lines, CRLF and a byte order mark.

    Raises ValueError with the line number for a name that leaves the images' folder or is too long, or whose bin an earlier
    line already writes.
    """
    names, seen = [], {}
    for number, name in enumerate(read_lines(path), 1):
        if not name:
            continue
        if not inside(name):
            raise ValueError("%s: line %d: %r is not a file name inside the images' folder" % (path, number, name[:200]))
        bin_name = stem(name)
        if not bin_name:
            raise ValueError("%s: line %d: %r has nothing before its first dot, and the bin gets its name from there"
                             % (path, number, name))
        check_length(bin_name, "%s: line %d" % (path, number))
        if bin_name in seen:
            raise ValueError("%s: lines %d and %d would both write %s.bin; no two images may have the same name up to "
                             "the first dot; tools/lists.py list --flatten makes such names"
                             % (path, seen[bin_name], number, bin_name))
        seen[bin_name] = number
        names.append(name)
    if not names:
        raise ValueError("%s: names no image; it needs one file name per line" % path)
    return names


def find_listed(folder, names, list_path):
    """Returns the path of each named image in a folder. Raises OSError with the names of all missing images.

    If no file has exactly this name, a file with another Unicode form of it is taken. A Mac writes an accented letter as
    two characters, and a list from elsewhere has one character. Raises ValueError if two files fit.
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError("%s: no such folder; give the folder of the images" % folder)
    paths = [os.path.join(folder, name) for name in names]
    lost = [i for i, path in enumerate(paths) if not os.path.lexists(path)]
    listings = {}
    for i in lost:
        paths[i] = folder
        for part in names[i].split("/"):
            paths[i] = os.path.join(paths[i], another_form(paths[i], part, listings))
    missing = [names[i] for i in lost if not os.path.lexists(paths[i])]
    if missing:
        other = list(filter(undecodable, os.listdir(folder))) if sys.getfilesystemencoding() == "utf-8" else []
        raise FileNotFoundError("%d of the %d images in %s are not in %s: %s%s" % (
            len(missing), len(names), list_path, folder, joined(missing), "; the folder has file names that are not "
            "UTF-8, such as %s: rename them, convmv -f GBK -t UTF-8" % ascii(other[0]) if other else ""))
    return paths


def another_form(folder, name, listings):
    """Returns a file's name in the Unicode form that the folder has. Returns the given name if the folder has none.

    listings: the folders listed so far, {folder: {composed name: [names]}}.
    """
    if folder not in listings:
        listings[folder] = {}
        with contextlib.suppress(OSError):
            for other in os.listdir(folder):
                listings[folder].setdefault(composed(other), []).append(other)
    found = listings[folder].get(composed(name), [name])
    if len(found) > 1 and name not in found:
        raise ValueError("%s: has several files whose names differ only in their Unicode form, and none is exactly as in the "
                         "list: %s" % (folder, ", ".join(map(ascii, found))))
    return name if name in found else found[0]


def is_image(name):
    """Returns whether a file in a folder or tar is an image, judged by its name."""
    name = name.rpartition("/")[2]
    return name.lower().endswith(ENDINGS) and not name.startswith(".")


def walk_links(folder):
    """Yields what os.walk(folder) does, in order, and follows links to folders. Each folder is read once.

    A link to another place in the folder, to a folder that holds the link, or to one that was read before is left out with a note.
    Raises OSError.
    """
    def fail(error):
        raise error

    def within(inner, outer):
        return os.path.commonpath((inner, outer)) == outer

    root, left = os.path.realpath(folder), []
    seen = {root}
    for parent, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        folders.sort()
        above = os.path.realpath(parent)
        for name in folders[:]:
            path = os.path.join(parent, name)
            real = os.path.realpath(path)
            if real in seen or os.path.islink(path) and (within(real, root) or within(above, real)):
                left.append(path)
                folders.remove(name)
            seen.add(real)
        yield parent, folders, files
    if left:
        note("%s: %d links lead to folders that are read already, or to one that holds the link; they are left out: %s"
             % (folder, len(left), some(left)))


def images_in(folder, walk=None):
    """Yields (parent folder, name) of each image in a folder and its subfolders, always in the same order.

    walk: an iterator like os.walk(folder). The default also follows links, see walk_links(). Prints a note about files that are no
    images. Raises OSError, or ValueError if there is no image.
    """
    images = others = 0
    for parent, folders, files in walk or walk_links(folder):
        folders.sort()
        names = sorted(filter(is_image, files))
        images, others = images + len(names), others + len(files) - len(names)
        for name in names:
            yield parent, name
    if not images:
        raise ValueError("%s: holds no image file (%s)" % (folder, " ".join(ENDINGS)))
    if others:
        note("%s: %d files are left out, because their names do not end like those of images" % (folder, others))
