"""Each shard is built once, in contiguous runs, and no worker is idle while another has work."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pupilseg.shards.workers import WorkQueue


@given(st.integers(0, 40), st.integers(1, 6), st.randoms(use_true_random=False))
def test_each_shard_is_taken_once_at_any_speed(count, workers, rng):
    queue, given_to = WorkQueue(range(count), workers), []
    while len(given_to) < count:
        shard = queue.take(rng.randrange(workers))
        assert shard is not None, "a worker gets work while some is left"
        given_to.append(shard)
    assert sorted(given_to) == list(range(count))
    assert all(queue.take(worker) is None for worker in range(workers))


def test_workers_of_equal_speed_move_forward_without_jumps():
    queue, order = WorkQueue(range(8), 2), {0: [], 1: []}
    for turn in range(8):
        order[turn % 2].append(queue.take(turn % 2))
    assert order == {0: [0, 1, 2, 3], 1: [4, 5, 6, 7]}


def test_an_idle_worker_takes_the_second_half_of_the_longest_run():
    queue = WorkQueue(range(10), 2)
    assert [queue.take(1) for _ in range(5)] == [5, 6, 7, 8, 9]
    assert queue.take(0) == 0
    assert [queue.take(1), queue.take(1)] == [3, 4]
    assert [queue.take(0), queue.take(0)] == [1, 2]
    assert queue.take(0) is None
