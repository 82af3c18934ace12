"""lib/session.py: the one batch loop, and how many calls run at a time."""
import itertools
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from lib.session import Clock, callers, calls_at_once, open_session, run_batches
from helpers import write_model

BATCH = 4


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    return open_session(str(write_model(tmp_path_factory.mktemp("session") / "m.onnx", BATCH, attributes=3, size=(8, 8))))


# --- run_batches ------------------------------------------------------------------------------------------------------

def write_number(number, row):
    row[...] = number + 1  # 0 would look like padding


def read_numbers(batch):
    return batch[:, 0, 0, :1].copy()


def collect(batches):
    """Returns run_batches()'s results as three lists: of items, of reasons, and of the logits' rows."""
    parts = [list(itertools.chain(*part)) for part in zip(*batches)]
    return parts or [[], [], []]


@pytest.mark.parametrize("calls", [1, 5])
@pytest.mark.parametrize("count", [0, 1, BATCH, 30])
def test_order_is_kept_and_the_last_batch_is_padded_with_zeros(session, calls, count):
    batches = []

    def call(batch):
        batches.append(batch.copy())
        time.sleep(0.02 * (len(batches) % 3))  # calls end in another order than they begin
        return read_numbers(batch)

    items, reasons, logits = collect(run_batches(session, range(count), write_number, calls, call))
    assert items == list(range(count)) and reasons == [None] * count and [row[0] for row in logits] == [i + 1 for i in range(count)]
    rows = sorted(np.concatenate(batches)[:, 2, 7, 7].tolist()) if batches else []
    assert rows == [0] * (-count % BATCH) + [i + 1 for i in range(count)] and all(len(batch) == BATCH for batch in batches)


def test_logits_are_those_of_a_plain_loop_to_the_bit(session):
    inputs = np.random.RandomState(0).standard_normal((11, 3, 8, 8)).astype(np.float32)
    _, _, logits = collect(run_batches(session, inputs, lambda image, row: np.copyto(row, image), calls=3))
    padded = np.concatenate([inputs, np.zeros((1, 3, 8, 8), np.float32)])
    expected = np.concatenate([session.run(None, {"actual_input_1": padded[i:i + BATCH]})[0] for i in range(0, 12, BATCH)])
    assert np.array_equal(np.stack(logits), expected[:11])


def test_item_without_input_gives_a_zero_row_and_its_reason(session):
    def fill(number, row):
        write_number(number, row)
        return "torn" if number in (2, 9) else None

    items, reasons, logits = collect(run_batches(session, range(10), fill, 2, read_numbers))
    assert items == list(range(10)) and [i for i, reason in enumerate(reasons) if reason == "torn"] == [2, 9]
    assert [row[0] for row in logits] == [0 if i in (2, 9) else i + 1 for i in range(10)]


@pytest.mark.parametrize("place", ["items", "fill", "call"])
def test_errors_reach_the_caller(session, place):
    """Nothing goes on after an error: the items have no end."""
    def fail(at, number):
        if at == place and number >= 3 * BATCH:
            raise OSError("cut off")

    def items():
        for number in itertools.count():
            fail("items", number)
            yield number

    def fill(number, row):
        fail("fill", number)
        write_number(number, row)

    def call(batch):
        fail("call", batch.max() - 1)
        return read_numbers(batch)

    threads, done = threading.active_count(), []
    with pytest.raises(OSError, match="cut off"):
        for batch, _, _ in run_batches(session, items(), fill, 1, call):
            done += batch
    assert done == list(range(len(done))) and (len(done) == 3 * BATCH or place == "items")  # items are read ahead
    assert threading.active_count() == threads


def test_abandoned_run_cancels_what_it_has_read_ahead(session):
    started, go = [], threading.Event()

    def fill(number, row):
        started.append(number)
        if number >= BATCH:
            go.wait(60)

    batches = run_batches(session, itertools.count(), fill)
    next(batches)
    threading.Timer(0.2, go.set).start()
    batches.close()
    assert len(started) <= BATCH + 1


def test_runs_that_share_their_pools_do_not_disturb_each_other(session):
    """As in the gallery's worker, which computes several shards at a time."""
    def fill(number, row):
        if number == 50:
            raise OSError("cut off")
        write_number(number, row)

    with ThreadPoolExecutor(2) as runner, ThreadPoolExecutor(2) as reader, ThreadPoolExecutor(3) as shards:
        runs = [shards.submit(lambda numbers: collect(run_batches(session, numbers, fill, 2, read_numbers, None, runner, reader)), numbers)
                for numbers in (range(100, 149), range(20, 90), range(200, 249))]
        with pytest.raises(OSError, match="cut off"):
            runs[1].result()
        for run, first in ((runs[0], 100), (runs[2], 200)):
            assert [row[0] for row in run.result()[2]] == [first + i + 1 for i in range(49)]


# --- calls at a time --------------------------------------------------------------------------------------------------

def test_each_caller_stays_on_its_own_core():
    """Only if there is one for each core: processes that share the cores would choose the same ones."""
    cores = os.sched_getaffinity(0)
    for calls in (len(cores), len(cores) + 1):
        meeting = threading.Barrier(calls)  # so that each thread takes one call

        def affinity(_):
            meeting.wait(60)
            return os.sched_getaffinity(0)
        with callers(calls) as pool:
            found = list(pool.map(affinity, range(calls)))
        assert found == [cores] * calls if calls > len(cores) else sorted(map(tuple, found)) == [(i,) for i in sorted(cores)]
        assert os.sched_getaffinity(0) == cores


@pytest.mark.parametrize("threads, images, batch_size, calls", [
    (2, 1000, 1, 2), (2, 1000, 8, 2), (2, 1000, 64, 2), (1, 1000, 8, 1), (16, 100000, 8, 16),
    (64, 100000, 8, 29), (64, 100000, 64, 3),                     # 69 and 551 MB a call
    (2, 8, 8, 1), (2, 16, 8, 2), (2, 24, 8, 1), (2, 25 * 8, 8, 2),  # 3 batches would leave one of 2 threads idle for a third
    (8, 9 * 8, 8, 3), (2, 1, 1, 1)])
def test_calls_at_once_fit_the_threads_and_batches(threads, images, batch_size, calls):
    assert calls_at_once(threads, images, batch_size) == calls


def test_calls_at_once_fit_the_memory():
    assert calls_at_once(8, 10 ** 6, 1024) == 1
    assert calls_at_once(8, 10 ** 6, 8, 896, 896) == 1 < calls_at_once(8, 10 ** 6, 8, 256, 128) == 8


def test_clock_counts_overlapping_blocks_once():
    clock, began = Clock(), time.perf_counter()
    with clock:
        with clock:
            time.sleep(0.05)
        time.sleep(0.05)
    assert 0.1 <= clock.seconds <= time.perf_counter() - began
