"""A table of scores, one row per network or kind of frames."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

COLUMNS = ("pupil IoU, mean", "5th percentile", "center, mean px", "found")


def print_head(first: str) -> None:
    """Prints the head of the table; `first` is the title of the first column."""
    print(f"| {' | '.join((first, *COLUMNS))} |")
    print(f"|{' --- |' * (1 + len(COLUMNS))}")


def print_row(name: str, scores: Mapping[str, Any]) -> None:
    """Prints one row from the result of `scoring.summarize`."""
    print(
        f"| {name} | {scores['pupil_iou_mean']:.4f} | {scores['pupil_iou_p5']:.4f} | "
        f"{scores['center_error_px_mean']:.2f} | {scores['found_share']:.1%} |",
        flush=True,
    )
