"""Files made to break something, where the stages' own tests have none: one line that names the file, nothing else."""
import json
import os
import stat
import struct
import time
import zlib

import numpy as np
import onnx
import pytest
from PIL import Image

from helpers import check_error, guide, script, write_images, write_model
from lib.images import preprocess
from lib.names import read_list

STAGE_4, STAGE_7, STAND_IN = "preprocess_deepmar_pytorch.py", "postprocess_deepmar_pytorch.py", "tools/benchmark.py"


def short(process):
    """Its error can be read on a screen."""
    assert len(process.stderr) < 3000, len(process.stderr)


# --- lists of images -------------------------------------------------------------------------------------------------

def test_a_long_list_takes_linear_time(tmp_path):
    seconds = []
    for count in (30000, 300000):
        path = tmp_path / ("%d.txt" % count)
        path.write_text("".join("%07d.png\n" % i for i in range(count)))
        began = time.process_time()
        assert len(read_list(str(path))) == count
        seconds.append(time.process_time() - began)
    assert seconds[1] < 25 * seconds[0], seconds


def test_100000_missing_images_are_counted_and_a_thousand_named(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "image.txt").write_text("".join("%06d.png\n" % i for i in range(100000)))
    process = script(STAGE_4, "images", "input_bin", "image.txt", cwd=tmp_path)
    check_error(process, "100000 of the 100000 images", "000000.png, 000001.png", "000999.png, ...")
    assert not (tmp_path / "input_bin").exists()


@pytest.mark.parametrize("name", ["a\x1b[2Jb.png", "a\x7f.png", "a\x9bb.png", "x" * 5000, '{"a": ' + "[0, 1], " * 9999])
def test_names_that_would_break_a_message(tmp_path, name):
    (tmp_path / "image.txt").write_text("good.png\n%s\n" % name, encoding="utf-8")
    process = script(STAGE_4, ".", "input_bin", "image.txt", cwd=tmp_path)
    check_error(process, "image.txt: line 2: ", "is not a file name")
    assert process.stderr.rstrip("\n").isprintable()
    short(process)


# --- images ----------------------------------------------------------------------------------------------------------

def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) & 0xffffffff)


def test_images_of_rare_kinds_are_read_as_the_guide_reads_them(tmp_path):
    frames = [Image.new("RGB", (40, 80), colour) for colour in ("red", "blue", "green")]
    frames[0].save(str(tmp_path / "animated.gif"), save_all=True, append_images=frames[1:])
    # 16 bits a channel in colour, which Pillow reads as 8, as it should: the high byte of each
    pixels = np.random.RandomState(0).randint(0, 65536, (9, 5, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 5, 9, 16, 2, 0, 0, 0))
    (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows))
                                        + chunk(b"IEND", b""))
    for name in ("animated.gif", "deep.png"):
        assert np.array_equal(preprocess(str(tmp_path / name)), guide(tmp_path / name))
    assert np.array_equal(np.asarray(Image.open(str(tmp_path / "deep.png")))[0, 0], pixels[0, 0] >> 8)


