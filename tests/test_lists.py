"""tools/peta.py on a small file of PETA.mat's structure."""
import json
import os

import numpy as np
import pytest
from conftest import check_error, script
from scipy.io import savemat

import peta as tool

IMAGES, ATTRIBUTES, SELECTED = 40, 9, 6


def cells(values, shape):
    array = np.empty(len(values), object)
    array[:] = values
    return array.reshape(shape)


def content():
    """The struct peta as scipy writes it: 40 images in shuffled rows, 9 attributes of which columns 5 ... 10 are selected."""
    random = np.random.RandomState(0)
    data = np.zeros((IMAGES, 4 + ATTRIBUTES), np.uint16)
    data[:, 0] = random.permutation(IMAGES) + 1
    data[:, 1:4] = 77
    data[:, 4:] = random.randint(0, 2, (IMAGES, ATTRIBUTES))
    partitions = []
    for _ in range(5):
        order = (random.permutation(IMAGES) + 1).astype(np.uint16)[:, None]
        partitions.append({"train": order[:20], "val": order[20:25], "test": order[25:]})
    return {"data": data, "attribute": cells(["attribute %d" % i for i in range(ATTRIBUTES)], (-1, 1)),
            "selected_attribute": np.arange(5, 5 + SELECTED, dtype=np.uint8)[None],
            "partion_attribute": cells(partitions, (-1, 1))}


def write(path, peta):
    savemat(str(path), {"peta": peta}, do_compression=True)
    return path


def check_lists(folder, peta, numbers):
    """The folder holds the lists of these image numbers, in this order, and nothing else."""
    names = ["%05d.png" % number for number in numbers]
    assert (folder / "image.txt").read_bytes() == "".join(name + "\n" for name in names).encode()
    rows = {row[0]: row[4:4 + SELECTED].tolist() for row in peta["data"]}
    pairs = json.loads((folder / "label.json").read_text(), object_pairs_hook=list)
    assert pairs == [(name, rows[number]) for name, number in zip(names, numbers)]
    assert (folder / "attributes.txt").read_text() == "".join("attribute %d\n" % i for i in range(SELECTED))
    assert {path.name for path in folder.iterdir()} - {"PETA.mat"} == {"image.txt", "label.json", "attributes.txt"}


