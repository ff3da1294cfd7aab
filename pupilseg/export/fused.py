"""Rewrites a trained network into a form that ONNX Runtime computes faster.

The outputs stay the same up to float32 rounding (about 3e-6 of the largest output). ONNX Runtime's
CPU convolutions work on blocks of 8 or 16 channels (MLAS `nchwc`). A tensor whose channel count
does not fit is copied between layouts before and after each convolution. Therefore:

- Batch norms are folded into their convolutions, in float64.
- Channels are padded with zero weights to a count that keeps the blocked layout (`_width`).
- The stem computes two neighboring columns at once, which fills a block of 16 from 8 channels.
- The residual connection of a depthwise convolution becomes a 1 added to the center of its kernel.
- Queries, keys and values go through one depthwise convolution (the identity for keys and values),
  so that they are partitioned into windows only once.
- The pixel shuffle becomes two transposes, along x and along y, that copy contiguous runs.

See docs/benchmarks.md for the measurements.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pupilseg.geometry import HEIGHT, WIDTH
from pupilseg.models.efficientvit import UPSAMPLING, Encoder, Fusion, SubpixelHead
from pupilseg.models.layers import CascadedGroupAttention, FeedForward, TokenMixing

if TYPE_CHECKING:
    from pupilseg.models.efficientvit import Decoder

BLOCK = 16
"""Number of channels that a convolution computes at once with AVX-512 (8 with AVX2)."""
ALIGNMENT = 4
"""Channel counts above `BLOCK` must be a multiple of this to keep the blocked layout."""
CENTER, HALF_RANGE = 127.5, 127.5
"""The network input is (gray - CENTER) / HALF_RANGE."""


class FusedNetwork(nn.Module):
    """A network built from `Encoder` and `Decoder`, for inference on uint8 images.

    Args:
        model: a network in evaluation mode with the attributes `encoder` and `decoder`, and
            either `head` (a `SubpixelHead`, for logits) or `score` and `moments` (for an ellipse).
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder = _FusedEncoder(model.encoder)
        self.decoder = _FusedDecoder(model.decoder)
        head = model.head if isinstance(getattr(model, "head", None), SubpixelHead) else None
        score = model.score if head is None else head.score
        self.score = _Conv(*_padded(_plain(score), 1, self.decoder.width))
        self.head = _FusedHead(head) if head is not None else _EllipseHead(model)

    def forward(self, image: Tensor) -> Tensor:
        """Maps uint8 images (N, 1, 400, 640) to the output of the network."""
        features = self.encoder(image.float() - CENTER)
        out: Tensor = self.head(self.score(self.decoder(*features)))
        return out


def is_fusible(model: nn.Module) -> bool:
    """Returns True if `FusedNetwork` supports a network."""
    head = isinstance(getattr(model, "head", None), SubpixelHead) or hasattr(model, "moments")
    return isinstance(getattr(model, "encoder", None), Encoder) and head


def _width(channels: int) -> int:
    """Returns the channel count after padding."""
    return BLOCK if channels < BLOCK else _aligned(channels)


