"""Many images, tiny ones, through stages 5 to 7: the counts are right, memory hardly grows, time grows with their number.

DEEPMAR_TEST_CAMPAIGN=1 takes 100,000 images instead of 20,000; pytest's -s shows the figures.
"""
import json
import os
import subprocess
import sys

import numpy as np
from helpers import ROOT, write_model

MANY = 100000 if os.environ.get("DEEPMAR_TEST_CAMPAIGN") else 20000
NAMES = 1500  # bytes an image that its names, label and result may take; its bin takes 602,112 in earnest


# A process's largest memory counts from its fork, so it is started by one that is small.
MEASURE = """
import resource, subprocess, sys
subprocess.check_call(sys.argv[1:])
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)
"""


def measure(folder, *command):
    """Runs a script; returns (its output, CPU seconds, largest memory in bytes)."""
    said = subprocess.check_output([sys.executable, "-c", MEASURE, sys.executable, os.path.join(ROOT, command[0])]
                                   + list(command[1:]), cwd=str(folder), universal_newlines=True)
    said, figures = said.rstrip("\n").rsplit("\n", 1)
    return [said] + [float(figure) for figure in figures.split()]


def pipeline(folder, count):
    """Runs stages 5 to 7 over so many images; returns {stage: (seconds, bytes)}."""
    (folder / "bins").mkdir(parents=True)
    write_model(folder / "m.onnx", batch_size=64, size=(8, 8))
    value = np.random.RandomState(0).standard_normal((100, 3, 8, 8)).astype("<f4")
    for i in range(count):  # a file may not have 100,000 links
        path = str(folder / "bins" / ("%06d.bin" % i))
        if i < 100:
            value[i].tofile(path)
        else:
            os.link(str(folder / "bins" / ("%06d.bin" % (i % 100))), path)
    (folder / "label.json").write_text(json.dumps({"%06d.png" % i: [i % 2, 1 - i % 2] + [1] * 33 for i in range(count)}))
    (folder / "image.txt").write_text("".join("%06d.png\n" % i for i in range(count)))
    figures = {}
    said, *figures["get_info"] = measure(folder, "get_info.py", "bins", "deepmar.info", "8", "8")
    assert "%d bins" % count in said
    with open(str(folder / "deepmar.info")) as f:
        assert [line.split(" ", 1)[0] for line in f] == [str(i) for i in range(count)]
    said, *figures["benchmark"] = measure(
        folder, "tools/benchmark.py", "-batch_size=64", "-om_path=m.onnx", "-input_width=8", "-input_height=8",
        "-input_text_path=deepmar.info", "-threads=1")
    assert "[INFO] %d results" % count in said
    results = folder / "result" / "dumpOutput_device0"
    assert len(os.listdir(str(results))) == count
    for i in (0, 99):  # each 100th image is the same one
        assert len({(results / ("%06d_1.bin" % j)).read_bytes()[:64] for j in range(i, count, 6400)}) == 1
    said, *figures["postprocess"] = measure(folder, "postprocess_deepmar_pytorch.py", str(results), "label.json",
                                            "--image_list=image.txt")
    assert "scored %d images; 0 labelled" % count in said
    return figures


def test_many_images(tmp_path):
    few, many = pipeline(tmp_path / "few", MANY // 10), pipeline(tmp_path / "many", MANY)
    for stage in few:
        print("%s: %d images %.2f s, %.0f MB; %d images %.2f s, %.0f MB" % (
            stage, MANY // 10, few[stage][0], few[stage][1] / 1e6, MANY, many[stage][0], many[stage][1] / 1e6))
    for stage in few:
        assert many[stage][0] < 13 * few[stage][0], stage
        assert many[stage][1] < few[stage][1] + 0.9 * MANY * NAMES, stage
