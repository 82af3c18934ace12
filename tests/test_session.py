"""lib/session.py: the one batch loop, and how many calls run at a time."""
import itertools
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
from onnx import helper
from PIL import Image

from lib.session import Clock, callers, calls_at_once, open_session, run_batches
from helpers import FLOAT, check_error, make_model, put, script, tensor_info, write_means, write_model

UINT8 = onnx.TensorProto.UINT8
BATCH = 4


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    return open_session(str(write_model(tmp_path_factory.mktemp("session") / "m.onnx", BATCH, attributes=3, size=(8, 8))))


# --- run_batches ------------------------------------------------------------------------------------------------------

def read_numbers(batch):
    return batch[:, 0, 0, :1].copy()


def collect(batches):
    """Returns run_batches()'s results as three lists: of items, of reasons, and of the logits' rows."""
    return [list(itertools.chain(*part)) for part in zip(*batches)] or [[], [], []]


@pytest.mark.parametrize("calls", [1, 5])
@pytest.mark.parametrize("count", [0, 1, BATCH, 30])
def test_order_is_kept_and_zeros_replace_missing_inputs_and_pad_the_last_batch(session, calls, count):
    batches = []

    def fill(number, row):
        row[...] = number + 1  # 0 would look like padding
        return "torn" if number == 9 else None

    def call(batch):
        batches.append(batch.copy())
        time.sleep(0.02 * (len(batches) % 3))  # calls end in another order than they begin
        return read_numbers(batch)

    items, reasons, logits = collect(run_batches(session, range(count), fill, calls, call))
    expected = [0 if number == 9 else number + 1 for number in range(count)]
    assert items == list(range(count)) and [row[0] for row in logits] == expected
    assert reasons == ["torn" if number == 9 else None for number in range(count)]
    rows = sorted(np.concatenate(batches)[:, 2, 7, 7].tolist()) if batches else []
    assert rows == sorted([0] * (-count % BATCH) + expected) and all(len(batch) == BATCH for batch in batches)


def test_logits_are_those_of_a_plain_loop_to_the_bit(session):
    inputs = np.random.RandomState(0).standard_normal((12, 3, 8, 8)).astype(np.float32)
    _, _, logits = collect(run_batches(session, inputs, lambda image, row: np.copyto(row, image), calls=3))
    expected = [session.run(None, {"actual_input_1": inputs[i:i + BATCH]})[0] for i in range(0, 12, BATCH)]
    assert np.array_equal(np.stack(logits), np.concatenate(expected))


@pytest.mark.parametrize("place", ["items", "fill", "call"])
def test_errors_reach_the_caller_and_end_an_endless_run(session, place):
    def checked(here, number):
        if here == place and number >= 3 * BATCH:
            raise OSError("cut off")
        return number

    def fill(number, row):
        row[...] = checked("fill", number) + 1

    def call(batch):
        checked("call", batch.max() - 1)
        return read_numbers(batch)

    threads, done = threading.active_count(), []
    with pytest.raises(OSError, match="cut off"):
        for batch, _, _ in run_batches(session, (checked("items", number) for number in itertools.count()), fill, 1, call):
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
        row[...] = number + 1

    with ThreadPoolExecutor(2) as runner, ThreadPoolExecutor(2) as reader, ThreadPoolExecutor(3) as shards:
        runs = [shards.submit(lambda numbers: collect(run_batches(session, numbers, fill, 2, read_numbers, None, runner, reader)), numbers)
                for numbers in (range(100, 149), range(20, 90), range(200, 249))]
        with pytest.raises(OSError, match="cut off"):
            runs[1].result()
        for run, first in ((runs[0], 100), (runs[2], 200)):
            assert [row[0] for row in run.result()[2]] == [first + i + 1 for i in range(49)]


# --- what is refused --------------------------------------------------------------------------------------------------

NHWC = "but the tools give float32 [N,3,height,width], or uint8 [N,height,width,3] to a model with AIPP; export it with export_onnx.py"


@pytest.mark.parametrize("model, entries, text", [
    ((["N", "H", "W", 3], (1, 2)), {}, "its input is float32 [N,H,W,3], " + NHWC),
    (([1, 224, 224, 3], (1, 2)), {}, "its input is float32 [1,224,224,3], " + NHWC),
    (([None, None, None, None],), {}, "its input is float32 [?,?,?,?], " + NHWC),
    (([1, 4, 8, 8], (2, 3), FLOAT, {"y": [1, 4]}), {}, "its input is float32 [1,4,8,8], " + NHWC),
    ((["N", 3, "H", "W"], (2, 3), UINT8), {}, "its input is uint8 [N,3,H,W], " + NHWC),
    ((["N", 3, 8, 8], (2, 3), FLOAT, {"y": ["N", 3], "z": ["N", 3]}), {}, "its outputs are [('y'"),
    ((["N", 3, 8, 8], (2,), FLOAT, {"y": ["N", 3, 8]}), {}, "its outputs are [('y', 'tensor(float)', ['N', 3, 8])]"),
    ((["N", 3, 8, 8],), {"attributes": '["hat", "bag"]'}, "its metadata name 2 attributes, but its output has 3"),
    ((["N", 3, 8, 8],), {"size": "[16, 8]"}, "its metadata say size [16, 8], but the tools would give it [8, 8]"),
    ((["N", 3, "H", 8],), {"size": "[16, 4]"}, "its metadata say size [16, 4], but the tools would give it [16, 8]"),
    ((["N", 3, 8, 8],), {"mean": "[0.5, 0.5, 0.5]"}, "its metadata say mean [0.5, 0.5, 0.5], but"),
    ((["N", 3, 8, 8],), {"layout": "NCHW BGR"}, "its metadata say layout NCHW BGR, but the tools would give it NCHW RGB")])
