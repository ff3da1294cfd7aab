"""Puts trained weights into the package: ONNX, safetensors, a card, and scores to recompute.

Only weights that have seen nothing but rendered eyes are taken: others are bound by the licence of
their data. Scores are on rendered eyes of a series that nothing is trained on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np

from pupilseg.checkpoint import load_tensors, read_card
from pupilseg.errors import UsageError
from pupilseg.export import export_onnx
from pupilseg.files import file_digest, read_json, write_json, write_text
from pupilseg.initial import RENDERED_LICENCE
from pupilseg.model_card import model_card
from pupilseg.pictures import caption, compare, sheet, write_image
from pupilseg.predict import Predictor
from pupilseg.pretrained import RELEASED
from pupilseg.scoring import centroid
from pupilseg.synthetic import RENDERER_VERSION, render
from pupilseg.weight_files import write_weights

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

SERIES = 2026
"""Seed of the rendered eyes that released weights are scored on."""
FRAMES, FEW = 200, 24
"""Frames that a card's scores are of, and those of them that a test can score in seconds."""
RECORD = "released.json"
"""By network: digest of each file, and the scores of the first `FEW` frames."""
WORST = 6


class Scored(NamedTuple):
    """A rendered frame, its label, what was found, and the IoU."""

    image: NDArray[np.uint8]
    label: NDArray[np.bool_]
    mask: NDArray[np.bool_]
    iou: float
    center_px: float


def score_rendered(onnx: Path, frames: int) -> list[Scored]:
    """Scores an ONNX file on the first frames of `SERIES`, as `pupilseg predict` would use it.

    A closed eye has IoU 1 where nothing is found, else 0; the centre's error is NaN where label or
    prediction is empty.
    """
    predictor, scored = Predictor(onnx), []
    for index in range(frames):
        eye = render(index, SERIES)
        label, mask = eye.classes == 3, predictor(eye.image).mask != 0
        union = np.count_nonzero(label | mask)
        iou = np.count_nonzero(label & mask) / union if union else 1.0
        error = float(np.linalg.norm(centroid(label) - centroid(mask)))
        scored.append(Scored(eye.image, label, mask, iou, error))
    return scored


def summary(scored: list[Scored]) -> dict[str, float]:
    """Returns the scores of frames: frames, pupil_iou, pupil_iou_p5, center_px, found.

    `found` is the share of the open eyes, `center_px` the mean over those found, NaN without any.
    """
    iou = np.array([frame.iou for frame in scored])
    errors = [frame.center_px for frame in scored if not np.isnan(frame.center_px)]
    opened = [frame for frame in scored if frame.label.any()]
    return {
        "frames": len(scored),
        "pupil_iou": float(iou.mean()),
        "pupil_iou_p5": float(np.quantile(iou, 0.05)),
        "center_px": float(np.mean(errors)) if errors else float("nan"),
        "found": float(np.mean([frame.mask.any() for frame in opened])),
    }


def release(model_file: Path, shards: Path, out: Path, remarks: str = "") -> dict[str, Any]:
    """Writes NAME.onnx, NAME.safetensors, NAME.md and NAME_worst.jpg, and records their digests.

    Args:
        model_file: a model file (*.pt).
        shards: of rendered validation frames, on which the confidence is calibrated.
        out: the package's folder of weights.
        remarks: Markdown for the card, such as scores on real eyes.

    Returns:
        What `RECORD` then holds of the network.

    Raises:
        UsageError: the weights have seen other data than rendered eyes.
        PupilSegError: as `export_onnx`.
    """
    card = read_card(model_file)
    if card.get("licence") != RENDERED_LICENCE:
        raise UsageError(
            f"{model_file} is {card.get('licence')!r}, and only weights from rendered eyes alone "
            "may be released; train them with: dvc repro pretrained/dvc.yaml"
        )
    name = card["model"]
    onnx, weights = out / f"{name}.onnx", out / f"{name}{RELEASED}"
    exported = export_onnx(model_file, onnx, calibrate_on=shards)
    write_weights(weights, load_tensors(model_file), card)
    scored = score_rendered(onnx, FRAMES)
    picture = out / f"{name}_worst.jpg"
    write_image(picture, _worst(scored))
    files = {"onnx": onnx, "weights": weights, "picture": picture}
    parameters = int(exported["metadata"]["parameters"])
    text = model_card(card, parameters, files, summary(scored), remarks)
    write_text(out / f"{name}.md", text)
    record = out / RECORD
    every = read_json(record, mend=f"remove {record}") if record.exists() else {}
    every[name] = {
        "renderer_version": RENDERER_VERSION,
        "scores": {k: round(v, 5) for k, v in summary(scored[:FEW]).items() if v == v},  # noqa: PLR0124 - NaN
        "sha256": {path.name: file_digest(path) for path in (onnx, weights)},
    }
    write_json(record, dict(sorted(every.items())))
    entry: dict[str, Any] = every[name]
    return entry


def _worst(scored: list[Scored]) -> NDArray[np.uint8]:
    """Returns the frames with the least IoU as one picture: label green, prediction red."""
    tiles = []
    for frame in sorted(scored, key=lambda frame: frame.iou)[:WORST]:
        tile = compare(frame.image, frame.label, frame.mask)
        tile = np.asarray(cv2.resize(tile, (640, 400), interpolation=cv2.INTER_AREA), np.uint8)
        caption(tile, f"IoU {frame.iou:.3f}")
        tiles.append(tile)
    return sheet(tiles, (480, 300))
