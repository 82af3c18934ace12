"""The workers of tools/gallery.py, and which of them computes which shard: child processes here, or actors on a Ray cluster.

A place is where workers run: a device or the CPU of this machine, or a node of the cluster. A worker may only compute while it can
read the witnesses, images that the driver itself could read. A shard that fails through no fault of its own is tried again.
"""
import collections
import contextlib
import glob
import multiprocessing
import os
import queue
import re
import socket
import tempfile
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from lib.files import sweep
from lib.gallery.storage import WAITS
from lib.gallery.worker import Result, Worker
from lib.machine import end_with, uninterrupted
from lib.providers import CPU
from lib.script import note, one_line

CHECKOUT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

POLL_SECONDS = 2     # between two looks for new nodes
FIT_SECONDS = 8      # before another look whether a worker can read the images
PATIENCE = 180       # in seconds: without a worker for this long, the run ends
HEAD_SECONDS = 10    # a cluster's head that does not answer for this long is lost
MAX_STARTS = 3       # a place is left out after so many workers that died while they started
TELL_SECONDS = 0.5   # between two answers of a child process how far it is
MAX_ASKED = 100      # at each look, the driver asks this many workers how far they are


# --- the shards -----------------------------------------------------------------------------------------------------------

class Shard(object):
    """A shard that is left. tries: how often it failed, first at the time failed. places: where. due: when it may be tried.

    careful: see Worker.work().
    """

    def __init__(self, number):
        self.number, self.tries, self.failed, self.places, self.due, self.careful = number, 0, None, set(), 0, False


class Shards(object):
    """The shards that no worker has yet: those that were never tried, and those to try again."""

    def __init__(self, numbers):
        self.new, self.waiting = map(Shard, numbers), []

    def take(self, member, places):
        """Returns a shard for a worker, or None. places: those of all workers that can compute.

        A shard that failed at a place is tried elsewhere, if there is an elsewhere. A careful shard gets a worker of its own.
        """
        now = time.monotonic()
        for shard in self.waiting:
            if shard.due <= now and not (shard.careful and member.busy) and (
                    member.place not in shard.places or places <= shard.places):
                self.waiting.remove(shard)
                return shard
        return next(self.new, None)

    def again(self, shard, place):
        """Notes that a shard failed. Returns whether it will be tried again."""
        shard.tries += 1
        shard.failed = shard.failed or time.monotonic()
        shard.places.add(place)
        if shard.tries > len(WAITS):
            return False
        shard.due = time.monotonic() + WAITS[shard.tries - 1]
        self.waiting.append(shard)
        return True

    def careful(self, shard):
        """Lets the shard of a worker that died be tried with care."""
        shard.careful = True
        self.waiting.append(shard)

    def lonely(self):
        """Returns how many shards wait for a worker that does nothing else."""
        return sum(shard.careful and shard.due <= time.monotonic() for shard in self.waiting)


# --- the workers ----------------------------------------------------------------------------------------------------------

class Member(object):
    """A worker in the pool. ready: it can compute. busy: its shards. computed: images of these, by its last answer.

    fit_at: when to look again whether it can read the images, or None. asked: it has not yet said how far it is.
    """

    def __init__(self, place, handle):
        self.place, self.handle = place, handle
        self.ready = self.asked = False
        self.busy, self.computed, self.fit_at = set(), 0, None


