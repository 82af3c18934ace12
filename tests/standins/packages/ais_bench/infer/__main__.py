"""Stands in for ais_bench as it is since AIS_BENCH_YEAR (2023, 2024 or 2025): its options, what it refuses, how it splits, its
names, its summary, its log. tests/test_genuine.py holds it against the tool itself."""
import argparse
import json
import logging
import os
import re
import stat
import sys

import aclruntime
import numpy as np

sys.path.append(os.path.dirname(os.path.dirname(aclruntime.__file__)))
from om import FAIL  # noqa: E402

YEAR = int(os.environ.get("AIS_BENCH_YEAR", 2025))
logging.basicConfig(format="[%(levelname)s] %(message)s", level=logging.INFO, stream=sys.stdout)


def legal(path, writing=False):
    """Whether the tool takes a path; logs why not."""
    if YEAR >= 2025:
        path = os.path.abspath(path)
    if YEAR == 2023:
        reason = None
    elif re.search("[^_A-Za-z0-9/.-]", path):
        reason = "path contains illegal char, legal chars include A-Z a-z 0-9 _ - / ."
    elif not os.path.exists(path):
        reason = None if writing else "path: %s not exist" % path
    else:
        status = os.stat(path)
        forbidden = stat.S_IWGRP | stat.S_IWOTH | (stat.S_IROTH | stat.S_IXOTH if writing and YEAR >= 2025 else 0)
        if os.path.islink(path):
            reason = "path :%s is a soft link, not supported" % path
        elif status.st_uid != os.geteuid() and status.st_gid not in os.getgroups():
            reason = "current user isn't path:%s's owner or ownergroup" % path
        elif status.st_mode & forbidden:
            reason = "The file %s is group writable, or is others writable" % path
        else:
            return True
    if reason:
        logging.error(reason)
    return not reason


def path_type(writing=False, ending=""):
    def check(value):
        if not legal(value, writing) or YEAR > 2023 and not value.endswith(ending):
            raise argparse.ArgumentTypeError("path:%s is illegal. Please check." % value)
        return value
    return check


def number(lowest, highest):
    def check(value):
        if not lowest <= int(value) <= highest:
            raise argparse.ArgumentTypeError("%s is invalid" % value)
        return int(value)
    return check


def device_list(value):
    return [number(0, 255)(part) for part in value.split(",")]


parser = argparse.ArgumentParser("ais_bench", allow_abbrev=False)
parser.add_argument("--model", required=True, type=path_type(ending=".om"))
parser.add_argument("--input", type=path_type())
parser.add_argument("--output", type=path_type(writing=True))
parser.add_argument("--output_dirname", type=path_type(writing=True))
parser.add_argument("--outfmt", default="BIN", choices=["NPY", "BIN", "TXT"])
parser.add_argument("--batchsize", type=number(1, 4096 if YEAR >= 2025 else 1e9))
parser.add_argument("--device", default=[0], type=device_list)
if YEAR >= 2024:
    parser.add_argument("--divide_input", default=False, type=lambda value: value.lower() in ("yes", "true", "t", "y", "1"))
parser.add_argument("--loop", default=1, type=number(1, 1e9))
for option in ("--warmup_count", "--debug", "--dymBatch", "--display_all_summary"):
    parser.add_argument(option)


def list_bins(folder):
    """A folder's files in natural order."""
    for name in os.listdir(folder):
        if not legal(os.path.join(folder, name)):
            raise RuntimeError("input data:%s is illegal" % name)
    names = sorted(name for name in os.listdir(folder) if name.endswith(".bin"))
    if not names:
        logging.error("%s of input args not find valid file" % folder)
        raise RuntimeError
    names.sort(key=lambda name: [int(part) if part.isdigit() else part.lower() for part in re.split("([0-9]+)", name)])
    return [os.path.join(folder, name) for name in names]


