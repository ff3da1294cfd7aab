"""MLflow tracking, enabled by `MLFLOW_TRACKING_URI` and `MLFLOW_EXPERIMENT_ID`.

`MLFLOW_EXPERIMENT_NAME` may replace the id: an experiment that the server does not have is created.
`MLFLOW_RUN_NAME` names the run.

The run's folder is the source of truth: a thread compares it with the server and sends what is
missing. A server that cannot be reached when the run starts is an error, because tracking was
requested. If it fails later, one warning is logged; `pupilseg upload-run` sends the rest.

This is the only module that imports mlflow. MLflow's asynchronous logging is not used: it keeps
unsent data in memory only, and joins its threads without a time limit, also when the interpreter
exits (`mlflow/utils/async_logging/async_logging_queue.py`, 3.17).
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import shlex
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pupilseg.errors import DataError, PupilSegError, UsageError
from pupilseg.files import file_digest
from pupilseg.tracking.record import (
    RECORD_SUFFIX,
    RUNNING,
    LoggedFile,
    RunData,
    RunRecord,
    now_ms,
)
from pupilseg.tracking.tracker import TRACKERS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from pupilseg.tracking.tracker import RunInfo

log = logging.getLogger(__name__)

METRICS_PER_REQUEST = 1000
"""Largest number of metrics that `log_batch` accepts."""
_MAX_PARAM = 6000
"""Maximum length of a parameter value in an MLflow store."""
_RETRY_SECONDS = 30.0
"""Pause between attempts after the server has failed twice."""
_TIMEOUTS_AT_END = 2.5
"""Maximum wait at the end of a run, in request timeouts: 25 s with the default of 10 s."""
_DEFAULTS = {
    # MLflow's own values, 7 retries of 120 s, block a program for minutes, and urllib3 warns about
    # each retry. `MlflowTracker` retries by itself, and warns once.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # The user asked to send data to the named server only.
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""Environment variables that are set unless the user has set them."""
_TRANSIENT = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")
"""MLflow error codes after which a retry may succeed. The first is also used for no response."""
_UNKNOWN_RUN = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""Error codes for an unknown run id and for a malformed one."""
_SECONDS = ("train_seconds", "valid_seconds")
"""Metrics that are not in the history, whose contents depend on the seed alone."""


class TrackingError(PupilSegError):
    """An MLflow server does not respond, or rejects a request."""


class NoAnswerError(TrackingError):
    """A server cannot be reached, hangs, or cannot respond now."""


class RefusedError(TrackingError):
    """A server rejected a request, or a file cannot be read."""


@dataclass(slots=True)
class Sent:
    """Summary of the data sent by `MlflowRun.send`.

    Attributes:
        epochs: epochs whose metrics were sent.
        files: number of files that were sent.
        closed: the status was sent.
        refused: error messages for the parts that were not accepted.
    """

    epochs: set[int] = field(default_factory=set)
    files: int = 0
    closed: bool = False
    refused: list[str] = field(default_factory=list)


class MlflowRun:
    """A run on a server. Requests are made once, without retries.

    Args:
        uri: address of the server.
        run: run object of the MLflow client.
        new: True if the run has just been created and has no metrics.

    Attributes:
        info: MLflow's description of the run.

    Raises (every method):
        NoAnswerError: no response within `MLFLOW_HTTP_REQUEST_TIMEOUT`.
        RefusedError: the server rejected the request.
    """

    def __init__(self, uri: str, run: Any, *, new: bool = False) -> None:
        self._uri, self._client = uri, _client(uri)
        self._params: Mapping[str, str] = run.data.params
        # (metric, step) that the server has; None if unknown.
        self._logged: set[tuple[str, int]] | None = set() if new else None
        self.info = run.info

    @classmethod
    def create(cls, uri: str, experiment: str, run: RunInfo) -> MlflowRun:
        """Returns a new run in an existing experiment."""
        with _tracking_errors(uri):
            name = os.environ.get("MLFLOW_RUN_NAME") or run.name
            created = _client(uri).create_run(experiment, tags=dict(run.tags), run_name=name)
            return cls(uri, created, new=True)

    @classmethod
    def find(cls, uri: str, run_id: str) -> MlflowRun | None:
        """Returns an existing run, or None if the server has none or it is deleted."""
        from mlflow.exceptions import MlflowException

        with _tracking_errors(uri):
            try:
                run = _client(uri).get_run(run_id)
            except MlflowException as error:
                if error.error_code in _UNKNOWN_RUN:
                    return None
                raise
            return None if run.info.lifecycle_stage == "deleted" else cls(uri, run)

    def begin(self, params: Mapping[str, str]) -> dict[str, str]:
        """Sets the status to RUNNING and records new parameters; MLflow never changes a value.

        Returns:
            The server's value of each parameter that differs from `params`.
        """
        from mlflow.entities import Param

        new = [Param(key, value) for key, value in params.items() if key not in self._params]
        with _tracking_errors(self._uri):
            self._client.update_run(self.info.run_id, status=RUNNING)
            self._client.log_batch(self.info.run_id, params=new)
        return {k: v for k, v in self._params.items() if k in params and params[k] != v}

    def send(
        self,
        record: RunRecord,
        *,
        ended: bool = False,
        stop: Callable[[], bool] = lambda: False,
    ) -> Sent:
        """Sends the metrics, files and status that the server lacks, in this order.

        Args:
            record: the record of this run.
            ended: True if no process continues the run. In that case, epochs that were not logged
                are sent too, the server is asked for its files, and files that have changed since
                they were logged are not sent.
            stop: called before each request; the rest is skipped if it returns True.
        """
        sent, files, run_id = Sent(), record.files(), self.info.run_id
        with self._part(sent):
            self._send_metrics(record, sent, stop, ended=ended)
        there = set(files)
        if ended:
            with self._part(sent):
                folders = {name.rpartition("/")[0] for name in files}
                listed = [self._client.list_artifacts(run_id, f or None) for f in folders]
                there = {item.path for items in listed for item in items}
        for name, file in files.items():
            if stop():
                return sent
            if file.sent != file.sha256 or name not in there:
                with self._part(sent):
                    self._send_file(record, name, file, ended=ended)
                    sent.files += 1
        if record.run.status != RUNNING and not record.run.closed and not stop():
            with self._part(sent):
                self._client.set_terminated(run_id, record.run.status, record.run.changed_ms)
                sent.closed = True
                with record.change() as run:
                    run.closed = True
        return sent

    def _send_metrics(
        self, record: RunRecord, sent: Sent, stop: Callable[[], bool], *, ended: bool
    ) -> None:
        from mlflow.entities import Metric

        run_id, logged = self.info.run_id, self._logged
        if logged is None:
            names = self._client.get_run(run_id).data.metrics
            histories = {name: self._client.get_metric_history(run_id, name) for name in names}
            logged = {(name, metric.step) for name in names for metric in histories[name]}
        missing = [m for m in record.metrics(ended=ended) if (m.name, m.step) not in logged]
        for first in range(0, len(missing), METRICS_PER_REQUEST):
            if stop():
                return
            batch = missing[first : first + METRICS_PER_REQUEST]
            self._logged = None  # unknown if there is no response
            self._client.log_batch(
                run_id, metrics=[Metric(m.name, m.value, m.time_ms, m.step) for m in batch]
            )
            logged |= {(m.name, m.step) for m in batch}
            sent.epochs |= {m.step for m in batch}
        self._logged = logged

    def _send_file(self, record: RunRecord, name: str, file: LoggedFile, *, ended: bool) -> None:
        path = record.path.parent / file.path
        if ended and not (path.is_file() and file_digest(path) == file.sha256):
            raise RefusedError(f"{path} is missing, or has changed since it was logged")
        self._client.log_artifact(self.info.run_id, str(path), name.rpartition("/")[0] or None)
        with record.change() as run:
            run.files[name].sent = file.sha256

    @contextlib.contextmanager
    def _part(self, sent: Sent) -> Iterator[None]:
        """Collects the error of one rejected part, so that the other parts are sent."""
        try:
            with _tracking_errors(self._uri):
                yield
        except (RefusedError, DataError) as error:
            sent.refused.append(str(error))


def finish_run(record: RunRecord, uri: str) -> Sent:
    """Sends the data that a server lacks of an ended run, and closes the run.

    A run whose process was killed is closed as KILLED.

    Raises:
        NoAnswerError: the server does not respond.
        RefusedError: the server does not have the run, or did not accept all of the data.
    """
    shown, run_id, command = without_password(uri), record.run.run_id, upload_command(record.path)
    abandon = f"abandon it by deleting {record.path}"
    try:
        run = MlflowRun.find(uri, run_id)
        if run is None:
            raise RefusedError(
                f"MLflow at {shown} has no run {run_id} ({record.run.name}, recorded at "
                f"{record.run.uri}); if another server has it, set MLFLOW_TRACKING_URI; if it was "
                f"deleted, restore it with `mlflow runs restore --run-id {run_id}`, or {abandon}"
            )
        if record.run.status == RUNNING:
            with record.change() as data:
                data.status = "KILLED"
        sent = run.send(record, ended=True)
    except NoAnswerError as error:
        raise NoAnswerError(
            f"MLflow at {shown} does not respond ({error}); nothing is lost: start it, or set "
            f"MLFLOW_TRACKING_URI, and run `{command}` again"
        ) from error
    if sent.refused:
        raise RefusedError(
            f"MLflow at {shown} has run {run_id}, but did not accept all of its data: "
            f"{'; '.join(sent.refused)}; fix that and run `{command}` again, or {abandon}"
        )
    return sent


class MlflowTracker:
    """A run with a thread that sends data to the server, and retries while the server is down.

    The thread is a daemon, and `end` joins it with a timeout, so that a process can exit without
    waiting for the server. After two failures in a row, one warning is logged. No data is lost,
    because the record and the run's folder contain everything.

    Args:
        run: the run; used only by the thread from now on.
        record: the record of that run; closed by `end`.
        end_timeout_s: maximum wait of `end`, in seconds.
    """

    def __init__(self, run: MlflowRun, record: RunRecord, end_timeout_s: float) -> None:
        self._run, self._record, self._end_timeout_s = run, record, end_timeout_s
        self.run_id: str = record.run.run_id
        self._change = threading.Condition()
        self._dirty = self._closing = self._abandoned = self._warned = False
        self._failures = 0
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def log_epoch(self, row: Mapping[str, float]) -> None:
        """See `Tracker`; the metrics themselves are read from the history."""
        # In a resumed run, the times of earlier epochs are NaN, which JSON does not have.
        seconds = {k: row[k] for k in _SECONDS if math.isfinite(row.get(k, math.nan))}
        with self._record.change() as run:
            run.changed_ms, run.earlier_history = now_ms(), ""
            run.epochs[str(int(row["epoch"]))] = {"time_ms": run.changed_ms, **seconds}
        self._wake()

    def log_file(self, path: Path, folder: str = "") -> None:
        """See `Tracker`."""
        home, path = self._record.path.absolute().parent, path.absolute()
        try:
            digest = file_digest(path)
        except OSError as error:
            log.warning("cannot read %s (%s); it is not sent to MLflow", path, error.strerror)
            return
        stored = path.relative_to(home).as_posix() if path.is_relative_to(home) else str(path)
        with self._record.change() as run:
            name = f"{folder}/{path.name}".removeprefix("/")
            before = run.files.get(name)
            run.files[name] = LoggedFile(stored, digest, before.sent if before else "")
            run.changed_ms = now_ms()
        self._wake()

    def end(self, status: str) -> None:
        """See `Tracker`; closes the record."""
        with self._record.change() as run:
            run.status, run.changed_ms = status, now_ms()
        self._closing = True
        self._wake()
        self._thread.join(self._end_timeout_s)
        with self._change:
            self._abandoned = True
            if self._warned:
                command = upload_command(self._record.path)
                log.info("MLflow is missing the end of this run; to send it, run `%s`", command)
            elif self._thread.is_alive():
                self._warn(f"it did not accept everything within {self._end_timeout_s:g} s")
        self._record.close()

    def _wake(self) -> None:
        with self._change:
            self._dirty = True
            self._change.notify()

    def _work(self) -> None:
        pauses = (None, 1.0, _RETRY_SECONDS)
        while not self._abandoned:
            with self._change:
                self._change.wait_for(
                    lambda: self._closing or (self._dirty and not self._failures),
                    pauses[min(self._failures, 2)],
                )
                closing, self._dirty = self._closing, False
            try:
                refused = self._run.send(self._record, stop=lambda: self._abandoned).refused
                problem = "; ".join(refused)
            except NoAnswerError as error:
                problem = str(error)
            with self._change:
                self._failures = self._failures + 1 if problem else 0
                if not self._abandoned:
                    self._report(problem)
            if closing and self._failures != 1:  # a first failure gets one more attempt
                return

    def _report(self, problem: str) -> None:
        if self._failures > 1 and not self._warned:
            self._warn(problem)
        elif self._warned and not problem:
            self._warned = False
            log.info("MLflow responds again and has all data so far")

    def _warn(self, problem: str) -> None:
        self._warned = True
        log.warning(
            "MLflow at %s fails (%s); training continues without it. To send the missing data "
            "later, run `%s`",
            self._record.run.uri,
            problem,
            upload_command(self._record.path),
        )


def start(run: RunInfo, run_id: str | None = None) -> MlflowTracker:
    """Opens a run on the server that the environment names, and its record beside the history.

    If an earlier run in the same folder was not sent completely, its data is sent first.

    Args:
        run: the training run. The names of nested parameters are joined with dots.
        run_id: id of the run to resume. If the server does not have it, a warning is logged and a
            new run is opened.

    Raises:
        UsageError: mlflow is not installed, or the server does not respond or rejects the run.
        DataError: the record is not a valid record.
        LockedError: another process has the record open.
        OutputError: the record cannot be written.
    """
    variables = TRACKERS["mlflow"].variables
    uri = os.environ["MLFLOW_TRACKING_URI"]
    experiment_id = os.environ.get("MLFLOW_EXPERIMENT_ID") or None
    experiment = experiment_id or os.environ["MLFLOW_EXPERIMENT_NAME"]
    load_mlflow("MLFLOW_TRACKING_URI is set", "unset it")
    with contextlib.ExitStack() as stack:
        record = RunRecord(run.history.with_name(f"{run.name}{RECORD_SUFFIX}"))
        stack.callback(record.close)
        try:
            earlier = record.data
            if earlier is not None and not earlier.closed and earlier.run_id != run_id:
                _finish_earlier(record, uri)
            opened = _open(uri, experiment_id or _named_experiment(uri, experiment), run, run_id)
        except TrackingError as error:
            raise UsageError(
                f"MLflow at {without_password(uri)} did not open a run in experiment "
                f"{experiment!r} ({error}); start the server, correct {' and '.join(variables)}, "
                "or unset them to train without tracking"
            ) from error
        resumed = opened.info.run_id == run_id
        record.begin(
            RunData(
                run_id=opened.info.run_id,
                uri=without_password(uri),
                experiment=opened.info.experiment_id,
                name=opened.info.run_name,
                history=run.history.name,
                earlier_history=(
                    file_digest(run.history) if run.history.exists() and not resumed else ""
                ),
                changed_ms=now_ms(),
            )
        )
        timeout_s = _TIMEOUTS_AT_END * float(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"])
        tracker = MlflowTracker(opened, record, timeout_s)
        stack.pop_all()
        return tracker


def _finish_earlier(record: RunRecord, uri: str) -> None:
    try:
        finish_run(record, uri)
    except RefusedError as error:
        log.warning("an earlier run in this folder is abandoned: %s", error)


def _named_experiment(uri: str, name: str) -> str:
    """Returns the id of an experiment, which is created if the server does not have it."""
    from mlflow.exceptions import MlflowException

    with _tracking_errors(uri):
        client = _client(uri)
        found = client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(client.create_experiment(name))
            except MlflowException:
                found = client.get_experiment_by_name(name)  # another run has just created it
                if found is None:
                    raise
        return str(found.experiment_id)


def _open(uri: str, experiment: str, info: RunInfo, run_id: str | None) -> MlflowRun:
    """Returns the run to resume, or a new one, with its parameters recorded."""
    shown, params = without_password(uri), dict(_flat(info.params))
    run = None if run_id is None else MlflowRun.find(uri, run_id)
    if run is not None:
        kept = run.begin(params)
        changed = [f"; parameter {key} stays {old}, now {params[key]}" for key, old in kept.items()]
        log.info("resuming MLflow run %s at %s%s", run_id, shown, "".join(changed))
        return run
    if run_id is not None:
        log.warning("MLflow at %s has no run %s to resume; opening a new run", shown, run_id)
    run = MlflowRun.create(uri, experiment, info)
    run.begin(params)
    log.info("tracked by MLflow at %s, experiment %s, run %s", shown, experiment, run.info.run_id)
    return run


def upload_command(record: Path) -> str:
    """Returns the command that sends the missing data of a run."""
    return shlex.join(["pupilseg", "upload-run", str(record)])


def load_mlflow(why: str, otherwise: str) -> None:
    """Imports mlflow, which takes seconds, with timeouts that suit a training run.

    Args:
        why: reason why it is needed, which starts the error message.
        otherwise: alternative to installing it.

    Raises:
        UsageError: it is not installed.
    """
    for variable, value in _DEFAULTS.items():
        os.environ.setdefault(variable, value)
    try:
        import mlflow.tracking  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"{why}, but the package {error.name} is not installed; run "
            f"`pip install 'pupilseg[track]'`, or {otherwise}"
        ) from error


def without_password(uri: str) -> str:
    """Returns a URI without user and password, for messages and files."""
    return uri.replace(_credentials(uri), "", 1)


def _credentials(uri: str) -> str:
    """Returns the part `user:password@` of a URI, or an empty string.

    `urlsplit` is not used, because it ends the host at an unquoted `/`, `#` or `?` in a password
    and takes the rest of the password for the path.
    """
    _, separator, rest = uri.partition("://")
    if not separator or re.match(r"[^/:@]*(:\d+)?(/|$)", rest):  # a host comes first
        return ""
    return rest[: rest.rfind("@") + 1]


def _client(uri: str) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


@contextlib.contextmanager
def _tracking_errors(uri: str) -> Iterator[None]:
    """Converts errors of mlflow to one-line errors of this module without a password.

    Raises:
        NoAnswerError: there was no response to a request.
        RefusedError: the request was rejected, or a file cannot be read.
    """
    from mlflow.exceptions import MlflowException
    from requests import HTTPError

    try:
        yield
    except (MlflowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        # requests repeats the whole request around the cause, twice.
        _, caused, cause = reason.rpartition("(Caused by ")
        reason = cause.rstrip(")\"'") if caused else reason
        reason = reason.replace(_credentials(uri) or "\n", "")
        refused = isinstance(error, HTTPError | FileNotFoundError | PermissionError) or (
            isinstance(error, MlflowException) and error.error_code not in _TRANSIENT
        )
        raise (RefusedError if refused else NoAnswerError)(reason) from error


def _flat(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields flattened parameter names and values as text, as MLflow stores them."""
    for key, value in params.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, _text(value)


def _text(value: Any) -> str:
    """Returns a parameter as text; a long text is truncated, with a mark at its end."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    if len(text) <= _MAX_PARAM:
        return text
    mark = f"... (cut, {len(text)} characters)"
    return text[: _MAX_PARAM - len(mark)] + mark
