"""Options for reading a source."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pupilseg.errors import UsageError

RESIZES = ("letterbox", "stretch")


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """Options for reading a source, recorded in its `source.json`.

    Attributes:
        augmented_train: keep rows named `*_flip`, `*_blur`, `*_lines` in train.
        augmented_validation: keep them in validation.
        resize: "letterbox" keeps the aspect ratio of frames of another size, "stretch" does not.
        validation_fraction: share used for validation if the source has no splits.
        seed: series of rendered eyes, if the source string has no seed.
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
                f"validation_fraction is {self.validation_fraction}, expected more than 0 and "
                "less than 1"
            )
        if self.seed < 0:
            raise UsageError(f"seed is {self.seed}, expected 0 or more")

    def flags(self) -> list[str]:
        """Returns the flags of `pipeline.download` for options that differ from the defaults."""
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
        """Returns the options as plain values, as recorded in `source.json`."""
        return asdict(self)
