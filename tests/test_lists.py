"""tools/lists.py on small files with each data set's structure, and run_all.sh with its lists."""
import json
import os
import pickle
import sys

import numpy as np
import pytest
from scipy.io import savemat

import lists as tool
from helpers import check_error, run_all, script, write_images, write_model
from lib.labels import PETA, labels_of
from lib.names import read_list

IMAGES, ATTRIBUTES, SELECTED = 40, 9, 6
LISTS = {"image.txt", "label.json", "attributes.txt"}


# --- small data sets ---------------------------------------------------------------------------------------------------

def cells(values, shape=(-1, 1)):
    array = np.empty(len(values), object)
    array[:] = values
    return array.reshape(shape)


def content():
    """The struct peta as scipy writes it: 40 images in shuffled rows, 9 attributes of which columns 5 ... 10 are selected."""
    random = np.random.RandomState(0)
    data = np.zeros((IMAGES, 4 + ATTRIBUTES), np.uint16)
    data[:, 0] = random.permutation(IMAGES) + 1
    data[:, 4:] = random.randint(0, 2, (IMAGES, ATTRIBUTES))
    return {"data": data, "attribute": cells(["attribute %d" % i for i in range(ATTRIBUTES)]),
            "selected_attribute": np.arange(5, 5 + SELECTED, dtype=np.uint8)[None],
            "partion_attribute": cells(orders({"train": 20, "val": 5, "test": 15}, (-1, 1)))}


def orders(sizes, shape):
    """Returns five partitions of shuffled image numbers from 1, [{part: numbers}]. sizes: of the parts."""
    random, ends = np.random.RandomState(1), np.cumsum(list(sizes.values()))
    return [{part: (numbers + 1).astype(np.uint16).reshape(shape)
             for part, numbers in zip(sizes, np.split(random.permutation(ends[-1]), ends[:-1]))} for _ in range(5)]


def expected(names, labels, partitions):
    """Returns {split: [(names, labels) of each partition]}. names, labels: of all images."""
    splits = {}
    for partition in partitions:
        numbers = {part: values.ravel() for part, values in partition.items()}
        if "train" in numbers:
            numbers["trainval"] = np.concatenate([numbers["train"], numbers["val"]])
        for split, values in numbers.items():
            splits.setdefault(split, []).append(([names[i - 1] for i in values], labels[values - 1]))
    return splits


def write_peta(path, change=lambda peta: None):
    """Writes PETA's layout, with a change of its content. Returns what expected() gives, and the attributes."""
    peta = content()
    labels = peta["data"][peta["data"][:, 0].argsort(), 4:4 + SELECTED]
    splits = expected(["%05d.png" % (i + 1) for i in range(IMAGES)], labels, peta["partion_attribute"].ravel())
    change(peta)
    savemat(str(path), {"peta": peta}, do_compression=True)
    return splits, ["attribute %d" % i for i in range(SELECTED)]


def write_rap(path):
    """Writes RAP's layout. Returns the same as write_peta()."""
    random = np.random.RandomState(2)
    names = ["CAM%02d_frame%d.png" % (i % 3, i) for i in random.permutation(30)]
    labels = random.randint(0, 2, (30, 92)).astype(np.uint8)
    labels[3, 7] = labels[9, 80] = 2  # unclear; the second one is of no attribute of the benchmark
    partitions, attributes = orders({"trainval": 24, "test": 6}, (1, -1)), ["attribute-%d" % i for i in range(51)]
    savemat(str(path), {"RAP_annotation": {
        "partion": cells([dict(zip(["train_index", "test_index"], parts.values())) for parts in partitions]), "label": labels,
        "attribute_chinese": cells(["\u5c5e\u6027%d" % i for i in range(92)]),
        "attribute_eng": cells(["english-%d" % i for i in range(92)]), "position": np.zeros((30, 16), np.int16),
        "imagesname": cells(names), "attribute_exp": cells(attributes)}})
    return expected(names, np.where(labels == 2, 0, labels)[:, :51], partitions), attributes


