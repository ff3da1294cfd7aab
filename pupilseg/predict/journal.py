"""pupil.csv: its columns, and the journal from which it is made, that outlives a kill.

While a run lasts, rows are appended to OUT/.pupil.journal as they come. When a source is finished,
a line `#done {...}` follows its rows, with their number of lines and checksum, and size and time of
the file. A kill costs the rows behind the last such line, nothing else; `--skip-existing` goes on
there. pupil.csv is the journal without those lines, and is written whole at the end.
"""

from __future__ import annotations

import csv
import io
import json
import os
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from pupilseg.errors import UsageError
from pupilseg.files import atomic_path, output_errors

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path
    from types import TracebackType

    from pupilseg.predict.inputs import Source
    from pupilseg.predict.predictor import Prediction

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
MM_COLUMN = "diameter_mm"
"""The last column, where the size of a pixel was given."""
CSV_NAME = "pupil.csv"
JOURNAL_NAME = ".pupil.journal"
_HEAD, _DONE = b"#pupilseg ", b"#done "


def row(
    source: Source,
    frame: int,
    time_s: float | None,
    prediction: Prediction,
    mm_per_px: float | None = None,
) -> list[str]:
    """Returns a frame's cells."""
    area = str(int(prediction.mask.sum(dtype=int)))
    start = [source.text, str(frame), "" if time_s is None else f"{time_s:.6f}"]
    if prediction.ellipse is None:
        cells = [*start, *[""] * 6, area, "0", "1"]
        return cells if mm_per_px is None else [*cells, ""]
    ellipse = prediction.ellipse
    diameter = 2 * ellipse.semi_axis_a_px
    numbers = [f"{value:.3f}" for value in ellipse[:4]]
    angle, confidence = f"{ellipse.angle_rad:.5f}", f"{prediction.confidence:.4f}"
    cells = [*start, *numbers, angle, f"{diameter:.3f}", area, confidence, "0"]
    return cells if mm_per_px is None else [*cells, f"{diameter * mm_per_px:.4f}"]


def _encoded(cells: list[str]) -> bytes:
    """Returns a line of CSV; a first cell with # in front is quoted, not to look like a mark."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    text = line.getvalue()
    if text.startswith("#"):
        first, rest = text.split(",", 1)
        text = f'"{first}",{rest}'
    return text.encode("utf-8", "surrogateescape")


class Done(NamedTuple):
    """A source that was finished.

    Attributes:
        key: of the source.
        name: of its overlay and masks.
        size: of the file in bytes; 0 for a camera.
        mtime_ns: of the file.
        blinks: rows without a pupil.
        failed: what was wrong with it; "" where nothing was.
        lines: number of those that its rows take.
        crc: of their bytes.
    """

    key: str
    name: str
    size: int
    mtime_ns: int
    blinks: int
    failed: str
    lines: int
    crc: int


def stamp(source: Source) -> tuple[int, int]:
    """Returns size and time of a source's file, (0, 0) for a camera or a file that is gone."""
    if source.camera is not None:
        return 0, 0
    try:
        found = source.path.stat()
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def _blocks(path: Path) -> Iterator[tuple[Done, list[bytes]]]:
    """Yields what a journal holds of finished sources, with the lines of their rows."""
    rows: list[bytes] = []
    with path.open("rb") as handle:
        handle.readline()
        for line in handle:
            if not line.startswith(_DONE):
                rows.append(line)
                continue
            try:
                done = Done(**json.loads(line[len(_DONE) :]))
            except (ValueError, TypeError):
                rows = []
                continue
            if (len(rows), zlib.crc32(b"".join(rows))) == (done.lines, done.crc):
                yield done, rows
            rows = []


