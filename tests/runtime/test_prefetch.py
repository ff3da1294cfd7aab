"""The prefetch thread: order, slot lifetime, errors, and its end."""

import threading
import time
import traceback

import pytest

from pupilseg.runtime.prefetch import prefetch


def loader_threads():
    return [t for t in threading.enumerate() if t.name == "pupilseg-loader"]


@pytest.mark.parametrize("slots", [2, 3])
def test_a_slot_is_kept_until_slots_minus_one_more_are_drawn(slots):
    buffers = [None] * slots
    filled = []

    def fill(slot, item, _stop):
        buffers[slot] = item
        filled.append(item)
        return slot, item

    drawn = []
    for slot, item in prefetch(fill, range(20), slots):
        drawn.append((slot, item))
        time.sleep(0.003)  # lets the thread run as far ahead as it may
        for kept_slot, kept_item in drawn[-(slots - 1) :]:
            assert buffers[kept_slot] == kept_item
        assert max(filled) <= item + slots - 1
    assert [item for _, item in drawn] == list(range(20))
    assert not loader_threads()


def test_an_error_reaches_the_consumer_with_its_traceback():
    def fill(_slot, item, _stop):
        if item == 2:
            raise OSError("disk gone")
        return item

    drawn = []
    with pytest.raises(OSError, match="disk gone") as caught:
        drawn.extend(prefetch(fill, range(5), 2))
    assert "in fill" in "".join(traceback.format_tb(caught.value.__traceback__))
    assert not loader_threads()


def test_a_consumer_that_leaves_ends_the_thread():
    for _ in range(50):
        results = prefetch(lambda _slot, item, _stop: item, range(100), 2)
        assert next(results) == 0
        results.close()
    assert not loader_threads()


def test_stop_is_seen_within_a_fill():
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
