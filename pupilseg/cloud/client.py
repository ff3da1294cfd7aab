"""The local side of `modal run`: command lines, checks, and downloading results.

A machine that only starts containers needs no package except modal, so this module imports only the
standard library and light modules of pupilseg.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import re
import secrets
import sys
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pupilseg.cli.program import positive_int
from pupilseg.cli.train_flags import add_config_flags, add_start_flags, config_from
from pupilseg.errors import PupilSegError, UsageError
from pupilseg.files import atomic_path
from pupilseg.tracking import TRACKERS
from pupilseg.weights import initial_path

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import modal

GPUS = "L40S,A100,H100"
"""GPU types to try, in order."""
RESULT = "result.json"
"""File with the result of a run and the names of its files; written last to the run's folder."""
INITIAL = "initial"
"""Name, without suffix, of the model file with initial weights in a run's folder."""
_RUN_NAME = re.compile(r"\w[\w.-]*")


def words_after(script: str, argv: Sequence[str]) -> list[str]:
    """Returns the words after a script on a command line; empty in a container.

    Args:
        script: name of the script without folder and suffix.
        argv: such as `modal run --detach training/train_ellipse.py --epochs 3`.
    """
    for position, word in enumerate(argv):
        if script in re.split(r"\W+", word.partition("::")[0]):
            return list(argv[position + 1 :])
    return []


def parse_training(
    model: str, words: Sequence[str], data_volume: str, checkpoint_volume: str
) -> tuple[argparse.Namespace, list[str]]:
    """Parses the command line of a training app.

    Args:
        model: name in `pupilseg.models`.
        words: the words after the script.
        data_volume: name of the data volume, for the help text.
        checkpoint_volume: name of the checkpoint volume, for the help text.

    Returns:
        All parsed flags; and the unparsed flags of the training run itself, which the container
        parses again.

    Raises:
        UsageError: a value is out of range.
    """
    modal_only = _data_flags(data_volume)
    modal_only.add_argument(
        "--gpu", default=GPUS, help="GPU types to try, in order (default: %(default)s)"
    )
    modal_only.add_argument(
        "--output-dir",
        "--checkpoint-dir",
        type=Path,
        default=Path("checkpoints"),
        help="local directory for the checkpoints and the ONNX file (default: ./checkpoints)",
    )
    modal_only.add_argument(
        "--resume",
        metavar="RUN",
        help=f"resume a run of the volume {checkpoint_volume}, or download its files",
    )
    shared = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_config_flags(shared)
    add_start_flags(shared)
    parser = argparse.ArgumentParser(
        prog=f"modal run training/train_{model}.py",
        description=f"Train {model} on a rented GPU.",
        epilog="Flags of the group `train` in params.yaml default to the values there. The run is "
        f"tracked if {' and '.join(TRACKERS['mlflow'].variables)} are set in this shell or by a "
        "secret.",
        parents=[modal_only, shared],
        allow_abbrev=False,
    )
    args = parser.parse_args(words)
    config_from(args, model)
    return args, modal_only.parse_known_args(words)[1]


def parse_materializing(words: Sequence[str], data_volume: str) -> argparse.Namespace:
    """Parses the command line of the app that builds shards."""
    parser = argparse.ArgumentParser(
        prog="modal run pipeline/materialize_modal.py",
        description="Build the shards of a data set in many containers.",
        parents=[_data_flags(data_volume)],
        allow_abbrev=False,
    )
    parser.add_argument(
        "--rows-per-shard",
        type=positive_int,
        metavar="N",
        help="samples per file (default: as for pipeline.materialize)",
    )
    return parser.parse_args(words)


