"""The device that a name stands for, its fast arithmetic, and its clock."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from pupilseg.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Generator

    from torch import Tensor


def find_device(name: str | torch.device | None) -> torch.device:
    """Returns the device of a name; None takes CUDA where there is one, else the CPU.

    Raises:
        UsageError: the name is unknown, or the device is not there.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}; expected cpu, cuda, cuda:N or mps") from error
    if device.type == "cuda":
        there = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= there:
            raise UsageError(
                f"device {name!r} is not there: this machine has {there} CUDA devices that torch "
                f"{torch.__version__} can use; give --device cpu, or install a CUDA build of torch"
            )
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("device 'mps' is not there: it needs macOS on Apple silicon")
    elif device.type not in ("cpu", "mps"):
        raise UsageError(f"device {name!r} is not supported; expected cpu, cuda, cuda:N or mps")
    return device


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """Returns a copy of a CPU tensor on a device, on CUDA without waiting for it."""
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


@contextmanager
def fast_arithmetic(
    device: torch.device, *, tf32: bool = True, cudnn_benchmark: bool = True
) -> Generator[None]:
    """Lets CUDA round float32 products to TF32 and time its convolution kernels, for a while.

    These switches belong to the whole process; they are put back at the end. Elsewhere than on
    CUDA nothing changes.

    Args:
        device: that will compute.
        tf32: products with 10 bits of mantissa instead of 23.
        cudnn_benchmark: pick the fastest convolution for each shape by trying.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=cudnn_benchmark, deterministic=False, allow_tf32=tf32
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


class Moment:
    """A point in a device's work; on CUDA an event in its stream, which nothing waits for.

    Args:
        device: whose work is timed.
    """

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        self._time = time.perf_counter()
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()

    def seconds_since(self, earlier: Moment) -> float:
        """Returns the seconds from an earlier moment to this one; waits for it on CUDA."""
        if self._event is None or earlier._event is None:
            return self._time - earlier._time
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1000
