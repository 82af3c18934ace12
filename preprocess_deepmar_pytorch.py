"""Stage 4: the images of a list -> the network's input, one .bin file per image.

    python3 preprocess_deepmar_pytorch.py /home/HwHiAiUser/dataset/peta/images input_bin image.txt
    python3 preprocess_deepmar_pytorch.py --file_path=.../peta/images --bin_path=input_bin --image_info=image.txt

NAME.bin holds float32, little endian, [3,224,224]: ((pixel / 255) - mean) / std of the image as RGB, resized to 224x224
(bilinear, aspect ratio not kept). NAME is the file name up to its first dot. The script replaces the folder of bins as a
whole, and only if it could read every image. The folder then holds the listed images and no others. All cores work.

With --uint8, NAME.bin holds the resized pixels, [224,224,3], which are a quarter of the bytes. Such bins are for a model that
normalises the pixels itself (AIPP).
"""
import argparse
import contextlib
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
from lib.bins import kind
from lib.files import replaced_folder
from lib.images import SIZE, convert_all
from lib.names import find_listed, read_list, stem
from lib.script import command, in_order_or_by_name, joined, pixels, progress


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        usage="preprocess_deepmar_pytorch.py IMAGES BIN_DIR IMAGE_TXT [--size H W] [--uint8]\n"
              "       preprocess_deepmar_pytorch.py --file_path IMAGES --bin_path BIN_DIR --image_info IMAGE_TXT ...")
    parser.add_argument("positional", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--file_path", metavar="IMAGES", help="the folder of the images")
    parser.add_argument("--bin_path", metavar="BIN_DIR", help="the folder of bins to write")
    parser.add_argument("--image_info", metavar="IMAGE_TXT", help="the list of images, one file name per line")
    parser.add_argument("--size", nargs=2, type=pixels, default=(SIZE, SIZE), metavar=("H", "W"),
                        help="height and width of the network's input (default: 224 224)")
    parser.add_argument("--uint8", action="store_true", help="write pixels, uint8 [H,W,3], for a model with AIPP")
    args = parser.parse_intermixed_args(argv)
    values = in_order_or_by_name(parser, args, ["file_path", "bin_path", "image_info"], "give IMAGES, BIN_DIR and IMAGE_TXT")
    return values + [tuple(args.size), args.uint8]


def main(argv=None):
    folder, bins, image_txt, size, uint8 = parse(argv)
    names = read_list(image_txt)
    paths = find_listed(folder, names, image_txt)
    images = [(path, stem(name) + ".bin") for path, name in zip(paths, names)]
    bad, turned = [], 0
    with replaced_folder(bins, names=[name for _, name in images]) as partial, \
            contextlib.closing(convert_all(images, partial, size, uint8)) as parts:
        with progress(len(names), "image") as bar:
            for reasons, part_turned in parts:
                bad += [reason for reason in reasons if reason]
                turned += part_turned
                bar.update(len(reasons))
        if bad:
            raise ValueError("%d of %d images cannot be read, so nothing was written (the other %d are fine): %s"
                             % (len(bad), len(names), len(names) - len(bad), joined(sorted(bad), "; ")))
    print("%s: %d images -> %d bins of %s" % (bins, len(names), len(names), kind(*size, uint8)[0]))
    if turned:
        print("note: %d of %d images have an EXIF orientation (a camera held sideways). It is ignored here, as in the "
              "guide's script, so the network sees them sideways" % (turned, len(names)))


if __name__ == "__main__":
    command(main)
