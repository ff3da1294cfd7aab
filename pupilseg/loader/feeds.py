"""Where a loader's batches come from: the mapping decoded on the CPU, or packed rows on a device.

A feed turns lists of sample indices into tensors; order, epochs and state are the loader's.
"""

from __future__ import annotations

import mmap
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch

from pupilseg.errors import DataError
from pupilseg.loader.decode import BatchDecoder, gather_row, layout_of
from pupilseg.runtime.device import on_device
from pupilseg.runtime.memory import host_memory
from pupilseg.runtime.threads import RowPool, prefetch
from pupilseg.shards.codec import FrameDecoder
from pupilseg.shards.format import COLUMNS, RAW, U2

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Sequence
    from threading import Event

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from pupilseg.loader.decode import Layout
    from pupilseg.shards.reader import ShardSet

    Plan = Sequence[NDArray[np.int64]]


THREAD_NAME = "pupilseg-loader"


class Feed(Protocol):
    """Gives the decoded tensors of batches, without `index`."""

    name: str

    def batches(self, plan: Plan) -> Generator[dict[str, Tensor]]:
        """Yields column -> tensor on the device for each array of sample indices."""
        ...

    def close(self) -> None:
        """Frees its buffers."""
        ...


class ReadAhead:
    """Has the kernel read the rows of a batch from disk all at once, where they may not be cached.

    Without it each row is waited for in turn: 10.5 ms a sample from a cold disk in place of 1.4
    (docs/benchmarks.md). Of rows that are in memory it takes 0.04 ms, so it is done in the first
    pass, and in all of them where the files are larger than half of the host's memory.

    Args:
        shards: open.
        layout: names the fields that are read.
    """

    def __init__(self, shards: ShardSet, layout: Layout) -> None:
        self._shards, self._fields = shards, [field.name for field in layout.fields]
        size = sum(len(shard.mapping) for shard in shards.shards)
        self._always = size > host_memory() // 2
        self._wanted = hasattr(mmap, "MADV_WILLNEED")

    def __call__(self, indices: Iterable[int]) -> None:
        """Starts the reading of samples."""
        if self._wanted:
            for index in indices:
                shard, row = self._shards.locate(int(index))
                shard.read_ahead(row, self._fields)

    def end_of_pass(self) -> None:
        """Says that every sample has been read once."""
        self._wanted = self._wanted and self._always


