"""Rendered eyes as a source: `synthetic:N[@seed]`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pupilseg.errors import DataError
from pupilseg.sample import Sample
from pupilseg.sources.frames import PUPIL_OF_FOUR
from pupilseg.sources.splits import check_range, check_split

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pupilseg.sources.options import SourceOptions
    from pupilseg.sources.spec import Source


@dataclass(frozen=True, slots=True)
class RenderedDataset:
    """Frames that are rendered when they are read; each is another person's eye.

    The first `train` indices of the series are train, the next `validation` are validation.
    """

    source: str
    split_rule: str
    seed: int
    train: int
    validation: int
    preprocessing: str = "none"

    def count(self, split: str) -> int:
        """Returns the number of samples in a split."""
        return self.train if check_split(split) == "train" else self.validation

    def read(self, split: str, start: int, stop: int) -> Iterator[Sample]:
        """Yields samples start .. stop - 1 of a split; see `sample.Dataset`."""
        from pupilseg.synthetic import render

        check_range(split, start, stop, self.count(split))
        first = 0 if split == "train" else self.train
        for index in range(first + start, first + stop):
            frame = render(index, self.seed)
            label = (frame.classes == PUPIL_OF_FOUR).astype("uint8")
            name = f"synthetic-{self.seed}-{index:06d}"
            yield Sample(name, frame.image, label)


def scan(source: Source, options: SourceOptions) -> dict[str, Any]:
    """Returns what `source.json` records of a rendered source."""
    from pupilseg.synthetic import RENDERER_VERSION

    frames = int(source.location)
    seed = options.seed if source.seed is None else source.seed
    validation = min(frames - 1, max(1, round(frames * options.validation_fraction)))
    return {
        "source": f"synthetic:{frames}@{seed}",
        "layout": "rendered",
        "renderer_version": RENDERER_VERSION,
        "seed": seed,
        "preprocessing": "none",
        "split_rule": (
            f"by subject: every rendered eye is another person; frames 0..{frames - validation - 1}"
            f" are train, {frames - validation}..{frames - 1} validation"
        ),
        "counts": {"train": frames - validation, "validation": validation},
    }


def open_rendered(manifest: dict[str, Any]) -> RenderedDataset:
    """Returns the data set that a manifest records.

    Raises:
        DataError: another version of the renderer made it.
    """
    from pupilseg.synthetic import RENDERER_VERSION

    recorded = manifest["renderer_version"]
    if recorded != RENDERER_VERSION:
        raise DataError(
            f"{manifest['source']} was put in place for version {recorded} of the renderer, this is"
            f" version {RENDERER_VERSION}"
        )
    return RenderedDataset(
        source=manifest["source"],
        split_rule=manifest["split_rule"],
        seed=manifest["seed"],
        **manifest["counts"],
    )
