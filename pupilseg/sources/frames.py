"""Reads a frame and its label from files, checks them, and resizes them to 400 x 640."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import cv2
import numpy as np

from pupilseg.errors import DataError
from pupilseg.geometry import letterbox_box
from pupilseg.sample import SHAPE

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

EYE_CLASSES = 4
PUPIL_OF_FOUR = 3
"""Pupil class of OpenEDS labels: 0 background, 1 sclera, 2 iris, 3 pupil."""
_PNG_HEADER = 24
_MAX_SIDE = 8192
"""Longest side that is decoded; a larger one indicates a damaged or malicious header."""


def read_png(path: Path) -> NDArray[np.uint8]:
    """Returns a PNG as uint8 (H, W). A color image is accepted if all its channels are equal.

    Raises:
        DataError: the file is missing, damaged or not a PNG, or does not have 8 bits per channel.
    """
    png_size(path)
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if image is None:
        raise DataError(f"{path} is not a readable PNG (damaged or truncated); download it again")
    if image.dtype != np.uint8:
        raise DataError(f"{path} has {image.dtype} pixels, expected 8 bits (uint8)")
    if image.ndim == 3:
        color = image[..., :3]
        if not (color == color[..., :1]).all():
            raise DataError(f"{path} is a color image, expected one channel (near infrared)")
        image = np.ascontiguousarray(color[..., 0])
    return np.asarray(image, dtype=np.uint8)


def png_size(path: Path) -> tuple[int, int]:
    """Returns (height, width) from a PNG's header, without decoding it.

    Raises:
        DataError: the file is missing, not a PNG, or its header has an absurd size.
    """
    try:
        with path.open("rb") as file:
            header = file.read(_PNG_HEADER)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; download it again") from error
    if len(header) < _PNG_HEADER or not header.startswith(b"\x89PNG\r\n\x1a\n"):
        raise DataError(f"{path} is not a PNG file; download it again")
    width, height = struct.unpack(">II", header[16:24])
    if not (0 < width <= _MAX_SIDE and 0 < height <= _MAX_SIDE):
        raise DataError(f"{path} claims {height} x {width} px, expected at most {_MAX_SIDE}")
    return height, width


def read_label(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Returns a label of classes 0..3 as uint8.

    Args:
        path: a PNG or NPY file.
        shape: shape of its image.

    Raises:
        DataError: the file is missing or unreadable, or has another shape, dtype or other values.
    """
    if path.suffix == ".npy":
        try:
            label = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"cannot read label {path}: {error}; download it again") from error
        if not isinstance(label, np.ndarray) or label.dtype.kind not in "bui":
            raise DataError(f"{path} holds {getattr(label, 'dtype', 'an archive')}, expected uint8")
    else:
        label = read_png(path)
    if label.shape != shape:
        raise DataError(f"{path} has shape {label.shape}, but its image has {shape}")
    lowest, highest = int(label.min()), int(label.max())
    if lowest < 0 or highest >= EYE_CLASSES:
        raise DataError(
            f"{path} has values {lowest}..{highest}, expected classes 0 background, 1 sclera, "
            "2 iris, 3 pupil (or 0 background, 1 pupil)"
        )
    return np.asarray(label, dtype=np.uint8)


def pupil_of(label: NDArray[np.uint8], classes: int) -> NDArray[np.uint8]:
    """Returns the pupil of a label as {0, 1}; a label of two classes is returned unchanged."""
    if classes == EYE_CLASSES:
        return (label == PUPIL_OF_FOUR).astype(np.uint8)
    return label


def fit_frame(
    image: NDArray[np.uint8], label: NDArray[np.uint8], mode: str
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Returns image and label resized to 400 x 640, with the same geometry.

    Images are averaged to shrink (INTER_AREA) and interpolated to grow. A label pixel takes the
    class of the nearest pixel, sampled at pixel centers like the image. Letterbox bars are 0.
    Arrays that already have the right size are returned unchanged.

    Args:
        image: uint8 (H, W).
        label: uint8 (H, W).
        mode: "letterbox" or "stretch".
    """
    if image.shape == SHAPE:
        return image, label
    top, left, height, width = letterbox_box(image.shape[0], image.shape[1], mode)
    shrinks = height * width < image.shape[0] * image.shape[1]
    smooth = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR

    def fit(frame: NDArray[np.uint8], interpolation: int) -> NDArray[np.uint8]:
        fitted = np.zeros(SHAPE, np.uint8)
        resized = cv2.resize(frame, (width, height), interpolation=interpolation)
        fitted[top : top + height, left : left + width] = resized
        return fitted

    return fit(image, smooth), fit(label, cv2.INTER_NEAREST_EXACT)
