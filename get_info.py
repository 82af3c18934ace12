"""Stage 5: a folder of bins -> the info file that the benchmark tool reads: INDEX PATH WIDTH HEIGHT, one line per bin.

    python3 get_info.py ./input_bin deepmar.info 224 224
    python3 get_info.py bin ./input_bin deepmar.info 224 224

The second form is that of the generic tool, whose first argument is the files' format. The bins are listed in natural order
(2.bin before 10.bin), which does not depend on the file system. They are all float32 [3,HEIGHT,WIDTH], or all uint8
[HEIGHT,WIDTH,3] as stage 4 writes them with --uint8.
"""
import argparse
import os
import re
import sys

HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:0] = [os.path.join(HERE, "tools"), HERE]
from common import command, note, some, whole_file

DIGITS = re.compile("[0-9]+")


def natural(name):
    """Returns a sort key that orders runs of up to 20 digits by their value: 2.bin, 10.bin."""
    return DIGITS.sub(lambda run: run.group().zfill(20), name)


def kind(height, width, uint8):
    """Returns (what a bin holds, as text; its size in bytes)."""
    return (("uint8 [%d,%d,3]" if uint8 else "float32 [3,%d,%d]") % (height, width), 3 * height * width * (1 if uint8 else 4))


def list_bins(folder, width, height, uint8=None):
    """Returns the names of a folder's bins in natural order. Raises OSError, or ValueError for a bin of the wrong size.

    uint8: True if the bins must be uint8, False if float32. With None either is right, but not a mixture.
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError("%s: no such folder; preprocess_deepmar_pytorch.py writes the bins' folder" % folder)
    sizes = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".bin") and entry.is_file():
                sizes[entry.name] = entry.stat().st_size
    if uint8 is None:
        found = list(sizes.values())
        uint8 = found.count(kind(height, width, True)[1]) > found.count(kind(height, width, False)[1])
    text, size = kind(height, width, uint8)
    wrong = ["%s (%d bytes)" % item for item in sorted(sizes.items()) if item[1] != size]
    if wrong:
        other, other_size = kind(height, width, not uint8)
        hint = "; that is the size of %s: run stage 4 again %s --uint8" % (other, "with" if uint8 else "without") \
            if other_size in sizes.values() else ""
        raise ValueError("%s: %d of %d bins are not %s (%d bytes): %s%s"
                         % (folder, len(wrong), len(sizes), text, size, some(wrong), hint))
    names = sorted(sorted(sizes), key=natural)  # names of equal value (1, 01) are ordered by their text
    if not names:
        raise ValueError("%s: holds no .bin file; preprocess_deepmar_pytorch.py writes them" % folder)
    from preprocess_deepmar_pytorch import fault, np
    why = fault(np.fromfile(os.path.join(folder, names[0]), np.uint8 if uint8 else "<f4"))
    if why:
        raise ValueError("%s: is not %s, although it has that size: it holds %s" % (os.path.join(folder, names[0]), text, why))
    return names


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        usage="get_info.py [bin] BIN_DIR INFO WIDTH HEIGHT")
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv).arguments
    if len(arguments) == 5 and arguments[0] == "bin":
        arguments = arguments[1:]
    if len(arguments) != 4:
        parser.error("give BIN_DIR, INFO, WIDTH and HEIGHT (only the word bin may stand before them)")
    folder, info, width, height = arguments
    for text in (width, height):
        if not re.fullmatch("[1-9][0-9]*", text):
            parser.error("WIDTH and HEIGHT must be positive whole numbers, not %r" % text)

    names = list_bins(folder, int(width), int(height))
    for name in [folder] + names:
        if "\n" in name:
            raise ValueError("%r: a line of the info file cannot hold this name" % name)
        if re.search("[\ud800-\udfff]", name):  # Python represents undecodable bytes by these characters
            raise ValueError("%s: its name is not UTF-8, as the info file is; rename it: convmv -f GBK -t UTF-8" % name)
    start, end = os.path.join(folder, ""), " %s %s\n" % (width, height)
    with whole_file(info) as temporary, open(temporary, "w", encoding="utf-8") as f:
        f.writelines("%d %s%s%s" % (index, start, name, end) for index, name in enumerate(names))
    uint8 = os.path.getsize(os.path.join(folder, names[0])) == kind(int(height), int(width), True)[1]
    print("%s: %d bins of %s, %s x %s%s" % (info, len(names), folder, width, height, ", uint8" if uint8 else ""))
    spaced = [name for name in [folder] + names if " " in name]
    if spaced:
        note("%r has a space. benchmark.x86_64 would cut the line there; tools/benchmark.py does not" % spaced[0])


if __name__ == "__main__":
    command(main)
