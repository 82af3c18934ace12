"""Names of people's files: Unicode's two forms, Chinese, spaces; and terminals that are not UTF-8."""
import builtins
import json
import os
import shutil
import subprocess
import sys
import unicodedata

import numpy as np
import pytest

from helpers import ROOT, check_error, run_stage_6, script, write_bins, write_images, write_model
from lib.bins import read_info, write_info
from lib.names import composed, find_listed, images_in, read_list, stem

NFC, NFD = ({form: unicodedata.normalize(form, "\u00e9t\u00e9 \ud55c\u56fd")}[form] for form in ("NFC", "NFD"))


def other_form(text):
    return unicodedata.normalize("NFD" if text == composed(text) else "NFC", text)


def test_any_form_of_a_name_works_in_all_stages(tmp_path):
    """The list, the labels and the disk have different forms. The results are those of plain names."""
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


def test_names_that_differ_only_in_their_form_are_refused(tmp_path):
    mixed = "e\u0301" + "\u00e9.png"
    names = [unicodedata.normalize(form, mixed) for form in ("NFC", "NFD")]
    for name in names:
        (tmp_path / name).write_text(name)
    for name in names:
        path, = find_listed(str(tmp_path), [name], "image.txt")  # the file with exactly this name
        assert os.path.basename(path) == name
    with pytest.raises(ValueError, match=r"several files .*'e\\u0301e\\u0301.png'"):
        find_listed(str(tmp_path), [mixed], "image.txt")
    (tmp_path / "image.txt").write_text("\n".join(names), encoding="utf-8")
    with pytest.raises(ValueError, match="lines 1 and 2 would both write"):
        read_list(str(tmp_path / "image.txt"))


def test_names_in_gbk_are_an_error_with_the_remedy(tmp_path):
    gbk = os.fsencode(str(tmp_path)) + b"/" + "\u56fe\u50cf.png".encode("gbk")
    open(gbk, "w").close()
    (tmp_path / "image.txt").write_text("\u56fe\u50cf.png\n", encoding="utf-8")
    check_error(script("preprocess_deepmar_pytorch.py", ".", "bins", "image.txt", cwd=tmp_path), "1 of the 1 images",
                "file names that are not UTF-8", "convmv -f GBK -t UTF-8")
    (tmp_path / "image.txt").write_bytes("\u56fe\u50cf.png\n".encode("gbk"))
    check_error(script("preprocess_deepmar_pytorch.py", ".", "bins", "image.txt", cwd=tmp_path),
                "image.txt: is not UTF-8", "iconv -f GBK -t UTF-8")
    bins = os.fsencode(str(tmp_path)) + b"/" + "\u65e7".encode("gbk")
    os.mkdir(bins)
    with open(bins + b"/a.bin", "wb") as f:
        f.write(bytes(12))
    check_error(script("get_info.py", os.fsdecode(bins), "d.info", 1, 1, cwd=tmp_path), "not valid UTF-8", "convmv -f GBK -t UTF-8")


@pytest.fixture(scope="module")
def gbk(tmp_path_factory):
    """Returns the environment variables of a terminal in the locale zh_CN.GBK."""
    folder = tmp_path_factory.mktemp("locales")
    try:
        subprocess.call(["localedef", "-i", "zh_CN", "-f", "GBK", str(folder / "zh_CN.GBK")], stderr=subprocess.DEVNULL)
    except FileNotFoundError:
        pass
    environment = dict(os.environ, LOCPATH=str(folder), LC_ALL="zh_CN.GBK")
    encoding = subprocess.check_output([sys.executable, "-c", "import sys; print(sys.getfilesystemencoding())"], env=environment)
    if encoding != b"gbk\n":
        pytest.skip("NOT RUN: no locale zh_CN.GBK can be made; apt-get install locales")
    return environment


