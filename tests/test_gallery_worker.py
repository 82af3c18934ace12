"""lib/gallery/worker.py: the pipeline's logits, tars and row groups to their end, and whose fault an error is."""
import errno
import gzip
import io
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from helpers import run_stage_6, script, write_bins, write_images, write_model
from lib.gallery import worker as module
from lib.gallery.worker import Worker, versions
from lib.labels import PETA
from lib.providers import CPU
from lib.results import probabilities

pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("fsspec")
parquet = pytest.importorskip("pyarrow.parquet")


# --- what the tests share --------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """images/ with im0.png ... im11.png; m.onnx of batch size 4."""
    path = tmp_path_factory.mktemp("worker")
    write_images(path / "images", 12)
    write_model(path / "m.onnx", 4)
    return path


@pytest.fixture(scope="module")
def pictures(folder):
    """{name: bytes} of the images."""
    return {"im%d.png" % i: (folder / "images" / ("im%d.png" % i)).read_bytes() for i in range(12)}


def started(model, output, **more):
    """A worker whose parts go to a new folder."""
    output.mkdir(exist_ok=True)
    found = Worker(dict({"output": str(output), "run": "r", "names": PETA, "kind": "logits", "probabilities": False, "calls": 2,
                         "device_id": 0, "threads": 2, "readers": 2, "provider": CPU, "versions": versions(), "witnesses": [],
                         "damaged": "error", "duplicates": "error"}, **more))
    found.start(model.read_bytes())
    return found


@pytest.fixture
def worker(folder, tmp_path):
    """A worker with the output folder out. Tests change its job."""
    return started(folder / "m.onnx", tmp_path / "out")


def listed(folder, lines):
    """The shard of a list of images in folder/images."""
    text = "\n".join(lines).encode("utf-8")
    (folder / "list.txt").write_bytes(text)
    return {"list": str(folder / "list.txt"), "start": 0, "end": len(text), "root": str(folder / "images"),
            "images": len([line for line in lines if line.strip()])}


def tarred(path, *members, **options):
    """Writes a tar of members (name, bytes) and returns its shard. options: those of tarfile.open()."""
    with tarfile.open(str(path), options.pop("mode", "w"), **options) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return {"tar": str(path)}


def row_group(path, table, **options):
    """Writes a Parquet file of one row group and returns its shard."""
    parquet.write_table(table, str(path), **options)
    return {"parquet": str(path), "group": 0, "images": len(table), "path_column": "path", "bytes_column": "bytes"}


def rows(output, number=0):
    """[(path, error, values)] of a part."""
    found = []
    for row in parquet.read_table(str(output / ("part-%06d.parquet" % number))).to_pylist():
        path, error = row.pop("path"), row.pop("error")
        assert {value is None for value in row.values()} == {error is not None}
        found.append((path, error, np.array(list(row.values()), np.float32)))
    return found


def done(worker, shard, **options):
    """Computes a shard that must succeed. Returns (counts, {path: error} of its part)."""
    result = worker.work(0, shard, **options)
    assert result.kind == "done", result
    found = rows(pathlib.Path(worker.job["output"]))
    errors = {path: error for path, error, _ in found}
    assert len(errors) == len(found) == result.counts["images"]
    assert result.counts["errors"] == sum(error is not None for error in errors.values())
    return result.counts, errors


def check_failed(worker, kind, shard, *texts, **options):
    """Computes a shard that must fail in this way, without a part."""
    result = worker.work(0, shard, **options)
    assert result.kind == kind and "\n" not in result.text and not os.listdir(worker.job["output"]), result
    for text in texts:
        assert text in result.text, result


