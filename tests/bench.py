"""Measures the benchmark tool's stand-in against the bare ONNX Runtime session, side by side in one run.

    python3 tests/bench.py work/deepmar_bs1_nopad.onnx work/input_bin --images 200 --rounds 7

Theirs: the same session, looping over one array in memory. Ours: reading the bins, inference, writing the results. Prints
both rates and their ratio for each round, and the medians, with the machine and the versions.
"""
import argparse
import os
import platform
import statistics
import sys
import tempfile
import time

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "tools"))
from benchmark import open_session, run  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="an ONNX model; its batch size is the one measured")
    parser.add_argument("bins", help="a folder of bins")
    parser.add_argument("--images", type=int, default=200, help="images a round (default: 200)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds (default: 7)")
    args = parser.parse_args()
    import onnxruntime
    session = open_session(args.model)
    batch = session.get_inputs()[0].shape[0]
    bins = [(name[:-len(".bin")], os.path.join(args.bins, name)) for name in sorted(os.listdir(args.bins))]
    bins = [("%d_%s" % (i, bins[i % len(bins)][0]), bins[i % len(bins)][1])
            for i in range(args.images // batch * batch)]
    array = np.fromfile(bins[0][1], "<f4").reshape(1, 3, 224, 224).repeat(batch, axis=0)
    feed = {session.get_inputs()[0].name: array}
    print("%s, %d cores, Python %s, numpy %s, ONNX Runtime %s, %s, batch size %d, %d images a round"
          % (platform.platform(), len(os.sched_getaffinity(0)), platform.python_version(), np.__version__,
             onnxruntime.__version__, session.get_providers()[0], batch, len(bins)))
    rounds = []
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for i in range(args.rounds):
            start = time.perf_counter()
            for _ in range(len(bins) // batch):
                session.run(None, feed)
            theirs = len(bins) / (time.perf_counter() - start)
            os.mkdir(os.path.join(folder, str(i)))
            clocks = run(session, bins, batch, 224, 224, os.path.join(folder, str(i)), lambda done: None)
            ours = len(bins) / clocks["e2e"].seconds
            rounds.append((ours, theirs, ours / theirs))
            print("ours %.2f, bare session %.2f images/s, ratio %.4f" % rounds[-1])
    print("median: ours %.2f, bare session %.2f images/s, ratio %.4f" % tuple(map(statistics.median, zip(*rounds))))


if __name__ == "__main__":
    main()