def test_a_terminal_in_gbk_shows_names_as_they_are(tmp_path, gbk):
    """The files' names are UTF-8, as in the lists. run_all.sh sets these two variables; without them, a note names the remedy."""
    names = ["\u884c\u4eba.png", NFC + ".png"]  # GBK has no Korean letters
    for old, new in zip(write_images(tmp_path / "\u56fe\u50cf", 2), names):
        os.rename(str(tmp_path / "\u56fe\u50cf" / old), str(tmp_path / "\u56fe\u50cf" / new))
    (tmp_path / "image.txt").write_text("\n".join(names), encoding="utf-8")
    (tmp_path / "\u5c5e\u6027.txt").write_text("\n".join("\u5c5e\u6027%d" % i for i in range(35)), encoding="utf-8")
    write_model(tmp_path / "\u6a21\u578b.onnx")

    def run_gbk(*command, **variables):
        process = subprocess.Popen([sys.executable] + [argument.encode("utf-8") for argument in command], cwd=str(tmp_path),
                                   env=dict(gbk, **variables), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        output, errors = process.communicate()
        return process.returncode, output.decode("gbk"), errors.decode("gbk")

    stage_4 = [ROOT + "/preprocess_deepmar_pytorch.py", "\u56fe\u50cf", "\u8f93\u5165", "image.txt"]
    status, _, errors = run_gbk(*stage_4)
    note, error = errors.splitlines()
    assert status == 1 and note.startswith("note: ") and note.endswith("run: export PYTHONUTF8=1") and "rename" not in error, errors
    for command, text in (
            (stage_4, "\u8f93\u5165: 2 images -> 2 bins"),
            ([ROOT + "/get_info.py", "\u8f93\u5165", "d.info", "224", "224"], "2 bins of \u8f93\u5165"),
            ([ROOT + "/tools/predict.py", "\u56fe\u50cf/" + names[0], "\u56fe\u50cf/" + names[1], "--onnx", "\u6a21\u578b.onnx",
              "--attributes=\u5c5e\u6027.txt", "--save", "pictures"], "\u56fe\u50cf/" + names[0])):
        status, output, errors = run_gbk(*command, PYTHONUTF8="1", PYTHONIOENCODING="gbk:backslashreplace")
        assert status == 0 and text in output, (command, output, errors)
    assert sorted(os.listdir(str(tmp_path / "\u8f93\u5165"))) == sorted(name[:-3] + "bin" for name in names)
    assert "\\ud55c" in output and "\u5c5e\u602734" in output


def test_bytes_that_are_no_text_are_escaped(tmp_path):
    """Otherwise they could control the terminal."""
    command = [sys.executable, ROOT + "/preprocess_deepmar_pytorch.py", b"a\xff\x9b2J", "b", "c"]
    for encoding in ("utf-8", "latin-1", "ascii"):
        process = subprocess.Popen(command, cwd=str(tmp_path), stderr=subprocess.PIPE,
                                   env=dict(os.environ, PYTHONIOENCODING=encoding))
        errors = process.communicate()[1]
        assert errors.startswith(b"preprocess_deepmar_pytorch.py: error: ") and b"\x9b" not in errors, errors


@pytest.mark.parametrize("name", ["x" * 250, "\u4eba" * 83 + "x"], ids=["Latin", "Chinese"])
def test_a_name_too_long_for_its_result_is_refused_before_any_work(tmp_path, name):
    """NAME.bin may be possible where NAME_1.bin is not."""
    (tmp_path / "image.txt").write_text("ok.png\n%s.png\n" % name, encoding="utf-8")
    with pytest.raises(ValueError, match="image.txt: line 2: '%s' is too long: .* at most 249 bytes up to its first dot" % name):
        read_list(str(tmp_path / "image.txt"))
    with pytest.raises(ValueError, match="is too long"):
        write_info(str(tmp_path / "d.info"), "bins", [name + ".bin"], 1, 1)
    (tmp_path / "d.info").write_text("0 bins/%s.bin 1 1\n" % name, encoding="utf-8")
    with pytest.raises(ValueError, match="is too long"):
        read_info(str(tmp_path / "d.info"), 1, 1)
    (tmp_path / "image.txt").write_text(name[:-1] + ".png", encoding="utf-8")
    assert read_list(str(tmp_path / "image.txt")) == [name[:-1] + ".png"]
    (tmp_path / (stem(name[:-1]) + "_1.bin")).touch()


def test_a_file_system_that_ignores_case_loses_no_image(tmp_path, monkeypatch):
    """A stand-in: a file's name is written in small letters."""
    for old, new in zip(write_images(tmp_path / "images", 2), ("A.png", "a.png")):
        os.rename(str(tmp_path / "images" / old), str(tmp_path / "images" / new))
    model = write_model(tmp_path / "m.onnx", 1)
    write_bins(tmp_path, ["A.png", "a.png"])

    def ignoring_case(path, *arguments, real=open, **named):
        if str(path).endswith(".bin"):
            path = os.path.join(os.path.dirname(path), os.path.basename(path).lower())
        return real(path, *arguments, **named)
    monkeypatch.setattr(builtins, "open", ignoring_case)
    check_error(script("preprocess_deepmar_pytorch.py", "images", "input_bin", "image.txt", cwd=tmp_path),
                "input_bin: 2 files were written, but it holds 1", "(A.bin and a.bin)")
    check_error(script("tools/benchmark.py", "-batch_size=1", "-om_path=%s" % model, "-input_text_path=deepmar.info", cwd=tmp_path),
                "dumpOutput_device0: 2 files were written, but it holds 1", "(A_1.bin and a_1.bin)")


def test_links_to_folders_are_followed_and_each_folder_is_read_once(tmp_path, capsys):
    images = tmp_path / "images"
    for path in ("images/a/1.png", "images/b/2.png", "cam1/3.png", "cam2/deep/4.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    for link, target in (("0", "../cam2/deep"), ("a/again", "../b"), ("a/up", "../.."), ("b/self", "."), ("c", "../cam1"),
                         ("d", "../cam1"), ("e", "../cam2"), ("5.png", "../cam1/3.png"), ("6.png", "nowhere")):
        (images / link).symlink_to(target)
    (tmp_path / "cam1" / "back").symlink_to("../images")
    found = [os.path.relpath(os.path.join(parent, name), str(images)) for parent, name in images_in(str(images))]
    assert found == ["5.png", "6.png", "0/4.png", "a/1.png", "b/2.png", "c/3.png"]
    note = capsys.readouterr().err
    assert note.startswith("note: %s: 6 links lead to folders that are read already" % images), note
    with pytest.raises(PermissionError):
        list(images_in("remote", walk=denied()))


def denied():
    raise PermissionError("listing")
    yield
