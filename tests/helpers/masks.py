"""Pupil labels of every shape, for property tests."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from pupilseg.geometry import HEIGHT, WIDTH, Ellipse, ellipse_mask


def blobs(seed):
    """Returns a label with 0 to 4 ellipses at random positions, possibly across the border."""
    rng = np.random.default_rng(seed)
    label = np.zeros((HEIGHT, WIDTH), np.uint8)
    for _ in range(rng.integers(0, 5)):
        x, y = rng.uniform((-20, -20), (WIDTH + 20, HEIGHT + 20))
        a, b = rng.uniform(1, 150, 2)
        label |= ellipse_mask(Ellipse(x, y, a, b, rng.uniform(-1.5, 1.5)))
    return label


def noise(seed, share):
    return (np.random.default_rng(seed).random((HEIGHT, WIDTH)) < share).astype(np.uint8)


def pixels(*places):
    label = np.zeros((HEIGHT, WIDTH), np.uint8)
    for place in places:
        label[place] = 1
    return label


CORNERS = [pixels((0, 0)), pixels((399, 639)), pixels((0, 639)), pixels((399, 0))]
EDGES = [pixels(np.s_[0, :]), pixels(np.s_[:, 639]), pixels(np.s_[:, :320]), 1 - CORNERS[0]]
EMPTY, FULL = np.zeros((HEIGHT, WIDTH), np.uint8), np.ones((HEIGHT, WIDTH), np.uint8)
# A low share is included: the distance to a single remote pixel is the hardest for float32.
labels = st.integers(0, 2**32 - 1).map(blobs) | st.builds(
    noise, st.integers(0, 2**32 - 1), st.sampled_from([0.00001, 0.01, 0.5, 0.9999])
)
