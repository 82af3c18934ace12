"""Names of files that people have: Unicode's two forms, Chinese, spaces; and terminals that are not UTF-8."""
import json
import os
import shutil
import subprocess
import sys
import unicodedata

import numpy as np
import pytest

from lib.names import composed, stem
from helpers import ROOT, check_error, run_stage_6, script, write_bins, write_images, write_model
from lib.names import find_listed as find_images, read_list

NFC, NFD = ({form: unicodedata.normalize(form, "\u00e9t\u00e9 \ud55c\u56fd")}[form] for form in ("NFC", "NFD"))


def other_form(text):
    return unicodedata.normalize("NFD" if text == composed(text) else "NFC", text)


def test_names_go_through_all_stages(tmp_path):
    """The list, the labels and the disk each have other forms; the results are those of plain names."""
    plain = write_images(tmp_path / "images", 6)
    model = write_model(tmp_path / "m.onnx", 4)
    write_bins(tmp_path, plain)
    expected = run_stage_6(tmp_path, model, 4)
    logits = [np.fromfile(str(expected / (stem(name) + "_1.bin")), "<f4") for name in plain]

    on_disk = [NFD + ".PNG", NFC + " 2.png", "\u56fe\u50cf.JPG", "a b.Png", NFD + "/" + NFC + " 3.png", "\uff21\u2460.png"]
    assert len({stem(name) for name in on_disk}) == 6 and NFC != NFD
    folder = tmp_path / NFD / "\u56fe"
    for old, new in zip(plain, on_disk):
        os.makedirs(os.path.dirname(str(folder / new)), exist_ok=True)
        shutil.copy(str(tmp_path / "images" / old), str(folder / new))
    in_list = [other_form(name) for name in on_disk]
    (folder / "image.txt").write_text("\n".join(in_list), encoding="utf-8")
    labels = {other_form(os.path.basename(name)): [int(value >= 0) for value in row] for name, row in zip(in_list, logits)}
    (folder / "label.json").write_text(json.dumps(labels, ensure_ascii=False), encoding="utf-8")
    (folder / "names.txt").write_text("\n".join(["\u6234\u5e3d\u5b50", NFC] + ["%d" % i for i in range(33)]), encoding="utf-8")
    for command in (["preprocess_deepmar_pytorch.py", ".", "\u8f93\u5165", "image.txt"],
                    ["get_info.py", "\u8f93\u5165", "\u4fe1\u606f.info", 224, 224],
                    ["tools/benchmark.py", "-batch_size=4", "-om_path=%s" % model, "-input_text_path=\u4fe1\u606f.info"],
                    ["postprocess_deepmar_pytorch.py", "result/dumpOutput_device0", "label.json", "--image_list=image.txt",
                     "--attributes=names.txt", "--per-attribute"],
                    ["tools/compare.py", "result/dumpOutput_device0", "--onnx", model, "--bins", "\u8f93\u5165",
                     "--labels", "label.json", "--json", "\u6bd4.json"],
                    ["tools/report.py", "--images", ".", "--compare", "\u6bd4.json", "--output", "\u62a5\u544a.html"],
                    ["tools/predict.py", on_disk[0], on_disk[2], "--onnx", model, "--attributes=names.txt"]):
        done = script(*command, cwd=folder)
        assert done.returncode == 0, (command, done.stderr)
    assert done.stdout.startswith(on_disk[0] + ": ") and "\u6234\u5e3d\u5b50" in done.stdout
    assert json.loads((folder / "fusion_result.json").read_text())["instance_acc"] == 1
    for name, row in zip(in_list, logits):
        assert (folder / "result" / "dumpOutput_device0" / (stem(name) + "_1.bin")).read_bytes() == row.tobytes()
    page = (folder / "\u62a5\u544a.html").read_text(encoding="utf-8")
    assert all(name in page for name in in_list) and "\u6234\u5e3d\u5b50" in page


def test_two_names_that_differ_in_their_form_alone(tmp_path):
    mixed = "e\u0301" + "\u00e9.png"
    names = [unicodedata.normalize(form, mixed) for form in ("NFC", "NFD")]
    for name in names:
        (tmp_path / name).write_text(name)
    for name in names:
        path, = find_images(str(tmp_path), [name], "image.txt")  # the one that has the name itself
        assert os.path.basename(path) == name
    with pytest.raises(ValueError, match=r"several files .*'e\\u0301e\\u0301.png'"):
        find_images(str(tmp_path), [mixed], "image.txt")
    (tmp_path / "image.txt").write_text("\n".join(names), encoding="utf-8")
    with pytest.raises(ValueError, match="lines 1 and 2 would both write"):
        read_list(str(tmp_path / "image.txt"))


