"""The drawings: the same for the same seed, of PETA's sizes, with labels that contradict nothing."""
import numpy as np

from conftest import check_error, script
from postprocess_deepmar_pytorch import PETA
from sample import pedestrians


def test_same_seed_same_drawings():
    images, labels = pedestrians(20, 5)
    again, same = pedestrians(20, 5)
    other, _ = pedestrians(20, 6)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(images, again)) and np.array_equal(labels, same)
    assert all(a.tobytes() != b.tobytes() for a, b in zip(images, other))


def test_sizes_and_labels():
    images, labels = pedestrians(300, 0)
    assert all(40 <= image.width <= 110 and image.height > 2 * image.width and image.mode == "RGB" for image in images)
    assert set(np.unique(labels)) == {0, 1} and labels.shape == (300, 35)
    column = {name: labels[:, i] for i, name in enumerate(PETA)}
    assert all(0 < values.sum() < 300 for values in column.values()), "an attribute that is never or always there"
    for group in (["personalLess30", "personalLess45", "personalLess60", "personalLarger60"],
                  ["upperBodyFormal", "upperBodyCasual"],
                  ["footwearLeatherShoes", "footwearSandals", "footwearShoes", "footwearSneaker"]):
        assert (sum(column[name].astype(int) for name in group) == 1).all(), group
    assert not (column["accessoryNothing"] & column["accessoryHat"]).any()


def test_errors(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.doc").write_text("x")
    check_error(script("tools/sample.py", "mine", cwd=tmp_path), "mine")
    assert (tmp_path / "mine" / "thesis.doc").exists()
    check_error(script("tools/sample.py", "new", "--images", 0, cwd=tmp_path), code=2)
