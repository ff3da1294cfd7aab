"""A run on an MLflow server: the one module that imports mlflow.

Its own asynchronous logging is not used: it holds what is to be sent in memory alone, ends by joins
without a limit, and its pool of threads is joined once more when the interpreter ends
(`mlflow/utils/async_logging/async_logging_queue.py`, 3.17).
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pupilseg.errors import PupilSegError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from pupilseg.tracking.spool import Record

METRICS_A_REQUEST = 1000
"""Most metrics that `log_batch` takes at once."""
_PASSING = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")
"""Error codes of MLflow that say nothing against the request itself; also that of no answer."""


class TrackingError(PupilSegError):
    """An MLflow server that does not answer or refuses."""


class NoAnswerError(TrackingError):
    """A server that is not there, hangs, or is not able to answer now."""


class RefusedError(TrackingError):
    """A server that understood and refused, or a file that could not be read."""


class MlflowRun:
    """A run on a server; made by `create` or `reopen`.

    Each method makes its requests at once and once, without a retry.

    Attributes:
        id: of the run.
        uri: of the server, as it may be shown: without user and password.
        experiment: id.
        name: shown for the run.

    Raises (every method):
        NoAnswerError: the server did not answer, or not within `MLFLOW_HTTP_REQUEST_TIMEOUT`.
        RefusedError: it refused.
    """

    def __init__(self, client: Any, uri: str, run: Any, *, fresh: bool) -> None:
        self._client, self._uri = client, uri
        self.uri, self.id = without_password(uri), run.info.run_id
        self.experiment, self.name = run.info.experiment_id, run.info.run_name
        self._params: Mapping[str, str] = run.data.params
        # Steps that the server has, by metric; None as long as it can have nothing but ours.
        self._there: dict[str, set[int]] | None = None if fresh else {}

    @classmethod
    def create(cls, uri: str, experiment: str, name: str, tags: Mapping[str, str]) -> MlflowRun:
        """Returns a new run.

        Args:
            uri: of the server.
            experiment: id of an experiment that is there.
            name: shown for the run.
            tags: of the run.
        """
        with _told(uri):
            client = _client(uri)
            run = client.create_run(experiment, tags=dict(tags), run_name=name)
        return cls(client, uri, run, fresh=True)

    @classmethod
    def find(cls, uri: str, run_id: str) -> MlflowRun | None:
        """Returns a run that is there, or None where the server has none, or a deleted one.

        Args:
            uri: of the server.
            run_id: of the run.
        """
        from mlflow.exceptions import MlflowException

        with _told(uri):
            client = _client(uri)
            try:
                run = client.get_run(run_id)
            except MlflowException as error:
                # INVALID_PARAMETER_VALUE: no run could have such an id.
                if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    return None
                raise
        return None if run.info.lifecycle_stage == "deleted" else cls(client, uri, run, fresh=False)

    def reopen(self) -> None:
        """Says that the run is under way again."""
        with _told(self._uri):
            self._client.update_run(self.id, status="RUNNING")

    def log_params(self, params: Mapping[str, str]) -> dict[str, str]:
        """Records the parameters that are not there yet, which no request can change later.

        Returns:
            What the server keeps of those whose value is another now.
        """
        from mlflow.entities import Param

        new = [Param(key, value) for key, value in params.items() if key not in self._params]
        with _told(self._uri):
            self._client.log_batch(self.id, params=new)
        return {k: v for k, v in self._params.items() if k in params and params[k] != v}

    def log_epochs(self, records: Sequence[Record]) -> None:
        """Records the numbers of epochs in one request, under their steps and times.

        A number that the server already has for that step is not sent again.

        Args:
            records: of kind epoch, with at most `METRICS_A_REQUEST` numbers in all.
        """
        from mlflow.entities import Metric

        new: dict[tuple[str, int], Metric] = {}
        with _told(self._uri):
            for record in records:
                step = record.data["step"]
                for key, value in record.data["metrics"].items():
                    if not self._has(key, step):
                        new.setdefault((key, step), Metric(key, value, record.time_ms, step))
            # Until the answer is there nobody knows whether the server took them.
            there, self._there = self._there, {}
            self._client.log_batch(self.id, metrics=list(new.values()))
        if there is not None:
            for key, step in new:
                there[key].add(step)
        self._there = there

    def log_artifact(self, path: Path, folder: str) -> None:
        """Uploads a file, in place of one of that name.

        Args:
            path: of the file, read as it is now.
            folder: of the run's artifacts; empty for the top.
        """
        with _told(self._uri):
            self._client.log_artifact(self.id, str(path), folder or None)

    def end(self, status: str, time_ms: int) -> None:
        """Closes the run.

        Args:
            status: FINISHED, FAILED or KILLED.
            time_ms: when it ended, in milliseconds since 1970.
        """
        with _told(self._uri):
            self._client.set_terminated(self.id, status, time_ms)

    def _has(self, key: str, step: int) -> bool:
        """Says whether the server has a number for a step; asks it once for each metric."""
        if self._there is None:
            return False
        if key not in self._there:
            history = self._client.get_metric_history(self.id, key)
            self._there[key] = {metric.step for metric in history}
        return step in self._there[key]


def load() -> None:
    """Imports mlflow, which takes seconds.

    Raises:
        ImportError: it is not installed.
    """
    import mlflow.tracking  # noqa: F401


def now_ms() -> int:
    """Returns the time in milliseconds since 1970."""
    return int(1000 * time.time())


def without_password(uri: str) -> str:
    """Returns an address as it may be shown and written: without user and password."""
    user, at, _ = urlsplit(uri).netloc.rpartition("@")
    return uri.replace(user + at, "", 1) if at else uri


def _client(uri: str) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


@contextlib.contextmanager
def _told(uri: str) -> Iterator[None]:
    """Turns what mlflow raises into the errors of this module, of one line and without a password.

    Raises:
        NoAnswerError: no answer, or none to the request.
        RefusedError: an answer against the request, or a file that cannot be read.
    """
    from mlflow.exceptions import MlflowException
    from requests import HTTPError

    try:
        yield
    except (MlflowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        # requests wraps what happened in the whole request, twice.
        _, caused, cause = reason.rpartition("(Caused by ")
        reason = cause.rstrip(")\"'") if caused else reason
        reason = reason.replace(uri, without_password(uri))
        refused = isinstance(error, HTTPError | FileNotFoundError | PermissionError) or (
            isinstance(error, MlflowException) and error.error_code not in _PASSING
        )
        raise (RefusedError if refused else NoAnswerError)(reason) from error
