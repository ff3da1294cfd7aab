"""Loaders: shards -> batches of tensors on a device, in an order determined by (seed, epoch).

    with open_shards("shards/train") as shards:
        with make_loader(shards, batch_size=8, shuffle=True) as loader:
            for epoch in range(125):
                loader.set_epoch(epoch)
                for batch in loader:
                    ...

On the CPU a batch lives in a ring of reused buffers: it is valid until `ring - 1` more batches have
been drawn or the loader is closed. Clone tensors that you need for longer. On CUDA, batches are new
tensors, valid as long as they are referenced.

A loader belongs to the process that iterates it. To use several processes, pass them the
`ShardSet`, which can be pickled and forked, and create a loader in each; transfer positions with
`state_dict`.
"""

from __future__ import annotations

import logging
import time
import weakref
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from pupilseg.errors import UsageError
from pupilseg.loader.decode import DECODED, layout_of
from pupilseg.loader.feeds import CpuFeed, FeedOptions, ResidentFeed
from pupilseg.runtime.device import find_device, on_device

if TYPE_CHECKING:
    from collections.abc import Generator
    from types import TracebackType

    from numpy.typing import NDArray
    from torch import Tensor

    from pupilseg.loader.feeds import Feed
    from pupilseg.shards.reader import ShardSet

log = logging.getLogger(__name__)

MODES = ("auto", "mapping", "resident", "stream")
_MAX_THREADS = 4
"""Maximum default; a few threads already saturate the memory bandwidth."""


