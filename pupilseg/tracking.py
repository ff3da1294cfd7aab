"""MLflow: a run of its own for each training run, when the environment asks for one.

Asked for by `MLFLOW_TRACKING_URI` and `MLFLOW_EXPERIMENT_ID` (this is the one module of the library
that reads the environment, and the one that imports mlflow). A server that cannot be reached at the
start is an error, since tracking was asked for; one that fails later costs a warning, never the
run, whose numbers are in the history file all the same.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from typing import TYPE_CHECKING, Any

from pupilseg.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

log = logging.getLogger(__name__)

VARIABLES = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID")
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
"""MLflow's own defaults, 7 retries of 120 s, hold a training run up for minutes."""
_MAX_PARAM = 6000
"""Longest parameter value that an MLflow store takes."""


class Tracker:
    """A run on an MLflow server, or nothing where none was asked for.

    Made by `start`. Times of metrics are those of the call.

    Attributes:
        run_id: of the MLflow run; None where nothing is tracked.
    """

    def __init__(self, client: Any = None, run_id: str | None = None) -> None:
        self._client, self.run_id = client, run_id
        self._broken = False

    def log_epoch(self, row: Mapping[str, float]) -> None:
        """Sends an epoch's finite numbers in one request, under step `row["epoch"]`."""
        if self._client is None:
            return
        from mlflow.entities import Metric

        now, step = int(1000 * time.time()), int(row["epoch"])
        metrics = [
            Metric(name, value, now, step)
            for name, value in row.items()
            if name != "epoch" and math.isfinite(value)
        ]
        self._send(lambda: self._client.log_batch(self.run_id, metrics=metrics))

    def log_file(self, path: Path) -> None:
        """Uploads a file as an artifact of the run."""
        if self._client is not None and path.exists():
            self._send(lambda: self._client.log_artifact(self.run_id, str(path)))

    def end(self, status: str) -> None:
        """Closes the run.

        Args:
            status: FINISHED, FAILED or KILLED.
        """
        if self._client is not None:
            self._send(lambda: self._client.set_terminated(self.run_id, status))

    def _send(self, request: Callable[[], object]) -> None:
        """Makes a request; the first that fails is told, and none is made after it."""
        if self._broken:
            return
        from mlflow.exceptions import MlflowException

        try:
            request()
        except (MlflowException, OSError) as error:
            self._broken = True
            log.warning(
                "MLflow stopped answering (%s); training goes on untracked, and its numbers are "
                "in the history file beside the model",
                str(error).splitlines()[0],
            )


def start(params: Mapping[str, Any], tags: Mapping[str, str], name: str) -> Tracker:
    """Opens a run on the server that the environment names.

    Args:
        params: recorded once, as text.
        tags: of the run.
        name: shown for the run.

    Returns:
        The run; or, with one warning, a tracker that does nothing where a variable is missing.

    Raises:
        UsageError: both variables are set, and mlflow is not installed or the server refuses.
    """
    missing = [variable for variable in VARIABLES if not os.environ.get(variable)]
    if missing:
        log.warning("not tracked: %s is not set", " and ".join(missing))
        return Tracker()
    uri, experiment = (os.environ[variable] for variable in VARIABLES)
    for variable, value in _PATIENCE.items():
        os.environ.setdefault(variable, value)
    try:
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient
    except ImportError as error:
        raise UsageError(
            f"MLFLOW_TRACKING_URI is set, but the package {error.name} is not installed; run "
            "`pip install 'pupilseg[track]'`, or unset it"
        ) from error
    try:
        client = MlflowClient(tracking_uri=uri)
        run_id = client.create_run(experiment, tags=dict(tags), run_name=name).info.run_id
        recorded = [Param(key, _text(value)) for key, value in params.items()]
        client.log_batch(run_id, params=recorded)
    except (MlflowException, OSError) as error:
        raise UsageError(
            f"MLflow at {uri} did not open a run in experiment {experiment!r} "
            f"({str(error).splitlines()[0]}); start the server, correct {' and '.join(VARIABLES)}, "
            "or unset them to train untracked"
        ) from error
    log.info("tracked by MLflow at %s, experiment %s, run %s", uri, experiment, run_id)
    return Tracker(client, run_id)


def _text(value: Any) -> str:
    """Returns a parameter's value as MLflow stores it."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:_MAX_PARAM]
