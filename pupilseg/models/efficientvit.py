"""TinyEfficientViT: EfficientViT (MSRA) encoder of three stages, decoder with skip connections.

The architecture minimizes operations (docs/benchmarks.md): only the stem runs at more than a
quarter of the image size, the attention of every stage runs on a 25 x 40 map, and a subpixel
convolution upsamples the one-channel logit to full size at the end.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pupilseg.geometry import HEIGHT, WIDTH
from pupilseg.models.layers import CascadedGroupAttention, ConvNorm, SandwichBlock

ATTENTION_STRIDES = (4, 2, 1)
"""Pooling before attention: every stage then has 25 x 40 tokens."""
UPSAMPLING = 4
"""Image pixels per logit before the last layer, along each axis."""


class Features(NamedTuple):
    """Encoder outputs: (N, C1, 100, 160), (N, C2, 50, 80) and (N, C3, 25, 40)."""

    quarter: Tensor
    eighth: Tensor
    sixteenth: Tensor


@dataclass(frozen=True, slots=True)
class Architecture:
    """Sizes of encoder and decoder, the keyword arguments of every network.

    Attributes:
        embed_dim: channels of the three stages.
        depth: sandwich blocks per stage.
        num_heads: attention heads per stage; each divides its embed_dim.
        ratios: expansion of the feed-forward parts per stage.
        kernel_sizes: depthwise kernel per stage.
        key_dim: query and key channels of a head.
        window_size: attention window on the 25 x 40 map.
        stem_dim: channels of the first convolution.
        separable: downsample between stages with a depthwise and a 1x1 convolution instead of a
            dense 3x3 one.
        decoder_dim: channels of the decoder.
    """

    embed_dim: tuple[int, int, int] = (8, 16, 24)
    depth: tuple[int, int, int] = (1, 1, 1)
    num_heads: tuple[int, int, int] = (1, 1, 2)
    ratios: tuple[int, int, int] = (2, 2, 4)
    kernel_sizes: tuple[int, int, int] = (3, 5, 7)
    key_dim: int = 4
    window_size: tuple[int, int] = (5, 8)
    stem_dim: int = 8
    separable: bool = False
    decoder_dim: int = 16


class Encoder(nn.Module):
    """Stem with stride 4, then three stages of sandwich blocks with downsampling in between."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        dims = arch.embed_dim
        self.stem = nn.Sequential(
            ConvNorm(1, arch.stem_dim, 3, stride=2),
            nn.ReLU(),
            ConvNorm(arch.stem_dim, dims[0], 3, stride=2),
        )
        self.merges = nn.ModuleList(
            _downsample(before, after, separable=arch.separable) for before, after in pairwise(dims)
        )
        self.stages = nn.ModuleList(_stage(arch, index) for index in range(len(dims)))

    def forward(self, image: Tensor) -> Features:
        """Maps images (N, 1, 400, 640) in [-1, 1] to the feature maps of the three stages.

        Raises:
            ValueError: the shape differs. Some other shapes would run, but give wrong results.
        """
        if tuple(image.shape[1:]) != (1, HEIGHT, WIDTH):
            raise ValueError(
                f"image has shape {tuple(image.shape)}, expected (N, 1, {HEIGHT}, {WIDTH}); resize "
                "or letterbox it"
            )
        quarter = self.stages[0](self.stem(image))
        eighth = self.stages[1](self.merges[0](quarter))
        sixteenth = self.stages[2](self.merges[1](eighth))
        return Features(quarter, eighth, sixteenth)


def _downsample(before: int, after: int, *, separable: bool) -> nn.Module:
    """Returns the downsampling convolution between two stages."""
    if not separable:
        return ConvNorm(before, after, 3, stride=2)
    return nn.Sequential(
        ConvNorm(before, before, 3, stride=2, groups=before), ConvNorm(before, after)
    )


def _stage(arch: Architecture, index: int) -> nn.Module:
    """Returns the sandwich blocks of a stage; its attention runs on a map of 25 x 40."""
    dim, heads = arch.embed_dim[index], arch.num_heads[index]
    stride = ATTENTION_STRIDES[index]
    return nn.Sequential(
        *(
            SandwichBlock(
                dim,
                CascadedGroupAttention(dim, heads, arch.key_dim, arch.window_size, stride),
                arch.ratios[index],
                arch.kernel_sizes[index],
            )
            for _ in range(arch.depth[index])
        )
    )