def write_rap2(path):
    """Writes RAP v2's layout. Returns the same as write_peta()."""
    random = np.random.RandomState(3)
    names = ["CAM%02d-frame%d.png" % (i % 3, i) for i in random.permutation(30)]
    labels = random.randint(0, 2, (30, 152)).astype(np.int32)
    labels[:, 120:] = random.randint(3, 900, (30, 32))  # coordinates of body parts
    selected = np.sort(random.permutation(110)[:54])
    partitions = orders({"train": 18, "val": 6, "test": 6}, (1, -1))
    savemat(str(path), {"RAP_annotation": {
        "name": cells(names), "data": labels, "attribute": cells(["attr-%d" % i for i in range(152)]),
        "selected_attribute": (selected + 1).astype(np.uint8)[None],
        "partition_attribute": cells([{part + "_index": parts[part] for part in parts} for parts in partitions], (1, -1)),
        "person_identity": np.zeros((30, 1), np.int16), "partition_reid": {"train": np.arange(3), "test": np.arange(3)}}})
    return expected(names, labels[:, selected], partitions), ["attr-%d" % i for i in selected]


def write_pa100k(path):
    """Writes PA-100K's layout. Returns the same as write_peta()."""
    random = np.random.RandomState(4)
    names = ["%06d.jpg" % (i + 1) for i in random.permutation(16)]
    labels, attributes = random.randint(0, 2, (16, 26)).astype(np.uint8), ["Attribute%d&Co" % i for i in range(26)]
    parts = {"train": np.arange(1, 9), "val": np.arange(9, 12), "test": np.arange(12, 17)}
    mat = {"attributes": cells(attributes)}
    for part, numbers in parts.items():
        mat[part + "_images_name"], mat[part + "_label"] = cells([names[i - 1] for i in numbers]), labels[numbers - 1]
    savemat(str(path), mat)
    return expected(names, labels, [parts]), attributes


class EasyDict(dict):
    """Leaves the same in a pickle as easydict's class of this name."""

    def __init__(self, **items):
        super().__init__(items)
        self.__dict__.update(items)


EasyDict.__module__ = "easydict"


def write_pkl(path, count, monkeypatch):
    """Writes the layout of dataset_all.pkl, or of dataset_zs_run0.pkl if it has one partition. Returns the same as write_peta()."""
    random = np.random.RandomState(5)
    names = [np.array("%05d.png" % i)[()] for i in range(30)]  # numpy's strings, as scipy gives them
    labels, used = np.asfortranarray(random.randint(0, 3, (30, 8)).astype("u2")), [5, 0, 3]
    partitions = orders({"train": 18, "val": 6, "test": 6}, -1)[:count]
    splits = {part: [parts[part].astype("i8") - 1 for parts in partitions] for part in ("train", "val", "test")}
    splits["trainval"] = [np.concatenate(pair) for pair in zip(splits["train"], splits["val"])]
    if count == 1:
        splits = {part: arrays[0] for part, arrays in splits.items()}
    monkeypatch.setitem(sys.modules, "easydict", sys.modules[__name__])
    path.write_bytes(pickle.dumps(EasyDict(
        description="peta", image_name=names, label=labels, attr_name=[np.array("attr-%d" % i)[()] for i in range(8)],
        label_idx=EasyDict(eval=used, color=[1, 2], extra=range(6, 8)), partition=EasyDict(**splits),
        weight_train=[labels.mean(axis=0)]), protocol=4))
    monkeypatch.undo()
    return expected(names, (labels == 1)[:, used].astype(int), partitions), ["attr-%d" % i for i in used]


def read_lists(folder):
    """Returns the (names, labels, attributes) in a folder of lists, which holds nothing else."""
    assert {path.name for path in folder.iterdir()} == LISTS
    names = (folder / "image.txt").read_text(encoding="utf-8").split("\n")
    pairs = json.loads((folder / "label.json").read_text(), object_pairs_hook=list)
    assert [name for name, _ in pairs] + [""] == names
    return names[:-1], [row for _, row in pairs], (folder / "attributes.txt").read_text(encoding="utf-8").split("\n")[:-1]


def run(*arguments):
    tool.main([str(argument) for argument in arguments])


def refusal(*arguments):
    """Returns the text of the error that the tool raises."""
    with pytest.raises((OSError, ValueError)) as caught:
        run(*arguments)
    return str(caught.value)


