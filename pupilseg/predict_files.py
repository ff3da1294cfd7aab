"""Runs a predictor over images and folders: pupil.csv, overlays, masks.

A file that cannot be read is reported and counted, and the others are done. Every frame that was
read has its row, closed eyes too.
"""

from __future__ import annotations

import csv
import glob
import logging
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from pupilseg.errors import DataError
from pupilseg.files import atomic_path
from pupilseg.pictures import overlay, read_image, write_image

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pupilseg.predict import Prediction, Predictor

log = logging.getLogger(__name__)

COLUMNS = (
    "file",
    "frame",
    "time_s",
    "center_x_px",
    "center_y_px",
    "semi_axis_a_px",
    "semi_axis_b_px",
    "angle_rad",
    "diameter_px",
    "area_px",
    "confidence",
    "is_blink",
)
"""Columns of pupil.csv, one row a frame.

Lengths are in the frame's own pixels, pixel centres at integers, angles from +x towards +y, down.
`diameter_px` is 2 * semi_axis_a_px, the axis that a slanted view does not shorten; `area_px` counts
mask pixels. Where no pupil was found (`is_blink` 1) the ellipse's five and the diameter are empty,
area and confidence 0. `time_s` is empty for single images.
"""
CSV_NAME = "pupil.csv"
IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}


class Outcome(NamedTuple):
    """What came of a run.

    Attributes:
        frames: predicted.
        blinks: of them without a pupil.
        failed: messages, one a path that could not be read.
        seconds: taken by all.
    """

    frames: int
    blinks: int
    failed: list[str]
    seconds: float


def predict_paths(
    predictor: Predictor, paths: Sequence[str], out: Path, *, masks: bool = False
) -> Outcome:
    """Predicts images, folders of images and glob patterns, and writes what was found.

    Args:
        predictor: with its model.
        paths: as a user gives them; folders are searched in depth.
        out: gets pupil.csv, overlays/NAME.jpg and, if asked for, masks/NAME.png (0 and 255).
        masks: write the masks.

    Raises:
        OutputError: `out` cannot be written.
    """
    started = time.perf_counter()
    files, failed = find_images(paths)
    for message in failed:
        log.error("%s", message)
    frames = blinks = 0
    out = Path(out)
    with (
        atomic_path(out / CSV_NAME) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as handle,
        logging_redirect_tqdm([logging.getLogger("pupilseg")]),
    ):
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(COLUMNS)
        bar = tqdm(output_names(files), "predict", unit="frame", disable=None, dynamic_ncols=True)
        for file, name in bar:
            try:
                image = read_image(file)
            except DataError as error:
                failed.append(str(error))
                log.error("%s", error)  # noqa: TRY400 - a traceback tells the user nothing
                continue
            prediction = predictor(image)
            frames += 1
            blinks += prediction.ellipse is None
            writer.writerow([str(file), 0, "", *row(prediction)])
            write_image(out / "overlays" / f"{name}.jpg", overlay(image, prediction))
            if masks:
                write_image(out / "masks" / f"{name}.png", prediction.mask * 255)
    return Outcome(frames, blinks, failed, time.perf_counter() - started)


def row(prediction: Prediction) -> list[str]:
    """Returns the columns of pupil.csv from center_x_px on."""
    area = str(int(prediction.mask.sum(dtype=int)))
    if prediction.ellipse is None:
        return [*[""] * 6, area, "0", "1"]
    ellipse = prediction.ellipse
    diameter = 2 * ellipse.semi_axis_a_px
    numbers = [f"{value:.3f}" for value in ellipse[:4]]
    angle, confidence = f"{ellipse.angle_rad:.5f}", f"{prediction.confidence:.4f}"
    return [*numbers, angle, f"{diameter:.3f}", area, confidence, "0"]


def find_images(paths: Iterable[str]) -> tuple[list[tuple[Path, Path]], list[str]]:
    """Finds the image files that paths mean.

    Args:
        paths: files, folders, or patterns with * ? [ ].

    Returns:
        (file, its name below what was given) in order, numbers in names sorted as numbers; and a
        message for each path that means no file.
    """
    found: dict[Path, Path] = {}
    failed = []
    for text in paths:
        path = Path(text)
        if path.is_dir():
            below = [p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES]
            files = [(p, p.relative_to(path)) for p in below if p.is_file()]
            problem = f"{path} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})"
        elif path.exists():
            files, problem = [(path, Path(path.name))], ""
        else:
            matches = [Path(match) for match in glob.glob(text, recursive=True)]
            files = [(p, Path(p.name)) for p in matches if p.is_file()]
            problem = f"{path} does not exist"
        if not files:
            failed.append(problem)
        for file, name in sorted(files, key=lambda pair: _natural(pair[0])):
            found.setdefault(file, name)
    return list(found.items()), failed


def _natural(path: Path) -> list[tuple[int, str]]:
    """Returns a sort key in which frame 2 comes before frame 10."""
    words = re.split(r"(\d+)", str(path))
    return [(int(word), "") if word.isdecimal() else (-1, word) for word in words]


def output_names(files: Iterable[tuple[Path, Path]]) -> list[tuple[Path, str]]:
    """Gives each file a name for its overlay and mask: without suffix, and no two alike.

    Args:
        files: (file, its name below what was given).

    Returns:
        (file, name); `eye.png` and `eye.jpg` become `eye` and `eye_jpg`, a third `eye_jpg_2`.
    """
    taken: set[str] = set()
    names = []
    for file, relative in files:
        stem = str(relative.with_suffix(""))
        full = f"{stem}_{relative.suffix[1:]}"
        name, number = stem, 1
        while name.lower() in taken:  # lower: some file systems do not tell cases apart
            name = full if number == 1 else f"{full}_{number}"
            number += 1
        taken.add(name.lower())
        names.append((file, name))
    return names