def _data_flags(data_volume: str) -> argparse.ArgumentParser:
    """Returns a parent parser with the flags of all apps."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(
        "--dataset",
        help="owner/name[@revision] or synthetic:N[@seed] (default: shards uploaded to the volume, "
        "or else the source in params.yaml)",
    )
    parser.add_argument(
        "--data-dir",
        default="/",
        help=f"folder of the volume {data_volume} that holds the data set (default: %(default)s)",
    )
    parser.add_argument(
        "--secret",
        type=names,
        default=[],
        help="names of Modal secrets, such as mlflow,huggingface (default: none)",
    )
    return parser


def names(text: str) -> list[str]:
    """Splits a comma-separated list of names."""
    return [name.strip() for name in text.split(",") if name.strip()]


@contextmanager
def errors_reported() -> Iterator[None]:
    """Exits with a message and an exit code on errors that the user can fix."""
    try:
        yield
    except PupilSegError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from None


def warn_about_tracking(variables: Mapping[str, str], named_secrets: Sequence[str]) -> None:
    """Warns if a run is not tracked, or if a container cannot reach the tracking server.

    Args:
        variables: result of `tracking.enabling_variables`.
        named_secrets: value of `--secret`; secrets may enable tracking too.
    """
    for name, value in variables.items():
        if name.endswith("_URI") and is_on_this_machine(value):
            _warn(
                f"{name} names a server or folder on this machine, which a container cannot reach; "
                "set the address of a server that it can reach, or pass --no-mlflow"
            )
    if not variables and not named_secrets:
        needed = ", or ".join(" and ".join(entry.variables) for entry in TRACKERS.values())
        _warn(f"not tracked: set {needed} in this shell, or pass a secret with them as --secret")


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def is_on_this_machine(uri: str) -> bool:
    """Returns True for a tracking URI that refers to this machine.

    These are loopback addresses, files, and plain paths.
    """
    parts = urlsplit(uri)
    if uri == "databricks":  # the name of a service, see `mlflow.set_tracking_uri`
        return False
    if parts.scheme in ("", "file", "sqlite"):
        return True
    host = parts.hostname or ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def checked(answer: dict[str, Any]) -> dict[str, Any]:
    """Returns the answer of a job unless it is an error.

    Raises:
        PupilSegError: the answer is an error; the exception has its exit code.
    """
    if "error" in answer:
        error = PupilSegError(answer["error"])
        error.exit_code = answer["exit_code"]
        raise error
    return answer


def remote_dataset(dataset: str | None, data_volume: str) -> str | None:
    """Returns a data set that a container can read.

    Raises:
        UsageError: it is a folder on this machine.
    """
    if dataset is not None and Path(dataset).expanduser().is_dir():
        raise UsageError(
            f"--dataset {dataset} is a folder on this machine, which a container cannot read; "
            "build its shards here with pipeline.download and pipeline.materialize, then run: "
            f"modal volume put {data_volume} data/shards /shards"
        )
    return dataset


def folder_prefix(data_dir: str) -> str:
    """Returns a folder of a volume as a prefix of paths: "" or "/a/b".

    Raises:
        UsageError: the path contains "." or "..".
    """
    parts = [part for part in data_dir.split("/") if part]
    if not {".", ".."}.isdisjoint(parts):
        raise UsageError(f"--data-dir {data_dir} must be a folder in the volume, such as /trial")
    return "".join(f"/{part}" for part in parts)


def exists(volume: modal.Volume, path: str) -> bool:
    """Returns True if a file or folder exists in a volume."""
    at = PurePosixPath("/")
    for part in PurePosixPath("/", path).parts[1:]:
        if part not in {PurePosixPath(entry.path).name for entry in volume.listdir(str(at))}:
            return False
        at /= part
    return True


def run_name(model: str, resume: str | None, volume: modal.Volume, volume_name: str) -> str:
    """Returns the name of the run to resume, or a new name.

    Raises:
        UsageError: the run does not exist, or is a run of another network.
    """
    if resume is None:
        return f"{model}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    if not _RUN_NAME.fullmatch(resume) or not exists(volume, resume):
        raise UsageError(f"run {resume} does not exist; see: modal volume ls {volume_name}")
    if resume.partition("-")[0] != model:
        raise UsageError(
            f"run {resume} is not a run of {model}; pass a run whose name begins with {model}-"
        )
    return resume


def initial_file(model: str, init: str | Path) -> Path:
    """Returns the local model file that `--init` refers to.

    Raises:
        UsageError: the file does not exist.
    """
    path = initial_path(model, init)
    if not path.is_file():
        raise UsageError(f"--init {path} does not exist; pass a model file (*.pt)")
    return path


def upload_initial(volume: modal.Volume, run: str, path: Path) -> None:
    """Uploads the model file with initial weights to a run's folder."""
    with volume.batch_upload(force=True) as batch:
        batch.put_file(path, f"/{run}/{INITIAL}{path.suffix}")


def result_of(volume: modal.Volume, run: str) -> dict[str, Any] | None:
    """Returns the result of a finished run; None if it is not finished."""
    if not exists(volume, f"{run}/{RESULT}"):
        return None
    result: dict[str, Any] = json.loads(b"".join(volume.read_file(f"{run}/{RESULT}")))
    return result


def download_files(
    volume: modal.Volume, run: str, result: Mapping[str, Any], output_dir: Path
) -> dict[str, Path]:
    """Downloads a run's files to a folder; returns their paths by name.

    Raises:
        OutputError: the folder cannot be written.
    """
    paths = {name: output_dir / Path(name).name for name in result["files"]}
    for name, path in paths.items():
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            for block in volume.read_file(f"{run}/{name}"):
                file.write(block)
    return paths
