"""Tone curve: gamma, gain and offset."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2

from pupilseg.augment.part import Part, per_frame

if TYPE_CHECKING:
    from torch import Tensor

    from pupilseg.augment.config import AugmentConfig
    from pupilseg.augment.part import HostFrame, Numbers, Plan
    from pupilseg.loader.loader import Batch

LIFT = 1 + 1e-6
"""Added before the logarithm, because resampling and blur can produce -1 - 1e-7 on black."""


class ToneDraw(NamedTuple):
    """Random parameters of the tone curve, float32.

    Attributes:
        gamma: (N,), exponent.
        gain: (N,), factor.
        offset: (N,), added, in units of [-1, 1].
    """

    gamma: Tensor
    gain: Tensor
    offset: Tensor


class Tone(Part[ToneDraw]):
    """Applies `2 gain ((image + 1) / 2)^gamma + offset - 1`."""

    name = "tone"
    numbers = 3
    clamp = True

    def is_on(self, config: AugmentConfig) -> bool:
        return bool(config.gamma or config.gain or config.offset)

    def draw(
        self, numbers: Numbers, batch: Batch, config: AugmentConfig, earlier: Plan
    ) -> ToneDraw:
        return ToneDraw(
            gamma=((2 * numbers.one() - 1) * config.gamma).exp(),
            gain=((2 * numbers.one() - 1) * config.gain).exp(),
            offset=(2 * numbers.one() - 1) * config.offset,
        )

    def on_device(
        self, batch: Batch, drawn: ToneDraw, config: AugmentConfig, constant: Tensor | None
    ) -> Batch:
        image = batch.image
        gamma, gain, offset = (per_frame(values, image) for values in drawn)
        if not config.gamma:
            return replace(batch, image=image * gain + (gain + offset - 1))
        log_factor = (2 * gain).log() - gamma * math.log(2)
        power = ((image + LIFT).log() * gamma + log_factor).exp()
        return replace(batch, image=power + (offset - 1))

    def on_host(self, frame: HostFrame, drawn: Any, config: AugmentConfig) -> None:
        image, gamma, gain, offset = frame.image, drawn.gamma, drawn.gain, drawn.offset
        if config.gamma:
            image += LIFT
            cv2.log(image, dst=image)
            image *= gamma
            image += math.log(2 * gain) - gamma * math.log(2)
            cv2.exp(image, dst=image)
            image += offset - 1
        else:
            image *= gain
            image += gain + offset - 1
