"""Data-parallel training: the processes of a job, and their communication.

`torchrun` starts the processes, or `local_ranks` does on the cores of one machine.

Each rank trains on its share of every batch. Batch statistics, gradients and metrics are summed
over the ranks, so that n ranks take the same steps as one process with the same total batch. This
is simpler than DistributedDataParallel: with 26,000 weights, the gradients are one message of 100
KB per step, so there is nothing to overlap or shard.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import socket
import sys
import tempfile
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from pupilseg.errors import ParallelError, PupilSegError, UsageError
from pupilseg.runtime.exchange import (
    Exchange,
    Sockets,
    connect_to_ranks,
    connected_sockets,
    lost_rank,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence
    from multiprocessing.process import BaseProcess

    from torch import Tensor, nn

log = logging.getLogger(__name__)

Prepared = TypeVar("Prepared")

MESSAGE_TIMEOUT_S = 300
"""Longest wait for another rank. A killed rank is detected at once, because its socket closes.

On CUDA, NCCL sums tensors in kernels that wait for a lost rank instead of raising an error. The job
then ends in one of three ways: `torchrun` ends the other ranks when one has ended; `Ranks.any`,
which uses gloo, raises ParallelError after the epoch; or NCCL aborts the process after this time.
"""
PREPARE_TIMEOUT_S = 24 * 3600
"""Longest wait for the first rank to download the data and build the shards."""

END_TIMEOUT_S = 30
"""Longest wait for another local process to end, before it is killed."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks of a job, as seen from one process.

    Attributes:
        rank: rank of this process, counted from 0.
        world_size: number of processes.
        exchange: sums CPU tensors over the processes of one machine; None uses gloo.
    """

    rank: int = 0
    world_size: int = 1
    exchange: Exchange | None = None

    @property
    def first(self) -> bool:
        """True in the process that writes files, logs and tracks."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replaces a tensor by its sum over the ranks and returns it.

        Raises:
            ParallelError: another rank ended.
        """
        if self.exchange is not None and not tensor.is_cuda:
            return self.exchange.sum_(tensor)
        if self.world_size > 1:
            with _parallel_errors():
                dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Returns True if the flag is set on any rank; does not wait for the device."""
        if self.world_size == 1:
            return flag
        return bool(self.sum_(torch.tensor(int(flag))).item())

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces gradients by their mean over the ranks, in one message."""
        if self.world_size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = self.sum_(torch.cat([g.reshape(-1) for g in gradients])) / self.world_size
        parts = flat.split([g.numel() for g in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view(gradient.shape))

    def share_of(self, batch_size: int) -> int:
        """Returns this rank's part of a batch.

        Raises:
            UsageError: the batch cannot be divided equally.
        """
        if batch_size % self.world_size:
            raise UsageError(
                f"--batch-size {batch_size} is the total over all processes and must be a multiple "
                f"of their number, {self.world_size}"
            )
        return batch_size // self.world_size

    def after_first(self, prepare: Callable[[], Prepared]) -> Prepared:
        """Calls a function on the first rank and, when it has returned, on the other ranks.

        For work that the first rank does for all, such as building shards.

        Raises:
            ParallelError: the first rank ended before the function returned.
        """
        if self.world_size == 1:
            return prepare()
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=PREPARE_TIMEOUT_S))
        try:
            if self.first:
                prepared = prepare()
            with _parallel_errors():
                dist.barrier(group)
        finally:
            dist.destroy_process_group(group)
        return prepared if self.first else prepare()


ALONE = Ranks()


@contextmanager
def join_ranks(device: torch.device) -> Generator[tuple[Ranks, torch.device]]:
    """Joins the job of `torchrun`, if it started this process.

    Args:
        device: as requested by the user; "cuda" becomes this rank's own device.

    Yields:
        The ranks and this rank's device, which is the current one if it is CUDA; `ALONE` and
        `device` without torchrun.

    Raises:
        UsageError: this machine has more ranks than CUDA devices, or one device was named for all
            ranks.
    """
    if not dist.is_torchelastic_launched():
        # Pinned memory is allocated through the current device, which need not be the first one.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            yield ALONE, device
        return
    if device.type == "cuda":
        device = _own_cuda(device)
        torch.cuda.set_device(device)
    # gloo in addition to NCCL, so that messages with values on the host do not wait for the device.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=MESSAGE_TIMEOUT_S))
    try:
        with _exchange_of_job(device) as exchange:
            ranks = Ranks(dist.get_rank(), dist.get_world_size(), exchange)
            if not ranks.first:
                logging.getLogger("pupilseg").setLevel(logging.WARNING)
            yield ranks, device
    finally:
        dist.destroy_process_group()


@contextmanager
def _exchange_of_job(device: torch.device) -> Generator[Exchange | None]:
    """Connects the ranks of a CPU job on one machine through sockets; yields None otherwise."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if device.type != "cpu" or world_size == 1:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="pupilseg-") as own:
        places: list[Any] = [None] * world_size
        dist.all_gather_object(places, (socket.gethostname(), own))
        hosts, folders = zip(*places, strict=True)
        if len(set(hosts)) > 1:
            yield None
            return
        sockets = connect_to_ranks(rank, world_size, Path(folders[0]), dist.barrier)
    with closing(Exchange(rank, sockets)) as exchange:
        yield exchange


