"""Jobs that run in containers: preparing data, training, exporting.

Volumes are folders here. This module does not depend on Modal, so tests can call it directly. A job
returns plain values. An error that the user can fix is returned too (`as_answer`), because Modal
would retry a job that raises, on a rented GPU.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NoReturn

from pupilseg.cli.program import log_to_stderr
from pupilseg.cli.train_flags import add_train_flags, config_from
from pupilseg.cli.train_run import run_training
from pupilseg.cloud.client import INITIAL, RESULT
from pupilseg.errors import DataError, PupilSegError, UsageError
from pupilseg.export.onnx import export_onnx
from pupilseg.files import LOCK_NAME, output_errors, read_json, write_json
from pupilseg.model_files.checkpoint import read_card
from pupilseg.models import model_entry
from pupilseg.prepare import ensure_shards, shard_jobs
from pupilseg.shards.format import MANIFEST, SUMS
from pupilseg.shards.manifest import is_complete, read_manifest
from pupilseg.shards.writer import count_shards, write_part
from pupilseg.sources import RECORD, SPLITS, SourceOptions, download, parse_source

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

PART = 4
"""Number of shards per call of `write_shards_part`: 256 frames, or more for large data sets."""
_COPIES = 8
"""Number of files copied at the same time, since copying mostly waits for the network."""
_GROUPS = ("download", "materialize", "train")


@dataclass(frozen=True, slots=True)
class Data:
    """The shards that a job needs, and their location.

    Attributes:
        folder: data directory of `ensure_shards`.
        dataset: data source, see `sources.FORMS`; None uses the shards in `folder`, or else the
            source in `params`.
        params: path of a parameter file with the groups of `params.yaml`.
        hint: how to use another data set, for error messages.
        workers: number of processes that build shards.
        rows_per_shard: see `write_shards`.
    """

    folder: Path
    dataset: str | None
    params: Path
    hint: str
    workers: int
    rows_per_shard: int | None = None

    @property
    def shards(self) -> Path:
        """Directory of the shards."""
        return self.folder / "shards"

    @property
    def raw(self) -> Path:
        """Directory of the download."""
        return self.folder / "raw"


def as_answer(job: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Runs a job; returns its result, or `error` and `exit_code` on an error the user can fix."""
    log_to_stderr()
    try:
        return job()
    except PupilSegError as error:
        return {"error": str(error), "exit_code": error.exit_code}


def read_params(path: Path) -> dict[str, dict[str, Any]]:
    """Returns the groups of a parameter file.

    Raises:
        DataError: the file is missing, not YAML, or lacks a group.
    """
    import yaml

    try:
        groups = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise DataError(f"cannot read {path}: {error}; restore it from the repository") from error
    missing = [name for name in _GROUPS if not isinstance((groups or {}).get(name), dict)]
    if missing:
        raise DataError(f"{path} has no group {missing[0]!r}; restore it from the repository")
    return {name: groups[name] for name in _GROUPS}


