"""The command line of the local training scripts: data directory, output directory, training."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from pupilseg.cli.train import run_training
from pupilseg.cli.train_flags import add_train_flags
from pupilseg.prepare import DATASET, ensure_shards
from pupilseg.preprocess import NONE, PREPROCESSINGS

DATA_DIR = "~/.cache/openeds"


def main(model: str) -> int:
    """Parses the command line and trains the named network; returns the exit code."""
    parser = argparse.ArgumentParser(description=f"Train {model} on this machine.")
    parser.add_argument(
        "--data-dir",
        type=lambda text: Path(text).expanduser(),
        default=Path(DATA_DIR).expanduser(),
        help=f"directory for one data set, filled on first use (default: {DATA_DIR})",
    )
    parser.add_argument(
        "--dataset",
        default=DATASET,
        help="owner/name[@revision], a folder, or synthetic:N[@seed] (default: %(default)s)",
    )
    parser.add_argument(
        "--preprocessing",
        default=NONE,
        choices=list(PREPROCESSINGS),
        help="applied once to each image (default: %(default)s)",
    )
    parser.add_argument(
        "--output-dir",
        "--checkpoint-dir",
        type=Path,
        default=Path("checkpoints"),
        help="directory for the checkpoints (default: ./checkpoints)",
    )
    add_train_flags(parser)
    args = parser.parse_args()
    return run_training(
        args,
        model,
        args.output_dir,
        lambda: ensure_shards(args.data_dir, args.dataset, preprocessing=args.preprocessing),
        partial(print, flush=True),
    )
