"""Releases weights trained on rendered eyes: adds them to the package, with a model card.

python -m pipeline.release --model FILE.pt --shards DIR/validation [--remarks FILE.md] [--out DIR]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pupilseg.cli.program import main_program
from pupilseg.export.release import release
from pupilseg.weights import WEIGHTS_DIR


def main() -> None:
    """Parses the command line, releases, and prints the scores."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.release",
        description="Add weights trained on rendered eyes to the package.",
    )
    parser.add_argument("--model", type=Path, required=True, help="a model file (*.pt)")
    parser.add_argument(
        "--shards", type=Path, required=True, help="rendered validation frames for the calibration"
    )
    parser.add_argument("--remarks", type=Path, help="Markdown file to include in the model card")
    parser.add_argument(
        "--out", type=Path, default=WEIGHTS_DIR, help="default: the folder in the package"
    )
    args = parser.parse_args()
    remarks = args.remarks.read_text(encoding="utf-8") if args.remarks else ""
    entry = release(args.model, args.shards, args.out, remarks)
    scores = "  ".join(f"{name} {value:.4g}" for name, value in entry["scores"].items())
    print(f"{args.out}: {', '.join(entry['sha256'])}; {scores}")


if __name__ == "__main__":
    main_program(main)