def test_hostile_images_are_named_and_the_others_counted(tmp_path, monkeypatch):
    write_images(tmp_path / "images", 3)
    good = (tmp_path / "images" / "im0.png").read_bytes()
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(10 ** 8)))  # 100 kB that become 100 MB
    (tmp_path / "images" / "text.png").write_bytes(good[:33] + text + good[33:])
    # Pillow lets Ghostscript run an EPS file; this one stands for it.
    (tmp_path / "images" / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
                                                  b"showpage\n%%EOF\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text("#!/bin/sh\ntouch '%s'\n" % (tmp_path / "canary"))
    os.chmod(str(tmp_path / "bin" / "gs"), stat.S_IRWXU)
    monkeypatch.setenv("PATH", "%s:%s" % (tmp_path / "bin", os.environ["PATH"]))
    (tmp_path / "image.txt").write_text("im0.png\ntext.png\nim1.png\neps.png\nim2.png\n")
    check_error(script(STAGE_4, "images", "input_bin", "image.txt", cwd=tmp_path), "2 of 5 images", "the other 3 are fine",
                "eps.png: PostScript is a program", "text.png: ")
    assert not (tmp_path / "canary").exists() and not (tmp_path / "input_bin").exists()
    with pytest.raises(Exception):  # noqa: B017 - whatever Pillow raises
        guide(tmp_path / "images" / "eps.png")
    assert (tmp_path / "canary").exists(), "the test is none: Pillow did not run it"


# --- bins, info, models ----------------------------------------------------------------------------------------------

def test_names_of_bins_that_are_not_utf8(tmp_path):
    os.mkdir(str(tmp_path / "input_bin"))
    with open(os.fsencode(str(tmp_path)) + b"/input_bin/\xff.bin", "wb") as f:
        f.truncate(602112)
    check_error(script("get_info.py", "input_bin", "deepmar.info", 224, 224, cwd=tmp_path), "udcff.bin: ",
                "its name is not UTF-8")
    assert os.listdir(str(tmp_path)) == ["input_bin"]


@pytest.mark.parametrize("line", [b"0 \xff.bin 224 224", b"0 a\0.bin 224 224", b"9" * 5000 + b" a.bin 224 224",
                                  b"0 a.bin 224 " + b"9" * 5000, b"0 " + b"a" * 5000 + b".bin 224 224", b"\0" * 10000])
def test_hostile_info(tmp_path, line):
    write_model(tmp_path / "m.onnx")
    (tmp_path / "deepmar.info").write_bytes(line)
    process = script(STAND_IN, "-batch_size=1", "-om_path=m.onnx", "-input_text_path=deepmar.info", cwd=tmp_path)
    check_error(process, "deepmar.info: ")
    assert len(process.stderr) < 6000 and not (tmp_path / "result" / "dumpOutput_device0").exists()


def test_a_model_that_would_read_another_file(tmp_path):
    model = onnx.load(str(write_model(tmp_path / "m.onnx")))
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="/etc/passwd")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "deepmar.info").write_text("0 ./a.bin 224 224\n")
    for arguments in (["-round=1"], ["-input_text_path=deepmar.info"]):
        check_error(script(STAND_IN, "-batch_size=1", "-om_path=m.onnx", *arguments, cwd=tmp_path),
                    "m.onnx: keeps its weights in")
    check_error(script("tools/predict.py", __file__, "--onnx=m.onnx", cwd=tmp_path), "m.onnx: keeps its weights in")
    assert sorted(os.listdir(str(tmp_path))) == ["deepmar.info", "m.onnx"]


# --- results that are not those of the list --------------------------------------------------------------------------

@pytest.fixture
def scored(tmp_path):
    (tmp_path / "result").mkdir()
    for i in range(8):
        (tmp_path / "result" / ("%d_1.bin" % i)).write_bytes(np.full(2, 2, "<f4").tobytes())
    (tmp_path / "label.json").write_text(json.dumps({"%d.png" % i: [0, 1] for i in range(20)}))
    return tmp_path


@pytest.mark.parametrize("content", ["\n".join("%d.png" % i for i in range(8)),
                                     "\ufeff" + "".join("sub/%d.png\r\n\r\n" % i for i in range(8))])
def test_the_lists_results_are_scored(scored, content):
    (scored / "image.txt").write_bytes(content.encode("utf-8"))
    process = script(STAGE_7, "result", "label.json", "--image_list=image.txt", cwd=scored)
    assert process.returncode == 0 and "scored 8 images" in process.stdout, process.stderr


@pytest.mark.parametrize("images, said", [
    (range(7), ["image.txt: 1 of 8 results are of other images (7); run stages 4 to 6 again"]),
    (range(20), ["image.txt: 12 of its 20 images have no result (10, 11, 12, 13, 14 and 7 more); run"]),
    (range(3, 9), ["1 of its 6 images have no result (8), and 3 of 8 results are of other images (0, 1, 2); run"]),
    ([], ["8 of 8"])])
def test_results_of_other_images_are_not(scored, images, said):
    (scored / "image.txt").write_text("".join("%d.png\n" % i for i in images))
    check_error(script(STAGE_7, "result", "label.json", "--image_list", "image.txt", cwd=scored), *said)
    assert not (scored / "fusion_result.json").exists()


def test_a_list_that_cannot_be_read(scored):
    (scored / "image.txt").write_bytes(b"\xff\xfe")
    check_error(script(STAGE_7, "result", "label.json", "--image_list=image.txt", cwd=scored), "image.txt: is not UTF-8")
    check_error(script(STAGE_7, "result", "label.json", "--image_list=nowhere.txt", cwd=scored), "nowhere.txt")
