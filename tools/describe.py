"""Prints or writes a model's description: attributes, size, normalisation, checkpoint. An OM has it in a JSON file next to it.

    python3 tools/describe.py deepmar_bs1_nopad.onnx
    python3 tools/describe.py deepmar_bs1_nopad.onnx deepmar_bs1.json

export_onnx.py writes the description into the ONNX file's metadata. remove_pad.py and tools/quantize.py keep it, but atc drops
it. So copy deepmar_bs1.json to another machine together with deepmar_bs1.om. Stage 7 and tools/report.py read it (--model).
"""
import argparse
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from lib.files import write_text
from lib.models import description
from lib.script import command


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", help="the .onnx file, or the .json file of a model")
    parser.add_argument("output", metavar="JSON", nargs="?", help="the file to write (default: print it)")
    args = parser.parse_args(argv)
    text = json.dumps(description(args.model), indent=1, ensure_ascii=False)
    if args.output is None:
        print(text)
    else:
        write_text(args.output, text + "\n")


if __name__ == "__main__":
    command(main)