def shares(paths, count):
    """What each of several devices is given."""
    if YEAR >= 2024 and not args.divide_input:
        return [list_bins(args.input)] * count
    aclruntime.InferenceSession(args.model, 0, aclruntime.session_options())
    if YEAR == 2023:  # as many as fill the first ones
        size = -(-len(paths) // count)
        return [paths[i * size:(i + 1) * size] for i in range(count)]
    if YEAR >= 2025 and len(paths) < count:
        raise OverflowError("get list part failed")
    size, left = divmod(len(paths), count)
    return [paths[i * size + min(i, left):(i + 1) * size + min(i + 1, left)] for i in range(count)]


def run(device, paths, prefix):
    """One device's part."""
    session = aclruntime.InferenceSession(args.model, device, aclruntime.session_options())
    if not paths:
        logging.error("Invalid args.   of --input is invalid")
        raise RuntimeError
    need = size = session.get_inputs()[0].realsize
    session.options().loop = args.loop
    if args.input:
        size = os.path.getsize(paths[0])
        if size == 0 or need % size:
            logging.error("arg0 tensorsize: %d filesize: %d not match" % (need, size))
            raise RuntimeError
        logging.info("get filesperbatch files0 size:%d tensor0size:%d filesperbatch:%d runcount:%d"
                     % (size, need, need // size, -(-len(paths) // (need // size))))
    count = need // size
    if prefix:
        os.makedirs(prefix, 0o750, exist_ok=True)
        if YEAR == 2024:
            os.chmod(args.output, 0o750)
    files, names = {}, [meta.name for meta in session.get_outputs()]
    for start in range(0, len(paths), count):
        batch = paths[start:start + count]
        data = [np.fromfile(path, np.int8) if args.input else np.zeros(need, np.int8) for path in batch]
        data = np.concatenate(data + data[:1] * (count - len(batch)))
        outputs = session.run(names, [aclruntime.BaseTensor(data.__array_interface__["data"][0], data.nbytes)])
        outputs[0].to_host()
        for position, path in enumerate(batch if prefix else []):
            name = os.path.join(prefix, os.path.basename(path).split(".")[0] + "_0.bin")
            (np.array(outputs[0])[position] if args.input else np.array(outputs[0])).tofile(name)
            files[start + position] = {"infiles": [path], "outfiles": [name]}
    if FAIL == "ais_bench leaves fewer":
        os.remove(name)
    if FAIL == "ais_bench reports an error":  # and still ends with 0
        logging.error("aclmdlExecute failed, errorCode is 507011")
    times = session.sumary().exec_time_list
    if prefix:
        throughput = 1000 * (args.batchsize or count) / np.mean(times)
        with open(prefix + "_summary.json", "w") as f:
            json.dump({"filesinfo": files, "throughput": throughput, "npu_compute_time_list": times}, f)


args = parser.parse_args()
if args.output_dirname and not args.output:
    logging.error("parameter --output_dirname cann't be used alone")
    raise RuntimeError("error bad parameters --output_dirname")
if YEAR >= 2024 and (args.output_dirname or "").startswith("/"):
    raise ValueError("--output_dirname do not support abs path!")
if FAIL == "ais_bench" or FAIL == "ais_bench pure" and not args.input:
    raise RuntimeError("load model failed")
prefix = os.path.join(args.output, args.output_dirname) if args.output else None
if len(args.device) == 1:
    paths = ["pure_infer_data"] if not args.input else list_bins(args.input) if os.path.isdir(args.input) else [args.input]
    run(args.device[0], paths, prefix)
    sys.exit()
failed = False
for i, (device, paths) in enumerate(zip(args.device, shares(list_bins(args.input), len(args.device)))):
    folder = "device%d" % device if YEAR == 2023 else "device%d_%d" % (device, i)
    try:
        run(device, paths, prefix and os.path.join(prefix, folder))
    except Exception as error:
        failed = True
        logging.error("subprocess run failed error_callback:%s" % error)
sys.exit(failed)
