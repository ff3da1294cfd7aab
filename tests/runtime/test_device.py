"""Devices by name, errors for missing ones, arithmetic modes and timestamps."""

import time

import pytest
import torch

from pupilseg.errors import UsageError
from pupilseg.runtime.device import Timestamp, fast_arithmetic, find_device, pinned


def test_the_cpu_is_always_available():
    assert find_device("cpu") == find_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("name", [None, "auto"])
def test_auto_is_cuda_if_available(name):
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert find_device(name).type == expected


def refused(name):
    with pytest.raises(UsageError) as caught:
        find_device(name)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_missing_cuda_names_the_flag_to_pass(name):
    message = refused(name)
    assert f"device '{name}' is not available" in message
    assert "0 CUDA devices" in message
    assert "--device cpu" in message


def test_a_cuda_index_beyond_the_last_is_not_available():
    assert "is not available" in refused("cuda:99")


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="has an MPS device")
def test_missing_mps():
    assert "Apple silicon" in refused("mps")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "cpu cpu"])
def test_an_unknown_name_is_quoted_with_the_valid_ones(name):
    message = refused(name)
    assert f"unknown device {name!r}" in message
    assert "auto, cpu, cuda, cuda:N or mps" in message


def test_a_device_of_another_kind_is_not_supported():
    assert "'meta' is not supported" in refused("meta")


def test_timestamps_on_the_cpu_use_its_clock():
    cpu = torch.device("cpu")
    first = Timestamp(cpu)
    second = Timestamp(cpu)
    assert 0 <= second.seconds_since(first) < 60
    assert first.seconds_since(second) <= 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_timestamps_on_a_gpu_are_events_in_its_stream(name):
    """The device is still busy when the host has already continued."""
    if name == "cuda:1" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    device = torch.device(name)
    matrix = torch.rand(4096, 4096, device=device)
    torch.cuda.synchronize(device)
    first = Timestamp(device)
    started = time.perf_counter()
    for _ in range(50):
        matrix = (matrix @ matrix).clamp(0, 1)
    second = Timestamp(device)
    launched = time.perf_counter() - started
    assert second.seconds_since(first) > launched


def switches():
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark


def test_fast_arithmetic_changes_cuda_settings_within_the_block_only():
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


def test_memory_that_cannot_be_pinned_is_reported_with_its_size(monkeypatch):
    def refuse(*_args, **_options):
        raise RuntimeError("CUDA error: out of memory\nmore lines")

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(UsageError) as caught:
        pinned((1000, 3000), torch.float32)
    assert "cannot pin 12.0 MB of host memory" in str(caught.value)
    assert "(CUDA error: out of memory); " in str(caught.value)
    assert "--batch-size" in str(caught.value)


@pytest.mark.gpu
def test_pinned_memory():
    memory = pinned((2, 3), torch.int16)
    assert memory.is_pinned()
    assert (memory.shape, memory.dtype) == ((2, 3), torch.int16)