def test_default_is_the_test_set_of_partition_0(tmp_path):
    peta = content()
    done = script("tools/peta.py", write(tmp_path / "PETA.mat", peta), cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "15 images (partition 0, test) and 6 attributes" in done.stdout
    check_lists(tmp_path, peta, peta["partion_attribute"][0, 0]["test"].ravel())


@pytest.mark.parametrize("partition, split", [(0, "train"), (4, "val"), (2, "trainval"), (3, "test")])
def test_partition_and_split(tmp_path, partition, split):
    peta = content()
    done = script("tools/peta.py", write(tmp_path / "PETA.mat", peta), "--partition", partition, "--split", split,
                  "--output", tmp_path / "a" / "b")
    assert done.returncode == 0, done.stderr
    chosen = peta["partion_attribute"][partition, 0]
    numbers = np.concatenate([chosen["train"], chosen["val"]]) if split == "trainval" else chosen[split]
    check_lists(tmp_path / "a" / "b", peta, numbers.ravel())


def test_images_are_checked(tmp_path):
    peta = content()
    path, images, output = write(tmp_path / "PETA.mat", peta), tmp_path / "images", tmp_path / "out"
    images.mkdir()
    names = ["%05d.png" % number for number in peta["partion_attribute"][0, 0]["test"].ravel()]
    for name in names[2:]:
        (images / name).write_bytes(b"")
    (images / names[1]).mkdir()
    command = ["tools/peta.py", path, "--images", images, "--output", output]
    check_error(script(*command), "2 of 15 images are not there", names[0] + ", " + names[1] + "\n")
    assert not output.exists()
    (images / names[1]).rmdir()
    for name in names[:2]:
        (images / name).write_bytes(b"")
    assert script(*command).returncode == 0
    check_lists(output, peta, peta["partion_attribute"][0, 0]["test"].ravel())
    check_error(script("tools/peta.py", path, "--images", tmp_path / "absent"), "absent: no such folder")


def changed(field, change):
    peta = content()
    peta[field] = change(peta[field])
    return peta


def with_split(name, value):
    peta = content()
    peta["partion_attribute"][0, 0][name] = value
    return peta


@pytest.mark.parametrize("peta, message", [
    ({"data": np.zeros((3, 7))}, "no struct 'peta' with the fields"),
    (np.zeros((3, 3)), "no struct 'peta'"),
    ("text", "no struct 'peta'"),
    (changed("data", lambda data: data[:, :3]), "data has the shape [40, 3]"),
    (changed("data", lambda data: data[:, :-1]), "9 attribute names, but data has 8"),
    (changed("data", lambda data: data + 0.5), "data is not an array of whole numbers"),
    (changed("data", lambda data: data * 2), "neither 0 nor 1"),
    (changed("data", lambda data: np.where(np.arange(13) == 0, 1, data)), "number is there twice"),
    (changed("data", lambda data: "text"), "data is not an array of whole numbers"),
    (changed("data", lambda data: data[:, 1:]), "9 attribute names, but data has 8"),
    (changed("attribute", lambda names: names[:-1]), "8 attribute names, but data has 9"),
    (changed("attribute", lambda names: cells([np.zeros((2, 2))] * ATTRIBUTES, (-1, 1))), "not the PETA.mat"),
    (changed("selected_attribute", lambda columns: columns - 1), "columns that hold no attribute"),
    (changed("selected_attribute", lambda columns: columns + 9), "columns that hold no attribute"),
    (changed("selected_attribute", lambda columns: columns[:, :0]), "columns that hold no attribute"),
    (changed("partion_attribute", lambda partitions: partitions[:4]), "it has 4 partitions"),
    (changed("partion_attribute", lambda partitions: np.zeros((5, 1))), "partition 0 is not train, val and test"),
    (with_split("val", np.array([[41]])), "val holds image 41, which data does not have"),
    (with_split("test", np.array([[0]])), "test holds image 0, which data does not have"),
    (with_split("val", np.array([[3], [3]])), "is there twice"),
    (with_split("test", np.zeros((0, 1))), "no image in test"),
])
def test_another_content(tmp_path, peta, message):
    path = write(tmp_path / "PETA.mat", peta)
    check_error(script("tools/peta.py", path, "--output", tmp_path / "out"), "PETA.mat: ", message)
    assert not (tmp_path / "out").exists()


def test_another_file(tmp_path):
    path = tmp_path / "PETA.mat"
    check_error(script("tools/peta.py", path), "PETA.mat: no such file")
    good = write(path, content()).read_bytes()
    hdf5 = b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(400)
    for bad in (b"", b"text", b"\x89PNG\r\n\x1a\n" * 40, good[:len(good) // 2], good[:140], good[:-40] + bytes(40), hdf5):
        path.write_bytes(bad)
        check_error(script("tools/peta.py", path, "--output", tmp_path / "out"), "PETA.mat: ")
    savemat(str(path), {"other": np.zeros(3)})
    check_error(script("tools/peta.py", path, "--output", tmp_path / "out"), "no struct 'peta'")
    assert not (tmp_path / "out").exists()
    check_error(script("tools/peta.py", path, "--partition", 5), "--partition", code=2)
    check_error(script("tools/peta.py", path, "--split", "all"), "--split", code=2)


def crash(path, partition):
    os._exit(1)


def test_a_crash_of_the_reader_is_an_error(tmp_path, monkeypatch):
    path = write(tmp_path / "PETA.mat", content())
    assert len(tool.read_peta(str(path), 0)[0]) == IMAGES
    monkeypatch.setattr(tool, "load_peta", crash)
    with pytest.raises(ValueError, match="PETA.mat: damaged; scipy's reader crashes on it"):
        tool.read_peta(str(path), 0)
