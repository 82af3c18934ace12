"""Stage 6 without a card: replaces benchmark.x86_64 and runs the ONNX model on ONNX Runtime.

    python3 tools/benchmark.py -model_type=vision -batch_size=1 -device_id=0 -om_path=deepmar_bs1_nopad.onnx \\
        -input_width=224 -input_height=224 -input_text_path=deepmar.info -useDvpp=false -output_binary=true
    python3 tools/benchmark.py -round=20 -om_path=deepmar_bs1_nopad.onnx -device_id=0 -batch_size=1

The script takes the options of the benchmark binary and writes the same files: result/dumpOutput_device<ID>/NAME_1.bin for
each bin of the info file, and result/perf_vision_batchsize_<N>_device_<ID>.txt. With -round, it runs pure inference on random
input and writes result/PureInfer_perf_of_<model>_in_device_<ID>.txt. Reading, inference and writing overlap. The folder of
results is replaced as a whole, so it never holds results of an earlier run.
"""
import argparse
import json
import os
import re
import sys
import time

HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]
from common import Inline, can_start, command, cores, importing, pixels, progress, replaced_folder, some, write_text
from get_info import kind
from providers import CPU, NEEDS, PROVIDERS, SHARED, available, import_onnxruntime, provider_note
from rates import latency_lines, perf_lines, pure_line, summary
from session import (CALLS_MB, TOLERANCE, Clock, callers, calls_at_once, check_precision, check_shape, empty_batch, input_size,
                     interruptible, measure, open_session, read_batch, run, takes_uint8)

with importing():
    import numpy as np


def read_info(path, height, width, uint8=False):
    """Returns the bins of an info file, [(name, path)]. Raises OSError, or ValueError for a bin of the wrong size."""
    text, size = kind(height, width, uint8)
    try:
        with open(path, encoding="utf-8") as f:
            lines = f.read().split("\n")
    except UnicodeDecodeError as error:
        raise ValueError("%s: is not UTF-8 text (byte %d)" % (path, error.start))
    bins, seen, bad = [], set(), []
    for line in lines:
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


def vision(session, bins, calls, args):
    """Runs the model over the bins. Returns the lines to print."""
    folder = os.path.join("result", "dumpOutput_device%d" % args.device_id)
    with replaced_folder(folder) as partial, progress(len(bins), "image") as bar:
        clocks, seconds = run(session, bins, args.batch_size, args.input_height, args.input_width, partial, bar.update, calls)
    lines = perf_lines(clocks, len(bins))
    write_text("result/perf_vision_batchsize_%d_device_%d.txt" % (args.batch_size, args.device_id),
               "\n".join(lines) + "\n")
    write_summary(folder + "_summary.json", session, seconds, len(bins) / clocks["interface"].seconds)
    return lines + latency_lines(seconds, args.batch_size) + ["[INFO] %d results in %s" % (len(bins), folder)]


def pure_inference(session, batch, calls, args):
    """Runs the model on the same batch again and again. Returns the lines to print."""
    feed = {session.get_inputs()[0].name: batch}
    clock, seconds = Clock(), []

    def infer(_):
        start = time.perf_counter()
        with clock:
            session.run(None, feed, options)
        seconds.append(time.perf_counter() - start)

    pool = callers if can_start(calls + 1) else Inline
    with interruptible() as options, progress(args.round, "round") as bar, pool(calls) as runner:
        list(runner.map(lambda _: session.run(None, feed, options), range(calls)))  # a warm-up
        for _ in runner.map(infer, range(args.round)):
            bar.update()
    line = pure_line(args.round * len(batch), clock.seconds)
    model = os.path.splitext(os.path.basename(args.om_path))[0]
    path = "./result/PureInfer_perf_of_%s_in_device_%d.txt" % (model, args.device_id)
    os.makedirs("result", exist_ok=True)
    write_text(path, line + "\n")
    write_summary(path[:-len(".txt")] + "_summary.json", session, seconds, args.round * len(batch) / clock.seconds)
    return ["[INFO] PureInfer result saved in %s" % path, line] + latency_lines(seconds, len(batch))


def write_summary(path, session, seconds, throughput):
    copies = session.get_providers()[0] not in SHARED
    write_text(path, json.dumps(summary(seconds, throughput, copies)))


def first_batch(session, bins, size):
    """Returns a batch for trying out a provider: the first bins, or random input if there are no bins."""
    batch = empty_batch(session, *size)
    if bins:
        read_batch(bins, batch)
    else:
        random = np.random.RandomState(0)
        batch[...] = random.randint(0, 256, batch.shape) if takes_uint8(session) else random.standard_normal(batch.shape)
    return batch


