"""Batches without shards: drawn ellipses, with targets from `maps` and `geometry`."""

from __future__ import annotations

import numpy as np
import torch

from pupilseg.geometry import HEIGHT, WIDTH, ellipse_vector
from pupilseg.loader.loader import Batch
from pupilseg.maps import distance_maps, spatial_weights
from tests.helpers.fakes import random_image, random_label

BLINK = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)


def batch_of(labels, seed=0):
    """Returns a Batch with random images for labels, uint8 (N, 400, 640)."""
    rng = np.random.default_rng(seed)
    images = np.stack([random_image(rng) for _ in labels])[:, None]
    return Batch(
        image=(torch.from_numpy(images).float() / 255 - 0.5) / 0.5,
        label=torch.from_numpy(np.stack(labels)).long(),
        spatial_weights=torch.from_numpy(np.stack([spatial_weights(x) for x in labels])),
        dist_map=torch.from_numpy(np.stack([distance_maps(x) for x in labels])),
        ellipse=torch.from_numpy(np.stack([ellipse_vector(x) for x in labels])),
        index=torch.arange(len(labels)),
    )


def random_batch(frames, seed=0, *, blink=False):
    """Returns a Batch of random ellipses; with `blink`, the last frame shows no pupil."""
    rng = np.random.default_rng(seed)
    labels = [random_label(rng, blink_share=0) for _ in range(frames)]
    if blink:
        labels[-1] = BLINK
    return batch_of(labels, seed)
