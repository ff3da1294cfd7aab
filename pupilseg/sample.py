"""`Sample` and the `Dataset` protocol: the interface between sources and shards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pupilseg.errors import DataError
from pupilseg.geometry import HEIGHT, NUM_CLASSES, WIDTH
from pupilseg.maps import check_label

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

SPLITS = ("train", "validation")
SHAPE = (HEIGHT, WIDTH)


@dataclass(frozen=True, slots=True)
class Sample:
    """One frame with its label, and the training targets that its source provides.

    The arrays may be read-only views of the source's buffers.

    Attributes:
        name: name in the source, unique within a split.
        image: uint8 (400, 640).
        label: uint8 (400, 640) of {0, 1}.
        spatial_weights: float32 (400, 640), finite; None if the source has none.
        dist_map: float32 (2, 400, 640), finite; None if the source has none.
        ellipse: float32 (4,), normalized cx, cy, rx, ry (`geometry`); None if the source has none.
        origin: file and row, for messages; empty if the name is enough.
    """

    name: str
    image: NDArray[np.uint8]
    label: NDArray[np.uint8]
    spatial_weights: NDArray[np.float32] | None = None
    dist_map: NDArray[np.float32] | None = None
    ellipse: NDArray[np.float32] | None = None
    origin: str = ""


class Dataset(Protocol):
    """Samples of each split in a fixed order, read by range; must be picklable.

    Attributes:
        source: identity, such as "owner/name@<40-hex commit>" or "synthetic:800@0".
        preprocessing: preprocessing that the source applied: "none" or "gamma0.8+clahe1.5".
        split_rule: origin of the splits, in one sentence.
    """

    @property
    def source(self) -> str: ...  # noqa: D102

    @property
    def preprocessing(self) -> str: ...  # noqa: D102

    @property
    def split_rule(self) -> str: ...  # noqa: D102

    def count(self, split: str) -> int:
        """Returns the number of samples in "train" or "validation"."""
        ...

    def read(self, split: str, start: int, stop: int) -> Iterator[Sample]:
        """Yields the samples start .. stop - 1 of a split, in order.

        Their values are not checked; call `check_sample` for that.

        Raises:
            DataError: a sample cannot be read; the message names file, row and column.
            IndexError: the range is not within 0 .. count.
        """
        ...


def check_sample(sample: Sample) -> Sample:
    """Returns the sample after checking its name, shapes, dtypes and values.

    Raises:
        DataError: the message names origin, column, value and expectation.
    """
    where = f"{sample.origin}: " if sample.origin else ""
    if not isinstance(sample.name, str) or not sample.name:
        raise DataError(f"{where}the name is {sample.name!r}, expected a string that is not empty")
    _check_array(sample.image, "image", SHAPE, np.uint8, where)
    _check_array(sample.label, "label", SHAPE, np.uint8, where)
    try:
        check_label(sample.label)
    except ValueError as error:
        raise DataError(f"{where}column {error} (0 background, 1 pupil)") from error
    for name, shape in (
        ("spatial_weights", SHAPE),
        ("dist_map", (NUM_CLASSES, *SHAPE)),
        ("ellipse", (4,)),
    ):
        values = getattr(sample, name)
        if values is None:
            continue
        _check_array(values, name, shape, np.float32, where)
        # The float64 sum of finite float32 values is finite; unlike `isfinite`, it allocates no
        # array.
        with np.errstate(invalid="ignore"):  # infinity minus infinity
            total = values.sum(dtype=np.float64)
        if not np.isfinite(total):
            raise DataError(f"{where}column {name} holds NaN or infinity, expected finite values")
    return sample


def _check_array(
    array: NDArray[Any], name: str, shape: tuple[int, ...], dtype: type, where: str
) -> None:
    if array.shape != shape or array.dtype != dtype:
        raise DataError(
            f"{where}column {name} is {array.dtype} {array.shape}, "
            f"expected {np.dtype(dtype)} {shape}"
        )
