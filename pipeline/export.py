"""Exports a trained network and compares the result with torch.

python -m pipeline.export --model FILE.pt --out FILE.onnx [--calibrate DIR/validation]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pupilseg.cli.program import main_program
from pupilseg.export import EXPORTERS, export_model


def main() -> None:
    """Parses the command line, exports, and prints the size and the largest difference."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.export",
        description="Export a trained network to ONNX or safetensors.",
    )
    parser.add_argument("--model", type=Path, required=True, help="a model file (*.pt)")
    parser.add_argument(
        "--out", type=Path, required=True, help=f"file to write: *{', *'.join(EXPORTERS)}"
    )
    parser.add_argument(
        "--calibrate",
        type=Path,
        metavar="DIR",
        help="shards of the validation split; calibrates confidence to the probability that the "
        "center is within 5 px (default: a raw score)",
    )
    args = parser.parse_args()
    report = export_model(args.model, args.out, calibrate_on=args.calibrate)
    print(
        f"{args.out}: {report.bytes:,} bytes, differs from torch by at most "
        f"{report.parity:.1e} of the largest output (batches of 1, 2 and 7)"
    )


if __name__ == "__main__":
    main_program(main)
