"""Scores a model on a split: metrics, a row a frame, curves, and a page of pictures.

python -m pipeline.evaluate --model FILE.pt|FILE.onnx --shards DIR/validation --out DIR
                            [--history FILE] [--device NAME] [--batch-size N]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pupilseg.cli.program import main_program
from pupilseg.evaluate.evaluation import evaluate_model


def main() -> None:
    """Parses the command line, evaluates, and says where the report is."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.evaluate",
        description="Score a model file on the frames of a split.",
    )
    parser.add_argument("--model", type=Path, required=True, help="FILE.pt or FILE.onnx")
    parser.add_argument("--shards", type=Path, required=True, help="a split, e.g. DIR/validation")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="gets metrics.json, per_frame.csv, iou_curve.csv, center_curve.csv, report.html",
    )
    parser.add_argument("--history", type=Path, help="history.csv of the training, to be drawn")
    parser.add_argument(
        "--device", help="for torch: cpu, cuda, cuda:N or mps (default: what is there)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="default: %(default)s")
    args = parser.parse_args()
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
        f"mIoU {metrics['miou']:.4f}, centre {metrics['center_error_px_median']:.2f} px off in the "
        f"median, {100 * metrics['within_5px_share']:.1f} % within 5 px"
    )
    if metrics["blinks"]:
        print(
            f"{metrics['blink_false_positives']} of {metrics['blinks']} blinks have a false pupil"
        )
    print(f"report: {args.out / 'report.html'}")


if __name__ == "__main__":
    main_program(main)
