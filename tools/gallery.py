"""Computes the attributes of any number of images, as Parquet files. Needs no bins or labels; one machine or a Ray cluster.

    python3 tools/gallery.py crops/ --onnx deepmar_bs8_nopad.onnx --output attributes/
    python3 tools/gallery.py list.txt --root crops/ --onnx deepmar_bs8_nopad.onnx --output attributes/ --address auto
    python3 tools/gallery.py 'shards/*.tar' --onnx deepmar_bs8_nopad.onnx --output attributes/

The images come from a folder and its subfolders, from a list file (one path in --root per line), from WebDataset tars, or from
Parquet files with a column of paths and a column of the images' bytes. All of these may be local or on any file system that
fsspec opens, such as s3://bucket/crops. The script writes OUTPUT/part-000000.parquet ... with one row per image: path, one
column of logits per attribute, and error (why the image could not be read, else null). The logits are exactly those of stages
4 to 6.

About 1000 images make a part. To continue a run that was stopped or killed, start it again with the same model, images and
options. OUTPUT/_manifest.json records these, so that every image is in exactly one part.

Each worker takes the cores, GPUs and NPUs that --cpus, --gpus and --npus say (0.25: four workers share a device). The script starts
as many workers as the machine or cluster has room for. It replaces the workers of a lost node and starts workers on a new node.
On a cluster, every node needs the checkout and its packages in the same place, and access to the images and OUTPUT. The script
sends the model to the nodes. It needs Python 3.10 or later and the packages of tools/requirements-gallery.txt.
"""
import argparse
import collections
import contextlib
import hashlib
import json
import os
import queue
import re
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from lib.gallery.shards import absolute, find_input, open_binary
from lib.gallery.worker import REMOTE_READERS, Worker, filesystem, is_local, part_name, versions, whole
from lib.labels import ASSUMED, PETA, attribute_names
from lib.machine import cores
from lib.models import load
from lib.providers import CPU, PROVIDERS
from lib.results import ends_in_sigmoid
from lib.script import Silent, command, importing, note, number, one_line, progress, some
from lib.session import calls_at_once, input_size, open_session, takes_uint8

CHECKOUT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
OLDEST_PYTHON = (3, 10)  # the oldest one that Ray supports
INSTALL_COMMAND = "%s -m pip install -r %s" % (sys.executable, os.path.join(CHECKOUT, "tools", "requirements-gallery.txt"))
POLL_SECONDS = 2       # between two looks for new nodes
PROGRESS_SECONDS = 60  # between two lines of progress if there is no terminal
SHARD_SIZE = 1000      # images in a part
MAX_CORES_PER_WORKER = 8  # if no number is given. Its cores share one copy of the model, which is 7 % faster
SHARDS_PER_WORKER = 2  # a worker gets the next shard early, so that it never waits
MAX_ASKED = 100        # at each look, the driver asks this many workers how far they are
MAX_TRIES = 5          # of a shard whose worker is lost, or that cannot be read or written through no fault of an image
START, COUNT = -1, -2  # used in place of a shard's number, for a call to start a worker or to ask how far it is
MANIFEST, LIST = "_manifest.json", "_list.txt"
UNCHECKED_VERSIONS = ("ray", "pyarrow", "python")  # they may change between two runs, because no logit depends on them


# --- the output folder ---------------------------------------------------------------------------------------------------

def flat(value, name=""):
    """Returns a manifest's values as a flat dict, such as {"model.sha256": "..."}."""
    if not isinstance(value, dict):
        return {name: value}
    return {key: item for part in value for key, item in flat(value[part], name + "." + part if name else part).items()}


def differences(theirs, ours):
    """Returns the differences that show that two manifests belong to different runs, as texts for the user."""
    theirs, ours = (collections.OrderedDict((name, value) for name, value in flat(manifest).items()
                                            if name.rpartition(".")[2] not in UNCHECKED_VERSIONS) for manifest in (theirs, ours))
    return ["%s: %s there, %s now" % (name, theirs.get(name), ours.get(name))
            for name in list(ours) + [name for name in theirs if name not in ours] if theirs.get(name) != ours.get(name)]


