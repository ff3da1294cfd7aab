"""MLflow: a run of its own for each training run, when the environment asks for one.

Asked for by `MLFLOW_TRACKING_URI` and `MLFLOW_EXPERIMENT_ID` (this is the one module of the library
that reads the environment). A server that cannot be reached at the start is an error, since
tracking was asked for; one that fails later costs a warning, never the run: what it missed is in a
file beside the model, which `pupilseg upload-run` sends.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
from typing import TYPE_CHECKING, Any

from pupilseg.errors import UsageError
from pupilseg.files import file_digest
from pupilseg.tracking import mlflow as mlflow_run
from pupilseg.tracking.mlflow import MlflowRun, TrackingError, now_ms, without_password
from pupilseg.tracking.outbox import Outbox
from pupilseg.tracking.spool import Spool

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

log = logging.getLogger(__name__)

VARIABLES = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID")
FLUSH_SECONDS = 25.0
"""Longest time that the end of a run waits for the server."""
_DEFAULTS = {
    # MLflow's own, 7 retries of 120 s, hold a program up for minutes, and urllib3 warns of each
    # retry; `Outbox` retries, and warns once.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # What was asked for is to tell the named server, and nobody else.
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""Set in the environment where it does not say otherwise."""
_MAX_PARAM = 6000
"""Longest parameter value that an MLflow store takes."""


class Tracker:
    """A run on an MLflow server, or nothing where none was asked for.

    Made by `start`. No method waits for the server but `end`, and none raises for it.

    Attributes:
        run_id: of the MLflow run, to be kept with the training state; None where nothing is
            tracked.
    """

    def __init__(self, outbox: Outbox | None = None) -> None:
        self.run_id = None if outbox is None else outbox.run_id
        self._outbox = outbox

    def log_epoch(self, row: Mapping[str, float], *, time_s: float | None = None) -> None:
        """Records an epoch's finite numbers under step `row["epoch"]`.

        Args:
            row: numbers by name.
            time_s: when the epoch ended, in seconds since 1970; None means now.
        """
        if self._outbox is None:
            return
        metrics = {
            name: float(value)
            for name, value in row.items()
            if name != "epoch" and math.isfinite(value)
        }
        time_ms = now_ms() if time_s is None else int(1000 * time_s)
        self._outbox.put("epoch", time_ms, {"step": int(row["epoch"]), "metrics": metrics})

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Records a file, which is read soon, not now: it must be final, or only ever be replaced.

        What replaces it (by a rename, as `atomic_path` does) before it is read is sent in its
        place; to have both on the server is not possible, since they have one name.

        Args:
            path: of the file; one that does not exist is told in the log and left out.
            folder: of the run's artifacts to put it in, with `/` between its parts.
        """
        if self._outbox is None:
            return
        try:
            sha256 = file_digest(path)
        except OSError as error:
            log.warning("cannot read %s (%s): MLflow does not get it", path, error.strerror)
            return
        path, home = path.absolute(), self._outbox.directory
        name = path.relative_to(home).as_posix() if path.is_relative_to(home) else str(path)
        self._outbox.put("artifact", now_ms(), {"file": name, "folder": folder, "sha256": sha256})

    def end(self, status: str, *, timeout_s: float = FLUSH_SECONDS) -> None:
        """Sends what is left and closes the run; what the server does not take stays in the file.

        Args:
            status: FINISHED, FAILED or KILLED.
            timeout_s: longest wait for the server.
        """
        if self._outbox is None:
            return
        self._outbox.put("end", now_ms(), {"status": status})
        self._outbox.close(timeout_s)
        self._outbox = None


def start(
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    name: str,
    *,
    spool: Path,
    run_id: str | None = None,
) -> Tracker:
    """Opens a run on the server that the environment names.

    Args:
        params: recorded once, as text; a mapping among them gives an entry for each of its own,
            with a dot between the names.
        tags: of the run.
        name: shown for the run.
        spool: file that holds what the server has not confirmed; its name should end in
            `spool.SPOOL_SUFFIX`. It is removed when nothing is left.
        run_id: of the run to take up again; where the server has none such, a new one is opened,
            with one warning.

    Returns:
        The run; or, with one warning, a tracker that does nothing where a variable is missing.

    Raises:
        UsageError: both variables are set, and mlflow is not installed or the server refuses.
        DataError: `spool` is another kind of file.
        LockedError: another run is writing to `spool`.
        OutputError: `spool` cannot be written.
    """
    missing = [variable for variable in VARIABLES if not os.environ.get(variable)]
    if missing:
        log.warning("not tracked: %s is not set", " and ".join(missing))
        return Tracker()
    uri, experiment = (os.environ[variable] for variable in VARIABLES)
    load_mlflow("MLFLOW_TRACKING_URI is set", "unset it")
    file = Spool(spool)
    try:
        run = _open(uri, experiment, name, tags, dict(_flat(params)), run_id)
        file.open_run(
            run.id, uri=run.uri, experiment=run.experiment, name=run.name, time_ms=now_ms()
        )
    except TrackingError as error:
        file.close()
        raise UsageError(
            f"MLflow at {without_password(uri)} did not open a run in experiment {experiment!r} "
            f"({error}); start the server, correct {' and '.join(VARIABLES)}, or unset them to "
            "train untracked"
        ) from error
    except BaseException:
        file.close()
        raise
    others = [other.id for other in file.unfinished() if other.id != run.id]
    if others:
        log.info("MLflow misses a part of run %s: `%s`", ", ".join(others), upload_command(spool))
    return Tracker(Outbox(run, file, upload_command(spool)))


def _open(
    uri: str,
    experiment: str,
    name: str,
    tags: Mapping[str, str],
    params: Mapping[str, str],
    run_id: str | None,
) -> MlflowRun:
    """Returns the run to take up again, or a new one, with its parameters recorded.

    Raises:
        TrackingError: the server does not answer or refuses.
    """
    run = MlflowRun.find(uri, run_id) if run_id is not None else None
    if run is not None:
        run.reopen()
        kept = run.log_params(params)
        changed = "".join(
            f"; {key} stays {old} there, is {params[key]}" for key, old in kept.items()
        )
        log.info("MLflow run %s at %s is taken up again%s", run.id, run.uri, changed)
        return run
    if run_id is not None:
        log.warning(
            "MLflow at %s has no run %s to take up again; a new one is opened",
            without_password(uri),
            run_id,
        )
    run = MlflowRun.create(uri, experiment, name, tags)
    run.log_params(params)
    log.info("tracked by MLflow at %s, experiment %s, run %s", run.uri, experiment, run.id)
    return run


def upload_command(spool: Path) -> str:
    """Returns the command that sends what a file holds."""
    return shlex.join(["pupilseg", "upload-run", str(spool)])


def load_mlflow(why: str, otherwise: str) -> None:
    """Imports mlflow, with the patience that suits a training run.

    Raises:
        UsageError: it is not installed.
    """
    for variable, value in _DEFAULTS.items():
        os.environ.setdefault(variable, value)
    try:
        mlflow_run.load()
    except ImportError as error:
        raise UsageError(
            f"{why}, but the package {error.name} is not installed; run "
            f"`pip install 'pupilseg[track]'`, or {otherwise}"
        ) from error


def _flat(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields parameters as MLflow stores them: one level of names, and text."""
    for key, value in params.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, _text(value)


def _text(value: Any) -> str:
    """Returns a parameter's value as text; what is too long for a store says that it was cut."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    if len(text) <= _MAX_PARAM:
        return text
    mark = f"... (cut, {len(text)} characters)"
    return text[: _MAX_PARAM - len(mark)] + mark
