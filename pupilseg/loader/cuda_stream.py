"""The loader's feed for sets larger than the device: packed rows through a ring of pinned slots.

A thread gathers rows into a pinned slot and copies it, without blocking, on a stream of its own;
the consumer's stream waits for that copy, decodes, and records when it is done with the slot.
"""

from __future__ import annotations

from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING

import torch

from pupilseg.loader.decode import BatchDecoder, gather_row, layout_of
from pupilseg.loader.feeds import THREAD_NAME, ReadAhead
from pupilseg.runtime.threads import RowPool, prefetch
from pupilseg.shards.codec import FrameDecoder

if TYPE_CHECKING:
    from collections.abc import Generator
    from threading import Event

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from pupilseg.loader.feeds import Plan
    from pupilseg.shards.reader import ShardSet

_SLOTS = 3
"""One being gathered, one being copied, one being decoded."""


class StreamFeed:
    """Streams packed rows to a CUDA device and decodes them there.

    Batches are new tensors of the device's caching allocator, valid as long as they are held.

    Args:
        shards: open.
        columns: to decode, out of `decode.DECODED`.
        batch_size: rows of a slot.
        label_dtype: of the labels.
        device: a CUDA device.
        threads: that gather.
        compiled_rows: as `BatchDecoder`.
    """

    name = "stream"

    def __init__(
        self,
        shards: ShardSet,
        columns: tuple[str, ...],
        batch_size: int,
        label_dtype: torch.dtype,
        device: torch.device,
        *,
        threads: int,
        compiled_rows: int,
    ) -> None:
        self._shards, self._device = shards, device
        self._layout = layout_of(shards, columns)
        self._decode = BatchDecoder(self._layout, device, label_dtype, compiled_rows)
        self._pool = RowPool(FrameDecoder, max(1, threads), THREAD_NAME)
        self._read_ahead = ReadAhead(shards, self._layout)
        cpu = torch.device("cpu")
        # Made once: a stream an epoch would keep the memory of dead streams (timm#2784).
        self._stream = torch.cuda.Stream(device)
        self._pinned = [self._layout.empty(batch_size, cpu, pinned=True) for _ in range(_SLOTS)]
        self._packed = [self._layout.empty(batch_size, device) for _ in range(_SLOTS)]
        self._copied = [torch.cuda.Event() for _ in range(_SLOTS)]
        self._consumed = [torch.cuda.Event() for _ in range(_SLOTS)]
        if compiled_rows:  # now, so that no batch waits for it; any bytes decode to something
            self._decode(self._packed[0])
        # The slots' memory may still be in use by earlier work of the stream that allocated it.
        self._stream.wait_stream(torch.cuda.current_stream(device))

    def batches(self, plan: Plan) -> Generator[dict[str, Tensor]]:
        """Yields the batches; nothing here waits for the device."""
        with self._pool, closing(prefetch(self._fill, plan, _SLOTS)) as filled:
            for slot, rows in filled:
                current = torch.cuda.current_stream(self._device)
                current.wait_event(self._copied[slot])
                batch = self._decode({k: t[:rows] for k, t in self._packed[slot].items()})
                self._consumed[slot].record(current)
                yield batch
        self._read_ahead.end_of_pass()

    def _fill(self, slot: int, indices: NDArray[np.int64], stop: Event) -> tuple[int, int]:
        """Gathers a batch into the slot's pinned memory and starts its copy. In the thread."""
        # The host may not touch pinned memory that an earlier copy still reads.
        self._copied[slot].synchronize()
        pinned, packed = self._pinned[slot], self._packed[slot]
        self._read_ahead(indices)
        work = partial(gather_row, self._layout, self._shards, indices, pinned)
        self._pool.run(work, len(indices), stop)
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._stream.wait_event(self._consumed[slot])
            for name, tensor in packed.items():
                tensor[: len(indices)].copy_(pinned[name][: len(indices)], non_blocking=True)
            self._copied[slot].record(self._stream)
        return slot, len(indices)

    def close(self) -> None:
        """Waits for copies under way, then frees the slots."""
        self._stream.synchronize()
        self._pinned, self._packed = [], []