@contextmanager
def local_ranks(processes: int, work: Callable[[Ranks], object]) -> Generator[Ranks]:
    """Starts the other processes of a CPU job on this machine.

    Each of them ignores Ctrl-C, and ends when this process ends, because its sockets close.

    Args:
        processes: number of processes in the job, including this one.
        work: function that the other processes run; picklable.

    Yields:
        The ranks, as seen from this process, which is the first.

    Raises:
        ParallelError: another process ended before its work was done.
    """
    if processes == 1:
        yield ALONE
        return
    # Not "fork": a child would inherit the state of torch's thread pool without its threads.
    context = multiprocessing.get_context("spawn")
    own, *others = connected_sockets(processes)
    children = [
        context.Process(target=_run_rank, args=(rank, sockets, work), daemon=True)
        for rank, sockets in enumerate(others, start=1)
    ]
    # Children inherit this setting. Otherwise Ctrl-C could interrupt them before they ignore it.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for child in children:
            child.start()
    finally:
        signal.signal(signal.SIGINT, handler)
        for sockets in others:
            for connection in sockets.values():
                connection.close()
    try:
        with closing(Exchange(0, own)) as exchange:
            yield Ranks(0, processes, exchange)
    except ParallelError as error:
        raise ParallelError(f"{error}{_ends(children)}") from error
    finally:
        for child in children:
            child.join(timeout=END_TIMEOUT_S)
            child.kill()


def _run_rank(rank: int, sockets: Sockets, work: Callable[[Ranks], object]) -> None:
    """Main function of another process of `local_ranks`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.getLogger("pupilseg").setLevel(logging.WARNING)
    try:
        with closing(Exchange(rank, sockets)) as exchange:
            work(Ranks(rank, exchange.world_size, exchange))
    except ParallelError:
        sys.exit(1)  # the first process reports it
    except PupilSegError as error:
        log.error("process %d: %s", rank, error)  # noqa: TRY400 - users need no traceback
        sys.exit(error.exit_code)


def _ends(children: Sequence[BaseProcess]) -> str:
    """Describes how each failed process ended."""
    ends = []
    for rank, child in enumerate(children, start=1):
        child.join(timeout=1)
        if child.exitcode is not None and child.exitcode < 0:
            name = signal.Signals(-child.exitcode).name
            hint = ", perhaps because the memory was full" if name == "SIGKILL" else ""
            ends.append(f"; process {rank} was ended by {name}{hint}")
    return "".join(ends)


def _own_cuda(device: torch.device) -> torch.device:
    """Returns this rank's CUDA device."""
    local, count = dist.get_node_local_rank(), torch.cuda.device_count()
    if str(device) != "cuda":
        raise UsageError(
            f"--device {device} names one device for all processes of torchrun; pass --device cuda"
        )
    if local >= count:
        raise UsageError(
            f"process {local} of this machine has no CUDA device of its own: there are {count}; "
            f"pass torchrun --nproc-per-node {count}"
        )
    return torch.device("cuda", local)


@contextmanager
def _parallel_errors() -> Generator[None]:
    """Converts the errors that gloo and NCCL raise for a lost rank into ParallelError."""
    try:
        yield
    except RuntimeError as error:
        raise lost_rank(str(error).splitlines()[0]) from error
