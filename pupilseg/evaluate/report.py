"""The page of an evaluation: numbers, curves and pictures in one HTML file that needs no other."""

from __future__ import annotations

import base64
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

from pupilseg.evaluate.plots import center_curve, iou_histogram, reliability_curve, training_curves
from pupilseg.files import atomic_path
from pupilseg.pictures import compare, encode

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from pupilseg.evaluate.scoring import FrameScores
    from pupilseg.model_files.calibration import Reliability


class Example(NamedTuple):
    """A frame to show.

    Attributes:
        caption: plain text.
        image: uint8 (H, W).
        label: (H, W), non-zero inside.
        mask: (H, W), likewise, predicted.
    """

    caption: str
    image: NDArray[np.uint8]
    label: NDArray[np.generic]
    mask: NDArray[np.generic]


_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2937; max-width: 1180px;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p.about { color: #6b7280; margin: .2rem 0 1.2rem; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .7rem; }
dl div { border: 1px solid #e5e7eb; border-radius: 8px; padding: .6rem .8rem; }
dt { color: #6b7280; font-size: .8rem; } dd { margin: 0; font-size: 1.3rem; }
dd small { font-size: .8rem; color: #6b7280; }
.plots img { max-width: 100%; }
.frames { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: .8rem; }
figure { margin: 0; } figure img { width: 100%; border-radius: 6px; display: block; }
figcaption { font-size: .8rem; color: #374151; overflow-wrap: anywhere; }
.truth { color: #16a34a; } .found { color: #dc2626; }
"""


def write_report(
    path: Path,
    metrics: Mapping[str, Any],
    scores: FrameScores,
    certainty: Reliability,
    examples: Mapping[str, Sequence[Example]],
    history: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Writes the page atomically.

    Args:
        path: usually `report.html`.
        metrics: as `evaluation.evaluate_model` returns them.
        scores: of the frames, for the curves.
        certainty: what confidences promised, and what came.
        examples: heading -> frames; a heading without frames is left out.
        history: a training run's columns, for its curves.

    Raises:
        OutputError: it cannot be written.
    """
    open_eye = ~scores.is_blink
    plots = [
        ("pupil IoU of the frames", iou_histogram(scores.pupil_iou[open_eye])),
        ("share of frames by centre error", center_curve(scores.center_error_px[open_eye])),
        ("share of frames within 5 px by confidence", reliability_curve(certainty)),
    ]
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(metrics['model'])}: evaluation</title><style>{_STYLE}</style></head><body>",
        f"<h1>{_text(metrics['model'])} on {_text(metrics['split'])}</h1>",
        f'<p class="about">{_text(metrics["model_file"])}, {metrics["frames"]} frames of '
        f"{_text(metrics['data'])}, preprocessing {_text(metrics['preprocessing'])}</p>",
        _headline(metrics),
        '<h2>Distributions</h2><div class="plots">',
        *(_image(picture, "png", alt) for alt, picture in plots),
        "</div>",
        f"<p>{_about_confidence(metrics)}</p>",
    ]
    if history is not None:
        picture = _image(training_curves(history), "png", "training curves by epoch")
        parts += ['<h2>Training</h2><div class="plots">', picture, "</div>"]
    parts.append(
        '<p>Outlines: <b class="truth">green</b> is the label, <b class="found">red</b> the raw '
        "prediction.</p>"
    )
    for heading, frames in examples.items():
        if frames:
            parts += [f'<h2>{_text(heading)}</h2><div class="frames">', *map(_figure, frames)]
            parts.append("</div>")
    parts.append("</body></html>\n")
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(parts), encoding="utf-8")


def _about_confidence(metrics: Mapping[str, Any]) -> str:
    """Says how the confidences of the last curve were come by."""
    if metrics["calibrated_on"]:
        how = f"calibrated on {_text(metrics['calibrated_on'])}"
    else:
        how = "calibrated on these frames, each half by the other (the model file holds no map)"
    return (
        "Confidence is to be the probability that a pupil's centre is within 5 px; "
        f"{how}. Frames where none was found are not in its curve."
    )


def _text(value: Any) -> str:
    return escape(str(value))


def _image(encoded: bytes, kind: str, alt: str) -> str:
    """Returns an image tag that holds its picture."""
    data = base64.b64encode(encoded).decode("ascii")
    return f'<img alt="{escape(alt, quote=True)}" src="data:image/{kind};base64,{data}">'


def _figure(example: Example) -> str:
    """Returns a frame with outlines and caption."""
    picture = encode(compare(example.image, example.label, example.mask), ".jpg")
    caption = _text(example.caption)
    return (
        f"<figure>{_image(picture, 'jpeg', example.caption)}<figcaption>{caption}</figcaption>"
        "</figure>"
    )


def _headline(metrics: Mapping[str, Any]) -> str:
    """Returns the numbers that are read first."""
    cells = [
        ("pupil IoU", _number(metrics["pupil_iou"], 4), "all pixels"),
        (
            "pupil IoU a frame",
            _number(metrics["pupil_iou_median"], 4),
            f"median; 5 % are under {_number(metrics['pupil_iou_p5'], 3)}",
        ),
        ("mIoU", _number(metrics["miou"], 4), "with background"),
        (
            "centre error",
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
    rows = (f"<div><dt>{n}</dt><dd>{v} <small>{note}</small></dd></div>" for n, v, note in cells)
    return f"<dl>{''.join(rows)}</dl>"


def _number(value: float, digits: int) -> str:
    return "none" if value != value else f"{value:.{digits}f}"  # noqa: PLR0124 - NaN


def _percent(share: float) -> str:
    return "none" if share != share else f"{100 * share:.1f} %"  # noqa: PLR0124 - NaN
