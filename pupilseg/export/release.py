"""Puts trained weights into the package: ONNX, safetensors, a card, and scores to recompute.

Only weights that have seen nothing but rendered eyes are taken: others are bound by the licence of
their data. Scores are on rendered eyes of a series that nothing is trained on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from pupilseg.errors import UsageError
from pupilseg.evaluate.scoring import FrameScores, score_frames, summarise
from pupilseg.export.model_card import model_card
from pupilseg.export.onnx import export_onnx
from pupilseg.files import file_digest, read_json, write_json, write_text
from pupilseg.model_files.checkpoint import load_tensors, read_card
from pupilseg.model_files.initial import RENDERED_LICENCE
from pupilseg.model_files.safetensors import write_weights
from pupilseg.pictures import caption, compare, sheet, write_image
from pupilseg.predict.predictor import Predictor
from pupilseg.sources.frames import PUPIL_OF_FOUR
from pupilseg.synthetic import RENDERER_VERSION, render
from pupilseg.weights import RELEASED

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

SERIES = 2026
"""Seed of the rendered eyes that released weights are scored on."""
FRAMES, FEW = 1000, 24
"""Frames that a card's scores are of, and the first of them, which a test scores in seconds.

Means of 200 frames differ by 0.016 of IoU from series to series: a few hard eyes decide."""
RECORD = "released.json"
"""By network: digest of each file, and the scores of the first `FEW` frames."""
WORST, TILE_PX = 6, (480, 300)
"""Frames shown on the card, and the size of each."""


Found = tuple["NDArray[np.uint8]", "NDArray[np.bool_]", "NDArray[np.bool_]"]
"""A rendered frame, its label, and the mask that was found in it."""


def predict_rendered(onnx: Path, indices: Iterable[int]) -> Iterator[Found]:
    """Predicts frames of `SERIES` as `pupilseg predict` would."""
    predictor = Predictor(onnx)
    for index in indices:
        eye = render(index, SERIES)
        yield eye.image, eye.classes == PUPIL_OF_FOUR, predictor(eye.image).mask != 0


def score(onnx: Path, frames: int) -> FrameScores:
    """Scores the first frames of `SERIES`."""
    pairs = ((label, mask) for _, label, mask in predict_rendered(onnx, range(frames)))
    return score_frames([f"{SERIES}/{index}" for index in range(frames)], pairs)


def summary(scores: FrameScores) -> dict[str, float]:
    """Returns the scores of frames: frames, pupil_iou, pupil_iou_p5, center_px, found.

    IoU is over all frames, a closed eye with 1 where nothing is found and else 0. `found` is the
    share of the open eyes, `center_px` the mean over those found, NaN without any.
    """
    of_all = summarise(scores)
    return {
        "frames": len(scores.names),
        "pupil_iou": float(scores.pupil_iou.mean()),
        "pupil_iou_p5": float(np.quantile(scores.pupil_iou, 0.05)),
        "center_px": of_all["center_error_px_mean"],
        "found": of_all["found_share"],
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
    scores = score(onnx, FRAMES)
    picture = out / f"{name}_worst.jpg"
    write_image(picture, _worst(onnx, scores))
    files = {"onnx": onnx, "weights": weights, "picture": picture}
    parameters = int(exported["metadata"]["parameters"])
    text = model_card(card, parameters, files, summary(scores), remarks)
    write_text(out / f"{name}.md", text)
    record = out / RECORD
    every = read_json(record, mend=f"remove {record}") if record.exists() else {}
    few = summary(score(onnx, FEW))
    every[name] = {
        "renderer_version": RENDERER_VERSION,
        "scores": {k: round(v, 5) for k, v in few.items() if v == v},  # noqa: PLR0124 - NaN
        "sha256": {path.name: file_digest(path) for path in (onnx, weights)},
    }
    write_json(record, dict(sorted(every.items())))
    entry: dict[str, Any] = every[name]
    return entry


def _worst(onnx: Path, scores: FrameScores) -> NDArray[np.uint8]:
    """Returns the frames with the least IoU as one picture: label green, prediction red."""
    tiles = []
    worst = [int(index) for index in np.argsort(scores.pupil_iou, kind="stable")[:WORST]]
    for index, found in zip(worst, predict_rendered(onnx, worst), strict=True):
        tile = cv2.resize(compare(*found), TILE_PX, interpolation=cv2.INTER_AREA)
        tiles.append(np.asarray(tile, np.uint8))
        caption(tiles[-1], f"IoU {scores.pupil_iou[index]:.3f}")
    return sheet(tiles, TILE_PX)
