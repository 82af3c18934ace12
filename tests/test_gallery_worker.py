"""lib/gallery/worker.py: the pipeline's logits, tars and row groups to their end, and whose fault an error is."""
import errno
import io
import multiprocessing
import os
import pathlib
import shutil
import subprocess
import tarfile

import fsspec
import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from helpers import run_stage_6, script, write_bins, write_images, write_model
from lib.gallery import storage
from lib.gallery import worker as module
from lib.gallery.archive import Tar
from lib.gallery.rows import read_rows
from lib.gallery.source import Damaged, Source
from lib.gallery.worker import Worker, versions
from lib.labels import PETA
from lib.providers import CPU
from lib.results import probabilities

checksums = pytest.mark.skipif(int(pyarrow.__version__.split(".")[0]) < 15, reason="this pyarrow knows no checksums of pages")


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
                         "twin": False, "device_id": 0, "threads": 2, "readers": 2, "provider": CPU, "versions": versions(),
                         "witnesses": [], "damaged": "error", "duplicates": "error"}, **more))
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
    results = run_stage_6(tmp_path, model, batch_size, 0, *size)
    result = started(model, tmp_path / "out").work(3, listed(tmp_path, names))
    assert result[:2] == ("done", {"images": 19, "errors": 0, "turned": 0, "left_out": {}})
    found = rows(tmp_path / "out", 3)
    assert [name for name, _, _ in found] == names
    for name, error, values in found:
        assert error is None and values.tobytes() == (results / (name[:-4] + "_1.bin")).read_bytes()


def test_probabilities_and_models_that_end_in_a_sigmoid(folder, tmp_path, pictures):
    def values_of(model, **job):
        worker = started(model, tmp_path / "out", **job)
        done(worker, tarred(tmp_path / "x.tar", *pictures.items()))
        return np.array([values for _, _, values in rows(tmp_path / "out")])

    model, sigmoid = folder / "m.onnx", write_model(tmp_path / "s.onnx", 4, sigmoid=True)
    expected, logits = probabilities(values_of(model)), values_of(sigmoid, kind="probabilities")
    for values in (values_of(model, probabilities=True), values_of(sigmoid, kind="probabilities", probabilities=True),
                   probabilities(logits)):
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
    with pytest.raises(ValueError, match="the model cannot be opened: ONNX Runtime .* cannot load it"):
        started(folder / "images" / "im0.png", tmp_path / "out")


def test_int8_twin_is_computed_without_fusion(folder, tmp_path):
    session = started(folder / "m.onnx", tmp_path / "out", twin=True).session
    assert session.get_session_options().get_session_config_entry("session.disable_quant_qdq") == "1"


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
    names = ["a.png", "cut.png", "no.png", "empty.png", "folder.png", "fifo.png", "loop.png", "large.png", "missing.png",
             "a.png/b.png", long]
    counts, errors = done(worker, listed(tmp_path, names))
    assert counts == {"images": 11, "errors": 10, "turned": 0, "left_out": {}}
    assert "truncated" in errors.pop("cut.png")
    assert errors == {"a.png": None, "no.png": "cannot identify image file", "empty.png": "cannot identify image file",
                      "folder.png": "is a directory", "fifo.png": "not a regular file",
                      "loop.png": "too many levels of symbolic links",
                      "large.png": "1000000000000 bytes or more are too many", "missing.png": "no such file",
                      "a.png/b.png": "not a directory", long: "file name too long"}


def test_missing_images_are_a_row_only_while_a_witness_can_be_read(worker, tmp_path, pictures, monkeypatch):
    """A folder that is not mounted, an image that comes back, one that fails in another way, and all or one that may not be read."""
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
        answers.update({"b.png": [number], "w.png": [0]})
        check_failed(worker, "again", shard, os.strerror(number))
    answers["b.png"] = [errno.EACCES]
    assert done(worker, shard)[1] == {"a.png": None, "b.png": "permission denied"}


