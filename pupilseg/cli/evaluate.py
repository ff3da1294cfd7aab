"""The command `evaluate`: scores a model on a split and writes a report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pupilseg.cli.command import Command

if TYPE_CHECKING:
    import argparse


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="FILE.pt or FILE.onnx")
    parser.add_argument("--shards", type=Path, required=True, help="a split, e.g. DIR/validation")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="output directory for metrics.json, per_frame.csv, iou_curve.csv, center_curve.csv "
        "and report.html",
    )
    parser.add_argument(
        "--history", type=Path, help="history file of the training run, to plot in the report"
    )
    parser.add_argument(
        "--device",
        help="auto, cpu, cuda, cuda:N or mps, for torch (default: auto, cuda if available)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=8, help="frames per batch (default: %(default)s)"
    )


def _run(args: argparse.Namespace) -> int:
    """Evaluates the model and prints a summary and the path of the report."""
    from pupilseg.evaluate.evaluation import evaluate_model

    metrics = evaluate_model(
        args.model,
        args.shards,
        args.out,
        device=args.device,
        batch_size=args.batch_size,
        history=args.history,
    )
    print(
        f"{metrics['model']} on {metrics['frames']} frames: pupil IoU {metrics['pupil_iou']:.4f}, "
        f"mIoU {metrics['miou']:.4f}, median center error {metrics['center_error_px_median']:.2f} "
        f"px, {100 * metrics['within_5px_share']:.1f} % within 5 px"
    )
    if metrics["blinks"]:
        print(
            f"{metrics['blink_false_positives']} of {metrics['blinks']} blinks have a false pupil"
        )
    print(f"report: {args.out / 'report.html'}")
    return 0


COMMAND = Command(
    description="Score a model file on the frames of a split.",
    extras="train,predict,pipeline",
    add_flags=_add_flags,
    run=_run,
)
