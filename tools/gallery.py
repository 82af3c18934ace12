"""Computes the attributes of any number of images, as Parquet files. Needs no bins or labels; one machine or a Ray cluster.

    python3 tools/gallery.py crops/ --model deepmar_bs8_nopad.onnx --output attributes/
    python3 tools/gallery.py list.txt --root crops/ --model deepmar_bs8_nopad.onnx --output attributes/
    python3 tools/gallery.py 'shards/*.tar' --model deepmar_bs8.om --output attributes/ --npus 1 --devices 0,1
    python3 tools/gallery.py s3://bucket/crops --model deepmar_bs8_nopad.onnx --output s3://bucket/attributes --address auto

The images come from a folder and its subfolders, from a list file (one path in --root per line), from WebDataset tars, or from
Parquet files with a column of paths and a column of the images' bytes. All of these may be local or on any file system that
fsspec opens, such as s3://bucket/crops. The script writes OUTPUT/part-000000.parquet ... with one row per image: path, one
column of logits per attribute, and error (why the image could not be read, else null). The logits are exactly those of stages
4 to 6.

About 1000 images make a part. A part is written only when all its images were read or are themselves at fault. If the storage or
a machine fails, the part is tried again for two minutes. Then the run ends with an error. To continue a run that ended or was
killed, start it again with the same model, images and options. OUTPUT/_manifest.json records these, so that every image is in
exactly one part.

Each worker takes the cores, GPUs and NPUs that --cpus, --gpus and --npus say (0.25: four workers share a device). Without --address,
the workers are processes on this machine, and the script needs the packages of tools/requirements-gallery.txt. With it, they
run on a Ray cluster, as many as there is room for. The script replaces the workers of a lost node and starts workers on a new node.
Every node needs the checkout and its packages in the same place, and access to the images and OUTPUT. The script sends the model to
the nodes. It also needs the packages of tools/requirements-cluster.txt, and Python 3.10 or later.
"""
import argparse
import contextlib
import hashlib
import itertools
import os
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from lib.acl import PROVIDER as OM, is_om
from lib.gallery.parts import LIST, begin, check_run, left_out, part_name, publish_list, total
from lib.gallery.pool import Cluster, Processes, Shards, connection
from lib.gallery.shards import find_input
from lib.gallery.storage import absolute, is_local
from lib.gallery.worker import REMOTE_READERS, Images, decode, versions
from lib.images import NV12
from lib.labels import ASSUMED, PETA, attribute_names
from lib.machine import cores
from lib.models import is_twin, load, output_kind
from lib.providers import CPU, PROVIDERS
from lib.results import kind_of, look_like_probabilities
from lib.script import Silent, command, has_module, importing, note, number, one_line, progress, some
from lib.session import (SIZE_ASSUMED, attributes_of, calls_at_once, described_by, fixed_size, input_kind, input_size,
                         open_session, run_batches)

with importing():
    import numpy as np

CHECKOUT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
OLDEST_PYTHON = (3, 10)  # the oldest one that Ray supports
OLDEST_RAY = (2, 52)     # the first one that lets a token protect a cluster
PROGRESS_SECONDS = 60    # between two lines of progress if there is no terminal
SHARD_SIZE = 1000        # images in a part
SAMPLE = 64              # images by which a model's output is judged where its graph does not tell
DEVICES = {"gpus": ("CUDA_VISIBLE_DEVICES", "nvidia"), "npus": ("ASCEND_RT_VISIBLE_DEVICES", "davinci")}


# --- the command line -----------------------------------------------------------------------------------------------------