def begin(output, manifest, found):
    """Prepares the output folder for this run. Returns a bytearray with a 1 for each part that already exists.

    Raises ValueError if the folder belongs to another run.
    """
    fs, path = filesystem(output)
    if is_local(output):
        os.makedirs(output, exist_ok=True)
    names = [name.rstrip("/").rpartition("/")[2] for name in fs.ls(path, detail=False)] if fs.exists(path) else []
    parts = [int(match.group(1)) for match in map(re.compile(r"part-(\d{6,})\.parquet$").match, names) if match]
    if MANIFEST in names:
        try:
            with open_binary("%s/%s" % (output, MANIFEST)) as f:
                earlier = json.loads(f.read().decode("utf-8"))
        except ValueError as error:
            raise ValueError("%s/%s: is damaged: %s" % (output, MANIFEST, one_line(error)))
        other = differences(earlier, manifest)
        if other and parts:
            raise ValueError("%s: was started with other settings: %s. Give another --output, or the same settings again"
                             % (output, "; ".join(other)))
    elif parts:
        raise ValueError("%s: holds %d parts but no %s, so it is unknown which run wrote them; give another --output"
                         % (output, len(parts), MANIFEST))
    if not parts:
        if found.list is not None:
            publish_list(output, found)
        with whole("%s/%s" % (output, MANIFEST)) as temporary, open(temporary, "w", encoding="utf-8") as f:
            json.dump(manifest, f, indent=1, ensure_ascii=False)
            f.write("\n")
    done = bytearray(found.count)
    for part in parts:
        if part >= found.count:
            raise ValueError("%s: is not a part of this run; give another --output" % part_name(output, part))
        done[part] = 1
    return done


def publish_list(output, found):
    """Copies the list into the output folder, where the workers read it. Raises ValueError if it has changed meanwhile."""
    digest = hashlib.sha256()
    found.list.seek(0)
    with whole("%s/%s" % (output, LIST)) as temporary, open(temporary, "wb") as f:
        for block in iter(lambda: found.list.read(2 ** 20), b""):
            digest.update(block)
            f.write(block)
        if digest.hexdigest() != found.settings["sha256"]:
            raise ValueError("the list of images was changed while it was read; start again")


# --- the workers ---------------------------------------------------------------------------------------------------------

class Pool(object):
    """The workers of a run and the shards that they are computing.

    The workers are plain Ray actors, not Ray Data. So a finished shard stays finished even if its node is lost, and a shard
    that kills its worker again and again does not hold up the others.
    """

    def __init__(self, args, job, model):
        import ray
        self.ray, self.job, self.wanted = ray, job, args.actors
        self.needs = {"CPU": args.cpus, "GPU": args.gpus, "NPU": args.npus}
        self.actor = ray.remote(Worker).options(
            num_cpus=args.cpus, num_gpus=args.gpus, resources={"NPU": args.npus} if args.npus else None, max_restarts=0,
            max_concurrency=SHARDS_PER_WORKER + 1)  # the extra call answers how far the worker is
        self.model = ray.put(model)
        self.events = queue.SimpleQueue()  # (worker, shard's number or START or COUNT, future)
        self.workers, self.idle = set(), []  # idle: lists a worker once for each shard that it could take
        self.counts = {}  # for each worker: how many images of its unfinished shards it has computed, by its last answer
        self.asked = collections.deque()  # the workers that can be asked; the first one has waited longest
        self.nodes = set()
        self.unfit = self.lost = self.failed_starts = 0
        self.looked = -POLL_SECONDS

    def room(self):
        """Returns how many workers fit on the live nodes."""
        room = 0
        for node in self.ray.nodes():
            fit = min(int(node["Resources"].get(name, 0) / need + 1e-6) for name, need in self.needs.items() if need)
            if node["Alive"] and fit:
                self.nodes.add(node["NodeID"])
                room += fit
        return room

    def grow(self):
        """Starts missing workers, if POLL_SECONDS have passed since the last look."""
        if time.monotonic() < self.looked + POLL_SECONDS:
            return
        self.looked = time.monotonic()
        room = self.room()
        for _ in range((self.wanted or room - self.unfit) - len(self.workers)):
            worker = self.actor.remote(self.job)
            self.workers.add(worker)
            self.call(worker, START, worker.start.remote(self.model))
        for _ in range(min(MAX_ASKED, len(self.asked))):
            worker = self.asked.popleft()
            self.call(worker, COUNT, worker.count.remote())

    def call(self, worker, number, reference):
        reference.future().add_done_callback(lambda future: self.events.put((worker, number, future)))

    def give(self, number, shard):
        """Gives a shard to an idle worker."""
        worker = self.idle.pop()
        self.call(worker, number, worker.work.remote(number, shard))

    def unfinished(self):
        """Returns about how many images are computed but not yet in a part."""
        return sum(self.counts.values())

    def next(self):
        """Waits for a shard. Returns (its number, the result of Worker.work(), the error or None), or None after POLL_SECONDS."""
        self.grow()
        try:
            worker, number, future = self.events.get(timeout=POLL_SECONDS)
        except queue.Empty:
            return None
        error = future.exception()
        if worker in self.workers:
            if number == COUNT:
                if not error:
                    self.counts[worker] = future.result()
                    self.asked.append(worker)
            elif error and (number == START or isinstance(error, self.ray.exceptions.RayActorError)):
                self.drop(worker, number, error)
            else:
                self.failed_starts = 0
                self.counts[worker] = 0
                if number == START:
                    self.idle += [worker] * SHARDS_PER_WORKER
                    self.asked.append(worker)
                else:
                    self.idle.append(worker)
        return None if number in (START, COUNT) else (number, None if error else future.result(), error)

    def drop(self, worker, number, error):
        """Removes a worker that died or cannot start on its node."""
        self.workers.remove(worker)
        self.idle = [other for other in self.idle if other != worker]
        self.counts.pop(worker, None)
        self.ray.kill(worker)  # it may still be alive on a node that the network does not reach
        if number != START:
            self.lost += 1
            return
        if isinstance(error, self.ray.exceptions.RayActorError):
            self.failed_starts += 1
        else:
            self.unfit += 1
        if not self.workers and self.unfit or self.failed_starts > MAX_TRIES * (len(self.workers) + 1):
            raise ValueError("no worker can start: %s" % why(error))
        note("a worker cannot start: %s" % why(error))