class Pool(object):
    """The workers of a run. A subclass says where they are: places(), name(), start(), call(), kill(), died()."""

    at_once = 1  # shards that a worker gets at the same time
    unit = "devices"  # what a place is

    def __init__(self, actors):
        self.actors = actors  # how many workers there should be, None for as many as fit
        self.events = queue.SimpleQueue()  # (member, the method's name, the shard or None, future)
        self.members, self.seen = [], set()  # seen: the places where a worker could compute
        self.failed_starts, self.left_out = collections.Counter(), {}  # left_out: {place: why}
        self.lost, self.looked, self.usable = 0, -POLL_SECONDS, time.monotonic()
        self.unfit = set()  # the places that were named because they cannot read the images
        self.why = "no machine has room for one"  # the reason why there is no worker

    def look(self):
        """Starts missing workers, and asks the others whether they can read the images and how far they are."""
        now = time.monotonic()
        if now < self.looked + POLL_SECONDS:
            return
        self.looked = now
        places = self.places()
        self.left_out = {place: why for place, why in self.left_out.items() if place in places}
        used = collections.Counter(member.place for member in self.members)
        free = [place for place, slots in places.items() if place not in self.left_out for _ in range(slots - used[place])]
        for place in free[:None if self.actors is None else max(0, self.actors - len(self.members))]:
            member = Member(place, self.start(place))
            self.members.append(member)
            self.send(member, "start")
        if not self.members and self.left_out and len(self.left_out) == len(places):
            raise ValueError("no worker can start: %s" % self.why)
        for member in self.members:
            if member.fit_at is not None and now >= member.fit_at:
                member.fit_at = None
                self.send(member, "fit")
        self.ask()
        if any(member.ready for member in self.members):
            self.usable = now
        elif now > self.usable + PATIENCE:
            raise ValueError("there was no worker for %d minutes: %s. Start again to continue" % (PATIENCE // 60, self.why))

    def ask(self):
        """Lets the workers say how far they are."""

    def send(self, member, method, shard=None, *arguments):
        """Calls a method of a worker. next() gets its result."""
        future = self.call(member, method, *arguments)
        future.add_done_callback(lambda future: self.events.put((member, method, shard, future)))

    def give(self, member, shard, described):
        """Gives a shard to a worker."""
        member.busy.add(shard)
        self.send(member, "work", shard, shard.number, described, shard.careful)

    def room(self):
        """Returns the workers that can take a shard now, those without any first."""
        return sorted((member for member in self.members if member.ready and len(member.busy) < self.at_once
                       and not any(shard.careful for shard in member.busy)), key=lambda member: len(member.busy))

    def next(self):
        """Waits up to POLL_SECONDS. Returns [(shard, its worker's place, Result, or None if the worker died)]."""
        self.look()
        try:
            member, method, shard, future = self.events.get(timeout=POLL_SECONDS)
        except queue.Empty:
            return []
        if member not in self.members:
            return []
        error = future.exception()
        if error is not None and (self.died(error) or method == "start"):
            return self.drop(member, method, error)
        if method == "count":
            member.asked = False
            member.computed = 0 if error else future.result()
        elif method == "work":
            member.busy.remove(shard)
            member.computed = 0
            result = Result("again", {}, [], why(error)) if error else future.result()
            if result.kind == "again":
                self.rest(member, 0)
            return [(shard, member.place, result)]
        elif method == "start":
            self.failed_starts[member.place] = 0
            self.rest(member, 0)
        else:
            self.judge(member, why(error) if error else future.result())
        return []

    def rest(self, member, seconds):
        """Gives a worker no shards until it is seen that it can read the images."""
        member.ready, member.fit_at = False, time.monotonic() + seconds
        if not seconds:
            self.looked = -POLL_SECONDS

    def judge(self, member, text):
        """Lets a worker compute, or names its place if it cannot read the images."""
        place = member.place
        if text is None:
            member.ready = True
            self.seen.add(place)
            self.unfit.discard(place)
            return
        self.why = "%s cannot read the images: %s" % (self.name(place), text)
        if place not in self.unfit:
            self.unfit.add(place)
            note("%s. It is left out until it can" % self.why)
        self.rest(member, FIT_SECONDS)

    def drop(self, member, method, error):
        """Removes a worker that died or cannot start at its place. Returns what next() returns for its shards."""
        self.members.remove(member)
        self.kill(member)
        place = member.place
        self.why = "%s: %s" % (self.name(place), why(error))
        if method != "start":
            self.lost += 1
        else:
            self.failed_starts[place] += 1
            if not self.died(error) or self.failed_starts[place] >= MAX_STARTS:
                self.left_out[place] = self.why
                note("no worker can start on %s. It is left out" % self.why)
        return [(shard, place, None) for shard in sorted(member.busy, key=lambda shard: shard.number)]

    def unfinished(self):
        """Returns about how many images are computed but not yet in a part."""
        return sum(member.computed for member in self.members)


def why(error):
    """Returns an error of a worker on one line: what it raised, or the reason why it was lost."""
    cause = getattr(error, "cause", None) or error
    text = re.sub("\x1b\\[[0-9;]*m", "", one_line(cause))  # Ray adds colour codes to its texts
    last = str(cause).strip().split("\n")[-1]
    if re.match(r"\w+(Error|Exception): ", last):
        text = last  # the lines before it are a traceback
    name = "" if isinstance(cause, (OSError, ValueError, ImportError)) else type(cause).__name__ + ": "
    return (name + text)[:400]


# --- child processes on this machine ---------------------------------------------------------------------------------------

class Processes(Pool):
    """Workers in child processes. Each has an executor of its own, so that a crash breaks that one alone. A place is a device."""

    def __init__(self, job, model, actors, devices, per_device):
        super(Processes, self).__init__(actors)
        self.job, self.slots = job, dict.fromkeys(devices, per_device)
        self.model = tempfile.TemporaryFile()  # the processes read it there: 100 MB in the pipe of a killed one could wait for ever
        self.model.write(model)
        self.model.flush()
        self.path = "/proc/%d/fd/%d" % (os.getpid(), self.model.fileno())
        # multiprocessing's resource tracker, a process of its own, would warn about the semaphores of killed processes
        os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning")

    def places(self):
        return self.slots

    def name(self, place):
        return "this machine" if self.job["provider"] == CPU else "device %d" % place

    def start(self, place):
        context = multiprocessing.get_context("spawn")  # a fork would lack the threads of ONNX Runtime
        computed = context.Value("Q", 0, lock=False)
        return ProcessPoolExecutor(1, context, start_process, (os.getpid(), dict(self.job, device_id=place), computed)), computed

    def call(self, member, method, *arguments):
        try:
            with uninterrupted():  # the process starts here
                return member.handle[0].submit(call_worker, method, (self.path,) if method == "start" else arguments)
        except (BrokenProcessPool, OSError) as error:
            future = Future()
            future.set_exception(error)
            return future

    def unfinished(self):
        return sum(member.handle[1].value for member in self.members)

    def kill(self, member):
        for process in list((getattr(member.handle[0], "_processes", None) or {}).values()):
            process.kill()
        member.handle[0].shutdown()

    def died(self, error):
        return isinstance(error, BrokenProcessPool)

    def close(self):
        for member in self.members:
            self.kill(member)
        sweep(glob.escape(self.job["output"]) + "/part-*.partial")  # killed workers leave them


def start_process(parent, job, computed):
    """Prepares a child process. A thread keeps the shared value computed up to date while the process works."""
    end_with(parent)
    call_worker.worker = worker = Worker(job)

    def tell():
        while True:
            computed.value = worker.count()
            time.sleep(TELL_SECONDS)
    threading.Thread(target=tell, daemon=True).start()


def call_worker(method, arguments):
    return getattr(call_worker.worker, method)(*arguments)


# --- actors on a Ray cluster ------------------------------------------------------------------------------------------------

class Cluster(Pool):
    """Workers on a Ray cluster. They are plain actors, not Ray Data: a finished shard stays finished even if its node is lost, and
    a shard that kills its worker again and again does not hold up the others. A place is a node."""

    at_once = 2  # so that a worker never waits for its next shard
    unit = "nodes"

    def __init__(self, job, model, actors, needs):
        super(Cluster, self).__init__(actors)
        import ray
        self.ray, self.job, self.needs, self.nodes, self.silent = ray, job, needs, {}, None
        self.options = {"num_cpus": needs["CPU"], "num_gpus": needs["GPU"], "max_restarts": 0,
                        "resources": {"NPU": needs["NPU"]} if needs["NPU"] else None,
                        "max_concurrency": self.at_once + 2}  # two more for fit() and count()
        self.model = ray.put(model)
        self.head = ray.get_runtime_context().gcs_address
        self.asking = collections.deque()  # the workers, the one first that was not asked for the longest time

    def places(self):
        """Returns {node's id: how many workers have room there}. Raises ValueError if the head does not answer."""
        host, _, port = self.head.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), HEAD_SECONDS / 4).close()
        except OSError as error:  # Ray itself would wait for a minute and then end the process
            self.silent = self.silent or time.monotonic()
            if time.monotonic() < self.silent + HEAD_SECONDS:
                return {node: slots for node, (_, slots) in self.nodes.items()}
            raise ValueError("the head of the cluster, %s, does not answer (%s); start again when it does" % (self.head, one_line(error)))
        self.silent = None
        self.nodes = {}
        for node in self.ray.nodes():
            slots = min(int(node["Resources"].get(name, 0) / need + 1e-6) for name, need in self.needs.items() if need)
            if node["Alive"] and slots:
                self.nodes[node["NodeID"]] = "node %s (%s)" % (node["NodeManagerAddress"], node["NodeManagerHostname"]), slots
        return {node: slots for node, (_, slots) in self.nodes.items()}

    def name(self, place):
        return self.nodes.get(place, ("a lost node", 0))[0]

    def start(self, place):
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
        strategy = NodeAffinitySchedulingStrategy(place, soft=False)
        return self.ray.remote(Worker).options(scheduling_strategy=strategy, **self.options).remote(self.job)

    def call(self, member, method, *arguments):
        if method == "start":
            self.asking.append(member)
            arguments = self.model,
        return getattr(member.handle, method).remote(*arguments).future()

    def ask(self):
        for _ in range(min(MAX_ASKED, len(self.asking))):
            member = self.asking.popleft()
            if member in self.members:
                self.asking.append(member)
                if member.busy and not member.asked:
                    member.asked = True
                    self.send(member, "count")

    def kill(self, member):
        self.ray.kill(member.handle)  # it may still be alive on a node that the network does not reach

    def died(self, error):
        return isinstance(error, self.ray.exceptions.RayError) and not isinstance(error, self.ray.exceptions.RayTaskError)


@contextlib.contextmanager
def connection(address):
    """Connects to a Ray cluster. Raises ValueError if there is none."""
    import ray
    options = {"log_to_driver": False, "logging_level": "CRITICAL",
               # Workers import lib from the checkout. Ray replaces ${PYTHONPATH} by that of the worker's node.
               "runtime_env": {"env_vars": {"PYTHONPATH": CHECKOUT + ":${PYTHONPATH}"}}}
    before = os.getcwd()
    os.chdir(CHECKOUT)  # Ray puts the current folder before PYTHONPATH, and that folder might hold another package named lib
    try:
        ray.init(address=address if ":" in address or address == "auto" else address + ":6379", **options)
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        raise ValueError("no Ray cluster at %s: %s" % (address, str(error).strip().split("\n")[-1]))
    finally:
        os.chdir(before)
    try:
        yield
    finally:
        ray.shutdown()
