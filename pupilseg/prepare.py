"""Downloads a source and builds its shards if they are missing; the first step of training scripts.

DATA_DIR/raw/source.json            record of the source and where its files are
DATA_DIR/shards/{train,validation}  shards with their manifests
DATA_DIR/shards/source.json         the source and options of the shards; written last
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pupilseg.errors import DataError
from pupilseg.files import directory_lock, read_json, write_json
from pupilseg.preprocess import NONE, remaining_preprocessing
from pupilseg.shards.manifest import is_complete
from pupilseg.shards.writer import make_job, write_job
from pupilseg.sources import (
    RECORD,
    SPLITS,
    Source,
    SourceOptions,
    download,
    open_dataset,
    parse_source,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pupilseg.shards.build import Job

DATASET = "Conner/sddec25-01"
"""Default data set for training: OpenEDS on the Hub."""


def default_workers() -> int:
    """Returns the number of CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def write_splits(
    raw_dir: Path,
    out_dir: Path,
    *,
    workers: int | None = None,
    rows_per_shard: int | None = None,
    preprocessing: str = NONE,
    max_bad: int = 0,
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Builds the shards of both splits of a downloaded source; finished shards are kept.

    Args:
        raw_dir: contains `source.json`.
        out_dir: directory of `train/` and `validation/`.
        workers: number of processes; None for one per CPU.
        rows_per_shard: as `write_shards`.
        preprocessing: as `write_shards`.
        max_bad: as `write_shards`, for each split.
        progress: as `write_shards`.

    Returns:
        Split -> manifest.

    Raises:
        PupilSegError: as `open_dataset` and `write_shards`.
    """
    jobs = shard_jobs(
        raw_dir,
        out_dir,
        rows_per_shard=rows_per_shard,
        preprocessing=preprocessing,
        max_bad=max_bad,
    )
    processes = default_workers() if workers is None else workers
    return {
        split: write_job(job, workers=processes, progress=progress) for split, job in jobs.items()
    }


def shard_jobs(
    raw_dir: Path,
    out_dir: Path,
    *,
    rows_per_shard: int | None = None,
    preprocessing: str = NONE,
    max_bad: int = 0,
) -> dict[str, Job]:
    """Returns split -> job, for `write_part` to write some of the shards of `write_splits`.

    The arguments must be the same as those of `write_splits`.

    Raises:
        PupilSegError: as `open_dataset` and `make_job`.
    """
    dataset = open_dataset(raw_dir)
    recorded = read_json(Path(raw_dir) / RECORD, hint="download the source again")
    return {
        split: make_job(
            dataset,
            split,
            Path(out_dir) / split,
            rows_per_shard=rows_per_shard,
            preprocessing=preprocessing,
            max_bad=max_bad,
            source_options=recorded.get("options"),
        )
        for split in SPLITS
    }


def ensure_shards(
    data_dir: str | Path,
    source: str,
    *,
    revision: str | None = None,
    options: SourceOptions | None = None,
    workers: int | None = None,
    rows_per_shard: int | None = None,
    preprocessing: str = NONE,
    max_bad: int = 0,
    progress: bool = True,
    hint: str | None = None,
) -> Path:
    """Downloads a source and builds its shards if they are missing; returns the shards' directory.

    If the shards are complete, it returns immediately and needs neither the network nor the raw
    data. Several processes may call it at the same time: one does the work, the others wait.

    Args:
        data_dir: a directory for one source.
        source: one of `sources.FORMS`.
        revision: revision of a Hub source, if not in `source`.
        options: how the source is read; the defaults if None.
        workers: number of processes; None for one per CPU.
        rows_per_shard: as `write_shards`.
        preprocessing: as `write_shards`.
        max_bad: as `write_shards`, for each split.
        progress: as `write_shards`.
        hint: end of the error message if the directory contains another source; by default it names
            the flag of the local scripts and the folders to remove.

    Returns:
        `data_dir / "shards"`.

    Raises:
        DataError: the directory contains another source, or other options or preprocessing.
        PupilSegError: as `download` and `write_shards`.
    """
    data_dir = Path(data_dir).expanduser()
    shards = data_dir / "shards"
    options = options or SourceOptions()
    wanted = {"options": options.as_dict(), "preprocessing": preprocessing}
    hint = hint or (
        "use another --data-dir, or remove its contents: "
        + shlex.join(["rm", "-r", str(shards), str(data_dir / "raw")])
    )
    if _is_complete(shards, source, revision, wanted, hint):
        return shards
    with directory_lock(data_dir, wait=True):
        if _is_complete(shards, source, revision, wanted, hint):  # built while this one waited
            return shards
        raw = data_dir / "raw"
        download(source, raw, revision=revision, options=options, flag="--data-dir")
        manifests = write_splits(
            raw,
            shards,
            workers=workers,
            rows_per_shard=rows_per_shard,
            preprocessing=preprocessing,
            max_bad=max_bad,
            progress=progress,
        )
        recorded = read_json(raw / RECORD, hint="run the same command again")
        record = {
            "source": recorded["source"],
            "request": recorded["request"],
            "commit": recorded["commit"],
            "options": recorded["options"],
            "source_preprocessing": recorded["preprocessing"],
            "preprocessing": manifests["train"]["preprocessing"],
        }
        write_json(shards / RECORD, record)
    return shards


def _is_complete(
    shards: Path, text: str, revision: str | None, wanted: Mapping[str, Any], hint: str
) -> bool:
    """Returns True if the requested shards exist and are complete.

    Raises:
        DataError: there are shards of another source, or with other options.
    """
    path = shards / RECORD
    if not path.is_file():
        return False
    record = read_json(path, hint=hint)
    try:
        differs = _difference(record, text, revision, wanted)
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}); {hint}") from error
    if differs:
        raise DataError(f"{shards.parent} contains {differs}; {hint}")
    return all(is_complete(shards / split) for split in SPLITS)


def _difference(
    record: dict[str, Any], text: str, revision: str | None, wanted: Mapping[str, Any]
) -> str | None:
    """Describes how the recorded source differs from the requested one; None if it does not."""
    request = record["request"]
    folder = Path(text).expanduser()
    if request["kind"] == "folder" and str(folder.resolve()) == request["location"]:
        source = Source("folder", request["location"])  # may be gone, only the shards are needed
    else:
        source = parse_source(text, revision)
    # Rendered eyes without a seed in the source string use the seed of the options.
    seed = wanted["options"]["seed"] if source.seed is None else source.seed
    recorded_seed = record["options"]["seed"] if request["seed"] is None else request["seed"]
    same = (source.kind, source.location) == (request["kind"], request["location"])
    same = same and seed == recorded_seed
    if not same or source.revision not in (None, request["revision"], record["commit"]):
        return f"{record['source']}, not {source}"
    if record["options"] != wanted["options"]:
        return f"{record['source']} read with {record['options']}, not {wanted['options']}"
    _, preprocessing = remaining_preprocessing(
        record["source_preprocessing"], wanted["preprocessing"]
    )
    if record["preprocessing"] != preprocessing:
        return f"shards with preprocessing {record['preprocessing']}, not {preprocessing}"
    return None