class Fusion(nn.Module):
    """One decoder step: upsamples the coarse map, adds the projected skip, and mixes both."""

    def __init__(self, skip_dim: int, dim: int) -> None:
        super().__init__()
        self.skip = ConvNorm(skip_dim, dim)
        self.mix = nn.Sequential(nn.ReLU(), ConvNorm(dim, dim, 3, groups=dim), ConvNorm(dim, dim))

    def forward(self, coarse: Tensor, skip: Tensor) -> Tensor:
        """Maps (N, dim, H, W) and (N, skip_dim, 2H, 2W) to (N, dim, 2H, 2W)."""
        repeated = functional.interpolate(coarse, scale_factor=2.0, mode="nearest")
        return torch.relu(self.mix(repeated + self.skip(skip)))


class Decoder(nn.Module):
    """Fuses the three scales through skip connections into a map at a quarter of the image size."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        dims, dim = arch.embed_dim, arch.decoder_dim
        self.top = ConvNorm(dims[2], dim)
        self.to_eighth = Fusion(dims[1], dim)
        self.to_quarter = Fusion(dims[0], dim)

    def forward(self, features: Features) -> Tensor:
        """Maps the encoder's features to (N, dim, 100, 160)."""
        eighth = self.to_eighth(self.top(features.sixteenth), features.eighth)
        return self.to_quarter(eighth, features.quarter)


def bilinear_subpixel_kernel(scale: int) -> Tensor:
    """Returns the 3 x 3 kernels of a subpixel convolution that equals bilinear upsampling.

    Along an axis, output pixel k of the `scale` pixels that belong to an input pixel is at an
    offset of (k + 0.5) / scale - 0.5 input pixels from it (half-pixel centers), between two of the
    three taps.

    Returns:
        float32 (scale * scale, 1, 3, 3), in the channel order of `pixel_shuffle`.
    """
    offset = (torch.arange(scale) + 0.5) / scale - 0.5  # (scale,), in (-0.5, 0.5)
    taps = (1 - (offset[:, None] - torch.arange(-1, 2)).abs()).clamp(min=0)  # (scale, 3)
    return torch.einsum("iy,jx->ijyx", taps, taps).reshape(scale * scale, 1, 3, 3)


class SubpixelHead(nn.Module):
    """One logit per cell, upsampled to full size by a learned subpixel convolution.

    The kernel is initialized as bilinear interpolation (subpixel convolution: Shi et al., arXiv
    1609.05158). It takes 2.3 million multiply-adds; ONNX Runtime's `Resize` would take 1.7 ms.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.score = nn.Conv2d(dim, 1, 1)
        self.upsample = nn.Conv2d(1, UPSAMPLING**2, 3, padding=1)
        with torch.no_grad():
            self.upsample.weight.copy_(bilinear_subpixel_kernel(UPSAMPLING))
            nn.init.zeros_(self.upsample.bias)  # type: ignore[arg-type]  # the layer has a bias

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, dim, H, W) to logits (N, 2, 4H, 4W).

        Softmax over two classes depends only on the difference z of the logits, so one value per
        pixel is computed. The logits are -z / 2 for background and z / 2 for pupil.
        """
        half = functional.pixel_shuffle(self.upsample(self.score(x)), UPSAMPLING)
        return torch.cat([-half, half], dim=1)


class TinyEfficientViTSeg(nn.Module):
    """Pupil segmentation in under 60,000 parameters (model name `efficientvit`).

    Args:
        **overrides: fields of `Architecture`; the others are taken from `defaults`.

    Raises:
        TypeError: `Architecture` has no field of that name.
    """

    defaults = Architecture()

    def __init__(self, **overrides: Any) -> None:
        super().__init__()
        arch = replace(self.defaults, **overrides)
        self.encoder = Encoder(arch)
        self.decoder = Decoder(arch)
        self.head = SubpixelHead(arch.decoder_dim)

    def forward(self, image: Tensor) -> Tensor:
        """Maps images (N, 1, 400, 640), float in [-1, 1], to logits (N, 2, 400, 640)."""
        logits: Tensor = self.head(self.decoder(self.encoder(image)))
        return logits


class TinyEfficientViTMicro(TinyEfficientViTSeg):
    """The same network in under 10,000 parameters (model name `efficientvit_tiny`)."""

    defaults = Architecture(
        embed_dim=(8, 12, 18),
        num_heads=(1, 1, 1),
        ratios=(1, 2, 2),
        kernel_sizes=(3, 3, 5),
        separable=True,
        decoder_dim=8,
    )


class TinyEfficientViTBase(TinyEfficientViTSeg):
    """The same network with more channels, under 60,000 parameters (`efficientvit_base`).

    With AVX-512, ONNX Runtime's blocked layout pads 8 channels to 16, so twice the parameters take
    only a third more time (docs/benchmarks.md).
    """

    defaults = Architecture(embed_dim=(16, 32, 32), stem_dim=16)
