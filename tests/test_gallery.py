"""tools/gallery.py: the pipeline's logits, every kind of input, and each image once, whatever is killed on a real cluster."""
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time

import numpy as np
import pytest
from PIL import Image

import gallery
from helpers import ROOT, check_error, contents, run_stage_6, script, write_bins, write_images, write_model
from lib.gallery.shards import absolute, find_input
from lib.gallery.worker import Worker, put, versions
from lib.labels import ASSUMED, PETA
from lib.results import probabilities

OLD = sys.version_info < gallery.OLDEST_PYTHON
if not OLD:
    import duckdb
    import pyarrow
    import pyarrow.parquet as parquet

TOOL = os.path.join(ROOT, "tools", "gallery.py")


def test_python_too_old_for_ray_is_named(tmp_path):
    if OLD:
        check_error(script(TOOL, tmp_path, "--onnx", "m.onnx", "--output", tmp_path / "out"), "Ray needs Python 3.10 or later")


# --- what the tests share --------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """images/ with 22 images, two of them damaged and some in a folder below; m.onnx of batch size 4; list.txt, a.tar, a.parquet."""
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


def all_images(path):
    return sorted(str(name.relative_to(path)) for name in path.rglob("*.*g"))


def rows(output):
    """{path: (error, values)} of all parts, where no image may be twice."""
    found = {}
    for row in parquet.read_table(sorted(map(str, output.glob("part-*.parquet")))).to_pylist():
        path, error = row.pop("path"), row.pop("error")
        assert path not in found and {value is None for value in row.values()} == {error is not None}
        found[path] = error, np.array(list(row.values()), np.float32)
    return found


def check_once(output, names):
    """Every image is in exactly one part, and nothing else is in the folder."""
    found = rows(output)
    assert sorted(found) == sorted(names)
    assert not [name for name in os.listdir(str(output)) if not re.match(r"part-\d{6}\.parquet$|_manifest.json$|_list.txt$", name)]
    return found


def shards(*arguments):
    """The shards of a command line."""
    args = gallery.parse([str(argument) for argument in arguments] + ["--onnx", "m.onnx", "--output", "out"])
    return find_input(args, absolute(args.input[0]))


def compute(model, output, *arguments, **more):
    """Computes all shards of a command line without Ray. Returns (images, images that cannot be read) of each shard."""
    found = shards(*arguments)
    worker = Worker(dict({"output": str(output), "names": PETA, "sigmoid": False, "probabilities": False, "calls": 1, "threads": 2,
                          "readers": 2, "provider": gallery.CPU, "versions": versions()}, **more))
    worker.start(model.read_bytes())
    return [worker.work(number, found.describe(number))[:2] for number in range(found.count)]


# --- a worker without Ray -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("batch_size, size, uint8", [(1, (224, 224), False), (8, (128, 64), False), (8, (224, 224), True)])
def test_logits_are_the_pipelines_to_the_bit(tmp_path, batch_size, size, uint8):
    names = write_images(tmp_path / "images", 19)
    model, options = write_model(tmp_path / "m.onnx", batch_size, size=size), []
    if uint8:
        done = script("tools/rehearse.py", "aipp", model, tmp_path / "aipp.onnx")
        assert done.returncode == 0, done.stderr
        model, options = tmp_path / "aipp.onnx", ["--uint8"]
    write_bins(tmp_path, names, *size, *options)
    result = run_stage_6(tmp_path, model, batch_size, 0, *size)
    (tmp_path / "out").mkdir()
    assert compute(model, tmp_path / "out", tmp_path / "image.txt", "--root", tmp_path / "images", "--shard-size", 10, calls=2) == [
        (10, 0), (9, 0)]
    for name, (error, values) in check_once(tmp_path / "out", names).items():
        assert error is None and values.tobytes() == (result / (name[:-4] + "_1.bin")).read_bytes()


