"""Training metrics: sums on the device, and scores computed from them on the host."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from pupilseg.geometry import ELLIPSE_SCALE, HEIGHT, WIDTH

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from pupilseg.models.ellipse import EllipseOutput

COUNTS = (
    "frames",
    "background_intersection",
    "background_union",
    "pupil_intersection",
    "pupil_union",
    "center_error_px",
    "center_frames",
    "pupil_frames",
)
_UNITS = ELLIPSE_SCALE.tolist()
"""Python numbers: converting NumPy's while tracing breaks the graph."""


def predicted_mask(output: Tensor | EllipseOutput) -> Tensor:
    """Returns the pupil mask of a network's output.

    Args:
        output: logits (N, 2, H, W), normalized ellipses (N, 4), or those with their soft mask.

    Returns:
        bool (N, 400, 640).
    """
    if isinstance(output, tuple):
        output = output.ellipse
    if output.ndim == 4:
        return output[:, 1] > output[:, 0]
    return ellipse_masks(output)


def ellipse_px(vectors: Tensor) -> Tensor:
    """Converts normalized ellipses (N, 4) to px, float32.

    Scaled column by column with Python numbers, because copying a constant tensor to CUDA waits.
    """
    columns = vectors.float().unbind(dim=1)
    return torch.stack([x * unit for x, unit in zip(columns, _UNITS, strict=True)], dim=1)


def ellipse_masks(vectors: Tensor) -> Tensor:
    """Draws upright ellipses on their device: a pixel is set if its center is inside.

    Args:
        vectors: (N, 4), normalized cx, cy, rx, ry.

    Returns:
        bool (N, 400, 640); all False where a semi-axis is not positive.
    """
    cx, cy, rx, ry = ellipse_px(vectors).unbind(dim=1)
    x = torch.arange(WIDTH, device=vectors.device)
    y = torch.arange(HEIGHT, device=vectors.device)
    along_x = ((x - cx[:, None]) / rx[:, None]).square()
    along_y = ((y - cy[:, None]) / ry[:, None]).square()
    inside = along_x[:, None, :] + along_y[:, :, None] <= 1
    return inside & ((rx > 0) & (ry > 0))[:, None, None]


class EpochMetrics:
    """Sums over one epoch, in a single preallocated vector on the device.

    Args:
        loss_names: names of the loss terms, in the order of storage.
        device: device of the batches.

    Attributes:
        names: meaning of each sum.
        sums: float64 (names,); float32 on MPS.
    """

    def __init__(self, loss_names: Sequence[str], device: torch.device) -> None:
        self.names = (*loss_names, *COUNTS)
        self._loss_names = tuple(loss_names)
        # MPS has no float64. float32 counts pixels exactly up to 2^24 only, so sums drift there.
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(len(self.names), dtype=self._dtype, device=device)
        self._rows = torch.arange(HEIGHT, dtype=self._dtype, device=device)
        columns = torch.arange(WIDTH, dtype=torch.float32, device=device)
        self._columns = torch.stack([torch.ones_like(columns), columns], dim=1)  # (W, 2)
        self._pixels = torch.as_tensor(ELLIPSE_SCALE[:2], dtype=torch.float32).to(device)

    def reset(self) -> None:
        """Starts a new epoch."""
        self.sums.zero_()

    @torch.no_grad()
    def update(
        self, losses: Mapping[str, Tensor], mask: Tensor, label: Tensor, ellipse: Tensor
    ) -> None:
        """Adds a batch, without waiting for the device.

        Args:
            losses: scalar means over the batch, by name.
            mask: bool (N, 400, 640), predicted.
            label: (N, 400, 640), 0 or 1.
            ellipse: float (N, 4), the label's normalized ellipse; rx = 0 for a blink.
        """
        frames = len(label)
        pixels = label.numel()
        found_px = mask.float()
        true_px = (label != 0).float()
        # Matrix products, because sums over bool take three times as long. They count the pixels of
        # one frame exactly in float32 and TF32; the pixels of 66 frames would exceed 2^24.
        rows = found_px @ self._columns  # (N, H, 2): sums of 1 and of x along each row
        area, sum_x = rows.to(self._dtype).sum(dim=1).unbind(dim=1)  # (N,)
        sum_y = rows[:, :, 0].to(self._dtype) @ self._rows
        overlap = torch.bmm(found_px.view(frames, 1, -1), true_px.view(frames, -1, 1))  # (N, 1, 1)
        intersection = overlap.to(self._dtype).sum()
        union = area.sum() + true_px.sum(dim=(1, 2)).to(self._dtype).sum() - intersection
        center = torch.stack([sum_x, sum_y], dim=1) / area.clamp(min=1)[:, None]  # (N, 2) px
        distance = (center - ellipse[:, :2] * self._pixels).square().sum(dim=1).sqrt()
        has_pupil = ellipse[:, 2] > 0
        found = (area > 0) & has_pupil
        counts = torch.stack(
            [
                *(losses[name].detach().to(self._dtype) * frames for name in self._loss_names),
                area.new_full((), frames).to(self._dtype),
                (pixels - union).to(self._dtype),
                (pixels - intersection).to(self._dtype),
                intersection.to(self._dtype),
                union.to(self._dtype),
                (distance * found).sum().to(self._dtype),
                found.sum().to(self._dtype),
                has_pupil.sum().to(self._dtype),
            ]
        )
        self.sums += counts


def mean_iou(names: Sequence[str], sums: Tensor) -> Tensor:
    """Returns the mean of background and pupil IoU, computed on the device of `sums`.

    The value equals that of `scores`. An IoU with an empty union is 1.
    """
    total = dict(zip(names, sums.unbind(), strict=True))
    ious = []
    for name in ("background", "pupil"):
        ratio = total[f"{name}_intersection"] / total[f"{name}_union"]
        # A Python number in `where` would be copied to CUDA, which waits.
        ious.append(torch.where(total[f"{name}_union"] > 0, ratio, torch.ones_like(ratio)))
    return (ious[0] + ious[1]) / 2


def scores(names: Sequence[str], sums: Sequence[float], prefix: str) -> dict[str, float]:
    """Computes an epoch's scores from its sums.

    Args:
        names: meaning of each sum (`EpochMetrics.names`).
        sums: the values, on the host.
        prefix: "train" or "valid".

    Returns:
        Scores by name, each with the prefix: the loss terms, as means over frames; `iou`, the mean
        of background and pupil IoU; `pupil_iou`; `center_px`, the mean distance between predicted
        and true center over frames where both have a pupil (NaN without any); `found`, the share
        of frames with a pupil in which one was predicted (NaN without any).
    """
    total = dict(zip(names, sums, strict=True))
    frames = max(total["frames"], 1)
    out = {f"{prefix}_{name}": total[name] / frames for name in names if name not in COUNTS}
    background = _ratio(total["background_intersection"], total["background_union"], empty=1.0)
    pupil = _ratio(total["pupil_intersection"], total["pupil_union"], empty=1.0)
    out[f"{prefix}_iou"] = (background + pupil) / 2
    out[f"{prefix}_pupil_iou"] = pupil
    out[f"{prefix}_center_px"] = _ratio(total["center_error_px"], total["center_frames"])
    out[f"{prefix}_found"] = _ratio(total["center_frames"], total["pupil_frames"])
    return out


def _ratio(numerator: float, denominator: float, empty: float = math.nan) -> float:
    return numerator / denominator if denominator else empty
