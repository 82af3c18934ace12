"""Fixtures for several test files: what is made once, by one of pytest-xdist's processes for all."""
import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

TESTS = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.join(os.path.dirname(TESTS), folder) for folder in ("", "tools", "tools/run", "tests")]
pytest.register_assert_rewrite("helpers", "small_network")
from helpers import SIZE, S3Server, all_images, run_all, script, write_images, write_model

VERSION = "%d.%d" % sys.version_info[:2]
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # as in all scripts
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores Ctrl-C, and its children inherit that


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """The folder for what is made only once: tests/run.sh's for both Pythons, else this session's."""
    folder = os.environ.get("DEEPMAR_TEST_SHARED")
    if not folder:
        session = tmp_path_factory.getbasetemp()  # with pytest-xdist, the folder of this process in that of the session
        folder = str((session.parent if os.environ.get("PYTEST_XDIST_WORKER") else session) / "shared")
        os.makedirs(folder, exist_ok=True)
    return folder


@contextlib.contextmanager
def locked(path):
    """Locks a path for the block, because another test file may be making the file or folder there."""
    with open(path + ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def sample_folder(shared_folder):
    """A folder with the sample of SIZE images. One Python makes it; the other takes a copy, and computes its own accuracy.txt.

    Pillow 7.2 and 13 scale some images differently, by one grey level.
    """
    folder = os.path.join(shared_folder, "sample-" + VERSION)
    with locked(os.path.join(shared_folder, "sample")):
        others = [name for name in os.listdir(shared_folder) if re.match(r"sample-[0-9.]+$", name)]
        if others and not os.path.exists(folder):
            shutil.copytree(os.path.join(shared_folder, others[0]), folder)
            compute_accuracy(folder)
        process = script("tools/sample.py", folder, "--images", SIZE, "--keep")
    assert process.returncode == 0, process.stderr
    return folder


def compute_accuracy(folder):
    from DeepMAR import load_model
    from PIL import Image
    from lib.metrics import evaluate
    from sample import forward
    with open(os.path.join(folder, "label.json")) as f:
        labels = json.load(f)
    images = [Image.open(os.path.join(folder, "images", name)) for name in labels]
    model = load_model(os.path.join(folder, "checkpoint.pth.tar"))
    logits = np.concatenate(list(forward(lambda batch: model(batch).numpy(), images, (224, 224), lambda count: None, 1)))
    with open(os.path.join(folder, "accuracy.txt"), "w") as f:
        f.write("%r\n" % evaluate(logits, np.array(list(labels.values())))[0]["instance_acc"])


@pytest.fixture(scope="session")
def first_run(shared_folder, sample_folder):
    """The first run of run_all.sh on this Python, on sample data: (its work folder, the process)."""
    folder = os.path.join(shared_folder, "first-" + VERSION)
    work, told = os.path.join(folder, "work"), os.path.join(folder, "process.json")
    with locked(folder):
        if not os.path.exists(told):
            shutil.copytree(sample_folder, os.path.join(work, "sample"))
            process = run_all("--work-dir", work)
            with open(told, "w") as f:
                json.dump([process.args, process.returncode, process.stdout, process.stderr], f)
    with open(told) as f:
        return work, subprocess.CompletedProcess(*json.load(f))


@pytest.fixture(scope="session")
def gallery_folder(tmp_path_factory):
    """images/ with 22 images, two of them damaged and some in a folder below; m.onnx of batch size 4; list.txt, a.tar, a.parquet."""
    import pyarrow
    from pyarrow import parquet
    path = tmp_path_factory.mktemp("gallery")
    write_images(path / "images", 15)
    write_images(path / "images" / "b", 5)
    (path / "images" / "b" / "empty.png").write_bytes(b"")
    (path / "images" / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    write_model(path / "m.onnx", 4)
    names = all_images(path / "images")
    (path / "list.txt").write_text("".join(name + "\n" for name in names))
    with tarfile.open(str(path / "a.tar"), "w") as tar:
        for name in names:
            tar.add(str(path / "images" / name), name)
    table = pyarrow.table({"path": names, "bytes": [(path / "images" / name).read_bytes() for name in names]})
    parquet.write_table(table, str(path / "a.parquet"), row_group_size=8)
    return path


@pytest.fixture(scope="session")
def many(gallery_folder):
    """many/ in the gallery's folder: 180 names of ten big pictures, which take a while. Returns the names."""
    random, folder = np.random.RandomState(0), gallery_folder / "many"
    folder.mkdir()
    for i in range(180):
        path = folder / ("%04d.png" % i)
        if i < 10:
            Image.fromarray(random.randint(0, 256, (800, 800, 3)).astype(np.uint8)).save(str(path))
        else:
            os.link(str(folder / ("%04d.png" % (i % 10))), str(path))
    return all_images(folder)


@pytest.fixture(scope="session")
def s3_server():
    """An S3Server. The environment's variables lead to it, in child processes too."""
    pytest.importorskip("s3fs", reason="no S3 on the guide's Python")
    server = S3Server()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("ENDPOINT_URL", server.address), ("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b"),
                            ("DEFAULT_REGION", "us-east-1"), ("MAX_ATTEMPTS", "1")):
            patch.setenv("AWS_" + name, value)
        yield server
    server.server.shutdown()


@pytest.fixture
def s3(s3_server):
    """The S3Server without faults."""
    s3_server.reset()
    yield s3_server
    s3_server.reset()


def pytest_collection_modifyitems(items):
    """Runs the longest file first, because the other processes would wait for it at the end."""
    items.sort(key=lambda item: "test_gallery_cluster" not in item.nodeid)
