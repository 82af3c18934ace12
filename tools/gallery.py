"""The attributes of any number of images, as Parquet files: without bins or labels, on one machine or on a cluster of Ray.

    python3 tools/gallery.py crops/ --onnx deepmar_bs8_nopad.onnx --output attributes/
    python3 tools/gallery.py list.txt --root crops/ --onnx deepmar_bs8_nopad.onnx --output attributes/ --address auto
    python3 tools/gallery.py 'shards/*.tar' --onnx deepmar_bs8_nopad.onnx --output attributes/

The images are those of a folder and the folders below it, of a list file (a path in --root a line), of WebDataset tars, or
of Parquet files with a column of paths and one of the images' bytes; here, or on any file system that fsspec opens, such as
s3://bucket/crops. Writes OUTPUT/part-000000.parquet ..., a row an image: path, a column of logits for each attribute, and
error (why it could not be read, else null). The logits are those that stages 4 to 6 would write, to the bit.

About 1000 images at a time make a part. A run that was stopped or killed goes on where it was: start it again. It must be the
same model, images and options, which OUTPUT/_manifest.json holds; so every image is in exactly one part.

Each worker takes one core, or as much as --cpus, --gpus and --npus say (0.25: four share a device), and there are as many as
the machine or the cluster has room for; those of a node that is lost are replaced, a node that joins gets some. On a cluster,
every node needs the checkout and its packages in the same place, the images and OUTPUT; the model travels by itself. Needs
Python 3.10 or later and the packages of tools/requirements-gallery.txt.
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

HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]
from common import Silent, command, cores, importing, note, one_line, progress, some
from gallery_shards import absolute, find_input, open_binary
from gallery_worker import REMOTE_READERS, Worker, filesystem, is_local, part_name, versions, whole
from postprocess_deepmar_pytorch import ASSUMED, PETA, attribute_names
from providers import CPU, PROVIDERS
from remove_pad import load
from session import input_size, open_session, takes_uint8

PYTHON = (3, 10)  # Ray's oldest
NEEDS = "%s -m pip install -r %s" % (sys.executable, os.path.join(HERE, "requirements-gallery.txt"))
GROW = 2          # seconds after which the driver looks for new nodes
MINUTE = 60       # seconds between two lines of progress, where there is no terminal
ASKED = 100       # workers that the driver asks, each time that it looks, how far they are
START, COUNT = -1, -2  # what a worker was called for, where it is no shard
TRIES = 5         # of a shard whose worker is lost, or that cannot be read or written, which is no fault of an image
MANIFEST, LIST = "_manifest.json", "_list.txt"
RECORDED = ("ray", "pyarrow", "python")  # versions that may change between two runs, as no logit depends on them


# --- the output folder ---------------------------------------------------------------------------------------------------

def flat(value, name=""):
    """The values of a manifest by their names, such as {"model.sha256": "..."}."""
    if not isinstance(value, dict):
        return {name: value}
    return {key: item for part in value for key, item in flat(value[part], name + "." * bool(name) + part).items()}


def differences(theirs, ours):
    """What keeps two manifests from being of one run, as text for the user."""
    theirs, ours = (collections.OrderedDict((name, value) for name, value in flat(manifest).items()
                                            if name.rpartition(".")[2] not in RECORDED) for manifest in (theirs, ours))
    return ["%s: %s there, %s now" % (name, theirs.get(name), ours.get(name))
            for name in list(ours) + [name for name in theirs if name not in ours] if theirs.get(name) != ours.get(name)]


def begin(output, manifest, found):
    """Makes the output folder this run's; returns a bytearray with a 1 for each part that is there already.

    Raises ValueError where the folder is that of another run.
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
            raise ValueError("%s: was begun with something else: %s. Give another --output, or what it was begun with"
                             % (output, "; ".join(other)))
    elif parts:
        raise ValueError("%s: holds %d parts but no %s, so nobody knows what they are of; give another --output"
                         % (output, len(parts), MANIFEST))
    if not parts:
        if found.list is not None:
            publish_list(output, found)
        with whole("%s/%s" % (output, MANIFEST)) as temporary, open(temporary, "w", encoding="utf-8") as f:
            json.dump(manifest, f, indent=1, ensure_ascii=False)
            f.write("\n")
    done = bytearray(found.count)
    for number in parts:
        if number >= found.count:
            raise ValueError("%s: is no part of this run" % part_name(output, number))
        done[number] = 1
    return done


