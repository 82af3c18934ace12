"""Stage 4: the images of a list -> the network's input, one .bin file per image.

    python3 preprocess_deepmar_pytorch.py /home/HwHiAiUser/dataset/peta/images input_bin image.txt
    python3 preprocess_deepmar_pytorch.py --file_path=.../peta/images --bin_path=input_bin --image_info=image.txt

NAME.bin holds float32, little endian, [3,224,224]: ((pixel / 255) - mean) / std of the image as RGB, resized to 224x224
(bilinear, aspect ratio not kept). NAME is the file name up to its first dot. The script replaces the folder of bins as a
whole, and only if it could read every image. The folder then holds the listed images and no others. All cores work.

With --uint8, NAME.bin holds the resized pixels, [224,224,3], which are a quarter of the bytes. Such bins are for a model that
normalises the pixels itself (AIPP). With --nv12 601, 709 or jpeg, it holds them as NV12, [336,224], the format of video decoders, by
that standard. They are an eighth of the bytes, for a model whose AIPP also converts the colours.
"""
import argparse
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
from lib.bins import contents
from lib.camera import STANDARDS
from lib.images import SIZE, write_bins
from lib.script import command, in_order_or_by_name, pixels


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        usage="preprocess_deepmar_pytorch.py IMAGES BIN_DIR IMAGE_TXT [--size H W] [--uint8 | --nv12 STANDARD]\n"
              "       preprocess_deepmar_pytorch.py --file_path IMAGES --bin_path BIN_DIR --image_info IMAGE_TXT ...")
    parser.add_argument("positional", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--file_path", metavar="IMAGES", help="the folder of the images")
    parser.add_argument("--bin_path", metavar="BIN_DIR", help="the folder of bins to write")
    parser.add_argument("--image_info", metavar="IMAGE_TXT", help="the list of images, one file name per line")
    parser.add_argument("--size", nargs=2, type=pixels, default=(SIZE, SIZE), metavar=("H", "W"),
                        help="height and width of the network's input (default: 224 224)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--uint8", action="store_true", help="write pixels, uint8 [H,W,3], for a model with AIPP")
    kind.add_argument("--nv12", choices=sorted(STANDARDS), help="write NV12, uint8 [1.5 x H,W], for a model with AIPP that takes it")
    args = parser.parse_intermixed_args(argv)
    values = in_order_or_by_name(parser, args, ["file_path", "bin_path", "image_info"], "give IMAGES, BIN_DIR and IMAGE_TXT")
    return values + [tuple(args.size), "nv12-" + args.nv12 if args.nv12 else "uint8" if args.uint8 else "float32"]


def main(argv=None):
    folder, bins, image_txt, size, kind = parse(argv)
    count, turned = write_bins(folder, bins, image_txt, size, kind)
    print("%s: %d images -> %d bins of %s" % (bins, count, count, contents(kind, *size)[0]))
    if turned:
        print("note: %d of %d images have an EXIF orientation (a camera held sideways). It is ignored here, as in the "
              "guide's script, so the network sees them sideways" % (turned, count))


if __name__ == "__main__":
    command(main)
