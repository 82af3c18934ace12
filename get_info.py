"""Stage 5: a folder of bins -> the info file that the benchmark tool reads: INDEX PATH WIDTH HEIGHT, one line per bin.

    python3 get_info.py ./input_bin deepmar.info 224 224
    python3 get_info.py bin ./input_bin deepmar.info 224 224

The second form is that of the generic tool, whose first argument is the files' format. The bins are listed in natural order
(2.bin before 10.bin), which does not depend on the file system. They are all float32 [3,HEIGHT,WIDTH], or all uint8
[HEIGHT,WIDTH,3] as stage 4 writes them with --uint8, or all NV12 [1.5 x HEIGHT,WIDTH] as with --nv12.
"""
import argparse
import os
import re
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
from lib.bins import holds, list_bins, write_info
from lib.script import command, note


def parse(argv):
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
    return folder, info, int(width), int(height)


def main(argv=None):
    folder, info, width, height = parse(argv)
    names = list_bins(folder, width, height)
    write_info(info, folder, names, width, height)
    kind = {"float32": "", "uint8": ", uint8"}.get(holds(os.path.join(folder, names[0]), height, width), ", NV12")
    print("%s: %d bins of %s, %d x %d%s" % (info, len(names), folder, width, height, kind))
    spaced = [name for name in [folder] + names if " " in name]
    if spaced:
        note("%r has a space. benchmark.x86_64 would cut the line there; tools/benchmark.py does not" % spaced[0])


if __name__ == "__main__":
    command(main)
