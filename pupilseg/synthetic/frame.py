"""The frame under construction."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pupilseg.synthetic.anatomy import Eye
    from pupilseg.synthetic.fields import Field


class Frame(NamedTuple):
    """An eye, its image and its labels.

    An effect is a function of a random generator and a frame. It changes the image in place and
    returns the names of the traits that it added, if any. Labels never change.

    Attributes:
        eye: pose, lids and gray levels.
        image: float32 (400, 640), gray levels, changed in place.
        classes: uint8 (400, 640) of {0, 1, 2, 3}, final.
        on_eye: float32 (400, 640), share of each pixel covered by the eyeball.
    """

    eye: Eye
    image: Field
    classes: NDArray[np.uint8]
    on_eye: Field
