"""Measures whether a CUDA device can read mapped files directly, compared with pinned buffers.

python -m benchmarks.register DIR/train [--batch-size 64] [--batches 50]

Calls `cudaHostRegister` on a mapping of the first file: read-only, as in the loader, with and
without the flag for read-only memory, and as a private copy-on-write mapping. If registration
succeeds, two ways are timed alternately: copying packed rows to the device directly from the
mapping, and gathering them into a pinned buffer that is then copied, as the loader does. llama.cpp
has stopped registering mappings (ggml-org/llama.cpp#6206).

This is a separate program because a failed registration leaves an error that the next CUDA call of
the process reports.
"""

from __future__ import annotations

import argparse
import mmap
import time
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks.machine import machine_line
from pupilseg.cli.program import main_program, positive_int
from pupilseg.errors import UsageError
from pupilseg.loader.decode import DECODED, WEIGHT_VALUE, gather_row, layout_of
from pupilseg.runtime.device import find_device
from pupilseg.runtime.threads import RowPool
from pupilseg.shards import open_shards
from pupilseg.shards.codec import FrameDecoder

if TYPE_CHECKING:
    from collections.abc import Callable

    from pupilseg.shards.reader import ShardSet

READ_ONLY = 0x08
"""`cudaHostRegisterReadOnly`, for memory that the process itself cannot write."""
TRIALS = [
    ("read-only mapping, no flag", mmap.ACCESS_READ, 0),
    ("read-only mapping, cudaHostRegisterReadOnly", mmap.ACCESS_READ, READ_ONLY),
    ("copy-on-write mapping, no flag", mmap.ACCESS_COPY, 0),
]


def best_seconds(work: dict[str, Callable[[], object]], rounds: int = 5) -> dict[str, float]:
    """Returns the minimum time of each function in seconds, including the device's work.

    The functions are called alternately.
    """
    found = dict.fromkeys(work, float("inf"))
    for _ in range(rounds):
        for name, call in work.items():
            torch.cuda.synchronize()
            started = time.perf_counter()
            call()
            torch.cuda.synchronize()
            found[name] = min(found[name], time.perf_counter() - started)
    return found


def compare(shards: ShardSet, mapping: mmap.mmap, batch_size: int, batches: int) -> str:
    """Returns the speeds of both methods for rows of the first file, as text."""
    device = torch.device("cuda")
    layout, shard = layout_of(shards, DECODED), shards.shards[0]
    fields = [field for field in layout.fields if field.name != WEIGHT_VALUE]
    count = len(shard.names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of read-only memory
        host = {
            field.name: torch.frombuffer(
                mapping,
                dtype=getattr(torch, field.dtype),
                count=count * field.width,
                offset=shard.offsets[field.name],
            ).view(count, field.width)
            for field in fields
        }
    slot = layout.empty_pinned(batch_size)
    on_device = layout.empty(batch_size, device)
    order = np.random.default_rng(0).integers(0, count, (batches, batch_size))

    def direct() -> None:
        for rows in order.tolist():
            for place, row in enumerate(rows):
                for name, column in host.items():
                    on_device[name][place].copy_(column[row], non_blocking=True)

    with RowPool(FrameDecoder, 4, "gather") as pool:

        def gathered() -> None:
            for rows in order:
                pool.run(partial(gather_row, layout, shards, rows, slot), batch_size)
                for name, tensor in on_device.items():
                    tensor.copy_(slot[name], non_blocking=True)
                torch.cuda.synchronize()  # before the only slot is written again

        seconds = best_seconds({"direct": direct, "gathered": gathered})
    moved = batches * batch_size * layout.row_bytes
    return ", ".join(f"{name} {moved / took / 1e9:.1f} GB/s" for name, took in seconds.items())


def trial(shards: ShardSet, access: int, flag: int, args: argparse.Namespace) -> str:
    """Registers a mapping of the first file and measures it; returns the result as text."""
    with shards.shards[0].path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=access)  # an empty file is an error
    address = np.frombuffer(mapping, np.uint8).ctypes.data
    cudart = torch.cuda.cudart()
    started = time.perf_counter()
    code = int(cudart.cudaHostRegister(address, len(mapping), flag))
    took = time.perf_counter() - started
    if code:
        return f"refused with error {code}"
    try:
        speeds = compare(shards, mapping, args.batch_size, args.batches)
        return f"registered {len(mapping) / 1e6:.0f} MB in {took:.3f} s; {speeds}"
    finally:
        torch.cuda.synchronize()
        cudart.cudaHostUnregister(address)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.register", description=__doc__)
    parser.add_argument("shards", type=Path, help="a split, for example DIR/train")
    parser.add_argument("--batch-size", type=positive_int, default=64)
    parser.add_argument("--batches", type=positive_int, default=50)
    args = parser.parse_args()
    device = find_device("cuda")
    torch.cuda.init()
    print(machine_line("torch", "numpy"))
    print(torch.cuda.get_device_name(device))
    with open_shards(args.shards) as shards:
        if not shards.shards[0].names:
            raise UsageError(f"{shards.shards[0].path} has no rows; choose another split")
        for name, access, flag in TRIALS:
            try:
                print(f"{name}: {trial(shards, access, flag, args)}")
            except RuntimeError as error:  # may be left from a failed registration
                print(f"{name}: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    main_program(main)
