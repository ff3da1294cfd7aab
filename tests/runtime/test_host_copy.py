"""Host copies hold the values at the time of the copy, each tensor in its own storage."""

import pytest
import torch

from pupilseg.runtime.host_copy import HostCopy

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def tree_on(device):
    kernel = torch.arange(24.0).view(2, 3, 2, 2).to(device, memory_format=torch.channels_last)
    return {
        "kernel": kernel,
        "nested": [{"count": torch.tensor(7, device=device)}, (1.5, "text", None)],
        "flag": torch.tensor([True, False], device=device),
        "empty": torch.zeros(0, device=device),
        "host": torch.ones(3, dtype=torch.uint8),
    }


@pytest.mark.parametrize("device", DEVICES)
def test_later_changes_do_not_reach_the_copy(device):
    tree = tree_on(device)
    copy = HostCopy(tree)
    for tensor in (tree["kernel"], tree["nested"][0]["count"], tree["host"]):
        tensor.zero_()
    read = copy.read()
    assert torch.equal(read["kernel"], torch.arange(24.0).view(2, 3, 2, 2))
    assert read["nested"][0]["count"] == 7
    assert list(read["nested"][1]) == [1.5, "text", None]
    assert read["flag"].tolist() == [True, False]
    assert read["empty"].shape == (0,)
    assert read["host"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("device", DEVICES)
def test_each_tensor_is_contiguous_on_the_cpu_and_owns_its_storage(device):
    read = HostCopy(tree_on(device)).read()
    for tensor in (read["kernel"], read["flag"], read["host"]):
        assert tensor.device.type == "cpu"
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_copies_do_not_require_gradients():
    weight = torch.ones(2, requires_grad=True)
    assert not HostCopy({"weight": weight}).read()["weight"].requires_grad


@pytest.mark.gpu
def test_starting_a_copy_does_not_wait():
    tree = tree_on("cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        copy = HostCopy(tree)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert copy.read()["flag"].tolist() == [True, False]


@pytest.mark.gpu
def test_a_copy_from_a_device_that_is_not_the_current_one_is_waited_for():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    device = torch.device("cuda:1")
    value = torch.zeros(1 << 24, device=device)
    with torch.cuda.device(device):
        torch.cuda._sleep(500_000_000)
    value.fill_(1)
    copy = HostCopy({"value": value})
    assert torch.cuda.current_device() == 0
    assert copy.read()["value"].min() == 1