def source_names(out: Path) -> dict[str, str]:
    """Returns the name of overlay and masks of each source in a directory's pupil.csv.

    Returns:
        First cell of the rows -> name; nothing where there is no journal.
    """
    path = out / JOURNAL_NAME
    if not path.is_file():
        return {}
    names = {}
    for done, lines in _blocks(path):
        text = b"".join(lines).decode("utf-8", "replace")
        first = next(csv.reader(io.StringIO(text)), None)
        if first is not None:
            names[first[0]] = done.name
    return names


class Journal:
    """The journal of a run, open for appending.

    Args:
        out: the directory.
        settings: what rows depend on beside their file: model, region and so on.
        keep: go on with what an earlier run left, rather than start anew.

    Attributes:
        done: key -> record, of every source that is finished.

    Raises:
        UsageError: an earlier run that is to be kept had other settings.
        OutputError: `out` cannot be written.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], *, keep: bool) -> None:
        self.path = out / JOURNAL_NAME
        self.done: dict[str, Done] = {}
        self._csv = out / CSV_NAME
        self._settings = dict(settings)
        self._lines, self._crc, self._blinks = 0, 0, 0
        kept: list[tuple[Done, list[bytes]]] = []
        if keep and self.path.exists():
            self._check()
            kept = list(_blocks(self.path))
        with atomic_path(self.path) as temporary, temporary.open("wb") as handle:
            handle.write(_HEAD + json.dumps(self._settings).encode() + b"\n")
            for done, lines in kept:
                self.done[done.key] = done
                handle.writelines(lines)
                handle.write(_DONE + json.dumps(done._asdict()).encode() + b"\n")
        with output_errors(self.path):
            self._handle = self.path.open("ab")

    def _check(self) -> None:
        """Compares the settings of an earlier run with this one's."""
        with self.path.open("rb") as handle:
            head = handle.readline()
        try:
            before = json.loads(head.removeprefix(_HEAD))
        except ValueError:
            before = {}
        differ = [k for k in self._settings if before.get(k) != self._settings[k]]
        if differ:
            said = ", ".join(f"{k} was {before.get(k)}, is {self._settings[k]}" for k in differ)
            raise UsageError(
                f"{self.path.parent} holds results made in another way ({said}); choose another "
                "--out, or leave --skip-existing out to make all anew"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._handle.close()

    def is_done(self, source: Source) -> bool:
        """Says whether a source was finished without a fault, and its file is what it was."""
        done = self.done.get(source.key)
        fresh = done is not None and (done.size, done.mtime_ns) == stamp(source)
        return fresh and done is not None and not done.failed and source.camera is None

    def append(self, cells: list[str]) -> None:
        """Adds a row of the source under way.

        Raises:
            OutputError: the disk is full, or the like.
        """
        line = _encoded(cells)
        self._lines += line.count(b"\n")  # a file's name may hold one
        self._crc = zlib.crc32(line, self._crc)
        self._blinks += cells[COLUMNS.index("is_blink")] == "1"
        with output_errors(self.path):
            self._handle.write(line)

    def finish(self, source: Source, failed: str = "") -> Done:
        """Ends the source under way, and returns its record."""
        done = Done(
            source.key, source.name, *stamp(source), self._blinks, failed, self._lines, self._crc
        )
        self._lines, self._crc, self._blinks = 0, 0, 0
        with output_errors(self.path):
            self._handle.write(_DONE + json.dumps(done._asdict()).encode() + b"\n")
            self._handle.flush()
        self.done[done.key] = done
        return done

    def write_csv(self, columns: tuple[str, ...]) -> None:
        """Makes pupil.csv of the rows of all finished sources; of one done twice, the later.

        Raises:
            OutputError: it cannot be written.
        """
        with output_errors(self.path):
            self._handle.flush()
            os.fsync(self._handle.fileno())
        last = {done.key: number for number, (done, _) in enumerate(_blocks(self.path))}
        with atomic_path(self._csv) as temporary, temporary.open("wb") as handle:
            handle.write(_encoded(list(columns)))
            for number, (done, lines) in enumerate(_blocks(self.path)):
                if last[done.key] == number:
                    handle.writelines(lines)
