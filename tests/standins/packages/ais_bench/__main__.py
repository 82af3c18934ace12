"""Stands in for ais_bench: its options, the split over devices, its names, its summary, its log."""
import argparse
import json
import logging
import os
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
from om import FAIL, Model, devices  # noqa: E402

logging.basicConfig(format="[%(levelname)s] %(message)s", level=logging.INFO)  # to stderr, as the tool's
parser = argparse.ArgumentParser("ais_bench", allow_abbrev=False)
parser.add_argument("--model", required=True)
parser.add_argument("--input", required=True)
parser.add_argument("--output", required=True)
parser.add_argument("--output_dirname")
parser.add_argument("--outfmt", default="BIN", choices=["NPY", "BIN", "TXT"])
parser.add_argument("--batchsize", type=int)
parser.add_argument("--device", default="0")
for option in ("--loop", "--warmup_count", "--debug", "--dymBatch", "--display_all_summary"):
    parser.add_argument(option)
args = parser.parse_args()


def run(device, paths, dirname):
    """One device's part; returns its throughput."""
    if device not in devices():
        raise RuntimeError("aclError: open device %d failed" % device)
    logging.info("acl init success")
    logging.info("open device %d success", device)
    model = Model(args.model)
    if args.batchsize not in (None, model.batch_size):
        raise RuntimeError("the model's batch size is %d, --batchsize %d" % (model.batch_size, args.batchsize))
    folder = os.path.join(args.output, dirname)
    os.makedirs(folder, exist_ok=True)
    seconds, batches, files = 0.0, 0, {}
    for i in range(0, len(paths), model.batch_size):
        before = time.time()
        outputs = model.run(paths[i:i + model.batch_size])
        seconds, batches = seconds + time.time() - before, batches + 1
        for path, logits in zip(paths[i:i + model.batch_size], outputs):
            name = os.path.join(folder, os.path.splitext(os.path.basename(path))[0] + "_0.bin")
            logits.tofile(name)
            files[len(files)] = {"infiles": [path], "outfiles": [name]}
    mean = 1000 * seconds / batches
    throughput = 1000 * model.batch_size / mean
    with open(folder + "_summary.json", "w") as f:
        json.dump({"filesinfo": files, "NPU_compute_time": {"mean": mean, "count": batches}, "throughput": throughput}, f)
    if FAIL == "ais_bench leaves fewer":
        os.remove(name)
    if FAIL == "ais_bench reports an error":  # and still ends with 0
        logging.error("aclmdlExecute failed, errorCode is 507011")
    logging.info("-----------------Performance Summary------------------")
    logging.info("NPU_compute_time (ms): min = %s, max = %s, mean = %s, median = %s, percentile(99%%) = %s", *[mean] * 5)
    logging.info("throughput 1000*batchsize.mean(%d)/NPU_compute_time.mean(%s): %s", model.batch_size, mean, throughput)
    logging.info("------------------------------------------------------")
    return throughput


paths = sorted(os.path.join(args.input, name) for name in os.listdir(args.input))
chosen = [int(device) for device in args.device.split(",")]
if FAIL == "ais_bench":
    raise RuntimeError("load model failed")
if len(chosen) == 1:
    run(chosen[0], paths, args.output_dirname)
else:
    rates = []
    for i, device in enumerate(chosen):
        subfolder = "device%d" % device + ("_%d" % i if os.environ.get("NUMBERED") else "")  # as newer versions do
        rates.append(run(device, paths[i::len(chosen)], os.path.join(args.output_dirname, subfolder)))
        print("i:%d device_%d throughput:%s start_time:1.0 end_time:2.0" % (i, device, rates[-1]))
    logging.info("summary throughput:%s", sum(rates))
