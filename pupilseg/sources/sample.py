"""A sample, the options of a source, and the checks that every sample passes on its way in."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pupilseg.errors import DataError, UsageError
from pupilseg.geometry import HEIGHT, NUM_CLASSES, WIDTH

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

SPLITS = ("train", "validation")
SHAPE = (HEIGHT, WIDTH)
EYE_CLASSES = 4
PUPIL_OF_FOUR = 3
"""The pupil among 0 background, 1 sclera, 2 iris, 3 pupil (OpenEDS)."""
RESIZES = ("letterbox", "stretch")


@dataclass(frozen=True, slots=True)
class Sample:
    """One frame with its label, and the targets that the source itself brings.

    The arrays may be read-only views of the source's buffers.

    Attributes:
        name: as the source calls it, unique within a split.
        image: uint8 (400, 640).
        label: uint8 (400, 640) of {0, 1}.
        spatial_weights: float32 (400, 640), finite; None where the source has none.
        dist_map: float32 (2, 400, 640), finite; None where the source has none.
        ellipse: float32 (4,) normalised cx, cy, rx, ry (`geometry`); None where it has none.
    """

    name: str
    image: NDArray[np.uint8]
    label: NDArray[np.uint8]
    spatial_weights: NDArray[np.float32] | None = None
    dist_map: NDArray[np.float32] | None = None
    ellipse: NDArray[np.float32] | None = None


class Dataset(Protocol):
    """Samples in a fixed order, by split; picklable, and read by range.

    Attributes:
        source: identity, such as "owner/name@<40-hex commit>" or "synthetic:800@0".
        preprocessing: what the source already did to the images: "none" or "gamma0.8+clahe1.5".
        split_rule: one sentence: where the splits come from.
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

        Raises:
            DataError: a sample is not what it must be; file, row and column are named.
            IndexError: the range leaves 0 .. count.
        """
        ...


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """How a source is read; recorded with it.

    Attributes:
        augmented_train: keep rows named `*_flip`, `*_blur`, `*_lines` in train.
        augmented_validation: keep them in validation.
        resize: "letterbox" keeps the aspect of frames of another size, "stretch" does not.
        validation_fraction: share that becomes validation where the source has no splits.
        seed: series of rendered eyes where the source names none.
    """

    augmented_train: bool = True
    augmented_validation: bool = False
    resize: str = "letterbox"
    validation_fraction: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.resize not in RESIZES:
            raise UsageError(f"unknown resize {self.resize!r}; choose one of: {', '.join(RESIZES)}")
        if not 0 < self.validation_fraction < 1:
            raise UsageError(
                f"validation_fraction is {self.validation_fraction}, expected more than 0, "
                "less than 1"
            )
        if self.seed < 0:
            raise UsageError(f"seed is {self.seed}, expected 0 or more")

    def flags(self) -> list[str]:
        """Returns the words of `pipeline.download` that set what differs from the defaults."""
        words: list[str] = []
        for key, default in SourceOptions().as_dict().items():
            value, name = getattr(self, key), key.replace("_", "-")
            if value == default:
                continue
            if isinstance(default, bool):
                words.append(f"--{name}" if value else f"--no-{name}")
            else:
                words += [f"--{name}", str(value)]
        return words

    def as_dict(self) -> dict[str, Any]:
        """Returns the options as plain values, as `source.json` records them."""
        return asdict(self)


def check_range(split: str, start: int, stop: int, count: int) -> None:
    """Raises IndexError unless 0 <= start <= stop <= count."""
    if not 0 <= start <= stop <= count:
        raise IndexError(f"samples {start}..{stop} of {split}, which has {count}")


def check_split(split: str) -> str:
    """Returns the split's name.

    Raises:
        UsageError: it is neither "train" nor "validation".
    """
    if split not in SPLITS:
        raise UsageError(f"unknown split {split!r}; choose one of: {', '.join(SPLITS)}")
    return split


def check_sample(sample: Sample, where: str) -> Sample:
    """Returns the sample if its values are what they must be.

    Args:
        sample: shapes and dtypes are checked too, so that a fault of a source is found here.
        where: file and row, for the message.

    Raises:
        DataError: naming place, column, value and expectation.
    """
    _check_array(sample.image, "image", SHAPE, np.uint8, where)
    _check_array(sample.label, "label", SHAPE, np.uint8, where)
    highest = int(sample.label.max())
    if highest >= NUM_CLASSES:
        raise DataError(
            f"{where}: column label has values up to {highest}, expected 0 background and 1 pupil"
        )
    for name, shape in (
        ("spatial_weights", SHAPE),
        ("dist_map", (NUM_CLASSES, *SHAPE)),
        ("ellipse", (4,)),
    ):
        values = getattr(sample, name)
        if values is None:
            continue
        _check_array(values, name, shape, np.float32, where)
        # The sum of finite float32 in float64 is finite, and needs no array of booleans.
        if not np.isfinite(values.sum(dtype=np.float64)):
            raise DataError(f"{where}: column {name} holds NaN or infinity, expected finite values")
    return sample


def _check_array(
    array: NDArray[Any], name: str, shape: tuple[int, ...], dtype: type, where: str
) -> None:
    """Raises DataError unless shape and dtype are as expected."""
    if array.shape != shape or array.dtype != dtype:
        raise DataError(
            f"{where}: column {name} is {array.dtype} {array.shape}, "
            f"expected {np.dtype(dtype)} {shape}"
        )


def safe_relative(path: str, where: str) -> PurePosixPath:
    """Returns a path that a data set names, if joining it cannot leave the data set's folder.

    Raises:
        DataError: it is absolute, climbs with `..`, or holds a backslash or control character.
    """
    parts = path.split("/")
    if (
        not path
        or path.startswith("/")
        or any(part in ("", ".", "..") for part in parts)
        or "\\" in path
        or not path.isprintable()
        or ":" in parts[0]
    ):
        raise DataError(f"{where} names the file {path!r}, which is not a path inside it; refused")
    return PurePosixPath(path)
