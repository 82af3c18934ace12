"""lib/gallery/pool.py and parts.py: which worker computes which shard, what is tried again, and whose a part is."""
import collections
import json
import threading
from concurrent.futures import Future

import numpy as np
import pytest

import gallery
from lib.gallery import parts, pool
from lib.gallery.worker import Result

Found = collections.namedtuple("Found", "count describe")
COUNTS = {"images": 1, "errors": 0, "turned": 0, "left_out": {}}


class Lost(Exception):
    """A worker died."""


class Scripted(pool.Pool):
    """A pool without processes: answer(place, method, number, careful) gives a call's result, or an exception."""

    at_once, unit = 2, "nodes"

    def __init__(self, slots, answer, actors=None):
        super(Scripted, self).__init__(actors)
        self.slots, self.answer, self.calls = slots, answer, []

    def places(self):
        return self.slots

    def name(self, place):
        return "node " + place

    def start(self, place):
        return place

    def call(self, member, method, *arguments):
        future = Future()
        number, careful = (arguments[0], arguments[2]) if method == "work" else (None, None)
        self.calls.append((member.place, method, number, careful))
        try:
            future.set_result(self.answer(member.place, method, number, careful))
        except Exception as error:
            future.set_exception(error)
        return future

    def kill(self, member):
        pass

    def died(self, error):
        return isinstance(error, Lost)

    def work(self, number=None):
        """The calls of work(), of one shard or all: (place, careful)."""
        return [(place, careful) for place, method, other, careful in self.calls if method == "work" and number in (None, other)]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(pool, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(pool, "FIT_SECONDS", 0.01)
    monkeypatch.setattr(pool, "PATIENCE", 0.3)
    monkeypatch.setattr(pool, "WAITS", (0.01,) * 5)


def run(answer, count=6, slots=None, actors=None):
    """Computes shards. Returns the pool and the report. Where answer() gives None, the call succeeds."""
    def complete(place, method, number, careful):
        result = answer(place, method, number, careful)
        return Result("done", COUNTS, [], None) if method == "work" and result is None else result
    workers, report = Scripted(slots or {"a": 1, "b": 1}, complete, actors), gallery.Report(count, None, 0)
    gallery.compute(workers, Found(count, lambda number: {"number": number}), "out", list(range(count)), report)
    assert report.images == count
    return workers, report


def again(text):
    return Result("again", {}, [], text)


def test_each_shard_is_given_once():
    workers, report = run(lambda *_: None, 50)
    assert sorted(number for _, method, number, _ in workers.calls if method == "work") == list(range(50))
    assert {place for place, _ in workers.work()} == {"a", "b"} and report.repeated == 0


def test_shard_that_fails_is_tried_again_elsewhere():
    workers, report = run(lambda place, method, number, _: again("503") if (place, method, number) == ("a", "work", 3) else None)
    assert [place for place, _ in workers.work(3)] in (["a", "b"], ["b"])
    workers, report = run(lambda place, method, number, _: again("503") if method == "work" and place == "a" else None)
    assert report.repeated == len([place for place, _ in workers.work() if place == "a"])


def test_shard_that_always_fails_is_tried_six_times_and_the_others_are_computed():
    with pytest.raises(ValueError, match=r"1 of 6 parts cannot be computed; the others are written: out/part-000002.parquet "
                                         r"\(s3://x: 503; tried 6 times\)$"):
        run(lambda place, method, number, _: again("s3://x: 503") if number == 2 else None)


def test_storage_that_fails_altogether_ends_the_run():
    with pytest.raises(ValueError, match=r"part-00000[0-5].parquet cannot be computed: gone; tried 6 times. No other part"):
        run(lambda place, method, *_: again("gone") if method == "work" else None)


def test_full_disk_ends_the_run_at_once():
    with pytest.raises(ValueError, match="part-000000.parquet: there is no room: No space left on device; make room"):
        run(lambda place, method, *_: Result("full", {}, [], "No space left on device") if method == "work" else None, actors=1)


def test_damaged_shards_are_not_tried_again_and_the_others_are_computed():
    calls = []

    def answer(place, method, number, _):
        calls.append(number)
        return Result("damaged", {}, [], "byte 512") if method == "work" and number < 2 else None
    with pytest.raises(ValueError, match=r"2 of 6 parts cannot be computed; .*part-000000.parquet \(byte 512\)"):
        run(answer)
    assert calls.count(0) == calls.count(1) == 1 and set(calls) == {None} | set(range(6))


def test_shards_of_a_dead_worker_get_one_worker_each_and_care():
    """The second shard that was under way beside the deadly one is computed."""
    def answer(place, method, number, careful):
        if method == "work" and number == 1 and not careful:
            raise Lost("killed")
    workers, report = run(answer, 20)
    assert workers.lost == 1 and report.repeated in (1, 2)
    assert [careful for _, careful in workers.work(1)] == [False, True]


def test_shard_that_kills_careful_workers_ends_with_its_name():
    def answer(place, method, number, _):
        if number == 1:
            raise Lost("killed")
    with pytest.raises(ValueError, match="part-000001.parquet .its worker died; tried 6 times"):
        run(answer)


def test_place_that_cannot_read_the_images_gets_no_work_and_is_named(capsys):
    workers, _ = run(lambda place, method, *_: "/mnt/crops: no such folder" if (place, method) == ("a", "fit") else None, 30)
    assert {place for place, _ in workers.work()} == {"b"}
    assert capsys.readouterr().err == "note: node a cannot read the images: /mnt/crops: no such folder. It is left out until it can\n"


@pytest.mark.parametrize("kind", [ImportError, Lost])
def test_unfit_place_does_not_stop_the_run_when_the_fit_ones_lose_workers(kind, capsys):
    deaths = []

    def answer(place, method, number, _):
        if (place, method) == ("a", "start"):
            raise kind("No module named numpy")
        if method == "work" and len(deaths) < 3:
            deaths.append(number)
            raise Lost("killed")
    workers, _ = run(answer, 30)
    assert workers.lost == 3 and {place for place, _ in workers.work()} == {"b"}
    assert "note: no worker can start on node a: %sNo module named numpy. It is left out\n" % (
        "Lost: " if kind is Lost else "") in capsys.readouterr().err


def test_run_ends_where_no_worker_can_start_or_none_is_left():
    def refuse(place, method, *_):
        raise ImportError("No module named numpy")
    with pytest.raises(ValueError, match="no worker can start: node [ab]: No module named numpy"):
        run(refuse)
    with pytest.raises(ValueError, match=r"there was no worker for \d+ minutes: no machine has room for one. Start again"):
        run(lambda *_: None, slots={"a": 0})
    with pytest.raises(ValueError, match="no worker for .* minutes: node a cannot read the images: unmounted"):
        run(lambda place, method, *_: "unmounted" if method == "fit" else None, slots={"a": 1})


# --- whose a part is ---------------------------------------------------------------------------------------------------------

MANIFEST = {"model": {"sha256": "m"}, "versions": {"ray": "1"}}


def write(output, number, run, errors=0, rows=3):
    parts.write_part(str(output), number, run, ["a"], ["p%d" % i for i in range(rows)], np.zeros((rows, 1), np.float32),
                     [None] * rows, {"images": 3, "errors": errors, "turned": 1, "left_out": {".json": 2}})


def test_one_of_two_runs_that_begin_at_the_same_moment_has_the_folder(tmp_path):
    for trial in range(20):
        output, ready, won, lost = str(tmp_path / str(trial)), threading.Barrier(2), [], []

        def start(model):
            ready.wait()
            try:
                won.append(parts.begin(output, dict(MANIFEST, model=model), 5))
            except ValueError as error:
                lost.append(str(error))
        threads = [threading.Thread(target=start, args=({"sha256": name},)) for name in "mn"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == len(lost) == 1 and "or delete %s/_manifest.json, because no part is written yet" % output in lost[0]


def test_run_goes_on_and_finds_its_parts_counts(tmp_path):
    run, there = parts.begin(str(tmp_path), MANIFEST, 2)
    assert there == []
    write(tmp_path, 0, run)
    write(tmp_path, 1, run, errors=2)
    assert parts.begin(str(tmp_path), dict(MANIFEST, versions={"ray": "2"}), 2) == (run, [0, 1])
    counts = parts.total(str(tmp_path), [0, 1], run)
    assert (counts["images"], counts["errors"], counts["turned"], parts.left_out(counts)) == (6, 2, 2, ".json (4)")
    with pytest.raises(ValueError, match="model.sha256: m there, n now. Give another --output, or the same settings again"):
        parts.begin(str(tmp_path), dict(MANIFEST, model={"sha256": "n"}), 2)
    with pytest.raises(ValueError, match="part-000001.parquet: is not a part of this run"):
        parts.begin(str(tmp_path), MANIFEST, 1)


def test_part_of_another_run_or_a_damaged_one_is_refused(tmp_path):
    write(tmp_path, 0, "another")
    write(tmp_path, 1, "mine", rows=2)
    (tmp_path / "part-000002.parquet").write_bytes(b"PAR1 and no more")
    for number, text in ((0, "is a part of another run"), (1, "is a part of another run"), (2, "is not a part of this run"),
                         (3, "no such file")):
        with pytest.raises((OSError, ValueError), match="part-00000%d.parquet: %s" % (number, text)):
            parts.total(str(tmp_path), [number], "mine")
    with pytest.raises(ValueError, match="holds 3 parts but no _manifest.json"):
        parts.begin(str(tmp_path), MANIFEST, 9)


def test_manifest_that_another_run_replaced_is_noticed(tmp_path):
    run, _ = parts.begin(str(tmp_path), MANIFEST, 2)
    parts.check_run(str(tmp_path), run)
    (tmp_path / "_manifest.json").write_text(json.dumps(dict(MANIFEST, run="other")))
    with pytest.raises(ValueError, match="another run was started with this --output at the same time"):
        parts.check_run(str(tmp_path), run)