# --- each data set ----------------------------------------------------------------------------------------------------

def test_the_default_is_the_test_set_of_partition_0(tmp_path):
    splits, attributes = write_peta(tmp_path / "PETA.mat")
    (tmp_path / "here").mkdir()
    done = script("tools/lists.py", "peta", "../PETA.mat", cwd=tmp_path / "here")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "15 images (partition 0, test) and 6 attributes" in done.stdout
    assert read_lists(tmp_path / "here") == (splits["test"][0][0], splits["test"][0][1].tolist(), attributes)


@pytest.mark.parametrize("data_set, make, partitions", [
    ("peta", write_peta, 5), ("rap", write_rap, 5), ("rap2", write_rap2, 5), ("pa100k", write_pa100k, 1), ("pkl", write_pkl, 5),
    ("pkl", write_pkl, 1)])
def test_every_partition_and_split_is_listed(tmp_path, capfd, monkeypatch, data_set, make, partitions):
    path = tmp_path / "file"
    splits, attributes = make(path, partitions, monkeypatch) if make is write_pkl else make(path)
    for split, lists in splits.items():
        assert len(lists) == partitions
        for i in {0, partitions - 1}:
            option = () if data_set == "pa100k" else ("--partition", i)
            run(data_set, path, "--split", split, "--output", tmp_path / "new" / "out", *option)
            assert read_lists(tmp_path / "new" / "out") == (lists[i][0], lists[i][1].tolist(), attributes)
    errors = capfd.readouterr().err
    assert (data_set in ("rap", "pkl")) == ("are 2 (unclear); they count as 0" in errors)
    if data_set == "rap":
        assert "1 of 1530 labels" in errors


def test_attributes_are_listed_in_the_given_order(tmp_path):
    path = tmp_path / "PETA.mat"
    names = write_peta(path)[0]["test"][0][0]
    (tmp_path / "mine.txt").write_text("attribute 8\nattribute 3\nattribute 0\n")  # 8 is not one of the benchmark's
    run("peta", path, "--attributes", tmp_path / "mine.txt", "--output", tmp_path / "some")
    data = {"%05d.png" % row[0]: row[4:] for row in content()["data"]}
    assert read_lists(tmp_path / "some") == (
        names, [[data[name][i] for i in (8, 3, 0)] for name in names], ["attribute 8", "attribute 3", "attribute 0"])
    (tmp_path / "mine.txt").write_text("attribute 1\nattribute x\n")
    assert "it has no attribute attribute x; it has attribute 0, " in refusal("peta", path, "--attributes", tmp_path / "mine.txt")


@pytest.mark.parametrize("change, message", [
    (lambda labels: labels + 1, "attribute attribute 0 has no 0 at all, only 1 and 2; a label must be 1 for yes, 0 for no"),
    (lambda labels: np.where(np.arange(ATTRIBUTES) == 3, 1, labels), "attribute attribute 3 has no 0 at all, only 1; "),
    (lambda labels: labels * 2, "attribute attribute 0 has no 1 at all, only 0 and 2; "),
    (lambda labels: labels.astype("i2") * 2 - 1, "has a label that is neither 0 nor 1"),
    (lambda labels: labels != 0, None), (lambda labels: labels.astype("f4"), None)],
    ids=["1 and 2", "all 1", "0 and 2", "-1 and 1", "booleans", "floats"])
def test_labels_in_another_code_are_refused_or_right(tmp_path, monkeypatch, change, message):
    labels = content()["data"][:, 4:]
    names, parts = ["%d.png" % i for i in range(IMAGES)], EasyDict(train=np.arange(30), test=np.arange(30, IMAGES))
    monkeypatch.setitem(sys.modules, "easydict", sys.modules[__name__])
    (tmp_path / "d.pkl").write_bytes(pickle.dumps(EasyDict(
        image_name=names, label=change(labels), attr_name=["attribute %d" % i for i in range(ATTRIBUTES)], partition=parts)))
    if message:
        assert message in refusal("pkl", tmp_path / "d.pkl", "--output", tmp_path / "out") and not (tmp_path / "out").exists()
    else:
        run("pkl", tmp_path / "d.pkl", "--output", tmp_path / "out")
        assert read_lists(tmp_path / "out")[:2] == (names[30:], labels[30:].tolist())


