"""Loaders: shards -> batches of tensors on a device, in an order made from (seed, epoch).

    with open_shards("shards/train") as shards:
        with make_loader(shards, batch_size=8, shuffle=True) as loader:
            for epoch in range(125):
                loader.set_epoch(epoch)
                for batch in loader:
                    ...

On the CPU a batch lives in a ring of reused buffers: it is valid until `ring - 1` more batches have
been drawn and until the loader is closed, so whatever must outlive its step is cloned. On CUDA
batches are new tensors, valid as long as they are held.

A loader belongs to the process that iterates it. Workers get the `ShardSet`, which pickles and
survives a fork, and make loaders of their own; `state_dict` carries a position.
"""

from __future__ import annotations

import time
import weakref
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from pupilseg.errors import UsageError
from pupilseg.loader.decode import DECODED
from pupilseg.loader.feed_choice import MODES, make_feed
from pupilseg.runtime.device import find_device, on_device

if TYPE_CHECKING:
    from collections.abc import Generator
    from types import TracebackType

    from numpy.typing import NDArray
    from torch import Tensor

    from pupilseg.loader.feeds import Feed
    from pupilseg.shards.reader import ShardSet


@dataclass(frozen=True, slots=True)
class Batch:
    """B samples on the loader's device. A column that was not asked for is an empty tensor (0,).

    Attributes:
        image: float32 (B, 1, 400, 640) in [-1, 1], `(x / 255 - 0.5) / 0.5`.
        label: int64 (B, 400, 640) of {0, 1}, or the `label_dtype` asked for.
        spatial_weights: float32 (B, 400, 640), extra cross-entropy weight.
        dist_map: float32 (B, 2, 400, 640), signed distance to each class over the diagonal.
        ellipse: float32 (B, 4), normalised cx, cy, rx, ry; zeros for a blink.
        index: int64 (B,), positions in the shards.
    """

    image: Tensor
    label: Tensor
    spatial_weights: Tensor
    dist_map: Tensor
    ellipse: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.index)


def epoch_order(samples: int, seed: int, epoch: int, *, shuffle: bool) -> NDArray[np.int64]:
    """Returns the order of an epoch, int64 (samples,): each index once."""
    if not shuffle:
        return np.arange(samples, dtype=np.int64)
    return np.random.default_rng([seed, epoch]).permutation(samples).astype(np.int64, copy=False)


