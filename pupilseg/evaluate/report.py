"""Writes the evaluation report: metrics, curves and images in one self-contained HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pupilseg.evaluate.plots import center_curve, iou_histogram, reliability_curve, training_curves
from pupilseg.files import write_text
from pupilseg.pages import data_uri, render_page
from pupilseg.pictures import compare, encode

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from pupilseg.evaluate.scoring import FrameScores
    from pupilseg.model_files.calibration import Reliability

_TEMPLATE = Path(__file__).with_name("report.html")


class Example(NamedTuple):
    """A frame shown in the report.

    Attributes:
        caption: plain text.
        image: uint8 (H, W).
        label: (H, W), non-zero inside the pupil.
        mask: predicted mask (H, W), non-zero inside the pupil.
    """

    caption: str
    image: NDArray[np.uint8]
    label: NDArray[np.generic]
    mask: NDArray[np.generic]

    @property
    def picture(self) -> str:
        """The frame with the outlines of label and mask, as a `data:` URI."""
        return data_uri(encode(compare(self.image, self.label, self.mask), ".jpg"), "jpeg")


def write_report(
    path: Path,
    metrics: Mapping[str, Any],
    scores: FrameScores,
    curve: Reliability,
    examples: Mapping[str, Sequence[Example]],
    history: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Writes the report atomically.

    Args:
        path: usually `report.html`.
        metrics: as `evaluation.evaluate_model` returns them.
        scores: scores of the frames.
        curve: reliability of the confidence.
        examples: heading -> frames; headings without frames are omitted.
        history: columns of a training run's history to plot; None omits the plots.

    Raises:
        OutputError: the file cannot be written.
    """
    with_pupil = ~scores.is_blink
    distributions = [
        ("pupil IoU of the frames", iou_histogram(scores.pupil_iou[with_pupil])),
        ("share of frames by center error", center_curve(scores.center_error_px[with_pupil])),
        ("share of frames within 5 px by confidence", reliability_curve(curve)),
    ]
    page = render_page(
        _TEMPLATE,
        metrics=metrics,
        headline=_headline(metrics),
        distributions=[(title, data_uri(plot, "png")) for title, plot in distributions],
        training=None if history is None else data_uri(training_curves(history), "png"),
        examples=examples,
    )
    write_text(path, page)


def _headline(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Returns the title, value and note of each of the main metrics."""
    return [
        ("pupil IoU", _number(metrics["pupil_iou"], 4), "all pixels"),
        (
            "pupil IoU per frame",
            _number(metrics["pupil_iou_median"], 4),
            f"median; 5 % of frames are below {_number(metrics['pupil_iou_p5'], 3)}",
        ),
        ("mIoU", _number(metrics["miou"], 4), "mean of pupil and background"),
        (
            "center error",
            f"{_number(metrics['center_error_px_median'], 2)} px",
            f"median; 95 % within {_number(metrics['center_error_px_p95'], 1)} px",
        ),
        ("within 5 px", _percent(metrics["within_5px_share"]), "of frames with a pupil"),
        ("found", _percent(metrics["found_share"]), "of frames with a pupil"),
        (
            "blinks",
            str(metrics["blinks"]),
            f"{metrics['blink_false_positives']} with a false pupil",
        ),
    ]


def _number(value: float, digits: int) -> str:
    return "none" if value != value else f"{value:.{digits}f}"  # noqa: PLR0124 - NaN


def _percent(share: float) -> str:
    return "none" if share != share else f"{100 * share:.1f} %"  # noqa: PLR0124 - NaN
