"""Steps in threads: order, bounds, errors, and an end however the work ends."""

import contextlib
import threading
import time

import pytest

from pupilseg.runtime.streams import ahead


def threads():
    return [t for t in threading.enumerate() if t.name == "pupilseg-step"]


def test_order_and_end():
    assert list(ahead(range(100), 2)) == list(range(100))
    assert list(ahead([], 1)) == []
    assert list(ahead(ahead(iter("abc")))) == ["a", "b", "c"]
    assert not threads()


def test_another_thread_works_ahead_but_not_far():
    drawn = []

    def work():
        for i in range(20):
            drawn.append(threading.current_thread().name)
            yield i

    stream = ahead(work(), 2)
    assert not drawn  # nothing before it is asked for
    assert next(stream) == 0
    deadline = time.monotonic() + 5
    while len(drawn) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(drawn) == 4  # one taken, two waiting, one that finds no room
    assert list(stream) == list(range(1, 20))
    assert set(drawn) == {"pupilseg-step"}


def test_an_error_comes_after_what_was_done_before_it():
    def work():
        yield 1
        raise KeyError("the seventh frame")

    stream = ahead(ahead(work()))
    assert next(stream) == 1
    with pytest.raises(KeyError, match="seventh") as caught:
        next(stream)
    assert any(entry.name == "work" for entry in caught.traceback)
    assert not threads()


def test_a_consumer_that_goes_away_ends_all_steps():
    closed = []

    def work():
        try:
            yield from iter(int, 1)
        finally:
            closed.append(threading.current_thread().name)

    started = time.monotonic()
    with contextlib.closing(ahead(work(), 1)) as stream:
        assert next(stream) == 0
    assert time.monotonic() - started < 2
    assert closed == ["pupilseg-step"]
    assert not threads()
