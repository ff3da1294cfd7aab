"""Sums over processes through sockets, tested with threads of one process."""

import socket
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pupilseg.errors import ParallelError
from pupilseg.runtime.exchange import Exchange, connected_sockets
from tests.helpers.waiting import PATIENCE_S


def sums(values, timeout_s=PATIENCE_S):
    """Returns the sum that each rank receives."""
    exchanges = [
        Exchange(rank, sockets, timeout_s)
        for rank, sockets in enumerate(connected_sockets(len(values)))
    ]
    with ThreadPoolExecutor(len(values)) as pool:
        results = list(pool.map(lambda e, v: e.sum_(v.clone()), exchanges, values))
    for exchange in exchanges:
        exchange.close()
    return results


@settings(max_examples=30, deadline=None)
@given(
    st.integers(2, 5), st.sampled_from([1, 7, 32, 5000]),
    st.sampled_from([torch.float32, torch.float64, torch.int64]),
)  # fmt: skip
def test_every_rank_gets_the_sum_in_the_order_of_the_ranks(ranks, size, dtype):
    random = np.random.default_rng(size)
    values = [torch.tensor(random.normal(0, 1e6, size)).to(dtype) for _ in range(ranks)]
    expected = values[0].clone()
    for value in values[1:]:
        expected += value
    for result in sums(values):
        assert torch.equal(result, expected)


def test_messages_larger_than_a_socket_buffer_do_not_deadlock():
    values = [torch.full((3_000_000,), float(rank)) for rank in range(3)]
    for result in sums(values):
        assert torch.equal(result, torch.full((3_000_000,), 3.0))


def test_shapes_and_scalars_are_kept():
    results = sums([torch.tensor(2), torch.tensor(3)])
    assert [r.item() for r in results] == [5, 5]
    assert results[0].shape == ()
    assert sums([torch.ones(2, 3)] * 2)[1].shape == (2, 3)


@pytest.fixture
def pair():
    """The exchange of rank 0 and the socket of rank 1."""
    mine, theirs = connected_sockets(2)
    exchange = Exchange(0, mine, timeout_s=0.05)
    yield exchange, theirs[0]
    exchange.close()
    theirs[0].close()


def test_a_process_that_ended_is_noticed_at_once(pair):
    exchange, other = pair
    other.close()
    with pytest.raises(ParallelError, match="another process of this job ended"):
        exchange.sum_(torch.ones(4))


def test_a_process_that_ends_in_the_middle_of_a_message_is_noticed(pair):
    exchange, other = pair
    other.send(b"1234")
    other.shutdown(socket.SHUT_WR)
    with pytest.raises(ParallelError, match="process 1 closed its connection"):
        exchange.sum_(torch.ones(4))


def test_a_process_that_does_not_answer_is_named(pair):
    with pytest.raises(ParallelError, match=r"no answer from process 1 in 0\.05 s"):
        pair[0].sum_(torch.ones(4))
