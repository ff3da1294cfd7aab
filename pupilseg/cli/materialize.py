"""The command `materialize`: builds shards from a downloaded source."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pupilseg.cli.command import Command

if TYPE_CHECKING:
    import argparse


def _add_flags(parser: argparse.ArgumentParser) -> None:
    from pupilseg.preprocess import NONE, PREPROCESSINGS
    from pupilseg.shards.writer import MAX_FILES, ROWS_PER_SHARD

    parser.add_argument(
        "--raw", type=Path, required=True, help="output directory of the download stage"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="output directory for train/ and validation/"
    )
    parser.add_argument("--workers", type=int, help="number of processes (default: one per CPU)")
    parser.add_argument(
        "--preprocessing",
        default=NONE,
        choices=list(PREPROCESSINGS),
        help="preprocessing of each image, unless the source has applied it (default: %(default)s)",
    )
    parser.add_argument(
        "--max-bad",
        type=int,
        default=0,
        help="maximum number of bad samples to skip and report per split (default: 0)",
    )
    parser.add_argument(
        "--rows-per-shard",
        type=int,
        help=f"samples per file (default: {ROWS_PER_SHARD}, doubled until a split has at most "
        f"{MAX_FILES} files)",
    )


def _run(args: argparse.Namespace) -> int:
    """Builds the shards and prints their sizes."""
    from pupilseg.prepare import write_splits

    manifests = write_splits(
        args.raw,
        args.out,
        workers=args.workers,
        rows_per_shard=args.rows_per_shard,
        preprocessing=args.preprocessing,
        max_bad=args.max_bad,
    )
    for split, manifest in manifests.items():
        size = sum(entry["bytes"] for entry in manifest["files"])
        skipped = f", {len(manifest['skipped'])} bad skipped" if manifest["skipped"] else ""
        print(
            f"{split}: {manifest['rows']} samples, {size / manifest['rows'] / 1e6:.2f} MB each, "
            f"{len(manifest['files'])} files{skipped}"
        )
    return 0


COMMAND = Command(
    description="Build shards from a downloaded source. An interrupted run is resumed.",
    extras="data",
    add_flags=_add_flags,
    run=_run,
)
