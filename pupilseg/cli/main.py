"""The command `pupilseg`."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from pupilseg import __version__
from pupilseg.cli.predict import add_predict_commands
from pupilseg.cli.program import main_program
from pupilseg.cli.shards import add_shards_command

if TYPE_CHECKING:
    from collections.abc import Sequence

PIPELINE = {
    "download": "download a data source",
    "materialize": "build shards from a downloaded source",
    "train": "train a network",
    "evaluate": "score a model and write a report",
    "export": "export a trained network to ONNX or safetensors",
}
"""Commands that are also stages of the pipeline; each is `COMMAND` in the module of that name.

The module is imported only to run its command, because the other commands need neither torch nor
pyarrow."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code.

    Args:
        argv: arguments without the program name; None uses `sys.argv`.

    Returns:
        0: success. 1: an error in data, disk or network, or a file that could not be read.
        2: invalid arguments. 130: interrupted.
    """
    try:
        main_program(lambda: _command(argv))
    except SystemExit as end:  # raised by `main_program` and argparse
        return int(end.code or 0)


def _command(argv: Sequence[str] | None) -> int:
    # pupilseg itself reports errors in files. OpenCV reads these variables when it is imported.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    words = sys.argv[1:] if argv is None else argv
    args = _parser(words).parse_args(words)
    code: int = args.command(args)
    return code


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """Returns the parser, with the flags of the pipeline command that `words` starts with."""
    parser = argparse.ArgumentParser(
        prog="pupilseg", description="Find the pupil in near-infrared eye images."
    )
    parser.add_argument("--version", action="version", version=f"pupilseg {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    add_predict_commands(commands)
    add_shards_command(commands)
    for name, summary in PIPELINE.items():
        parser_of_command = commands.add_parser(name, help=summary)
        if words and words[0] == name:
            import_module(f"pupilseg.cli.{name}").COMMAND.set_up(parser_of_command)

    upload = commands.add_parser(
        "upload-run",
        help="send data of a training run that MLflow is missing",
        description="Compares training runs with their MLflow server, sends the missing metrics, "
        "files and status (because the server was down or the process was killed), and closes the "
        "runs. Set MLFLOW_TRACKING_URI if the address of the server has changed.",
    )
    upload.add_argument(
        "path", type=Path, help="directory with checkpoints, or a *_mlflow_run.json file in it"
    )
    upload.set_defaults(command=_upload_run)
    return parser


def _upload_run(args: argparse.Namespace) -> int:
    from pupilseg.tracking.upload import upload

    lines = upload(args.path, os.environ.get("MLFLOW_TRACKING_URI"))
    for line in lines or [f"{args.path}: nothing to send"]:
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
