"""Image preprocessing by name, the same for shards, training and prediction.

A preprocessing is a function from a uint8 image to a uint8 image of the same shape. Its name is
written into shard manifests, checkpoints and ONNX files, so that a network always sees the images
that it was trained on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np

from pupilseg.errors import DataError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

GAMMA = 0.8
CLAHE_CLIP_LIMIT = 1.5
CLAHE_TILES = (8, 8)
GAMMA_TABLE = (255.0 * (np.arange(256) / 255.0) ** GAMMA).astype(np.uint8)
"""uint8 (256,): `255 * (i / 255) ** 0.8`, truncated as RITnet's `dataset.py` does, not rounded."""


def keep(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns the image as it is."""
    return image


def gamma_clahe(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns the image after gamma 0.8 and contrast-limited equalisation (clip 1.5, 8 x 8 tiles).

    RITnet (AayushKrChaudhary/RITnet, `dataset.py`) and revision A of `Conner/sddec25-01`.

    Args:
        image: uint8 (H, W).

    Returns:
        uint8 (H, W), a new array.
    """
    # A new object each time: cv2's CLAHE keeps buffers and may not be shared between threads.
    clahe = cv2.createCLAHE(clipLimit=CLAHE_CLIP_LIMIT, tileGridSize=CLAHE_TILES)
    return np.asarray(clahe.apply(cv2.LUT(image, GAMMA_TABLE)), dtype=np.uint8)


NONE = "none"
PREPROCESSINGS: dict[str, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    NONE: keep,
    "gamma0.8+clahe1.5": gamma_clahe,
}


def get_preprocessing(name: str) -> Callable[[NDArray[np.uint8]], NDArray[np.uint8]]:
    """Returns the preprocessing of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in PREPROCESSINGS:
        raise UsageError(
            f"unknown preprocessing {name!r}; choose one of: {', '.join(PREPROCESSINGS)}"
        )
    return PREPROCESSINGS[name]


def remaining_preprocessing(applied: str, wanted: str) -> tuple[str, str]:
    """Says what is left to do to images that a source has already preprocessed.

    Args:
        applied: what the source's images went through.
        wanted: what is asked for.

    Returns:
        (what to apply now, what the images have gone through then). Nothing is applied twice, and
        what a source applied is not undone by asking for "none".

    Raises:
        UsageError: `wanted` is unknown.
        DataError: the source applied something else than what is asked for.
    """
    get_preprocessing(wanted)
    if applied == NONE:
        return wanted, wanted
    if wanted in (NONE, applied):
        return NONE, applied
    raise DataError(
        f"the source's images already went through {applied!r}, so {wanted!r} cannot be had; "
        f"use --preprocessing {applied} or a source of raw images"
    )
