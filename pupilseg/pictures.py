"""Reads and writes image files, and draws outlines on frames, using OpenCV only."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from pupilseg.errors import DataError
from pupilseg.files import atomic_path

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from pupilseg.geometry import Ellipse
    from pupilseg.predict.predictor import Prediction

GREEN, RED = (80, 220, 60), (60, 60, 255)
"""Colors of labels and predictions, in BGR order."""
SUFFIXES = (".png", ".jpg")
"""Suffixes of the formats that `write_image` supports."""
MAX_SIDE_PX = 1280
"""Maximum side length of an overlay; larger frames are downscaled."""
_SHIFT = 4
"""Number of fractional bits of the coordinates passed to OpenCV: 1/16 px."""


def opencv_path(path: str | os.PathLike[str]) -> str:
    """Returns a path as text that can be passed to OpenCV.

    Raises:
        DataError: it is not valid UTF-8, which crashes OpenCV (5.0 with Python 3.11).
    """
    text = os.fspath(path)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"OpenCV cannot open {text!a}, whose name is not valid UTF-8; rename the file or folder"
        ) from error
    return text


def read_image(path: str | os.PathLike[str], *, color: bool = False) -> NDArray[np.uint8]:
    """Reads an image file as uint8: (H, W), or (H, W, 3) in BGR order.

    16-bit images are reduced to 8 bits, and an alpha channel is dropped.

    Raises:
        DataError: the file is missing, unreadable, or not an image.
    """
    try:
        encoded = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    try:
        mode = cv2.IMREAD_COLOR if color else cv2.IMREAD_GRAYSCALE
        image = cv2.imdecode(encoded, mode) if encoded.size else None
    except cv2.error as error:  # more pixels than OpenCV allows
        raise DataError(f"{path} cannot be decoded: {error.err}") from error
    if image is None:
        raise DataError(f"{path} is damaged, or not an image that OpenCV can read")
    return np.asarray(image, dtype=np.uint8)


def to_gray(picture: NDArray[Any]) -> NDArray[np.uint8]:
    """Converts a decoded image, BGR, BGRA or gray, 8 or 16 bits, to uint8 (H, W)."""
    if picture.dtype == np.uint16:
        picture = (picture >> 8).astype(np.uint8)
    if picture.ndim == 3 and picture.shape[2] > 1:
        code = cv2.COLOR_BGRA2GRAY if picture.shape[2] == 4 else cv2.COLOR_BGR2GRAY
        picture = cv2.cvtColor(picture, code)
    return np.asarray(picture, dtype=np.uint8).reshape(picture.shape[:2])


def encode(image: NDArray[np.uint8], suffix: str) -> bytes:
    """Encodes an image, gray or BGR, as the bytes of a ".png" or ".jpg" file."""
    quality = [cv2.IMWRITE_JPEG_QUALITY, 85] if suffix == ".jpg" else []
    done, encoded = cv2.imencode(suffix, image, quality)
    assert done, f"OpenCV cannot encode {image.dtype} {image.shape} as {suffix}"
    return encoded.tobytes()


def write_image(
    path: str | os.PathLike[str], image: NDArray[np.uint8], *, flush: bool = True
) -> None:
    """Writes an image atomically, in the format of its suffix.

    Args:
        path: ends in one of `SUFFIXES`.
        image: uint8 (H, W), or (H, W, 3) in BGR order.
        flush: as in `files.atomic_path`.

    Raises:
        OutputError: the file cannot be written.
    """
    with atomic_path(path, flush=flush) as temporary:
        temporary.write_bytes(encode(image, str(path)[-4:]))


def compare(
    image: NDArray[np.uint8], truth: NDArray[np.generic], found: NDArray[np.generic]
) -> NDArray[np.uint8]:
    """Draws the outlines of two masks on a frame enlarged by a factor of 2.

    Args:
        image: uint8 (H, W).
        truth: label (H, W), non-zero inside; its outline is green.
        found: predicted mask (H, W), non-zero inside; its outline is red, on top.

    Returns:
        uint8 (2 H, 2 W, 3), BGR.
    """
    size = (2 * image.shape[1], 2 * image.shape[0])
    gray = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    canvas = np.asarray(cv2.cvtColor(gray, cv2.COLOR_GRAY2BGR), dtype=np.uint8)
    # The label's outline is wider, so that it stays visible below an identical prediction.
    for mask, color, thickness in ((truth, GREEN, 4), (found, RED, 2)):
        large = cv2.resize((np.asarray(mask) != 0).astype(np.uint8), size, interpolation=0)
        contours, _ = cv2.findContours(large, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(canvas, contours, -1, color, thickness)
    return canvas


def sheet(tiles: Sequence[NDArray[np.uint8]], size_px: tuple[int, int]) -> NDArray[np.uint8]:
    """Combines images into one with two columns.

    Args:
        tiles: uint8 (H, W, 3) each, at least one.
        size_px: (width, height) that each is resized to.
    """
    small = [cv2.resize(tile, size_px, interpolation=cv2.INTER_AREA) for tile in tiles]
    if len(small) % 2:
        small.append(np.full_like(small[0], 255))
    rows = [np.hstack(small[i : i + 2]) for i in range(0, len(small), 2)]
    return np.vstack(rows).astype(np.uint8)


def overlay(frame: NDArray[np.uint8], prediction: Prediction) -> NDArray[np.uint8]:
    """Draws the pupil's outline, center and confidence on a frame, or "no pupil".

    Args:
        frame: uint8 (H, W).
        prediction: for this frame.

    Returns:
        uint8 (h, w, 3) in BGR order, with sides of at most `MAX_SIDE_PX`.
    """
    scale = min(1.0, MAX_SIDE_PX / max(frame.shape))
    if scale < 1:
        size = (max(1, round(frame.shape[1] * scale)), max(1, round(frame.shape[0] * scale)))
        frame = np.asarray(cv2.resize(frame, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
    canvas = np.asarray(cv2.cvtColor(frame, cv2.COLOR_GRAY2BGR), dtype=np.uint8)
    if prediction.ellipse is None:
        caption(canvas, "no pupil")
    else:
        outline_ellipse(canvas, prediction.ellipse, scale)
        caption(canvas, f"{prediction.confidence:.2f}")
    return canvas


def outline_ellipse(canvas: NDArray[np.uint8], ellipse: Ellipse, scale: float) -> None:
    """Draws the outline and center of an ellipse on a resized frame.

    Args:
        canvas: uint8 (H, W, 3) in BGR order; modified.
        ellipse: in pixels of the original frame.
        scale: size of the canvas divided by that of the original frame.
    """

    def fixed(value: float) -> int:
        return round(value * (1 << _SHIFT))

    x = fixed((ellipse.center_x_px + 0.5) * scale - 0.5)
    y = fixed((ellipse.center_y_px + 0.5) * scale - 0.5)
    axes = (fixed(ellipse.semi_axis_a_px * scale), fixed(ellipse.semi_axis_b_px * scale))
    common: dict[str, Any] = {"color": RED, "lineType": cv2.LINE_AA, "shift": _SHIFT}
    cv2.ellipse(canvas, (x, y), axes, float(np.degrees(ellipse.angle_rad)), 0, 360, **common)
    arm = fixed(4)
    cv2.line(canvas, (x - arm, y), (x + arm, y), **common)
    cv2.line(canvas, (x, y - arm), (x, y + arm), **common)


def caption(canvas: NDArray[np.uint8], text: str, row: int = 0) -> None:
    """Draws a line of ASCII text at the upper left, readable on any background."""
    # The outline is drawn as shifted copies: in OpenCV 5, thick strokes widen the letter spacing.
    around = [(dx, dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1) if dx or dy]
    for color, moves in (((0, 0, 0), around), ((255, 255, 255), [(0, 0)])):
        for dx, dy in moves:
            place = (8 + dx, 22 + 26 * row + dy)
            cv2.putText(canvas, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.6, color, 1, cv2.LINE_AA)
