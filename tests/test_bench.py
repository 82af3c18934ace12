"""The benchmark runs, writes its rows and prints them as a table. How fast anything is, is not tested."""
import json
import os
import subprocess
import sys

BENCH = os.path.join(os.path.dirname(os.path.abspath(__file__)), "bench.py")


def bench(*arguments):
    return subprocess.run([sys.executable, BENCH] + [str(argument) for argument in arguments], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, universal_newlines=True)


def test_quick_run_writes_rows_with_sane_figures(tmp_path):
    path = tmp_path / "bench.json"
    process = bench("--quick", "--only", "get_info", "startup", "--json", path)
    assert process.returncode == 0, process.stderr
    result = json.loads(path.read_text())
    assert result["quick"] and {"processor", "cores", "python", "onnxruntime", "torch"} <= set(result["machine"])
    get_info, startup = result["rows"]
    assert get_info["stage"] == "get_info, 1,000 bins" and startup["against"] == "python3 -c 'import numpy'"
    assert 100 < get_info["ours"] < 1e8 and 0.001 < startup["theirs"] < 100 and 0.001 < startup["ours"] < 100
    assert abs(get_info["ratio"] / (get_info["ours"] / get_info["theirs"]) - 1) < 1e-6
    assert abs(startup["ratio"] / (startup["theirs"] / startup["ours"]) - 1) < 1e-6
    assert all(row["met"] is (row["ratio"] >= row["goal"]) for row in result["rows"])

    table = [line for line in process.stdout.splitlines() if line.startswith("| ")]
    assert [line.split("|")[1].strip() for line in table] == ["stage", get_info["stage"], startup["stage"]]
    both = bench("--markdown", path, path)
    assert both.returncode == 0, both.stderr
    columns = [line.split("|")[1:-1] for line in both.stdout.splitlines() if line.startswith("| ")]
    assert len(columns) == 3 and all(len(cells) == 12 and cells[4:8] == cells[8:] for cells in columns)


def test_wrong_rows_are_usage_errors():
    for arguments in (["--only", "nonsense"], ["--busy", "--only", "get_info"]):
        process = bench(*arguments)
        assert process.returncode == 2 and "Traceback" not in process.stderr, arguments
