"""Sends missing data of finished training runs to an MLflow server."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

from pupilseg.errors import DataError
from pupilseg.tracking.mlflow import (
    RefusedError,
    TrackingError,
    finish_run,
    load_mlflow,
    without_password,
)
from pupilseg.tracking.record import RECORD_SUFFIX, RunRecord

if TYPE_CHECKING:
    from pathlib import Path


def upload(path: Path, uri: str | None = None) -> list[str]:
    """Compares training runs with an MLflow server, sends the missing data, and closes the runs.

    A run whose process was killed is closed as KILLED.

    Args:
        path: a record written by training, or a directory with records.
        uri: address of the server; None uses the one in the record.

    Returns:
        One line of text for each run with missing data.

    Raises:
        UsageError: mlflow is not installed.
        DataError: `path` does not exist, or is another kind of file.
        LockedError: the run is still in progress.
        TrackingError: a server does not respond, does not have a run, or did not accept all of the
            data. Calling `upload` again sends the rest.
    """
    if not path.is_dir() and not (path.is_file() and path.name.endswith(RECORD_SUFFIX)):
        raise DataError(
            f"{path} {'is another kind of file' if path.exists() else 'does not exist'}; expected "
            f"a directory with checkpoints, or a file in it that ends in {RECORD_SUFFIX}"
        )
    files = sorted(path.glob(f"*{RECORD_SUFFIX}")) if path.is_dir() else [path]
    if files:
        load_mlflow("uploading a run needs mlflow", "run this on the machine that has it")
    done, problems = [], []
    for file in files:
        with closing(RunRecord(file)) as record:
            server = uri or record.run.uri
            try:
                sent = finish_run(record, server)
            except RefusedError as error:
                problems.append(str(error))
                continue
            if sent.epochs or sent.files or sent.closed:
                done.append(
                    f"run {record.run.run_id} ({record.run.name}) at {without_password(server)}: "
                    f"{len(sent.epochs)} epochs and {sent.files} files sent"
                )
    if problems:
        raise TrackingError("\n".join(problems))
    return done
