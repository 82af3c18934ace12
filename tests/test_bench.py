"""The benchmark runs, and its result has the rows; how fast anything is, is not tested.

DEEPMAR_TEST_CAMPAIGN=1 adds the rows that take long even where the benchmark is quick.
"""
import json
import os

import onnx  # noqa: F401 - once for all processes that the benchmark forks
import onnxruntime  # noqa: F401
import torch  # noqa: F401
import torchvision  # noqa: F401
from helpers import check_error, script


FIGURES = {"theirs", "ours", "limit", "ratio"}
ROWS = ["preprocess", "postprocess", "intervals", "get_info", "standin"]
STAGES = {"preprocess", "preprocess, 1 core", "postprocess, 1,000", "postprocess, 1,000, memory", "intervals, 1,000",
          "get_info, 1,000", "stand-in, batch 1, warm bins", "stand-in, batch 1, cold bins"}
if os.environ.get("DEEPMAR_TEST_CAMPAIGN"):
    ROWS += ["startup", "uint8", "options"]
    STAGES |= {"start-up, export_onnx.py --help", "start-up, tools/benchmark.py --help", "preprocess, uint8 bins",
               "uint8 bins, bytes an image", "stand-in, batch 1, cold uint8 bins", "session options, batch 8"}


def test_quick_run(tmp_path):
    process = script("tests/bench.py", "--quick", "--json", tmp_path / "bench.json", "--only", *ROWS)
    assert process.returncode == 0, process.stderr
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["quick"] and {"processor", "cores", "python", "onnxruntime", "torch"} <= set(result["machine"])
    assert STAGES <= {row["stage"] for row in result["rows"]}
    for row in result["rows"]:
        assert row["stage"] in process.stdout and isinstance(row["met"], bool)
        assert all(row[name] is None or row[name] > 0 for name in FIGURES), row
    # the one figure that no machine's speed changes
    assert result["rows"][0]["against"] == "the guide's bytes" and result["rows"][0]["met"]


def test_usage():
    check_error(script("tests/bench.py", "--only", "nonsense"), code=2)
