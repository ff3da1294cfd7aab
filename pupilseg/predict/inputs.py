"""Resolves paths given by a user: images, videos, folders, glob patterns, cameras."""

from __future__ import annotations

import glob
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import cv2

from pupilseg.errors import DataError
from pupilseg.pictures import opencv_path

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
VIDEO_SUFFIXES = {
    *(".3gp", ".avi", ".flv", ".gif", ".m4v", ".mjpeg", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg"),
    *(".ogv", ".webm", ".wmv"),
}
"""Suffixes of the files that are used from a folder. A file passed by name may have any suffix."""


class Source(NamedTuple):
    """An image, a video or a camera.

    Attributes:
        text: value of the `file` column in pupil.csv.
        key: unique identifier: the resolved path, or "camera:N".
        name: unique path of its overlay and masks, relative to their folders and without a suffix.
        camera: camera number; None for a file.
        is_video: True for a video or a camera, whose frames have timestamps.
    """

    text: str
    key: str
    name: str
    camera: int | None
    is_video: bool

    @property
    def path(self) -> Path:
        """Path of the file."""
        return Path(self.text)


def find_sources(
    paths: Iterable[str], names: dict[str, str] | None = None, without: Path | None = None
) -> tuple[list[Source], list[str]]:
    """Finds the sources that paths refer to, without duplicates.

    Args:
        paths: files, folders (searched recursively), patterns with * ? [ ], or camera numbers.
        names: key -> name of each source of an earlier run; these names are reused.
        without: the output directory. If it is inside a searched folder, its files are ignored
            unless they are passed by name.

    Returns:
        The sources in the order of the paths (numbers in file names are sorted as numbers), and
        one error message for each path without a source.
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
    """Returns the files for a path, each with its relative path, and an error if there are none."""
    path = Path(text)
    if path.is_dir():
        suffixes = IMAGE_SUFFIXES | VIDEO_SUFFIXES
        below = [p for p in path.rglob("*") if p.suffix.lower() in suffixes]
        problem = f"{path} contains no images or videos ({', '.join(sorted(suffixes))})"
        files = [p for p in below if p.is_file() and not p.name.startswith(".")]
        return [(p, p.relative_to(path)) for p in files], problem
    if path.exists():
        return [(path, Path(path.name))], ""
    matches = [Path(match) for match in glob.glob(text, recursive=True)]
    return [(p, Path(p.name)) for p in matches if p.is_file()], f"{path} does not exist"


def _is_video(path: Path) -> bool:
    """Returns True for a video suffix, or an unknown suffix if OpenCV cannot read an image."""
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES or suffix in VIDEO_SUFFIXES:
        return suffix in VIDEO_SUFFIXES
    try:
        return not cv2.haveImageReader(opencv_path(path))
    except DataError:
        return True  # `Video` raises the same error


def _natural(path: Path) -> list[tuple[int, str]]:
    """Returns a sort key that places frame 2 before frame 10."""
    words = re.split(r"(\d+)", str(path))
    return [(int(word), "") if word.isdecimal() else (-1, word) for word in words]


def _free_name(relative: Path, taken: Collection[str]) -> str:
    """Returns the first free name of, for example, `eye`, `eye_jpg`, `eye_jpg_2`, ...

    Args:
        relative: for example `eye.jpg`.
        taken: names in lower case, because some file systems ignore case.
    """
    stem = str(relative.with_suffix("")) if relative.suffix else str(relative)
    full = f"{stem}_{relative.suffix[1:]}"
    name, number = stem, 1
    while name.lower() in taken:
        name = full if number == 1 else f"{full}_{number}"
        number += 1
    return name
