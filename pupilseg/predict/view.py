"""One page to step through what a run of `predict` found; it needs no other file and no network."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from pupilseg.errors import DataError
from pupilseg.files import write_text
from pupilseg.pages import data_uri, render_page
from pupilseg.pictures import encode
from pupilseg.predict.journal import COLUMNS, CSV_NAME, overlay_names
from pupilseg.predict.runner import OVERLAYS
from pupilseg.predict.video import pictures_at

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

PAGE_NAME = "view.html"
PICTURE_PX = 640
"""Widest picture in the page."""
MOST_BYTES = 24_000_000
"""Of pictures in the page, encoded; what comes behind is left out, and the page says so."""
_TEMPLATE = Path(__file__).with_name("view_page.html")


def write_view(directory: Path, *, pictures: int = 400) -> Path:
    """Writes DIR/view.html.

    Args:
        directory: `out` of `predict_files.predict_paths`.
        pictures: most frames whose picture the page holds: half of them those of the lowest
            confidence, the others spread over all frames.

    Returns:
        The page.

    Raises:
        DataError: there is no pupil.csv, or it is not one of ours.
        OutputError: the page cannot be written.
    """
    directory = Path(directory)
    columns, rows = _read_rows(directory / CSV_NAME)
    files = Counter(row[0] for row in rows)
    confidence, blink = columns.index("confidence"), columns.index("is_blink")
    doubt = [1.0 if row[blink] else row[confidence] for row in rows]
    order = choose_rows(doubt, pictures)
    drawn = dict(_pictures(directory, rows, set(order)))
    kept: dict[int, str] = {}
    total = 0
    for number in order:
        if number in drawn and total + len(drawn[number]) <= MOST_BYTES:
            kept[number] = drawn[number]
            total += len(drawn[number])
    missing = "" if len(kept) == len(rows) else ", doubtful ones and some from all over"
    data = {
        "title": f"{len(rows)} frames, {sum(row[blink] for row in rows)} without a pupil",
        "about": f"{directory.resolve().name}: {len(files)} files; this page holds the pictures of "
        f"{len(kept)} frames{missing}",
        "why_none": "this page holds no picture of this frame (pupilseg view --pictures N)"
        if kept
        else "there are no overlays beside pupil.csv (predict without --no-overlays)",
        "columns": columns,
        "rows": rows,
        "sources": files,
        "pictures": kept,
    }
    page = directory / PAGE_NAME
    write_text(page, render_page(_TEMPLATE, data=data))
    return page


def _read_rows(path: Path) -> tuple[list[str], list[list[Any]]]:
    """Returns the columns of a pupil.csv and its rows: file, whole numbers, numbers or None."""
    mend = "give the --out of a `pupilseg predict`"
    whole = ("frame", "area_px", "is_blink")
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as handle:
            reader = csv.reader(handle, strict=True)
            columns = next(reader, [])
            if columns[: len(COLUMNS)] != list(COLUMNS):
                raise DataError(f"{path} has other columns than a pupil.csv; {mend}")
            kinds = [int if name in whole else float for name in columns[1:]]
            rows = [
                [
                    cells[0].encode("utf-8", "surrogateescape").decode("utf-8", "replace"),
                    *(k(c) if c else None for k, c in zip(kinds, cells[1:], strict=True)),
                ]
                for cells in reader
            ]
    except FileNotFoundError as error:
        raise DataError(f"there is no {path}; {mend}") from error
    except (OSError, ValueError, IndexError, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({error}); {mend}") from error
    return columns, rows


def choose_rows(doubt: Sequence[float], count: int) -> list[int]:
    """Chooses rows whose pictures are shown, the most wanted first, none twice.

    Args:
        doubt: of each row, the lower the more doubtful.
        count: at most so many.

    Returns:
        By turns the next most doubtful row and one of those spread evenly over all.
    """
    doubtful = np.argsort(np.asarray(doubt), kind="stable")[:count]
    spread = np.linspace(0, max(0, len(doubt) - 1), min(count, len(doubt))).round().astype(int)
    # A coarse walk over all first, so that a short list is spread too.
    spread = spread[np.argsort([int(f"{i:032b}"[::-1], 2) for i in range(len(spread))])]
    turns = [int(n) for pair in zip(doubtful, spread, strict=True) for n in pair]
    return list(dict.fromkeys(turns))[:count]


def _pictures(
    directory: Path, rows: Sequence[Sequence[Any]], wanted: set[int]
) -> Iterator[tuple[int, str]]:
    """Yields the overlays of some rows by the rows' numbers, as JPEG in base64."""
    places: dict[str, dict[int, int]] = {}
    for number in wanted:
        places.setdefault(rows[number][0], {})[rows[number][1]] = number
    for text, name in overlay_names(directory).items():
        frames = places.get(text, {})
        still = directory / OVERLAYS / f"{name}.jpg"
        video = directory / OVERLAYS / f"{name}.mp4"
        if frames and video.is_file():
            for frame, picture in pictures_at(video, set(frames)):
                yield frames[frame], _encoded(picture)
        elif frames and still.is_file():
            drawn = cv2.imread(str(still))
            if drawn is not None:
                yield frames[0], _encoded(np.asarray(drawn, dtype=np.uint8))


def _encoded(picture: NDArray[np.uint8]) -> str:
    """Returns a picture, made smaller where it is wide, as JPEG in base64."""
    scale = PICTURE_PX / max(picture.shape[:2])
    if scale < 1:
        size = tuple(max(1, round(side * scale)) for side in picture.shape[1::-1])
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)  # type: ignore[assignment]
    return data_uri(encode(picture, ".jpg"), "jpeg")
