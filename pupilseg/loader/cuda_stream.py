"""The feed for sets that exceed device memory: streams encoded rows through pinned slots.

A thread gathers rows into a pinned slot and starts a non-blocking copy on its own stream. The
consumer's stream waits for that copy, decodes, and records an event when the slot is free again.
"""

from __future__ import annotations

from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING

import torch

from pupilseg.loader.decode import BatchDecoder, gather_row, layout_of
from pupilseg.loader.feeds import ReadAhead
from pupilseg.runtime.threads import prefetch

if TYPE_CHECKING:
    from collections.abc import Generator
    from threading import Event

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from pupilseg.loader.feeds import FeedOptions, IndexBatches
    from pupilseg.shards.reader import ShardSet

_SLOTS = 3
"""Two are gathered or copied while one is decoded."""


class StreamFeed:
    """Streams encoded rows to a CUDA device and decodes them there.

    Batches are new tensors of the device's caching allocator and stay valid as long as they are
    referenced.
    """

    name = "stream"

    def __init__(self, shards: ShardSet, options: FeedOptions) -> None:
        device = self._device = options.device
        rows = options.batch_rows
        self._shards = shards
        self._layout = layout_of(shards, options.columns)
        self._decode = BatchDecoder(
            self._layout, device, options.label_dtype, options.compiled_rows
        )
        self._pool = options.row_pool()
        self._read_ahead = ReadAhead(shards, self._layout)
        # Created once: a new stream per epoch would keep the memory of dead streams (timm#2784).
        self._stream = torch.cuda.Stream(device)
        self._pinned = [self._layout.empty_pinned(rows) for _ in range(_SLOTS)]
        self._packed = [self._layout.empty(rows, device) for _ in range(_SLOTS)]
        for packed in self._packed:
            for tensor in packed.values():
                # A feed that is dropped without `close` must not free what a copy still writes.
                tensor.record_stream(self._stream)
        # The host sleeps while it waits for a blocking event, instead of keeping a core busy.
        self._copied = [torch.cuda.Event(blocking=True) for _ in range(_SLOTS)]
        self._consumed = [torch.cuda.Event(blocking=True) for _ in range(_SLOTS)]
        # The slots' memory may still be in use by earlier work of the stream that allocated it.
        self._stream.wait_stream(torch.cuda.current_stream(device))

    def batches(self, plan: IndexBatches) -> Generator[dict[str, Tensor]]:
        """Yields the batches without waiting for the device."""
        # A slot is free as soon as its decoding was queued, before the batch is yielded.
        filled = prefetch(self._fill, plan, _SLOTS, ahead=_SLOTS - 1)
        with self._pool, closing(filled):
            for slot, rows in filled:
                current = torch.cuda.current_stream(self._device)
                current.wait_event(self._copied[slot])
                batch = self._decode({k: t[:rows] for k, t in self._packed[slot].items()})
                self._consumed[slot].record(current)
                yield batch
        self._read_ahead.end_pass()

    def _fill(self, slot: int, indices: NDArray[np.int64], stop: Event) -> tuple[int, int]:
        """Gathers a batch into pinned memory and starts its copy; runs in the thread."""
        # The host must not touch pinned memory that an earlier copy still reads.
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
        """Waits for copies and for their decoding, in any stream, then frees the slots."""
        for event in (*self._copied, *self._consumed):
            event.synchronize()
        self._pinned, self._packed = [], []