def publish_list(output, found):
    """Copies the list into the output folder, where the workers read it; raises ValueError if it is no longer the same."""
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
    """The workers of a run, and the shards that they have under way.

    Plain actors of Ray, not Ray Data: a shard that is finished stays so, whatever becomes of the node that computed it, and
    one that costs its worker's life again and again does not hold up the others.
    """

    def __init__(self, args, job, model):
        import ray
        self.ray, self.job, self.wanted = ray, job, args.actors
        self.needs = {"CPU": args.cpus, "GPU": args.gpus, "NPU": args.npus}
        self.at_once = 1 if job["provider"] == CPU else 2  # a device has no time to wait for the end of a shard
        self.actor = ray.remote(Worker).options(
            num_cpus=args.cpus, num_gpus=args.gpus, resources={"NPU": args.npus} if args.npus else None, max_restarts=0,
            max_concurrency=self.at_once + 1)  # one more, which answers how far it is
        self.model = ray.put(model)
        self.events = queue.SimpleQueue()  # (worker, shard's number or START or COUNT, future)
        self.workers, self.idle = set(), []  # idle: a worker once for each shard that it could take
        self.counts = {}  # images that a worker has computed of the shards that it has under way, as it last said
        self.asked = collections.deque()  # the workers that can be asked, the one that waits longest first
        self.nodes = set()
        self.unfit = self.lost = self.stillborn = 0
        self.looked = -GROW

    def room(self):
        """How many workers the nodes that are alive have room for."""
        room = 0
        for node in self.ray.nodes():
            fit = min(int(node["Resources"].get(name, 0) / need + 1e-6) for name, need in self.needs.items() if need)
            if node["Alive"] and fit:
                self.nodes.add(node["NodeID"])
                room += fit
        return room

    def grow(self):
        """Starts the workers that are missing, if it is time to look."""
        if time.monotonic() < self.looked + GROW:
            return
        self.looked = time.monotonic()
        room = self.room()
        for _ in range((self.wanted or room - self.unfit) - len(self.workers)):
            worker = self.actor.remote(self.job)
            self.workers.add(worker)
            self.call(worker, START, worker.start.remote(self.model))
        for _ in range(min(ASKED, len(self.asked))):
            worker = self.asked.popleft()
            self.call(worker, COUNT, worker.count.remote())

    def call(self, worker, number, reference):
        reference.future().add_done_callback(lambda future: self.events.put((worker, number, future)))

    def give(self, number, shard):
        """Gives a shard to an idle worker."""
        worker = self.idle.pop()
        self.call(worker, number, worker.work.remote(number, shard))

    def under_way(self):
        """The images that are computed and not yet in a part, about."""
        return sum(self.counts.values())

    def next(self):
        """Waits for a shard; returns (its number, what Worker.work() returned, None or the error), or None after a while."""
        self.grow()
        try:
            worker, number, future = self.events.get(timeout=GROW)
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
                self.stillborn = 0
                self.counts[worker] = 0
                self.idle += [worker] * (self.at_once if number == START else 1)
                if number == START:
                    self.asked.append(worker)
        return None if number in (START, COUNT) else (number, None if error else future.result(), error)

    def drop(self, worker, number, error):
        """Forgets a worker that died, or that cannot start where it is."""
        self.workers.remove(worker)
        self.idle = [other for other in self.idle if other != worker]
        self.counts.pop(worker, None)
        self.ray.kill(worker)  # it may be alive where the network does not reach
        if number != START:
            self.lost += 1
            return
        if isinstance(error, self.ray.exceptions.RayActorError):
            self.stillborn += 1
        else:
            self.unfit += 1
        if not self.workers and self.unfit or self.stillborn > TRIES * (len(self.workers) + 1):
            raise ValueError("no worker can start: %s" % why(error))
        note("a worker cannot start: %s" % why(error))


