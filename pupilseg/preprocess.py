"""Image preprocessing by name, the same for shards, training and prediction.

A preprocessing is a function from a uint8 image to a uint8 image of the same shape. Its name is
written to shard manifests, checkpoints and ONNX files, so that a network always gets images that
are preprocessed as in training.
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
"""uint8 (256,): `255 * (i / 255) ** 0.8`, truncated as in RITnet's `dataset.py`, not rounded."""


def keep(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns the image unchanged."""
    return image


def gamma_clahe(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns the image after gamma 0.8 and contrast-limited equalization (clip 1.5, 8 x 8 tiles).

    As in RITnet (AayushKrChaudhary/RITnet, `dataset.py`) and revision A of `Conner/sddec25-01`.

    Args:
        image: uint8 (H, W).

    Returns:
        uint8 (H, W), a new array.
    """
    # A new object per call, because OpenCV's CLAHE keeps buffers that threads must not share.
    clahe = cv2.createCLAHE(clipLimit=CLAHE_CLIP_LIMIT, tileGridSize=CLAHE_TILES)
    return np.asarray(clahe.apply(cv2.LUT(image, GAMMA_TABLE)), dtype=np.uint8)


NONE = "none"
PREPROCESSINGS: dict[str, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    NONE: keep,
    "gamma0.8+clahe1.5": gamma_clahe,
}


def get_preprocessing(name: str) -> Callable[[NDArray[np.uint8]], NDArray[np.uint8]]:
    """Returns a preprocessing by name.

    Raises:
        UsageError: the name is unknown.
    """
    if name not in PREPROCESSINGS:
        raise UsageError(
            f"unknown preprocessing {name!r}; choose one of: {', '.join(PREPROCESSINGS)}"
        )
    return PREPROCESSINGS[name]


def remaining_preprocessing(applied: str, wanted: str) -> tuple[str, str]:
    """Returns the preprocessing that is still to be applied to a source's images.

    Args:
        applied: preprocessing that the source applied.
        wanted: requested preprocessing.

    Returns:
        (preprocessing to apply, total preprocessing of the result). Nothing is applied twice, and
        requesting "none" does not undo the source's preprocessing.

    Raises:
        UsageError: `wanted` is unknown.
        DataError: the source applied another preprocessing than the requested one.
    """
    get_preprocessing(wanted)
    if applied == NONE:
        return wanted, wanted
    if wanted in (NONE, applied):
        return NONE, applied
    raise DataError(
        f"the source's images are already preprocessed with {applied!r}, expected {wanted!r} or "
        f"none; use --preprocessing {applied} or a source of raw images"
    )