@pytest.mark.parametrize("error", [
    MemoryError(), OSError(errno.EMFILE, "Too many open files"), OSError(errno.EIO, "Input/output error"),
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


# --- tars -------------------------------------------------------------------------------------------------------------------

def test_hostile_tars(worker, tmp_path, pictures):
    """Links, devices and names with .. read nothing outside the tar."""
    with tarfile.open(str(tmp_path / "x.tar"), "w") as tar:
        for name, kind, content in (
                ("a/1.png", tarfile.REGTYPE, pictures["im0.png"]), ("link.png", tarfile.SYMTYPE, b""),
                ("hard.png", tarfile.LNKTYPE, b""), ("fifo.png", tarfile.FIFOTYPE, b""),
                ("../../up.png", tarfile.REGTYPE, pictures["im1.png"]),
                ("folder.png", tarfile.DIRTYPE, b""), ("/abs\udcff.png", tarfile.REGTYPE, pictures["im2.png"])):
            member = tarfile.TarInfo(name)
            member.type, member.size, member.linkname = kind, len(content), "/etc/passwd"
            tar.addfile(member, io.BytesIO(content))
    link = "is a link or another special entry in the tar, not a file"
    assert done(worker, {"tar": str(tmp_path / "x.tar")})[1] == {"%s/%s" % (tmp_path / "x.tar", name): error for name, error in (
        ("a/1.png", None), ("link.png", link), ("hard.png", link), ("fifo.png", link), ("../../up.png", None),
        ("/abs\\udcff.png", None))}


@pytest.mark.parametrize("make", [
    "tar --format=gnu -cf X -C S .", "tar --format=oldgnu -S -cf X -C S .", "tar --format=posix -cf X -C S .",
    "tar --format=posix -S --sparse-version=0.0 -cf X -C S .", "tar --format=posix -S --sparse-version=1.0 -cf X -C S .",
    "tar -czf X -C S .", "tar -V im.png -cf X -C S .", "tar -b1 -cf X -C S .",
    "tar -cf X -C S ./a.png ./b.png; tar -rf X -C S ./long ./c.png",
    "tar -cf 1 -C S ./a.png ./b.png; tar -cf 2 -C S ./long ./c.png; cat 1 2 > X",
    "tar -czf 1 -C S ./a.png ./b.png; tar -czf 2 -C S ./long ./c.png; cat 1 2 > X",
    "tar -cf - -C S . | split -b 50000 --filter='gzip -c' > X"])
def test_every_kind_of_tar_is_read_to_its_end(tmp_path, make):
    """Sparse files, long names, joined tars and joined gzip files too."""
    source = tmp_path / "S"
    (source / "long").mkdir(parents=True)
    random = np.random.RandomState(0)
    names = ["a.png", "b.png", "c.png", "long/%s.png" % ("caf\u00e9" * 40)]
    for name in names:
        (source / name).write_bytes(random.bytes(4000))
    with open(str(source / "c.png"), "wb") as f:
        for place in range(30):
            f.seek(place * 100000)
            f.write(random.bytes(5000))
    subprocess.run(make, shell=True, check=True, cwd=str(tmp_path))
    with Source(str(tmp_path / "X")) as file:
        tar = Tar(file)
        found = {member.name[2:]: tar.content(member) for member in tar}
    assert found == {name: (source / name).read_bytes() for name in names}


def test_tars_of_python_in_all_formats(tmp_path, pictures):
    for kind in tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT:
        with Source(tarred(tmp_path / "x.tar", *pictures.items(), format=kind)["tar"]) as file:
            tar = Tar(file)
            assert {member.name: tar.content(member) for member in tar} == pictures


def cut(data, place):
    return data[:place]


def flip(data, place):
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1:]


@pytest.mark.parametrize("change, place, text", [
    (flip, 512 * 2, "byte 1024 has no tar header (bad checksum); the last good member is 0.png"),
    (flip, 0, "byte 0 has no tar header (bad checksum); no member is before it"),
    (cut, 0, "the file ends at byte 0 without an end-of-archive; no member is before it"),
    (cut, 700, "the file ends at byte 700, in the member 0.png; no member is before it"),
    (cut, 1024, "the file ends at byte 1024 without an end-of-archive; the last good member is 0.png"),
    (cut, 1100, "the file ends at byte 1100, in a header; the last good member is 0.png"),
    (cut, 4096, "the file ends at byte 4096 without an end-of-archive; the last good member is 3.png"),
    (lambda data, place: data[:place] + b"\0" * 512 + b"x" * 512, 4096, "byte 4608 has no tar header"),
    (lambda data, place: data[:place] + bytes(2 ** 20 + 512), 2048, "from byte 2048 on, it holds nothing but zeros"),
    (lambda data, place: b"no tar" * 1000, 0, "byte 0 has no tar header")])
def test_damaged_tar_gives_no_part_or_what_is_before_the_damage(worker, tmp_path, change, place, text):
    shard, path = tarred(tmp_path / "x.tar", *(("%d.png" % i, b"x" * 512) for i in range(4))), tmp_path / "x.tar"
    good = path.read_bytes()
    path.write_bytes(change(good, place))
    check_failed(worker, "damaged", shard, "%s: %s" % (path, text))
    worker.job["damaged"] = "keep"
    counts, errors = done(worker, shard)
    assert counts["images"] == min(place // 1024, 4) + 1 and list(errors)[-1] == str(path) and text in errors[str(path)]


def test_damaged_headers_that_tarfile_reads(tmp_path, pictures):
    """Pax records that do not add up, a negative size, a member of 10 GB that is cut off, the rest of another volume."""
    def check(text, data):
        (tmp_path / "x.tar").write_bytes(data)
        with pytest.raises(Damaged, match=text), Source(str(tmp_path / "x.tar")) as file:
            list(Tar(file))

    def header(**changes):
        member = tarfile.TarInfo("a.png")
        vars_of = {"size": 512, "type": tarfile.REGTYPE}
        vars_of.update(changes)
        for name, value in vars_of.items():
            setattr(member, name, value)
        return member.tobuf(tarfile.GNU_FORMAT)

    end = b"x" * 512 + b"\0" * 1024
    tarred(tmp_path / "p.tar", ("caf\u00e9" * 50 + ".png", b"x" * 512), format=tarfile.PAX_FORMAT)
    pax = (tmp_path / "p.tar").read_bytes()
    check("byte 0 has no tar header .damaged pax records", flip(pax, 512))
    check("byte 0 has no tar header .negative size", header(size=-512) + end)
    check("the file ends at byte 2048, in the member a.png", header(size=10 ** 10) + end)
    check("has the rest of a.png, which begins in another volume", header(type=b"M") + end)
    check("the header before byte 512 has 10000000000 bytes", header(size=10 ** 10, type=tarfile.GNUTYPE_LONGNAME) + end)


def test_damaged_gzip(worker, tmp_path, pictures):
    """It is found by its content, not by the name: cut at any byte, a wrong checksum, and what follows that is no gzip."""
    shard = tarred(tmp_path / "x.tar", *pictures.items(), mode="w:gz")
    path = pathlib.Path(shard["tar"])
    good = path.read_bytes()
    assert done(worker, shard)[0]["images"] == 12
    os.remove(worker.job["output"] + "/part-000000.parquet")
    for data in [good[:place] for place in (1, 5, len(good) // 2, len(good) - 9, len(good) - 1)] + [
            flip(good, len(good) - 6), good + b"x" * 20]:
        path.write_bytes(data)
        check_failed(worker, "damaged", shard, "gzip cannot unpack" if len(data) > 1 else "in a header")
    path.write_bytes(good + b"\0" * 100)
    assert done(worker, shard)[0]["images"] == 12


def test_storage_that_fails_in_the_middle_is_no_damage(worker, tmp_path, pictures, monkeypatch):
    """Neither in a plain or packed tar nor in Parquet, whatever gzip and pyarrow make of it; and a file that ends too early."""
    large = dict(pictures, **{"large.png": np.random.RandomState(0).bytes(3 * 10 ** 6)})
    shards = [tarred(tmp_path / "x.tar", *large.items()), tarred(tmp_path / "y.tar", *large.items(), mode="w:gz"), row_group(
        tmp_path / "x.parquet", pyarrow.table({"path": list(large), "bytes": list(large.values())}))]
    worker.job["damaged"], read = "keep", storage.Reached.readinto
    for first, last, answer in ((2 ** 20, 3 * 10 ** 6, OSError(errno.EIO, "Input/output error")),
                                (2 ** 20, 3 * 10 ** 6, PermissionError(errno.EACCES, "Forbidden")),
                                (0, 10 ** 9, OSError(errno.ESTALE, "Stale file handle")), (2 ** 20, 3 * 10 ** 6, 0)):
        def broken(file, buffer, answer=answer, first=first, last=last):
            if file.tell() not in range(first, last):
                return read(file, buffer)
            if answer:
                raise answer
            return 0
        monkeypatch.setattr(storage.Reached, "readinto", broken)
        for shard in shards:
            check_failed(worker, "again", shard, answer.strerror if answer else ": ends at byte ")


def test_members_that_are_no_images_are_counted(worker, tmp_path, pictures):
    shard = tarred(tmp_path / "x.tar", *((name, pictures["im0.png"]) for name in (
        "a.png", "a.json", "b.HEIC", "b.json", "noending", "d.jpe", "._a.png", "folder.png/c.img")))
    assert done(worker, shard)[0] == {"images": 1, "errors": 0, "turned": 0, "left_out": {
        ".json": 2, ".heic": 1, "": 1, ".jpe": 1, "hidden": 1, ".img": 1}}
    os.remove(worker.job["output"] + "/part-000000.parquet")
    endings = ["heic", "heic", "img"] + ["%d" % i for i in range(90)]
    shard = tarred(tmp_path / "y.tar", *(("%d.%s" % (i, ending), b"") for i, ending in enumerate(endings)))
    check_failed(worker, "damaged", shard, "y.tar: holds no image (.bmp .gif ",
                 "but 62 files of other names, 2 files that end in .heic, 1 files that end in .img")
    worker.job["damaged"] = "keep"
    assert list(done(worker, shard)[1]) == [str(tmp_path / "y.tar")]
    worker.job["damaged"] = "error"
    assert done(worker, tarred(tmp_path / "empty.tar"))[0]["images"] == 0 and rows(tmp_path / "out") == []


def test_member_that_is_there_twice(worker, tmp_path, pictures):
    shard = tarred(tmp_path / "x.tar", *((name, pictures["im0.png"]) for name in ("a.png", "b.png", "./a.png", "c.png", "b.png")))
    for worker.job["damaged"] in "error", "keep":
        check_failed(worker, "damaged", shard, "2 members have the name of an earlier one: a.png, b.png; --duplicates keep gives")
    worker.job["duplicates"] = "keep"
    assert worker.work(0, shard).counts["images"] == len(rows(tmp_path / "out")) == 5


# --- Parquet ----------------------------------------------------------------------------------------------------------------

def test_image_bombs_and_other_cells(worker, tmp_path, pictures):
    bomb = io.BytesIO()
    Image.new("1", (10000, 10000)).save(bomb, "PNG")
    good, path = pictures["im0.png"], str(tmp_path / "x.parquet")
    shard = row_group(path, pyarrow.table({"name": ["bomb", "none", None, b"gbk\xff", "good"], "image": [
        {"bytes": data} for data in (bomb.getvalue(), None, good, good, good)]}, schema=pyarrow.schema({
            "name": pyarrow.binary(), "image": pyarrow.struct({"bytes": pyarrow.binary()})})))
    errors = done(worker, dict(shard, path_column="name", bytes_column="image.bytes"))[1]
    assert "10000 x 10000 pixels are too many" in errors.pop("bomb")
    assert errors == {"none": "no bytes", path + " row group 0 row 2": None, "gbk\\udcff": None, "good": None}


def test_value_is_never_a_path(worker, folder, tmp_path):
    """A column of text, of numbers or of lists gives errors, even if a text is the path of an image."""
    for values, kind in (([str(folder / "images" / "im0.png")], "str"), ([1], "int"), ([[b"x"]], "list")):
        shard = row_group(tmp_path / "x.parquet", pyarrow.table({"path": ["a"], "bytes": values}))
        assert done(worker, shard)[1] == {"a": "a value of type %s, not bytes" % kind}


@checksums
@pytest.mark.parametrize("options", [
    {"compression": "none"}, {"compression": "snappy", "data_page_version": "2.0"}, {"compression": "zstd"},
    {"compression": "gzip", "use_dictionary": False, "write_page_index": True}])
@pytest.mark.parametrize("column", ["bytes", "image.bytes"])
def test_damaged_page_costs_its_own_rows(tmp_path, options, column):
    """With checksums, no wrong byte is taken for right, wherever it is. No row is lost or gets the path of another."""
    random = np.random.RandomState(0)
    contents, names, path = [random.bytes(3000) for _ in range(200)], ["%d.png" % i for i in range(200)], tmp_path / "x.parquet"
    values = contents if column == "bytes" else [{"bytes": content} for content in contents]
    shard = row_group(path, pyarrow.table({"path": names, column.partition(".")[0]: values}), write_page_checksum=True,
                      write_batch_size=8, write_statistics=False, data_page_size=40000, dictionary_pagesize_limit=100000, **options)
    good, chunk = path.read_bytes(), parquet.read_metadata(str(path)).row_group(0).column(1)
    end = (chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size
    for place in random.randint(chunk.data_page_offset + 100, end, 4):
        path.write_bytes(flip(good, place))
        with Source(str(path)) as file:
            found = list(read_rows(file, 0, 200, ["path", column]))
        wrong = [i for i, (_, content) in enumerate(found) if isinstance(content, Exception)]
        assert 8 <= len(wrong) < 100 and wrong == list(range(wrong[0], wrong[-1] + 1))
        assert [row for i, row in enumerate(found) if i not in wrong] == [
            row for i, row in enumerate(zip(names, contents)) if i not in wrong] and len(found) == 200
    assert shard["images"] == 200


@checksums
def test_damaged_page_gives_a_row_for_each_image(worker, tmp_path, pictures):
    """Of the bytes, and of the paths."""
    names = ["%d.png" % i for i in range(60)]
    contents = [pictures["im%d.png" % (i % 12)] for i in range(60)]
    shard = row_group(tmp_path / "x.parquet", pyarrow.table({"path": names, "bytes": contents}), compression="none",
                      use_dictionary=False, write_page_checksum=True, write_batch_size=10, data_page_size=1)
    good, metadata = (tmp_path / "x.parquet").read_bytes(), parquet.read_metadata(str(tmp_path / "x.parquet")).row_group(0)
    (tmp_path / "x.parquet").write_bytes(flip(good, good.index(pictures["im5.png"], metadata.column(1).data_page_offset) + 9))
    counts, errors = done(worker, shard)
    assert (counts["images"], counts["errors"]) == (60, 10) and list(errors) == names
    assert "a page of the column bytes is damaged: " in errors["3.png"] and "CRC" in errors["3.png"] and errors["10.png"] is None
    (tmp_path / "x.parquet").write_bytes(flip(good, good.index(b"15.png")))
    counts, errors = done(worker, shard)
    assert counts["errors"] == 10 and list(errors) == [
        name if i // 10 != 1 else "%s row group 0 row %d" % (tmp_path / "x.parquet", i) for i, name in enumerate(names)]


@checksums
def test_row_group_whose_rows_cannot_be_counted(worker, tmp_path, pictures):
    """The number of rows in a page's header is wrong, the footer is damaged, or the file was replaced."""
    shard = row_group(tmp_path / "x.parquet", pyarrow.table({"path": list(pictures), "bytes": list(pictures.values())}),
                      compression="none", use_dictionary=False)
    good = (tmp_path / "x.parquet").read_bytes()
    place = parquet.read_metadata(str(tmp_path / "x.parquet")).row_group(0).column(0).data_page_offset
    number = good.index(bytes([0x15, 2 * 12]), place) + 1  # field 1 of the struct, an integer: 12
    worker.job["damaged"] = "keep"
    for data, text in ((good[:number] + bytes([2 * 9]) + good[number + 1:], "column path has 9 rows in row group 0, not 12"),
                       (good[:number] + bytes([2 * 15]) + good[number + 1:], "column path in row group 0 have 15 rows, not 12"),
                       (good[:-9] + b"xxxxx" + good[-4:], "x.parquet: ")):
        (tmp_path / "x.parquet").write_bytes(data)
        check_failed(worker, "damaged", shard, text)
    (tmp_path / "x.parquet").write_bytes(good)
    check_failed(worker, "damaged", dict(shard, images=13), "its row group 0 has 12 rows, not 13 as at the start of the run")


# --- an image that kills its process ----------------------------------------------------------------------------------------

def test_image_that_kills_the_process_that_decodes_it(worker, tmp_path, pictures, monkeypatch):
    """In a real process of its own, twice. The others are computed as ever, and no process is left."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nfrom PIL import Image\n"
        "def kill(start):\n    if start.startswith(b'KILL'):\n        open(%r, 'a').write('x')\n        os.kill(os.getpid(), 9)\n"
        "Image.register_open('KILL', None, kill)\n" % str(tmp_path / "killed"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    shard = tarred(tmp_path / "x.tar", *(list(pictures.items())[:3] + [("kill.png", b"KILL" * 10)] + list(pictures.items())[3:6]))
    done(worker, shard)
    before = rows(tmp_path / "out")
    counts, errors = done(worker, shard, careful=True)
    assert errors.pop(str(tmp_path / "x.tar/kill.png")) == "kills the process that decodes it" and set(errors.values()) == {None}
    assert [row[2].tobytes() for row in rows(tmp_path / "out")] == [row[2].tobytes() for row in before]
    assert (tmp_path / "killed").read_text() == "xx" and not multiprocessing.active_children()


def test_process_for_decoding_that_cannot_start_is_no_images_fault(worker, tmp_path, pictures, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("import os\nos._exit(1)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    shard = tarred(tmp_path / "x.tar", *pictures.items())
    check_failed(worker, "again", shard, "a process for decoding cannot be started", careful=True)


# --- elsewhere --------------------------------------------------------------------------------------------------------------

class Refused(Exception):
    """Like botocore's ClientError."""

    def __init__(self, status):
        super().__init__("refused with %d" % status)
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}}


def test_remote_images_and_whose_fault_an_answer_is(worker, tmp_path, pictures, monkeypatch):
    """404 and 403 for one image; 403 for all; 503 and what is no OSError; names that fsspec would take apart; an empty file."""
    fs, answers = fsspec.filesystem("memory"), {"locked.png": 403}
    names = ["a.png", "simplecache::b.png", "c d?.png", "locked.png", "missing.png", "empty.png"]
    for name in names[:4]:
        fs.pipe_file("/crops/%s" % name, pictures["im0.png"])
    fs.pipe_file("/crops/empty.png", b"")
    real = type(fs)._open

    def opened(fs, path, *arguments, **options):
        if path.rpartition("/")[2] in answers:
            raise Refused(answers[path.rpartition("/")[2]])
        return real(fs, path, *arguments, **options)
    monkeypatch.setattr(type(fs), "_open", opened)
    shard = dict(listed(tmp_path, names), root="memory://crops")
    worker.job["witnesses"] = [{"root": "memory://crops", "name": "a.png"}]
    assert worker.fit() is None
    assert done(worker, shard)[1] == {"a.png": None, "simplecache::b.png": None, "c d?.png": None,
                                      "locked.png": "permission denied", "missing.png": "no such file",
                                      "empty.png": "cannot identify image file"}
    os.remove(worker.job["output"] + "/part-000000.parquet")
    for status, text in ((403, ".png: permission denied, but memory://crops/a.png cannot be read here: permission denied"),
                         (503, "memory://crops/a.png: refused with 503")):
        answers["a.png"] = status
        check_failed(worker, "again", shard, text)


def test_s3_gives_what_the_disk_gives_and_its_faults_are_no_images_fault(worker, tmp_path, pictures, s3):
    """A refusal in the middle of a tar or a row group; one object with 403; all with 403."""
    fs, large = fsspec.filesystem("s3"), dict(pictures, **{"large.png": np.random.RandomState(0).bytes(6 * 10 ** 6)})
    fs.mkdir("crops")
    shards = [tarred(tmp_path / "x.tar", *large.items()), row_group(
        tmp_path / "x.parquet", pyarrow.table({"path": list(large), "bytes": list(large.values())}))]
    for name in "x.tar", "x.parquet":
        fs.put(str(tmp_path / name), "crops/" + name)
    for shard, key in zip(shards, ("tar", "parquet")):
        remote = dict(shard, **{key: "s3://crops/x." + key})
        done(worker, shard)
        expected = rows(tmp_path / "out")
        done(worker, remote)
        assert [row[2].tobytes() for row in rows(tmp_path / "out")] == [row[2].tobytes() for row in expected]
        os.remove(worker.job["output"] + "/part-000000.parquet")
        before = len(s3.requests)
        s3.fault = lambda request: 403 if request.startswith("GET") and len(s3.requests) > before + 2 else None
        check_failed(worker, "again", remote, "s3://crops/x.%s: " % key)
        s3.fault = lambda request: None
    for name in pictures:
        fs.pipe_file("crops/images/" + name, pictures[name])
    worker.job["witnesses"] = [{"root": "s3://crops/images", "name": "im0.png"}]
    shard = dict(listed(tmp_path, list(pictures)), root="s3://crops/images")
    s3.fault = lambda request: 403 if "im3.png" in request else None
    assert done(worker, shard)[1] == dict(dict.fromkeys(pictures), **{"im3.png": "permission denied"})
    os.remove(worker.job["output"] + "/part-000000.parquet")
    s3.fault = lambda request: 403
    check_failed(worker, "again", shard, "permission denied, but s3://crops/images/im0.png cannot be read here: permission denied")
