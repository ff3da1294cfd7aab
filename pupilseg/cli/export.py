"""The command `export`: exports a trained network and compares the result with torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pupilseg.cli.command import Command

if TYPE_CHECKING:
    import argparse


def _add_flags(parser: argparse.ArgumentParser) -> None:
    from pupilseg.export import EXPORTERS

    parser.add_argument("--model", type=Path, required=True, help="a model file (*.pt)")
    parser.add_argument(
        "--out", type=Path, required=True, help=f"file to write: *{', *'.join(EXPORTERS)}"
    )
    parser.add_argument(
        "--calibrate",
        type=Path,
        metavar="DIR",
        help="calibrate the confidence on the shards of the validation split, so that it is the "
        "probability that the center is within 5 px (default: a raw score)",
    )


def _run(args: argparse.Namespace) -> int:
    """Exports the network and prints the file size and the largest difference from torch."""
    from pupilseg.export import export_model

    report = export_model(args.model, args.out, calibrate_on=args.calibrate)
    print(
        f"{args.out}: {report.bytes:,} bytes, differs from torch by at most "
        f"{report.parity:.1e} of the largest output (batches of 1, 2 and 7)"
    )
    return 0


COMMAND = Command(
    description="Export a trained network to ONNX or safetensors.",
    extras="train,export",
    add_flags=_add_flags,
    run=_run,
)
