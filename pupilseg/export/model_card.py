"""The card of released weights, in the form that model hubs read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pupilseg
from pupilseg.geometry import HEIGHT, WIDTH
from pupilseg.models import model_entry
from pupilseg.synthetic import RENDERER_VERSION

if TYPE_CHECKING:
    from collections.abc import Mapping

TEMPLATE = Path(__file__).with_name("model_card_template.md")
OUTPUTS = {
    "segmentation": f"`logits`, float32 (N, 2, {HEIGHT}, {WIDTH}): background, pupil",
    "ellipse": "`ellipse`, float32 (N, 4): cx / 640, cy / 400, rx / R, ry / R, "
    "R = hypot(640, 400) / 2",
}
"""What the ONNX file gives, by task."""


def model_card(
    card: Mapping[str, Any],
    parameters: int,
    files: Mapping[str, Path],
    scores: Mapping[str, float],
    remarks: str,
) -> str:
    """Returns a card as Markdown with a YAML head.

    Args:
        card: of the checkpoint.
        parameters: number of trained numbers.
        files: `onnx`, `weights` and `picture`, which lie beside the card.
        scores: on rendered frames; see `release.summary`.
        remarks: further Markdown, such as scores on real eyes.
    """
    entry = model_entry(card["model"])
    values = {key: card["config"][key] for key in ("epochs", "batch_size", "seed")}
    values |= {key: card[key] for key in ("data", "train_frames", "preprocessing")}
    values |= {key: path.name for key, path in files.items()}
    return TEMPLATE.read_text(encoding="utf-8").format(
        **values,
        **scores,
        name=card["model"],
        version=pupilseg.__version__,
        renderer_version=RENDERER_VERSION,
        summary=entry.summary[0].upper() + entry.summary[1:],
        parameters=parameters,
        onnx_bytes=files["onnx"].stat().st_size,
        weights_bytes=files["weights"].stat().st_size,
        height=HEIGHT,
        width=WIDTH,
        output=OUTPUTS[entry.task],
        valid_iou=card["metrics"]["valid_pupil_iou"],
        valid_center_px=card["metrics"]["valid_center_px"],
        remarks=remarks.strip() or "Real eyes: not measured.",
    )
