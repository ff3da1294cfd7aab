"""Augmentation on the device, on whole batches, with every target kept consistent.

A horizontal flip moves every target with the image; photometric changes touch the image alone.
Random numbers come from a generator of their own, so a run is a function of its seed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from pupilseg.loader import Batch


@dataclass(frozen=True, slots=True)
class AugmentConfig:
    """How strongly to augment; 0 switches a part off.

    Attributes:
        flip: probability of a horizontal flip.
        gain: the image is scaled about black by exp(U(-gain, gain)).
        offset: added brightness, U(-offset, offset), in units of the [-1, 1] range.
        gamma: exponent exp(U(-gamma, gamma)) on the [0, 1] image.
        noise: standard deviation, up to U(0, noise), of Gaussian noise in the [-1, 1] range.
    """

    flip: float = 0.5
    gain: float = 0.3
    offset: float = 0.1
    gamma: float = 0.2
    noise: float = 0.05


def augment(batch: Batch, config: AugmentConfig, generator: torch.Generator) -> Batch:
    """Returns an augmented copy of a batch; the original's buffers are not written to.

    Args:
        batch: on any device.
        config: strengths.
        generator: on the batch's device.
    """
    batch = _flip(batch, config.flip, generator)
    return replace(batch, image=_photometric(batch.image, config, generator))


def _uniform(image: Tensor, bound: float, generator: torch.Generator) -> Tensor:
    """Draws U(-bound, bound) a frame, as (N, 1, 1, 1)."""
    draw = torch.rand((len(image), 1, 1, 1), generator=generator, device=image.device)
    return (2 * draw - 1) * bound


def _flip(batch: Batch, probability: float, generator: torch.Generator) -> Batch:
    """Mirrors left and right in a random part of the frames."""
    n, device = len(batch.image), batch.image.device
    flip = torch.rand(n, generator=generator, device=device) < probability

    def mirror(x: Tensor) -> Tensor:
        if x.numel() == 0:  # a column that the loader was not asked for
            return x
        return torch.where(flip.view(-1, *[1] * (x.ndim - 1)), x.flip(-1), x)

    width = batch.image.shape[-1]
    has_pupil = batch.ellipse[:, 2] > 0
    # Pixel centres are integers, so the mirror of cx px is width - 1 - cx px.
    mirrored = (width - 1) / width - batch.ellipse[:, 0]
    center_x = torch.where(flip & has_pupil, mirrored, batch.ellipse[:, 0])
    return replace(
        batch,
        image=mirror(batch.image),
        label=mirror(batch.label),
        spatial_weights=mirror(batch.spatial_weights),
        dist_map=mirror(batch.dist_map),
        ellipse=torch.cat([center_x[:, None], batch.ellipse[:, 1:]], dim=1),
    )


def _photometric(image: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Changes gamma, gain, offset and adds noise; values stay in [-1, 1]."""
    if config.gamma:
        level = (image + 1) / 2
        image = level.pow(_uniform(image, config.gamma, generator).exp()) * 2 - 1
    if config.gain or config.offset:
        gain = _uniform(image, config.gain, generator).exp()
        image = (image + 1) * gain - 1 + _uniform(image, config.offset, generator)
    if config.noise:
        sigma = _uniform(image, config.noise, generator).abs()
        noise = torch.randn(image.shape, generator=generator, device=image.device)
        image = torch.addcmul(image, noise, sigma)
    return image.clamp(-1, 1)