def test_probabilities_and_models_that_end_in_a_sigmoid(folder, tmp_path):
    def values_of(model, **more):
        compute(model, tmp_path, folder / "a.parquet", **more)
        return np.array([values for _, values in rows(tmp_path).values()])

    model, sigmoid = folder / "m.onnx", write_model(tmp_path / "s.onnx", 4, sigmoid=True)
    expected, logits = probabilities(values_of(model)), values_of(sigmoid, sigmoid=True)
    for values in (values_of(model, probabilities=True), values_of(sigmoid, sigmoid=True, probabilities=True), probabilities(logits)):
        assert np.allclose(values, expected, atol=1e-6, equal_nan=True)
    assert np.nanmin(logits) < 0


def test_list_is_read_by_stage_4s_rules(folder, tmp_path):
    """A byte order mark, CRLF, blank lines, no last newline; a name in another Unicode form; names that leave the root."""
    root = tmp_path / "images"
    root.mkdir()
    for path in root / "a.png", root / "cafe\u0301.png", root / "c d.png", tmp_path / "secret.png":
        Image.new("RGB", (9, 9)).save(str(path))
    outside = ["../secret.png", str(tmp_path / "secret.png"), "a/../../secret.png"]
    (tmp_path / "list.txt").write_bytes("\r\n".join(
        ["\ufeffa.png", "", "  ", "caf\u00e9.png", " c d.png "] + outside + ["missing.png"]).encode("utf-8"))
    assert compute(folder / "m.onnx", tmp_path, tmp_path / "list.txt", "--root", root, "--shard-size", 4) == [(2, 0), (4, 3), (1, 1)]
    assert {path: error for path, (error, _) in rows(tmp_path).items()} == {
        "a.png": None, "caf\u00e9.png": None, "c d.png": None, "missing.png": "no such file",
        **dict.fromkeys(outside, "not a file name inside the images' folder")}


def test_hostile_and_damaged_tars(folder, tmp_path):
    """Links, devices and names with .. read nothing outside the tar; a tar that is cut off gives what is before the cut."""
    picture = (folder / "images" / "im0.png").read_bytes()
    with tarfile.open(str(tmp_path / "x.tar"), "w") as tar:
        for name, kind, content in (
                ("a/1.png", tarfile.REGTYPE, picture), ("a/1.json", tarfile.REGTYPE, b"{}"), ("link.png", tarfile.SYMTYPE, b""),
                ("fifo.png", tarfile.FIFOTYPE, b""), ("../../up.png", tarfile.REGTYPE, picture),
                ("/abs\udcff.png", tarfile.REGTYPE, picture), ("2.png", tarfile.REGTYPE, picture * 20)):
            member = tarfile.TarInfo(name)
            member.type, member.size, member.linkname = kind, len(content), "/etc/passwd"
            tar.addfile(member, io.BytesIO(content))
    (tmp_path / "y.tar").write_bytes((tmp_path / "x.tar").read_bytes()[:-20 * len(picture)])
    (tmp_path / "z.tar").write_bytes(b"no tar" * 1000)
    assert compute(folder / "m.onnx", tmp_path, tmp_path / "*.tar") == [(6, 2), (6, 3), (1, 1)]
    errors = {path[len(str(tmp_path)) + 1:]: error for path, (error, _) in rows(tmp_path).items()}
    whole = ["a/1.png", "../../up.png", "/abs\\udcff.png"]
    assert [name for name, error in errors.items() if error is None] == [
        "x.tar/" + name for name in whole + ["2.png"]] + ["y.tar/" + name for name in whole]
    assert "link" in errors["x.tar/link.png"] and errors["y.tar"] and errors["z.tar"]


def test_image_bombs_and_empty_cells_in_parquet(folder, tmp_path):
    bomb = io.BytesIO()
    Image.new("1", (10000, 10000)).save(bomb, "PNG")
    good, path = (folder / "images" / "im0.png").read_bytes(), str(tmp_path / "x.parquet")
    parquet.write_table(pyarrow.table({"name": ["bomb", "none", None, "good"], "image": [
        {"bytes": data} for data in (bomb.getvalue(), None, good, good)]}), path)
    columns = ["--path-column", "name", "--bytes-column", "image.bytes"]
    assert compute(folder / "m.onnx", tmp_path, path, *columns) == [(4, 2)]
    errors = {path: error for path, (error, _) in rows(tmp_path).items()}
    assert "10000 x 10000 pixels are too many" in errors.pop("bomb")
    assert errors == {"none": "no bytes", path + " row group 0 row 2": None, "good": None}
    with pytest.raises(ValueError, match="has the columns image.bytes, name, not path and bytes"):
        shards(path)


