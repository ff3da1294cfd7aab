"""The model card of released weights, as a Markdown page for model hubs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pupilseg
from pupilseg.geometry import HEIGHT, WIDTH
from pupilseg.model_files.onnx import OUTPUTS
from pupilseg.models import model_entry
from pupilseg.synthetic import RENDERER_VERSION

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pupilseg.model_files.card import ModelCard

TEMPLATE = Path(__file__).with_name("model_card_template.md")


def markdown_card(
    card: ModelCard,
    parameters: int,
    files: Mapping[str, Path],
    scores: Mapping[str, float],
    remarks: str,
) -> str:
    """Returns the page as Markdown with YAML front matter.

    Args:
        card: card of the checkpoint.
        parameters: number of trainable parameters.
        files: paths under the keys `onnx`, `weights` and `picture`, in the same folder as the page.
        scores: scores on rendered frames, from `release.score_summary`.
        remarks: additional Markdown, such as scores on real eyes.
    """
    entry = model_entry(card.model)
    output = OUTPUTS[entry.task]
    shape = ", ".join(str(size) for size in output.shape)
    return TEMPLATE.read_text(encoding="utf-8").format(
        **scores,
        **{key: path.name for key, path in files.items()},
        **{key: card.config[key] for key in ("epochs", "batch_size", "seed")},
        data=card.data,
        train_frames=card.train_frames,
        preprocessing=card.preprocessing,
        name=card.model,
        version=pupilseg.__version__,
        renderer_version=RENDERER_VERSION,
        summary=entry.summary[0].upper() + entry.summary[1:],
        parameters=parameters,
        onnx_bytes=files["onnx"].stat().st_size,
        weights_bytes=files["weights"].stat().st_size,
        height=HEIGHT,
        width=WIDTH,
        output=f"`{output.name}`, float32 (N, {shape}): {output.meaning}",
        valid_iou=card.metrics["valid_pupil_iou"],
        valid_center_px=card.metrics["valid_center_px"],
        remarks=remarks.strip() or "Real eyes: not measured.",
    )