# --- what the logits are ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("batch_size, size, uint8", [(1, (224, 224), False), (8, (128, 64), False), (8, (224, 224), True)])
def test_logits_are_the_pipelines_to_the_bit(tmp_path, batch_size, size, uint8):
    names = write_images(tmp_path / "images", 19)
    model, options = write_model(tmp_path / "m.onnx", batch_size, size=size), []
    if uint8:
        process = script("tools/rehearse.py", "aipp", model, tmp_path / "aipp.onnx")
        assert process.returncode == 0, process.stderr
        model, options = tmp_path / "aipp.onnx", ["--uint8"]
    write_bins(tmp_path, names, *size, *options)
    result = run_stage_6(tmp_path, model, batch_size, 0, *size)
    assert started(model, tmp_path / "out").work(3, listed(tmp_path, names))[:2] == ("done", {"images": 19, "errors": 0, "turned": 0, "left_out": {}})
    found = rows(tmp_path / "out", 3)
    assert [name for name, _, _ in found] == names
    for name, error, values in found:
        assert error is None and values.tobytes() == (result / (name[:-4] + "_1.bin")).read_bytes()


def test_probabilities_and_models_that_end_in_a_sigmoid(folder, tmp_path, pictures):
    def values_of(model, **job):
        worker = started(model, tmp_path / "out", **job)
        done(worker, tarred(tmp_path / "x.tar", *pictures.items()))
        return np.array([values for _, _, values in rows(tmp_path / "out")])

    model, sigmoid = folder / "m.onnx", write_model(tmp_path / "s.onnx", 4, sigmoid=True)
    expected, logits = probabilities(values_of(model)), values_of(sigmoid, kind="probabilities")
    for values in (values_of(model, probabilities=True), values_of(sigmoid, kind="probabilities", probabilities=True), probabilities(logits)):
        assert np.allclose(values, expected, atol=1e-6)
    assert logits.min() < 0


def test_images_that_predict_turns_are_counted_and_not_turned(worker, folder, tmp_path, pictures):
    (tmp_path / "images").mkdir()
    for orientation in 0, 1, 3, 6:
        exif = Image.Exif()
        exif[274] = orientation
        Image.open(io.BytesIO(pictures["im0.png"])).save(str(tmp_path / "images" / ("%d.png" % orientation)), exif=exif)
    counts, _ = done(worker, listed(tmp_path, ["0.png", "1.png", "3.png", "6.png"]))
    assert counts["turned"] == 2
    assert len({values.tobytes() for _, _, values in rows(tmp_path / "out")}) == 1


def test_versions_must_be_the_same_on_all_machines(folder, tmp_path):
    with pytest.raises(ValueError, match="it has numpy .*, not 1.0"):
        started(folder / "m.onnx", tmp_path / "out", versions=dict(versions(), numpy="1.0"))
    with pytest.raises(ValueError, match="not a valid ONNX model|is not a DeepMAR model"):
        started(folder / "images" / "im0.png", tmp_path / "out")


# --- lists ------------------------------------------------------------------------------------------------------------------

def test_list_is_read_by_stage_4s_rules(worker, tmp_path, pictures):
    """A byte order mark, CRLF, blank lines, no last newline; a name in another Unicode form; names that leave the root."""
    root = tmp_path / "images"
    root.mkdir()
    for path in root / "a.png", root / "cafe\u0301.png", root / "c d.png", tmp_path / "secret.png":
        path.write_bytes(pictures["im0.png"])
    outside = ["../secret.png", str(tmp_path / "secret.png"), "a/../../secret.png"]
    shard = listed(tmp_path, [line + "\r" for line in ["\ufeffa.png", "", "  ", "caf\u00e9.png", " c d.png "] + outside])
    assert done(worker, shard)[1] == {"a.png": None, "caf\u00e9.png": None, "c d.png": None,
                                      **dict.fromkeys(outside, "not a file name inside the images' folder")}


def test_what_belongs_to_one_image_is_a_row(worker, tmp_path, pictures):
    root = tmp_path / "images"
    root.mkdir()
    (root / "a.png").write_bytes(pictures["im0.png"])
    (root / "cut.png").write_bytes(pictures["im0.png"][:-40])
    (root / "no.png").write_bytes(b"no picture")
    (root / "empty.png").write_bytes(b"")
    (root / "folder.png").mkdir()
    os.mkfifo(str(root / "fifo.png"))
    os.symlink("loop.png", str(root / "loop.png"))
    with open(str(root / "large.png"), "wb") as f:
        f.truncate(10 ** 12)
    worker.job["witnesses"] = [{"root": str(root), "name": "a.png"}, {"file": str(root / "a.png")}]
    long = "long" * 100 + ".png"
    names = ["a.png", "cut.png", "no.png", "empty.png", "folder.png", "fifo.png", "loop.png", "large.png", "missing.png", "a.png/b.png", long]
    counts, errors = done(worker, listed(tmp_path, names))
    assert counts == {"images": 11, "errors": 10, "turned": 0, "left_out": {}}
    assert "truncated" in errors.pop("cut.png")
    assert errors == {"a.png": None, "no.png": "cannot identify image file", "empty.png": "cannot identify image file",
                      "folder.png": "is a directory", "fifo.png": "not a regular file", "loop.png": "too many levels of symbolic links",
                      "large.png": "1000000000000 bytes or more are too many", "missing.png": "no such file",
                      "a.png/b.png": "not a directory", long: "file name too long"}