@pytest.mark.parametrize("more, expected", [
    ({"attributes": [" hat", "bag", "male"], "attr_words": np.array(["hat", "bag", "male"])}, ["hat", "bag", "male"]),
    ({"attributes": ["head hat", "a bag", "male"], "attr_name": ["hat", "bag", "male"], "label_idx": EasyDict(eval=[2, 0, 1])},
     ["hat", "bag", "male"]),  # the labels are in their final order already
    ({"attributes": ["hat", "bag", "male"], "attr_name": ["male", "hat", "bag"], "sentences": {"0.jpg": "A man."}},
     ["hat", "bag", "male"]),  # only the labels have been reordered
    ({"attr_name": np.array(["hat", "bag", "male"])}, ["hat", "bag", "male"])], ids=["MSP60K", "PETA", "RAP for LLM-PAR", "EventPAR"])
def test_a_pickle_of_openpar_is_read_as_openpar_reads_it(tmp_path, monkeypatch, more, expected):
    monkeypatch.setitem(sys.modules, "easydict", sys.modules[__name__])
    labels = np.array([[0, 1, 0], [1, 0, 1], [0, 0, 1], [1, 1, 0]])
    (tmp_path / "d.pkl").write_bytes(pickle.dumps(EasyDict(
        image_name=["%d.jpg" % i for i in range(4)], label=labels, partition=EasyDict(trainval=np.arange(2), test=np.array([3, 2])),
        attr_vectors=np.zeros((3, 8), np.float32), **more)))
    run("pkl", tmp_path / "d.pkl", "--output", tmp_path / "out")
    assert read_lists(tmp_path / "out") == (["3.jpg", "2.jpg"], [[1, 1, 0], [0, 0, 1]], expected)
    (tmp_path / "d.pkl").write_bytes(pickle.dumps({"image_name": []}))
    assert "it has no label, partition, attributes" in refusal("pkl", tmp_path / "d.pkl")


# Two sub-sets with the same file names. In CUHK's Label.txt, a line has a file's attributes; in others, a person's.
FOLDERS = {"CUHK": ("0001.png personalMale upperBodyCasual\r\n0002.png hairLong footwearSneakers\r\n", ["0001.png", "0002.png"]),
           "i-LID": ("0001 personalLess30 lowerBodyJeans unheardOf\r\n12 accessoryHat\r\n",
                     ["0001.png", "0001_2.jpg", "0001_2.BMP", "12_a.jpeg"])}


def test_petas_folders_are_listed_and_flattened(tmp_path):
    for folder, (labels, images) in FOLDERS.items():
        archive = tmp_path / "PETA dataset" / folder / "archive"
        archive.mkdir(parents=True)
        (archive / "Label.txt").write_text(labels)
        for name in images:
            (archive / name).write_bytes(b"")
    command = ["peta-folders", tmp_path / "PETA dataset", "--output", tmp_path / "out"]
    assert "share their name up to the first dot" in refusal(*command) and not (tmp_path / "out").exists()
    run(*command, "--flatten", tmp_path / "flat")
    names, labels, attributes = read_lists(tmp_path / "out")
    assert attributes == PETA
    found = {name: {PETA[i] for i in np.flatnonzero(row)} for name, row in zip(names, labels)}
    less = {"personalLess30", "lowerBodyJeans"}
    assert found == {"CUHK_archive_0001_png.png": {"personalMale", "upperBodyCasual"},
                     "CUHK_archive_0002_png.png": {"hairLong", "footwearSneaker"},
                     "i-LID_archive_0001_png.png": less, "i-LID_archive_0001_2_jpg.jpg": less,
                     "i-LID_archive_0001_2_BMP.BMP": less, "i-LID_archive_12_a_jpeg.jpeg": {"accessoryHat"}}
    assert sorted(os.listdir(str(tmp_path / "flat"))) == sorted(names)
    assert os.path.samefile(str(tmp_path / "flat" / "i-LID_archive_0001_2_jpg.jpg"),
                            str(tmp_path / "PETA dataset" / "i-LID" / "archive" / "0001_2.jpg"))
    (tmp_path / "PETA dataset/CUHK/archive/0003.png").write_bytes(b"")
    assert "1 images have no line in Label.txt: CUHK/archive/0003.png" in refusal(*command)