def why(error):
    """Returns a Ray error on one line: the error that a worker raised, or the reason why the worker was lost."""
    cause = getattr(error, "cause", None) or error
    text = re.sub("\x1b\\[[0-9;]*m", "", one_line(cause))  # Ray adds colour codes to its texts
    last = str(cause).strip().split("\n")[-1]
    if re.match(r"\w+(Error|Exception): ", last):
        text = last  # the lines before it are a traceback
    name = "" if isinstance(cause, (OSError, ValueError, ImportError)) else type(cause).__name__ + ": "
    return (name + text)[:400]


def compute(pool, found, output, done, report):
    """Lets the pool compute all parts that are not done. Raises ValueError with the parts that cannot be computed."""
    todo = (number for number in range(found.count) if not done[number])
    left = found.count - sum(done)
    again, tries, failed = [], collections.Counter(), {}
    while left:
        while pool.idle:
            number = again.pop() if again else next(todo, None)
            if number is None:
                break
            report.start = report.start or time.monotonic()
            pool.give(number, found.describe(number))
        report.look(pool.unfinished())
        event = pool.next()
        if event is None:
            continue
        number, result, error = event
        if error is None:
            report.add(*result)
        else:
            tries[number] += 1
            if tries[number] < MAX_TRIES:
                again.append(number)
                report.repeated += 1
                continue
            failed[number] = why(error)
        left -= 1
    if failed:
        raise ValueError("%d of %d parts cannot be computed, each tried %d times; the others are written: %s" % (
            len(failed), found.count, MAX_TRIES, some("%s (%s)" % (part_name(output, n), text) for n, text in failed.items())))


