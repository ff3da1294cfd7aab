"""The interface of an augmentation part."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import numpy as np
import torch

from pupilseg.geometry import HEIGHT, WIDTH

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import Tensor

    from pupilseg.augment.config import AugmentConfig
    from pupilseg.loader.loader import Batch

    Field = NDArray[np.float32]
    Plan = dict[str, Any]
    """Part name -> the NamedTuple that its `draw` returned."""

IMAGE = ("image",)
ALL_COLUMNS = ("image", "label", "spatial_weights", "dist_map", "ellipse")
PIXELS = HEIGHT * WIDTH

Drawn = TypeVar("Drawn", bound="tuple[Tensor, ...]")
Kept = TypeVar("Kept")


class Part(ABC, Generic[Drawn]):
    """One step of the augmentation.

    Attributes:
        name: unique; key of the part's draw in a plan.
        numbers: count of U(0, 1) numbers that `draw` takes per frame.
        columns: the batch columns that the part may change.
        clamp: whether the image may leave [-1, 1] and has to be clamped after the last part.
    """

    name: ClassVar[str]
    numbers: ClassVar[int]
    columns: ClassVar[tuple[str, ...]] = IMAGE
    clamp: ClassVar[bool] = False

    @abstractmethod
    def is_on(self, config: AugmentConfig) -> bool:
        """Returns whether the part can change any frame."""

    def check(self, batch: Batch, config: AugmentConfig) -> None:
        """Raises UsageError if the batch lacks a column that the part needs."""

    @abstractmethod
    def draw(self, numbers: Numbers, batch: Batch, config: AugmentConfig, earlier: Plan) -> Drawn:
        """Returns random parameters: a NamedTuple of tensors (N, ...) on the batch's device.

        Called for every part, on or off, so that turning one off does not change the others. Must
        not read values back from the device.

        Args:
            numbers: the part's random numbers; all of them have to be taken.
            batch: the batch before any part was applied.
            config: strengths.
            earlier: draws of the parts applied before this one.
        """

    def changes(self, drawn: Drawn) -> Tensor:
        """Returns which frames the part changes, bool (N,); by default all."""
        return torch.ones(len(drawn[0]), dtype=torch.bool)

    def constant(self, device: torch.device) -> Tensor | None:
        """Returns a tensor that `on_device` needs in addition to the draw, made once per device."""
        return None

    @abstractmethod
    def on_device(
        self, batch: Batch, drawn: Drawn, config: AugmentConfig, constant: Tensor | None
    ) -> Batch:
        """Returns the changed batch.

        Must compile to one graph, so it cannot read values back to the host. Frames that the part
        does not change are restored by a select.
        """

    @abstractmethod
    def on_host(self, frame: HostFrame, drawn: Any, config: AugmentConfig) -> None:
        """Changes one frame on the CPU.

        Args:
            frame: one for which `changes` is true.
            drawn: the frame's row of the draw: the same names, with a Python number where the
                tensor has one dimension and a NumPy array where it has more.
            config: strengths.
        """


class Numbers:
    """Hands out the random numbers of one part, column by column.

    Args:
        values: (N, count), independent U(0, 1).
    """

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self.taken = 0

    def one(self) -> Tensor:
        """Returns the next column, (N,)."""
        return self.many(1)[:, 0]

    def many(self, count: int) -> Tensor:
        """Returns the next columns, (N, count)."""
        first, self.taken = self.taken, self.taken + count
        return self._values[:, first : self.taken]


class Scratch:
    """Buffers that a thread reuses for every frame.

    Allocating new arrays would cost more in page faults than the computation itself.

    Attributes:
        plane: float32 (400, 640), for use within one call.
    """

    def __init__(self) -> None:
        self.plane = np.empty((HEIGHT, WIDTH), np.float32)
        self._kept: dict[Callable[[], Any], Any] = {}

    def keep(self, make: Callable[[], Kept]) -> Kept:
        """Returns this thread's object from `make`, which is called only the first time."""
        if make not in self._kept:
            self._kept[make] = make()
        kept: Kept = self._kept[make]
        return kept


class HostFrame:
    """One frame of a batch on the CPU while parts change it.

    Args:
        source: column -> array in the batch, never written to.
        out: column -> array in the result.
        scratch: buffers of the calling thread.

    Attributes:
        columns: column -> current values, a view of the batch until a part writes to the column.
        out: column -> array in the result.
        scratch: buffers of the calling thread.
    """

    def __init__(
        self, source: dict[str, NDArray[Any]], out: dict[str, NDArray[Any]], scratch: Scratch
    ) -> None:
        self.columns = source
        self.out = out
        self.scratch = scratch

    def writable(self, column: str) -> NDArray[Any]:
        """Returns a column of the result, to be changed in place; copies it on first use."""
        array = self.out[column]
        if self.columns[column] is not array:
            np.copyto(array, self.columns[column])
            self.columns[column] = array
        return array

    @property
    def image(self) -> Field:
        """The image, float32 (400, 640), for in-place changes."""
        image: Field = self.writable("image")[0]
        return image


def per_frame(values: Tensor, like: Tensor) -> Tensor:
    """Reshapes values (N,) so that they broadcast over the frames of `like`."""
    return values.view(-1, *[1] * (like.ndim - 1))
