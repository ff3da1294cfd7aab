"""Where a loader's batches come from: the mapping decoded on the CPU, or packed rows on a device.

A feed turns lists of sample indices into tensors; order, epochs and state are the loader's.
"""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any, Protocol

import torch

from pupilseg.errors import DataError
from pupilseg.prefetch import Stopped, prefetch
from pupilseg.shards.codec import FrameDecoder
from pupilseg.shards.decode import BatchDecoder, gather, layout_of
from pupilseg.shards.format import COLUMNS, RAW, U2

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from threading import Event

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from pupilseg.shards.reader import ShardSet

    Plan = Sequence[NDArray[np.int64]]


class Feed(Protocol):
    """Gives the decoded tensors of batches, without `index`."""

    name: str

    def batches(self, plan: Plan) -> Generator[dict[str, Tensor]]:
        """Yields column -> tensor on the device for each array of sample indices."""
        ...

    def close(self) -> None:
        """Frees its buffers."""
        ...


class CpuFeed:
    """Decodes rows of the mapping into a ring of batch buffers.

    Args:
        shards: open.
        columns: to decode, out of `decode.DECODED`.
        batch_size: rows of a slot.
        label_dtype: of the labels.
        ring: slots; a batch is overwritten once `ring - 1` more have been drawn.
        threaded: decode in a thread, one batch ahead.
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
        threaded: bool,
        device: torch.device,
    ) -> None:
        self._shards, self._columns = shards, columns
        self._batch_size, self._label_dtype = batch_size, label_dtype
        self._ring, self._threaded, self._device = ring, threaded, device
        self._decoder = FrameDecoder()
        self._slots: list[dict[str, Tensor]] = []

    def batches(self, plan: Plan) -> Generator[dict[str, Tensor]]:
        """Yields the batches; a view of a slot each."""
        while len(self._slots) < self._ring:
            self._slots.append(self._new_slot())
        if self._threaded:
            with closing(prefetch(self._fill, plan, self._ring)) as filled:
                for batch in filled:
                    yield self._to_device(batch)
        else:
            for number, indices in enumerate(plan):
                yield self._to_device(self._fill(number % self._ring, indices, None))

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
        for row, index in enumerate(indices):
            if stop is not None and stop.is_set():
                raise Stopped
            self._decode(int(index), {name: array[row] for name, array in arrays.items()})
        return batch

    def _decode(self, index: int, out: dict[str, NDArray[Any]]) -> None:
        """Decodes a sample.

        Raises:
            DataError: its stored bytes are damaged; names file and row.
        """
        shard, row = self._shards.locate(index)
        stored, decoder = shard.row(row), self._decoder
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
    """Keeps the packed columns on the device; a batch is a gather and a decode there.

    Args:
        shards: open; read once.
        columns: to decode.
        samples: how many to keep, from the first.
        label_dtype: of the labels.
        device: any; on the CPU it is a second, slower form of `CpuFeed` with the same numbers.
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
    ) -> None:
        self._layout = layout_of(shards, columns)
        self._device = device
        self._decode = BatchDecoder(self._layout, device, label_dtype)
        self._packed = self._layout.empty(samples, device)
        rows = max(1, min(samples, self._STAGING_BYTES // self._layout.row_bytes))
        # Torch may not see the mapping itself: it has no read-only tensors.
        staging = self._layout.empty(rows, torch.device("cpu"), pinned=device.type == "cuda")
        decoder = FrameDecoder()
        for start in range(0, samples, rows):
            count = min(rows, samples - start)
            gather(self._layout, shards, range(start, start + count), staging, decoder)
            for name, tensor in self._packed.items():
                tensor[start : start + count].copy_(staging[name][:count])

    def batches(self, plan: Plan) -> Generator[dict[str, Tensor]]:
        """Yields the batches; new tensors each, of the device's caching allocator."""
        if not plan:
            return
        order = torch.cat([torch.from_numpy(indices) for indices in plan])
        if self._device.type == "cuda":
            order = order.pin_memory().to(self._device, non_blocking=True)
        for rows in torch.split(order, [len(indices) for indices in plan]):
            yield self._decode(
                {name: tensor.index_select(0, rows) for name, tensor in self._packed.items()}
            )

    def close(self) -> None:
        """Frees the columns on the device."""
        self._packed = {}
