"""Devices by name, with a clear end where one is not there."""

import time

import pytest
import torch

from pupilseg.errors import UsageError
from pupilseg.runtime.device import Moment, fast_arithmetic, find_device


def test_the_cpu_is_always_there():
    assert find_device("cpu") == find_device(torch.device("cpu")) == torch.device("cpu")


def test_none_takes_cuda_where_there_is_one():
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert find_device(None).type == expected


def refused(name):
    with pytest.raises(UsageError) as caught:
        find_device(name)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_cuda_that_is_not_there_says_what_to_give(name):
    message = refused(name)
    assert f"device '{name}' is not there" in message
    assert "0 CUDA devices" in message
    assert "--device cpu" in message


def test_a_cuda_device_beyond_the_last_is_not_there():
    assert "is not there" in refused("cuda:99")


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is an MPS device")
def test_mps_that_is_not_there():
    assert "Apple silicon" in refused("mps")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "cpu cpu"])
def test_an_unknown_name_is_quoted_with_those_there_are(name):
    message = refused(name)
    assert f"unknown device {name!r}" in message
    assert "cpu, cuda, cuda:N or mps" in message


def test_a_device_of_another_kind_is_not_supported():
    assert "'meta' is not supported" in refused("meta")


def test_moments_on_the_cpu_are_its_clock():
    cpu = torch.device("cpu")
    first = Moment(cpu)
    second = Moment(cpu)
    assert 0 <= second.seconds_since(first) < 60
    assert first.seconds_since(second) <= 0


@pytest.mark.gpu
def test_moments_on_a_gpu_are_in_its_stream():
    """The device is busy for a while after the host has moved on."""
    device = torch.device("cuda")
    matrix = torch.rand(4096, 4096, device=device)
    torch.cuda.synchronize()
    first = Moment(device)
    started = time.perf_counter()
    for _ in range(50):
        matrix = (matrix @ matrix).clamp(0, 1)
    second = Moment(device)
    launched = time.perf_counter() - started
    assert second.seconds_since(first) > launched


def switches():
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark


def test_fast_arithmetic_is_for_cuda_and_for_a_while():
    before = switches()
    with fast_arithmetic(torch.device("cpu")):
        assert switches() == before
    with fast_arithmetic(torch.device("cuda"), tf32=True, cudnn_benchmark=True):
        assert switches() == ("high", True)
    with fast_arithmetic(torch.device("cuda"), tf32=False, cudnn_benchmark=False):
        assert switches() == ("highest", False)
    with pytest.raises(KeyError), fast_arithmetic(torch.device("cuda")):
        raise KeyError
    assert switches() == before
