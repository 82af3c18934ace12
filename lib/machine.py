"""The machine: how many cores and threads a script may use, and its worker processes."""
import contextlib
import gc
import os
import signal
import sys
import threading
import time
import warnings

from lib.script import THREAD_LIMIT


def cgroup_cores(root="/sys/fs/cgroup", table="/proc/self/cgroup"):
    """Returns a container's CPU quota in cores, rounded up, or None without a quota. Reads cgroup v1 and v2."""
    found = []
    with contextlib.suppress(OSError), open(table) as f:
        for line in f:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            base = os.path.join(root, "cpu") if controllers else root
            parts = [part for part in path.split("/") if part]
            for depth in range(len(parts) + 1):  # a quota also limits all groups below it
                folder = os.path.join(base, *parts[:depth])
                with contextlib.suppress(OSError, ValueError):
                    if controllers:
                        with open(folder + "/cpu.cfs_quota_us") as q, open(folder + "/cpu.cfs_period_us") as p:
                            quota, period = int(q.read()), int(p.read())
                    else:
                        with open(folder + "/cpu.max") as q:
                            quota, period = map(int, q.read().split())  # "max" means no quota and raises ValueError
                    if quota > 0:
                        found.append(-(-quota // period))
    return min(found) if found else None


def cores():
    """Returns the number of cores that this process may use."""
    return min(len(os.sched_getaffinity(0)), cgroup_cores() or sys.maxsize)


def check_threads(count):
    """Raises ValueError if this many threads cannot be started now.

    Call this before a library starts threads: ONNX Runtime may wait for ever if only some of them start.
    """
    def running():  # the kernel's count of this process's threads, or 0 without /proc
        with contextlib.suppress(OSError):
            return len(os.listdir("/proc/self/task"))
        return 0

    go, started, before = threading.Event(), [], running()
    try:
        for _ in range(count):
            thread = threading.Thread(target=go.wait, daemon=True)
            thread.start()
            started.append(thread)
    except RuntimeError:
        raise ValueError("%d threads cannot be started: %s" % (count, THREAD_LIMIT))
    finally:
        go.set()
        for thread in started:
            thread.join()
        for _ in range(1000):  # the kernel still counts a thread for a moment after its end
            if running() <= before:
                break
            time.sleep(0.001)


# --- worker processes -------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def worker_pool(count, function):
    """Yields a function that takes items and returns an iterator of function(item), in order. The calls run in count processes.

    The processes ignore Ctrl-C, and they end if this process is killed. They have ended when the block ends. If the block
    fails, they are killed. Raises OSError or ValueError if they cannot be started, and OSError if one of them is killed.
    """
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    check_threads(count + 2)  # the pool also starts two threads; without one of them, it would wait for ever
    # The forked processes inherit the function with all that it refers to. Only items and results go through pipes, and items
    # should be small: if a process is killed, some Pythons wait for ever until their pipe has taken all waiting items.
    try:
        pool = ProcessPoolExecutor(count, multiprocessing.get_context("fork"), start_worker, (os.getpid(), function))
    except OSError as error:
        raise OSError("processes cannot be started (%s); see that /dev/shm can be written, and that ulimit -n is not reached"
                      % error.strerror)

    def run(items):
        try:
            with uninterrupted():  # the processes start here
                futures = [pool.submit(call_function, item) for item in items]
        except OSError as error:
            raise OSError("%d processes cannot be started (%s): %s" % (count, error.strerror, THREAD_LIMIT))
        return (future.result() for future in futures)  # pool.map() would cancel futures, which disturbs the end of a killed pool

    try:
        yield run
    except BaseException as error:
        for process in multiprocessing.active_children():
            process.kill()
        if isinstance(error, BrokenProcessPool):
            raise OSError("a worker process was killed; was the memory exhausted?")
        raise
    finally:
        pool.shutdown()


@contextlib.contextmanager
def uninterrupted():
    """Delays Ctrl-C until the block ends. Processes that start in the block never see it, because they ignore it first."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def start_worker(parent, function):
    """Prepares a forked process for the pool's function."""
    gc.freeze()  # the garbage collector leaves this process's copies alone: a library may wait for threads that a fork lacks
    end_with(parent)
    call_function.function = function


def end_with(parent):
    """Makes a worker process ignore Ctrl-C, end when its parent is killed, and hide Pillow's warnings."""
    import ctypes
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG of linux/prctl.h
    if os.getppid() != parent:  # the parent was killed before that call
        os._exit(1)
    warnings.simplefilter("ignore")


def call_function(item):
    """Calls the pool's function in a worker process."""
    return call_function.function(item)
