"""Rows over threads: each once, errors and a stop reach the caller when nobody works any more."""

import threading
import time
from threading import Barrier, Event

import pytest

from pupilseg.runtime.prefetch import Stopped
from pupilseg.runtime.row_threads import RowThreads


@pytest.mark.parametrize("count", [1, 3])
def test_each_row_is_done_once_and_a_decoder_serves_one_thread(count):
    done, users = [], {}
    together = Barrier(count)

    def work(row, decoder):
        if row < count:
            together.wait(20)  # all threads take part
        done.append(row)
        users.setdefault(id(decoder), set()).add(threading.get_ident())

    with RowThreads(count) as threads:
        for rows in (20, 0, 1):
            done.clear()
            if rows < count:
                together = Barrier(rows or 1)
            threads.run(work, rows)
            assert sorted(done) == list(range(rows))
    assert len(users) == count
    with RowThreads(count) as threads:
        threads.run(lambda row, _decoder: done.append(row), 5)


@pytest.mark.parametrize("mine", [True, False])
def test_an_error_ends_all_and_reaches_the_caller(mine):
    """Whichever thread it happens in."""
    together, caller, done = Barrier(3), threading.get_ident(), []

    def work(row, _decoder):
        if row < 3:
            together.wait(20)
            if (threading.get_ident() == caller) == mine:
                raise OSError("disk gone")
        time.sleep(0.002)  # gives the others their turn
        done.append(row)

    with RowThreads(3) as threads:
        with pytest.raises(OSError, match="disk gone"):
            threads.run(work, 200)
        count = len(done)
        assert count < 190
        threads.run(lambda _row, _decoder: None, 10)
        assert len(done) == count, "nobody still worked when the error was raised"


def test_a_stop_is_seen_between_rows():
    stop, done = Event(), []

    def work(row, _decoder):
        done.append(row)
        stop.set()

    with RowThreads(2) as threads, pytest.raises(Stopped):
        threads.run(work, 1000, stop)
    assert 1 <= len(done) <= 2
