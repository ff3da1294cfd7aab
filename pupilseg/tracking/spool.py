"""What an MLflow server has not confirmed of a training run, in a file beside the model.

Everything that is to be sent is written here first, so that neither a dead server nor a killed
process loses it; what the server confirms is noted; a file of which nothing is left is removed.
JSON lines, only ever appended to. `time_ms` is in milliseconds since 1970, `id` counts the lines of
the file's life that are to be sent:

    {"kind": "run", "run": RUN_ID, "uri": ..., "experiment": ..., "name": ..., "time_ms": ...}
    {"kind": "epoch", "id": 0, "run": RUN_ID, "time_ms": ..., "step": 1, "metrics": {NAME: VALUE}}
    {"kind": "artifact", "id": 1, ..., "file": PATH, "folder": "", "sha256": ...}
    {"kind": "end", "id": 2, ..., "status": "FINISHED"}
    {"kind": "sent", "ids": [0, 1, 2]}

A second line "run" of the same run says that it was taken up again: an end that was not sent before
it is void. A path is relative to the file's directory where it lies in it, so that the directory
may be moved.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pupilseg.errors import DataError, LockedError
from pupilseg.files import output_errors

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

log = logging.getLogger(__name__)

SPOOL_SUFFIX = "_mlflow.jsonl"
"""Ends the name of the file, after that of the model."""


@dataclass(frozen=True, slots=True)
class Record:
    """Something to be sent.

    Attributes:
        id: its number in the file.
        kind: epoch, artifact or end.
        time_ms: when it was logged, in milliseconds since 1970.
        data: what else the line holds.
    """

    id: int
    kind: str
    time_ms: int
    data: dict[str, Any]


@dataclass(slots=True)
class SpooledRun:
    """What the file knows of a run.

    Attributes:
        id: MLflow's.
        uri: of the server, without user and password.
        experiment: id.
        name: shown for the run.
        last_ms: time of its newest record, in milliseconds since 1970.
        pending: what the server has not confirmed, by id of record, oldest first.
        ended: the server has confirmed its end.
    """

    id: str
    uri: str
    experiment: str
    name: str
    last_ms: int
    pending: dict[int, Record] = field(default_factory=dict)
    ended: bool = False


class Spool:
    """An open spool file, locked for this process; safe to use from several threads.

    Attributes:
        path: of the file, which is made if there is none, as is its directory.
        runs: by id, in the order in which they were started.

    Raises:
        DataError: the file holds something else.
        LockedError: another process (a run under way) has it open.
        OutputError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: dict[str, SpooledRun] = {}
        self._lock = threading.Lock()
        self._next_id = 0
        self._failed = False
        with output_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd: int | None = _open_locked(path)
        try:
            content = path.read_bytes()
            self._torn = not content.endswith(b"\n") and content != b""
            self._read(content)
        except BaseException:
            os.close(self._fd)
            raise

    def open_run(self, run_id: str, *, uri: str, experiment: str, name: str, time_ms: int) -> None:
        """Starts a run, or takes up one that the file knows.

        Raises:
            OutputError: the file cannot be written.
        """
        line = {
            "kind": "run",
            "run": run_id,
            "uri": uri,
            "experiment": experiment,
            "name": name,
            "time_ms": time_ms,
        }
        with self._lock, output_errors(self.path):
            self._append(line)
            self._apply(line)

    def add(self, run_id: str, kind: str, time_ms: int, data: dict[str, Any]) -> None:
        """Writes a record of an open run; it is pending until it is confirmed.

        Args:
            run_id: of a run in `runs`.
            kind: epoch, artifact or end.
            time_ms: milliseconds since 1970.
            data: JSON values, as the kind asks for.
        """
        with self._lock:
            line = {"kind": kind, "id": self._next_id, "run": run_id, "time_ms": time_ms, **data}
            self._write(line)
            self._apply(line)

    def confirm(self, records: Iterable[Record]) -> None:
        """Notes that the server has what these records say."""
        line = {"kind": "sent", "ids": [record.id for record in records]}
        with self._lock:
            self._write(line)
            self._apply(line)

    def pending(self, run_id: str) -> list[Record]:
        """Returns what is to be sent of a run, oldest first."""
        with self._lock:
            return list(self.runs[run_id].pending.values())

    def unfinished(self) -> list[SpooledRun]:
        """Returns the runs of which something, if only the end, is not on the server."""
        with self._lock:
            return [run for run in self.runs.values() if run.pending or not run.ended]

    def close(self) -> None:
        """Lets go of the file, and removes it if nothing in it is left to be sent."""
        done = not self.unfinished()
        with self._lock:
            if self._fd is None:
                return
            if done:
                # Removed while still held: who waits for the lock then sees that the file is gone.
                self.path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = None

    def _read(self, content: bytes) -> None:
        """Takes up what the file holds.

        Raises:
            DataError: it holds lines, but none that starts a run.
        """
        damaged = []
        for number, line in enumerate(content.splitlines(), 1):
            try:
                self._apply(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError):
                damaged.append(number)
        if damaged and not self.runs:
            raise DataError(
                f"{self.path} holds no run, expected lines of JSON that pupilseg wrote while it "
                "trained; name another file, or delete it"
            )
        if damaged:
            log.warning(
                "%s: %d damaged lines are left out (line %s)",
                self.path,
                len(damaged),
                ", ".join(map(str, damaged)),
            )

    def _apply(self, line: dict[str, Any]) -> None:
        """Brings `runs` up to date with a line.

        Raises:
            KeyError: the line lacks an entry, or speaks of a run that was not started.
        """
        kind = line["kind"]
        if kind == "sent":
            for run in self.runs.values():
                for record in filter(None, [run.pending.pop(i, None) for i in line["ids"]]):
                    run.ended = run.ended or record.kind == "end"
        elif kind == "run":
            run = SpooledRun(
                line["run"], line["uri"], line["experiment"], line["name"], int(line["time_ms"])
            )
            if run.id in self.runs:
                before = self.runs[run.id].pending
                run.pending = {i: r for i, r in before.items() if r.kind != "end"}
            self.runs[run.id] = run
        else:
            run = self.runs[line["run"]]
            data = {k: v for k, v in line.items() if k not in ("kind", "id", "run", "time_ms")}
            record = Record(int(line["id"]), kind, int(line["time_ms"]), data)
            run.pending[record.id] = record
            run.last_ms = max(run.last_ms, record.time_ms)
            self._next_id = max(self._next_id, record.id + 1)

    def _write(self, line: dict[str, Any]) -> None:
        """Appends a line; a disk that does not take it costs a warning, since training goes on."""
        try:
            self._append(line)
        except OSError as error:
            if not self._failed:
                self._failed = True
                log.warning(
                    "cannot write %s (%s): what MLflow does not take from now on is lost to it",
                    self.path,
                    os.strerror(error.errno or 0),
                )

    def _append(self, line: dict[str, Any]) -> None:
        """Appends a line in one call, so that a kill leaves all of it or nothing.

        Raises:
            OSError: the disk took none or only a part of it.
        """
        if self._fd is None:
            return
        text = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        text = b"\n" + text if self._torn else text
        written = os.write(self._fd, text)
        self._torn = written < len(text)
        if self._torn:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))


def _open_locked(path: Path) -> int:
    """Returns a descriptor that appends to `path`, which no other process has.

    Raises:
        LockedError: another process has it.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            _lock(descriptor)
            # Its holder may have removed the file between our open and our lock: then once more.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise LockedError(
                f"{path} is in use by another training run or upload; wait for it to end, or end it"
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    """Locks an open file for this process, where the system can.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Some network file systems know no locks; there the file is used without.
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
