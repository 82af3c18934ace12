"""Names of files that people have: Unicode's two forms, Chinese, spaces; and terminals that are not UTF-8."""
import json
import os
import shutil
import unicodedata

import numpy as np
import pytest
from conftest import check_error, script
from test_predict import run_stage_6, write_bins, write_images, write_model

from common import composed, stem
from preprocess_deepmar_pytorch import find_images, read_list

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