@dataclass(frozen=True, slots=True)
class Batch:
    """B samples on the loader's device. A column that was not requested is an empty tensor (0,).

    Attributes:
        image: float32 (B, 1, 400, 640) in [-1, 1], `(x / 255 - 0.5) / 0.5`.
        label: int64 (B, 400, 640) of {0, 1}, or the requested `label_dtype`.
        spatial_weights: float32 (B, 400, 640), extra cross-entropy weight.
        dist_map: float32 (B, 2, 400, 640), signed distance to each class over the diagonal.
        ellipse: float32 (B, 4), normalized cx, cy, rx, ry; zeros for a blink.
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


@dataclass(frozen=True, slots=True)
class Sampling:
    """Determines the samples of each batch; see `make_loader`.

    Attributes:
        samples: number of samples in use, from the first, over all ranks.
        batch_size: samples per batch of this rank.
        shuffle: a new order each epoch instead of the stored one.
        seed: seed of the order.
        drop_last: omit a last batch that is not full.
        rank: number of this process.
        world_size: number of processes that share an epoch.
    """

    samples: int
    batch_size: int
    shuffle: bool
    seed: int
    drop_last: bool
    rank: int
    world_size: int

    @property
    def rank_samples(self) -> int:
        """Samples per epoch of this rank, including those of a dropped last batch."""
        if self.drop_last:  # equal on every rank, so that all take the same number of steps
            return self.samples // self.world_size
        return len(range(self.rank, self.samples, self.world_size))

    @property
    def batches(self) -> int:
        """Batches per epoch of this rank."""
        size = self.batch_size
        return self.rank_samples // size if self.drop_last else -(-self.rank_samples // size)

    def plan(self, epoch: int) -> list[NDArray[np.int64]]:
        """Returns the sample indices of each batch of an epoch.

        Rank r of n takes every n-th sample of the order, starting with the r-th, so that all ranks'
        batches together equal those of one process with n times the batch size.
        """
        order = epoch_order(self.samples, self.seed, epoch, shuffle=self.shuffle)
        own = order[self.rank :: self.world_size]
        size = self.batch_size
        return [own[i * size : (i + 1) * size] for i in range(self.batches)]


class Loader:
    """Iterable of batches. Each iteration is one epoch; a complete one advances to the next epoch.

    Created by `make_loader`. Starting a new iteration ends the previous one.

    Attributes:
        mode: how batches are made: "mapping", "resident" or "stream".
        wait_s: seconds that the consumer has waited for batches since the loader was created.
        work_s: seconds that the consumer has spent between draws.
    """

    def __init__(self, feed: Feed, sampling: Sampling, device: torch.device) -> None:
        self.mode = feed.name
        self.wait_s = 0.0
        self.work_s = 0.0
        self._feed = feed
        self._sampling = sampling
        self._device = device
        self._epoch = 0
        self._drawn = 0  # batches of the current iteration
        self._resume_at = 0  # batch that the next iteration starts with
        # Weak, so that an abandoned iterator is collected, which stops its thread.
        self._running: weakref.ref[Generator[Batch]] | None = None

    def __len__(self) -> int:
        """Batches per epoch of this rank."""
        return self._sampling.batches

    @property
    def samples(self) -> int:
        """Samples per epoch of this rank, including those of a dropped last batch."""
        return self._sampling.rank_samples

    @property
    def epoch(self) -> int:
        """Number of the current epoch, or of the next one between iterations."""
        return self._epoch

    @property
    def wait_share(self) -> float:
        """Share of the consumer's time spent waiting for batches, 0 .. 1; 0 before the first."""
        return self.wait_s / (self.wait_s + self.work_s or 1.0)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next iteration.

        If `load_state_dict` restored a position in the same epoch, the position is kept.
        """
        if epoch != self._epoch:
            self._epoch = epoch
            self._drawn = self._resume_at = 0

    def plan(self) -> list[NDArray[np.int64]]:
        """Returns the sample indices of each batch of the current epoch, for this rank."""
        return self._sampling.plan(self._epoch)

    def __iter__(self) -> Generator[Batch]:
        self._end_running()
        iteration = self._iterate()
        self._running = weakref.ref(iteration)
        return iteration

    def _iterate(self) -> Generator[Batch]:
        self._drawn = self._resume_at
        self._resume_at = 0
        plan = self.plan()[self._drawn :]
        empty = torch.empty(0, device=self._device)
        started = time.perf_counter()
        with closing(self._feed.batches(plan)) as batches:
            for indices, tensors in zip(plan, batches, strict=True):
                index = on_device(torch.from_numpy(indices), self._device)
                columns = {name: tensors.get(name, empty) for name in DECODED}
                self._drawn += 1
                drawn_at = time.perf_counter()
                self.wait_s += drawn_at - started
                yield Batch(**columns, index=index)
                started = time.perf_counter()
                self.work_s += started - drawn_at
        self._epoch += 1
        self._drawn = 0

    def _end_running(self) -> None:
        running = None if self._running is None else self._running()
        if running is not None:
            running.close()
        self._running = None

    def state_dict(self) -> dict[str, Any]:
        """Returns the epoch, the position (number of batches drawn), and the sampling settings."""
        return {"epoch": self._epoch, "position": self._drawn, **asdict(self._sampling)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the next iteration resume after the last batch that was drawn.

        Raises:
            UsageError: the state was saved with other data, order or batches.
        """
        for key, own in asdict(self._sampling).items():
            if state.get(key) != own:
                raise UsageError(
                    f"the saved loader state has {key} = {state.get(key)!r}, this loader has "
                    f"{own!r}; resume with the same data and settings, or start without --resume"
                )
        self._end_running()
        epoch, position = int(state["epoch"]), int(state["position"])
        if not 0 <= position <= len(self):
            raise UsageError(f"the saved loader state is at batch {position} of {len(self)}")
        if position == len(self):
            epoch, position = epoch + 1, 0
        self._epoch = epoch
        self._drawn = self._resume_at = position

    def close(self) -> None:
        """Ends a running iteration and its thread, and frees the buffers; the shards stay open."""
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
    """Creates a loader for open shards.

    Args:
        shards: must stay open while the loader is in use.
        batch_size: samples per batch (of this rank).
        device: device of the tensors.
        shuffle: use the order `numpy.random.default_rng([seed, epoch]).permutation(n)` instead of
            the stored one.
        seed: seed of the order.
        drop_last: omit a last batch that is not full. With several ranks this also makes all of
            them take the same number of steps.
        mode: "mapping" decodes the mapped files on the CPU; "resident" copies the encoded columns
            to the device once; "stream" (CUDA) copies encoded rows through pinned memory. "auto" is
            "mapping" on the CPU, and on CUDA "resident" if the columns fit into half of the free
            memory, else "stream". Devices other than CUDA treat "stream" as "mapping".
        limit: use only the first `limit` samples.
        rank: number of this process.
        world_size: number of processes that share an epoch.
        columns: columns to decode; the others are empty tensors.
        label_dtype: torch.uint8 saves 7 of 8 bytes per label pixel.
        ring: number of batch buffers on the CPU, at least 2.
        threads: number of threads that decode (on CUDA: gather encoded rows) one batch ahead; by
            default as many as torch may use, but at most 4. With 0, "mapping" decodes a batch when
            it is drawn.
        compiled: decode full batches on CUDA in one fused pass of `torch.compile`.

    Raises:
        UsageError: an invalid argument, or an unavailable device.
        DataError: a damaged shard, with its file (raised by the iteration).
    """
    device = find_device(device)
    if mode not in MODES:
        raise UsageError(f"unknown loader mode {mode!r}; choose one of: {', '.join(MODES)}")
    unknown = set(columns) - set(DECODED)
    if unknown:
        raise UsageError(f"unknown columns {sorted(unknown)}; choose from: {', '.join(DECODED)}")
    minima = (("batch_size", batch_size, 1), ("limit", limit, 1), ("ring", ring, 2))
    for name, value, minimum in (*minima, ("threads", threads, 0)):
        if value is not None and value < minimum:
            raise UsageError(f"{name} is {value}, expected at least {minimum}")
    if not 0 <= rank < world_size:
        raise UsageError(f"rank is {rank}, expected 0..{world_size - 1} (world_size - 1)")
    samples = min(len(shards), limit or len(shards))
    options = FeedOptions(
        columns=columns,
        samples=samples,
        batch_rows=min(batch_size, samples),
        label_dtype=label_dtype,
        device=device,
        ring=ring,
        threads=min(_MAX_THREADS, torch.get_num_threads()) if threads is None else threads,
        compiled=compiled,
    )
    sampling = Sampling(samples, batch_size, shuffle, seed, drop_last, rank, world_size)
    return Loader(_make_feed(mode, shards, options), sampling, device)