def test_a_table_is_listed_and_bad_ones_are_refused(tmp_path):
    (tmp_path / "t.csv").write_text('\ufeffimage,Male,"Bag, small",\u5e3d\u5b50\r\nb.png,0,1,1\r\n"a, b.jpg",1.0,0.0,1.0\r\n'
                                    "sub/\u4eba.png,True,False,false\r\n", encoding="utf-8")
    run("csv", tmp_path / "t.csv", "--output", tmp_path / "out")
    assert read_lists(tmp_path / "out") == (["b.png", "a, b.jpg", "sub/\u4eba.png"], [[0, 1, 1], [1, 0, 1], [1, 0, 0]],
                                            ["Male", "Bag, small", "\u5e3d\u5b50"])
    for text, message in [("image,a\n", "first line is not"), ("image;a\nx.png;1\n", "separated by commas"),
                          ("image,a\n\nx.png,2\n", "line 3 (x.png)"), ("image,a\nx.png,1,1\n", "line 2 (x.png)"),
                          ("image,a,a\nx.png,1,1\n", "holds a twice"), ("image,a,\nx.png,1,1\n", "name is empty"),
                          ("image,a\nx.png,1\nx.png,0\n", "holds x.png twice"), ("image,a\n../x.png,1\n", "not a file name"),
                          ("image,a\n.png,1\n", "not a file name"), ("image,a\nx.png,1\nx.jpg,1\n", "1 images share their name")]:
        (tmp_path / "bad.csv").write_text(text)
        error = refusal("csv", tmp_path / "bad.csv", "--output", tmp_path / "new")
        assert error.startswith(str(tmp_path / "bad.csv") + ": ") and message in error, error
    for encoding in ("GBK", "UTF-16"):
        (tmp_path / "bad.csv").write_bytes("image,\u5e3d\u5b50\nx.png,1\n".encode(encoding))
        assert "iconv -f %s -t" % encoding in refusal("csv", tmp_path / "bad.csv", "--output", tmp_path / "new")
    assert not (tmp_path / "new").exists()


# --- images ---------------------------------------------------------------------------------------------------------

def test_missing_images_are_named(tmp_path):
    path, images, output = tmp_path / "PETA.mat", tmp_path / "images", tmp_path / "out"
    names = write_peta(path)[0]["test"][0][0]
    images.mkdir()
    for name in names[2:]:
        (images / name).write_bytes(b"")
    error = refusal("peta", path, "--images", images, "--output", output)
    assert "2 of the 15 images" in error and error.endswith("%s, %s" % tuple(names[:2])) and not output.exists()
    assert "absent: no such folder" in refusal("peta", path, "--images", tmp_path / "absent")


