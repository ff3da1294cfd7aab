"""Gaussian noise, half as strong on black as on white."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pupilseg.augment.part import PIXELS, Part, per_frame
from pupilseg.geometry import HEIGHT, WIDTH
from pupilseg.runtime.device import on_device

if TYPE_CHECKING:
    from pupilseg.augment.config import AugmentConfig
    from pupilseg.augment.part import HostFrame, Numbers, Plan
    from pupilseg.loader.loader import Batch

FIELD_VALUES = 5 * PIXELS
FIELD_SEED = 20


class NoiseDraw(NamedTuple):
    """Random parameters of the noise.

    Attributes:
        deviation: float32 (N,), standard deviation on white, of either sign.
        first: int32 (N,), index in the noise field of the first value of the frame's window.
    """

    deviation: Tensor
    first: Tensor


class Noise(Part[NoiseDraw]):
    """Adds noise whose deviation is linear in brightness, from a half on black to one on white."""

    name = "noise"
    numbers = 2
    clamp = True

    def is_on(self, config: AugmentConfig) -> bool:
        return bool(config.noise)

    def draw(
        self, numbers: Numbers, batch: Batch, config: AugmentConfig, earlier: Plan
    ) -> NoiseDraw:
        return NoiseDraw(
            deviation=(2 * numbers.one() - 1) * config.noise,
            first=(numbers.one() * (FIELD_VALUES - PIXELS)).int(),
        )

    def constant(self, device: torch.device) -> Tensor:
        return noise_field(device)

    def on_device(
        self, batch: Batch, drawn: NoiseDraw, config: AugmentConfig, constant: Tensor | None
    ) -> Batch:
        assert constant is not None
        image = batch.image
        place = torch.arange(PIXELS, dtype=torch.int32, device=image.device)
        window = constant[drawn.first[:, None] + place].view_as(image)
        deviation = (image * 0.25 + 0.75) * per_frame(drawn.deviation, image)
        return replace(batch, image=image + window * deviation)

    def on_host(self, frame: HostFrame, drawn: Any, config: AugmentConfig) -> None:
        field = noise_field(torch.device("cpu")).numpy()
        window = field[drawn.first : drawn.first + PIXELS].reshape(HEIGHT, WIDTH)
        image = frame.image
        noise = np.multiply(image, 0.25 * drawn.deviation, out=frame.scratch.plane)
        noise += 0.75 * drawn.deviation
        noise *= window
        image += noise


@cache
def noise_field(device: torch.device) -> Tensor:
    """Returns the standard normal values that all noise is cut from, float32 (1,280,000,).

    Fresh values would take a CPU 1.2 ms per frame, more than all other parts together. Each frame
    uses one of 1,024,001 windows of this field with a random sign and a scale of its own. The
    values in a window are independent, and two frames of an epoch rarely share a window.
    """
    generator = torch.Generator().manual_seed(FIELD_SEED)
    return on_device(torch.randn(FIELD_VALUES, generator=generator), device)
