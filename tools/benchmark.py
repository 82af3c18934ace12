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
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from lib.bins import read_info
from lib.files import replaced_folder, write_text
from lib.machine import cores
from lib.providers import HOST_PROVIDERS, PROVIDERS, REMEDIES, import_onnxruntime, provider_note
from lib.rates import latency_lines, perf_lines, pure_line, summary
from lib.script import command, importing, number, pixels, progress
from lib.session import (CALLS_MB, TOLERANCE, Clock, callers, calls_at_once, check_precision, check_shape, empty_batch,
                         infer, input_kind, input_size, open_session, read_bin, run)

with importing():
    import numpy as np


def vision(session, bins, shape, calls, args):
    """Runs the model over the bins. Returns the lines to print."""
    folder = os.path.join("result", "dumpOutput_device%d" % args.device_id)
    names = ["%s_1.bin" % name for name, _ in bins]
    with replaced_folder(folder, names=names) as partial, progress(len(bins), "image") as bar:
        clocks, seconds = run(session, bins, shape, partial, bar.update, calls)
    lines = perf_lines(clocks, len(bins))
    write_text("result/perf_vision_batchsize_%d_device_%d.txt" % (args.batch_size, args.device_id),
               "\n".join(lines) + "\n")
    write_summary(folder + "_summary.json", session, seconds, len(bins) / clocks["interface"].seconds)
    return lines + latency_lines(seconds, args.batch_size) + ["[INFO] %d results in %s" % (len(bins), folder)]


def pure_inference(session, batch, calls, args):
    """Runs the model on the same batch again and again. Returns the lines to print."""
    clock, seconds = Clock(), []

    def timed(_):
        start = time.perf_counter()
        with clock:
            infer(session, batch)
        seconds.append(time.perf_counter() - start)

    with progress(args.round, "round") as bar, callers(calls) as runner:
        list(runner.map(lambda _: infer(session, batch), range(calls)))  # a warm-up
        for _ in runner.map(timed, range(args.round)):
            bar.update()
    line = pure_line(args.round * len(batch), clock.seconds)
    model = os.path.splitext(os.path.basename(args.om_path))[0]
    path = "./result/PureInfer_perf_of_%s_in_device_%d.txt" % (model, args.device_id)
    os.makedirs("result", exist_ok=True)
    write_text(path, line + "\n")
    write_summary(path[:-len(".txt")] + "_summary.json", session, seconds, args.round * len(batch) / clock.seconds)
    return ["[INFO] PureInfer result saved in %s" % path, line] + latency_lines(seconds, len(batch))


def write_summary(path, session, seconds, throughput):
    copies = session.get_providers()[0] not in HOST_PROVIDERS
    write_text(path, json.dumps(summary(seconds, throughput, copies)))


def first_batch(session, bins, shape):
    """Returns a batch for trying out a provider: the first bins, or random input if there are no bins."""
    batch = empty_batch(session, *shape)
    if bins:
        for (_, path), row in zip(bins, batch):
            read_bin(path, row)
    else:
        random = np.random.RandomState(0)
        batch[...] = random.randint(0, 256, batch.shape) if batch.dtype == np.uint8 else random.standard_normal(batch.shape)
    return batch


def count_images(args):
    """Returns the number of images to run. Only counts the info file's lines, because read_info() checks them later."""
    if args.round:
        return args.round * args.batch_size
    with open(args.input_text_path, "rb") as f:
        return max(1, sum(1 for _ in f))


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)

    def option(name, **settings):
        parser.add_argument("-" + name, "--" + name, **settings)

    positive = number(int, 1)
    option("model_type", choices=["vision"], default="vision", help="(default: vision)")
    option("batch_size", type=positive, required=True, help="images per inference, as in the model")
    option("device_id", type=number(int, 0), default=0,
           help="the card, if the provider has one; also in the results' names (default: 0)")
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
    option("provider", help="the execution provider of ONNX Runtime, such as OpenVINOExecutionProvider "
                            "(default: the first available one of %s)" % ", ".join(PROVIDERS))
    option("tolerance", type=number(float, 0, 1), default=TOLERANCE, metavar="FRACTION",
           help="how far a provider's logits may differ from the CPU's, as a fraction of the largest logit; above the default, "
                "OpenVINO may compute in bfloat16 (default: %g)" % TOLERANCE)
    option("strict", action="store_true", help="fail if ONNX Runtime has a card's provider that does not load")
    args = parser.parse_args(argv)
    if (args.input_text_path is None) == (args.round is None):
        parser.error("give -input_text_path for inference on data, or -round for pure inference")
    if args.om_path.endswith(".om"):
        parser.error("-om_path: %s is an OM, which only the card runs; give the ONNX model" % args.om_path)
    return args


def main(argv=None):
    args = parse(argv)
    threads = args.threads or cores()
    calls = args.calls or calls_at_once(threads, count_images(args), args.batch_size, args.input_height, args.input_width)
    session = open_session(args.om_path, args.device_id, threads, calls, args.provider, exact=args.tolerance <= TOLERANCE)
    shape = args.batch_size, args.input_height, args.input_width
    if args.round:
        shape = (args.batch_size,) + input_size(session)[1:]
    check_shape(session, args.om_path, *shape)
    bins = None if args.round else read_info(args.input_text_path, *shape[1:], input_kind(session))
    batch = first_batch(session, bins, shape)
    check_precision(session, args.om_path, batch, args.tolerance)
    onnxruntime = import_onnxruntime()
    provider = session.get_providers()[0]
    note = "" if args.provider else provider_note(session, onnxruntime.get_available_providers())
    if note:
        remedy = REMEDIES[note.split()[0]]
        if args.strict:
            raise ValueError("%s; %s" % (note, remedy))
        print("[WARN] %s, so the CPU runs the model; %s" % (note, remedy))
    print("[INFO] ONNX Runtime %s, %s%s, %s" % (onnxruntime.__version__, provider, " (%s)" % note if note else "", args.om_path))
    if provider not in HOST_PROVIDERS:
        calls = 1
    else:
        print("[INFO] threads: %d, calls at a time: %d" % (threads, calls))
    sys.stdout.flush()
    for line in vision(session, bins, shape, calls, args) if bins else pure_inference(session, batch, calls, args):
        print(line)


if __name__ == "__main__":
    command(main)
