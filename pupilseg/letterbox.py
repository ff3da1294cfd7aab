"""Letterboxes frames of any size into 400 x 640, and maps results back to the frame."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import cv2
import numpy as np

from pupilseg.geometry import HEIGHT, WIDTH, Ellipse, letterbox_box

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Letterbox(NamedTuple):
    """Position of a frame within the network's 400 x 640 image.

    The center of the frame's pixel x lies at `(x + 0.5) * scale_x - 0.5 + left` in the network's
    image.

    Attributes:
        frame_height: rows of the frame.
        frame_width: columns of the frame.
        top: first row of the network's image that shows the frame.
        left: first column of the network's image that shows the frame.
        height: rows of the network's image that show the frame.
        width: columns of the network's image that show the frame.
    """

    frame_height: int
    frame_width: int
    top: int
    left: int
    height: int
    width: int

    @classmethod
    def of(cls, shape: tuple[int, int]) -> Self:
        """Returns the centered letterbox of a frame (height, width), with its aspect ratio kept."""
        return cls(*shape, *letterbox_box(*shape, "letterbox"))

    @property
    def scale_x(self) -> float:
        """Network pixels per frame pixel along x."""
        return self.width / self.frame_width

    @property
    def scale_y(self) -> float:
        """Network pixels per frame pixel along y; differs from `scale_x` by rounding only."""
        return self.height / self.frame_height

    @property
    def is_identity(self) -> bool:
        """Whether the frame has the network's size."""
        return (self.frame_height, self.frame_width) == (HEIGHT, WIDTH)

    @property
    def content(self) -> tuple[slice, slice]:
        """Rows and columns of the network's image that show the frame."""
        return (
            slice(self.top, self.top + self.height),
            slice(self.left, self.left + self.width),
        )

    def fit(self, frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Resizes a frame, uint8 (H, W), to uint8 (400, 640) with black bars, like `sources`."""
        if self.is_identity:
            return frame
        shrinks = self.height * self.width < frame.size
        how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        fitted = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
        fitted[self.content] = cv2.resize(frame, (self.width, self.height), interpolation=how)
        return fitted

    def ellipse_to_frame(self, ellipse: Ellipse) -> Ellipse:
        """Converts an ellipse from network pixels to frame pixels."""
        if self.is_identity:
            return ellipse
        # Dividing by a single scale would not be exact: scale_x and scale_y differ by up to 0.25 %
        # (frames of 40 to 2,200 px), because a letterbox has whole rows and columns.
        cos, sin = math.cos(ellipse.angle_rad), math.sin(ellipse.angle_rad)
        turn = np.array([[cos, -sin], [sin, cos]])
        shrink = np.diag([1 / self.scale_x, 1 / self.scale_y])
        axes = np.diag([ellipse.semi_axis_a_px, ellipse.semi_axis_b_px])
        # The singular values of a matrix M with ellipse = M * unit circle are the semi-axes.
        directions, (a, b), _ = np.linalg.svd(shrink @ turn @ axes)
        angle = math.atan2(directions[1, 0], directions[0, 0])
        if a - b <= 1e-9 * a:
            angle = ellipse.angle_rad  # a circle has no direction, so keep the given angle
        elif angle <= -math.pi / 2:
            angle += math.pi
        elif angle > math.pi / 2:
            angle -= math.pi
        return Ellipse(
            (ellipse.center_x_px - self.left + 0.5) / self.scale_x - 0.5,
            (ellipse.center_y_px - self.top + 0.5) / self.scale_y - 0.5,
            float(a),
            float(b),
            angle,
        )

    def mask_to_frame(
        self, margin: NDArray[np.float32], blob: NDArray[np.uint8]
    ) -> NDArray[np.uint8]:
        """Returns the mask of frame pixels at whose centers the interpolated `margin` is positive.

        Sampled separably in float32, because `cv2.remap` and `cv2.warpAffine` round the weights of
        the interpolation to 5 bits.

        Args:
            margin: float32 (400, 640), positive where the network predicts pupil.
            blob: uint8 (400, 640) of {0, 1}: the part of `margin > 0` to map.

        Returns:
            uint8 (frame_height, frame_width) of {0, 1}.
        """
        if self.is_identity:
            return blob
        # One pixel wider: interpolation may place the edge up to a pixel outside the blob.
        near = cv2.dilate(blob, np.ones((3, 3), dtype=np.uint8))
        rows, y = _window(near.max(axis=1), self.content[0], self.scale_y, self.frame_height)
        columns, x = _window(near.max(axis=0), self.content[1], self.scale_x, self.frame_width)
        inside = margin[self.content]
        sampled = _interpolate(_interpolate(inside, y - self.top).T, x - self.left).T
        nearest = np.ix_(np.rint(y).astype(np.intp), np.rint(x).astype(np.intp))
        mask = np.zeros((self.frame_height, self.frame_width), dtype=np.uint8)
        mask[rows, columns] = (sampled > 0) & (near[nearest] != 0)
        return mask


def _window(
    occupied: NDArray[np.uint8], content: slice, scale: float, size: int
) -> tuple[slice, NDArray[np.float64]]:
    """Finds the frame's pixels that may show occupied network pixels, along one axis.

    Args:
        occupied: uint8 (400,) or (640,), at least one value not zero.
        content: network pixels that show the frame.
        scale: network pixels per frame pixel.
        size: number of the frame's pixels.

    Returns:
        The frame's pixels, and the network coordinates of their centers, clipped to `content`.
    """
    found = np.flatnonzero(occupied)
    first = max(0, math.floor((found[0] - content.start) / scale) - 1)
    last = min(size, math.ceil((found[-1] + 1 - content.start) / scale) + 1)
    position = (np.arange(first, last) + 0.5) * scale - 0.5 + content.start
    return slice(first, last), position.clip(content.start, content.stop - 1)


def _interpolate(values: NDArray[Any], position: NDArray[np.float64]) -> NDArray[Any]:
    """Returns rows of `values` at fractional positions 0 .. rows - 1, interpolated linearly."""
    low = np.floor(position).astype(np.intp)
    high = np.minimum(low + 1, len(values) - 1)
    part = (position - low).astype(np.float32)[:, None]
    mixed: NDArray[Any] = values[low] * (1 - part) + values[high] * part
    return mixed
