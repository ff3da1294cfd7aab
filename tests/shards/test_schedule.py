"""Who builds which shard: each once, in runs, and nobody idle while another has work."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pupilseg.shards.schedule import Runs


@given(st.integers(0, 40), st.integers(1, 6), st.randoms(use_true_random=False))
def test_each_shard_once_whoever_is_quick(count, workers, rng):
    runs, given_to = Runs(range(count), workers), []
    while len(given_to) < count:
        shard = runs.next(rng.randrange(workers))
        assert shard is not None, "a worker that asks gets work while there is some"
        given_to.append(shard)
    assert sorted(given_to) == list(range(count))
    assert all(runs.next(worker) is None for worker in range(workers))


def test_workers_of_one_speed_walk_forwards_and_jump_never():
    runs, order = Runs(range(8), 2), {0: [], 1: []}
    for turn in range(8):
        order[turn % 2].append(runs.next(turn % 2))
    assert order == {0: [0, 1, 2, 3], 1: [4, 5, 6, 7]}


def test_who_is_done_takes_the_far_half_of_what_is_left():
    runs = Runs(range(10), 2)
    assert [runs.next(1) for _ in range(5)] == [5, 6, 7, 8, 9]
    assert runs.next(0) == 0
    assert [runs.next(1), runs.next(1)] == [3, 4]
    assert [runs.next(0), runs.next(0)] == [1, 2]
    assert runs.next(0) is None
