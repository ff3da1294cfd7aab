"""EllipseRegressionNet: four numbers a frame, the moments of a mask of a quarter of its size."""

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
"""Shares of a cell up to this count as none, and as whole from 1 - CLIP. A sigmoid is never 0:
without it the many cells around a pupil make its semi-axes 2.2 px too long (docs/benchmarks.md)."""
BLOCK, BLOCK_STEP = 24, 4
"""Cells of the square whose fullest place is looked at, and between places: 96 and 16 px."""
REACH = 96.0
"""Half the side in px of what is looked at, about the middle of that place: a pupil of 70 px
radius, and 26 px between its centre and the place. Dark corners beyond it move nothing."""
LEAST_CELLS = 2.0
"""A frame with fewer cells of pupil shows none."""
FIRST_LOGIT = -2.0
"""Few cells of a frame show a pupil, so training starts from a share of 0.12."""


class EllipseOutput(NamedTuple):
    """What the network gives in training, and in evaluation where `with_map` is set.

    Attributes:
        ellipse: (N, 4) normalised cx, cy, rx, ry.
        cover: (N, 100, 160) float32 logits of the share of each cell that is pupil.
    """

    ellipse: Tensor
    cover: Tensor


class EllipseRegressionNet(nn.Module):
    """Regresses the upright ellipse (cx, cy, rx, ry), normalised (model name `ellipse`).

    A global average pool forgets position. Here each cell of a 100 x 160 map says which share of it
    is pupil, and the numbers are the moments of that soft mask: its mean is the centre, twice its
    standard deviations are the semi-axes, as by definition of the ellipse with the mask's second
    moments. It differs from the soft-argmax of DSNT (Nibali et al., arXiv 1801.07372) in that the
    cells do not share one probability: a softmax says where the pupil is, but its tails say more of
    the spread than the pupil does. No cell of pupil, no pupil.

    Args:
        **overrides: fields of `Architecture`; `defaults` gives the rest.

    Attributes:
        with_map: give `EllipseOutput` in evaluation mode too, for a validation loss.

    Raises:
        TypeError: a name that `Architecture` does not have.
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
        # Middles of the cells in px; they follow from the image size.
        middle = (CELL - 1) / 2
        self.register_buffer(
            "columns", torch.arange(WIDTH // CELL) * float(CELL) + middle, persistent=False
        )
        self.register_buffer(
            "rows", torch.arange(HEIGHT // CELL) * float(CELL) + middle, persistent=False
        )

    def forward(self, image: Tensor) -> Tensor | EllipseOutput:
        """Maps images (N, 1, 400, 640), float in [-1, 1], to (N, 4) in [0, 1].

        A frame judged to hold no pupil has rx = ry = 0; its centre means nothing. In training mode
        the map comes along, as `EllipseOutput`.
        """
        cover = self.score(self.decoder(self.encoder(image)))[:, 0].float()  # (N, 100, 160)
        ellipse = self.moments(torch.sigmoid(cover))
        return EllipseOutput(ellipse, cover) if self.training or self.with_map else ellipse

    def moments(self, share: Tensor) -> Tensor:
        """Returns the ellipses (N, 4) with the moments of shares (N, 100, 160) in [0, 1].

        fp32 and no matmul, which autocast would take in half precision: 640 px then have steps of
        2 px.
        """
        left, top = _fullest_place(share)
        # Coordinates about that place, in px: differences of small numbers lose nothing.
        x, y = self.columns - left[:, None], self.rows - top[:, None]  # (N, 160), (N, 100)
        near = (x.abs() <= REACH)[:, None, :] & (y.abs() <= REACH)[:, :, None]
        weight = ((share - CLIP) / (1 - 2 * CLIP)).clamp(0, 1) * near
        along_x, along_y = weight.sum(dim=1), weight.sum(dim=2)
        cells = along_x.sum(dim=1)
        # Below the least the quotients shrink to 0, with gradients that stay bounded.
        whole = cells.clamp(min=LEAST_CELLS)
        dx, dy = (along_x * x).sum(dim=1) / whole, (along_y * y).sum(dim=1) / whole
        var_x = (along_x * (x - dx[:, None]).square()).sum(dim=1) / whole
        var_y = (along_y * (y - dy[:, None]).square()).sum(dim=1) / whole
        # No Sheppard's correction: cells in place of pixels add 1.25 px^2, and the clip takes about
        # as much away; what is left is under 0.1 px on semi-axes over 14 px.
        spread = torch.stack([var_x, var_y], dim=1).clamp(min=1.0).sqrt()
        radii = (2 / RADIUS_UNIT * spread) * (cells >= LEAST_CELLS)[:, None]
        center = [(left + dx) / WIDTH, (top + dy) / HEIGHT]
        return torch.cat([torch.stack(center, dim=1), radii], dim=1)


def _fullest_place(share: Tensor) -> tuple[Tensor, Tensor]:
    """Returns x and y (N,) in px of the middle of the square that holds the most pupil.

    The largest sum, not a mean over the frame: with a second dark patch a mean lies between the
    two. Nothing is to be learned from where the square lies, so no gradient passes.
    """
    # In two steps, each sum is made of 16 + 36 numbers and not of 576.
    tiles = functional.avg_pool2d(share.detach()[:, None], BLOCK_STEP)  # (N, 1, 25, 40)
    sums = functional.avg_pool2d(tiles, BLOCK // BLOCK_STEP, 1)[:, 0]  # (N, 20, 35)
    place = sums.flatten(1).argmax(dim=1)
    per_row = sums.shape[2]
    middle = (BLOCK * CELL - 1) / 2
    step = float(BLOCK_STEP * CELL)
    column, row = place % per_row, torch.div(place, per_row, rounding_mode="floor")
    return column * step + middle, row * step + middle