def test_names_that_are_not_utf8(tmp_path):
    """They were made where the locale is GBK; the error says so."""
    gbk = os.fsencode(str(tmp_path)) + b"/" + "\u56fe\u50cf.png".encode("gbk")
    open(gbk, "w").close()
    (tmp_path / "image.txt").write_text("\u56fe\u50cf.png\n", encoding="utf-8")
    check_error(script("preprocess_deepmar_pytorch.py", ".", "bins", "image.txt", cwd=tmp_path), "1 of the 1 images",
                "file names that are not UTF-8", "convmv -f GBK -t UTF-8")
    (tmp_path / "image.txt").write_bytes("\u56fe\u50cf.png\n".encode("gbk"))
    check_error(script("preprocess_deepmar_pytorch.py", ".", "bins", "image.txt", cwd=tmp_path),
                "image.txt: is not UTF-8", "iconv -f GBK -t UTF-8")


@pytest.fixture(scope="module")
def gbk_terminal(tmp_path_factory):
    """The environment of a terminal in the locale zh_CN.GBK."""
    folder = tmp_path_factory.mktemp("locales")
    if shutil.which("localedef"):
        subprocess.call(["localedef", "-i", "zh_CN", "-f", "GBK", str(folder / "zh_CN.GBK")], stderr=subprocess.DEVNULL)
    environment = dict(os.environ, LOCPATH=str(folder), LC_ALL="zh_CN.GBK")
    encoding = subprocess.check_output([sys.executable, "-c", "import sys; print(sys.getfilesystemencoding())"], env=environment)
    if encoding != b"gbk\n":
        pytest.skip("NOT RUN: no locale zh_CN.GBK can be made; apt-get install locales")
    return environment


def run_gbk(environment, folder, *command):
    """Runs a script as at such a terminal; returns (exit status, output, errors), decoded as the terminal would."""
    process = subprocess.run([sys.executable, "-B"] + [argument.encode("utf-8") for argument in command], cwd=str(folder), env=environment,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return process.returncode, process.stdout.decode("gbk"), process.stderr.decode("gbk")


def test_a_terminal_in_gbk_shows_gbk_and_files_have_utf8_names(tmp_path, gbk_terminal):
    write_images(tmp_path / "图像", 2)
    names = ["行人一.png", NFC + ".png"]
    for old, new in zip(("im0.png", "im1.png"), names):
        os.rename(str(tmp_path / "图像" / old), str(tmp_path / "图像" / new))
    (tmp_path / "image.txt").write_text("\n".join(names), encoding="utf-8")
    (tmp_path / "label.json").write_text(json.dumps({name: [1] * 35 for name in names}, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "属性.txt").write_text("\n".join("属性%d" % i for i in range(35)), encoding="utf-8")
    write_model(tmp_path / "模型.onnx")
    stage_4 = [ROOT + "/preprocess_deepmar_pytorch.py", "图像", "输入", "image.txt"]
    status, _, errors = run_gbk(gbk_terminal, tmp_path, *stage_4)
    assert status == 1 and errors.startswith("note: Python takes file names to be gbk here") and "export PYTHONUTF8=1" in errors, errors
    in_utf8 = dict(gbk_terminal, PYTHONUTF8="1", PYTHONIOENCODING="gbk")  # as run_all.sh sets them
    for command, text in ((stage_4, "2 images -> 2 bins"),
                          ([ROOT + "/get_info.py", "输入", "d.info", "224", "224"], "2 bins of"),
                          ([ROOT + "/tools/benchmark.py", "-batch_size=1", "-om_path=模型.onnx", "-input_text_path=d.info"], "2 results"),
                          ([ROOT + "/postprocess_deepmar_pytorch.py", "result/dumpOutput_device0", "label.json",
                            "--attributes=属性.txt", "--per-attribute"], "属性34"),
                          ([ROOT + "/tools/predict.py", "图像/" + names[0], "图像/" + names[1], "--onnx",
                            "模型.onnx", "--attributes=属性.txt", "--save", "pictures"], "图像/" + names[0])):
        status, output, errors = run_gbk(in_utf8, tmp_path, *command)
        assert status == 0 and text in output, (command, output, errors)
    assert sorted(os.listdir(str(tmp_path / "输入"))) == sorted(name[:-3] + "bin" for name in names)
    assert "\\u" in output  # Korean, which GBK does not have


def test_a_name_that_is_no_text_at_all(tmp_path):
    """It is escaped: no byte of it may command the terminal."""
    command = [sys.executable, ROOT + "/preprocess_deepmar_pytorch.py", b"a\xff\x9b2J", "b", "c"]
    for encoding in ("utf-8", "latin-1", "ascii"):
        process = subprocess.Popen(command, cwd=str(tmp_path), stderr=subprocess.PIPE,
                                   env=dict(os.environ, PYTHONIOENCODING=encoding))
        errors = process.communicate()[1]
        assert errors.startswith(b"preprocess_deepmar_pytorch.py: error: ") and b"\x9b" not in errors, errors
