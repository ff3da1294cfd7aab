"""An epoch's row of numbers as a line of text, and a run's rows as CSV."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING

from pupilseg.files import atomic_path

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


def write_history(path: Path, history: Sequence[Mapping[str, float]]) -> None:
    """Writes a row an epoch as CSV, for plots and DVC."""
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(history[0]))
        writer.writeheader()
        writer.writerows(history)


def epoch_line(row: Mapping[str, float], epochs: int) -> str:
    """Returns an epoch's row as a line of fixed columns."""
    seconds = row["train_seconds"] + row["valid_seconds"]
    return (
        f"epoch {int(row['epoch']):3d}/{epochs}  loss {row['train_loss']:7.4f} train "
        f"{row['valid_loss']:7.4f} valid  mIoU {row['valid_iou']:.4f}  pupil IoU "
        f"{row['valid_pupil_iou']:.4f}  centre {row['valid_center_px']:6.2f} px  "
        f"found {row['valid_found']:.3f}  {seconds:5.1f} s"
    )