def _aligned(channels: int) -> int:
    """Returns the smallest multiple of `ALIGNMENT` that is at least `channels`."""
    return -(-channels // ALIGNMENT) * ALIGNMENT


Weights = tuple[Tensor, Tensor]
"""Kernel (out, in, kh, kw) and bias (out,) of a convolution, float64."""


def _plain(conv: nn.Conv2d) -> Weights:
    """Returns the weights of a convolution with bias."""
    assert conv.bias is not None
    return conv.weight.detach().double(), conv.bias.detach().double()


def _folded(layer: nn.Module) -> Weights:
    """Returns the weights of a `ConvNorm` as one convolution."""
    conv, norm = layer[0], layer[1]  # type: ignore[index]  # a ConvNorm is a Sequential
    scale = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
    bias = norm.bias.detach().double() - norm.running_mean.double() * scale
    return conv.weight.detach().double() * scale[:, None, None, None], bias


def _channels(layer: nn.Module) -> tuple[int, int]:
    """Returns the number of input and output channels of a `ConvNorm`."""
    conv: Any = layer[0]  # type: ignore[index]  # a ConvNorm is a Sequential
    return conv.in_channels, conv.out_channels


def _padded(weights: Weights, out_chans: int, in_chans: int) -> Weights:
    """Returns weights padded with zeros to more channels."""
    kernel, bias = weights
    wide = kernel.new_zeros(out_chans, in_chans, *kernel.shape[2:])
    wide[: kernel.shape[0], : kernel.shape[1]] = kernel
    return wide, torch.cat([bias, bias.new_zeros(out_chans - len(bias))])


class _Conv(nn.Module):
    """A convolution with given float64 weights, stored as float32.

    Args:
        kernel: (out, in, kh, kw).
        bias: (out,).
        stride: along y and x.
        padding: (top, left, bottom, right); None keeps the size at stride 1.
        groups: as in `nn.Conv2d`.
    """

    def __init__(
        self,
        kernel: Tensor,
        bias: Tensor,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int, int, int] | None = None,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.kernel, self.bias = nn.Parameter(kernel.float()), nn.Parameter(bias.float())
        self.stride, self.groups = stride, groups
        rows, columns = kernel.shape[2] // 2, kernel.shape[3] // 2
        self.padding = (rows, columns, rows, columns) if padding is None else padding

    def forward(self, x: Tensor) -> Tensor:
        top, left, bottom, right = self.padding
        if (top, left) == (bottom, right):
            around = (top, left)
        else:
            # The exporter merges this into the convolution.
            x, around = functional.pad(x, (left, right, top, bottom)), (0, 0)
        return functional.conv2d(x, self.kernel, self.bias, self.stride, around, groups=self.groups)


def _conv(layer: nn.Module, out_chans: int, in_chans: int, stride: int = 1) -> _Conv:
    """Returns a `ConvNorm` as one convolution with padded channels."""
    return _Conv(*_padded(_folded(layer), out_chans, in_chans), (stride, stride))


def _depthwise(layer: nn.Module, chans: int, stride: int = 1, identity: float = 0.0) -> _Conv:
    """Returns a depthwise `ConvNorm` as one convolution with padded channels.

    Args:
        layer: a depthwise `ConvNorm`.
        chans: number of channels after padding.
        stride: along both axes.
        identity: multiple of the input that is added to the output.
    """
    kernel, bias = _folded(layer)
    kernel[:, 0, kernel.shape[2] // 2, kernel.shape[3] // 2] += identity
    return _Conv(*_padded((kernel, bias), chans, 1), (stride, stride), groups=chans)


class _FusedStem(nn.Sequential):
    """The two strided convolutions of the stem; the input is gray values minus `CENTER`."""

    def __init__(self, stem: nn.Module, out_chans: int) -> None:
        first, second = _folded(stem[0]), _folded(stem[2])  # type: ignore[index]
        first = (first[0] / HALF_RANGE, first[1])
        chans = len(first[1])
        if 2 * chans > BLOCK:
            super().__init__(
                _Conv(*_padded(first, _width(chans), 1), (2, 2)),
                nn.ReLU(),
                _Conv(*_padded(second, out_chans, _width(chans)), (2, 2)),
            )
            return
        half = BLOCK // 2
        # Column X here holds columns 2 X (channels from 0) and 2 X + 1 (channels from `half`).
        pair = first[0].new_zeros(BLOCK, 1, 3, 5)
        pair[:chans, :, :, :3] = first[0]
        pair[half : half + chans, :, :, 2:] = first[0]
        pair_bias = first[1].new_zeros(BLOCK)
        pair_bias[:chans] = pair_bias[half : half + chans] = first[1]
        # Column x reads columns 2 x - 1, 2 x and 2 x + 1: the right half of pair x - 1, and pair x.
        kernel, bias = second
        merge = kernel.new_zeros(len(bias), BLOCK, 3, 2)
        merge[:, half : half + chans, :, 0] = kernel[..., 0]
        merge[:, :chans, :, 1] = kernel[..., 1]
        merge[:, half : half + chans, :, 1] = kernel[..., 2]
        super().__init__(
            _Conv(pair, pair_bias, (2, 4), (1, 1, 0, 0)),
            nn.ReLU(),
            _Conv(*_padded((merge, bias), out_chans, BLOCK), (2, 1), (1, 1, 0, 0)),
        )


class _FusedFeedForward(nn.Module):
    def __init__(self, layer: FeedForward, chans: int) -> None:
        super().__init__()
        hidden = _width(_channels(layer.expand)[1])
        self.expand = _conv(layer.expand, hidden, chans)
        self.reduce = _conv(layer.reduce, chans, hidden)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.reduce(torch.relu(self.expand(x)))
        return out


class _FusedAttention(nn.Module):
    """`CascadedGroupAttention` with padded channels."""

    def __init__(self, layer: CascadedGroupAttention, chans: int) -> None:
        super().__init__()
        self.stride, self.window_size, self.key_dim = layer.stride, layer.window_size, layer.key_dim
        self.num_heads, self.head_dim = layer.num_heads, layer.head_dim
        keys = 2 * layer.key_dim
        total = _aligned(keys + layer.head_dim)
        self.value_dim = total - keys
        in_chans = chans if layer.num_heads == 1 else layer.head_dim
        self.qkv, self.mix, self.bias = nn.ModuleList(), nn.ModuleList(), nn.ParameterList()
        for qkv, query_mix, bias in zip(layer.qkv, layer.query_mix, layer.bias, strict=True):
            self.qkv.append(_Conv(*_padded(_folded(qkv), total, in_chans)))
            kernel, shift = _padded(_folded(query_mix), total, 1)
            kernel[: layer.key_dim] *= layer.key_dim**-0.5  # the scale of the scores
            shift[: layer.key_dim] *= layer.key_dim**-0.5
            kernel[layer.key_dim :, 0, 1, 1] = 1
            self.mix.append(_Conv(kernel, shift, groups=total))
            self.bias.append(bias().detach())
        kernel, shift = _folded(layer.project)
        parts = [
            _padded((part, shift), chans, self.value_dim)[0]
            for part in kernel.split(layer.head_dim, dim=1)
        ]
        self.project = _Conv(torch.cat(parts, dim=1), _padded((kernel, shift), chans, chans)[1])

    def forward(self, x: Tensor) -> Tensor:
        pooled = functional.avg_pool2d(x, self.stride) if self.stride > 1 else x
        height, width = pooled.shape[-2:]
        wh, ww = self.window_size
        grid = (height // wh, width // ww)
        outputs: list[Tensor] = []
        for head in range(self.num_heads):
            feature = pooled
            if self.num_heads > 1:
                feature = pooled[:, head * self.head_dim : (head + 1) * self.head_dim]
            if head > 0:
                feature = feature + outputs[-1][:, : self.head_dim]
            mixed = self.mix[head](self.qkv[head](feature))
            chans = mixed.shape[1]
            windows = mixed.view(-1, chans, grid[0], wh, grid[1], ww).permute(0, 2, 4, 1, 3, 5)
            query, key, value = windows.reshape(-1, chans, wh * ww).split(
                [self.key_dim, self.key_dim, self.value_dim], dim=1
            )
            attention = (query.transpose(1, 2) @ key + self.bias[head]).softmax(dim=-1)
            out = (value @ attention.transpose(1, 2)).view(-1, *grid, self.value_dim, wh, ww)
            outputs.append(out.permute(0, 3, 1, 4, 2, 5).reshape(-1, self.value_dim, height, width))
        heads = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        out = self.project(torch.relu(heads))
        if self.stride > 1:
            out = functional.interpolate(out, scale_factor=float(self.stride), mode="nearest")
        return x + out


def _fused_layer(layer: nn.Module, chans: int) -> nn.Module:
    """Returns one layer of a `SandwichBlock` with padded channels."""
    if isinstance(layer, TokenMixing):
        return _depthwise(layer.conv, chans, identity=1.0)
    if isinstance(layer, FeedForward):
        return _FusedFeedForward(layer, chans)
    assert isinstance(layer, CascadedGroupAttention)
    return _FusedAttention(layer, chans)


class _FusedEncoder(nn.Module):
    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        widths = [_width(len(stage[0][0].conv[1].bias)) for stage in encoder.stages]  # type: ignore[index]
        self.stem = _FusedStem(encoder.stem, widths[0])
        self.stages = nn.ModuleList(
            nn.Sequential(*(_fused_layer(layer, width) for block in stage for layer in block))  # type: ignore[attr-defined]
            for stage, width in zip(encoder.stages, widths, strict=True)
        )
        self.merges = nn.ModuleList()
        for merge, before, after in zip(encoder.merges, widths, widths[1:], strict=False):
            if isinstance(merge[0], nn.Conv2d):  # type: ignore[index]
                self.merges.append(_conv(merge, after, before, stride=2))
            else:
                halve, widen = merge.children()
                self.merges.append(
                    nn.Sequential(_depthwise(halve, before, stride=2), _conv(widen, after, before))
                )

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quarter = self.stages[0](self.stem(image))
        eighth = self.stages[1](self.merges[0](quarter))
        return quarter, eighth, self.stages[2](self.merges[1](eighth))


class _FusedFusion(nn.Module):
    forward = Fusion.forward

    def __init__(self, fusion: Fusion, chans: int) -> None:
        super().__init__()
        self.skip = _conv(fusion.skip, chans, _width(_channels(fusion.skip)[0]))
        self.mix = nn.Sequential(
            nn.ReLU(), _depthwise(fusion.mix[1], chans), _conv(fusion.mix[2], chans, chans)
        )


class _FusedDecoder(nn.Module):
    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        coarse, chans = _channels(decoder.top)
        self.width = _width(chans)
        self.top = _conv(decoder.top, self.width, _width(coarse))
        self.to_eighth = _FusedFusion(decoder.to_eighth, self.width)
        self.to_quarter = _FusedFusion(decoder.to_quarter, self.width)

    def forward(self, quarter: Tensor, eighth: Tensor, sixteenth: Tensor) -> Tensor:
        out: Tensor = self.to_quarter(self.to_eighth(self.top(sixteenth), eighth), quarter)
        return out


class _FusedHead(nn.Module):
    """`SubpixelHead` without its score layer."""

    def __init__(self, head: SubpixelHead) -> None:
        super().__init__()
        self.upsample = _Conv(*_plain(head.upsample))

    def forward(self, score: Tensor) -> Tensor:
        height, width = HEIGHT // UPSAMPLING, WIDTH // UPSAMPLING
        cells = self.upsample(score).view(-1, UPSAMPLING, UPSAMPLING, height, width)
        rows = cells.permute(0, 1, 3, 4, 2).reshape(-1, UPSAMPLING, height, WIDTH)
        half = rows.transpose(1, 2).reshape(-1, 1, HEIGHT, WIDTH)
        return torch.cat([-half, half], dim=1)


class _EllipseHead(nn.Module):
    """`EllipseRegressionNet` after its score layer: the moments of the map."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, score: Tensor) -> Tensor:
        out: Tensor = self.model.moments(torch.sigmoid(score[:, 0]))
        return out
