"""The device that a name stands for, or what is wrong with the name."""

from __future__ import annotations

import torch

from pupilseg.errors import UsageError


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
