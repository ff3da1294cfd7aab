"""OpenEDS folders: frames as PNG, labels of four classes (or two) beside them.

Two layouts: `S_*/N.png` with `N.npy`, a folder a subject, without splits; and
`{train,validation}/{images,labels}/NAME`, labels `.npy` or `.png`.

Whether labels have four classes or two is decided once for the set: two if no label among up to 64,
spread evenly over the set, exceeds 1; else four. It is recorded, and each frame is checked against
it when read, so one frame that disagrees stops the run instead of losing its pupil.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pupilseg.errors import DataError
from pupilseg.sample import SHAPE, SPLITS, Sample
from pupilseg.sources.frames import (
    EYE_CLASSES,
    fit_frame,
    png_size,
    pupil_of,
    read_image,
    read_label,
)
from pupilseg.sources.paths import safe_relative
from pupilseg.sources.splits import (
    SPLIT_FOLDERS,
    check_range,
    check_split,
    missing_split,
    natural_key,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pupilseg.sources.options import SourceOptions

log = logging.getLogger(__name__)

_SUBJECT = re.compile(r"S_\w+")
_LABELS_LOOKED_AT = 64

Frame = tuple[str, str, int, int]
"""Image path, label path (relative, POSIX), and their sizes in bytes."""


@dataclass(frozen=True, slots=True)
class OpenEdsDataset:
    """Frames read from PNG and NPY files when asked for."""

    source: str
    split_rule: str
    root: Path
    frames: dict[str, tuple[Frame, ...]]
    classes: int
    resize: str
    preprocessing: str = "none"

    def count(self, split: str) -> int:
        """Returns the number of samples in a split."""
        return len(self.frames[check_split(split)])

    def read(self, split: str, start: int, stop: int) -> Iterator[Sample]:
        """Yields samples start .. stop - 1 of a split; see `sample.Dataset`."""
        check_range(split, start, stop, self.count(split))
        for image_path, label_path, *_ in self.frames[split][start:stop]:
            image = read_image(self.root / image_path)
            label = pupil_of(read_label(self.root / label_path, image.shape), self.classes)
            if int(label.max()) > 1:
                self._refuse(label_path, int(label.max()))
            image, label = fit_frame(image, label, self.resize)
            name = image_path.removesuffix(".png")
            yield Sample(name, image, label, origin=str(self.root / image_path))

    def _refuse(self, label_path: str, highest: int) -> None:
        """Raises for a label that does not have the number of classes of the set."""
        raise DataError(
            f"{self.root / label_path} has values up to {highest}, expected 0..{self.classes - 1}, "
            f"which is what the set's other labels have; mend or remove this frame"
        )


def is_openeds(root: Path) -> bool:
    """Says whether a folder has one of the two layouts."""
    return bool(_subjects(root)) or any((root / name / "images").is_dir() for name in SPLIT_FOLDERS)


def scan(root: Path, options: SourceOptions) -> dict[str, Any]:
    """Returns what `source.json` records of an OpenEDS folder, having looked at every header.

    Raises:
        DataError: an empty folder, a missing label or split, a file that is no PNG.
    """
    frames, rule = _by_subject(root, options) if _subjects(root) else _by_folder(root)
    every = [frame for split in SPLITS for frame in frames[split]]
    sizes: dict[str, int] = {}
    for image_path, *_ in every:
        height, width = png_size(root / image_path)
        key = f"{height}x{width}"
        sizes[key] = sizes.get(key, 0) + 1
    if set(sizes) != {f"{SHAPE[0]}x{SHAPE[1]}"}:
        log.warning("%s: frames of %s px become 400x640 by %s", root, sizes, options.resize)
    return {
        "source": f"openeds:{root.name}",
        "layout": "openeds",
        "preprocessing": "none",
        "split_rule": rule,
        "counts": {split: len(frames[split]) for split in SPLITS},
        "classes": _count_classes(root, every),
        "sizes": sizes,
        "resize": options.resize,
        "frames": {split: [list(frame) for frame in frames[split]] for split in SPLITS},
    }


def open_openeds(manifest: dict[str, Any], root: Path) -> OpenEdsDataset:
    """Returns the data set that a manifest records.

    Raises:
        DataError: a file is gone or has another size than recorded.
    """
    frames: dict[str, tuple[Frame, ...]] = {}
    for split in SPLITS:
        frames[split] = tuple((str(i), str(k), m, n) for i, k, m, n in manifest["frames"][split])
        for image, label, *sizes in frames[split]:
            for path, size in zip((image, label), sizes, strict=True):
                file = root / safe_relative(path, "source.json")
                if not file.is_file() or file.stat().st_size != size:
                    raise DataError(f"{file} is gone or has changed since the source was recorded")
    return OpenEdsDataset(
        source=manifest["source"],
        split_rule=manifest["split_rule"],
        root=root,
        frames=frames,
        classes=manifest["classes"],
        resize=manifest["resize"],
    )


def _subjects(root: Path) -> list[Path]:
    """Returns the subject folders in natural order."""
    folders = [p for p in root.iterdir() if p.is_dir() and _SUBJECT.fullmatch(p.name)]
    return sorted(folders, key=lambda p: natural_key(p.name))


def _by_subject(root: Path, options: SourceOptions) -> tuple[dict[str, list[Frame]], str]:
    """Returns the frames of both splits, no subject in both unless there is only one."""
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


def _by_folder(root: Path) -> tuple[dict[str, list[Frame]], str]:
    """Returns the frames of both splits from `{train,validation}/{images,labels}`."""
    found: dict[str, list[Frame]] = {}
    for name, split in SPLIT_FOLDERS.items():
        images = root / name / "images"
        if images.is_dir():
            found.setdefault(split, []).extend(_pairs(root, images, root / name / "labels"))
    for split in SPLITS:
        if not found.get(split):
            raise missing_split(root, split, f"{split}/images/*.png", found)
    return {split: found[split] for split in SPLITS}, "splits of the source"


def _pairs(root: Path, images: Path, labels: Path) -> list[Frame]:
    """Returns the frames of a folder in natural order, each with its label."""
    pairs: list[Frame] = []
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
            (
                image.relative_to(root).as_posix(),
                label.relative_to(root).as_posix(),
                image.stat().st_size,
                label.stat().st_size,
            )
        )
    return pairs


def _count_classes(root: Path, frames: list[Frame]) -> int:
    """Returns 4, or 2 where no label among those looked at exceeds 1."""
    step = max(1, len(frames) // _LABELS_LOOKED_AT)
    for image_path, label_path, *_ in frames[::step]:
        label = read_label(root / label_path, png_size(root / image_path))
        if int(label.max()) > 1:
            return EYE_CLASSES
    return 2