def test_network_error_is_not_the_images_fault(folder, tmp_path, monkeypatch):
    """It makes no row: the shard is tried again."""
    def broken(*_, **__):
        raise OSError(5, "Input/output error")
    monkeypatch.setattr("lib.gallery.worker.preprocess", broken)
    with pytest.raises(OSError, match="Input/output error"):
        compute(folder / "m.onnx", tmp_path, folder / "a.parquet")
    assert not list(tmp_path.iterdir())


def test_versions_must_be_the_same_on_all_machines(folder, tmp_path):
    with pytest.raises(ValueError, match="it has numpy .*, not 1.0"):
        compute(folder / "m.onnx", tmp_path, folder / "a.parquet", versions=dict(versions(), numpy="1.0"))


def test_part_on_hdfs_appears_by_a_rename(tmp_path):
    """This class opens HDFS. The part replaces an earlier one."""
    import pyarrow.fs
    from fsspec.implementations.arrow import ArrowFSWrapper
    fs = ArrowFSWrapper(pyarrow.fs.LocalFileSystem())
    for text in (b"first", b"second"):
        (tmp_path / "new").write_bytes(text)
        put(str(tmp_path / "new"), fs, str(tmp_path / "part"))
        assert (tmp_path / "part").read_bytes() == text and len(list(tmp_path.iterdir())) == 2


def test_progress_without_a_terminal_is_a_line_a_minute(capsys, monkeypatch):
    report, now = gallery.Report(1000, None), time.monotonic()
    report.start = now - 100
    report.add(250, 3, [])
    report.look(0)
    monkeypatch.setattr(gallery.time, "monotonic", lambda: now + gallery.PROGRESS_SECONDS)
    report.look(70)
    report.look(80)
    assert capsys.readouterr().out == "320 of 1000 images, 3 errors, 2.0 images/s, 6 min left\n"


def test_ray_error_on_one_line():
    text = "The actor died\n\x1b[36mray::Worker\x1b[39m (pid=1)\n  ^^^\nModuleNotFoundError: No module named 'lib'"
    assert gallery.why(RuntimeError(text)) == "RuntimeError: ModuleNotFoundError: No module named 'lib'"
    assert gallery.why(OSError("lost\nat sea")) == "lost at sea"


# --- the command, on this machine ----------------------------------------------------------------------------------------------

def run(folder, *arguments, tool=TOOL, runner=subprocess.run, **environment):
    """Runs the tool in a folder; returns the finished process, or with subprocess.Popen the running one."""
    return runner([sys.executable, tool, "--onnx", "m.onnx"] + [str(argument) for argument in arguments], cwd=str(folder),
                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ, **environment))


@pytest.fixture(scope="module")
def first(folder):
    """The output of a run over the folder of images, and the process.

    The script is started through a symbolic link, from a folder with another package named lib.
    """
    (folder / "lib").mkdir()
    (folder / "lib" / "__init__.py").write_text("raise ImportError('this is another lib')\n")
    os.symlink(TOOL, str(folder / "link.py"))
    done = run(folder, "images", "--output", "out", "--shard-size", 5, tool=str(folder / "link.py"))
    assert done.returncode == 0, (done.stdout, done.stderr)
    return folder / "out", done


def test_folder_of_images(folder, first):
    output, done = first
    assert done.stderr == "note: %s\n" % ASSUMED
    assert re.match(r"out: 22 images in 5 parts, 2 images cannot be read; .*\n"
                    r"\d+ workers on 1 nodes, 0 lost; 0 parts started again\n$", done.stdout)
    found = check_once(output, all_images(folder / "images"))
    assert sorted(path for path, (error, _) in found.items() if error) == ["b/empty.png", "cut.jpg"]
    schema = parquet.read_schema(str(output / "part-000000.parquet"))
    assert schema.names == ["path"] + list(PETA) + ["error"]
    assert {str(schema.field(name).type) for name in PETA} == {"float"} and str(schema.field("path").type) == "string"
    manifest = json.loads((output / "_manifest.json").read_text())
    assert manifest["values"] == "logits" and manifest["attributes"] == list(PETA) and len(manifest["model"]["sha256"]) == 64
    assert {"onnxruntime", "numpy", "Pillow", "ray", "pyarrow", "python"} == set(manifest["versions"])


