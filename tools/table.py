"""The throughput and accuracy of a run at its batch sizes, as a table on the screen, OUTPUT.csv and OUTPUT.md.

    python3 tools/table.py throughput --run 1 result_bs1 deepmar_bs1.om benchmark.x86_64 \\
        --run 8 result_bs8 deepmar_bs8.om benchmark.x86_64 --devices 0 --chips 4

--run BATCH_SIZE FOLDER MODEL BACKEND, once for each batch size. The folder holds fusion_result.json of stage 7 and
perf_vision_batchsize_<N>_device_<D>.txt of each device, or, of backend ais_bench, dumpOutput_device<D>_summary.json; that tool
measures no end-to-end rate. Rates are in images per second. With several devices they are the sums of what the
devices reached at the same time; with one, the card's rate is the Interface throughputRate times the card's chips
(4 on a 300I, 2 on a 300I Duo, 1 on a 300I Pro). Fails if the accuracy differs between the batch sizes.
"""
import argparse
import csv
import io
import json
import os
import re
import sys

sys.path[:0] = [os.path.dirname(os.path.realpath(__file__))]
from common import command, write_text

COLUMNS = ["batch_size", "devices", "backend", "model", "images", "e2e_images_per_s", "interface_images_per_s",
           "card_images_per_s", "instance_acc"]
MAX_DIFFERENCE = 0.0001  # of instance_acc between batch sizes: a logit may round to the other side of 0 in an image or two


def read(path):
    """Returns a file's text; raises OSError, or ValueError where it is none."""
    with open(path, encoding="utf-8") as f:
        return f.read()


def read_rates(path):
    """Returns the (end-to-end, Interface) rates of a perf file of the benchmark tool; raises OSError or ValueError."""
    with open(path, encoding="utf-8", errors="replace") as f:
        text = f.read(4096)
    found = [re.search(pattern, text, re.MULTILINE) for pattern in
             (r"^\[e2e\] throughputRate: ([^,]+),", r"\bInterface throughputRate: ([^,]+),")]
    try:
        rates = [float(match.group(1)) for match in found]
        if not all(0 <= rate < 1e15 for rate in rates):
            raise ValueError
    except (AttributeError, ValueError):
        raise ValueError("%s: is no perf_vision_batchsize_<N>_device_<ID>.txt of the benchmark tool; run stage 6 again" % path)
    return rates


def perf_rates(folder, batch_size, devices):
    """Returns (end-to-end, Interface) rates from the perf files, summed over the devices; raises OSError or ValueError."""
    rates = [read_rates(os.path.join(folder, "perf_vision_batchsize_%d_device_%s.txt" % (batch_size, device)))
             for device in devices]
    return tuple(map(sum, zip(*rates)))


def ais_bench_rate(folder, devices):
    """Returns the throughput in ais_bench's summaries, summed over the devices; raises OSError or ValueError."""
    rates = []
    for device in devices:
        path = os.path.join(folder, "dumpOutput_device%s_summary.json" % device)
        try:
            rates.append(float(json.loads(read(path))["throughput"]))
            if not 0 <= rates[-1] < 1e15:
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise ValueError("%s: is no summary of ais_bench; run stage 6 again" % path)
    return sum(rates)


def row(batch_size, folder, model, backend, devices, chips):
    """Returns a row of the table, a dict of COLUMNS; None where a figure was not measured."""
    if backend == "ais_bench":
        e2e, interface = None, ais_bench_rate(folder, devices)
    else:
        e2e, interface = perf_rates(folder, batch_size, devices)
    path = os.path.join(folder, "fusion_result.json")
    try:
        fusion = json.loads(read(path))
        images, accuracy = fusion["images"], float(fusion["instance_acc"])
    except (ValueError, KeyError, TypeError):
        raise ValueError("%s: is not what stage 7 writes; run it again" % path)
    on_card = not backend.startswith("ONNX Runtime") and chips
    card = None if not on_card else interface if len(devices) > 1 else chips * interface
    return dict(zip(COLUMNS, (batch_size, " ".join(devices), backend, model, images, e2e, interface, card, accuracy)))


def markdown(rows, devices, chips):
    """Returns the table's lines, in the manner of the guide's chapter 7."""
    if len(devices) > 1:
        card = "all devices, measured"
    else:
        card = "card (x %d)" % chips if chips else "card"
    head = ["batch size", "end to end", "Interface", card, "instance_acc"]
    cells = [[str(r["batch_size"])] + ["-" if r[key] is None else "%.2f" % r[key] for key in COLUMNS[5:8]]
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
    parser.add_argument("--chips", type=int, default=0, help="of a card, as 4 of a 300I (default: unknown)")
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
    if difference > MAX_DIFFERENCE or len({r["images"] for r in rows}) > 1:
        raise ValueError("%s.csv: instance_acc differs between the batch sizes, by %.6f; compare two of their result "
                         "folders with tools/compare.py" % (args.output, difference))
    if len(rows) > 1:
        print("instance_acc is the same at all batch sizes" if not difference else
              "note: instance_acc differs by %.2g between the batch sizes" % difference)


if __name__ == "__main__":
    command(main)
