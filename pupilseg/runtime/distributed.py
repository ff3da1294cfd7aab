"""Data-parallel training: the ranks that `torchrun` starts, and what they tell each other.

Each rank trains on its share of every batch. Batch statistics, gradients and metrics are summed
over the ranks, so that n ranks take the steps of one process with the same total batch. The
networks have 26,000 weights: one sum of 100 KB a step, nothing to overlap or to shard.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from pupilseg.errors import ParallelError, UsageError

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

    from torch import Tensor

log = logging.getLogger(__name__)

ANSWER_S = 300
"""Longest wait for another rank; a rank that was killed is noticed at once, by its socket."""
PREPARE_S = 24 * 3600
"""Longest wait for the first rank to download and materialize."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes of a job, seen from one of them.

    Attributes:
        rank: of this process, from 0.
        world_size: how many there are.
    """

    rank: int = 0
    world_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files, logs and tracks."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replaces a tensor by its sum over the ranks; returns it.

        Raises:
            ParallelError: another rank ended.
        """
        if self.world_size > 1:
            with _answered():
                dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Returns whether the flag is set on any rank; does not wait for a device."""
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
            UsageError: the ranks would get parts of different size.
        """
        if batch_size % self.world_size:
            raise UsageError(
                f"--batch-size {batch_size} is the total over all processes and not a multiple of "
                f"their number, {self.world_size}; give a multiple"
            )
        return batch_size // self.world_size

    def after_first(self, prepare: Any) -> Any:
        """Calls a function on the first rank, then on the others, which then find its work done.

        Raises:
            ParallelError: the first rank ended before it was done.
        """
        if self.world_size == 1:
            return prepare()
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=PREPARE_S))
        try:
            done = prepare() if self.first else None
            with _answered():
                dist.barrier(group)
        finally:
            dist.destroy_process_group(group)
        return done if self.first else prepare()


ALONE = Ranks()


@contextmanager
def join_ranks(device: torch.device) -> Generator[tuple[Ranks, torch.device]]:
    """Joins the job that `torchrun` started this process for; alone otherwise.

    Args:
        device: as asked for; "cuda" becomes the device of this rank.

    Yields:
        The ranks, and the device of this one.

    Raises:
        UsageError: more ranks on this machine than CUDA devices, or one device named for all.
    """
    if not dist.is_torchelastic_launched():
        yield ALONE, device
        return
    if device.type == "cuda":
        device = _own_cuda(device)
        torch.cuda.set_device(device)
    # gloo too on CUDA: what concerns the host alone should not wait for the device.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=ANSWER_S))
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    if not ranks.first:
        logging.getLogger("pupilseg").setLevel(logging.WARNING)
    try:
        yield ranks, device
    finally:
        dist.destroy_process_group()


def _own_cuda(device: torch.device) -> torch.device:
    """Returns the CUDA device of this rank."""
    local, there = dist.get_node_local_rank(), torch.cuda.device_count()
    if str(device) != "cuda":
        raise UsageError(
            f"--device {device} names one device for all processes of torchrun; give --device cuda"
        )
    if local >= there:
        raise UsageError(
            f"process {local} of this machine has no CUDA device of its own: there are {there}; "
            f"give torchrun --nproc-per-node {there}"
        )
    return torch.device("cuda", local)


@contextmanager
def _answered() -> Generator[None]:
    """Turns what gloo and NCCL raise when a rank is gone into words."""
    try:
        yield
    except RuntimeError as error:
        raise ParallelError(
            "another process of this job ended or stopped answering "
            f"({str(error).splitlines()[0]}); look for its message above, then start the job "
            "again with --resume"
        ) from error


def synchronise_norms(model: nn.Module, ranks: Ranks, device: torch.device) -> nn.Module:
    """Makes batch norms use the statistics of the whole batch, over all ranks.

    Weights, statistics and their names stay as they are.
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
    """Batch norm over the batches of all ranks, for devices that torch's SyncBatchNorm lacks.

    Every rank must have a batch of the same size.

    Args:
        norm: whose weights and statistics it takes over.
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
        """Maps (N, C, H, W) to the same shape."""
        if not self.training:
            return super().forward(x)
        var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
        # float64: the variance is a difference of two squares here.
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
    """Sum over the ranks of a tensor, and of its gradient on the way back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.sum_(tensor.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.sum_(gradient.clone()), None
