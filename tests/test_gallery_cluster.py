"""tools/gallery.py on a real Ray cluster and on an S3 server: each image once, whatever is killed, unreachable or unfit."""
import os
import re
import signal
import subprocess
import tempfile
import time

import pytest

from helpers import all_images, check_error, check_once, contents, finish_gallery, run_gallery

pytest.importorskip("ray")
fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def folder(gallery_folder):
    return gallery_folder


@pytest.fixture(scope="module")
def bucket(s3_server, gallery_folder):
    """A file system with images/, list.txt, a.tar and a.parquet in a bucket."""
    fs = fsspec.filesystem("s3")
    fs.mkdir("pedestrians")
    for name in "images", "list.txt", "a.tar", "a.parquet":
        fs.put(str(gallery_folder / name), "pedestrians/" + name, recursive=True)
    return fs


CONFIG = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_timeout_ms": 3000,
          "health_check_failure_threshold": 3}  # a node that does not answer is taken for lost after seconds, not half a minute


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
def cluster(s3_server):
    """Its nodes reach the S3 server, because they get this process's environment."""
    with tempfile.TemporaryDirectory(prefix="gallery", dir="/tmp", ignore_cleanup_errors=True) as short:  # sockets' names are short
        found = Cluster(short)
        yield found
        found.cluster.shutdown()
        del os.environ["RAY_TMPDIR"]


def start_many(cluster, folder, output):
    return run_gallery(folder, "many", "--output", output, "--shard-size", 10, "--address", cluster.address, runner=subprocess.Popen)


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
    finish_gallery(process, tmp_path / "out", many, lost=3, again=range(1, 7))
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
    workers, nodes, text = finish_gallery(process, tmp_path / "out", many, lost=0, again=(0,))
    assert (workers, nodes) == (2, 2)
    there = int(re.search(r"(\d+) of %d parts are there already" % 18, text).group(1))
    assert 3 <= there < 18 and "%d images in " % (10 * (18 - there)) in text


def test_parts_are_those_of_one_machine(cluster, folder, tmp_path):
    """To the byte: a run goes on here or there."""
    cluster.need(1)
    command = "images", "--output", tmp_path / "out", "--shard-size", 5
    assert run_gallery(folder, *command).returncode == 0
    before = contents(tmp_path / "out")
    os.remove(str(tmp_path / "out" / "part-000003.parquet"))
    done = run_gallery(folder, *command, "--address", cluster.address)
    assert "4 of 5 parts are there already" in done.stdout, done.stderr
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("arguments, prefix", [
    (["s3://pedestrians/images"], ""), (["s3://pedestrians/list.txt", "--root", "s3://pedestrians/images"], ""),
    (["s3://pedestrians/*.tar"], "s3://pedestrians/a.tar/"), (["s3://pedestrians/a.parquet"], "")])
def test_s3_gives_the_same_as_the_disk(folder, bucket, cluster, tmp_path, arguments, prefix):
    output = "s3://pedestrians/%s" % tmp_path.name
    command = arguments + ["--output", output, "--shard-size", 8]
    if arguments == ["s3://pedestrians/images"]:
        cluster.need(1)
        command += ["--address", cluster.address]
    done = run_gallery(folder, *command)
    assert done.returncode == 0 and re.search("22 images in [13] parts, 2 images cannot be read", done.stdout), (done.stdout, done.stderr)
    assert re.search("([13]) of \\1 parts are there already", run_gallery(folder, *command).stdout)
    assert run_gallery(folder, "images", "--output", tmp_path / "local", "--shard-size", 5).returncode == 0
    expected = check_once(tmp_path / "local", all_images(folder / "images"))
    bucket.get(output, str(tmp_path / "out"), recursive=True)
    found = check_once(tmp_path / "out", [prefix + name for name in expected])
    for name, (error, values) in expected.items():
        assert (found[prefix + name][0] is None) == (error is None)
        assert found[prefix + name][1].tobytes() == values.tobytes()


def test_node_that_cannot_read_the_images_is_left_out(cluster, folder, bucket, tmp_path):
    """It reaches no S3 server. The run goes on when the worker of the other node dies."""
    cluster.need(1)
    unfit = cluster.cluster.add_node(num_cpus=1, env_vars={"AWS_ENDPOINT_URL": "http://127.0.0.1:1"})
    process = run_gallery(folder, "s3://pedestrians/images", "--output", tmp_path, "--shard-size", 4, "--address", cluster.address,
                          runner=subprocess.Popen)
    try:
        while not list(tmp_path.glob("part-*")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        for pid in cluster.pids(cluster.nodes[0], "ray::Worker"):
            os.kill(pid, signal.SIGKILL)
        text, errors = process.communicate()
        assert process.returncode == 0, errors
        assert re.search(r"note: node \S+ \(\S+\) cannot read the images: s3://pedestrians/images/.*left out", errors)
        assert "1 nodes, " in text
        check_once(tmp_path, all_images(folder / "images"))
    finally:
        cluster.cluster.remove_node(unfit, allow_graceful=False)


def test_lost_head_ends_the_run(cluster, folder, many, tmp_path):
    """The cluster is useless afterwards, so this is the last test."""
    cluster.need(1)
    process = start_many(cluster, folder, tmp_path)
    cluster.wait_for_workers(process)
    for pid in cluster.pids(cluster.nodes[0], "ray::Worker"):
        os.kill(pid, signal.SIGSTOP)  # so that work is left
    for infos in cluster.cluster.head_node.all_processes.values():
        for info in infos:
            info.process.kill()
    done = subprocess.CompletedProcess([], process.wait(), *process.communicate())
    check_error(done, "the head of the cluster, ", "does not answer")