def test_documented_query(folder, first, monkeypatch):
    with open(os.path.join(ROOT, "docs", "gallery.md"), encoding="utf-8") as f:
        query = re.search(r'duckdb -c "(SELECT .*?)"', f.read(), re.DOTALL).group(1)
    monkeypatch.chdir(folder)
    os.symlink("out", "attributes")
    male, backpack = PETA.index("personalMale"), PETA.index("carryingBackpack")
    expected = {path for path, (error, values) in rows(first[0]).items() if error is None and values[male] < 0 <= values[backpack]}
    assert {path for path, in duckdb.sql(query).fetchall()} == expected and 0 < len(expected) < 20


def test_only_missing_parts_are_computed(folder, first, cluster):
    """On another machine too, to the byte. A finished run needs no Ray."""
    cluster.need(1)
    output, _ = first
    done = run(folder, "images", "--output", "out", "--shard-size", 5, RAY_ADDRESS="nowhere:1")
    assert done.returncode == 0 and done.stdout == "out: 5 of 5 parts are there already\n", done.stderr
    before = contents(output)
    os.remove(str(output / "part-000003.parquet"))
    done = run(folder, "images", "--output", "out", "--shard-size", 5, "--address", cluster.address)
    assert done.stdout.startswith("out: 4 of 5 parts are there already\nout: 5 images in 1 parts, "), done.stderr
    assert contents(output) == before


def check_refused(text, *arguments, output="out"):
    """Checks that a command line is refused with this text before Ray is started."""
    with pytest.raises((OSError, ValueError), match=text):
        gallery.main([str(argument) for argument in ("--onnx", "m.onnx", "--output", output) + arguments])


