"""Trains one network on materialized shards.

python -m pipeline.train --model NAME --shards DIR --out DIR [--epochs N ...]
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from pupilseg.cli.program import main_program
from pupilseg.cli.train import run_training
from pupilseg.cli.train_flags import add_train_flags
from pupilseg.models import list_models, model_entry


def main() -> int:
    """Parses the command line and trains; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.train", description="Train a network on materialized shards."
    )
    parser.add_argument("--model", required=True, help=", ".join(list_models()))
    parser.add_argument(
        "--shards", type=Path, required=True, help="directory with train/ and validation/"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="output directory for checkpoints and history"
    )
    add_train_flags(parser)
    args = parser.parse_args()
    model_entry(args.model)
    return run_training(args, args.model, args.out, lambda: args.shards, partial(print, flush=True))


if __name__ == "__main__":
    main_program(main)