class _Parser(argparse.ArgumentParser):
    """A parser that raises errors instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parse_flags(flags: list[str], params: Path) -> argparse.Namespace:
    """Parses the flags of a training run, with defaults from the parameter file.

    Args:
        flags: words of the command line.
        params: path of the parameter file; each key of its group `train` is a flag.

    Raises:
        UsageError: a flag is unknown or has an invalid value.
        DataError: the parameter file is invalid.
    """
    parser = _Parser(prog="train", add_help=False, allow_abbrev=False)
    add_train_flags(parser)
    stored = [f"--{k.replace('_', '-')}={v}" for k, v in read_params(params)["train"].items()]
    return parser.parse_args([*stored, *flags])


def find_shards(data: Data) -> Path:
    """Returns the folder with the shards of both splits, which are built if they are missing.

    Uploaded shards are used unchanged.

    Raises:
        DataError: the folder holds the shards of another data set.
        PupilSegError: the errors of `ensure_shards`.
    """
    groups = read_params(data.params)
    options = _options(groups)
    source = _uploaded_source(data.shards)
    if source is not None:
        if data.dataset is not None and not _names(data.dataset, source, options):
            raise DataError(f"{data.folder} contains {source}, not {data.dataset}; {data.hint}")
        log.info("using the uploaded shards of %s in %s", source, data.shards)
        return data.shards
    return ensure_shards(
        data.folder,
        data.dataset or groups["download"]["source"],
        options=options,
        workers=data.workers,
        rows_per_shard=data.rows_per_shard,
        preprocessing=groups["materialize"]["preprocessing"],
        max_bad=groups["materialize"]["max_bad"],
        progress=False,
        hint=data.hint,
    )


def _options(groups: dict[str, dict[str, Any]]) -> SourceOptions:
    return SourceOptions(validation_fraction=groups["download"]["validation_fraction"])


def _uploaded_source(shards: Path) -> str | None:
    """Returns the source of complete shards that were uploaded; None if there are none.

    Uploaded shards have no record (`pipeline.materialize` writes none), or a record of a local
    folder, which a container cannot read.
    """
    if not all(is_complete(shards / split) for split in SPLITS):
        return None
    record = shards / RECORD
    if record.is_file():
        request = read_json(record, hint="remove it").get("request")
        if not isinstance(request, dict) or request.get("kind") != "folder":
            return None
    source: str = read_manifest(shards / "train")["source"]
    return source


def _names(dataset: str, source: str, options: SourceOptions) -> bool:
    """Returns True if `source`, recorded in shards, is the requested data set."""
    requested = parse_source(dataset)
    if requested.kind == "synthetic" and requested.seed is None:
        return source == f"{requested}@{options.seed}"
    if requested.kind == "hub" and requested.revision is None:
        return source.startswith(f"{requested.location}@")
    return source == str(requested)


def prepare(data: Data, model: str, flags: list[str]) -> dict[str, Any]:
    """Finds the shards of a run, after checking its flags to avoid a useless download.

    Returns:
        rows: number of frames by split.
    """
    config_from(parse_flags(flags, data.params), model)
    shards = find_shards(data)
    return {"rows": {split: read_manifest(shards / split)["rows"] for split in SPLITS}}


def train(
    data: Data, model: str, flags: list[str], run_dir: Path, print_line: Callable[[str], None]
) -> dict[str, Any]:
    """Trains a network, writes it to the run's folder and exports it; resumes interrupted runs.

    Args:
        data: shards to train on.
        model: name in `pupilseg.models`.
        flags: words of the command line, for `add_train_flags`.
        run_dir: receives the files of a training run, the ONNX file and `RESULT`. It may contain
            `INITIAL`.
        print_line: prints a line of output; called after the files of an epoch are written.

    Returns:
        A dictionary with model, best and onnx (file names), metrics (of the best epoch), bytes and
        parity (of the ONNX file), and files (names).

    Raises:
        InterruptedError: the container is being stopped; another call resumes the run.
        PupilSegError: the run cannot start or continue.
    """
    result_file = run_dir / RESULT
    if result_file.is_file():
        return read_json(result_file, hint="choose another run")
    args = parse_flags(flags, data.params)
    entry = model_entry(model)
    state = run_dir / entry.state_file
    if state.is_file():
        log.info("resuming %s", run_dir.name)
        args.resume = str(state)
    else:
        args.overwrite = True  # files of an attempt that was lost in its first epoch
    # The lock file of a lost container; locks do not work across containers on a volume.
    (run_dir / LOCK_NAME).unlink(missing_ok=True)
    args.init = next(run_dir.glob(f"{INITIAL}.*"), None)
    with TemporaryDirectory(prefix="shards-") as local:
        code = run_training(
            args, model, run_dir, lambda: copy_shards(find_shards(data), Path(local)), print_line
        )
        if code:
            raise InterruptedError(f"{run_dir.name} was stopped; the next attempt resumes it")
        best = run_dir / entry.best_file
        onnx = best.with_suffix(".onnx")
        exported = export_onnx(best, onnx, calibrate_on=Path(local) / "validation")
    result = {
        "model": model,
        "best": best.name,
        "onnx": onnx.name,
        "bytes": exported.bytes,
        "parity": exported.parity,
        "metrics": read_card(best).metrics,
        "files": sorted(
            path.name
            for path in run_dir.iterdir()
            if path.is_file() and not path.name.startswith(".") and path.stem != INITIAL
        ),
    }
    write_json(result_file, result)
    return result


def copy_shards(shards: Path, to: Path) -> Path:
    """Copies shards to the local disk, several files at the same time; returns the new folder.

    A memory-mapped file on a network file system would be read page by page, and again in
    each epoch if a split does not fit on the device.
    """
    begin = time.monotonic()
    pairs = []
    for split in SPLITS:
        (to / split).mkdir(parents=True)
        names = [entry["file"] for entry in read_manifest(shards / split)["files"]]
        pairs += [(shards / split / name, to / split / name) for name in (*names, SUMS, MANIFEST)]
    with output_errors(to / MANIFEST), ThreadPoolExecutor(_COPIES) as pool:
        for _ in pool.map(lambda pair: shutil.copyfile(*pair), pairs):
            pass
    size = sum(target.stat().st_size for _, target in pairs)
    log.info("%.2f GB of shards copied in %.1f s", size / 1e9, time.monotonic() - begin)
    return to


def fetch(data: Data) -> dict[str, Any]:
    """Downloads a data set and divides it into parts for `write_shards_part`.

    Returns:
        parts: (split, first shard, last shard + 1) of each part; empty if the shards are complete.
    """
    groups = read_params(data.params)
    if all(is_complete(data.shards / split) for split in SPLITS):
        return {"parts": []}
    download(data.dataset or groups["download"]["source"], data.raw, options=_options(groups))
    parts = []
    for split, job in _jobs(data).items():
        count = count_shards(job)
        parts += [[split, at, min(at + PART, count)] for at in range(0, count, PART)]
    return {"parts": parts}


def write_shards_part(data: Data, split: str, start: int, stop: int) -> dict[str, Any]:
    """Builds shards start .. stop - 1 of a split of a downloaded data set.

    Returns:
        rows: number of samples in these shards.
    """
    return {"rows": write_part(_jobs(data)[split], range(start, stop), workers=data.workers)}


def _jobs(data: Data) -> dict[str, Any]:
    materialize = read_params(data.params)["materialize"]
    return shard_jobs(
        data.raw,
        data.shards,
        rows_per_shard=data.rows_per_shard,
        preprocessing=materialize["preprocessing"],
        max_bad=materialize["max_bad"],
    )
