"""Rendered eyes as a source: `synthetic:N[@seed]`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pupilseg.errors import DataError, UsageError
from pupilseg.sample import Sample
from pupilseg.sources.frames import PUPIL_OF_FOUR
from pupilseg.sources.spec import Source, SourceType
from pupilseg.sources.splits import check_range, check_split

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pupilseg.sources.options import SourceOptions

_TEXT = re.compile(r"synthetic:(?P<count>\d+)(?:@(?P<seed>\d+))?")


@dataclass(frozen=True, slots=True)
class RenderedDataset:
    """Frames rendered on demand, each of a different person's eye.

    The first `train` indices of the series are the train split, the next `validation` indices the
    validation split.
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


def _parse(text: str) -> Source | None:
    match = _TEXT.fullmatch(text)
    if match is None:
        return None
    count, seed = int(match["count"]), match["seed"]
    if count < 2:
        raise UsageError(f"{text} has fewer than one frame per split; use synthetic:2 or more")
    return Source("synthetic", str(count), seed=None if seed is None else int(seed))


def _inspect(
    source: Source, options: SourceOptions, _previous: dict[str, Any] | None, _raw_dir: Path
) -> dict[str, Any]:
    from pupilseg.synthetic import RENDERER_VERSION

    frames = int(source.location)
    seed = options.seed if source.seed is None else source.seed
    validation = min(frames - 1, max(1, round(frames * options.validation_fraction)))
    return {
        "source": f"synthetic:{frames}@{seed}",
        "renderer_version": RENDERER_VERSION,
        "seed": seed,
        "preprocessing": "none",
        "split_rule": (
            f"by subject: every rendered eye is another person; frames 0..{frames - validation - 1}"
            f" are train, {frames - validation}..{frames - 1} validation"
        ),
        "counts": {"train": frames - validation, "validation": validation},
    }


def _open(record: dict[str, Any], _raw_dir: Path) -> RenderedDataset:
    from pupilseg.synthetic import RENDERER_VERSION

    recorded = record["renderer_version"]
    if recorded != RENDERER_VERSION:
        raise DataError(
            f"{record['source']} was recorded with version {recorded} of the renderer, this is "
            f"version {RENDERER_VERSION}"
        )
    return RenderedDataset(
        source=record["source"],
        split_rule=record["split_rule"],
        seed=record["seed"],
        **record["counts"],
    )


TYPE = SourceType(
    kind="synthetic",
    layout="rendered",
    form="synthetic:N[@seed]",
    description="N rendered eyes",
    parse=_parse,
    matches=lambda _source: True,
    inspect=_inspect,
    open=_open,
)
