"""Builds the shards of a downloaded source: OUT/train and OUT/validation.

python -m pipeline.materialize --raw DIR --out DIR [--workers N] [--preprocessing NAME]
                               [--max-bad N] [--rows-per-shard N]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pupilseg.cli.program import main_program
from pupilseg.prepare import write_splits
from pupilseg.preprocess import NONE, PREPROCESSINGS
from pupilseg.shards.writer import MAX_FILES, ROWS_PER_SHARD


def main() -> None:
    """Parses the command line, builds the shards, and prints their sizes."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.materialize",
        description="Build the shards of a downloaded source. An interrupted run resumes.",
    )
    parser.add_argument(
        "--raw", type=Path, required=True, help="output directory of pipeline.download"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="output directory for train/ and validation/"
    )
    parser.add_argument("--workers", type=int, help="number of processes (default: one per CPU)")
    parser.add_argument(
        "--preprocessing",
        default=NONE,
        choices=list(PREPROCESSINGS),
        help="applied to each image unless the source already did (default: %(default)s)",
    )
    parser.add_argument(
        "--max-bad",
        type=int,
        default=0,
        help="bad samples per split that are skipped, counted and named (default: 0)",
    )
    parser.add_argument(
        "--rows-per-shard",
        type=int,
        help=f"default: {ROWS_PER_SHARD}, doubled until a split has at most {MAX_FILES} files",
    )
    args = parser.parse_args()
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


if __name__ == "__main__":
    main_program(main)
