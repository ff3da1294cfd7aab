"""Feeds turn lists of sample indices into tensors; the loader handles order, epochs and state.

`CpuFeed` decodes the mapped files on the CPU, `ResidentFeed` keeps encoded rows on a device, and
`cuda_stream.StreamFeed` streams encoded rows to a device.
"""

from __future__ import annotations

import mmap
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch

from pupilseg.loader.decode import BatchDecoder, gather_row, layout_of
from pupilseg.runtime.device import on_device
from pupilseg.runtime.host import host_memory
from pupilseg.runtime.threads import RowPool, prefetch
from pupilseg.shards.codec import FrameDecoder, write_network_input
from pupilseg.shards.format import COLUMNS

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Sequence
    from threading import Event

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from pupilseg.loader.decode import Layout
    from pupilseg.shards.reader import ShardSet

    IndexBatches = Sequence[NDArray[np.int64]]

THREAD_NAME = "pupilseg-loader"


@dataclass(frozen=True, slots=True)
class FeedOptions:
    """Settings of a feed; see `loader.make_loader`.

    Attributes:
        columns: columns to decode, a subset of `decode.DECODED`.
        samples: number of samples in use, from the first.
        batch_rows: rows of a full batch.
        label_dtype: dtype of the labels.
        device: device of the tensors.
        ring: number of batch buffers (`CpuFeed`).
        threads: number of threads that decode or gather rows.
        compiled: decode full batches in one pass of `torch.compile` (CUDA only).
    """

    columns: tuple[str, ...]
    samples: int
    batch_rows: int
    label_dtype: torch.dtype
    device: torch.device
    ring: int
    threads: int
    compiled: bool

    @property
    def compiled_rows(self) -> int:
        """Batch size to compile the decoder for; 0 for none."""
        return self.batch_rows if self.compiled and self.device.type == "cuda" else 0

    def row_pool(self) -> RowPool[FrameDecoder]:
        """Returns a pool of `threads` threads, each with a decoder of its own."""
        return RowPool(FrameDecoder, max(1, self.threads), THREAD_NAME)


class Feed(Protocol):
    """Produces the decoded tensors of batches, without `index`."""

    name: str

    def batches(self, plan: IndexBatches) -> Generator[dict[str, Tensor]]:
        """Yields column -> tensor on the device for each array of sample indices."""
        ...

    def close(self) -> None:
        """Frees the buffers."""
        ...


class ReadAhead:
    """Asks the kernel to read all rows of a batch from disk at once.

    Without it, rows are read one after another: 10.5 ms per sample from a cold disk instead of 1.4
    (docs/benchmarks.md). For rows that are already in memory the call takes 0.04 ms, so it is made
    in the first pass only, or in every pass if the files exceed half of the host's memory.

    Args:
        shards: the open shards.
        layout: names the fields to read.
    """

    def __init__(self, shards: ShardSet, layout: Layout) -> None:
        self._shards = shards
        self._fields = [field.name for field in layout.fields]
        size = sum(len(shard.mapping) for shard in shards.shards)
        self._every_pass = size > host_memory() // 2
        self._active = hasattr(mmap, "MADV_WILLNEED")

    def __call__(self, indices: Iterable[int]) -> None:
        """Starts reading samples, without waiting."""
        if self._active:
            for index in indices:
                shard, row = self._shards.locate(int(index))
                shard.read_ahead(row, self._fields)

    def end_pass(self) -> None:
        """Marks the end of a pass over all samples."""
        self._active = self._active and self._every_pass