class Report(object):
    """Counts the images and shows the progress: a bar on a terminal, elsewhere a line per minute."""

    def __init__(self, total, most):
        self.total, self.most = total, most  # the number of images, or None; how many errors are allowed, None for any number
        self.images = self.errors = self.repeated = 0
        self.bar = progress(total, "image")
        self.start = None  # the time when the first worker was ready
        self.printed = time.monotonic()

    def add(self, images, errors, example):
        self.images, self.errors = self.images + images, self.errors + errors
        if self.most is not None and self.errors > self.most:
            raise ValueError("%d images cannot be read, more than --max-errors %d: %s" % (
                self.errors, self.most, some("%s (%s)" % item for item in example)))

    def seconds(self):
        return max(time.monotonic() - (self.start or time.monotonic()), 1e-9)

    def rate(self):
        return self.images / self.seconds()

    def look(self, unfinished):
        """Moves the bar, or prints a line if a minute has passed. unfinished: images that are computed but not yet in a part."""
        images = self.images + unfinished
        if not isinstance(self.bar, Silent):
            self.bar.set_postfix(errors=self.errors, refresh=False)
            self.bar.update(images - self.bar.n)
        elif time.monotonic() >= self.printed + PROGRESS_SECONDS:
            self.printed = time.monotonic()
            rate = images / self.seconds()
            rest = "" if not self.total or not images else ", %d min left" % -(-(self.total - images) / rate // 60)
            print("%d%s images, %d errors, %.1f images/s%s" % (
                images, " of %d" % self.total if self.total else "", self.errors, rate, rest), flush=True)


# --- the command line -----------------------------------------------------------------------------------------------------

def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("input", nargs="+", metavar="INPUT", help="a folder, a list file, tars, or Parquet files; a pattern in quotes")
    parser.add_argument("--onnx", metavar="MODEL", required=True, help="the model, of any batch size")
    parser.add_argument("--output", metavar="FOLDER", required=True, help="a new folder, or the folder of a run to continue")
    parser.add_argument("--root", metavar="FOLDER", help="the folder of a list's images")
    parser.add_argument("--path-column", default="path", metavar="NAME", help="the column of paths in Parquet files (default: path)")
    parser.add_argument("--bytes-column", default="bytes", metavar="NAME", help="the column of images in Parquet files (default: bytes)")
    parser.add_argument("--attributes", metavar="FILE",
                        help="a file with the attributes' names, one per line (default: the model's, else PETA's if 35)")
    parser.add_argument("--probabilities", action="store_true", help="write the sigmoid of the logits")
    parser.add_argument("--max-errors", type=number(int, 0), metavar="N",
                        help="stop if more than N images cannot be read (default: record them and go on)")
    parser.add_argument("--shard-size", type=number(int, 1), metavar="N",
                        help="images per part, for a folder or list (default: %d, rounded up to whole batches); each tar "
                             "or row group is one part" % SHARD_SIZE)
    parser.add_argument("--address", metavar="HOST", help="a Ray cluster's head, or auto for the cluster of this machine "
                                                          "(default: this machine alone)")
    parser.add_argument("--actors", type=number(int, 1), metavar="N", help="number of workers (default: as many as fit)")
    parser.add_argument("--cpus", type=number(int, 1), metavar="N",
                        help="cores per worker (default: 1 on a cluster or with devices, else up to %d)" % MAX_CORES_PER_WORKER)
    parser.add_argument("--gpus", type=number(float, 0), default=0, metavar="N", help="GPUs per worker; may be a fraction")
    parser.add_argument("--npus", type=number(float, 0), default=0, metavar="N", help="Ascend NPUs per worker; may be a fraction")
    args = parser.parse_args(argv)
    if args.gpus and args.npus:
        parser.error("give either --gpus or --npus")
    if args.onnx.endswith(".om"):
        parser.error("--onnx: %s is an OM, which only the card runs; give the ONNX model" % args.onnx)
    args.cpus = args.cpus or default_cpus(args)
    return args


def default_cpus(args):
    if args.address or args.gpus or args.npus:
        return 1
    if args.actors:
        return max(1, min(MAX_CORES_PER_WORKER, cores() // args.actors))
    return max(count for count in range(1, MAX_CORES_PER_WORKER + 1) if cores() % count == 0)  # no core is left over


def import_libraries():
    """Imports the libraries that only this script needs. Raises ValueError with the command that installs them."""
    if sys.version_info < OLDEST_PYTHON:
        raise ValueError("Ray needs Python %d.%d or later, but this is %d.%d; the rest of the project does not need Ray"
                         % (OLDEST_PYTHON + sys.version_info[:2]))
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # Ray must not report to its makers
    os.environ["RAY_DEDUP_LOGS_SKIP_REGEX"] = "."  # silences Ray's messages about lost workers
    try:
        with importing(ends=False):
            import fsspec  # noqa: F401
            import pyarrow
            import ray
            import ray.exceptions
    except ImportError as error:
        raise ValueError("%s; run: %s" % (one_line(error), INSTALL_COMMAND))
    return {"ray": ray.__version__, "pyarrow": pyarrow.__version__, "python": "%d.%d.%d" % sys.version_info[:3]}


def examine(args):
    """Returns (the model's bytes, its entry for the manifest, its attributes' names, whether it ends in a Sigmoid)."""
    session = open_session(args.onnx, threads=1, provider=CPU)
    batch_size, height, width = input_size(session)
    output = session.get_outputs()[0]
    if not isinstance(output.shape[1], int):
        raise ValueError("%s: does not fix the number of its attributes; its output is %s" % (args.onnx, output.shape))
    names = attribute_names(output.shape[1], args.attributes, args.onnx)
    if names is PETA:
        note(ASSUMED)
    lower = [name.lower() for name in names] + ["path", "error"]  # names in SQL ignore case
    twice = [name for name in names if lower.count(name.lower()) > 1]
    if twice:
        raise ValueError("these attributes' columns would have the name path or error, or the same name: %s; give other names with "
                         "--attributes"
                         % some(twice))
    with open(args.onnx, "rb") as f:
        model = f.read()
    sigmoid = ends_in_sigmoid(load(args.onnx))
    return model, {"sha256": hashlib.sha256(model).hexdigest(), "batch_size": batch_size, "height": height, "width": width,
                   "input": "uint8" if takes_uint8(session) else "float32"}, list(names), sigmoid


@contextlib.contextmanager
def cluster(address):
    """Connects to a Ray cluster, or starts one on this machine that ends with the block."""
    import ray
    options = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": None if address else False,
               # Workers import lib from the checkout. Ray replaces ${PYTHONPATH} by that of the worker's node.
               "runtime_env": {"env_vars": {"PYTHONPATH": CHECKOUT + ":${PYTHONPATH}"}}}
    with tempfile.TemporaryDirectory(prefix="gallery", ignore_cleanup_errors=True) as folder:
        before = os.getcwd()
        os.chdir(CHECKOUT)  # Ray puts the current folder before PYTHONPATH, and that folder might hold another package named lib
        try:
            if address:
                ray.init(address=address if ":" in address or address == "auto" else address + ":6379", **options)
            else:
                ray.init(address="local", num_cpus=cores(), object_store_memory=2 ** 30, _temp_dir=folder, **options)
        except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
            raise ValueError("no Ray cluster %s: %s" % (
                "at %s" % address if address else "can be started", str(error).strip().split("\n")[-1]))
        finally:
            os.chdir(before)
        try:
            yield
        finally:
            ray.shutdown()


def main(argv=None):
    args = parse(argv)
    recorded = import_libraries()
    model, described, names, sigmoid = examine(args)
    output = absolute(args.output)
    batch_size, size = described["batch_size"], (described["height"], described["width"])
    args.shard_size = args.shard_size or -(-SHARD_SIZE // batch_size) * batch_size  # no part ends with a batch that is half empty
    found = find_input(args, "%s/%s" % (output, LIST))
    provider = PROVIDERS[0 if args.npus else 1 if args.gpus else 2]  # CANN, CUDA, the CPU
    manifest = {"model": described, "input": found.settings, "attributes": names, "provider": provider,
                "values": "probabilities" if args.probabilities else "logits", "versions": dict(versions(), **recorded)}
    done = begin(output, manifest, found)
    there = sum(done)
    if there:
        print("%s: %d of %d parts are there already" % (args.output, there, found.count), flush=True)
    if there == found.count:
        return
    job = {"output": output, "names": names, "sigmoid": sigmoid, "probabilities": args.probabilities, "provider": provider,
           "versions": versions(), "threads": args.cpus,
           "calls": calls_at_once(args.cpus, sys.maxsize, batch_size, *size) if provider == CPU else 1,
           "readers": args.cpus + 1 if is_local(args.root or args.input[0]) else REMOTE_READERS}
    with cluster(args.address):
        pool = Pool(args, job, model)
        if not args.actors and not pool.room():
            raise ValueError("no node has room for a worker of %s" % some("%g %ss" % (n, name) for name, n in pool.needs.items() if n))
        del model
        report = Report(found.images, args.max_errors)
        with report.bar:
            compute(pool, found, output, done, report)
    print("%s: %d images in %d parts, %d images cannot be read; %.1f s, %.1f images/s after the start" % (
        args.output, report.images, found.count - there, report.errors, report.seconds(), report.rate()))
    print("%d workers on %d nodes, %d lost; %d parts started again" % (len(pool.workers), len(pool.nodes), pool.lost, report.repeated))


if __name__ == "__main__":
    command(main)
