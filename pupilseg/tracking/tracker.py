"""The interface of an experiment tracker, and the table of trackers."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

log = logging.getLogger(__name__)


class TrackerEntry(NamedTuple):
    """Describes where a tracker is implemented and how it is enabled.

    Attributes:
        module: defines `start(run: RunInfo, run_id: str | None) -> Tracker`, where `run_id` names
            the run to resume. It is imported only if the tracker is enabled.
        variables: environment variables that enable the tracker when all of them are set.
        credentials: environment variables with credentials, used if they are set.
        replacements: name of a variable -> name of another that may be set instead.
        options: environment variables that it uses if they are set.
    """

    module: str
    variables: tuple[str, ...]
    credentials: tuple[str, ...] = ()
    replacements: Mapping[str, str] = {}
    options: tuple[str, ...] = ()


TRACKERS = {
    "mlflow": TrackerEntry(
        module="pupilseg.tracking.mlflow",
        variables=("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID"),
        credentials=(
            "MLFLOW_TRACKING_USERNAME",
            "MLFLOW_TRACKING_PASSWORD",
            "MLFLOW_TRACKING_TOKEN",
        ),
        replacements={"MLFLOW_EXPERIMENT_ID": "MLFLOW_EXPERIMENT_NAME"},
        options=("MLFLOW_RUN_NAME",),
    ),
}
"""Name of a tracker -> entry. The notes of a run hold the tracker's run id under `NAME_run`."""


@dataclass(frozen=True, slots=True)
class RunInfo:
    """A training run, as trackers see it.

    Attributes:
        name: name of the network.
        params: training configuration, recorded once; values may be nested mappings.
        tags: short labels.
        history: CSV file with one row per epoch and a column `epoch`, counted from 1. The row is
            written before `Tracker.log_epoch` is called.
    """

    name: str
    params: Mapping[str, Any]
    tags: Mapping[str, str]
    history: Path


class Tracker(Protocol):
    """Records one training run. Methods log a warning on failure and never raise an error for it.

    Only `end` may wait for a server, for a limited time.
    """

    @property
    def run_id(self) -> str:
        """Id of the run, with which a later process can resume it."""

    def log_epoch(self, row: Mapping[str, float]) -> None:
        """Records the metrics of an epoch under step `row["epoch"]`."""

    def log_file(self, path: Path, folder: str = "") -> None:
        """Records a file.

        Args:
            path: path of the file. It may be read later, so it must not change except by an atomic
                replacement.
            folder: folder among the files of the run, with `/` between parts.
        """

    def end(self, status: str) -> None:
        """Closes the run as FINISHED, FAILED or KILLED."""


class Trackers:
    """The trackers of a run. Each method calls all of them.

    Args:
        trackers: name in `TRACKERS` -> tracker.
    """

    def __init__(self, trackers: Mapping[str, Tracker] | None = None) -> None:
        self._trackers = dict(trackers or {})

    def __bool__(self) -> bool:
        return bool(self._trackers)

    @property
    def notes(self) -> dict[str, str]:
        """The run id of each tracker, to pass to `start` when the run is resumed."""
        return {f"{name}_run": tracker.run_id for name, tracker in self._trackers.items()}

    def log_epoch(self, row: Mapping[str, float]) -> None:
        """See `Tracker.log_epoch`."""
        for tracker in self._trackers.values():
            tracker.log_epoch(row)

    def log_file(self, path: Path, folder: str = "") -> None:
        """See `Tracker.log_file`."""
        for tracker in self._trackers.values():
            tracker.log_file(path, folder)

    def end(self, status: str) -> None:
        """See `Tracker.end`."""
        for tracker in self._trackers.values():
            tracker.end(status)


def enabling_variables() -> dict[str, str]:
    """Returns the environment variables that enable trackers here, and those that they use.

    A process on another machine that gets these variables tracks its run in the same way. Empty if
    no tracker is enabled.
    """
    found: dict[str, str] = {}
    for entry in TRACKERS.values():
        if not _missing(entry):
            used = (*entry.variables, *entry.replacements.values())
            names = (*used, *entry.credentials, *entry.options)
            found |= {name: os.environ[name] for name in names if os.environ.get(name)}
    return found


def _missing(entry: TrackerEntry) -> list[str]:
    return [
        name
        for name in entry.variables
        if not (os.environ.get(name) or os.environ.get(entry.replacements.get(name, name)))
    ]


def start(run: RunInfo, notes: Mapping[str, str] | None = None) -> Trackers:
    """Starts the trackers that the environment enables; warns if there are none.

    Args:
        run: the training run.
        notes: `Trackers.notes` of the run to resume.

    Raises:
        PupilSegError: an enabled tracker cannot start.
    """
    started: dict[str, Tracker] = {}
    not_set = []
    try:
        for name, entry in TRACKERS.items():
            if missing := _missing(entry):
                not_set.append(" and ".join(missing))
            else:
                run_id = (notes or {}).get(f"{name}_run")
                started[name] = import_module(entry.module).start(run, run_id)
    except BaseException:
        Trackers(started).end("FAILED")
        raise
    if not started:
        log.warning("not tracked: set %s to track this run", ", or ".join(not_set))
    return Trackers(started)