def test_an_own_list_is_flattened(tmp_path):
    names = ["a/0002.png", "b/0002.png", "b/0002.jpg", "0002.v1.png", "0002.v2.png", "x_y/1.png", "x/y_1.png", "plain.png"]
    for name in names:
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_text(name)
    labels = {name: [i % 2, 1] for i, name in enumerate(names)}
    (tmp_path / "image.txt").write_text("\r\n".join(names))
    (tmp_path / "label.json").write_text(json.dumps(dict(labels, other=[0, 0])))
    command = ["list", tmp_path / "image.txt", "--labels", tmp_path / "label.json", "--images", tmp_path / "images"]
    error = script("preprocess_deepmar_pytorch.py", "images", "bins", "image.txt", cwd=tmp_path)
    check_error(error, "would both write 0002.bin", "tools/lists.py list --flatten")
    assert "image.txt: would be overwritten" in refusal(*command, "--flatten", tmp_path / "flat", "--output", tmp_path)
    command += ["--flatten", tmp_path / "flat", "--output", tmp_path / "out"]
    run(*command)
    flat = read_list(str(tmp_path / "out" / "image.txt"))  # as stage 4 reads it
    assert flat[:5] + flat[7:] == ["a_0002_png.png", "b_0002_png.png", "b_0002_jpg.jpg", "0002_v1_png.png", "0002_v2_png.png",
                                   "plain_png.png"]
    assert [(tmp_path / "flat" / name).read_text() for name in flat] == names
    assert labels_of(str(tmp_path / "out" / "label.json"), flat, 2).tolist() == list(labels.values())  # as stage 7 reads them
    run(*command)  # the links may exist already
    (tmp_path / "flat" / flat[0]).unlink()
    (tmp_path / "flat" / flat[0]).write_text("mine")
    assert "exists already" in refusal(*command) and (tmp_path / "flat" / flat[0]).read_text() == "mine"
    run("list", tmp_path / "image.txt", "--images", tmp_path / "images", "--flatten", tmp_path / "new", "--output", tmp_path / "o")
    assert os.listdir(str(tmp_path / "o")) == ["image.txt"]
    for bad, message in [('{"other": [0, 0]}', "has no label for 8 of its 8 images"), ("[", "Expecting value"),
                         (json.dumps(dict(labels, **{names[1]: [1]})), "'b/0002.png' has 1 values, but the rows before it have 2"),
                         (json.dumps({name: [2, 1] for name in names}), "'a/0002.png': its label is not a list of 0 and 1"),
                         (json.dumps(labels)[:-1] + ', "plain.png": [0, 0]}', "holds 'plain.png' twice")]:
        (tmp_path / "label.json").write_text(bad)
        error = refusal(*command)
        assert error.startswith(str(tmp_path / "label.json") + ": ") and message in error
    long = "a/" + 246 * "b" + ".png"  # as a_bbb..., its result would have too long a name
    (tmp_path / "images" / long).touch()
    (tmp_path / "image.txt").write_text(long)
    error = refusal("list", tmp_path / "image.txt", "--images", tmp_path / "images", "--flatten", tmp_path / "long")
    assert "at most 249 bytes" in error and not (tmp_path / "long").exists()


# --- bad files --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, message", [
    (lambda peta: peta.pop("attribute"), "peta is not one struct of 4 fields"),
    (lambda peta: peta.update(data=peta["data"][:, :3]), "data has the shape [40, 3]"),
    (lambda peta: peta.update(data=peta["data"][:, :-1]), "9 attributes and labels of the shape [40, 8]"),
    (lambda peta: peta.update(data=peta["data"] + 0.5), "data is not an array of whole numbers"),
    (lambda peta: peta.update(data=peta["data"] * ([1] + [3] * 12)), "neither 0 nor 1"),
    (lambda peta: peta.update(selected_attribute=peta["selected_attribute"] - 1), "attributes that it does not have"),
    (lambda peta: peta["partion_attribute"][0, 0].update(val=np.array([[41]])), "val holds image 41, which the file does not have"),
    (lambda peta: peta["partion_attribute"][0, 0].update(val=np.array([[3], [3]])), "partition 0 holds 00003.png twice"),
    (lambda peta: peta["partion_attribute"][0, 0].update(test=np.zeros((0, 1))), "no image in test; it has train, val"),
])
def test_another_content_is_refused(tmp_path, change, message):
    path = tmp_path / "PETA.mat"
    write_peta(path, change)
    error = refusal("peta", path, "--output", tmp_path / "out")
    assert error.startswith("%s: " % path) and message in error, error
    assert not (tmp_path / "out").exists()


