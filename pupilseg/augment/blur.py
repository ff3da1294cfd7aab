"""Gaussian blur, with a separate sigma for each frame."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import torch
import torch.nn.functional as F
from torch import Tensor

from pupilseg.augment.config import LARGEST_SIGMA
from pupilseg.augment.part import Part, per_frame
from pupilseg.geometry import HEIGHT, WIDTH

if TYPE_CHECKING:
    from pupilseg.augment.config import AugmentConfig
    from pupilseg.augment.part import HostFrame, Numbers, Plan
    from pupilseg.loader.loader import Batch

RADIUS = round(2 * LARGEST_SIGMA)
"""Pixels that the kernel reaches on each side."""
TAPS = 2 * RADIUS + 1
LEAST_SIGMA = 0.3
"""Smallest sigma of a blurred frame, px; a smaller one changes nothing."""


class BlurDraw(NamedTuple):
    """Random parameters of the blur.

    Attributes:
        sigma: float32 (N,), px; 0 for none.
    """

    sigma: Tensor


class Blur(Part[BlurDraw]):
    """Blurs frames with replicated borders; frames with sigma 0 are unchanged."""

    name = "blur"
    numbers = 2

    def is_on(self, config: AugmentConfig) -> bool:
        return config.blur > 0 and config.blur_sigma > 0

    def draw(
        self, numbers: Numbers, batch: Batch, config: AugmentConfig, earlier: Plan
    ) -> BlurDraw:
        blurred = numbers.one() < config.blur
        sigma = LEAST_SIGMA + numbers.one() * (config.blur_sigma - LEAST_SIGMA)
        return BlurDraw(sigma.clamp(min=0).masked_fill(~blurred, 0))

    def changes(self, drawn: BlurDraw) -> Tensor:
        return drawn.sigma > 0

    def on_device(
        self, batch: Batch, drawn: BlurDraw, config: AugmentConfig, constant: Tensor | None
    ) -> Batch:
        # A sum of shifted images: a convolution would be rounded to TF32 on CUDA whenever the
        # training loop allows TF32.
        image, sigma = batch.image, drawn.sigma
        tap = torch.arange(-RADIUS, RADIUS + 1, device=image.device)
        kernel = (-0.5 * (tap / sigma.clamp(min=0.1)[:, None]).square()).exp()
        kernel = (kernel / kernel.sum(dim=1, keepdim=True))[:, :, None, None, None]
        wide = F.pad(image, (RADIUS, RADIUS, 0, 0), mode="replicate")
        rows = wide[..., :WIDTH] * kernel[:, 0]
        for k in range(1, TAPS):
            rows = rows + wide[..., k : k + WIDTH] * kernel[:, k]
        tall = F.pad(rows, (0, 0, RADIUS, RADIUS), mode="replicate")
        blurred = tall[..., :HEIGHT, :] * kernel[:, 0]
        for k in range(1, TAPS):
            blurred = blurred + tall[..., k : k + HEIGHT, :] * kernel[:, k]
        return replace(batch, image=torch.where(per_frame(sigma, image) > 0, blurred, image))

    def on_host(self, frame: HostFrame, drawn: Any, config: AugmentConfig) -> None:
        image, size = frame.image, (TAPS, TAPS)
        cv2.GaussianBlur(image, size, drawn.sigma, dst=image, borderType=cv2.BORDER_REPLICATE)
