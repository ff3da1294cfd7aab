"""Batch norm with the statistics of the global batch, over all ranks.

Each rank computes local sums, adds those of the other ranks in one message, and normalizes with
PyTorch's own kernels; the backward pass works the same way (Ioffe and Szegedy, arXiv 1502.03167,
with sums over all ranks). torch's SyncBatchNorm raises an error for CPU tensors, and on CUDA it
waits for the device in every layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

    from pupilseg.runtime.distributed import Ranks


def synchronize_norms(model: nn.Module, ranks: Ranks) -> nn.Module:
    """Replaces batch norms by norms with the statistics of the global batch, over all ranks.

    Weights, statistics and their names do not change.
    """
    if ranks.world_size > 1:
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.BatchNorm2d):
                    setattr(parent, name, RankedBatchNorm(child, ranks))
    return model


class RankedBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all ranks, which must have the same size.

    Args:
        norm: the layer whose weights and statistics are copied.
        ranks: the processes of the job.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(self, norm: nn.BatchNorm2d, ranks: Ranks) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, device=norm.weight.device)
        self.load_state_dict(norm.state_dict())
        self._ranks = ranks

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes (N, C, H, W)."""
        if not self.training:
            return super().forward(x)
        out, mean, var = _RankedNormalization.apply(
            x, self.weight, self.bias, self.eps, self._ranks
        )
        count = x.numel() // x.shape[1] * self._ranks.world_size
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
            self.num_batches_tracked += 1
        return out


class _RankedNormalization(torch.autograd.Function):
    """Maps (x, weight, bias, eps, ranks) to the normalized x, and the batch's mean and variance."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, ranks: Ranks
    ) -> tuple[Tensor, Tensor, Tensor]:
        # `torch.var_mean` takes 25 times as long in channels_last. The two buffers that
        # `batch_norm_update_stats` updates are not used.
        unused = torch.zeros_like(weight), torch.ones_like(weight)
        mean, var = (v.double() for v in torch.batch_norm_update_stats(x, *unused, 0.0))
        # float64, because the variance is computed as a difference of two squares.
        moments = ranks.sum_(torch.stack([mean, var + mean.square()])) / ranks.world_size
        mean, var = moments[0].float(), (moments[1] - moments[0].square()).float()
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps, ctx.ranks = eps, ranks
        ctx.mark_non_differentiable(mean, var)
        out = torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0]
        return out, mean, var

    @staticmethod
    def backward(
        ctx: Any, gradient: Tensor, *_unused: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, mean, var = ctx.saved_tensors
        # In evaluation mode, the kernel treats the statistics as constants: the gradient of x is
        # gradient * weight / std, and the gradients of weight and bias are sums over this rank.
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        sums = ctx.ranks.sum_(torch.stack([grad_weight, grad_bias]).double())
        count = x.numel() // x.shape[1] * ctx.ranks.world_size
        # The statistics depend on x: subtract weight / std * (E[g] + normalized x * E[g x]).
        inverse_std = (var.double() + ctx.eps).rsqrt()
        scale = weight * inverse_std / count
        slope = -scale * sums[0] * inverse_std
        shift = -scale * sums[1] - slope * mean
        grad_x.addcmul_(x, slope.to(x.dtype)[:, None, None])
        grad_x.add_(shift.to(x.dtype)[:, None, None])
        return grad_x, grad_weight, grad_bias, None, None