def test_folder_of_another_run_is_refused(folder, first, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    write_model(folder / "n.onnx", 4, bias=0.5)
    (folder / "one.txt").write_text("im0.png\n")
    for text, arguments in (("model.sha256: ", ["images", "--shard-size", 5, "--onnx", "n.onnx"]),
                            ("input.shard_size: 5 there, 6 now", ["images", "--shard-size", 6]),
                            ("input.kind: list there, tar now", ["a.tar"]),
                            ("input.sha256: ", ["one.txt", "--root", "images", "--shard-size", 5]),
                            ("values: logits there, probabilities now", ["images", "--shard-size", 5, "--probabilities"])):
        check_refused("out: was started with other settings: .*" + text, *arguments)
    (tmp_path / "part-000000.parquet").write_bytes(b"")
    check_refused("holds 1 parts but no _manifest.json", "images", output=tmp_path)


def test_errors_before_work(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    out = tmp_path / "out"
    check_error(run(folder, "nowhere", "--output", out), "nowhere: no such file or folder")
    check_error(run(folder, "images", "--output", out, "--onnx", "m.om"), code=2)
    (tmp_path / "ray.py").write_text("raise ImportError('No module named ray')")
    check_error(run(folder, "images", "--output", out, PYTHONPATH=str(tmp_path)), "No module named ray; run: ",
                "-m pip install -r %s/tools/requirements-gallery.txt" % ROOT)
    (folder / "names.txt").write_text("\n".join(["Path"] + list(PETA)[1:]))
    (tmp_path / "gbk.txt").write_bytes("\u884c\u4eba.png\n".encode("gbk"))
    for text, *arguments in (
            ("give --root", "list.txt"), ("--root is for a list file", "images", "--root", "images"),
            ("all in .parquet", "a.tar", "a.parquet"),
            ("none of its first 22 images is in", "list.txt", "--root", "images/b/b"),
            ("columns would have the name path or error", "images", "--attributes", "names.txt"),
            ("cannot be opened", "nonsense://bucket/list.txt", "--root", "images"),
            ("is not UTF-8 text", tmp_path / "gbk.txt", "--root", "images")):
        check_refused(text, *arguments, output=out)
    assert not out.exists()


# --- on an S3 server -------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def s3(folder):
    """A file system with images/, list.txt, a.tar and a.parquet in a bucket. The environment's variables lead to its server."""
    import fsspec
    from moto.server import ThreadedMotoServer
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("ENDPOINT_URL", "http://%s:%d" % server.get_host_and_port()), ("ACCESS_KEY_ID", "a"),
                            ("SECRET_ACCESS_KEY", "b"), ("DEFAULT_REGION", "us-east-1")):
            patch.setenv("AWS_" + name, value)
        fs = fsspec.filesystem("s3")
        fs.mkdir("crops")
        for name in "images", "list.txt", "a.tar", "a.parquet":
            fs.put(str(folder / name), "crops/" + name, recursive=True)
        yield fs
    server.stop()


@pytest.mark.parametrize("arguments, prefix", [
    (["s3://crops/images"], ""), (["s3://crops/list.txt", "--root", "s3://crops/images"], ""),
    (["s3://crops/*.tar"], "s3://crops/a.tar/"), (["s3://crops/a.parquet"], "")])
def test_s3_gives_the_same_as_the_disk(folder, s3, cluster, first, tmp_path, arguments, prefix):
    output = "s3://crops/%s" % tmp_path.name
    if arguments != ["s3://crops/images"]:  # one of them with Ray is enough
        compute(folder / "m.onnx", output, *arguments, "--shard-size", 8)
    else:
        cluster.need(1)
        command = arguments + ["--output", output, "--shard-size", 8, "--address", cluster.address]
        done = run(folder, *command)
        assert done.returncode == 0 and "22 images in 3 parts, 2 images cannot be read" in done.stdout, (done.stdout, done.stderr)
        assert run(folder, *command).stdout.endswith(": 3 of 3 parts are there already\n")
    expected = check_once(first[0], all_images(folder / "images"))
    s3.get(output, str(tmp_path / "out"), recursive=True)
    found = check_once(tmp_path / "out", [prefix + name for name in expected])
    for name, (error, values) in expected.items():
        assert (found[prefix + name][0] is None) == (error is None)
        assert found[prefix + name][1].tobytes() == values.tobytes()


# --- on a cluster: what is killed, and what joins ----------------------------------------------------------------------------

CONFIG = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_timeout_ms": 3000,
          "health_check_failure_threshold": 3}  # a node that does not answer is taken for lost after seconds, not half a minute
SHARDS = 36


class Cluster(object):
    """A head without cores, and nodes of one core each, all on this machine."""

    def __init__(self, folder):
        from ray import cluster_utils
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        os.environ["RAY_TMPDIR"] = folder  # where Ray notes which cluster runs on this machine, in a folder ray that it expects
        os.mkdir(os.path.join(folder, "ray"))
        self.cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={
            "num_cpus": 0, "include_dashboard": False, "temp_dir": folder, "_system_config": CONFIG})
        self.address, self.nodes = self.cluster.address, []

    def need(self, count):
        """Starts or kills nodes until this many are alive."""
        while len(self.nodes) > count:
            self.kill(self.nodes[-1])
        while len(self.nodes) < count:
            self.nodes.append(self.cluster.add_node(num_cpus=1))
        self.wait()

    def pids(self, node, name=""):
        """The processes of a node whose titles begin with a name: the raylet and its children."""
        raylet = node.all_processes["raylet"][0].process.pid
        children = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(raylet)], stdout=subprocess.PIPE, text=True).stdout
        found = [line.split(None, 1) for line in children.splitlines()] + [(raylet, "")]
        return [int(pid) for pid, title in found if title.startswith(name)]

    def signal(self, node, number):
        """Sends a signal to all processes of a node."""
        for pid in self.pids(node):
            os.kill(pid, number)

    def kill(self, node):
        self.signal(node, signal.SIGKILL)
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def wait_for_workers(self, process):
        """Waits until a worker has begun to compute on each node."""
        waiting = self.nodes
        while waiting:
            assert process.poll() is None, process.communicate()
            waiting = [node for node in waiting if not self.pids(node, "ray::Worker.work")]

    def wait(self):
        """Waits until the head knows how many nodes there are."""
        while sum(node["Alive"] for node in self.cluster.global_state.node_table()) != 1 + len(self.nodes):
            time.sleep(0.1)


