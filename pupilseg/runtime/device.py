"""Devices by name, fast arithmetic modes, pinned memory, and timestamps."""

from __future__ import annotations

import math
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from pupilseg.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from torch import Tensor


def find_device(name: str | torch.device | None) -> torch.device:
    """Returns the device with a name.

    Args:
        name: cpu, cuda, cuda:N, mps, or auto (the same as None): CUDA if available, else the CPU.

    Raises:
        UsageError: the name is unknown, or the device is not available.
    """
    if name is None or name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(
            f"unknown device {name!r}; expected auto, cpu, cuda, cuda:N or mps"
        ) from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UsageError(
                f"device {name!r} is not available: this machine has {count} CUDA devices that "
                f"torch {torch.__version__} can use; pass --device cpu, or install a CUDA build of "
                "torch"
            )
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError(
            "device 'mps' is not available: it needs macOS on Apple silicon; pass --device cpu"
        )
    elif device.type not in ("cpu", "mps"):
        raise UsageError(
            f"device {name!r} is not supported; expected auto, cpu, cuda, cuda:N or mps"
        )
    return device


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """Copies a CPU tensor to a device; does not wait for the copy on CUDA."""
    if device.type == "cuda":
        return pinned(values.shape, values.dtype).copy_(values).to(device, non_blocking=True)
    return values.to(device)


def pinned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Returns an uninitialized CPU tensor in pinned memory, from which CUDA copies without waiting.

    Raises:
        UsageError: the memory cannot be allocated or pinned.
    """
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    except RuntimeError as error:
        megabytes = math.prod(shape) * dtype.itemsize / 1e6
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"cannot pin {megabytes:.1f} MB of host memory for copies to CUDA ({reason}); raise "
            "the memory limit of this job or container, or use a smaller --batch-size"
        ) from error


@contextmanager
def fast_arithmetic(
    device: torch.device, *, tf32: bool = True, cudnn_benchmark: bool = True
) -> Generator[None]:
    """Enables TF32 and cuDNN autotuning on CUDA within a `with` block.

    The settings are global to the process and are restored at the end of the block. On other
    devices nothing changes.

    Args:
        device: the device that will compute.
        tf32: compute float32 products with a mantissa of 10 bits instead of 23.
        cudnn_benchmark: time cuDNN's convolution kernels and use the fastest for each shape.
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


class Timestamp:
    """The time at which a device has finished the work queued so far.

    On CUDA this is an event in the device's current stream, so that recording it does not wait. On
    other devices it is the host's clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        self._time = time.perf_counter()
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True, blocking=True)
            self._event.record(torch.cuda.current_stream(device))

    def seconds_since(self, earlier: Timestamp) -> float:
        """Returns the seconds between two timestamps; on CUDA waits for this one."""
        if self._event is None or earlier._event is None:
            return self._time - earlier._time
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1000
