"""The record of an MLflow run: a JSON file in the output directory.

The metrics are in the run's history file. The record adds the data that is not in the history: the
id of the MLflow run, the times of the epochs, the files to upload and the status. With it,
`pupilseg upload-run` can compare the run with the server at any time, even if the process was
killed.
"""

from __future__ import annotations

import contextlib
import csv
import logging
import math
import threading
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from pupilseg.errors import DataError, OutputError
from pupilseg.files import file_digest, file_lock, read_json, write_json

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

log = logging.getLogger(__name__)

RECORD_SUFFIX = "_mlflow_run.json"
"""Suffix of the file, after the name of the model."""
RUNNING = "RUNNING"


class Metric(NamedTuple):
    """One value of a metric."""

    name: str
    step: int
    value: float
    time_ms: int


@dataclass(slots=True)
class LoggedFile:
    """A file to upload.

    Attributes:
        path: relative to the directory of the record if it is inside it, so that the directory can
            be moved.
        sha256: digest of the file when it was logged.
        sent: digest of the version that the server has accepted; empty if none.
    """

    path: str
    sha256: str
    sent: str = ""


@dataclass(slots=True)
class RunData:
    """The content of a record. Times are in milliseconds since 1970.

    Attributes:
        run_id: id of the MLflow run.
        uri: address of the server, without user and password.
        experiment: id of the experiment.
        name: display name of the run.
        history: name of the history file.
        earlier_history: SHA-256 of the history of an earlier run in the same directory, whose rows
            are ignored; empty once this run has written its own.
        changed_ms: time of the last event of the run.
        status: RUNNING, FINISHED, FAILED or KILLED.
        closed: True if the server has accepted the status.
        epochs: step -> `time_ms` and the metrics that are not in the history.
        files: artifact path -> file.
    """

    run_id: str
    uri: str
    experiment: str
    name: str
    history: str
    earlier_history: str
    changed_ms: int
    status: str = RUNNING
    closed: bool = False
    epochs: dict[str, dict[str, float]] = field(default_factory=dict)
    files: dict[str, LoggedFile] = field(default_factory=dict)


class RunRecord:
    """An open record, locked by this process; thread-safe.

    Args:
        path: path of the record, which need not exist.

    Attributes:
        data: contents of the record; None until `begin` if the file does not exist.

    Raises:
        DataError: the file is not a record.
        LockedError: a training run or an upload in another process has it open.
        OutputError: the directory cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: RunData | None = None
        self._mutex = threading.Lock()
        self._closed = self._failed = False
        with contextlib.ExitStack() as stack:
            stack.enter_context(file_lock(path.with_name(f".{path.name}.lock"), subject=path))
            if path.exists():
                self.data = _read(path)
            self._held = stack.pop_all()

    @property
    def run(self) -> RunData:
        """The contents of an existing record."""
        assert self.data is not None
        return self.data

    def begin(self, data: RunData) -> None:
        """Starts the record of a run, or resumes it if the run is already recorded.

        Raises:
            OutputError: the file cannot be written.
        """
        if self.data is not None and self.data.run_id == data.run_id:
            data.epochs, data.files = self.data.epochs, self.data.files
        self.data = data
        write_json(self.path, asdict(data))

    @contextlib.contextmanager
    def change(self) -> Iterator[RunData]:
        """Yields the contents to change, then writes them; only the first write error is logged."""
        with self._mutex:
            yield self.run
            if self._closed:
                return
            try:
                write_json(self.path, asdict(self.run))
            except (OutputError, OSError) as error:
                if not self._failed:
                    log.warning("%s; `pupilseg upload-run` will miss the end of this run", error)
                self._failed = True

    def metrics(self, *, ended: bool) -> list[Metric]:
        """Returns the finite metrics in the history.

        Args:
            ended: True if the process has ended, to include epochs after the last logged one.
                During a run, these are about to be logged with their time.

        Raises:
            DataError: the history is damaged.
        """
        path = self.path.parent / self.run.history
        found = []
        try:
            if not path.exists() or file_digest(path) == self.run.earlier_history:
                return []
            last = math.inf if ended else max(map(int, self.run.epochs), default=0)
            # Used as the time of an epoch that was not logged.
            written_ms = 1000 * path.stat().st_mtime
            with path.open(newline="", encoding="utf-8") as file, self._mutex:
                for row in csv.DictReader(file):
                    logged = {"time_ms": written_ms, **self.run.epochs.get(row["epoch"], {})}
                    values = {name: float(value) for name, value in (row | logged).items()}
                    step, time_ms = int(values.pop("epoch")), int(values.pop("time_ms"))
                    found += [
                        Metric(name, step, value, time_ms)
                        for name, value in values.items()
                        if math.isfinite(value) and step <= last
                    ]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path} is not a history of epochs ({error!r}); restore it") from error
        return found

    def files(self) -> dict[str, LoggedFile]:
        """Returns a copy of the files by artifact path."""
        with self._mutex:
            return dict(self.run.files)

    def close(self) -> None:
        """Releases the lock and keeps the file. Later changes are not written."""
        with self._mutex:
            self._closed = True
            self._held.close()


def _read(path: Path) -> RunData:
    hint = "name another file, or delete it"
    content = read_json(path, hint=hint)
    try:
        files = {name: LoggedFile(**file) for name, file in content.pop("files").items()}
        return RunData(**content, files=files)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a record of an MLflow run ({error!r}); {hint}") from error


def now_ms() -> int:
    """Returns the time in milliseconds since 1970."""
    return int(1000 * time.time())
