"""Small data sets of drawn ellipses, without files or the renderer."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from pupilseg import maps
from pupilseg.errors import DataError
from pupilseg.geometry import HEIGHT, WIDTH, Ellipse, ellipse_mask
from pupilseg.sources import Sample

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray


def random_image(rng: np.random.Generator) -> NDArray[np.uint8]:
    """Returns a noisy gradient."""
    ramp = np.linspace(0, 155, WIDTH)[None, :]
    noise = rng.integers(0, 100, (HEIGHT, WIDTH))
    return (ramp + noise).astype(np.uint8)


def random_label(rng: np.random.Generator, *, blink_share: float = 0.1) -> NDArray[np.uint8]:
    """Returns an ellipse, possibly cut by the border, or an empty mask."""
    if rng.random() < blink_share:
        return np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    a, b = sorted(rng.uniform(8, 90, 2), reverse=True)
    angle = rng.uniform(-1.5, 1.5)
    return ellipse_mask(Ellipse(rng.uniform(0, WIDTH), rng.uniform(0, HEIGHT), a, b, angle))


@dataclass
class FakeDataset:
    """A `Dataset` of ellipses on noise; each sample depends only on its split and index.

    Attributes:
        train: number of training samples.
        validation: number of validation samples.
        bad: indices whose reading raises DataError.
        bring_weights: index -> value, of samples with their own spatial_weights in {0, value}.
        odd_weights: indices with weights that have no compact encoding.
        odd_maps: indices with distance maps that have no compact encoding.
        kill_at: index at which the process kills itself, unless `kill_flag` exists.
        kill_flag: created before that.
        kill_parent: kill the parent process instead.
    """

    train: int = 6
    validation: int = 3
    source: str = "fake"
    preprocessing: str = "none"
    split_rule: str = "splits of the source"
    bad: frozenset[int] = frozenset()
    bring_weights: dict[int, float] = field(default_factory=dict)
    odd_weights: frozenset[int] = frozenset()
    odd_maps: frozenset[int] = frozenset()
    kill_at: int | None = None
    kill_flag: Path | None = None
    kill_parent: bool = False

    def count(self, split: str) -> int:
        return {"train": self.train, "validation": self.validation}[split]

    def read(self, split: str, start: int, stop: int) -> Iterator[Sample]:
        for index in range(start, stop):
            if index == self.kill_at and self.kill_flag and not self.kill_flag.exists():
                self.kill_flag.touch()
                os.kill(os.getppid() if self.kill_parent else os.getpid(), signal.SIGKILL)
            if index in self.bad:
                raise DataError(f"file {index}.png cannot be decoded")
            yield self.sample(split, index)

    def sample(self, split: str, index: int) -> Sample:
        rng = np.random.default_rng([split == "train", index])
        label, image = random_label(rng), random_image(rng)
        weights = dist_map = ellipse = None
        if index in self.bring_weights:
            weights = (maps.spatial_weights(label) > 0) * np.float32(self.bring_weights[index])
        if index in self.odd_weights:
            weights = rng.random((HEIGHT, WIDTH), dtype=np.float32)
        if index in self.odd_maps:
            dist_map = rng.random((2, HEIGHT, WIDTH), dtype=np.float32)
            ellipse = rng.random(4, dtype=np.float32)
        return Sample(f"{split}/{index}", image, label, weights, dist_map, ellipse)