class Loader:
    """Iterable of batches; each iteration is one epoch, and a complete one moves to the next.

    Made by `make_loader`. One iteration at a time: a new one ends the one before.

    Attributes:
        mode: how batches are made: "mapping", "resident" or "stream".
        wait_s: seconds that the consumer has waited for batches since the loader was made.
        work_s: seconds that it has had batches in hand, between drawing one and the next.
    """

    def __init__(
        self,
        feed: Feed,
        *,
        samples: int,
        batch_size: int,
        device: torch.device,
        shuffle: bool,
        seed: int,
        drop_last: bool,
        rank: int,
        world_size: int,
    ) -> None:
        self.mode = feed.name
        self.wait_s = self.work_s = 0.0
        self._feed, self._device, self._drop_last = feed, device, drop_last
        self._samples, self._batch_size = samples, batch_size
        self._shuffle, self._seed = shuffle, seed
        self._rank, self._world_size = rank, world_size
        self._epoch = self._position = self._start = 0
        # Weak, so that an iteration that nobody holds any more ends, and its thread with it.
        self._running: weakref.ref[Generator[Batch]] | None = None

    def __len__(self) -> int:
        """Batches of an epoch, for this rank."""
        own = self.samples
        return own // self._batch_size if self._drop_last else -(-own // self._batch_size)

    @property
    def samples(self) -> int:
        """Samples of an epoch for this rank, those of a dropped last batch included."""
        if self._drop_last:  # the same for every rank, so that all take as many steps
            return self._samples // self._world_size
        return len(range(self._rank, self._samples, self._world_size))

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration is, or that the present one is."""
        return self._epoch

    @property
    def wait_share(self) -> float:
        """Share of the consumer's time that it waited for batches, 0 .. 1; 0 before the first."""
        return self.wait_s / (self.wait_s + self.work_s or 1.0)

    def set_epoch(self, epoch: int) -> None:
        """Makes the next iteration that epoch, from its start.

        A position that `load_state_dict` restored is kept if it is of that epoch.
        """
        if epoch != self._epoch:
            self._epoch, self._start, self._position = epoch, 0, 0

    def plan(self) -> list[NDArray[np.int64]]:
        """Returns the sample indices of each batch of the present epoch, for this rank.

        Rank r of n takes each n-th sample of the order from the r-th on, so that the ranks' batches
        together are those of one process with n times the batch size.
        """
        order = epoch_order(self._samples, self._seed, self._epoch, shuffle=self._shuffle)
        own = order[self._rank :: self._world_size]
        size = self._batch_size
        return [own[i * size : (i + 1) * size] for i in range(len(self))]

    def __iter__(self) -> Generator[Batch]:
        self._end_running()
        iteration = self._iterate()
        self._running = weakref.ref(iteration)
        return iteration

    def _iterate(self) -> Generator[Batch]:
        plan = self.plan()
        self._position, self._start = self._start, 0
        plan = plan[self._position :]
        empty = torch.empty(0, device=self._device)
        started = time.perf_counter()
        with closing(self._feed.batches(plan)) as batches:
            for indices, tensors in zip(plan, batches, strict=True):
                index = on_device(torch.from_numpy(indices), self._device)
                columns = {name: tensors.get(name, empty) for name in DECODED}
                self._position += 1
                drawn = time.perf_counter()
                self.wait_s += drawn - started
                yield Batch(**columns, index=index)
                started = time.perf_counter()
                self.work_s += started - drawn
        self._epoch, self._position = self._epoch + 1, 0

    def _end_running(self) -> None:
        running = None if self._running is None else self._running()
        if running is not None:
            running.close()
        self._running = None

    def state_dict(self) -> dict[str, Any]:
        """Returns epoch and position, in batches drawn, with what must be the same to go on."""
        return {"epoch": self._epoch, "position": self._position, **self._identity()}

    def _identity(self) -> dict[str, Any]:
        return {
            "samples": self._samples,
            "batch_size": self._batch_size,
            "shuffle": self._shuffle,
            "seed": self._seed,
            "drop_last": self._drop_last,
            "rank": self._rank,
            "world_size": self._world_size,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the next iteration go on behind the last batch that was drawn.

        Raises:
            UsageError: the state is of a loader with other data, order or batches.
        """
        for key, own in self._identity().items():
            if state.get(key) != own:
                raise UsageError(
                    f"the saved loader state has {key} = {state.get(key)!r}, this loader {own!r}; "
                    "resume with the same data and settings, or start anew without --resume"
                )
        self._end_running()
        self._epoch, self._start = int(state["epoch"]), int(state["position"])
        if not 0 <= self._start <= len(self):
            raise UsageError(f"the saved loader state is at batch {self._start} of {len(self)}")
        if self._start == len(self):
            self._epoch, self._start = self._epoch + 1, 0
        self._position = self._start

    def close(self) -> None:
        """Ends an iteration under way, its thread, and frees the buffers; the shards stay open."""
        self._end_running()
        self._feed.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def make_loader(
    shards: ShardSet,
    *,
    batch_size: int,
    device: str | torch.device = "cpu",
    shuffle: bool = False,
    seed: int = 0,
    drop_last: bool = False,
    mode: str = "auto",
    limit: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    columns: tuple[str, ...] = DECODED,
    label_dtype: torch.dtype = torch.int64,
    ring: int = 2,
    threads: int | None = None,
    compiled: bool = True,
) -> Loader:
    """Makes a loader over open shards.

    Args:
        shards: must stay open as long as the loader is used.
        batch_size: samples of a batch (of this rank).
        device: of the tensors.
        shuffle: order is `numpy.random.default_rng([seed, epoch]).permutation(n)`, else as stored.
        seed: of the order.
        drop_last: leave out a last batch that is short; with several ranks it also makes them take
            the same number of steps.
        mode: on CUDA "resident" (packed columns copied to the device once), "stream" (packed rows
            through pinned memory) or "auto": resident where it fits in half of the free memory. On
            the CPU "auto" and "stream" decode from the mapping, "resident" from a copy in memory.
        limit: use the first `limit` samples only.
        rank: of this process.
        world_size: number of processes that share an epoch.
        columns: to decode; the others are empty tensors.
        label_dtype: torch.uint8 spares 7 of 8 bytes of the labels.
        ring: CPU buffers of a batch each; at least 2.
        threads: that decode (on CUDA: that gather packed rows), one batch ahead; as many as torch
            may use, but at most 4, where none are named. With 0 the CPU decodes when asked.
        compiled: on CUDA, decode full batches in one fused pass of `torch.compile`.

    Raises:
        UsageError: an argument that makes no sense, or a device that is not there.
        DataError: (when iterated) a damaged shard, with its file.
    """
    device = find_device(device)
    if mode not in MODES:
        raise UsageError(f"unknown loader mode {mode!r}; choose one of: {', '.join(MODES)}")
    unknown = set(columns) - set(DECODED)
    if unknown:
        raise UsageError(f"unknown columns {sorted(unknown)}; choose from: {', '.join(DECODED)}")
    if (
        batch_size < 1
        or ring < 2
        or not 0 <= rank < world_size
        or (limit is not None and limit < 1)
        or (threads is not None and threads < 0)
    ):
        raise UsageError(
            f"batch_size = {batch_size}, ring = {ring}, rank = {rank}, world_size = {world_size}, "
            f"limit = {limit}, threads = {threads}: expected at least 1, at least 2, rank in "
            "0..world_size - 1, at least 1, and at least 0"
        )
    samples = min(len(shards), limit or len(shards))
    feed = make_feed(
        mode,
        shards,
        columns,
        samples,
        min(batch_size, samples),
        label_dtype,
        device,
        ring=ring,
        threads=threads,
        compiled=compiled,
    )
    return Loader(
        feed,
        samples=samples,
        batch_size=batch_size,
        device=device,
        shuffle=shuffle,
        seed=seed,
        drop_last=drop_last,
        rank=rank,
        world_size=world_size,
    )