def test_models_that_would_be_fed_wrongly_are_refused(tmp_path, model, entries, text):
    path = str(put(write_means(tmp_path / "m.onnx", *model), **entries))
    with pytest.raises(ValueError) as error:
        open_session(path)
    assert str(error.value).startswith(path + ": ") and text in str(error.value)


def test_every_tool_refuses_a_model_that_takes_nhwc(tmp_path):
    model = write_means(tmp_path / "m.onnx", ["N", "H", "W", 3], (1, 2))
    for command in (["predict.py", tmp_path, "--onnx", model], ["compare.py", tmp_path, "--onnx", model, "--bins", tmp_path],
                    ["quantize.py", model, tmp_path, "i.onnx"], ["rehearse.py", "aipp", model, "a.onnx"],
                    ["rehearse.py", "float16", model, "f.onnx"], ["benchmark.py", "-om_path=%s" % model, "-round=1", "-batch_size=1"]):
        Image.new("RGB", (8, 8)).save(str(tmp_path / "a.png"))
        check_error(script("tools/" + command[0], *command[1:], cwd=tmp_path), "m.onnx: its input is float32 [N,H,W,3]")
    assert open_session(str(write_means(model, ["N", "H", "W", 3], (1, 2), UINT8)))  # as with AIPP


def test_a_model_that_gives_another_shape_than_it_states_is_refused(tmp_path):
    """onnx and ONNX Runtime only see when it runs that a batch size is fixed inside, or that there are other results."""
    means = helper.make_node("ReduceMean", ["x"], ["m"], axes=[2, 3], keepdims=0)
    fixed = [helper.make_node("Reshape", ["m", "one"], ["y"])]
    untold = [helper.make_node("Shape", ["x"], ["s"]), helper.make_node("Gather", ["s", "places"], ["shape"]),
              helper.make_node("Reshape", ["m", "shape"], ["y"])]
    for nodes, output, one, text in ((fixed, ["N", "A"], [1, -1], "the model gives [1,6] for a batch of 2 images, not [2,A]"),
                                     (fixed, ["N", 3], [1, 3], "the model cannot compute a batch of [2,3,8,8]: "),
                                     (untold, ["N", 1], [], "the model gives [2,3] for a batch of 2 images, not [2,1]")):
        onnx.save(make_model([means] + nodes, [tensor_info("x", ["N", 3, 8, 8])], [tensor_info("y", output)],
                             [("one", np.array(one, np.int64)), ("places", np.array([0, 1]))]), str(tmp_path / "m.onnx"))
        check_error(script("tools/benchmark.py", "-om_path=m.onnx", "-round=1", "-batch_size=2", cwd=tmp_path), text)


# --- calls at a time --------------------------------------------------------------------------------------------------

def test_callers_are_pinned_to_cores_only_if_there_is_one_for_each():
    cores = os.sched_getaffinity(0)
    for calls, expected in (len(cores), [{core} for core in sorted(cores)]), (len(cores) + 1, [cores] * (len(cores) + 1)):
        meeting = threading.Barrier(calls)  # so that each thread takes one call

        def affinity(_):
            meeting.wait(60)
            return os.sched_getaffinity(0)
        with callers(calls) as pool:
            assert sorted(pool.map(affinity, range(calls)), key=min) == expected
    assert os.sched_getaffinity(0) == cores


@pytest.mark.parametrize("threads, images, batch_size, side, calls", [
    (2, 1000, 1, 224, 2), (1, 1000, 8, 224, 1), (16, 100000, 8, 224, 16), (2, 1, 1, 224, 1),
    (64, 100000, 8, 224, 29), (64, 100000, 64, 224, 3), (8, 10 ** 6, 1024, 224, 1), (8, 10 ** 6, 8, 896, 1),  # their memory
    (2, 8, 8, 224, 1), (2, 16, 8, 224, 2), (2, 24, 8, 224, 1), (8, 9 * 8, 8, 224, 3)])  # one of 2 threads would be idle for a third
def test_calls_at_once_fit_the_threads_memory_and_batches(threads, images, batch_size, side, calls):
    assert calls_at_once(threads, images, batch_size, side, side) == calls


def test_clock_counts_overlapping_blocks_once():
    clock, began = Clock(), time.perf_counter()
    with clock, clock:
        time.sleep(0.05)
    assert 0.05 <= clock.seconds <= time.perf_counter() - began
