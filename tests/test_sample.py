"""tools/sample.py: the drawings, their labels and the files."""
import json
import os

import numpy as np

import DeepMAR
import sample
from helpers import check_error, contents, script
from lib.labels import PETA
from sample import pedestrians


def test_the_same_seed_gives_the_same_drawings():
    images, labels = pedestrians(20, 5)
    again, same = pedestrians(20, 5)
    other, _ = pedestrians(20, 6)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(images, again)) and np.array_equal(labels, same)
    assert all(a.tobytes() != b.tobytes() for a, b in zip(images, other))


def test_drawings_have_petas_sizes_and_consistent_labels():
    images, labels = pedestrians(300, 0)
    assert all(40 <= image.width <= 110 and image.height > 2 * image.width and image.mode == "RGB" for image in images)
    assert set(np.unique(labels)) == {0, 1} and labels.shape == (300, 35)
    column = {name: labels[:, i] for i, name in enumerate(PETA)}
    assert all(0 < values.sum() < 300 for values in column.values()), "no image has the attribute, or all have it"
    for group in (["personalLess30", "personalLess45", "personalLess60", "personalLarger60"],
                  ["upperBodyFormal", "upperBodyCasual"],
                  ["footwearLeatherShoes", "footwearSandals", "footwearShoes", "footwearSneaker"]):
        assert (sum(column[name].astype(int) for name in group) == 1).all(), group
    assert not (column["accessoryNothing"] & column["accessoryHat"]).any()


def test_the_files_of_a_sample_are_complete(tmp_path, monkeypatch, capsys):
    """Of a small network; the real one's are those of run_all.sh's tests."""
    monkeypatch.chdir(str(tmp_path))
    monkeypatch.setattr(DeepMAR, "BLOCKS", [1, 1, 1, 1])
    monkeypatch.setattr(sample, "MIN_DRAWINGS", 6)
    monkeypatch.setattr(sample, "STATISTICS", 2)
    sample.main(["sample", "--images=2"])
    assert capsys.readouterr().out.startswith("sample: 2 drawn pedestrians with labels, ")
    names = (tmp_path / "sample" / "image.txt").read_text().splitlines()
    assert names == ["00001.png", "00002.png"] == sorted(os.listdir(str(tmp_path / "sample" / "images")))
    others = (tmp_path / "sample" / "calibration.txt").read_text().splitlines()
    assert len(others) == 32 and others == sorted(os.listdir(str(tmp_path / "sample" / "calibration_images")))
    labels = json.loads((tmp_path / "sample" / "label.json").read_text())
    assert sorted(labels) == names and {len(row) for row in labels.values()} == {35}
    assert (tmp_path / "sample" / "attributes.txt").read_text().splitlines() == list(PETA)
    assert 0 <= float((tmp_path / "sample" / "accuracy.txt").read_text()) <= 1
    before = contents(tmp_path / "sample")
    assert before["checkpoint.pth.tar"]
    process = script("tools/sample.py", "sample", "--images", 2, "--keep", cwd=tmp_path)
    assert process.stdout == "sample: kept, because it already has 2 images\n" and contents(tmp_path / "sample") == before
    (tmp_path / "sample" / "made_with.txt").write_text("images 2, size 224 224, last_conv_stride 2, seed 0\n")  # before calibration
    sample.main(["sample", "--images=2", "--keep"])
    assert "drawn pedestrians" in capsys.readouterr().out and contents(tmp_path / "sample").keys() == before.keys()


def test_a_folder_of_other_files_is_not_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.doc").write_text("x")
    check_error(script("tools/sample.py", "mine", cwd=tmp_path), "mine")
    assert (tmp_path / "mine" / "thesis.doc").exists()
    check_error(script("tools/sample.py", "new", "--images", 0, cwd=tmp_path), code=2)