def _make_feed(mode: str, shards: ShardSet, options: FeedOptions) -> Feed:
    """Returns the feed for a mode."""
    encoded_bytes = layout_of(shards, options.columns).row_bytes * options.samples
    name = _choose_feed(mode, encoded_bytes, options.device)
    if name == CpuFeed.name:
        return CpuFeed(shards, options)
    if name == ResidentFeed.name:
        return ResidentFeed(shards, options)
    from pupilseg.loader.cuda_stream import StreamFeed

    return StreamFeed(shards, options)


def _choose_feed(mode: str, encoded_bytes: int, device: torch.device) -> str:
    """Returns the name of the feed for a mode, and logs the choice and its reason."""
    size = f"{encoded_bytes / 1e9:.2f} GB packed"
    if mode == "resident":
        name, reason = mode, f"as requested, {size} on {device}"
    elif mode == "mapping" or device.type != "cuda":
        name, reason = "mapping", f"{size}, decoded on the CPU for {device}"
    elif mode == "stream":
        name, reason = mode, f"as requested, {size} through pinned memory to {device}"
    else:
        free, _ = torch.cuda.mem_get_info(device)
        name = "resident" if encoded_bytes <= free // 2 else "stream"
        relation = "at most" if name == "resident" else "more than"
        reason = f"{size}, {relation} half of the {free / 1e9:.2f} GB free on {device}"
    log.info("loader: %s (%s)", name, reason)
    return name
