"""Prints or writes a model's description: attributes, size, normalisation, checkpoint. An OM has it in a JSON file next to it.

    python3 tools/describe.py deepmar_bs1_nopad.onnx
    python3 tools/describe.py deepmar_bs1_nopad.onnx deepmar_bs1.json
    python3 tools/describe.py deepmar_bs1.om

export_onnx.py writes the description into the ONNX file's metadata. remove_pad.py and tools/quantize.py keep it, but atc drops
it. So copy deepmar_bs1.json to another machine together with deepmar_bs1.om. Stage 7 and tools/report.py read it (--model).

Of an OM it also prints what the OM itself says, under "om": the chip, the version that made it, atc's command line, the input's
shape (null where it is dynamic) and whether it has AIPP.
"""
import argparse
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from lib import om
from lib.files import write_text
from lib.models import description
from lib.script import command, note


def described(path):
    """Returns a model's description, and with it what an OM says of itself."""
    if not path.endswith(".om"):
        return description(path)
    facts = om.read(path)
    if facts:
        facts.update(input_shape=om.input_shape(facts), aipp=om.has_aipp(facts))
    else:
        note("%s: says nothing of itself, or not in a known form" % path)
    return dict(description(path), om=facts)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", help="the .onnx or .om file, or the .json file of a model")
    parser.add_argument("output", metavar="JSON", nargs="?", help="the file to write (default: print it)")
    args = parser.parse_args(argv)
    text = json.dumps(described(args.model), indent=1, ensure_ascii=False)
    if args.output is None:
        print(text)
    else:
        write_text(args.output, text + "\n")


if __name__ == "__main__":
    command(main)
