"""Bins, the network's input in files, and the info file that lists them."""
import os
import re

from lib.files import read_text, whole_file
from lib.images import MEAN, NV12, STD, input_shape
from lib.names import check_length, natural, undecodable
from lib.script import importing, some

with importing():
    import numpy as np

# How stage 4 makes bins of each kind.
STAGE_4 = dict({kind: "with --nv12 " + kind[len("nv12-"):] for kind in NV12}, float32="without --uint8", uint8="with --uint8")
MAX_VALUE = 10 ** 4  # the values of a normalised picture are far smaller


def fault(array):
    """Returns why an array from a bin cannot be of its type, or None if it can.

    A float32 bin is as large as a uint8 bin of twice the height and width, so with a wrong size one could pass for the other.
    """
    with np.errstate(all="ignore"):
        if array.dtype != np.uint8:  # four pixels, read as one float, give any value: infinity, or 1e30
            return None if -MAX_VALUE < array.min() and array.max() < MAX_VALUE else "NaN or infinite values, or beyond %d" % MAX_VALUE
        plane = array.size // 12 * 4  # the bytes of a float32 bin's first channel
        red = (array.reshape(-1)[:min(plane, 4096)].view("<f4") * np.float32(STD[0]) + np.float32(MEAN[0])) * 255
        pixels = (np.abs(red - np.rint(red)) < 1e-3) & (red > -1) & (red < 256)
    return "float32 values, not pixels" if pixels.size and pixels.all() else None


def contents(kind, height, width):
    """Returns (what a bin holds, as text; its size in bytes). kind: a key of LAYOUTS."""
    shape = input_shape(kind, height, width)
    name = "NV12 uint8" if kind in NV12 else "uint8" if kind == "uint8" else "float32"
    return "%s [%s]" % (name, ",".join(map(str, shape))), int(np.prod(shape)) * (4 if kind == "float32" else 1)


def kinds(height, width):
    """Returns the kinds that a file's size tells apart. The standards of NV12 have the same size, so only the first is one."""
    return ["float32", "uint8"] + [kind for kind in NV12[:1] if height % 2 == width % 2 == 0]


def holds(path, height, width):
    """Returns what a bin holds, one of kinds(), or None if that is not certain.

    The size alone does not tell: a float32 bin is as large as a file of four RGB images, or of eight in NV12. Therefore a float32
    bin must also hold normalised pixels.
    """
    pixels, size = fault(np.fromfile(path, np.uint8)) is None, os.path.getsize(path)
    fits = [kind for kind in kinds(height, width) if contents(kind, height, width)[1] == size and pixels == (kind != "float32")]
    return fits[0] if fits else None


def list_bins(folder, width, height, kind=None):
    """Returns the names of a folder's bins in natural order. Raises OSError, or ValueError for a bin of the wrong size.

    kind: what the bins must be, a key of LAYOUTS. With None any kind is right, but not a mixture.
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError("%s: no such folder; preprocess_deepmar_pytorch.py writes the bins' folder" % folder)
    sizes = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".bin") and entry.is_file():
                sizes[entry.name] = entry.stat().st_size
    found = list(sizes.values())
    kind = kind or max(kinds(height, width), key=lambda kind: found.count(contents(kind, height, width)[1]))
    text, size = contents(kind, height, width)
    wrong = ["%s (%d bytes)" % item for item in sorted(sizes.items()) if item[1] != size]
    if wrong:
        others = [other for other, other_size in (contents(other, height, width) for other in kinds(height, width))
                  if other_size in found and other_size != size]
        hint = "; that is the size of %s: run stage 4 again %s" % (others[0], STAGE_4[kind]) if others else ""
        raise ValueError("%s: %d of %d bins are not %s (%d bytes): %s%s"
                         % (folder, len(wrong), len(sizes), text, size, some(wrong), hint))
    names = sorted(sorted(sizes), key=natural)  # names of equal value (1, 01) are ordered by their text
    if not names:
        raise ValueError("%s: holds no .bin file; preprocess_deepmar_pytorch.py writes them" % folder)
    why = fault(np.fromfile(os.path.join(folder, names[0]), "<f4" if kind == "float32" else np.uint8))
    if why:
        raise ValueError("%s: is not %s, although it has that size: it holds %s" % (os.path.join(folder, names[0]), text, why))
    return names


def write_info(path, folder, names, width, height):
    """Writes the info file of a folder's bins, 'INDEX PATH WIDTH HEIGHT' a line. Raises OSError or ValueError."""
    for name in names:
        check_length(os.path.splitext(name)[0], folder)
    for name in [folder] + names:
        if "\n" in name:
            raise ValueError("%r: a line of the info file cannot hold this name" % name)
        if undecodable(name):
            raise ValueError("%s: the name is not valid UTF-8, which the info file requires; rename it: convmv -f GBK -t UTF-8" % name)
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8") as f:
        f.writelines("%d %s %d %d\n" % (index, os.path.join(folder, name), width, height) for index, name in enumerate(names))


def read_info(path, height, width, kind="float32"):
    """Returns the bins of an info file, [(name, path)]. Raises OSError, or ValueError for a bin of the wrong size."""
    text, size = contents(kind, height, width)
    bins, seen, bad = [], set(), []
    for line in read_text(path).split("\n"):
        if not line.strip():
            continue
        match = re.match(r"(\d{1,9}) ([^\0]+) (\d{1,9}) (\d{1,9})$", line)
        if not match or int(match.group(1)) != len(bins):
            raise ValueError("%s: line %d is not 'INDEX PATH WIDTH HEIGHT' with INDEX %d; get_info.py writes this file: %r"
                             % (path, len(bins) + 1, len(bins), line[:200]))
        if (int(match.group(3)), int(match.group(4))) != (width, height):
            raise ValueError("%s: line %d is for %s x %s, not %d x %d"
                             % (path, len(bins) + 1, match.group(3), match.group(4), width, height))
        name = os.path.splitext(os.path.basename(match.group(2)))[0]
        check_length(name, path)
        if name in seen:
            raise ValueError("%s: two bins are called %s, so their results would be the same file" % (path, name))
        seen.add(name)
        bins.append((name, match.group(2)))
        if not os.path.isfile(match.group(2)):
            bad.append("%s (no such file)" % match.group(2))
        elif os.path.getsize(match.group(2)) != size:
            bad.append("%s (%d bytes)" % (match.group(2), os.path.getsize(match.group(2))))
    if bad:
        raise ValueError("%s: %d of %d bins are not %s (%d bytes), the model's input: %s"
                         % (path, len(bad), len(bins), text, size, some(bad)))
    if not bins:
        raise ValueError("%s: names no bin; get_info.py writes this file" % path)
    return bins