def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("input", nargs="+", metavar="INPUT", help="a folder, a list file, tars, or Parquet files; a pattern in quotes")
    parser.add_argument("--model", "--onnx", required=True, help="the model, .onnx or .om, of any batch size; an OM runs on NPUs")
    parser.add_argument("--output", metavar="FOLDER", required=True, help="a new folder, or the folder of a run to continue")
    parser.add_argument("--root", metavar="FOLDER", help="the folder of a list's images")
    parser.add_argument("--path-column", default="path", metavar="NAME", help="the column of paths in Parquet files (default: path)")
    parser.add_argument("--bytes-column", default="bytes", metavar="NAME", help="the column of images in Parquet files (default: bytes)")
    parser.add_argument("--attributes", metavar="FILE",
                        help="a file with the attributes' names, one per line (default: the model's, else PETA's if 35)")
    parser.add_argument("--probabilities", action="store_true", help="write the sigmoid of the logits")
    parser.add_argument("--max-errors", type=number(int, 0), metavar="N",
                        help="stop if more than N images cannot be read (default: record them and go on)")
    parser.add_argument("--damaged", choices=("error", "keep"), default="error",
                        help="a damaged tar: an error (the default), or keep its images up to there and a row for the rest")
    parser.add_argument("--duplicates", choices=("error", "keep"), default="error",
                        help="an image that the input names twice: an error (the default), or keep a row for each")
    parser.add_argument("--shard-size", type=number(int, 1), metavar="N",
                        help="images per part, for a folder or list (default: %d, rounded up to whole batches); each tar "
                             "or row group is one part" % SHARD_SIZE)
    parser.add_argument("--address", metavar="HOST", help="a Ray cluster's head, or auto for the cluster of this machine "
                                                          "(default: this machine alone)")
    parser.add_argument("--actors", type=number(int, 1), metavar="N", help="number of workers (default: as many as fit)")
    parser.add_argument("--cpus", type=number(int, 1), metavar="N",
                        help="cores per worker (default: 1 on a cluster or with devices, else all)")
    parser.add_argument("--gpus", type=number(float, 0, 1), default=0, metavar="N", help="GPUs per worker; may be a fraction")
    parser.add_argument("--npus", type=number(float, 0, 1), default=0, metavar="N",
                        help="Ascend NPUs per worker; may be a fraction (default for an OM: 1)")
    parser.add_argument("--devices", metavar="IDS", help="this machine's NPUs or GPUs to use, as 0,1 (default: all)")
    args = parser.parse_args(argv)
    args.npus = args.npus or int(is_om(args.model))
    if args.gpus and args.npus:
        parser.error("give either --gpus or --npus; an OM runs on NPUs")
    if args.devices is not None and (args.address or not args.gpus + args.npus):
        parser.error("--devices: needs --npus or --gpus, and no --address")
    if args.devices is not None and not re.match(r"\d+(,\d+)*$", args.devices):
        parser.error("--devices: must be numbers, as 0,1, not %r" % args.devices)
    args.cpus = args.cpus or (1 if args.address or args.gpus or args.npus else max(1, cores() // (args.actors or 1)))
    return args


def import_libraries(address):
    """Imports the libraries that only this script needs. Returns their versions. Raises ValueError with the command that installs
    them."""
    if address and sys.version_info < OLDEST_PYTHON:
        raise ValueError("Ray needs Python %d.%d or later, but this is %d.%d; without --address, no Ray is needed"
                         % (OLDEST_PYTHON + sys.version_info[:2]))
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # Ray must not report to its makers
    os.environ["RAY_DEDUP_LOGS_SKIP_REGEX"] = "."  # silences Ray's messages about lost workers
    file = "gallery"
    try:
        with importing(ends=False):
            import pyarrow
            if not has_module("fsspec"):  # only urls need to import it, which takes a while
                raise ImportError("No module named 'fsspec'")
            found = {"pyarrow": pyarrow.__version__, "python": "%d.%d.%d" % sys.version_info[:3]}
            if address:
                file = "cluster"
                import ray
                import ray.exceptions
                if tuple(map(int, ray.__version__.split(".")[:2])) < OLDEST_RAY:
                    raise ImportError("Ray %s lets everybody who reaches the cluster run code" % ray.__version__)
                found["ray"] = ray.__version__
    except ImportError as error:
        raise ValueError("%s; run: %s -m pip install -r %s" % (one_line(error), sys.executable, os.path.join(
            CHECKOUT, "tools", "requirements-%s.txt" % file)))
    return found


def local_devices(args):
    """Returns the ids of the devices of this machine that the run uses: [0] for the CPU. Raises ValueError if there are none."""
    if args.devices is not None:
        return sorted(set(map(int, args.devices.split(","))))
    for kind, (variable, file) in DEVICES.items():
        if getattr(args, kind):
            visible = os.environ.get(variable)
            count = len(visible.split(",")) if visible else sum(bool(re.match(file + r"\d+$", name)) for name in os.listdir("/dev"))
            if not count:
                raise ValueError("no /dev/%s0, so this machine shows no such device; --devices 0 uses the first one all the same" % file)
            return list(range(count))
    return [0]


# --- the model ------------------------------------------------------------------------------------------------------------

def open_model(path, device_id):
    """Returns (a model's session, what it says that it gives: see kind_of(), is_twin() of it)."""
    if is_om(path):
        return open_session(path, device_id), kind_of(path), False
    model = load(path)
    twin = is_twin(model)
    return open_session(path, provider=CPU, twin=twin), output_kind(model), twin


def read_model(path):
    """Returns (a file's bytes, their SHA-256)."""
    with open(path, "rb") as f:
        model = f.read()
    return model, hashlib.sha256(model).hexdigest()


def examine(args, session, checksum):
    """Returns (the model's entry for the manifest, its attributes' names)."""
    batch_size, height, width = input_size(session)
    if input_kind(session) in NV12:
        raise ValueError("%s: takes NV12, a video's frames; for image files give the model without it" % args.model)
    if None in fixed_size(session)[1:]:
        note(SIZE_ASSUMED)
    names = attribute_names(attributes_of(session), args.attributes, args.model, described_by(session, args.model))
    if names is PETA:
        note(ASSUMED)
    lower = [name.lower() for name in names] + ["path", "error"]  # names in SQL ignore case
    twice = [name for name in names if lower.count(name.lower()) > 1]
    if twice:
        raise ValueError("these attributes' columns would have the name path or error, or the same name: %s; give other names with "
                         "--attributes" % some(twice))
    return {"sha256": checksum, "batch_size": batch_size, "height": height, "width": width,
            "input": input_kind(session)}, list(names)


def kind_by_values(args, session, found):
    """Returns whether a model gives logits or probabilities, judged by its values for the input's first images."""
    def first_images():
        for index in range(found.count):
            shard = found.describe(index)
            if found.list is not None:  # it is not in the output folder yet
                shard["list"] = "/proc/self/fd/%d" % found.list.fileno()
            images = Images(shard, {"damaged": "keep", "duplicates": "keep"}, decode)
            for image in images:
                yield images, image

    batches = run_batches(session, itertools.islice(first_images(), SAMPLE), lambda item, row: item[0].read(item[1], row))
    values = [row for _, reasons, rows in batches for row, reason in zip(rows, reasons) if reason is None]
    if not values:
        raise ValueError("%s: it does not tell whether it gives logits or probabilities, and none of the first %d images can be read, "
                         "so that its values do not tell, either" % (args.model, SAMPLE))
    kind = "probabilities" if look_like_probabilities(np.array(values)) else "logits"
    note("%s: it does not tell whether it gives logits or probabilities; by the values of %d images, it gives %s"
         % (args.model, len(values), kind))
    return kind


# --- the run --------------------------------------------------------------------------------------------------------------

class Report(object):
    """Counts the images and shows the progress: a bar on a terminal, elsewhere a line per minute."""

    def __init__(self, total, most, errors):
        self.total, self.most = total, most  # the number of images, or None; how many errors are allowed, None for any number
        self.images, self.errors, self.repeated = 0, errors, 0  # errors: those of the parts that were there already
        self.bar = progress(total, "image")
        self.start = None  # the time when the first worker was ready
        self.printed = time.monotonic()
        self.check()

    def add(self, counts, example):
        self.images, self.errors = self.images + counts["images"], self.errors + counts["errors"]
        self.check(example)

    def check(self, example=()):
        if self.most is not None and self.errors > self.most:
            raise ValueError("%d images cannot be read, more than --max-errors %d%s" % (
                self.errors, self.most, "".join(": %s (%s)" % item for item in example)))

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


def compute(pool, found, output, numbers, report):
    """Lets the pool compute these parts. Raises ValueError with the parts that cannot be computed."""
    shards, left, failed, success = Shards(numbers), len(numbers), {}, -1

    def hand_out():
        lonely, places = shards.lonely(), {member.place for member in pool.members if member.ready}
        for member in pool.room():
            if member.busy and lonely:  # it shall become free for a shard that gets a worker of its own
                lonely -= 1
                continue
            shard = shards.take(member, places)
            if shard is not None:
                report.start = report.start or time.monotonic()
                pool.give(member, shard, found.describe(shard.number))

    while left:
        hand_out()
        report.look(pool.unfinished())
        for shard, place, result in pool.next():
            name = part_name(output, shard.number)
            if result is None and not shard.careful:
                shards.careful(shard)
                report.repeated += 1
                continue
            kind, text = (result.kind, result.text) if result else ("again", "its worker died")
            if kind == "full":
                raise ValueError("%s: there is no room: %s; make room, then start again to continue" % (name, text))
            if kind == "again":
                if shards.again(shard, place):
                    report.repeated += 1
                    continue
                text += "; tried %d times" % shard.tries
                if shard.failed > success:
                    raise ValueError("%s cannot be computed: %s. No other part could be computed meanwhile. Start again to continue"
                                     % (name, text))
            left -= 1
            if kind == "done":
                success = time.monotonic()
                report.add(result.counts, result.example)
            else:
                failed[name] = text
    if failed:
        raise ValueError("%d of %d parts cannot be computed; the others are written: %s" % (
            len(failed), found.count, some("%s (%s)" % item for item in failed.items())))


def main(argv=None):
    args = parse(argv)
    recorded = import_libraries(args.address)
    devices = None if args.address else local_devices(args)
    with ThreadPoolExecutor(1) as reader:
        reading = reader.submit(read_model, args.model)
        session, kind, twin = open_model(args.model, (devices or [0])[0])
        model, checksum = reading.result()
    described, names = examine(args, session, checksum)
    output = absolute(args.output)
    batch_size, size = described["batch_size"], (described["height"], described["width"])
    args.shard_size = args.shard_size or -(-SHARD_SIZE // batch_size) * batch_size  # no part ends with a batch that is half empty
    found = find_input(args, "%s/%s" % (output, LIST))
    kind = kind or kind_by_values(args, session, found)
    del session
    provider = OM if is_om(args.model) else PROVIDERS[0 if args.npus else 1 if args.gpus else 2]  # CANN, CUDA, the CPU
    described["output"] = kind
    manifest = {"model": described, "input": found.settings, "attributes": names, "provider": provider,
                "values": "probabilities" if args.probabilities else "logits", "versions": dict(versions(provider), **recorded)}
    run, there = begin(output, manifest, found.count)
    counts = total(output, there, run)
    if there:
        print("%s: %d of %d parts are there already" % (args.output, len(there), found.count), flush=True)
    report = Report(found.images and found.images - counts["images"], args.max_errors, counts["errors"])
    if len(there) < found.count:
        if found.list is not None:
            publish_list(output, found)
        job = {"output": output, "run": run, "names": names, "kind": kind, "probabilities": args.probabilities, "twin": twin,
               "provider": provider, "device_id": 0, "versions": versions(provider), "threads": args.cpus,
               "witnesses": found.witnesses, "damaged": args.damaged, "duplicates": args.duplicates,
               "calls": calls_at_once(args.cpus, sys.maxsize, batch_size, *size) if provider == CPU else 1,
               "readers": args.cpus + 1 if is_local(absolute(args.root or args.input[0])) else REMOTE_READERS}
        left = sorted(set(range(found.count)) - set(there))
        with workers(args, job, model, devices) as pool, report.bar:
            check_run(output, run)
            compute(pool, found, output, left, report)
        print("%d images in %.1f s, %.1f images/s after the start; %d workers on %d %s, %d lost; %d parts started again" % (
            report.images, report.seconds(), report.rate(), len(pool.members), len(pool.seen), pool.unit, pool.lost,
            report.repeated))
        check_run(output, run)
        counts = total(output, range(found.count), run)
    print("%s: %d images in %d parts, %d images cannot be read" % (args.output, counts["images"], found.count, counts["errors"]))
    if found.images not in (None, counts["images"]):
        raise ValueError("%s: the parts hold %d images, but the input has %d" % (args.output, counts["images"], found.images))
    if counts["turned"]:
        note("%d images have an EXIF orientation. Like stage 4, this script takes them as they are stored; tools/predict.py turns them "
             "upright first" % counts["turned"])
    if left_out(counts):
        note("files in the tars are left out, because their names do not end like those of images: %s" % left_out(counts))


@contextlib.contextmanager
def workers(args, job, model, devices):
    """Yields the pool of workers, which end with the block."""
    if args.address:
        with connection(args.address):
            yield Cluster(job, model, args.actors, {"CPU": args.cpus, "GPU": args.gpus, "NPU": args.npus})
        return
    share = args.gpus or args.npus
    pool = Processes(job, model, args.actors, devices, int(1 / share + 1e-6) if share else max(1, cores() // args.cpus))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    signal.signal(signal.SIGHUP, lambda *_: sys.exit(128 + signal.SIGHUP))
    try:
        yield pool
    finally:
        pool.close()


if __name__ == "__main__":
    command(main)
