"""EllipseRegressionNet: four numbers a frame, from a heat map that keeps where the pupil is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pupilseg.geometry import HEIGHT, RADIUS_UNIT, WIDTH
from pupilseg.models.efficientvit import Architecture, Decoder, Encoder


class EllipseOutput(NamedTuple):
    """What the network gives in training mode.

    Attributes:
        ellipse: (N, 4) normalised cx, cy, rx, ry.
        heat: (N, 100, 160) float32 log-probability that a random pupil pixel lies in a cell.
    """

    ellipse: Tensor
    heat: Tensor


class EllipseRegressionNet(nn.Module):
    """Regresses the upright ellipse (cx, cy, rx, ry), normalised (model name `ellipse`).

    A global average pool forgets position. Here a spatial softmax over 100 x 160 cells says where a
    random pixel of the pupil lies; the mean of that distribution is the centre (DSNT, Nibali et
    al., arXiv 1801.07372) and twice its standard deviations are the semi-axes, as by definition of
    the ellipse with the mask's second moments. In training the map itself is compared with the
    label (DSNT's distribution loss). A small linear head, fed with the features under the map,
    corrects the axes and says whether there is a pupil at all.

    Args:
        **overrides: fields of `Architecture`; `defaults` gives the rest.

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
        self.heat = nn.Conv2d(arch.decoder_dim, 1, 1)
        self.size = nn.Linear(arch.decoder_dim, 3)
        nn.init.zeros_(self.size.weight)
        nn.init.zeros_(self.size.bias)
        # Image coordinates of the heat map's cells, normalised; they follow from the image size.
        columns = (torch.arange(WIDTH // 4) * 4 + 1.5) / WIDTH
        rows = (torch.arange(HEIGHT // 4) * 4 + 1.5) / HEIGHT
        self.register_buffer("columns", columns, persistent=False)
        self.register_buffer("rows", rows, persistent=False)

    def forward(self, image: Tensor) -> Tensor | EllipseOutput:
        """Maps images (N, 1, 400, 640), float in [-1, 1], to (N, 4) in [0, 1].

        In evaluation mode a frame judged to hold no pupil has rx = ry = 0. In training mode both
        are scaled by the probability that there is one, so that the judgement is learned, and the
        heat map comes along, as `EllipseOutput`.
        """
        features = self.decoder(self.encoder(image))  # (N, dim, 100, 160)
        # fp32: a sum over 16,000 cells loses the subpixel part in half precision.
        log_heat = self.heat(features).flatten(1).float().log_softmax(dim=1)  # (N, 16000)
        heat = log_heat.exp()
        pooled = torch.bmm(features.flatten(2).float(), heat.unsqueeze(2)).squeeze(2)  # (N, dim)
        grid = heat.view(-1, len(self.rows), len(self.columns))
        along_x, along_y = grid.sum(dim=1), grid.sum(dim=2)  # (N, 160), (N, 100)
        # No matmul: autocast would take it in half precision, where 640 px have steps of 2 px.
        cx, cy = (along_x * self.columns).sum(dim=1), (along_y * self.rows).sum(dim=1)
        var_x = (along_x * (self.columns - cx[:, None]) ** 2).sum(dim=1)
        var_y = (along_y * (self.rows - cy[:, None]) ** 2).sum(dim=1)
        spread = torch.stack([var_x * WIDTH**2, var_y * HEIGHT**2], dim=1).clamp(min=1.0).sqrt()
        correction, presence = self.size(pooled).split([2, 1], dim=1)
        radii = (2 * spread / RADIUS_UNIT * correction.exp()).clamp(max=1.0)
        present = torch.sigmoid(presence + 2.0)
        if not self.training:
            present = (present > 0.5).to(radii.dtype)
        ellipse = torch.cat([torch.stack([cx, cy], dim=1), radii * present], dim=1)
        return EllipseOutput(ellipse, log_heat.view_as(grid)) if self.training else ellipse
