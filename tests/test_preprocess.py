"""Stage 4: bins equal the guide's arithmetic to the bit. An error names the bad list or images, and nothing is written."""
import io
import os
import pathlib
import signal
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from helpers import ROOT, check_error, contents, guide, script, started, write_images
from lib.images import ORIENTATION, SIZE, preprocess, turned
from lib.names import read_list

NAME = "preprocess_deepmar_pytorch.py"


@pytest.fixture
def images(tmp_path):
    """A folder of images of several kinds, and their list."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    random = np.random.RandomState(0)
    for i in range(40):
        pixels = random.randint(0, 256, (random.randint(1, 200), random.randint(1, 90), 3), np.uint8)
        Image.fromarray(pixels).save(str(folder / ("%05d.png" % i)))
    picture = Image.fromarray(pixels)
    for name, mode in (("photo.jpg", "RGB"), ("grey.png", "L"), ("cmyk.jpg", "CMYK"), ("sub/alpha.png", "RGBA"),
                       ("<img src=x onerror=alert(1)>.png", "RGB")):
        picture.convert(mode).save(str(folder / name))
    picture.convert("P").save(str(folder / "palette.png"), transparency=3)
    Image.new("RGB", (1, 1), (255, 0, 9)).save(str(folder / "one.x1.png"))
    names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*.*"))]
    (tmp_path / "image.txt").write_text("\n".join(names))
    return tmp_path


def test_every_value_of_every_channel_is_normalised_as_in_the_guide(tmp_path):
    ramp = np.arange(SIZE * SIZE).reshape(SIZE, SIZE) % 256
    pixels = np.stack([ramp, ramp[::-1], 255 - ramp], axis=2).astype(np.uint8)  # it has the network's size, so it is not resized
    Image.fromarray(pixels).save(str(tmp_path / "ramp.png"))
    assert all(len(np.unique(pixels[:, :, channel])) == 256 for channel in range(3))
    result, expected = preprocess(str(tmp_path / "ramp.png")), guide(str(tmp_path / "ramp.png"))
    assert result.dtype == expected.dtype == np.float32 and np.array_equal(result, expected)


def test_bins_equal_the_guides_to_the_bit(images):
    process = script(NAME, "images", "input_bin", "image.txt", cwd=images)
    assert process.returncode == 0 and process.stderr == "", process.stderr
    names = read_list(str(images / "image.txt"))
    assert len(os.listdir(str(images / "input_bin"))) == len(names) == 47
    for name in names:
        data = (images / "input_bin" / (os.path.basename(name).split(".")[0] + ".bin")).read_bytes()
        assert len(data) == 602112 and data == guide(images / "images" / name).astype("<f4").tobytes(), name


def test_bins_of_another_size_equal_the_guides(images):
    process = script(NAME, "images", "input_bin", "image.txt", "--size", "256", "128", cwd=images)
    assert process.returncode == 0 and "47 bins of float32 [3,256,128]" in process.stdout, process.stderr
    for name in ("00001.png", "photo.jpg"):
        assert (images / "input_bin" / (name[:-3] + "bin")).read_bytes() == guide(images / "images" / name, 128, 256).tobytes()


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("orientation, expected", [(None, False), (1, False), (6, True), (8, True), (0, False), (9, False)])
def test_turned_images_are_recognised(kind, orientation, expected):
    exif = Image.Exif()
    if orientation is not None:
        exif[ORIENTATION] = orientation
    file = io.BytesIO()
    Image.new("RGB", (8, 4)).save(file, kind, exif=exif)
    with Image.open(file) as image:
        image.load()
        assert turned(image) is expected


def test_the_exif_orientation_is_ignored_and_counted(images):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    with Image.open(str(images / "images" / "photo.jpg")) as photo:
        photo.save(str(images / "images" / "lying.jpg"), exif=exif.tobytes())
        photo.save(str(images / "images" / "damaged.jpg"), exif=b"Exif\0\0" + bytes(range(255, 0, -1)))
    (images / "image.txt").write_text("lying.jpg\n00001.png\ndamaged.jpg\n")
    process = script(NAME, "images", "input_bin", "image.txt", cwd=images)
    assert process.returncode == 0 and process.stderr == "", process.stderr
    assert "note: 1 of 3 images have an EXIF orientation" in process.stdout
    for name in ("lying.jpg", "damaged.jpg"):
        assert (images / "input_bin" / (name[:-3] + "bin")).read_bytes() == guide(images / "images" / name).tobytes()


def test_arguments_are_given_in_order_or_by_name_and_not_mixed(images):
    named = ["--size", "9", "9", "--file_path=images", "--bin_path=a", "--image_info=image.txt"]
    assert script(NAME, *named, cwd=images).returncode == 0
    assert len(os.listdir(str(images / "a"))) == 47
    for wrong in (["images", "b", "image.txt", "--size", "0", "9"], ["images", "b", "image.txt", "--size", "9"], [], ["images", "b"],
                  ["images", "b", "image.txt", "x"], ["images", "b", "--image_info=image.txt"], ["--file_path=images", "--bin_path=b"]):
        check_error(script(NAME, *wrong, cwd=images), code=2)
    assert not (images / "b").exists()


def test_a_second_run_leaves_nothing_stale(images):
    """Its list has a byte order mark, CRLF, blank lines and no last newline."""
    assert script(NAME, "images", "input_bin", "image.txt", cwd=images).returncode == 0
    (images / "few.txt").write_bytes(b"\xef\xbb\xbf00003.png\r\n\r\n  \nsub/alpha.png  ")
    (images / "input_bin.partial").mkdir()
    (images / "input_bin.partial" / "junk.bin").write_text("left by a run that was killed")
    assert script(NAME, "images", "input_bin", "few.txt", cwd=images).returncode == 0
    assert sorted(os.listdir(str(images / "input_bin"))) == ["00003.bin", "alpha.bin"]
    assert sorted(os.listdir(str(images))) == ["few.txt", "image.txt", "images", "input_bin"]


@pytest.mark.parametrize("content, text", [
    (b"\n \r\n", "names no image"), (b"a.png\na/../../x.png", "line 2"), (b"/etc/passwd", "line 1"), (b"a\0b.png", "is not text (byte 1)"),
    (b"\xff\xfe", "UTF-8"), (b".png", "line 1"), (b"a.png\nb.png\na.jpg", "lines 1 and 3"), (b"x/a.png\ny/a.png", "lines 1 and 2"),
    (b"a\x1b[2Jb.png", "is not a file name"), ("a\x9bb.png".encode(), "is not a file name"), (b"x" * 5000, "is not a file name")])
def test_bad_lists_are_refused_in_a_short_printable_line(tmp_path, content, text):
    (tmp_path / "bad.txt").write_bytes(content)
    process = script(NAME, ".", "input_bin", "bad.txt", cwd=tmp_path)
    check_error(process, "bad.txt", text)
    assert process.stderr.rstrip("\n").isprintable() and len(process.stderr) < 3000 and not (tmp_path / "input_bin").exists()


def test_missing_images_are_counted_and_a_thousand_named(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "000001.png").write_bytes(b"")
    (tmp_path / "image.txt").write_text("".join("%06d.png\n" % i for i in range(100000)))
    process = script(NAME, "images", "input_bin", "image.txt", cwd=tmp_path)
    check_error(process, "99999 of the 100000 images", "000000.png, 000002.png", "001000.png, ...")
    check_error(script(NAME, "nowhere", "input_bin", "image.txt", cwd=tmp_path), "nowhere")
    check_error(script(NAME, "images", "input_bin", "nowhere.txt", cwd=tmp_path), "nowhere.txt")
    assert not list(tmp_path.glob("input_bin*"))


def test_bad_images_are_named_and_the_earlier_bins_stay(images):
    folder = images / "images"
    assert script(NAME, "images", "input_bin", "image.txt", cwd=images).returncode == 0
    before = contents(images / "input_bin")
    (folder / "cut.png").write_bytes((folder / "00001.png").read_bytes()[:-100])
    (folder / "text.png").write_text("<html>")
    (folder / "empty.png").write_bytes(b"")
    (folder / "folder.png").mkdir()
    os.mkfifo(str(folder / "fifo.png"))
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(str(folder / "deep.png"))
    Image.new("1", (30000, 30000)).save(str(folder / "bomb.png"))
    bad = ["cut.png", "text.png", "empty.png", "folder.png", "fifo.png", "deep.png", "bomb.png"]
    (images / "bad.txt").write_text("\n".join(["00001.png", "00002.png"] + bad))
    process = script(NAME, "images", "input_bin", "bad.txt", cwd=images)
    check_error(process, "7 of 9", "other 2", *bad)
    assert contents(images / "input_bin") == before and not (images / "input_bin.partial").exists()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) & 0xffffffff)


def test_images_of_rare_kinds_are_read_as_the_guide_reads_them(tmp_path):
    frames = [Image.new("RGB", (40, 80), colour) for colour in ("red", "blue", "green")]
    frames[0].save(str(tmp_path / "animated.gif"), save_all=True, append_images=frames[1:])
    # 16 bits a channel in colour, which Pillow reads as 8, as it should: the high byte of each
    pixels = np.random.RandomState(0).randint(0, 65536, (9, 5, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 5, 9, 16, 2, 0, 0, 0))
                                        + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    for name in ("animated.gif", "deep.png"):
        assert np.array_equal(preprocess(str(tmp_path / name)), guide(tmp_path / name))
    assert np.array_equal(np.asarray(Image.open(str(tmp_path / "deep.png")))[0, 0], pixels[0, 0] >> 8)


def test_hostile_images_are_named_and_the_others_counted(tmp_path, monkeypatch):
    write_images(tmp_path / "images", 3)
    good = (tmp_path / "images" / "im0.png").read_bytes()
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(10 ** 8)))  # 100 kB that become 100 MB
    (tmp_path / "images" / "text.png").write_bytes(good[:33] + text + good[33:])
    # Pillow lets Ghostscript run an EPS file; this one stands for it.
    (tmp_path / "images" / "eps.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text("#!/bin/sh\ntouch '%s'\n" % (tmp_path / "canary"))
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", "%s:%s" % (tmp_path / "bin", os.environ["PATH"]))
    (tmp_path / "image.txt").write_text("im0.png\ntext.png\nim1.png\neps.png\nim2.png\n")
    check_error(script(NAME, "images", "input_bin", "image.txt", cwd=tmp_path), "2 of 5 images", "the other 3 are fine",
                "eps.png: PostScript is a program", "text.png: ")
    assert not (tmp_path / "canary").exists() and not (tmp_path / "input_bin").exists()
    with pytest.raises(Exception):  # noqa: B017 - whatever Pillow raises
        guide(tmp_path / "images" / "eps.png")
    assert (tmp_path / "canary").exists(), "the test is none: Pillow did not run it"


def test_a_folder_with_other_files_is_not_replaced(images):
    (images / "full").mkdir()
    (images / "full" / "thesis.doc").write_text("mine")
    check_error(script(NAME, "images", "full", "image.txt", cwd=images), "thesis.doc", "only .bin files")
    assert (images / "full" / "thesis.doc").read_text() == "mine"


def test_a_killed_worker_is_an_error_and_keeps_the_earlier_bins(images):
    """The kernel kills one if the memory is exhausted."""
    (images / "input_bin").mkdir()
    (images / "input_bin" / "earlier.bin").write_bytes(b"earlier")
    for i in range(2000):
        os.link(str(images / "images" / "00001.png"), str(images / "images" / ("n%d.png" % i)))
    (images / "long.txt").write_text("".join("n%d.png\n" % i for i in range(2000)))
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, NAME), "images", "input_bin", "long.txt"],
                               cwd=str(images), stderr=subprocess.PIPE, universal_newlines=True)
    while not list(images.glob("input_bin.partial/*")):
        assert process.poll() is None
    workers = pathlib.Path("/proc/{0}/task/{0}/children".format(process.pid)).read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    process.stdout, process.stderr = process.communicate(timeout=30)
    check_error(process, "a worker process was killed; was the memory exhausted?")
    assert contents(images / "input_bin") == {"earlier.bin": b"earlier"} and not (images / "input_bin.partial").exists()
    assert not any(os.path.exists("/proc/" + worker) for worker in workers)


def test_it_imports_only_numpy_and_pillow(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name in ("torch", "onnx", "onnxruntime", "tqdm", "scipy"):
        (tmp_path / (name + ".py")).write_text("raise ImportError('imported %s')" % name)
    Image.new("RGB", (5, 9)).save(str(tmp_path / "a.png"))
    (tmp_path / "image.txt").write_text("a.png")
    process = started(NAME, ".", "out", "image.txt", cwd=tmp_path)
    assert process.returncode == 0 and process.stderr == "", process.stderr
    assert os.listdir(str(tmp_path / "out")) == ["a.bin"]
