"""tools/gallery.py: the pipeline's logits, every kind of input, and each image once, whatever is killed."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest
from pyarrow import parquet

import gallery
from helpers import (GALLERY, ROOT, all_images, check_error, check_once, contents, end_in, finish_gallery, run_gallery, script,
                     write_images, write_model)
from lib.gallery.pool import why
from lib.labels import ASSUMED, PETA
from lib.models import SIMULATES
from lib.results import probabilities


def test_progress_without_a_terminal_is_a_line_a_minute(capsys, monkeypatch):
    report, now = gallery.Report(1000, None, 0), time.monotonic()
    report.start = now - 100
    report.add({"images": 250, "errors": 3}, [])
    report.look(0)
    monkeypatch.setattr(gallery.time, "monotonic", lambda: now + gallery.PROGRESS_SECONDS)
    report.look(70)
    report.look(80)
    assert capsys.readouterr().out == "320 of 1000 images, 3 errors, 2.0 images/s, 6 min left\n"


def test_ray_error_on_one_line():
    text = "The actor died\n\x1b[36mray::Worker\x1b[39m (pid=1)\n  ^^^\nModuleNotFoundError: No module named 'lib'"
    assert why(RuntimeError(text)) == "RuntimeError: ModuleNotFoundError: No module named 'lib'"
    assert why(OSError("lost\nat sea")) == "lost at sea"


# --- the command, on this machine ----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(gallery_folder):
    return gallery_folder


@pytest.fixture(scope="module")
def first(folder):
    """The output of a run over the folder of images, and the process.

    The script is started through a symbolic link, from a folder with another package named lib, and without Ray.
    """
    for name in "lib", "ray":
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise ImportError('this is another package')\n")
    os.symlink(GALLERY, str(folder / "link.py"))
    done = run_gallery(folder, "images", "--output", "out", "--shard-size", 5, tool=str(folder / "link.py"), PYTHONPATH=str(folder))
    assert done.returncode == 0, (done.stdout, done.stderr)
    shutil.rmtree(str(folder / "ray"))
    return folder / "out", done


def test_folder_of_images(folder, first):
    output, done = first
    assert done.stderr == "note: %s\n" % ASSUMED
    assert re.match(r"22 images in [\d.]+ s, [\d.]+ images/s after the start; 1 workers on 1 devices, 0 lost; 0 parts started again\n"
                    r"out: 22 images in 5 parts, 2 images cannot be read\n$", done.stdout)
    found = check_once(output, all_images(folder / "images"))
    assert sorted(path for path, (error, _) in found.items() if error) == ["b/empty.png", "cut.jpg"]
    schema = parquet.read_schema(str(output / "part-000000.parquet"))
    assert schema.names == ["path"] + list(PETA) + ["error"]
    assert {str(schema.field(name).type) for name in PETA} == {"float"} and str(schema.field("path").type) == "string"
    manifest = json.loads((output / "_manifest.json").read_text())
    assert manifest["values"] == manifest["model"]["output"] == "logits" and manifest["attributes"] == list(PETA)
    assert {"onnxruntime", "numpy", "Pillow", "pyarrow", "python"} == set(manifest["versions"])


@pytest.mark.parametrize("arguments", [["images"], ["list.txt", "--root", "images"], ["a.tar"], ["a.parquet"]])
def test_model_whose_nodes_do_not_tell_is_judged_by_its_values(folder, first, tmp_path, monkeypatch, capsys, arguments):
    """Before the first part, and recorded. The logits are those of the model without a Sigmoid."""
    monkeypatch.chdir(folder)
    model = str(write_model(tmp_path / "s.onnx", 4))
    end_in(model, "Sigmoid", "Clip")
    gallery.main(arguments + ["--output", str(tmp_path / "out"), "--model", model])
    assert "by the values of 20 images, it gives probabilities" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "_manifest.json").read_text())["model"]["output"] == "probabilities"
    prefix, names = "%s/a.tar/" % folder if arguments == ["a.tar"] else "", all_images(folder / "images")
    found = check_once(tmp_path / "out", [prefix + name for name in names])
    for name, (error, logits) in check_once(first[0], names).items():
        assert found[prefix + name][0] == error
        assert np.allclose(probabilities(logits), probabilities(found[prefix + name][1]), atol=1e-6, equal_nan=True)


def test_int8_twin_is_recognised(folder, tmp_path):
    assert gallery.open_model(str(folder / "m.onnx"), 0)[1:] == ("logits", False)
    model = onnx.load(str(folder / "m.onnx"))
    model.metadata_props.add(key=SIMULATES, value="int8")
    onnx.save(model, str(tmp_path / "t.onnx"))
    assert gallery.open_model(str(tmp_path / "t.onnx"), 0)[1:] == ("logits", True)


def test_documented_query(folder, first, monkeypatch):
    duckdb = pytest.importorskip("duckdb")
    with open(os.path.join(ROOT, "docs", "gallery.md"), encoding="utf-8") as f:
        query = re.search(r'duckdb -c "(SELECT .*?)"', f.read(), re.DOTALL).group(1)
    monkeypatch.chdir(folder)
    os.symlink("out", "attributes")
    male, backpack = PETA.index("personalMale"), PETA.index("carryingBackpack")
    found = check_once(first[0], all_images(folder / "images"))
    expected = {path for path, (error, values) in found.items() if error is None and values[male] < 0 <= values[backpack]}
    assert {path for path, in duckdb.sql(query).fetchall()} == expected and 0 < len(expected) < 20


def test_only_missing_parts_are_computed(folder, first):
    """To the byte. A finished run starts nothing."""
    output, _ = first
    nowhere = ["--address", "nowhere:1"] if sys.version_info >= gallery.OLDEST_PYTHON else []
    done = run_gallery(folder, "images", "--output", "out", "--shard-size", 5, *nowhere)
    assert done.returncode == 0 and done.stdout == (
        "out: 5 of 5 parts are there already\nout: 22 images in 5 parts, 2 images cannot be read\n"), done.stderr
    before = contents(output)
    os.remove(str(output / "part-000003.parquet"))
    done = run_gallery(folder, "images", "--output", "out", "--shard-size", 5)
    assert done.stdout.startswith("out: 4 of 5 parts are there already\n5 images in "), done.stderr
    assert contents(output) == before


def test_errors_of_earlier_starts_count(folder, tmp_path):
    out = tmp_path / "out"
    for most in 1, 1, 2, 1:
        done = run_gallery(folder, "images", "--output", out, "--shard-size", 5, "--max-errors", most)
        if most == 2:
            assert done.returncode == 0, done.stderr
        else:
            check_error(done, "2 images cannot be read, more than --max-errors 1")


def test_one_of_two_runs_with_different_models_has_the_folder(folder, tmp_path):
    write_model(folder / "other.onnx", 4, bias=0.5)
    started = [run_gallery(folder, "images", "--output", tmp_path, "--shard-size", 5, "--onnx", model, runner=subprocess.Popen)
               for model in ("m.onnx", "other.onnx")]
    errors = [process.communicate()[1] for process in started]
    assert sorted(process.returncode for process in started) == [0, 1], errors
    assert any("was started with other settings: model.sha256" in text for text in errors)
    check_once(tmp_path, all_images(folder / "images"))


def check_refused(text, *arguments, output="out"):
    """Checks that a command line is refused with this text before Ray is started."""
    with pytest.raises((OSError, ValueError), match=text):
        gallery.main([str(argument) for argument in ("--onnx", "m.onnx", "--output", output) + arguments])


def test_folder_of_another_run_is_refused(folder, first, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    write_model(folder / "n.onnx", 4, bias=0.5)
    (folder / "one.txt").write_text("im0.png\n")
    for text, arguments in (("model.sha256: ", ["images", "--shard-size", 5, "--onnx", "n.onnx"]),
                            ("input.shard_size: 5 there, 6 now", ["images", "--shard-size", 6]),
                            ("input.kind: folder there, tar now. ", ["a.tar"]),
                            ("input.kind: folder there, list now. ", ["one.txt", "--root", "images", "--shard-size", 5]),
                            ("values: logits there, probabilities now", ["images", "--shard-size", 5, "--probabilities"])):
        check_refused("out: was started with other settings: .*" + text, *arguments)
    (tmp_path / "part-000000.parquet").write_bytes(b"")
    check_refused("holds 1 parts but no _manifest.json", "images", output=tmp_path)


def test_errors_before_work(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    out = tmp_path / "out"
    check_error(run_gallery(folder, "nowhere", "--output", out), "nowhere: no such file or folder")
    for more in ("--model m.om --gpus 1", "--devices 0", "--npus 1 --devices x", "--npus 2", "--npus 1 --gpus 1"):
        with pytest.raises(SystemExit):
            gallery.parse(["images", "--output", "out", "--onnx", "m.onnx"] + more.split())
    check_refused("no /dev/davinci0", "images", "--npus", "1", output=out)
    (tmp_path / "ray.py").write_text("raise ImportError('No module named ray')")
    done = run_gallery(folder, "images", "--output", out, "--address", "auto", PYTHONPATH=str(tmp_path))
    if sys.version_info < gallery.OLDEST_PYTHON:
        check_error(done, "Ray needs Python 3.10 or later, but this is 3.7; without --address, no Ray is needed")
    else:
        check_error(done, "No module named ray; run: ", "-m pip install -r %s/tools/requirements-cluster.txt" % ROOT)
    (folder / "names.txt").write_text("\n".join(["Path"] + list(PETA)[1:]))
    (tmp_path / "gbk.txt").write_bytes("\u884c\u4eba.png\n".encode("gbk"))
    for text, *arguments in (
            ("give --root", "list.txt"), ("--root is for a list file", "images", "--root", "images"),
            ("all in .parquet", "a.tar", "a.parquet"),
            ("none of its first 22 images is in", "list.txt", "--root", "images/b/b"),
            ("columns would have the name path or error", "images", "--attributes", "names.txt"),
            ("cannot be opened", "nonsense://bucket/list.txt", "--root", "images"),
            ("is not UTF-8 text", tmp_path / "gbk.txt", "--root", "images")):
        check_refused(text, *arguments, output=out)
    assert not out.exists()


# --- processes of this machine: what is killed ---------------------------------------------------------------------------------

def workers_of(process, output):
    """Waits until the driver has written a part. Returns the processes of its workers."""
    while not list(output.glob("part-*.parquet")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    found = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "multiprocessing.spawn"], stdout=subprocess.PIPE, text=True).stdout
    return list(map(int, found.split()))


def test_killed_process_is_replaced(folder, many, tmp_path):
    process = run_gallery(folder, "many", "--output", tmp_path, "--shard-size", 10, "--actors", 2, runner=subprocess.Popen)
    victim = workers_of(process, tmp_path)[0]
    os.kill(victim, signal.SIGKILL)
    finish_gallery(process, tmp_path, many, lost=1, again=(1,))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_killed_driver_leaves_nothing_and_goes_on(folder, many, tmp_path, number):
    out, temporary = tmp_path / "out", tmp_path / "tmp"
    temporary.mkdir()
    process = run_gallery(folder, "many", "--output", out, "--shard-size", 10, runner=subprocess.Popen, TMPDIR=str(temporary))
    workers = workers_of(process, out)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    assert errors == "note: %s\n" % ASSUMED  # nothing of multiprocessing's resource tracker either
    deadline = time.monotonic() + 60
    while any(os.path.exists("/proc/%d/exe" % worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert workers and not list(temporary.iterdir())
    if number == signal.SIGKILL:
        process = run_gallery(folder, "many", "--output", out, "--shard-size", 10, runner=subprocess.Popen)
        finish_gallery(process, out, many, lost=0, again=(0,))


def test_model_for_nv12_is_refused(tmp_path):
    write_images(tmp_path / "images", 1)
    write_model(tmp_path / "m.onnx", size=(16, 16))
    assert script("tools/rehearse.py", "aipp", tmp_path / "m.onnx", tmp_path / "nv12.onnx", "--nv12", 601).returncode == 0
    check_error(script("tools/gallery.py", tmp_path / "images", "--onnx", tmp_path / "nv12.onnx", "--output", tmp_path / "g"),
                "nv12.onnx: takes NV12, a video's frames; for image files give the model without it")
