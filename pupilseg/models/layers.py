"""Layers of EfficientViT (MSRA): sandwich block and cascaded group attention in windows.

Liu et al., EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention, CVPR
2023, arXiv 2305.07027; reference code microsoft/Cream, EfficientViT/classification. This is not the
MIT network of the same name (arXiv 2205.14756).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class ConvNorm(nn.Sequential):
    """Convolution (without bias) followed by batch norm; exporters fold both into one convolution.

    Args:
        in_chans: input channels.
        out_chans: output channels.
        kernel_size: side of the square kernel, odd.
        groups: as in `nn.Conv2d`.
        gain: initial scale of the norm; with 0, a residual block starts as the identity.
    """

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        gain: float = 1.0,
    ) -> None:
        norm = nn.BatchNorm2d(out_chans)
        nn.init.constant_(norm.weight, gain)
        super().__init__(
            nn.Conv2d(
                in_chans,
                out_chans,
                kernel_size,
                stride,
                kernel_size // 2,
                groups=groups,
                bias=False,
            ),
            norm,
        )


class TokenMixing(nn.Module):
    """Depthwise convolution with a residual: local token interaction (paper section 3.1)."""

    def __init__(self, dim: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.conv = ConvNorm(dim, dim, kernel_size, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to the same shape."""
        return x + self.conv(x)


class FeedForward(nn.Module):
    """Two 1x1 convolutions around a ReLU, with a residual."""

    def __init__(self, dim: int, ratio: int) -> None:
        super().__init__()
        self.expand = ConvNorm(dim, dim * ratio)
        self.reduce = ConvNorm(dim * ratio, dim, gain=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to the same shape."""
        return x + self.reduce(torch.relu(self.expand(x)))


class RelativeBias(nn.Module):
    """Learned attention bias of a window, the sum of a row part and a column part.

    The bias between tokens i and j is r[y_j - y_i] + c[x_j - x_i]: 2h - 1 + 2w - 1 parameters
    instead of the paper's (2h - 1)(2w - 1), and no index table in the exported file.
    """

    def __init__(self, window_size: tuple[int, int]) -> None:
        super().__init__()
        self.window_size = window_size
        self.rows = nn.Parameter(torch.zeros(2 * window_size[0] - 1))
        self.columns = nn.Parameter(torch.zeros(2 * window_size[1] - 1))

    def forward(self) -> Tensor:
        """Returns the bias as (tokens, tokens)."""
        height, width = self.window_size
        rows = self.rows.unfold(0, height, 1).flip(0)  # (h, h): entry i, j is r[j - i]
        columns = self.columns.unfold(0, width, 1).flip(0)  # (w, w)
        bias = rows[:, None, :, None] + columns[None, :, None, :]
        return bias.reshape(height * width, height * width)


class CascadedGroupAttention(nn.Module):
    """Attention in which each head sees its own slice of the channels plus the previous head.

    The input of head j is slice j plus the output of head j-1 (paper eq. 2 and 3), so that depth
    grows with the number of heads without additional parameters. Queries go through a depthwise
    convolution. Queries, keys and values are computed on a map pooled by `stride`, and the result
    is upsampled, so that fine stages have as few tokens as the coarsest one.

    Args:
        dim: channels C, a multiple of `num_heads`.
        num_heads: number of heads; one is plain attention.
        key_dim: channels of queries and keys per head.
        window_size: (height, width) of the windows, which must tile the pooled map exactly.
        stride: kernel size and stride of the pooling.
    """

    def __init__(
        self, dim: int, num_heads: int, key_dim: int, window_size: tuple[int, int], stride: int = 1
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not a multiple of num_heads {num_heads}")
        self.num_heads, self.key_dim, self.stride = num_heads, key_dim, stride
        self.window_size = window_size
        self.head_dim = dim // num_heads
        widths = 2 * key_dim + self.head_dim
        self.qkv = nn.ModuleList(ConvNorm(self.head_dim, widths) for _ in range(num_heads))
        self.query_mix = nn.ModuleList(
            ConvNorm(key_dim, key_dim, 3, groups=key_dim) for _ in range(num_heads)
        )
        self.bias = nn.ModuleList(RelativeBias(window_size) for _ in range(num_heads))
        self.project = ConvNorm(dim, dim, gain=0.0)

    def _windows(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N * windows, C, tokens)."""
        n, c, h, w = x.shape
        wh, ww = self.window_size
        x = x.view(n, c, h // wh, wh, w // ww, ww).permute(0, 2, 4, 1, 3, 5)
        return x.reshape(-1, c, wh * ww)

    def _join(self, x: Tensor, height: int, width: int) -> Tensor:
        """Maps (N * windows, C, tokens) back to (N, C, H, W)."""
        wh, ww = self.window_size
        c = x.shape[1]
        x = x.view(-1, height // wh, width // ww, c, wh, ww).permute(0, 3, 1, 4, 2, 5)
        return x.reshape(-1, c, height, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to the same shape, including the residual connection.

        Raises:
            ValueError: the windows do not tile the pooled map.
        """
        pooled = functional.avg_pool2d(x, self.stride) if self.stride > 1 else x
        height, width = pooled.shape[-2:]
        wh, ww = self.window_size
        if height % wh or width % ww:
            raise ValueError(
                f"a map of {height} x {width} is not a whole number of {wh} x {ww} windows; "
                "the networks expect images of 400 x 640"
            )
        outputs: list[Tensor] = []
        for head, part in enumerate(pooled.split(self.head_dim, dim=1)):
            feature = part if head == 0 else part + outputs[-1]
            query, key, value = self.qkv[head](feature).split(
                [self.key_dim, self.key_dim, self.head_dim], dim=1
            )
            query = self._windows(self.query_mix[head](query))
            scores = query.transpose(1, 2) @ self._windows(key) * self.key_dim**-0.5
            attention = (scores + self.bias[head]()).softmax(dim=-1)  # (N * windows, query, key)
            mixed = self._windows(value) @ attention.transpose(1, 2)
            outputs.append(self._join(mixed, height, width))
        out = self.project(torch.relu(torch.cat(outputs, dim=1)))
        if self.stride > 1:
            out = functional.interpolate(out, scale_factor=float(self.stride), mode="nearest")
        return x + out


class SandwichBlock(nn.Sequential):
    """Token mixing and feed-forward before and after one attention (paper eq. 1, N = 1)."""

    def __init__(
        self,
        dim: int,
        attention: CascadedGroupAttention,
        ratio: int,
        kernel_size: int = 3,
    ) -> None:
        super().__init__(
            TokenMixing(dim, kernel_size),
            FeedForward(dim, ratio),
            attention,
            TokenMixing(dim, kernel_size),
            FeedForward(dim, ratio),
        )