class CpuFeed:
    """Decodes rows of the mapped files into a ring of batch buffers, one batch ahead.

    A batch is overwritten once `ring - 1` more have been drawn. With 0 threads, a batch is decoded
    when it is drawn. Each batch is copied to devices other than the CPU, such as "mps".
    """

    name = "mapping"

    def __init__(self, shards: ShardSet, options: FeedOptions) -> None:
        self._shards = shards
        self._options = options
        self._pool = options.row_pool()
        self._read_ahead = ReadAhead(shards, layout_of(shards, options.columns))
        self._slots: list[dict[str, Tensor]] = []

    def batches(self, plan: IndexBatches) -> Generator[dict[str, Tensor]]:
        """Yields the batches as views of the buffers."""
        ring = self._options.ring
        while len(self._slots) < ring:
            self._slots.append(self._new_slot())
        with self._pool:
            if self._options.threads:
                with closing(prefetch(self._fill, plan, ring)) as filled:
                    for batch in filled:
                        yield self._to_device(batch)
            else:
                for number, indices in enumerate(plan):
                    yield self._to_device(self._fill(number % ring, indices, None))
        self._read_ahead.end_pass()

    def _new_slot(self) -> dict[str, Tensor]:
        slot = {}
        for column in self._options.columns:
            spec = COLUMNS[column]
            shape = (1, *spec.shape) if column == "image" else spec.shape
            dtype = self._options.label_dtype if column == "label" else torch.float32
            slot[column] = torch.empty((self._options.batch_rows, *shape), dtype=dtype)
        return slot

    def _fill(self, slot: int, indices: NDArray[np.int64], stop: Event | None) -> dict[str, Tensor]:
        """Decodes a batch into a slot."""
        batch = {name: tensor[: len(indices)] for name, tensor in self._slots[slot].items()}
        arrays = {name: tensor.numpy() for name, tensor in batch.items()}
        images = arrays.pop("image", None)
        self._read_ahead(indices)

        def decode(row: int, decoder: FrameDecoder) -> None:
            shard, stored_row = self._shards.locate(int(indices[row]))
            if images is not None:
                write_network_input(shard.fields["image"][stored_row], images[row, 0])
            shard.decode(stored_row, {name: a[row] for name, a in arrays.items()}, decoder)

        self._pool.run(decode, len(indices), stop)
        return batch

    def _to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if self._options.device.type == "cpu":
            return batch
        return {name: tensor.to(self._options.device) for name, tensor in batch.items()}

    def close(self) -> None:
        """Frees the ring."""
        self._slots = []


class ResidentFeed:
    """Keeps the encoded columns on the device; a batch is one gather and decode there.

    Batches are new tensors of the device's caching allocator and stay valid as long as they are
    referenced. On the CPU this feed gives the same numbers as `CpuFeed` but is slower; it is
    supported there so that tests cover it without a CUDA device.
    """

    name = "resident"
    _STAGING_BYTES = 64 << 20

    def __init__(self, shards: ShardSet, options: FeedOptions) -> None:
        layout = layout_of(shards, options.columns)
        device = self._device = options.device
        self._decode = BatchDecoder(layout, device, options.label_dtype, options.compiled_rows)
        self._packed = layout.empty(options.samples, device)
        rows = max(1, min(options.samples, self._STAGING_BYTES // layout.row_bytes))
        # Torch has no read-only tensors, so rows are copied from the mapping by NumPy.
        cpu = torch.device("cpu")
        staging = layout.empty_pinned(rows) if device.type == "cuda" else layout.empty(rows, cpu)
        read_ahead = ReadAhead(shards, layout)
        with options.row_pool() as pool:
            for start in range(0, options.samples, rows):
                indices = range(start, min(start + rows, options.samples))
                read_ahead(indices)
                pool.run(partial(gather_row, layout, shards, indices, staging), len(indices))
                for name, tensor in self._packed.items():
                    tensor[indices.start : indices.stop].copy_(staging[name][: len(indices)])

    def batches(self, plan: IndexBatches) -> Generator[dict[str, Tensor]]:
        """Yields the batches."""
        if not plan:
            return
        order = on_device(torch.cat([torch.from_numpy(indices) for indices in plan]), self._device)
        for rows in torch.split(order, [len(indices) for indices in plan]):
            yield self._decode(self._packed, rows)

    def close(self) -> None:
        """Frees the columns on the device."""
        self._packed = {}
