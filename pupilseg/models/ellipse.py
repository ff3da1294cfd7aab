"""EllipseRegressionNet: predicts an ellipse from the moments of a quarter-size soft mask."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pupilseg.geometry import HEIGHT, RADIUS_UNIT, WIDTH
from pupilseg.models.efficientvit import Architecture, Decoder, Encoder

CELL = 4
"""Side of a cell of the map in px."""
CLIP = 0.1
"""Shares of pupil up to CLIP count as 0, and shares of at least 1 - CLIP as 1. A sigmoid is never
exactly 0: without clipping, the many cells around a pupil make its semi-axes 2.2 px too long
(docs/benchmarks.md)."""
BLOCK, BLOCK_STEP = 24, 4
"""Side and step, in cells, of the square that slides over the map (96 and 16 px)."""
REACH = 96.0
"""Moments are computed in a window around the fullest square; this is half its side in px. The
window contains a pupil of 70 px radius that is 26 px off center. Dark corners outside the window
have no effect."""
LEAST_CELLS = 2.0
"""A frame with fewer pupil cells counts as a frame without a pupil."""
FIRST_LOGIT = -2.0
"""Initial bias. Few cells contain pupil, so training starts at a share of 0.12."""


class EllipseOutput(NamedTuple):
    """Output in training mode, and in evaluation mode with `with_map`.

    Attributes:
        ellipse: (N, 4), normalized cx, cy, rx, ry.
        cover: float32 (N, 100, 160), logits of the share of each cell that is pupil.
    """

    ellipse: Tensor
    cover: Tensor


class EllipseRegressionNet(nn.Module):
    """Regresses the normalized upright ellipse (cx, cy, rx, ry) (model name `ellipse`).

    Global average pooling loses the position. Instead, the network predicts the share of pupil in
    each cell of a 100 x 160 map, and the output is computed from the moments of this soft mask: the
    mean is the center, and twice the standard deviations are the semi-axes, as for the ellipse with
    the mask's second moments. Unlike the soft-argmax of DSNT (Nibali et al., arXiv 1801.07372), the
    cells are not normalized with a softmax, which would locate the pupil, but whose tails would
    dominate the standard deviations. A map without pupil cells means that there is no pupil.

    Args:
        **overrides: fields of `Architecture`; the others are taken from `defaults`.

    Attributes:
        with_map: return `EllipseOutput` in evaluation mode too, for a validation loss.

    Raises:
        TypeError: `Architecture` has no field of that name.
    """

    columns: Tensor
    rows: Tensor

    defaults = Architecture()

    def __init__(self, **overrides: Any) -> None:
        super().__init__()
        arch = replace(self.defaults, **overrides)
        self.encoder = Encoder(arch)
        self.decoder = Decoder(arch)
        self.score = nn.Conv2d(arch.decoder_dim, 1, 1)
        nn.init.constant_(self.score.bias, FIRST_LOGIT)  # type: ignore[arg-type]  # it has a bias
        self.with_map = False
        # Centers of the cells in px. Not persistent, because the image size determines them.
        middle = (CELL - 1) / 2
        self.register_buffer(
            "columns", torch.arange(WIDTH // CELL) * float(CELL) + middle, persistent=False
        )
        self.register_buffer(
            "rows", torch.arange(HEIGHT // CELL) * float(CELL) + middle, persistent=False
        )

    def forward(self, image: Tensor) -> Tensor | EllipseOutput:
        """Maps images (N, 1, 400, 640), float in [-1, 1], to (N, 4) in [0, 1].

        A frame without a pupil has rx = ry = 0 and a meaningless center. In training mode, the
        output is an `EllipseOutput`.
        """
        cover = self.score(self.decoder(self.encoder(image)))[:, 0].float()  # (N, 100, 160)
        ellipse = self.moments(torch.sigmoid(cover))
        return EllipseOutput(ellipse, cover) if self.training or self.with_map else ellipse

    def moments(self, share: Tensor) -> Tensor:
        """Returns the ellipses (N, 4) with the moments of shares (N, 100, 160) in [0, 1].

        Computed in float32 and without matmul, which autocast would run in half precision, with
        steps of 2 px at 640 px.
        """
        left, top = _fullest_place(share)
        # Coordinates relative to that position, in px, so that the squares stay small and precise.
        x, y = self.columns - left[:, None], self.rows - top[:, None]  # (N, 160), (N, 100)
        near = (x.abs() <= REACH)[:, None, :] & (y.abs() <= REACH)[:, :, None]
        weight = ((share - CLIP) / (1 - 2 * CLIP)).clamp(0, 1) * near
        along_x, along_y = weight.sum(dim=1), weight.sum(dim=2)
        cells = along_x.sum(dim=1)
        # Below the threshold, the quotients shrink to 0 with bounded gradients.
        whole = cells.clamp(min=LEAST_CELLS)
        dx, dy = (along_x * x).sum(dim=1) / whole, (along_y * y).sum(dim=1) / whole
        var_x = (along_x * (x - dx[:, None]).square()).sum(dim=1) / whole
        var_y = (along_y * (y - dy[:, None]).square()).sum(dim=1) / whole
        # No Sheppard's correction: using cells instead of pixels adds 1.25 px^2, and clipping
        # removes about as much. The remaining bias is below 0.1 px for semi-axes over 14 px.
        spread = torch.stack([var_x, var_y], dim=1).clamp(min=1.0).sqrt()
        radii = (2 / RADIUS_UNIT * spread) * (cells >= LEAST_CELLS)[:, None]
        center = [(left + dx) / WIDTH, (top + dy) / HEIGHT]
        return torch.cat([torch.stack(center, dim=1), radii], dim=1)


def _fullest_place(share: Tensor) -> tuple[Tensor, Tensor]:
    """Returns x and y (N,) in px of the center of the square with the most pupil.

    The maximum is used because the mean over the frame would lie between the pupil and a second
    dark patch. No gradient flows through the position of the square.
    """
    # Two steps need 16 + 36 terms per sum instead of 576.
    tiles = functional.avg_pool2d(share.detach()[:, None], BLOCK_STEP)  # (N, 1, 25, 40)
    sums = functional.avg_pool2d(tiles, BLOCK // BLOCK_STEP, 1)[:, 0]  # (N, 20, 35)
    place = sums.flatten(1).argmax(dim=1)
    per_row = sums.shape[2]
    middle = (BLOCK * CELL - 1) / 2
    step = float(BLOCK_STEP * CELL)
    column, row = place % per_row, torch.div(place, per_row, rounding_mode="floor")
    return column * step + middle, row * step + middle
