"""Sends what a spool holds to MLflow, at once or behind the back of a training loop."""

from __future__ import annotations

import logging
import threading
import time
from functools import partial
from typing import TYPE_CHECKING

from pupilseg.files import file_digest
from pupilseg.tracking.mlflow import METRICS_A_REQUEST, NoAnswerError, RefusedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path
    from typing import Any

    from pupilseg.tracking.mlflow import MlflowRun
    from pupilseg.tracking.spool import Record, Spool

log = logging.getLogger(__name__)

_RETRY_SECONDS = 30.0
"""Between two attempts at a server that has failed twice."""


class Outbox:
    """A thread that sends the pending records of a run, and tries again while the server is gone.

    It is a daemon that joins nothing: a process that ends does not wait for it, and loses nothing,
    since what was not confirmed is in the spool. The first two failures in a row cost a warning,
    and so does what is left at the end; there is never a second one in a row.

    Attributes:
        run_id: of the run.
        directory: of the spool's file.

    Args:
        run: on the server; from here on used by the thread alone.
        spool: with that run open; closed by `close`.
        mend: the command that sends later what the server missed.
    """

    def __init__(self, run: MlflowRun, spool: Spool, mend: str) -> None:
        self._run, self._spool, self._mend = run, spool, mend
        self.run_id, self.directory = run.id, spool.path.absolute().parent
        self._change = threading.Condition()
        self._closing = self._abandoned = self._warned = False
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def put(self, kind: str, time_ms: int, data: dict[str, Any]) -> None:
        """Writes a record to the spool, to be sent soon; waits for no server."""
        self._spool.add(self._run.id, kind, time_ms, data)
        with self._change:
            self._change.notify()

    def close(self, timeout_s: float) -> None:
        """Sends what is left, and says what could not be sent within `timeout_s` seconds."""
        with self._change:
            self._closing = True
            self._change.notify()
        self._thread.join(timeout_s)
        with self._change:
            left = len(self._spool.pending(self._run.id))
            if left and not self._warned:
                self._warn(f"{left} messages not taken within {timeout_s:g} s")
            elif left:
                log.info("MLflow misses the end of this run: `%s` sends it", self._mend)
            self._abandoned = True
        self._spool.close()

    def _work(self) -> None:
        """Sends until closed; then twice at the most, where the server fails."""
        failures, retry_at = 0, 0.0
        while self._wait_for_work(retry_at):
            closing = self._closing
            problem = self._deliver()
            failures = failures + 1 if problem else 0
            with self._change:
                if self._abandoned:
                    return
                if problem and failures > 1 and not self._warned:
                    self._warn(problem)
                elif not problem and self._warned:
                    self._warned = False
                    log.info("MLflow answers again, and has what it missed")
            if closing and failures != 1:
                return
            retry_at = time.monotonic() + (0, 1, _RETRY_SECONDS)[min(failures, 2)]

    def _wait_for_work(self, retry_at: float) -> bool:
        """Returns when there is something to send and it is time to, or all is to be ended.

        Args:
            retry_at: `time.monotonic` before which nothing is sent, unless to end.

        Returns:
            False where there is nothing to be done any more.
        """
        with self._change:
            while not self._closing:
                pause = None
                if self._spool.pending(self._run.id):
                    pause = retry_at - time.monotonic()
                    if pause <= 0:
                        return True
                self._change.wait(pause)
            return not self._abandoned

    def _deliver(self) -> str:
        """Sends what is pending; returns what went wrong, or nothing."""
        try:
            return "; ".join(send(self._run, self._spool, stop=lambda: self._abandoned))
        except NoAnswerError as error:
            return str(error)

    def _warn(self, problem: str) -> None:
        """Says that the server fails; the caller holds the condition."""
        self._warned = True
        log.warning(
            "MLflow at %s fails (%s); training does not wait for it. What it misses is in %s: send "
            "it later with `%s`",
            self._run.uri,
            problem,
            self._spool.path,
            self._mend,
        )


def send(
    run: MlflowRun,
    spool: Spool,
    *,
    check_files: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> list[str]:
    """Sends the pending records of a run: numbers, then files, then the end.

    Args:
        run: on the server.
        spool: which notes what was confirmed.
        check_files: send no file that is another than when it was logged.
        stop: asked before each request whether to leave the rest.

    Returns:
        What was refused, which stays pending.

    Raises:
        NoAnswerError: the server is gone; what was not confirmed before stays pending.
    """
    records = spool.pending(run.id)
    requests: list[tuple[list[Record], Callable[[], None]]] = [
        (epochs, partial(run.log_epochs, epochs))
        for epochs in _requests([record for record in records if record.kind == "epoch"])
    ]
    files: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record.kind == "artifact":
            files.setdefault((record.data["file"], record.data["folder"]), []).append(record)
    for (name, folder), versions in files.items():
        expected = versions[-1].data["sha256"] if check_files else None
        path = spool.path.parent / name
        requests.append((versions, partial(_send_file, run, path, folder, expected)))
    requests += [
        ([record], partial(run.end, record.data["status"], record.time_ms))
        for record in records
        if record.kind == "end"
    ]
    refused = []
    for confirmed, request in requests:
        if stop():
            break
        try:
            request()
        except RefusedError as error:
            refused.append(str(error))
        else:
            spool.confirm(confirmed)
    return refused


def _send_file(run: MlflowRun, path: Path, folder: str, expected: str | None) -> None:
    """Uploads a file, if it is the one that was logged.

    Raises:
        RefusedError: the server refused, or `expected` is given and is not the file's digest.
        NoAnswerError: the server is gone.
    """
    try:
        changed = expected is not None and file_digest(path) != expected
    except OSError:
        changed = True
    if changed:
        raise RefusedError(f"{path} is not there any more as it was logged")
    run.log_artifact(path, folder)


def _requests(epochs: Sequence[Record]) -> Iterator[list[Record]]:
    """Yields epochs in groups that fit into a request each."""
    group: list[Record] = []
    count = 0
    for record in epochs:
        size = len(record.data["metrics"])
        if group and count + size > METRICS_A_REQUEST:
            yield group
            group, count = [], 0
        group.append(record)
        count += size
    if group:
        yield group
