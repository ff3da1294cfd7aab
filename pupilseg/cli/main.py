"""The command `pupilseg`: predict, view, info, bench, shards, upload-run."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pupilseg import __version__
from pupilseg.cli.predict import add_predict_commands
from pupilseg.cli.program import main_program
from pupilseg.cli.shards import add_shards_command

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code.

    Args:
        argv: without the program's name; None takes `sys.argv`.

    Returns:
        0 done; 1 data, disk, or a file of several that could not be read; 2 a request that cannot
        be met; 130 interrupted.
    """
    try:
        main_program(lambda: _command(argv))
    except SystemExit as end:  # how `main_program` and argparse hand over the code
        return int(end.code or 0)


def _command(argv: Sequence[str] | None) -> int:
    """Parses the arguments and runs what they ask for."""
    # What is wrong with a file we say ourselves; OpenCV reads these when it is imported.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    args = _parser().parse_args(argv)
    code: int = args.command(args)
    return code


def _parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="pupilseg", description="Find the pupil in near-infrared eye images."
    )
    parser.add_argument("--version", action="version", version=f"pupilseg {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    add_predict_commands(commands)
    add_shards_command(commands)

    upload = commands.add_parser(
        "upload-run",
        help="send to MLflow what it missed of a training run",
        description="Sends what an MLflow server that was down missed of training runs (numbers, "
        "files, status), and removes the files that held it. What the server has is not sent "
        "again. Set MLFLOW_TRACKING_URI if the server has another address now.",
    )
    upload.add_argument(
        "path", type=Path, help="directory with checkpoints, or a *_mlflow.jsonl in one"
    )
    upload.set_defaults(command=_upload_run)
    return parser


def _upload_run(args: argparse.Namespace) -> int:
    """Sends what a server missed, and says what that was."""
    from pupilseg.tracking.upload import upload

    done = upload(args.path, os.environ.get("MLFLOW_TRACKING_URI"))
    for sent in done:
        print(
            f"run {sent.run_id} ({sent.name}) at {sent.uri}: {sent.epochs} epochs and "
            f"{sent.artifacts} files sent"
        )
    if not done:
        print(f"{args.path}: nothing left to send")
    return 0


if __name__ == "__main__":
    sys.exit(main())
