"""EllipseRegressionNet: four numbers a frame, from a heat map that keeps where the pupil is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pupilseg.geometry import HEIGHT, RADIUS_UNIT, WIDTH
from pupilseg.models.efficientvit import Architecture, Decoder, Encoder


class EllipseRegressionNet(nn.Module):
    """Regresses the upright ellipse (cx, cy, rx, ry), normalised (model name `ellipse`).

    A global average pool forgets position; here a spatial softmax over a 100 x 160 heat map gives
    the centre as its mean (DSNT, Nibali et al., arXiv 1801.07372), its variances give the size the
    map itself believes in, and a small linear head, fed with the features under the heat map,
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

    def forward(self, image: Tensor) -> Tensor:
        """Maps images (N, 1, 400, 640), float in [-1, 1], to (N, 4) in [0, 1].

        In evaluation mode a frame judged to hold no pupil has rx = ry = 0; in training both are
        scaled by the probability that there is one, so that the judgement is learned.
        """
        features = self.decoder(self.encoder(image))  # (N, dim, 100, 160)
        # fp32: a sum over 16,000 cells loses the subpixel part in half precision.
        heat = self.heat(features).flatten(1).float().softmax(dim=1)  # (N, 16000)
        pooled = torch.bmm(features.flatten(2).float(), heat.unsqueeze(2)).squeeze(2)  # (N, dim)
        grid = heat.view(-1, len(self.rows), len(self.columns))
        along_x, along_y = grid.sum(dim=1), grid.sum(dim=2)  # (N, 160), (N, 100)
        cx, cy = along_x @ self.columns, along_y @ self.rows
        var_x = (along_x * (self.columns - cx[:, None]) ** 2).sum(dim=1)
        var_y = (along_y * (self.rows - cy[:, None]) ** 2).sum(dim=1)
        spread = torch.stack([var_x * WIDTH**2, var_y * HEIGHT**2], dim=1).clamp(min=1.0).sqrt()
        correction, presence = self.size(pooled).split([2, 1], dim=1)
        radii = (2 * spread / RADIUS_UNIT * correction.exp()).clamp(max=1.0)
        present = torch.sigmoid(presence + 2.0)
        if not self.training:
            present = (present > 0.5).to(radii.dtype)
        return torch.cat([torch.stack([cx, cy], dim=1), radii * present], dim=1)
