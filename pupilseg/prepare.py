"""Downloads a source and makes its shards, once a data directory; what training scripts call first.

DATA_DIR/raw/source.json            what was downloaded, and where it lies
DATA_DIR/shards/{train,validation}  shards with their manifests
DATA_DIR/shards/source.json         what they were made from; written last
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pupilseg.errors import DataError
from pupilseg.files import directory_lock, read_json, write_json
from pupilseg.preprocess import NONE, remaining_preprocessing
from pupilseg.shards.manifest import is_complete
from pupilseg.shards.writer import make_job, write_job
from pupilseg.sources import SPLITS, Source, SourceOptions, download, open_dataset, parse_source

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pupilseg.shards.build import Job

RECORD = "source.json"
DATASET = "Conner/sddec25-01"
"""OpenEDS on the Hub: what is trained on where nothing else is asked for."""


def default_workers() -> int:
    """Returns the number of processors that this process may use."""
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
    """Makes the shards of both splits of a downloaded source; finished ones are kept.

    Args:
        raw_dir: holds `source.json`.
        out_dir: gets `train/` and `validation/`.
        workers: processes; None for one a processor.
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
    """Returns, by split, what `write_part` needs to write some of the shards of `write_splits`.

    The arguments are those of `write_splits`, and must be the same there.

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
    mend: str | None = None,
) -> Path:
    """Returns the directory with the shards of both splits; downloads and makes them if need be.

    When they are complete it returns at once and looks at neither the network nor the raw data,
    which may be gone. Several processes may call it at once: one works, the others wait.

    Args:
        data_dir: holds one source.
        source: see `sources.FORMS`.
        revision: of a Hub source, if not in `source`.
        options: how the source is read.
        workers: processes; None for one a processor.
        rows_per_shard: as `write_shards`.
        preprocessing: as `write_shards`.
        max_bad: as `write_shards`, for each split.
        progress: as `write_shards`.
        mend: how to make room for another source, to end the error with; None for the flag of the
            local scripts and the folders to remove.

    Returns:
        `data_dir / "shards"`.

    Raises:
        DataError: the directory holds another source, or the same read or preprocessed otherwise.
        PupilSegError: as `download` and `write_shards`.
    """
    data_dir = Path(data_dir).expanduser()
    shards = data_dir / "shards"
    options = options or SourceOptions()
    wanted = {"options": options.as_dict(), "preprocessing": preprocessing}
    mend = mend or (
        f"use another --data-dir, or remove what it holds: rm -r {shards} {data_dir / 'raw'}"
    )
    if _complete(shards, source, revision, wanted, mend):
        return shards
    with directory_lock(data_dir, wait=True):
        if _complete(shards, source, revision, wanted, mend):  # made while this process waited
            return shards
        raw = data_dir / "raw"
        download(source, raw, revision=revision, options=options)
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


def _complete(
    shards: Path, text: str, revision: str | None, wanted: Mapping[str, Any], mend: str
) -> bool:
    """Says whether the shards of what is wanted are there, complete.

    Raises:
        DataError: those of something else are there.
    """
    path = shards / RECORD
    if not path.is_file():
        return False
    record = read_json(path, hint=mend)
    try:
        differs = _difference(record, text, revision, wanted)
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}); {mend}") from error
    if differs:
        raise DataError(f"{shards.parent} holds {differs}; {mend}")
    return all(is_complete(shards / split) for split in SPLITS)


def _difference(
    record: dict[str, Any], text: str, revision: str | None, wanted: Mapping[str, Any]
) -> str | None:
    """Says in what the recorded source differs from the one asked for; None if in nothing."""
    request = record["request"]
    folder = Path(text).expanduser()
    if request["kind"] == "folder" and str(folder.resolve()) == request["location"]:
        source = Source("folder", request["location"])  # it may be gone: the shards are enough
    else:
        source = parse_source(text, revision)
    # A source that names no series of rendered eyes takes the options' one.
    seeds = [
        options["seed"] if seed is None else seed
        for seed, options in (
            (source.seed, wanted["options"]),
            (request["seed"], record["options"]),
        )
    ]
    same = (source.kind, source.location) == (request["kind"], request["location"])
    same = same and seeds[0] == seeds[1]
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