def test_missing_images_are_a_row_only_while_a_witness_can_be_read(worker, tmp_path, pictures, monkeypatch):
    """A folder that is not mounted, an image that comes back, a server that answers in another way, and 403 for one image or for all."""
    root = tmp_path / "images"
    root.mkdir()
    (root / "a.png").write_bytes(pictures["im0.png"])
    shard, witness = listed(tmp_path, ["a.png", "b.png"]), {"root": str(root), "name": "w.png"}
    worker.job["witnesses"] = [witness]
    check_failed(worker, "again", shard, "b.png: no such file, but %s/w.png cannot be read here: no such file" % root)
    assert worker.fit() == "%s/w.png cannot be read here: no such file" % root
    real, answers = module.open_at_once, {}

    def opened(path, flags):
        name = os.path.basename(path)
        number = answers.get(name, [0]).pop(0) if len(answers.get(name, [0])) > 1 else answers.get(name, [0])[0]
        if number:
            raise OSError(number, os.strerror(number), path)
        return real(path, flags)
    monkeypatch.setattr(module, "open_at_once", opened)
    for name in "w.png", "b.png":
        (root / name).write_bytes(pictures["im0.png"])
    assert worker.fit() is None
    for numbers in ([errno.EACCES, 0], [errno.ENOENT, errno.EACCES], [errno.EACCES, errno.EIO]):
        answers["b.png"] = numbers
        check_failed(worker, "again", shard, "b.png: ", ", and then ")
    answers.update({"b.png": [errno.EACCES], "w.png": [0, errno.EACCES]})
    check_failed(worker, "again", shard, "b.png: permission denied, but ")
    for number in errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EMFILE:
        answers["b.png"] = [number]
        check_failed(worker, "again", shard, os.strerror(number))
    answers.update({"b.png": [errno.EACCES], "w.png": [0]})
    assert done(worker, shard)[1] == {"a.png": None, "b.png": "permission denied"}


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EMFILE, "Too many open files"), OSError(errno.EIO, "Input/output error"),
                                   OSError("out of memory error when reading image file")])
def test_decoding_that_fails_for_this_machine_is_tried_again(worker, tmp_path, pictures, monkeypatch, error):
    def broken(*_, **__):
        raise error
    monkeypatch.setattr(module, "read_image", broken)
    check_failed(worker, "again", tarred(tmp_path / "x.tar", *pictures.items()), str(error))


def test_output_without_room_and_other_errors_of_writing(worker, tmp_path, pictures, monkeypatch):
    shard = tarred(tmp_path / "x.tar", *pictures.items())
    real = os.fsync
    for number, kind in ((errno.ENOSPC, "full"), (errno.EDQUOT, "full"), (errno.EROFS, "full"), (errno.EIO, "again")):
        def fsync(_, number=number):
            raise OSError(number, os.strerror(number))
        monkeypatch.setattr(os, "fsync", fsync)
        check_failed(worker, kind, shard, os.strerror(number))
    monkeypatch.setattr(os, "fsync", real)
    assert worker.count() == 0 and done(worker, shard)[0]["images"] == 12
    shutil.rmtree(worker.job["output"])
    assert worker.work(0, shard).kind == "again"


def test_list_that_is_shorter_than_at_the_start(worker, folder, tmp_path):
    shard = dict(listed(tmp_path, ["im0.png"]), root=str(folder / "images"), images=2)
    check_failed(worker, "again", shard, "list.txt: gives 1 images, not 2")
