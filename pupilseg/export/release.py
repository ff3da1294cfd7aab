"""Releases trained weights: ONNX, safetensors, a model card, and scores that a test recomputes.

Only weights trained exclusively on rendered eyes are released, because other weights are bound by
the license of their data. Scores are measured on a series of rendered eyes that is never used for
training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from pupilseg.errors import UsageError
from pupilseg.evaluate.scoring import FrameScores, score_frames, summarize
from pupilseg.export.model_card import markdown_card
from pupilseg.export.onnx import export_onnx
from pupilseg.export.safetensors import export_safetensors
from pupilseg.files import file_digest, read_json, write_json, write_text
from pupilseg.model_files.card import RENDERED_LICENSE
from pupilseg.model_files.checkpoint import read_card
from pupilseg.pictures import caption, compare, sheet, write_image
from pupilseg.predict.predictor import Predictor
from pupilseg.sources.frames import PUPIL_OF_FOUR
from pupilseg.synthetic import RENDERER_VERSION, render
from pupilseg.weights import SAFETENSORS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

SERIES = 2026
"""Seed of the rendered eyes that released weights are scored on."""
FRAMES = 1000
"""Number of frames scored for the model card. With 200 frames, the mean IoU differs by 0.016
between series because of a few hard eyes."""
FEW_FRAMES = 24
"""Number of the first frames of `SERIES` that a test scores again, within seconds."""
RECORD = "released.json"
"""File with, for each network, the digests of its files and its scores on `FEW_FRAMES` frames."""
WORST_FRAMES = 6
TILE_PX = (480, 300)
"""Width and height of each frame in the picture of the worst frames."""


Found = tuple["NDArray[np.uint8]", "NDArray[np.bool_]", "NDArray[np.bool_]"]
"""A rendered frame, its label, and the predicted mask."""


def predict_rendered(onnx: Path, indices: Iterable[int]) -> Iterator[Found]:
    """Predicts frames of `SERIES` as `pupilseg predict` does."""
    predictor = Predictor(onnx)
    for index in indices:
        eye = render(index, SERIES)
        yield eye.image, eye.classes == PUPIL_OF_FOUR, predictor(eye.image).mask != 0


def score(onnx: Path, frames: int) -> FrameScores:
    """Scores the first frames of `SERIES`."""
    pairs = ((label, mask) for _, label, mask in predict_rendered(onnx, range(frames)))
    return score_frames([f"{SERIES}/{index}" for index in range(frames)], pairs)


def score_summary(scores: FrameScores) -> dict[str, float]:
    """Summarizes the scores of frames.

    Returns:
        frames: number of frames. pupil_iou and pupil_iou_p5: mean and 5th percentile over all
        frames, where a closed eye counts as 1 if nothing is found, else 0. found: fraction of the
        open eyes in which a pupil was found. center_px: mean center error of these, or NaN.
    """
    summary = summarize(scores)
    return {
        "frames": len(scores.names),
        "pupil_iou": float(scores.pupil_iou.mean()),
        "pupil_iou_p5": float(np.quantile(scores.pupil_iou, 0.05)),
        "center_px": summary["center_error_px_mean"],
        "found": summary["found_share"],
    }


def release(model_file: Path, shards: Path, out: Path, remarks: str = "") -> dict[str, Any]:
    """Writes NAME.onnx, NAME.safetensors, NAME.md and NAME_worst.jpg, and records their digests.

    Args:
        model_file: a checkpoint (*.pt).
        shards: shards of rendered validation frames, on which the confidence is calibrated.
        out: usually `pupilseg.weights.WEIGHTS_DIR`.
        remarks: Markdown for the model card, such as scores on real eyes.

    Returns:
        The network's entry in `RECORD`.

    Raises:
        UsageError: the weights were trained on data other than rendered eyes.
        PupilSegError: the errors of `export_onnx`.
    """
    card = read_card(model_file)
    if card.license != RENDERED_LICENSE:
        raise UsageError(
            f"the license of {model_file} is {card.license!r}, but only weights trained on "
            "rendered eyes alone may be released; train them with: dvc repro pretrained/dvc.yaml"
        )
    name = card.model
    onnx, weights = out / f"{name}.onnx", out / f"{name}{SAFETENSORS}"
    exported = export_onnx(model_file, onnx, calibrate_on=shards)
    export_safetensors(model_file, weights)
    scores = score(onnx, FRAMES)
    picture = out / f"{name}_worst.jpg"
    write_image(picture, _worst(onnx, scores))
    files = {"onnx": onnx, "weights": weights, "picture": picture}
    text = markdown_card(card, exported.parameters, files, score_summary(scores), remarks)
    write_text(out / f"{name}.md", text)
    record = out / RECORD
    released = read_json(record, hint=f"remove {record}") if record.exists() else {}
    few = score_summary(score(onnx, FEW_FRAMES))
    released[name] = {
        "renderer_version": RENDERER_VERSION,
        "scores": {k: round(v, 5) for k, v in few.items() if v == v},  # noqa: PLR0124 - NaN
        "sha256": {path.name: file_digest(path) for path in (onnx, weights)},
    }
    write_json(record, dict(sorted(released.items())))
    entry: dict[str, Any] = released[name]
    return entry


def _worst(onnx: Path, scores: FrameScores) -> NDArray[np.uint8]:
    """Draws the frames with the lowest IoU in one image, label in green and prediction in red."""
    tiles = []
    worst = [int(index) for index in np.argsort(scores.pupil_iou, kind="stable")[:WORST_FRAMES]]
    for index, found in zip(worst, predict_rendered(onnx, worst), strict=True):
        tile = cv2.resize(compare(*found), TILE_PX, interpolation=cv2.INTER_AREA)
        tiles.append(np.asarray(tile, np.uint8))
        caption(tiles[-1], f"IoU {scores.pupil_iou[index]:.3f}")
    return sheet(tiles, TILE_PX)
