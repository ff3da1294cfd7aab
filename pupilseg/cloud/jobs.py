"""What runs in a rented container: preparing data, training, exporting.

Volumes are folders here; nothing in this module knows Modal, and the tests call it as it is. A job
answers with plain values. An error that the user can mend becomes its answer too (`answered`):
raised, it would be tried again on a GPU that is paid for.
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
from pupilseg.cli.train import add_train_arguments, config_from, train_as_asked
from pupilseg.cloud.client import INITIAL, RESULT
from pupilseg.errors import DataError, PupilSegError, UsageError
from pupilseg.export.onnx import export_onnx
from pupilseg.files import output_errors, read_json, write_json
from pupilseg.model_files.checkpoint import CHECKPOINT_NAMES, read_card
from pupilseg.prepare import RECORD, ensure_shards, shard_jobs
from pupilseg.shards.format import MANIFEST, SUMS
from pupilseg.shards.manifest import is_complete, read_manifest
from pupilseg.shards.writer import count_shards, write_part
from pupilseg.sources import SPLITS, SourceOptions, download, parse_source

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

PART = 4
"""Shards that one call of `write_shards_part` makes: 256 frames, or more in a large data set."""
_COPIES = 8
"""Files copied at once: each waits for the network."""
_GROUPS = ("download", "materialize", "train")


@dataclass(frozen=True, slots=True)
class Data:
    """Which shards a job is to find, and where.

    Attributes:
        folder: data directory, as of `ensure_shards`.
        dataset: see `sources.FORMS`; None for shards that were put there, else `params`' source.
        params: file of parameters, in the groups of `params.yaml`.
        mend: how to make room for another source.
        workers: processes that make shards.
        rows_per_shard: as `write_shards`.
    """

    folder: Path
    dataset: str | None
    params: Path
    mend: str
    workers: int
    rows_per_shard: int | None = None

    @property
    def shards(self) -> Path:
        """Where the shards are, or will be."""
        return self.folder / "shards"

    @property
    def raw(self) -> Path:
        """Where the download is recorded."""
        return self.folder / "raw"


def answered(job: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Runs a job; returns its answer, or `error` and `exit_code` for what the user can mend."""
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


class _Flags(argparse.ArgumentParser):
    """A parser whose errors are answers, not exits."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parse_flags(flags: list[str], params: Path) -> argparse.Namespace:
    """Parses the flags of a training run, behind those that the group `train` of a file stands for.

    Raises:
        UsageError: an unknown flag or a bad value.
        DataError: as `read_params`.
    """
    parser = _Flags(prog="train", add_help=False, allow_abbrev=False)
    add_train_arguments(parser)
    stored = [f"--{k.replace('_', '-')}={v}" for k, v in read_params(params)["train"].items()]
    return parser.parse_args([*stored, *flags])


def find_shards(data: Data) -> Path:
    """Returns the folder with the shards of both splits; downloads and makes them if need be.

    Shards that were made elsewhere and put there are used as they are.

    Raises:
        DataError: there are shards of something else than what is asked for.
        PupilSegError: as `ensure_shards`.
    """
    groups = read_params(data.params)
    options = _options(groups)
    source = _source_put_there(data.shards)
    if source is not None:
        if data.dataset is not None and not _names(data.dataset, source, options):
            raise DataError(f"{data.folder} holds {source}, not {data.dataset}; {data.mend}")
        log.info("using the shards of %s that were put into %s", source, data.shards)
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
        mend=data.mend,
    )


def _options(groups: dict[str, dict[str, Any]]) -> SourceOptions:
    return SourceOptions(validation_fraction=groups["download"]["validation_fraction"])


def _source_put_there(shards: Path) -> str | None:
    """Returns the source of complete shards that were not made here; None where there are none.

    `pipeline.materialize` writes no record, and a folder cannot have been read here.
    """
    if not all(is_complete(shards / split) for split in SPLITS):
        return None
    record = shards / RECORD
    if record.is_file():
        request = read_json(record, mend="remove it").get("request")
        if not isinstance(request, dict) or request.get("kind") != "folder":
            return None
    source: str = read_manifest(shards / "train")["source"]
    return source


def _names(dataset: str, source: str, options: SourceOptions) -> bool:
    """Says whether a data set that is asked for is the one that shards were made from."""
    asked = parse_source(dataset)
    if asked.kind == "synthetic" and asked.seed is None:
        return source == f"{asked}@{options.seed}"
    if asked.kind == "hub" and asked.revision is None:
        return source.startswith(f"{asked.location}@")
    return source == str(asked)


def prepare(data: Data, model: str, flags: list[str]) -> dict[str, Any]:
    """Checks a run's flags, which should not cost a download, and finds its shards.

    Returns:
        rows: frames by split.
    """
    config_from(parse_flags(flags, data.params), model)
    shards = find_shards(data)
    return {"rows": {split: read_manifest(shards / split)["rows"] for split in SPLITS}}


def train(
    data: Data, model: str, flags: list[str], run_dir: Path, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Trains a network into a run's folder and exports it; goes on where an earlier call stopped.

    Args:
        data: to train on.
        model: name in `pupilseg.models`.
        flags: of `add_train_arguments`.
        run_dir: gets the files of a training run, the ONNX file and `RESULT`; may hold `INITIAL`.
        tell: prints a line; called after an epoch's files are written.

    Returns:
        model, best and onnx (file names), metrics of the best epoch, bytes and parity of the ONNX
        file, and files (names).

    Raises:
        InterruptedError: the container is being stopped; a further call goes on.
        PupilSegError: whatever keeps the run from starting, or from going on.
    """
    result_file = run_dir / RESULT
    if result_file.is_file():
        return read_json(result_file, mend="choose another run")
    args = parse_flags(flags, data.params)
    names = CHECKPOINT_NAMES[model]
    state = run_dir / names.state
    if state.is_file():
        log.info("going on with %s", run_dir.name)
        args.resume = str(state)
    args.init = next(run_dir.glob(f"{INITIAL}.*"), None)
    with TemporaryDirectory(prefix="shards-") as local:
        code = train_as_asked(
            args, model, run_dir, lambda: copy_shards(find_shards(data), Path(local)), tell
        )
        if code:
            raise InterruptedError(f"{run_dir.name} was stopped; the next attempt goes on with it")
        best = run_dir / names.best
        onnx = best.with_suffix(".onnx")
        exported = export_onnx(best, onnx, calibrate_on=Path(local) / "validation")
    result = {
        "model": model,
        "best": best.name,
        "onnx": onnx.name,
        "bytes": exported["bytes"],
        "parity": exported["parity"],
        "metrics": read_card(best)["metrics"],
        "files": sorted(
            path.name
            for path in run_dir.iterdir()
            if path.is_file() and not path.name.startswith(".") and path.stem != INITIAL
        ),
    }
    write_json(result_file, result)
    return result


def copy_shards(shards: Path, to: Path) -> Path:
    """Copies shards to the local disk, several files at once, and returns where.

    A mapped file on a network file system is read a page at a time, by each epoch anew where a
    split does not fit on the device. Nothing of the original is open afterwards.
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
    """Downloads a source and divides the making of its shards.

    Returns:
        parts: split, first shard and the one behind the last, of each; empty where shards are
            complete.
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
    """Makes the shards start .. stop - 1 of a split of a fetched source.

    Returns:
        rows: samples in them.
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
