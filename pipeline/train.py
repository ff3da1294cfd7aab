"""Trains one network on materialized shards.

python -m pipeline.train --model NAME --shards DIR --out DIR [--epochs N ...]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pupilseg.device import find_device
from pupilseg.history import epoch_line
from pupilseg.models import model_entry
from pupilseg.program import run
from pupilseg.train import train
from pupilseg.train_flags import add_train_arguments, config_from, resume_file


def main() -> int:
    """Parses the command line and trains."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.train", description="Train a network on materialized shards."
    )
    parser.add_argument("--model", required=True, help="efficientvit, efficientvit_tiny or ellipse")
    parser.add_argument("--shards", type=Path, required=True, help="holds train/ and validation/")
    parser.add_argument("--out", type=Path, required=True, help="gets checkpoints and history")
    add_train_arguments(parser)
    args = parser.parse_args()
    model_entry(args.model)
    result = train(
        config_from(args, args.model),
        args.shards,
        args.out,
        device=find_device(args.device),
        resume=resume_file(args, args.model, args.out),
        limit=args.limit,
        on_epoch=lambda row: print(epoch_line(row, args.epochs), flush=True),
    )
    print(f"best: {result.best_file} (mIoU {result.best['valid_iou']:.4f})")
    return 130 if result.interrupted else 0


if __name__ == "__main__":
    run(main)
