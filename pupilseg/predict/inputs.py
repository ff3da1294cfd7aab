"""What a user's paths mean: images, videos, folders and patterns of both, cameras."""

from __future__ import annotations

import glob
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import cv2

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
VIDEO_SUFFIXES = {
    *(".3gp", ".avi", ".flv", ".gif", ".m4v", ".mjpeg", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg"),
    *(".ogv", ".webm", ".wmv"),
}
"""What a folder is searched for; a file that is named may have any suffix."""


class Source(NamedTuple):
    """Something to predict.

    Attributes:
        text: as it stands in pupil.csv.
        key: tells it from all others: the whole path, or the camera.
        name: of its overlay and masks, below their folders, without suffix; no two alike.
        camera: its number; None for a file.
        is_video: many frames, with times; a camera too.
    """

    text: str
    key: str
    name: str
    camera: int | None
    is_video: bool

    @property
    def path(self) -> Path:
        """The file."""
        return Path(self.text)


def find_sources(
    paths: Iterable[str], names: dict[str, str] | None = None, without: Path | None = None
) -> tuple[list[Source], list[str]]:
    """Finds what paths mean, each thing once.

    Args:
        paths: files, folders (searched in depth), patterns with * ? [ ], or numbers of cameras.
        names: key -> name of what was done before, and keeps its name.
        without: a folder whose files count only where they are named: that of the results, which
            may lie in the one that is searched.

    Returns:
        The sources in order, numbers in names sorted as numbers; and a message for each path that
        means nothing.
    """
    found: dict[str, tuple[str, Path, int | None]] = {}
    failed = []
    for text in paths:
        if text.isdecimal() and not Path(text).exists():
            found.setdefault(f"camera:{int(text)}", (text, Path(f"camera{int(text)}"), int(text)))
            continue
        files, problem = _files(text)
        if without is not None and not Path(text).is_file():
            files = [pair for pair in files if without.resolve() not in pair[0].resolve().parents]
        if not files:
            failed.append(problem)
        for file, relative in sorted(files, key=lambda pair: _natural(pair[0])):
            found.setdefault(str(file.resolve()), (str(file), relative, None))
    kept = names or {}
    taken = {name.lower() for name in kept.values()}
    sources = []
    for key, (text, relative, camera) in found.items():
        name = kept[key] if key in kept else _free_name(relative, taken)
        taken.add(name.lower())
        if camera is not None:
            sources.append(Source(key, key, name, camera, is_video=True))
        else:
            sources.append(Source(text, key, name, None, is_video=_is_video(Path(text))))
    return sources, failed


def _files(text: str) -> tuple[list[tuple[Path, Path]], str]:
    """Returns the files that a path means, each with its name below it; and why there is none."""
    path = Path(text)
    if path.is_dir():
        suffixes = IMAGE_SUFFIXES | VIDEO_SUFFIXES
        below = [p for p in path.rglob("*") if p.suffix.lower() in suffixes]
        problem = f"{path} holds no image and no video ({', '.join(sorted(suffixes))})"
        files = [p for p in below if p.is_file() and not p.name.startswith(".")]
        return [(p, p.relative_to(path)) for p in files], problem
    if path.exists():
        return [(path, Path(path.name))], ""
    matches = [Path(match) for match in glob.glob(text, recursive=True)]
    return [(p, Path(p.name)) for p in matches if p.is_file()], f"{path} does not exist"


def _is_video(path: Path) -> bool:
    """Says whether a file is to be opened as a video."""
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES or suffix in VIDEO_SUFFIXES:
        return suffix in VIDEO_SUFFIXES
    return not cv2.haveImageReader(str(path))


def _natural(path: Path) -> list[tuple[int, str]]:
    """Returns a sort key in which frame 2 comes before frame 10."""
    words = re.split(r"(\d+)", str(path))
    return [(int(word), "") if word.isdecimal() else (-1, word) for word in words]


def _free_name(relative: Path, taken: Collection[str]) -> str:
    """Returns a name that nothing has yet: `eye`, else `eye_jpg`, else `eye_jpg_2`.

    Args:
        relative: `eye.jpg`, say.
        taken: names in lower case, since some file systems do not tell cases apart.
    """
    stem = str(relative.with_suffix("")) if relative.suffix else str(relative)
    full = f"{stem}_{relative.suffix[1:]}"
    name, number = stem, 1
    while name.lower() in taken:
        name = full if number == 1 else f"{full}_{number}"
        number += 1
    return name