class CpuFeed:
    """Decodes rows of the mapping into a ring of batch buffers.

    Args:
        shards: open.
        columns: to decode, out of `decode.DECODED`.
        batch_size: rows of a slot.
        label_dtype: of the labels.
        ring: slots; a batch is overwritten once `ring - 1` more have been drawn.
        threads: that decode one batch ahead; 0 decodes when a batch is asked for.
        device: batches are copied to it where it is not the CPU (such as "mps").
    """

    name = "mapping"

    def __init__(
        self,
        shards: ShardSet,
        columns: tuple[str, ...],
        batch_size: int,
        label_dtype: torch.dtype,
        *,
        ring: int,
        threads: int,
        device: torch.device,
    ) -> None:
        self._shards, self._columns = shards, columns
        self._batch_size, self._label_dtype = batch_size, label_dtype
        self._ring, self._ahead, self._device = ring, threads > 0, device
        self._pool = RowPool(FrameDecoder, max(1, threads), THREAD_NAME)
        self._read_ahead = ReadAhead(shards, layout_of(shards, columns))
        self._slots: list[dict[str, Tensor]] = []

    def batches(self, plan: Plan) -> Generator[dict[str, Tensor]]:
        """Yields the batches; a view of a slot each."""
        while len(self._slots) < self._ring:
            self._slots.append(self._new_slot())
        with self._pool:
            if self._ahead:
                with closing(prefetch(self._fill, plan, self._ring)) as filled:
                    for batch in filled:
                        yield self._to_device(batch)
            else:
                for number, indices in enumerate(plan):
                    yield self._to_device(self._fill(number % self._ring, indices, None))
        self._read_ahead.end_of_pass()

    def _new_slot(self) -> dict[str, Tensor]:
        slot = {}
        for column in self._columns:
            spec = COLUMNS[column]
            shape = (1, *spec.shape) if column == "image" else spec.shape
            dtype = self._label_dtype if column == "label" else torch.float32
            slot[column] = torch.empty((self._batch_size, *shape), dtype=dtype)
        return slot

    def _fill(self, slot: int, indices: NDArray[np.int64], stop: Event | None) -> dict[str, Tensor]:
        """Decodes a batch into a slot."""
        batch = {name: tensor[: len(indices)] for name, tensor in self._slots[slot].items()}
        arrays = {name: tensor.numpy() for name, tensor in batch.items()}
        self._read_ahead(indices)

        def work(row: int, decoder: FrameDecoder) -> None:
            out = {name: array[row] for name, array in arrays.items()}
            self._decode(int(indices[row]), out, decoder)

        self._pool.run(work, len(indices), stop)
        return batch

    def _decode(self, index: int, out: dict[str, NDArray[Any]], decoder: FrameDecoder) -> None:
        """Decodes a sample.

        Raises:
            DataError: its stored bytes are damaged; names file and row.
        """
        shard, row = self._shards.locate(index)
        stored = shard.row(row)
        for column, target in out.items():
            encoding = shard.encodings[column]
            if column == "image":
                decoder.image(stored[column], target[0])
            elif column == "label":
                decoder.label(stored[column], target)
            elif encoding["encoding"] == RAW:
                target[...] = stored[column].reshape(target.shape)
            elif encoding["encoding"] == U2:
                first = stored[f"{column}_first"]
                try:
                    decoder.distances(stored[column], first, stored["label"], target)
                except DataError as error:
                    raise shard.damaged(row, error) from error
            else:
                decoder.weights(stored[column], encoding["value"], target)

    def _to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if self._device.type == "cpu":
            return batch
        return {name: tensor.to(self._device) for name, tensor in batch.items()}

    def close(self) -> None:
        """Frees the ring."""
        self._slots = []


class ResidentFeed:
    """Keeps the packed columns on the device; a batch is one gather and decode there.

    Batches are new tensors of the device's caching allocator, valid as long as they are held.

    Args:
        shards: open; read once.
        columns: to decode.
        samples: how many to keep, from the first.
        label_dtype: of the labels.
        device: any; on the CPU it is a second, slower form of `CpuFeed` with the same numbers.
        threads: that read.
        compiled_rows: as `BatchDecoder`.
    """

    name = "resident"
    _STAGING_BYTES = 64 << 20

    def __init__(
        self,
        shards: ShardSet,
        columns: tuple[str, ...],
        samples: int,
        label_dtype: torch.dtype,
        device: torch.device,
        *,
        threads: int,
        compiled_rows: int,
    ) -> None:
        layout = layout_of(shards, columns)
        self._device = device
        self._decode = BatchDecoder(layout, device, label_dtype, compiled_rows)
        self._packed = layout.empty(samples, device)
        rows = max(1, min(samples, self._STAGING_BYTES // layout.row_bytes))
        # Torch may not see the mapping itself: it has no read-only tensors.
        staging = layout.empty(rows, torch.device("cpu"), pinned=device.type == "cuda")
        read_ahead = ReadAhead(shards, layout)
        with RowPool(FrameDecoder, max(1, threads), THREAD_NAME) as readers:
            for start in range(0, samples, rows):
                indices = range(start, min(start + rows, samples))
                read_ahead(indices)
                readers.run(partial(gather_row, layout, shards, indices, staging), len(indices))
                for name, tensor in self._packed.items():
                    tensor[indices.start : indices.stop].copy_(staging[name][: len(indices)])
        if compiled_rows:  # now, so that no batch waits for it
            self._decode(self._packed, torch.zeros(compiled_rows, dtype=torch.int64, device=device))

    def batches(self, plan: Plan) -> Generator[dict[str, Tensor]]:
        """Yields the batches."""
        if not plan:
            return
        order = on_device(torch.cat([torch.from_numpy(indices) for indices in plan]), self._device)
        for rows in torch.split(order, [len(indices) for indices in plan]):
            yield self._decode(self._packed, rows)

    def close(self) -> None:
        """Frees the columns on the device."""
        self._packed = {}