def test_the_file_of_another_set_is_refused(tmp_path):
    path = tmp_path / "RAP_annotation.mat"
    write_rap(path)
    assert "not the RAP_annotation.mat that lists.py rap2 takes: name is not a list of names" in refusal("rap2", path)
    assert "it has no peta" in refusal("peta", path) and "it has no attributes" in refusal("pa100k", path)
    write_rap2(path)
    assert "not the RAP_annotation.mat that lists.py rap takes: field 6 is not" in refusal("rap", path)


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "PETA.mat"
    check_error(script("tools/lists.py", "peta", path), "PETA.mat: no such file")
    write_peta(path)
    good = path.read_bytes()
    hdf5 = b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(400)
    for bad in (b"", b"text", b"\x89PNG\r\n\x1a\n" * 40, good[:len(good) // 2], good[:140], good[:-40] + bytes(40), hdf5):
        path.write_bytes(bad)
        for data_set in ("peta", "pkl"):
            error = refusal(data_set, path, "--output", tmp_path / "out")
            assert error.startswith("%s: " % path) and ("-v7" in error) == (bad == hdf5 and data_set != "pkl"), error
    assert not (tmp_path / "out").exists()


def test_wrong_arguments_are_usage_errors(tmp_path, monkeypatch):
    for arguments, text in ((["peta", "x.mat", "--partition", 5], "--partition"), (["peta", "x.mat", "--split", "all"], "--split"),
                            (["rap", "x.mat", "--split", "val"], "--split"), (["pa100k", "x.mat", "--partition", 1], "--partition"),
                            (["list", "image.txt", "--flatten", "flat"], "--images"), ([], "SET")):
        check_error(script("tools/lists.py", *arguments), text, code=2)
    write_pkl(tmp_path / "one.pkl", 1, monkeypatch)
    assert "has no partition 1; it has 1" in refusal("pkl", tmp_path / "one.pkl", "--partition", 1)


def test_a_pickle_runs_nothing(tmp_path, monkeypatch):
    path = tmp_path / "dataset_zs_run0.pkl"
    write_pkl(path, 1, monkeypatch)
    good = path.read_bytes()
    for name in (b"os system", b"builtins exec", b"numpy.testing._private.utils runstring", b"easydict os.system"):
        path.write_bytes(b"c" + name.replace(b" ", b"\n") + b"\n(Vtouch %s\ntR." % os.fsencode(str(tmp_path / "ran")))
        assert "pkl takes: " in refusal("pkl", path)
    assert not (tmp_path / "ran").exists()
    for end in (5, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:end])
        assert "pkl takes: " in refusal("pkl", path)


@pytest.mark.parametrize("read", [lambda *_: os._exit(1), lambda *_: list(iter(int, 1))], ids=["crashes", "takes for ever"])
def test_a_reader_that_crashes_or_takes_for_ever_is_an_error(tmp_path, monkeypatch, read):
    path = tmp_path / "PETA.mat"
    write_peta(path)
    monkeypatch.setattr(tool, "MAX_CPU_SECONDS", 1)
    monkeypatch.setattr(tool, "read", read)
    with pytest.raises(ValueError, match="PETA.mat: is damaged, and the library that reads it crashes"):
        tool.read_apart("peta", str(path))


# --- all stages -------------------------------------------------------------------------------------------------------

def test_all_stages_run_with_51_attributes_and_one_name_in_two_folders(tmp_path):
    names, attributes = ["a/im0.png", "a/im1.png", "b/im0.png", "b/im1.png"], ["ub-%02d" % i for i in range(51)]
    labels = np.random.RandomState(0).randint(0, 2, (4, 51))
    (tmp_path / "images").mkdir()
    for folder in ("a", "b"):
        write_images(tmp_path / "images" / folder, 2)
    (tmp_path / "people.csv").write_text("".join("%s,%s\n" % (name, ",".join(map(str, row)))
                                                 for name, row in zip(["image"] + names, [attributes] + labels.tolist())))
    run("csv", tmp_path / "people.csv", "--images", tmp_path / "images", "--flatten", tmp_path / "flat", "--output", tmp_path)
    (tmp_path / "work").mkdir()
    write_model(tmp_path / "work" / "deepmar_bs1_nopad.onnx", attributes=51, size=(32, 32))
    done = run_all("--work-dir", "work", "--images", "flat", "--image-list", "image.txt", "--label-file", "label.json", "--attributes",
                   "attributes.txt", "--backend", "onnxruntime", "--stage", 4, "--size", "32 32", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    fusion = json.loads((tmp_path / "work" / "fusion_result.json").read_text())
    assert fusion["images"] == len(names) and [row["name"] for row in fusion["attributes"]] == attributes
    assert [row["positives"] for row in fusion["attributes"]] == labels.sum(axis=0).tolist()
    page = (tmp_path / "work" / "report.html").read_text(encoding="utf-8")
    assert all(">%s<" % name in page for name in attributes)
