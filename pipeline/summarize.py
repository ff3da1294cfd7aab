"""Prints the results of a finished pipeline: scores, and paths of reports and models.

python -m pipeline.summarize DIR        # demo, or . for the pipeline on real data
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pupilseg.cli.program import main_program
from pupilseg.errors import DataError
from pupilseg.files import read_json


def main() -> None:
    """Parses the command line and prints one line per network."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.summarize",
        description="Print the scores and files of all networks.",
    )
    parser.add_argument("dir", type=Path, help="directory with models/ and reports/")
    args = parser.parse_args()
    found = sorted(args.dir.glob("reports/*/metrics.json"))
    if not found:
        raise DataError(
            f"{args.dir} holds no reports/*/metrics.json; run `make demo` or `dvc repro` first"
        )
    print(f"\n{'network':<18} {'frames':>6} {'mIoU':>7} {'pupil IoU':>10} {'center px':>10}")
    for path in found:
        metrics = read_json(path, hint="run `dvc repro` again")
        center = metrics["center_error_px_mean"]
        print(
            f"{path.parent.name:<18} {metrics['frames']:>6} {metrics['miou']:>7.4f} "
            f"{metrics['pupil_iou']:>10.4f} {'none' if center is None else f'{center:.2f}':>10}"
        )
    print()
    for path in found:
        name = path.parent.name
        print(f"{name}:")
        print(f"  report  {path.with_name('report.html')}")
        print(f"  model   {args.dir / 'models' / name / f'best_{name}_model.onnx'}")


if __name__ == "__main__":
    main_program(main)
