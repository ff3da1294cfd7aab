"""pupil.csv and the SQLite database that it is exported from.

OUT/.pupil.sqlite3 holds the rows of every source that was read to its end. Each source is one
transaction, so a killed run loses only the source it was working on. The database stays in OUT
after the run: `--skip-existing` resumes from it, and `pupilseg view` looks up the overlays in it.

SQLite's write-ahead log protects the database from damage by a kill or a power failure. A commit
takes 11 us because it does not wait for the disk. SQLite does not detect a changed byte inside a
row, so each source also has a checksum.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import sqlite3
import zlib
from typing import TYPE_CHECKING, Any

from pupilseg.errors import DataError, OutputError, UsageError
from pupilseg.files import atomic_path, output_errors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from pupilseg.predict.inputs import Source
    from pupilseg.predict.predictor import Prediction
    from pupilseg.predict.video import Frame

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
"""Columns of pupil.csv, which has one row per frame.

Lengths are in pixels of the original frame, with pixel centers at integers. Angles are measured
from +x toward +y, which points down. `diameter_px` is 2 * semi_axis_a_px, the axis that an oblique
view does not shorten; `area_px` is the number of mask pixels. If no pupil was found, `is_blink` is
1, the ellipse and the diameter are empty, and area and confidence are 0. `time_s` is empty for
images.
"""
MM_COLUMN = "diameter_mm"
"""Last column, present if the size of a pixel is given."""
CSV_NAME = "pupil.csv"
DATABASE_NAME = ".pupil.sqlite3"

_OLD_NAME = ".pupil.journal"
"""Text file that earlier versions wrote instead of the database."""

_FORMAT = 1
"""Version of the database format; stored with the settings that must match when resuming."""
# Text is stored as bytes, since file names need not be valid UTF-8.
_TABLES = (
    "CREATE TABLE settings (json TEXT NOT NULL)",
    "CREATE TABLE sources (id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, file BLOB NOT NULL,"
    " name BLOB NOT NULL, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,"
    " failed INTEGER NOT NULL, checksum INTEGER NOT NULL)",
    "CREATE TABLE rows (source_id INTEGER NOT NULL, number INTEGER NOT NULL, line BLOB NOT NULL,"
    " PRIMARY KEY (source_id, number)) WITHOUT ROWID",
)
_HINTS = {
    sqlite3.SQLITE_FULL: "the disk is full; free some space and run the same command again",
    sqlite3.SQLITE_IOERR: "the disk reports an I/O error; check the disk and its quota",
    sqlite3.SQLITE_READONLY: "no permission; make the directory writable or choose another one",
    sqlite3.SQLITE_CANTOPEN: "no permission; make the directory writable or choose another one",
    sqlite3.SQLITE_BUSY: "another process is using it; wait for that process to end",
}
_START_OVER = "choose another --out, or run without --skip-existing to predict all files again"


def row(
    source: Source, frame: Frame, prediction: Prediction, mm_per_px: float | None = None
) -> list[str]:
    """Returns the cells of pupil.csv for one frame."""
    time_s = "" if frame.time_s is None else f"{frame.time_s:.6f}"
    start = [source.text, str(frame.number), time_s]
    area = str(int(prediction.mask.sum(dtype=int)))
    if prediction.ellipse is None:
        cells = [*start, *[""] * 6, area, "0", "1"]
        return cells if mm_per_px is None else [*cells, ""]
    ellipse = prediction.ellipse
    diameter = 2 * ellipse.semi_axis_a_px
    numbers = [f"{value:.3f}" for value in ellipse[:4]]
    angle, confidence = f"{ellipse.angle_rad:.5f}", f"{prediction.confidence:.4f}"
    cells = [*start, *numbers, angle, f"{diameter:.3f}", area, confidence, "0"]
    return cells if mm_per_px is None else [*cells, f"{diameter * mm_per_px:.4f}"]


def _csv_line(cells: list[str]) -> bytes:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return os.fsencode(line.getvalue())


@contextlib.contextmanager
def _database_errors(path: Path) -> Iterator[None]:
    """Converts SQLite errors to errors of pupilseg.

    Raises:
        OutputError: the disk is full, another process has locked the database, or similar.
        DataError: the database is damaged.
    """
    try:
        yield
    except (sqlite3.Error, UnicodeDecodeError) as error:
        # The low byte is the primary result code. Errors of the Python module itself have no code.
        hint = _HINTS.get(getattr(error, "sqlite_errorcode", 0) & 0xFF)
        if hint is not None:
            raise OutputError(f"cannot write {path}: {hint} ({error})") from error
        raise DataError(f"{path} is damaged ({error}); {_START_OVER}") from error


def overlay_names(out: Path) -> dict[str, str]:
    """Returns the name of the overlay and masks for each source of a run.

    Returns:
        Value of the `file` column -> name; empty if there is no database.

    Raises:
        DataError: the database is damaged.
        OutputError: `pupilseg predict` is writing to the directory.
    """
    path = out / DATABASE_NAME
    if not path.is_file():
        return {}
    # "rw" never creates a file, and needs write access only after a kill, to apply the log.
    address = f"{path.absolute().as_uri()}?mode=rw"
    with (
        _database_errors(path),
        contextlib.closing(sqlite3.connect(address, timeout=1, uri=True)) as connection,
    ):
        rows = connection.execute("SELECT file, name FROM sources").fetchall()
        return {os.fsdecode(file): os.fsdecode(name) for file, name in rows}


class Journal:
    """The database of a run. The caller must lock the directory, and close the journal at the end.

    Args:
        out: the output directory.
        settings: everything that the rows depend on besides the files: model, region and so on.
        resume: keep the results of an earlier run instead of starting over.

    Attributes:
        names: key of each finished source -> path of its overlay and masks, without suffix.

    Raises:
        UsageError: the earlier run had other settings, or used another version of pupilseg.
        DataError: the database is damaged.
        OutputError: `out` cannot be written.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
        self.path = out / DATABASE_NAME
        self.names: dict[str, str] = {}
        self._csv = out / CSV_NAME
        self._settings = {"format": _FORMAT, **settings}
        # State of the current source:
        self._id = 1
        self._rows = 0
        self._checksum = 0
        old = out / _OLD_NAME
        if not resume:
            # The log is deleted first: SQLite would apply it to a new database of the same name.
            with output_errors(self.path):
                for suffix in ("-wal", "-shm", "-journal", ""):
                    self.path.with_name(DATABASE_NAME + suffix).unlink(missing_ok=True)
                old.unlink(missing_ok=True)
        elif old.exists() and not self.path.exists():
            raise UsageError(
                f"{old} was written by an earlier version of pupilseg, which this version cannot "
                f"resume; {_START_OVER}"
            )
        with _database_errors(self.path):
            self._connection = sqlite3.connect(self.path)
            try:
                self._open()
            except BaseException:
                self.close()
                raise

    def _open(self) -> None:
        """Creates the tables, or checks and reads existing ones."""
        execute = self._connection.execute
        # A log without exclusive locking needs shared memory, which network drives lack.
        execute("PRAGMA locking_mode = EXCLUSIVE")
        is_new = not execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
        if not is_new:
            self._check_settings()
        execute("PRAGMA journal_mode = WAL")
        execute("PRAGMA synchronous = NORMAL")
        if is_new:
            execute("BEGIN")
            for table in _TABLES:
                execute(table)
            execute("INSERT INTO settings VALUES (?)", (json.dumps(self._settings),))
            self._connection.commit()
            return
        problem = execute("PRAGMA integrity_check").fetchone()[0]
        if problem != "ok":
            raise sqlite3.DatabaseError(problem)
        self._forget_damaged_sources()
        for key, name in execute("SELECT key, name FROM sources"):
            self.names[os.fsdecode(key)] = os.fsdecode(name)
        self._id = execute("SELECT coalesce(max(id), 0) + 1 FROM sources").fetchone()[0]

    def _check_settings(self) -> None:
        """Raises UsageError if the earlier run had other settings."""
        try:
            text = self._connection.execute("SELECT json FROM settings").fetchone()[0]
            before = dict(json.loads(text))
        except (TypeError, ValueError) as error:
            raise sqlite3.DatabaseError("no settings") from error
        changes = [
            f"{name} was {before.get(name)}, is {value}"
            for name, value in self._settings.items()
            if before.get(name) != value
        ]
        if changes:
            raise UsageError(
                f"{self.path.parent} holds results made with other settings "
                f"({', '.join(changes)}); {_START_OVER}"
            )

    def _forget_damaged_sources(self) -> None:
        """Removes sources whose checksum is wrong; they are predicted again."""
        execute = self._connection.execute
        for number, *values, checksum in execute("SELECT * FROM sources").fetchall():
            lines = execute(
                # CAST, since a changed byte may also change the type of a value.
                "SELECT CAST(line AS BLOB) FROM rows WHERE source_id = ? ORDER BY number",
                (number,),
            )
            found = 0
            for (line,) in lines:
                found = zlib.crc32(line, found)
            if _with_values(found, values) != checksum:
                execute("DELETE FROM sources WHERE id = ?", (number,))
        execute("DELETE FROM rows WHERE source_id NOT IN (SELECT id FROM sources)")
        self._connection.commit()

    def close(self) -> None:
        """Closes the database. Rows of a source that is not finished are dropped."""
        self._connection.close()

    def is_finished(self, source: Source) -> bool:
        """Returns True if a file was read to its end, without an error, and has not changed."""
        if source.camera is not None:
            return False
        with _database_errors(self.path):
            found = self._connection.execute(
                "SELECT size, mtime_ns FROM sources WHERE key = ? AND NOT failed",
                (os.fsencode(source.key),),
            ).fetchone()
        return found is not None and found == _file_stamp(source)

    def append(self, cells: list[str]) -> None:
        """Adds a row to the current source.

        Raises:
            OutputError: the database cannot be written.
        """
        line = _csv_line(cells)
        with _database_errors(self.path):
            self._connection.execute(
                "INSERT INTO rows VALUES (?, ?, ?)", (self._id, self._rows, line)
            )
        self._rows += 1
        self._checksum = zlib.crc32(line, self._checksum)

    def finish(self, source: Source, *, failed: bool) -> None:
        """Commits the rows of the current source, which replace those of earlier runs.

        Raises:
            OutputError: the database cannot be written.
        """
        key, file, name = map(os.fsencode, (source.key, source.text, source.name))
        values = (key, file, name, *_file_stamp(source), int(failed))
        checksum = _with_values(self._checksum, values)
        with _database_errors(self.path):
            self._connection.execute(
                "DELETE FROM rows WHERE source_id = (SELECT id FROM sources WHERE key = ?)", (key,)
            )
            self._connection.execute(
                "REPLACE INTO sources VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (self._id, *values, checksum),
            )
            self._connection.commit()
        self._id += 1
        self._rows = 0
        self._checksum = 0

    def write_csv(self, columns: tuple[str, ...]) -> None:
        """Writes pupil.csv: the rows of all finished sources, in the order in which they finished.

        Rows of a source that is not finished are dropped.

        Raises:
            OutputError: the file cannot be written.
        """
        with _database_errors(self.path):
            self._connection.rollback()
            # Moves everything from the log into the database and flushes it to the disk.
            self._connection.execute("PRAGMA journal_mode = DELETE")
            lines = self._connection.execute("SELECT line FROM rows ORDER BY source_id, number")
            with atomic_path(self._csv) as temporary, temporary.open("wb") as handle:
                handle.write(_csv_line(list(columns)))
                handle.writelines(line for (line,) in lines)


def _file_stamp(source: Source) -> tuple[int, int]:
    """Returns size in bytes and modification time in ns; (0, 0) for a camera or a missing file."""
    if source.camera is not None:
        return 0, 0
    try:
        found = source.path.stat()
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def _with_values(checksum: int, values: Iterable[object]) -> int:
    """Returns the checksum of a source from the checksum of its rows and its other values."""
    return zlib.crc32(repr(tuple(values)).encode(), checksum)
