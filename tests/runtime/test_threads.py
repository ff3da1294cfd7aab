"""Background threads: order, bounds, errors, and prompt shutdown."""

import contextlib
import multiprocessing
import subprocess
import sys
import threading
import time
import traceback
from threading import Barrier, Event

import pytest

from pupilseg.errors import UsageError
from pupilseg.runtime.threads import THREAD_NAME, RowPool, Stopped, in_background, prefetch
from tests.helpers.waiting import PATIENCE_S, eventually


def background_threads():
    return [t for t in threading.enumerate() if t.name == THREAD_NAME]


def test_items_arrive_in_order():
    assert list(in_background(range(100), 2)) == list(range(100))
    assert list(in_background([], 1)) == []
    assert list(in_background(in_background(iter("abc")))) == ["a", "b", "c"]
    assert not background_threads()


def test_at_most_ahead_items_are_drawn_early():
    drawn = []

    def work():
        for i in range(20):
            drawn.append(threading.current_thread().name)
            yield i

    stream = in_background(work(), 2)
    assert not drawn  # the thread starts with the first item
    assert next(stream) == 0
    eventually(lambda: len(drawn) >= 3)
    time.sleep(0.05)  # it could run further ahead
    assert len(drawn) == 3  # the one received and two ahead
    assert list(stream) == list(range(1, 20))
    assert set(drawn) == {THREAD_NAME}


def test_an_error_arrives_after_the_items_before_it():
    def work():
        yield 1
        raise KeyError("the seventh frame")

    stream = in_background(in_background(work()))
    assert next(stream) == 1
    with pytest.raises(KeyError, match="seventh") as caught:
        next(stream)
    assert any(entry.name == "work" for entry in caught.traceback)
    assert not background_threads()


def test_closing_ends_all_stages():
    closed = []

    def work():
        try:
            yield from iter(int, 1)
        finally:
            closed.append(threading.current_thread().name)

    with contextlib.closing(in_background(in_background(work(), 1))) as stream:
        assert next(stream) == 0
    assert closed == [THREAD_NAME]
    assert not background_threads()


def next_in_fork(stream, queue):
    try:
        next(stream)
    except UsageError as error:
        queue.put(str(error))


def test_a_forked_child_is_refused_and_the_parent_continues():
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    stream = in_background(range(3))
    assert next(stream) == 0
    child = context.Process(target=next_in_fork, args=(stream, queue))
    child.start()
    assert "create a new iterator after forking" in queue.get(timeout=PATIENCE_S)
    child.join()
    assert list(stream) == [1, 2]


@pytest.mark.parametrize(("slots", "ahead"), [(2, 1), (3, 1), (3, 2)])
def test_a_slot_is_not_reused_until_enough_more_results_were_drawn(slots, ahead):
    buffers = [None] * slots
    filled = []

    def fill(slot, item, _stop):
        buffers[slot] = item
        filled.append(item)
        return slot, item

    drawn = []
    furthest = 0
    for slot, item in prefetch(fill, range(20), slots, ahead):
        drawn.append((slot, item))
        time.sleep(0.003)  # lets the thread run as far ahead as it can
        for kept_slot, kept_item in drawn[-(slots - ahead) :]:
            assert buffers[kept_slot] == kept_item
        furthest = max(furthest, max(filled) - item)
    assert furthest == ahead
    assert [item for _, item in drawn] == list(range(20))
    assert not background_threads()


def test_an_error_in_fill_has_the_traceback_of_the_thread():
    def fill(_slot, item, _stop):
        if item == 2:
            raise OSError("disk gone")
        return item

    drawn = []
    with pytest.raises(OSError, match="disk gone") as caught:
        drawn.extend(prefetch(fill, range(5), 2))
    assert "in fill" in "".join(traceback.format_tb(caught.value.__traceback__))
    assert not background_threads()


def test_closing_early_ends_the_thread():
    for _ in range(50):
        results = prefetch(lambda _slot, item, _stop: item, range(100), 2)
        assert next(results) == 0
        results.close()
    assert not background_threads()


def test_a_running_fill_sees_stop():
    started, ended = threading.Event(), threading.Event()

    def fill(_slot, item, stop):
        if item:
            started.set()
            assert stop.wait(20)
            ended.set()
        return item

    results = prefetch(fill, range(2), 2)
    next(results)
    assert started.wait(20)
    results.close()
    assert ended.is_set()


@pytest.mark.parametrize("count", [1, 3])
def test_each_row_is_done_once_with_scratch_of_its_thread(count):
    done, users = [], {}
    together = Barrier(count)

    def work(row, scratch):
        if row < count:
            together.wait(PATIENCE_S)  # all threads take part
        done.append(row)
        users.setdefault(id(scratch), set()).add(threading.get_ident())

    with RowPool(object, count, "rows") as pool:
        for rows in (20, 0, 1):
            done.clear()
            if rows < count:
                together = Barrier(rows or 1)
            pool.run(work, rows)
            assert sorted(done) == list(range(rows))
        assert len(users) == count
        assert all(len(threads) == 1 for threads in users.values())
    pool.run(lambda row, _scratch: done.append(row), 5)  # a closed pool starts again
    assert sorted(done[1:]) == list(range(5))
    pool.close()


@pytest.mark.parametrize("in_caller", [True, False])
def test_an_error_in_any_thread_stops_all_and_is_raised(in_caller):
    together, caller, done = Barrier(3), threading.get_ident(), []

    def work(row, _scratch):
        if row < 3:
            together.wait(PATIENCE_S)
            if (threading.get_ident() == caller) == in_caller:
                raise OSError("disk gone")
        time.sleep(0.002)  # lets the other threads run
        done.append(row)

    with RowPool(object, 3, "rows") as pool:
        with pytest.raises(OSError, match="disk gone"):
            pool.run(work, 5000)  # takes 5 s
        count = len(done)
        assert count < 4900
        pool.run(lambda _row, _scratch: None, 10)
        assert len(done) == count, "no thread was still working when the error was raised"


def test_stop_is_checked_before_each_row():
    stop, done = Event(), []

    def work(row, _scratch):
        done.append(row)
        stop.set()

    with RowPool(object, 2, "rows") as pool, pytest.raises(Stopped):
        pool.run(work, 1000, stop)
    assert 1 <= len(done) <= 2


def run_in_fork(pool, queue):
    rows = []
    pool.run(lambda row, _scratch: rows.append(row), 10)
    queue.put(sorted(rows))


def test_a_forked_child_starts_threads_of_its_own():
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with RowPool(object, 3, "rows") as pool:
        pool.run(lambda _row, _scratch: time.sleep(0.01), 10)
        child = context.Process(target=run_in_fork, args=(pool, queue))
        child.start()
        assert queue.get(timeout=PATIENCE_S) == list(range(10))
        child.join()


def test_the_module_needs_no_torch_and_no_pyarrow():
    """`pupilseg predict` runs its stages in threads, with ONNX Runtime alone."""
    program = (
        "import sys; sys.modules['torch'] = sys.modules['pyarrow'] = None; "
        "import pupilseg.runtime.threads"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
