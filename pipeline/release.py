"""Puts weights from rendered eyes into the package, with their card.

python -m pipeline.release --model FILE.pt --shards DIR/validation [--remarks FILE.md] [--out DIR]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pupilseg.cli.program import main_program
from pupilseg.export.release import release
from pupilseg.weights import WEIGHTS_DIR


def main() -> None:
    """Parses the command line and releases."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.release", description="Release weights from rendered eyes."
    )
    parser.add_argument("--model", type=Path, required=True, help="a model file (*.pt)")
    parser.add_argument(
        "--shards", type=Path, required=True, help="rendered validation frames, to calibrate on"
    )
    parser.add_argument("--remarks", type=Path, help="Markdown that goes into the card")
    parser.add_argument("--out", type=Path, default=WEIGHTS_DIR, help="default: the package's")
    args = parser.parse_args()
    remarks = args.remarks.read_text(encoding="utf-8") if args.remarks else ""
    entry = release(args.model, args.shards, args.out, remarks)
    scores = "  ".join(f"{name} {value:.4g}" for name, value in entry["scores"].items())
    print(f"{args.out}: {', '.join(entry['sha256'])}; {scores}")


if __name__ == "__main__":
    main_program(main)
