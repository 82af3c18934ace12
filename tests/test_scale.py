"""Many images, tiny ones, through stages 5 to 7: the counts are right, memory hardly grows, time grows with their number."""
import json
import os
import subprocess
import sys

import numpy as np

from helpers import POSTPROCESS, ROOT, write_model

MANY = 20000
NAMES = 1500  # bytes an image that its names, label and result may take; its bin takes 602,112 in earnest
# A process's largest memory counts from its fork, so it is started by one that is small.
MEASURE = """
import resource, subprocess, sys
subprocess.check_call(sys.argv[1:])
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)
"""


def measure(folder, text, *command):
    """Runs a script, whose output must have this text; returns (CPU seconds, largest memory in bytes)."""
    output = subprocess.check_output([sys.executable, "-c", MEASURE, sys.executable, os.path.join(ROOT, command[0])]
                                     + list(command[1:]), cwd=str(folder), universal_newlines=True)
    assert text in output
    return [float(figure) for figure in output.split()[-2:]]


def measure_stages(folder, count):
    """Runs stages 5 to 7 over so many images; returns the figures of each."""
    (folder / "bins").mkdir(parents=True)
    write_model(folder / "m.onnx", batch_size=64, size=(8, 8))
    values = np.random.RandomState(0).standard_normal((100, 3, 8, 8)).astype("<f4")
    for i in range(count):  # a file may not have 100,000 links
        path = str(folder / "bins" / ("%06d.bin" % i))
        if i < 100:
            values[i].tofile(path)
        else:
            os.link(str(folder / "bins" / ("%06d.bin" % (i % 100))), path)
    (folder / "label.json").write_text(json.dumps({"%06d.png" % i: [i % 2, 1 - i % 2] + [1] * 33 for i in range(count)}))
    (folder / "image.txt").write_text("".join("%06d.png\n" % i for i in range(count)))
    results = folder / "result" / "dumpOutput_device0"
    figures = [measure(folder, "%d bins" % count, "get_info.py", "bins", "deepmar.info", "8", "8"),
               measure(folder, "[INFO] %d results" % count, "tools/benchmark.py", "-batch_size=64", "-om_path=m.onnx", "-input_width=8",
                       "-input_height=8", "-input_text_path=deepmar.info", "-threads=1"),
               measure(folder, "scored %d images; 0 labelled" % count, POSTPROCESS, str(results), "label.json",
                       "--image_list=image.txt")]
    for i in (0, 99):  # each 100th image is the same one
        assert len({(results / ("%06d_1.bin" % j)).read_bytes() for j in range(i, count, 6400)}) == 1
    return figures


def test_time_and_memory_grow_with_the_number_of_images(tmp_path):
    few, many = measure_stages(tmp_path / "few", MANY // 10), measure_stages(tmp_path / "many", MANY)
    for (time, memory), (more_time, more_memory) in zip(few, many):
        assert more_time < 13 * time and more_memory < memory + 0.9 * MANY * NAMES
