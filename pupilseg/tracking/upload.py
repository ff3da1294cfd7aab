"""Sends what an MLflow server missed of training runs, after they ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pupilseg.errors import DataError
from pupilseg.tracking.mlflow import (
    MlflowRun,
    NoAnswerError,
    RefusedError,
    TrackingError,
    without_password,
)
from pupilseg.tracking.outbox import send
from pupilseg.tracking.spool import SPOOL_SUFFIX, Spool
from pupilseg.tracking.tracker import load_mlflow, upload_command

if TYPE_CHECKING:
    from pathlib import Path

    from pupilseg.tracking.spool import SpooledRun


@dataclass(frozen=True, slots=True)
class Uploaded:
    """What was sent of a run.

    Attributes:
        run_id: of the run.
        uri: of the server.
        name: of the run.
        epochs: how many epochs' numbers.
        artifacts: how many files.
    """

    run_id: str
    uri: str
    name: str
    epochs: int
    artifacts: int


def upload(path: Path, uri: str | None = None) -> list[Uploaded]:
    """Sends what an MLflow server missed of training runs, and closes them; removes what is done.

    What the server already has is not sent again. A run whose process was killed is closed as
    KILLED.

    Args:
        path: file that `tracking.start` made, or a directory that holds such files.
        uri: of the server to send to; None takes that of the run.

    Returns:
        The runs; none where a directory holds nothing to be sent.

    Raises:
        UsageError: mlflow is not installed.
        DataError: there is no such file, or it is of another kind.
        LockedError: a run under way writes to it.
        TrackingError: a server does not answer, does not know a run, or refuses a part. What it
            took is noted, so that a second call sends the rest.
    """
    if not path.is_dir() and not (path.is_file() and path.name.endswith(SPOOL_SUFFIX)):
        raise DataError(
            f"{path} {'is another file' if path.exists() else 'does not exist'}; expected a "
            f"directory with checkpoints, or a file in it that ends in {SPOOL_SUFFIX} (and is "
            "removed when all of it was sent)"
        )
    files = sorted(path.glob(f"*{SPOOL_SUFFIX}")) if path.is_dir() else [path]
    if files:
        load_mlflow("a run is to be sent to MLflow", "run this where it is")
    done, problems = [], []
    for file in files:
        spool = Spool(file)
        try:
            for run in spool.unfinished():
                try:
                    done.append(_upload_run(spool, run, uri or run.uri))
                except RefusedError as error:
                    problems.append(str(error))
        finally:
            spool.close()
    if problems:
        raise TrackingError("\n".join(problems))
    return done


def _upload_run(spool: Spool, run: SpooledRun, uri: str) -> Uploaded:
    """Sends what is pending of a run.

    Raises:
        NoAnswerError: the server is gone.
        RefusedError: the server does not know the run, or refused a part.
    """
    shown = without_password(uri)
    try:
        server = MlflowRun.find(uri, run.id)
        if server is None:
            raise RefusedError(
                f"MLflow at {shown} has no run {run.id} ({run.name}, recorded at {run.uri}); if it "
                f"is another server, set MLFLOW_TRACKING_URI; if the run was deleted, restore it "
                f"with `mlflow runs restore --run-id {run.id}`, or give it up by deleting "
                f"{spool.path}"
            )
        records = spool.pending(run.id)
        if not run.ended and not any(record.kind == "end" for record in records):
            spool.add(run.id, "end", run.last_ms, {"status": "KILLED"})
            records = spool.pending(run.id)
        refused = send(server, spool, check_files=True)
    except NoAnswerError as error:
        raise NoAnswerError(
            f"MLflow at {shown} does not answer ({error}); nothing is lost: start it, or set "
            f"MLFLOW_TRACKING_URI, and run `{upload_command(spool.path)}` again"
        ) from error
    if refused:
        raise RefusedError(
            f"MLflow at {shown} has run {run.id}, but not all of it: {'; '.join(refused)}; mend "
            f"that and run `{upload_command(spool.path)}` again, or give it up by deleting "
            f"{spool.path}"
        )
    epochs = {record.data["step"] for record in records if record.kind == "epoch"}
    files = {
        (record.data["folder"], record.data["file"])
        for record in records
        if record.kind == "artifact"
    }
    return Uploaded(run.id, shown, run.name, len(epochs), len(files))
