"""OpenEDS folders: frames as PNG files, with labels of four classes (or two).

There are two layouts: `S_*/N.png` with `N.npy`, one folder per subject, without splits; and
`{train,validation}/{images,labels}/NAME`, with labels as `.npy` or `.png`.

The number of classes is determined once for the whole set: two if no value in up to 64 labels,
spread evenly over the set, exceeds 1; otherwise four. The number is recorded, and each label is
checked against it when it is read, so that a contradicting label raises an error instead of losing
its pupil.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pupilseg.errors import DataError
from pupilseg.sample import SHAPE, SPLITS, Sample
from pupilseg.sources.frames import (
    EYE_CLASSES,
    fit_frame,
    png_size,
    pupil_of,
    read_label,
    read_png,
)
from pupilseg.sources.paths import safe_relative
from pupilseg.sources.spec import Source, SourceType
from pupilseg.sources.splits import (
    SPLIT_FOLDERS,
    check_range,
    check_split,
    missing_split,
    natural_key,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pupilseg.sources.options import SourceOptions

log = logging.getLogger(__name__)

_SUBJECT = re.compile(r"S_\w+")
_LABELS_CHECKED = 64


class FrameFiles(NamedTuple):
    """Paths of an image and its label (relative, POSIX), and their sizes in bytes."""

    image: str
    label: str
    image_bytes: int
    label_bytes: int


@dataclass(frozen=True, slots=True)
class OpenEdsDataset:
    """Frames read from PNG and NPY files on demand."""

    source: str
    split_rule: str
    root: Path
    frames: dict[str, tuple[FrameFiles, ...]]
    classes: int
    resize: str
    preprocessing: str = "none"

    def count(self, split: str) -> int:
        """Returns the number of samples in a split."""
        return len(self.frames[check_split(split)])

    def read(self, split: str, start: int, stop: int) -> Iterator[Sample]:
        """Yields samples start .. stop - 1 of a split; see `sample.Dataset`."""
        check_range(split, start, stop, self.count(split))
        for files in self.frames[split][start:stop]:
            image = read_png(self.root / files.image)
            label_path = self.root / files.label
            label = pupil_of(read_label(label_path, image.shape), self.classes)
            if (highest := int(label.max())) > 1:
                raise DataError(
                    f"{label_path} has values up to {highest}, expected 0..{self.classes - 1} as "
                    "in the other labels of the set; fix or remove this frame"
                )
            image, label = fit_frame(image, label, self.resize)
            name = files.image.removesuffix(".png")
            yield Sample(name, image, label, origin=str(self.root / files.image))


def _matches(source: Source) -> bool:
    root = Path(source.location)
    return bool(_subjects(root)) or any((root / name / "images").is_dir() for name in SPLIT_FOLDERS)


def _inspect(
    source: Source, options: SourceOptions, _previous: dict[str, Any] | None, _raw_dir: Path
) -> dict[str, Any]:
    root = Path(source.location)
    frames, rule = _split_by_subject(root, options) if _subjects(root) else _split_by_folder(root)
    every = [files for split in SPLITS for files in frames[split]]
    sizes: dict[str, int] = {}
    for files in every:
        height, width = png_size(root / files.image)
        key = f"{height}x{width}"
        sizes[key] = sizes.get(key, 0) + 1
    if set(sizes) != {f"{SHAPE[0]}x{SHAPE[1]}"}:
        log.warning("%s: frames of %s px are resized to 400x640 (%s)", root, sizes, options.resize)
    return {
        "source": f"openeds:{root.name}",
        "preprocessing": "none",
        "split_rule": rule,
        "counts": {split: len(frames[split]) for split in SPLITS},
        "classes": _count_classes(root, every),
        "sizes": sizes,
        "resize": options.resize,
        "frames": {split: [list(files) for files in frames[split]] for split in SPLITS},
    }


def _open(record: dict[str, Any], _raw_dir: Path) -> OpenEdsDataset:
    root = Path(record["request"]["location"])
    frames: dict[str, tuple[FrameFiles, ...]] = {}
    for split in SPLITS:
        frames[split] = tuple(FrameFiles(*entry) for entry in record["frames"][split])
        for files in frames[split]:
            for path, size in ((files.image, files.image_bytes), (files.label, files.label_bytes)):
                file = root / safe_relative(path, "source.json")
                if not file.is_file() or file.stat().st_size != size:
                    raise DataError(f"{file} is missing or has changed since it was recorded")
    return OpenEdsDataset(
        source=record["source"],
        split_rule=record["split_rule"],
        root=root,
        frames=frames,
        classes=record["classes"],
        resize=record["resize"],
    )


def _subjects(root: Path) -> list[Path]:
    """Returns the subject folders in natural order."""
    folders = [p for p in root.iterdir() if p.is_dir() and _SUBJECT.fullmatch(p.name)]
    return sorted(folders, key=lambda p: natural_key(p.name))


def _split_by_subject(
    root: Path, options: SourceOptions
) -> tuple[dict[str, list[FrameFiles]], str]:
    """Returns the frames of both splits and the split rule.

    No subject is in both splits, unless there is only one. The rule is part of the manifest of
    existing shards, so its wording must not change.
    """
    people = {folder: _pairs(root, folder, folder) for folder in _subjects(root)}
    people = {folder: frames for folder, frames in people.items() if frames}
    if not people:
        raise DataError(f"{root} has no frames; expected S_*/N.png with N.npy beside each")
    fraction = options.validation_fraction
    if len(people) == 1:
        ((folder, frames),) = people.items()
        if len(frames) < 2:
            raise DataError(f"{root} has one frame, expected at least one for each split")
        at = len(frames) - min(len(frames) - 1, max(1, round(len(frames) * fraction)))
        return {"train": frames[:at], "validation": frames[at:]}, (
            f"contiguous blocks of one subject: the first {at} frames of {folder.name} are train, "
            f"the last {len(frames) - at} validation"
        )
    held = min(len(people) - 1, max(1, round(len(people) * fraction)))
    names = [folder.name for folder in people]
    blocks = list(people.values())
    return {
        "train": [frame for block in blocks[:-held] for frame in block],
        "validation": [frame for block in blocks[-held:] for frame in block],
    }, (
        f"by subject: the first {len(names) - held} of {len(names)} in natural order "
        f"({names[0]} .. {names[-held - 1]}) are train, the last {held} "
        f"({names[-held]} .. {names[-1]}) validation"
    )


def _split_by_folder(root: Path) -> tuple[dict[str, list[FrameFiles]], str]:
    """Returns the frames of `{train,validation}/{images,labels}` and the split rule."""
    found: dict[str, list[FrameFiles]] = {}
    for name, split in SPLIT_FOLDERS.items():
        images = root / name / "images"
        if images.is_dir():
            found.setdefault(split, []).extend(_pairs(root, images, root / name / "labels"))
    for split in SPLITS:
        if not found.get(split):
            raise missing_split(root, split, f"{split}/images/*.png", found)
    return {split: found[split] for split in SPLITS}, "splits of the source"


def _pairs(root: Path, images: Path, labels: Path) -> list[FrameFiles]:
    """Returns the images of a folder with their labels, in natural order."""
    pairs: list[FrameFiles] = []
    paths = [p for p in images.iterdir() if p.suffix == ".png" and not p.name.startswith(".")]
    for image in sorted(paths, key=lambda p: natural_key(p.name)):
        choices = [labels / f"{image.stem}.npy"]
        if labels != images:
            choices.append(labels / f"{image.stem}.png")
        label = next((choice for choice in choices if choice.is_file()), None)
        if label is None:
            raise DataError(
                f"{image} has no label; expected {' or '.join(str(choice) for choice in choices)}"
            )
        pairs.append(
            FrameFiles(
                image.relative_to(root).as_posix(),
                label.relative_to(root).as_posix(),
                image.stat().st_size,
                label.stat().st_size,
            )
        )
    return pairs


def _count_classes(root: Path, frames: list[FrameFiles]) -> int:
    """Returns 4, or 2 if none of the checked labels exceeds 1."""
    step = max(1, len(frames) // _LABELS_CHECKED)
    for files in frames[::step]:
        label = read_label(root / files.label, png_size(root / files.image))
        if int(label.max()) > 1:
            return EYE_CLASSES
    return 2


TYPE = SourceType(
    kind="folder",
    layout="openeds",
    form="FOLDER",
    description="OpenEDS: S_*/N.png + N.npy, or {train,validation}/{images,labels}/",
    parse=None,
    matches=_matches,
    inspect=_inspect,
    open=_open,
)
