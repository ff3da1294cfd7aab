"""What the machine that asks for a rented GPU does itself: names, checks, and bringing files back.

Nothing but modal need be installed there, so this module imports the standard library alone.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import secrets
import sys
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from pupilseg.errors import PupilSegError, UsageError
from pupilseg.files import atomic_path
from pupilseg.weights import initial_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import modal

RESULT = "result.json"
"""Written last into a run's folder: what the run came to, and its files."""
INITIAL = "initial"
"""In a run's folder: the model file whose weights it starts from, without its suffix."""
_RUN = re.compile(r"\w[\w.-]*")


def read_flags(
    main: Callable[..., None], meaning: Mapping[str, str], argv: Sequence[str], program: str
) -> dict[str, Any]:
    """Returns the flags of an entrypoint on a command line, unparsed, before modal parses them.

    Hardware and secrets must be known when the app is made, and modal calls the entrypoint after
    that. `--help` is answered here: modal's own lists the flags without their meaning.

    Args:
        main: the entrypoint; each parameter is a flag.
        meaning: of each parameter.
        argv: words of the command line; those of others are skipped.
        program: shown by `--help`.
    """
    parser = argparse.ArgumentParser(prog=f"modal run {program}", allow_abbrev=False)
    for name, parameter in inspect.signature(main).parameters.items():
        flag, default = f"--{name.replace('_', '-')}", parameter.default
        shown = f" (default: {default})" if isinstance(default, str) else ""
        if isinstance(default, bool):
            action = argparse.BooleanOptionalAction
            parser.add_argument(flag, action=action, default=default, help=meaning[name])
        else:
            kind = "N" if "int" in parameter.annotation else name.split("_")[-1].upper()
            parser.add_argument(flag, default=default, metavar=kind, help=meaning[name] + shown)
    return vars(parser.parse_known_args(argv)[0])


@contextmanager
def errors_told() -> Iterator[None]:
    """Ends the program with a line and an exit code for what the user can mend."""
    try:
        yield
    except PupilSegError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from None


def checked(answer: dict[str, Any]) -> dict[str, Any]:
    """Returns what a job in a container answered.

    Raises:
        PupilSegError: the answer is an error, which keeps its exit code.
    """
    if "error" in answer:
        error = PupilSegError(answer["error"])
        error.exit_code = answer["exit_code"]
        raise error
    return answer


def remote_dataset(dataset: str | None, volume_name: str) -> str | None:
    """Returns a data set that a container can have.

    Raises:
        UsageError: it is a folder of this machine.
    """
    if dataset is not None and Path(dataset).expanduser().is_dir():
        raise UsageError(
            f"--dataset {dataset} is a folder of this machine, which a container does not see; "
            "make its shards here with pipeline.download and pipeline.materialize, then: "
            f"modal volume put {volume_name} data/shards /shards"
        )
    return dataset


def folder_prefix(data_dir: str) -> str:
    """Returns a folder of a volume as a prefix of paths: "" or "/a/b".

    Raises:
        UsageError: the path climbs.
    """
    parts = [part for part in data_dir.split("/") if part]
    if not {".", ".."}.isdisjoint(parts):
        raise UsageError(f"--data-dir {data_dir} must be a folder of the volume, such as /trial")
    return "".join(f"/{part}" for part in parts)


def present(volume: modal.Volume, path: str) -> bool:
    """Says whether a volume holds a file or folder."""
    at = PurePosixPath("/")
    for part in PurePosixPath("/", path).parts[1:]:
        if part not in {PurePosixPath(entry.path).name for entry in volume.listdir(str(at))}:
            return False
        at /= part
    return True


def run_name(model: str, resume: str | None, volume: modal.Volume, volume_name: str) -> str:
    """Returns the name of the run to go on with, or a new one.

    Raises:
        UsageError: there is no such run, or it is one of another network.
    """
    if resume is None:
        return f"{model}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    if not _RUN.fullmatch(resume) or not present(volume, resume):
        raise UsageError(f"there is no run {resume}; see: modal volume ls {volume_name}")
    if resume.partition("-")[0] != model:
        raise UsageError(f"run {resume} is not one of {model}; give one that begins with {model}-")
    return resume


def initial_file(model: str, init: str) -> Path:
    """Returns the model file that `--init` means; containers get no file of the package but code.

    Raises:
        UsageError: there is no such file.
    """
    path = initial_path(model, init)
    if not path.is_file():
        raise UsageError(f"--init {path}: there is no such file; give a model file (*.pt)")
    return path


def send_initial(volume: modal.Volume, run: str, path: Path) -> None:
    """Copies a model file into a run's folder, for the run to start from."""
    with volume.batch_upload(force=True) as batch:
        batch.put_file(path, f"/{run}/{INITIAL}{path.suffix}")


def result_of(volume: modal.Volume, run: str) -> dict[str, Any] | None:
    """Returns what a finished run came to; None for one that is not finished."""
    if not present(volume, f"{run}/{RESULT}"):
        return None
    result: dict[str, Any] = json.loads(b"".join(volume.read_file(f"{run}/{RESULT}")))
    return result


def bring(
    volume: modal.Volume, run: str, result: Mapping[str, Any], output_dir: Path
) -> dict[str, Path]:
    """Copies a run's files into a folder, under their names; returns their paths by name.

    Raises:
        OutputError: the folder cannot be written.
    """
    paths = {name: output_dir / Path(name).name for name in result["files"]}
    for name, path in paths.items():
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            for block in volume.read_file(f"{run}/{name}"):
                file.write(block)
    return paths
