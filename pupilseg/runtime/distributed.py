"""Data-parallel training: the processes that `torchrun` starts, and their communication.

Each rank trains on its share of every batch. Batch statistics, gradients and metrics are summed
over the ranks, so that n ranks take the same steps as one process with the same total batch. The
networks have 26,000 weights: gradients are one message of 100 KB per step, with nothing to overlap
or to shard, which is why this is simpler than DistributedDataParallel.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from pupilseg.errors import ParallelError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable

    from torch import Tensor

log = logging.getLogger(__name__)

Prepared = TypeVar("Prepared")

MESSAGE_TIMEOUT_S = 300
"""Longest wait for another rank. A killed rank is noticed at once: its socket closes."""
PREPARE_TIMEOUT_S = 24 * 3600
"""Longest wait for the first rank to download and materialize."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes of a job, seen from one of them.

    Attributes:
        rank: of this process, counted from 0.
        world_size: number of processes.
    """

    rank: int = 0
    world_size: int = 1

    @property
    def first(self) -> bool:
        """True in the process that writes files, logs and tracks."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replaces a tensor by its sum over the ranks and returns it.

        Raises:
            ParallelError: another rank ended.
        """
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
        """Calls a function on the first rank, and then on the others, which find its work done.

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
    """Joins the job that `torchrun` started this process for, if it did.

    Args:
        device: as requested by the user; "cuda" becomes this rank's own device.

    Yields:
        The ranks and this rank's device; `ALONE` and `device` without torchrun.

    Raises:
        UsageError: this machine has more ranks than CUDA devices, or one device was named for all
            ranks.
    """
    if not dist.is_torchelastic_launched():
        yield ALONE, device
        return
    if device.type == "cuda":
        device = _own_cuda(device)
        torch.cuda.set_device(device)
    # gloo beside NCCL: messages about the host alone should not wait for the device.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=MESSAGE_TIMEOUT_S))
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    if not ranks.first:
        logging.getLogger("pupilseg").setLevel(logging.WARNING)
    try:
        yield ranks, device
    finally:
        dist.destroy_process_group()


def _own_cuda(device: torch.device) -> torch.device:
    """Returns the CUDA device of this rank."""
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
        raise ParallelError(
            "another process of this job ended or stopped responding "
            f"({str(error).splitlines()[0]}); see its message above, then start the job again with "
            "--resume"
        ) from error


def synchronize_norms(model: nn.Module, ranks: Ranks, device: torch.device) -> nn.Module:
    """Makes batch norms use the statistics of the whole batch, over all ranks.

    Weights, statistics and their names do not change.
    """
    if ranks.world_size == 1:
        return model
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, RankedBatchNorm(child, ranks))
    return model


class RankedBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all ranks, for the CPU.

    torch's SyncBatchNorm raises an error for CPU tensors. Without shared statistics a CPU job of n
    processes would learn something else than one process does, and the tests, which have no GPU,
    could not show that data-parallel training equals training alone.

    Every rank must have a batch of the same size.

    Args:
        norm: whose weights and statistics are copied.
        ranks: the processes of the job.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(self, norm: nn.BatchNorm2d, ranks: Ranks) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum)
        self.load_state_dict(norm.state_dict())
        self._ranks = ranks

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes (N, C, H, W)."""
        if not self.training:
            return super().forward(x)
        var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
        # float64, because the variance is computed as a difference of two squares.
        mean, var = mean.double(), var.double()
        moments = torch.stack([mean, var + mean.square()])
        moments = _Sum.apply(moments, self._ranks) / self._ranks.world_size
        mean, var = moments[0], moments[1] - moments[0].square()
        with torch.no_grad():
            count = x.numel() / x.shape[1] * self._ranks.world_size
            self.running_mean.lerp_(mean.float(), self.momentum)
            self.running_var.lerp_((var * count / (count - 1)).float(), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (var + self.eps).rsqrt().float()
        shift = self.bias - mean.float() * scale
        return torch.addcmul(shift[:, None, None], x, scale[:, None, None])


class _Sum(torch.autograd.Function):
    """Sums a tensor over the ranks, and its gradient in the backward pass."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.sum_(tensor.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.sum_(gradient.clone()), None
