"""Region of interest: the part of the frame that the network sees."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np

from pupilseg.errors import DataError, UsageError
from pupilseg.predict.postprocess import translated

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pupilseg.predict.predictor import Prediction


class Roi(NamedTuple):
    """A rectangle, in pixels of the frame.

    Attributes:
        x: first column.
        y: first row.
        width: columns.
        height: rows.
    """

    x: int
    y: int
    width: int
    height: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parses "x,y,w,h".

        Raises:
            UsageError: the text has another form, or the rectangle is empty.
        """
        try:
            roi = cls(*(int(word) for word in text.split(",")))
        except (TypeError, ValueError):
            roi = None
        if roi is None or min(roi.x, roi.y) < 0 or min(roi.width, roi.height) < 1:
            raise UsageError(
                f"--roi is {text!r}, expected x,y,w,h in pixels of the frame: first column, first "
                "row, width, height; for example --roi 100,50,320,200"
            )
        return roi

    def cut(self, frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Returns the region of a frame, uint8 (H, W), as a view.

        Raises:
            DataError: the region extends beyond the frame.
        """
        height, width = frame.shape
        if self.x + self.width > width or self.y + self.height > height:
            raise DataError(
                f"--roi {','.join(map(str, self))} extends beyond the frame, which is {width} "
                f"wide and {height} high; choose x + w <= {width} and y + h <= {height}"
            )
        return frame[self.y : self.y + self.height, self.x : self.x + self.width]

    def to_frame(self, found: Prediction, shape: tuple[int, int]) -> Prediction:
        """Converts a prediction for the region to pixels of a frame of shape (height, width)."""
        mask = np.zeros(shape, dtype=np.uint8)
        mask[self.y : self.y + self.height, self.x : self.x + self.width] = found.mask
        ellipse = None if found.ellipse is None else translated(found.ellipse, self.x, self.y)
        return found._replace(mask=mask, ellipse=ellipse)
