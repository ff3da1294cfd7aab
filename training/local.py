"""What the local training scripts share: flags, data on first use, one call of `train`."""

from __future__ import annotations

import argparse
from pathlib import Path

from pupilseg.device import find_device
from pupilseg.history import epoch_line
from pupilseg.prepare import ensure_shards
from pupilseg.preprocess import NONE, PREPROCESSINGS
from pupilseg.train import train
from pupilseg.train_flags import add_train_arguments, config_from, resume_file

DATASET = "Conner/sddec25-01"
DATA_DIR = "~/.cache/openeds"


def main(model: str) -> int:
    """Parses the command line and trains the network of that name; returns the exit code."""
    parser = argparse.ArgumentParser(description=f"Train {model} on this machine.")
    parser.add_argument(
        "--data-dir",
        type=lambda text: Path(text).expanduser(),
        default=Path(DATA_DIR).expanduser(),
        help=f"holds one data set; filled on first use (default: {DATA_DIR})",
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
        help="applied to each image once (default: %(default)s)",
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path("checkpoints"),
        help="gets the checkpoints (default: ./checkpoints)",
    )
    add_train_arguments(parser)
    args = parser.parse_args()
    config = config_from(args, model)
    # Before any data is fetched: a wrong --device or --resume should not cost a download.
    device = find_device(args.device)
    resume = resume_file(args, model, args.output_dir)
    shards = ensure_shards(args.data_dir, args.dataset, preprocessing=args.preprocessing)
    result = train(
        config,
        shards,
        args.output_dir,
        device=device,
        resume=resume,
        limit=args.limit,
        on_epoch=lambda row: print(epoch_line(row, args.epochs), flush=True),
    )
    if result.interrupted:
        print(f"interrupted after epoch {len(result.history)}; go on with --resume")
        return 130
    print(f"best: {result.best_file} (mIoU {result.best['valid_iou']:.4f})")
    return 0
