"""Stage 5: a folder of bins -> the info file that the benchmark tool reads: INDEX PATH WIDTH HEIGHT, one line a bin.

    python3 get_info.py ./input_bin deepmar.info 224 224
    python3 get_info.py bin ./input_bin deepmar.info 224 224

The second form is that of the generic tool, whose first argument is the files' format. The bins come in natural order
(2.bin before 10.bin), which does not depend on the file system.
"""
import argparse
import os
import re
import sys

sys.path[:0] = [os.path.join(os.path.dirname(os.path.realpath(__file__)), "tools")]
from common import command, note, some, whole_file

CHANNELS, BYTES = 3, 4  # a bin is float32 [3,height,width]
DIGITS = re.compile("[0-9]+")


def natural(name):
    """A sort key that orders runs of up to 20 digits by their value: 2.bin, 10.bin."""
    return DIGITS.sub(lambda run: run.group().zfill(20), name)


def list_bins(folder, width, height):
    """Returns the names of a folder's bins in natural order; raises OSError or ValueError, as for a bin of wrong size."""
    if not os.path.isdir(folder):
        raise FileNotFoundError("%s: no such folder; it is the one that preprocess_deepmar_pytorch.py writes" % folder)
    size = CHANNELS * height * width * BYTES
    names, wrong = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".bin") and entry.is_file():
                names.append(entry.name)
                if entry.stat().st_size != size:
                    wrong.append("%s (%d bytes)" % (entry.name, entry.stat().st_size))
    if wrong:
        raise ValueError("%s: %d of %d bins are not float32 [%d,%d,%d] (%d bytes): %s"
                         % (folder, len(wrong), len(names), CHANNELS, height, width, size, some(sorted(wrong))))
    if not names:
        raise ValueError("%s: holds no .bin file; preprocess_deepmar_pytorch.py writes them" % folder)
    return sorted(sorted(names), key=natural)  # equal values (1, 01) by their text


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        usage="get_info.py [bin] BIN_DIR INFO WIDTH HEIGHT")
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv).arguments
    if len(arguments) == 5 and arguments[0] == "bin":
        arguments = arguments[1:]
    if len(arguments) != 4:
        parser.error("give BIN_DIR, INFO, WIDTH and HEIGHT (and, before them, no other format than bin)")
    folder, info, width, height = arguments
    for text in (width, height):
        if not re.fullmatch("[1-9][0-9]*", text):
            parser.error("WIDTH and HEIGHT must be positive whole numbers, not %r" % text)

    names = list_bins(folder, int(width), int(height))
    for name in [folder] + names:
        if "\n" in name:
            raise ValueError("%r: a line of the info file cannot hold this name" % name)
        if re.search("[\ud800-\udfff]", name):  # how Python holds what it cannot decode
            raise ValueError("%s: its name is not UTF-8, as the info file is; rename it: convmv -f GBK -t UTF-8" % name)
    start, end = os.path.join(folder, ""), " %s %s\n" % (width, height)
    with whole_file(info) as temporary, open(temporary, "w", encoding="utf-8") as f:
        f.writelines("%d %s%s%s" % (index, start, name, end) for index, name in enumerate(names))
    print("%s: %d bins of %s, %s x %s" % (info, len(names), folder, width, height))
    spaced = [name for name in [folder] + names if " " in name]
    if spaced:
        note("%r has a space, at which benchmark.x86_64 would cut the line; tools/benchmark.py does not" % spaced[0])


if __name__ == "__main__":
    command(main)
