"""Prints a table of a run's throughput and accuracy at its batch sizes. Also writes OUTPUT.csv and OUTPUT.md.

    python3 tools/run/table.py throughput --run 1 result_bs1 deepmar_bs1.om benchmark.x86_64 \\
        --run 8 result_bs8 deepmar_bs8.om benchmark.x86_64 --devices 0 --chips 4

Give --run BATCH_SIZE FOLDER MODEL BACKEND once for each batch size. The folder holds the output of stages 6 and 7:
fusion_result.json, and for each device perf_vision_batchsize_<N>_device_<D>.txt, dumpOutput_device<D>_summary.json or both.
ais_bench measures no end-to-end rate, and the benchmark binary measures no latencies. The table has "-" there.

Rates are in images per second. "pure" is inference on the same batch again and again (run_all.sh --pure yes). Several devices
ran at the same time, and a rate is their sum. With one device, the card's rate is the Interface throughputRate times the number
of chips on the card (4 on a 300I, 2 on a 300I Duo, 1 on a 300I Pro). p50, p95 and p99 are percentiles of the time that the model
took for a batch, in milliseconds. The script fails if the accuracy differs between the batch sizes,
with --int8 by more than 1 %.
"""
import argparse
import csv
import io
import os
import re
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__)))))
from lib.files import NUMBER, read_json, write_text
from lib.rates import COLUMNS, figures
from lib.script import command

MAX_ACC_DIFFERENCE = 0.0001  # allowed difference of instance_acc: in an image or two, rounding may move a logit across 0
MAX_INT8_DIFFERENCE = 0.01   # each INT8 model is calibrated by itself. This is the drop that stage 7 allows


def row(batch_size, folder, model, backend, devices, chips):
    """Returns a row of the table, a dict of COLUMNS. A figure that was not measured is None."""
    path = os.path.join(folder, "fusion_result.json")
    speed = figures(folder, batch_size, devices, backend)
    fusion = read_json(path, {"images": int, "instance_acc": NUMBER}, "stage 7")
    card = None
    if chips and not backend.startswith("ONNX Runtime"):
        card = speed["interface_images_per_s"] * (chips if len(devices) == 1 else 1)
    return dict(speed, batch_size=batch_size, devices=" ".join(devices), backend=backend, model=model, images=fusion["images"],
                card_images_per_s=card, instance_acc=fusion["instance_acc"])


def markdown(rows, devices, chips):
    """Returns the table's lines in the style of the guide's chapter 7."""
    if len(devices) > 1:
        card = "all devices, measured"
    else:
        card = "card (x %d)" % chips if chips else "card"
    head = ["batch size", "end to end", "Interface", card, "pure", "p50 ms", "p95 ms", "p99 ms", "instance_acc"]
    cells = [[str(r["batch_size"])] + ["-" if r[key] is None else "%.2f" % r[key] for key in COLUMNS[5:-1]]
             + [repr(r["instance_acc"])] for r in rows]
    widths = [max(map(len, column)) for column in zip(head, *cells)]
    lines = ["| %s |" % " | ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in [head] + cells]
    return lines[:1] + ["|%s|" % "|".join("-" * (width + 1) + ":" for width in widths)] + lines[1:]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("output", help="writes OUTPUT.csv and OUTPUT.md")
    parser.add_argument("--run", nargs=4, action="append", required=True,
                        metavar=("BATCH_SIZE", "FOLDER", "MODEL", "BACKEND"), help="the results at a batch size")
    parser.add_argument("--devices", nargs="+", default=["0"], metavar="D", help="the devices used (default: 0)")
    parser.add_argument("--chips", type=int, default=0, help="chips per card, such as 4 for a 300I (default: unknown)")
    parser.add_argument("--int8", action="store_true", help="the models are INT8, and instance_acc may differ by 1 %%")
    args = parser.parse_args(argv)
    if not all(re.fullmatch("[1-9][0-9]*", run[0]) for run in args.run):
        parser.error("--run: BATCH_SIZE must be a positive whole number")

    rows = [row(int(size), folder, model, backend, args.devices, args.chips)
            for size, folder, model, backend in sorted(args.run, key=lambda run: int(run[0]))]
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    lines = markdown(rows, args.devices, args.chips)
    for path, content in ((args.output + ".csv", text.getvalue()), (args.output + ".md", "\n".join(lines) + "\n")):
        write_text(path, content)

    print("images per second at each batch size, %d images, device %s, %s"
          % (rows[0]["images"], " ".join(args.devices), ", ".join(sorted({r["backend"] for r in rows}))))
    print("\n".join(lines))
    accuracies = [r["instance_acc"] for r in rows]
    difference = max(accuracies) - min(accuracies)
    if len({r["images"] for r in rows}) > 1:
        raise ValueError("%s.csv: the batch sizes have results of different numbers of images: %s; run stage 6 again for all of them"
                         % (args.output, ", ".join("%(images)d at %(batch_size)d" % r for r in rows)))
    if difference > (MAX_INT8_DIFFERENCE if args.int8 else MAX_ACC_DIFFERENCE):
        raise ValueError("%s.csv: instance_acc differs between the batch sizes, by %.6f; compare two of their result "
                         "folders with tools/compare.py" % (args.output, difference))
    if len(rows) > 1:
        print("instance_acc is the same at all batch sizes" if not difference else
              "note: instance_acc differs by %.2g between the batch sizes" % difference)


if __name__ == "__main__":
    command(main)