def opened(args, name, threads, calls):
    """Opens the model on a provider. Checks that model, bins and options fit together and that the provider's logits are right.

    Returns (session, bins, a batch). bins is None with -round. Raises OSError or ValueError.
    """
    session, bins = open_session(args.om_path, args.device_id, threads, calls, name, exact=args.tolerance <= TOLERANCE), None
    if args.round:
        args.input_height, args.input_width = input_size(session)[1:]
    size = args.batch_size, args.input_height, args.input_width
    check_shape(session, args.om_path, *size)
    if not args.round:
        bins = read_info(args.input_text_path, args.input_height, args.input_width, takes_uint8(session))
    batch = first_batch(session, bins, size)
    check_precision(session, args.om_path, batch, args.tolerance)
    return session, bins, batch


def fastest(args, threads, calls):
    """Measures every provider whose logits are right. Returns the result of opened() for the fastest one."""
    rates = {}
    for name in available():
        try:
            session, _, batch = opened(args, name, threads, calls)
        except ValueError as error:
            if name == CPU:
                raise
            print("[WARN] %s is left out: %s" % (name, error))
            continue
        rates[name] = measure(session, batch, calls)
    name = max(rates, key=rates.get)
    print("[INFO] measured: %s; %s is taken" % (", ".join("%s %.4g images/s" % item for item in rates.items()), name))
    return opened(args, name, threads, calls)


def count_images(args):
    """Returns the number of images to run. Only counts the info file's lines, because read_info() checks them later."""
    if args.round:
        return args.round * args.batch_size
    with open(args.input_text_path, "rb") as f:
        return max(1, sum(1 for _ in f))


def positive(text):
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def part(text):
    value = float(text)
    if not 0 <= value < 1:
        raise ValueError
    return value


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)

    def option(name, **settings):
        parser.add_argument("-" + name, "--" + name, **settings)

    option("model_type", choices=["vision"], default="vision", help="(default: vision)")
    option("batch_size", type=positive, required=True, help="images per inference, as in the model")
    option("device_id", type=int, default=0, help="the card, if the provider has one; also in the results' names (default: 0)")
    option("om_path", required=True, help="the ONNX model from which the OM would be made")
    option("input_width", type=pixels, default=224, help="in pixels (default: 224)")
    option("input_height", type=pixels, default=224, help="in pixels (default: 224)")
    option("input_text_path", help="the info file")
    option("useDvpp", choices=["false"], default="false", help="always false, because stage 4 decodes the images (default: false)")
    option("output_binary", choices=["true"], default="true", help="results are .bin files (default: true)")
    option("round", type=positive, help="run pure inference on random input this many times")
    option("threads", type=positive, help="CPU threads (default: one per core)")
    option("calls", type=positive, help="batches that the CPU computes at the same time (default: one per thread, or fewer if they "
                                        "need more than %d MB or would leave threads idle at the end)" % CALLS_MB)
    option("provider", help="the execution provider of ONNX Runtime, such as OpenVINOExecutionProvider; measure tries each for a "
                            "second and takes the fastest (default: the first available one of %s)" % ", ".join(PROVIDERS))
    option("tolerance", type=part, default=TOLERANCE, metavar="FRACTION",
           help="how far a provider's logits may differ from the CPU's, as a fraction of the largest logit; above the default, "
                "OpenVINO may compute in bfloat16 (default: %g)" % TOLERANCE)
    option("strict", action="store_true", help="fail if ONNX Runtime has a card's provider that does not load")
    args = parser.parse_args(argv)
    if (args.input_text_path is None) == (args.round is None):
        parser.error("give -input_text_path for inference on data, or -round for pure inference")
    if args.device_id < 0:
        parser.error("-device_id cannot be negative")
    if args.om_path.endswith(".om"):
        parser.error("-om_path: %s is an OM, which only the card runs; give the ONNX model" % args.om_path)
    return args


def main(argv=None):
    args = parse(argv)
    threads = args.threads or cores()
    calls = args.calls or calls_at_once(threads, count_images(args), args.batch_size, args.input_height, args.input_width)
    session, bins, batch = (fastest(args, threads, calls) if args.provider == "measure" else
                            opened(args, args.provider, threads, calls))
    onnxruntime = import_onnxruntime()
    provider = session.get_providers()[0]
    note = "" if args.provider else provider_note(session, onnxruntime.get_available_providers())
    if note:
        remedy = NEEDS[note.split()[0]]
        if args.strict:
            raise ValueError("%s; %s" % (note, remedy))
        print("[WARN] %s, so the CPU runs the model; %s" % (note, remedy))
    print("[INFO] ONNX Runtime %s, %s%s, %s" % (onnxruntime.__version__, provider, " (%s)" % note if note else "", args.om_path))
    if provider not in SHARED:
        calls = 1
    else:
        print("[INFO] %d thread%s, %d call%s at a time" % (threads, "s" * (threads > 1), calls, "s" * (calls > 1)))
    sys.stdout.flush()
    for line in vision(session, bins, calls, args) if bins else pure_inference(session, batch, calls, args):
        print(line)


if __name__ == "__main__":
    command(main)
