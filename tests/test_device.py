"""Devices by name, with a clear end where one is not there."""

import pytest
import torch

from pupilseg.device import find_device
from pupilseg.errors import UsageError


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
