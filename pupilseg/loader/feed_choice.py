"""Which feed a loader gets: what the device can hold decides, and the log says so."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from pupilseg.loader.decode import layout_of
from pupilseg.loader.feeds import CpuFeed, ResidentFeed

if TYPE_CHECKING:
    from pupilseg.loader.feeds import Feed
    from pupilseg.shards.reader import ShardSet

log = logging.getLogger(__name__)

MODES = ("auto", "resident", "stream")
_MOST_THREADS = 4
"""More bring nothing: a few fill the memory's bandwidth."""


def make_feed(
    mode: str,
    shards: ShardSet,
    columns: tuple[str, ...],
    samples: int,
    rows: int,
    label_dtype: torch.dtype,
    device: torch.device,
    *,
    ring: int,
    threads: int | None,
    compiled: bool,
) -> Feed:
    """Makes the feed of a loader.

    Args:
        mode: one of `MODES`.
        shards: open.
        columns: to decode.
        samples: used, from the first.
        rows: of a full batch.
        label_dtype: of the labels.
        device: of the tensors.
        ring: slots of a `CpuFeed`.
        threads: as `loader.make_loader`.
        compiled: as `loader.make_loader`.
    """
    if threads is None:
        threads = min(_MOST_THREADS, torch.get_num_threads())
    name = _choose_mode(mode, layout_of(shards, columns).row_bytes * samples, device)
    if name == CpuFeed.name:
        return CpuFeed(
            shards, columns, rows, label_dtype, ring=ring, threads=threads, device=device
        )
    compiled_rows = rows if compiled and device.type == "cuda" else 0
    options = {"threads": threads, "compiled_rows": compiled_rows}
    if name == ResidentFeed.name:
        return ResidentFeed(shards, columns, samples, label_dtype, device, **options)
    from pupilseg.loader.cuda_stream import StreamFeed

    return StreamFeed(shards, columns, rows, label_dtype, device, **options)


def _choose_mode(mode: str, needed: int, device: torch.device) -> str:
    """Returns the name of the feed for a mode, and says in the log which and why.

    Args:
        mode: one of `MODES`.
        needed: bytes of the packed columns.
        device: of the tensors.
    """
    size = f"{needed / 1e9:.2f} GB packed"
    if mode == "resident":
        name, why = mode, f"as asked, {size} on {device}"
    elif device.type != "cuda":
        name, why = CpuFeed.name, f"{size}, decoded on the CPU for {device}"
    elif mode == "stream":
        name, why = mode, f"as asked, {size} through pinned memory to {device}"
    else:
        free, _ = torch.cuda.mem_get_info(device)
        name = "resident" if needed <= free // 2 else "stream"
        relation = "at most" if name == "resident" else "more than"
        why = f"{size}, {relation} half of the {free / 1e9:.2f} GB free on {device}"
    log.info("loader: %s (%s)", name, why)
    return name