@pytest.fixture(scope="module")
def cluster(s3):
    """Its nodes reach the S3 server, because they get this process's environment."""
    with tempfile.TemporaryDirectory(prefix="gallery", dir="/tmp", ignore_cleanup_errors=True) as short:  # sockets' names are short
        found = Cluster(short)
        yield found
        found.cluster.shutdown()
        del os.environ["RAY_TMPDIR"]


@pytest.fixture(scope="module")
def many(folder):
    """many/ with the images of SHARDS shards, ten big pictures under several names each, which take a while. Returns the names."""
    random = np.random.RandomState(0)
    (folder / "many").mkdir()
    for i in range(10 * SHARDS):
        path = folder / "many" / ("%04d.png" % i)
        if i < 10:
            Image.fromarray(random.randint(0, 256, (800, 800, 3)).astype(np.uint8)).save(str(path))
        else:
            os.link(str(path.with_name("%04d.png" % (i % 10))), str(path))
    return all_images(folder / "many")


def start_many(cluster, folder, output):
    return run(folder, "many", "--output", output, "--shard-size", 10, "--address", cluster.address, runner=subprocess.Popen)


def finish(process, output, names, lost, again):
    """Waits for the end. Every image must be there once, with its values. lost, again: the expected lost workers and repeated shards."""
    text, errors = process.communicate()
    assert process.returncode == 0 and all(line.startswith("note: ") for line in errors.splitlines()), (text, errors)
    found = check_once(output, names)
    for number, name in enumerate(sorted(names)):  # each tenth is the same picture
        assert found[name][0] is None and found[name][1].tobytes() == found["%04d.png" % (number % 10)][1].tobytes()
    workers, nodes, lost_workers, repeated = map(int, re.findall(r"\d+", text.strip().split("\n")[-1]))
    assert lost_workers == lost and repeated in again, text
    return workers, nodes, text


def test_killed_worker_killed_node_and_unreachable_node_are_replaced(cluster, folder, many, tmp_path):
    """The worker is killed as if memory were short. The unreachable node is stopped. It goes on after the head has given it up."""
    cluster.need(3)
    process = start_many(cluster, folder, tmp_path / "out")
    cluster.wait_for_workers(process)
    pid, = cluster.pids(cluster.nodes[0], "ray::Worker")
    os.kill(pid, signal.SIGKILL)
    cluster.kill(cluster.nodes[-1])
    node = cluster.nodes.pop()
    cluster.signal(node, signal.SIGSTOP)
    cluster.wait()
    cluster.signal(node, signal.SIGCONT)
    finish(process, tmp_path / "out", many, lost=3, again=range(1, 7))
    cluster.cluster.remove_node(node, allow_graceful=False)


def test_killed_driver_goes_on_and_a_new_node_is_used(cluster, folder, many, tmp_path):
    cluster.need(1)
    process = start_many(cluster, folder, tmp_path / "out")
    while len(list((tmp_path / "out").glob("part-*.parquet"))) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    while cluster.pids(cluster.nodes[0], "ray::Worker"):  # until Ray has ended the worker of the killed driver
        time.sleep(0.1)
    process = start_many(cluster, folder, tmp_path / "out")
    cluster.wait_for_workers(process)
    worker, = cluster.pids(cluster.nodes[0], "ray::Worker")
    os.kill(worker, signal.SIGSTOP)  # so that work is left when the new node's worker is ready, however slow the machine is
    cluster.need(2)
    cluster.wait_for_workers(process)
    os.kill(worker, signal.SIGCONT)
    workers, nodes, text = finish(process, tmp_path / "out", many, lost=0, again=(0,))
    assert (workers, nodes) == (2, 2)
    there = int(re.search(r"(\d+) of %d parts are there already" % SHARDS, text).group(1))
    assert 3 <= there < SHARDS and "%d images in %d parts" % (10 * (SHARDS - there), SHARDS - there) in text


if OLD:  # Ray does not support this Python: only the script's error is tested
    for test in [name for name in globals() if name.startswith("test_") and name != "test_python_too_old_for_ray_is_named"]:
        del globals()[test]
