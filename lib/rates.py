"""Writes and reads the speed figures of a run: the benchmark tool's perf files and ais_bench's summaries."""
import glob
import json
import os
import re
import statistics

from lib.files import read_text

COLUMNS = ["batch_size", "devices", "backend", "model", "images", "e2e_images_per_s", "interface_images_per_s",
           "card_images_per_s", "pure_images_per_s", "latency_p50_ms", "latency_p95_ms", "latency_p99_ms", "instance_acc"]
PERCENTILES = (50, 95, 99)
PARTS = 5  # a run is split into this many parts; their medians show how steady it was


def percentile(values, percent):
    """Returns a percentile of the values, with linear interpolation as in numpy.percentile()."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100.0
    below = int(place)
    return ordered[below] + (place - below) * (ordered[min(below + 1, len(ordered) - 1)] - ordered[below])


def figure(value):
    """Converts a rate or time from a file to a number. Raises ValueError or TypeError."""
    value = float(value)
    if not 0 <= value < 1e15:
        raise ValueError
    return value


# --- the benchmark tool's files ---------------------------------------------------------------------------------------

def perf_lines(clocks, images):
    """Returns the benchmark binary's perf file: rates in samples per second, e2e latency in ms, others in ms per sample."""
    rate = {name: images / clock.seconds for name, clock in clocks.items()}
    return ["[e2e] throughputRate: %.6g, latency: %.6g" % (rate["e2e"], 1000 * clocks["e2e"].seconds),
            "[data read] throughputRate: %.6g, moduleLatency: %.6g" % (rate["data read"], 1000 / rate["data read"]),
            "[preprocess] throughputRate: %.6g, moduleLatency: %.6g" % (rate["preprocess"], 1000 / rate["preprocess"]),
            "[infer] throughputRate: %.6g, Interface throughputRate: %.6g, moduleLatency: %.6g"
            % (rate["infer"], rate["interface"], 1000 / rate["infer"]),
            "[post] throughputRate: %.6g, moduleLatency: %.6g" % (rate["post"], 1000 / rate["post"])]


def read_perf(path):
    """Returns the (end-to-end, Interface) rates in a perf file of the benchmark tool. Raises OSError or ValueError."""
    text = read_text(path)
    found = [re.search(pattern, text, re.MULTILINE) for pattern in
             (r"^\[e2e\] throughputRate: ([^,]+),", r"\bInterface throughputRate: ([^,]+),")]
    try:
        return [figure(match.group(1)) for match in found]
    except (AttributeError, ValueError):
        raise ValueError("%s: is not a perf_vision_batchsize_<N>_device_<ID>.txt of the benchmark tool; run stage 6 again" % path)


def pure_line(images, seconds):
    """Returns the line that the benchmark binary writes after pure inference (-round)."""
    return "ave_throughputRate = %.6gsamples/s, ave_latency = %.6gms" % (images / seconds, 1000 * seconds / images)


def read_pure(path):
    """Returns the rate in a file of pure inference. Raises OSError or ValueError."""
    found = re.search(r"ave_throughputRate = ([0-9.e+-]+) ?samples/s", read_text(path))
    try:
        return figure(found.group(1))
    except (AttributeError, ValueError):
        raise ValueError("%s: is not a PureInfer_perf_of_<model>_in_device_<ID>.txt of the benchmark tool; run stage 6 again" % path)


# --- ais_bench's summaries --------------------------------------------------------------------------------------------

def statistics_of(milliseconds):
    """Returns the statistics of some times under the names of ais_bench's summaries."""
    return {"min": min(milliseconds), "max": max(milliseconds), "mean": statistics.mean(milliseconds),
            "median": percentile(milliseconds, 50), "percentile(99%)": percentile(milliseconds, 99), "count": len(milliseconds)}


def summary(seconds, throughput, copies):
    """Returns a run's summary in the form of ais_bench's <dirname>_summary.json.

    seconds: the time of each call. copies: whether the calls also copy data to a device and back. The time of the copies alone
    is then unknown.
    """
    times = [1000 * value for value in seconds]
    copying = None if copies else dict(dict.fromkeys(("min", "max", "mean", "median", "percentile(99%)"), 0.0), count=0)
    return {"NPU_compute_time": statistics_of(times), "H2D_latency": copying, "D2H_latency": copying, "throughput": throughput,
            "npu_compute_time_list": times, "pid": os.getpid()}


def read_summary(path):
    """Reads a summary. Returns (throughput in images per second, the milliseconds of each call). Raises OSError or ValueError.

    With several threads, ais_bench lists the beginning and the end of each call.
    """
    text = read_text(path)
    try:
        content = json.loads(text)
        times = [figure(item[1] - item[0] if isinstance(item, list) else item) for item in content["npu_compute_time_list"]]
        return figure(content["throughput"]), times
    except (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError):
        raise ValueError("%s: is not a summary of ais_bench or tools/benchmark.py; run stage 6 again" % path)


def figures(folder, batch_size, devices, backend):
    """Returns the COLUMNS of speed from a folder of results, without the card's rate. What was not measured is None.

    Rates are sums over the devices. Latencies are percentiles of all devices' calls. Raises OSError or ValueError.
    """
    e2e, times, pure = None, [], None
    summaries = [os.path.join(folder, "dumpOutput_device%s_summary.json" % device) for device in devices]
    if all(map(os.path.exists, summaries)):  # the benchmark binary does not write them
        throughputs, times = zip(*map(read_summary, summaries))
        times = sum(times, [])
    if backend == "ais_bench":
        interface = sum(throughputs if times else [read_summary(path)[0] for path in summaries])
    else:
        e2e, interface = map(sum, zip(*(read_perf(os.path.join(
            folder, "perf_vision_batchsize_%d_device_%s.txt" % (batch_size, device))) for device in devices)))
    paths = [path for device in devices for path in glob.glob(os.path.join(
        glob.escape(folder), "pure_device%s_summary.json" % device if backend == "ais_bench" else
        "PureInfer_perf_of_*_in_device_%s.txt" % device))]
    if len(paths) == len(devices):
        pure = sum(read_summary(path)[0] if path.endswith(".json") else read_pure(path) for path in paths)
    return dict({"latency_p%d_ms" % percent: percentile(times, percent) if times else None for percent in PERCENTILES},
                e2e_images_per_s=e2e, interface_images_per_s=interface, pure_images_per_s=pure)


def latency_lines(seconds, batch_size):
    """Returns the lines to print about the times of the calls: their percentiles, and how steady they were."""
    times = [1000 * value for value in seconds]
    size = -(-len(times) // PARTS)
    medians = [percentile(times[i:i + size], 50) for i in range(0, len(times), size)]
    units, lines = [("a call", 1)], []
    if batch_size > 1:
        units.append(("an image", batch_size))
    for what, count in units:
        figures = ["p%d %.4g" % (percent, percentile(times, percent) / count) for percent in PERCENTILES]
        lines.append("[INFO] latency of %s in ms: %s, min %.4g, max %.4g" % (
            what, ", ".join(figures), min(times) / count, max(times) / count))
    return lines + ["[INFO] the medians of %d parts of the run, %d calls in all: %.4g to %.4g ms" % (
        len(medians), len(times), min(medians), max(medians))]
