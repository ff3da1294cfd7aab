"""A table of how well pupils were found, a row a network or a kind of frames."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

COLUMNS = ("pupil IoU, mean", "5th percentile", "centre, mean px", "found")


def print_head(first: str) -> None:
    """Prints the head of the table; `first` says what the rows are."""
    print(f"| {' | '.join((first, *COLUMNS))} |")
    print(f"|{' --- |' * (1 + len(COLUMNS))}")


def print_row(name: str, scores: Mapping[str, Any]) -> None:
    """Prints a row; `scores` are those of `scoring.summarize`."""
    print(
        f"| {name} | {scores['pupil_iou_mean']:.4f} | {scores['pupil_iou_p5']:.4f} | "
        f"{scores['center_error_px_mean']:.2f} | {scores['found_share']:.1%} |",
        flush=True,
    )
