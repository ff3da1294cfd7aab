"""Writes a self-contained HTML page to step through the results of `pupilseg predict`."""

from __future__ import annotations

import contextlib
import csv
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from pupilseg.errors import DataError
from pupilseg.files import write_text
from pupilseg.pages import data_uri, render_page
from pupilseg.pictures import encode, read_image
from pupilseg.predict.journal import COLUMNS, CSV_NAME, overlay_names
from pupilseg.predict.runner import OVERLAYS
from pupilseg.predict.video import pictures_at

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

PAGE_NAME = "view.html"
PICTURE_PX = 640
"""Maximum side length of the images in the page."""
MAX_BYTES = 24_000_000
"""Maximum total size of the images in the page; further images are left out."""
_TEMPLATE = Path(__file__).with_name("view_page.html")


def write_view(directory: Path, *, pictures: int = 400) -> Path:
    """Writes view.html into the output directory of a run.

    Args:
        directory: `out` of `runner.predict_paths`.
        pictures: maximum number of frames shown with an image. Half of them are the frames with
            the lowest confidence; the others are evenly spaced.

    Returns:
        Path of the page.

    Raises:
        DataError: pupil.csv is missing or has another format, or the database is damaged.
        OutputError: the page cannot be written, or a run is writing to the directory.
    """
    directory = Path(directory)
    columns, rows = _read_rows(directory / CSV_NAME)
    files = Counter(row[0] for row in rows)
    confidence, blink = columns.index("confidence"), columns.index("is_blink")
    confidences = [1.0 if row[blink] else row[confidence] for row in rows]
    order = choose_rows(confidences, pictures)
    drawn = dict(_pictures(directory, rows, set(order)))
    kept: dict[int, str] = {}
    total = 0
    for number in order:
        if number in drawn and total + len(drawn[number]) <= MAX_BYTES:
            kept[number] = drawn[number]
            total += len(drawn[number])
    selection = "" if len(kept) == len(rows) else ": low-confidence and evenly spaced ones"
    data = {
        "title": f"{len(rows)} frames, {sum(row[blink] for row in rows)} without a pupil",
        "about": f"{directory.resolve().name}: {len(files)} files; this page contains the images "
        f"of {len(kept)} frames{selection}",
        "why_none": "this page contains no image of this frame (see pupilseg view --pictures N)"
        if kept
        else "no overlays were found next to pupil.csv (run predict without --no-overlays)",
        "columns": columns,
        "rows": rows,
        "sources": files,
        "pictures": kept,
    }
    page = directory / PAGE_NAME
    write_text(page, render_page(_TEMPLATE, data=data))
    return page


def _read_rows(path: Path) -> tuple[list[str], list[list[Any]]]:
    """Returns columns and rows of pupil.csv, with numbers parsed and None for empty cells."""
    hint = "pass the --out of a `pupilseg predict` run"
    whole = ("frame", "area_px", "is_blink")
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as handle:
            reader = csv.reader(handle, strict=True)
            columns = next(reader, [])
            if columns[: len(COLUMNS)] != list(COLUMNS):
                raise DataError(f"{path} does not have the columns of a pupil.csv; {hint}")
            kinds = [int if name in whole else float for name in columns[1:]]
            rows = [
                [
                    cells[0],
                    *(k(c) if c else None for k, c in zip(kinds, cells[1:], strict=True)),
                ]
                for cells in reader
            ]
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; {hint}") from error
    except (OSError, ValueError, IndexError, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({error}); {hint}") from error
    return columns, rows


def choose_rows(confidences: Sequence[float], count: int) -> list[int]:
    """Chooses rows to show with an image, in order of priority, without duplicates.

    Args:
        confidences: one per row.
        count: maximum number of rows.

    Returns:
        Row indices, alternately with the lowest remaining confidence and evenly spaced.
    """
    doubtful = np.argsort(np.asarray(confidences), kind="stable")[:count]
    spread = (
        np.linspace(0, max(0, len(confidences) - 1), min(count, len(confidences)))
        .round()
        .astype(int)
    )
    # Bit-reversed order spreads even the first few of them over all rows.
    spread = spread[np.argsort([int(f"{i:032b}"[::-1], 2) for i in range(len(spread))])]
    turns = [int(n) for pair in zip(doubtful, spread, strict=True) for n in pair]
    return list(dict.fromkeys(turns))[:count]


def _pictures(
    directory: Path, rows: Sequence[Sequence[Any]], wanted: set[int]
) -> Iterator[tuple[int, str]]:
    """Yields (row number, overlay as a data URI) for some rows."""
    numbers: dict[str, dict[int, int]] = {}
    for number in wanted:
        numbers.setdefault(rows[number][0], {})[rows[number][1]] = number
    for file, name in overlay_names(directory).items():
        text = os.fsencode(file).decode("utf-8", "replace")  # decoded as in `_read_rows`
        frames = numbers.get(text, {})
        still = directory / OVERLAYS / f"{name}.jpg"
        video = directory / OVERLAYS / f"{name}.mp4"
        if frames and video.is_file():
            for frame, picture in pictures_at(video, set(frames)):
                yield frames[frame], _encoded(picture)
        elif frames and still.is_file():
            with contextlib.suppress(DataError):
                yield frames[0], _encoded(read_image(still, color=True))


def _encoded(picture: NDArray[np.uint8]) -> str:
    """Returns an image, downscaled to `PICTURE_PX`, as a data URI."""
    scale = PICTURE_PX / max(picture.shape[:2])
    if scale < 1:
        size = tuple(max(1, round(side * scale)) for side in picture.shape[1::-1])
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)  # type: ignore[assignment]
    return data_uri(encode(picture, ".jpg"), "jpeg")