def why(error):
    """An error of Ray's on one line: what a worker raised, or what became of the worker."""
    cause = getattr(error, "cause", None) or error
    text = re.sub("\x1b\\[[0-9;]*m", "", one_line(cause))  # Ray colours its texts
    last = str(cause).strip().split("\n")[-1]
    if re.match(r"\w+(Error|Exception): ", last):
        text = last  # the lines before it are a traceback
    name = "" if isinstance(cause, (OSError, ValueError, ImportError)) else type(cause).__name__ + ": "
    return (name + text)[:400]


def compute(pool, found, output, done, report):
    """Has the pool compute all parts that are not done; raises ValueError for those that cannot be computed."""
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
        report.look(pool.under_way())
        event = pool.next()
        if event is None:
            continue
        number, result, error = event
        if error is None:
            report.add(*result)
        else:
            tries[number] += 1
            if tries[number] < TRIES:
                again.append(number)
                report.repeated += 1
                continue
            failed[number] = why(error)
        left -= 1
    if failed:
        raise ValueError("%d of %d parts cannot be computed, each tried %d times; the others are written: %s" % (
            len(failed), found.count, TRIES, some("%s (%s)" % (part_name(output, n), text) for n, text in failed.items())))


class Report(object):
    """Counts the images, and tells how far the run is: with a bar on a terminal, elsewhere with a line a minute."""

    def __init__(self, total, most):
        self.total, self.most = total, most  # images, if they are known; errors that are allowed, None for any number
        self.images = self.errors = self.repeated = 0
        self.bar = progress(total, "image")
        self.start = None  # when there is a worker
        self.told = time.monotonic()

    def add(self, images, errors, example):
        self.images, self.errors = self.images + images, self.errors + errors
        if self.most is not None and self.errors > self.most:
            raise ValueError("%d images cannot be read, more than --max-errors %d: %s" % (
                self.errors, self.most, some("%s (%s)" % item for item in example)))

    def seconds(self):
        return max(time.monotonic() - (self.start or time.monotonic()), 1e-9)

    def rate(self):
        return self.images / self.seconds()

    def look(self, under_way):
        """Tells how far the run is; without a terminal, if a minute has passed. under_way: images computed, not yet in a part."""
        images = self.images + under_way
        if not isinstance(self.bar, Silent):
            self.bar.set_postfix(errors=self.errors, refresh=False)
            self.bar.update(images - self.bar.n)
        elif time.monotonic() >= self.told + MINUTE:
            self.told = time.monotonic()
            rate = images / self.seconds()
            rest = "" if not self.total or not images else ", %d min left" % -(-(self.total - images) / rate // 60)
            print("%d%s images, %d errors, %.1f images/s%s" % (
                images, " of %d" % self.total if self.total else "", self.errors, rate, rest), flush=True)


# --- the command line -----------------------------------------------------------------------------------------------------

def parse(argv):
    def whole_number(least):
        def convert(text):
            if int(text) < least:
                raise ValueError
            return int(text)
        return convert

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("input", nargs="+", metavar="INPUT", help="a folder, a list file, tars, or Parquet files; a pattern in quotes")
    parser.add_argument("--onnx", metavar="MODEL", required=True, help="the model, of any batch size")
    parser.add_argument("--output", metavar="FOLDER", required=True, help="a new folder, or that of the run that is to go on")
    parser.add_argument("--root", metavar="FOLDER", help="the folder of a list's images")
    parser.add_argument("--path-column", default="path", metavar="NAME", help="of Parquet files (default: path)")
    parser.add_argument("--bytes-column", default="bytes", metavar="NAME", help="of Parquet files (default: bytes)")
    parser.add_argument("--attributes", metavar="FILE",
                        help="the attributes' names, one a line (default: the model's own, else PETA's if there are 35)")
    parser.add_argument("--probabilities", action="store_true", help="write the sigmoid of the logits")
    parser.add_argument("--max-errors", type=whole_number(0), metavar="N",
                        help="stop where more images cannot be read (default: note them and go on)")
    parser.add_argument("--shard-size", type=whole_number(1), default=1000, metavar="N",
                        help="images a part, of a folder or list (default: 1000); a tar or a row group is a part")
    parser.add_argument("--address", metavar="HOST", help="of a cluster's head, or auto: the one that this machine belongs to "
                                                          "(default: this machine alone)")
    parser.add_argument("--actors", type=whole_number(1), metavar="N", help="workers (default: as many as there is room for)")
    parser.add_argument("--cpus", type=whole_number(1), default=1, metavar="N", help="cores of a worker (default: 1)")
    parser.add_argument("--gpus", type=float, default=0, metavar="N", help="GPUs of a worker; may be a fraction")
    parser.add_argument("--npus", type=float, default=0, metavar="N", help="Ascend NPUs of a worker; may be a fraction")
    args = parser.parse_args(argv)
    if args.gpus < 0 or args.npus < 0 or args.gpus and args.npus:
        parser.error("give either --gpus or --npus, above 0")
    if args.onnx.endswith(".om"):
        parser.error("--onnx: %s is an OM, which only the card runs; give the ONNX model" % args.onnx)
    return args


def import_libraries():
    """Imports what this script alone needs; raises ValueError, with the command that installs it."""
    if sys.version_info < PYTHON:
        raise ValueError("Ray needs Python %d.%d or later, and this is %d.%d; the rest of the project does not need Ray"
                         % (PYTHON + sys.version_info[:2]))
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing is reported to Ray's makers
    os.environ["RAY_DEDUP_LOGS_SKIP_REGEX"] = "."  # Ray's own words about each worker that is lost
    try:
        with importing(ends=False):
            import fsspec  # noqa: F401
            import pyarrow
            import ray
            import ray.exceptions
    except ImportError as error:
        raise ValueError("%s; run: %s" % (one_line(error), NEEDS))
    return {"ray": ray.__version__, "pyarrow": pyarrow.__version__, "python": "%d.%d.%d" % sys.version_info[:3]}


def examine(args):
    """Returns (the model's bytes, what the manifest says of it, its attributes' names, whether it ends in a Sigmoid)."""
    session = open_session(args.onnx, threads=1, provider=CPU)
    batch_size, height, width = input_size(session)
    output = session.get_outputs()[0]
    if not isinstance(output.shape[1], int):
        raise ValueError("%s: does not say how many attributes it has; its output is %s" % (args.onnx, output.shape))
    names = attribute_names(output.shape[1], args.attributes, args.onnx)
    if names is PETA:
        note(ASSUMED)
    lower = [name.lower() for name in names] + ["path", "error"]  # SQL's names have no case
    twice = [name for name in names if lower.count(name.lower()) > 1]
    if twice:
        raise ValueError("these attributes cannot be columns beside path, error and each other: %s; name them by --attributes"
                         % some(twice))
    with open(args.onnx, "rb") as f:
        model = f.read()
    sigmoid = any(node.op_type == "Sigmoid" and output.name in node.output for node in load(args.onnx).graph.node)
    return model, {"sha256": hashlib.sha256(model).hexdigest(), "batch_size": batch_size, "height": height, "width": width,
                   "input": "uint8" if takes_uint8(session) else "float32"}, list(names), sigmoid


@contextlib.contextmanager
def cluster(address):
    """Connects to a cluster of Ray, or starts one on this machine for the block alone."""
    import ray
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": None if address else False}
    with tempfile.TemporaryDirectory(prefix="gallery", ignore_cleanup_errors=True) as folder:
        try:
            if address:
                ray.init(address=address if ":" in address or address == "auto" else address + ":6379", **quiet)
            else:
                ray.init(address="local", num_cpus=cores(), object_store_memory=2 ** 30, _temp_dir=folder, **quiet)
        except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
            raise ValueError("no cluster of Ray %s: %s" % (
                "at %s" % address if address else "can be started", str(error).strip().split("\n")[-1]))
        try:
            yield
        finally:
            ray.shutdown()


def main(argv=None):
    args = parse(argv)
    recorded = import_libraries()
    model, described, names, sigmoid = examine(args)
    output = absolute(args.output)
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
           "versions": versions(), "calls": args.cpus if provider == CPU else 1,
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
    print("%d workers on %d nodes, %d lost; %d parts begun again" % (len(pool.workers), len(pool.nodes), pool.lost, report.repeated))


if __name__ == "__main__":
    command(main)
