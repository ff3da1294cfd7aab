"""Evaluates a model file, .pt or .onnx, on the frames of a split; an ONNX file without torch."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pupilseg.errors import UsageError
from pupilseg.evaluate.confidence import Certainty, check_preprocessing, frames_with_output, judge
from pupilseg.evaluate.plots import CENTER_AXIS_PX, read_history
from pupilseg.evaluate.report import Example, write_report
from pupilseg.evaluate.scoring import (
    FrameScores,
    score_frames,
    share_within,
    summarize,
)
from pupilseg.files import atomic_path, write_json
from pupilseg.model_files.calibration import reliability
from pupilseg.model_files.opening import masks_from_output, open_model
from pupilseg.shards import open_shards

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    Frame = tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float32]]
    """Image, label, and the network's output."""

EXAMPLES = 6
"""Pictures of each kind in the report."""
COLUMNS = (
    "name",
    "pupil_iou",
    "background_iou",
    "center_error_px",
    "radius_error_px",
    "found",
    "is_blink",
    "area_px",
    "predicted_area_px",
    "confidence",
)
"""Columns of per_frame.csv; the errors are empty where label or prediction has no pupil. Confidence
is the predictor's, in the pupil that it makes of the prediction; 0 where it makes none."""
CURVE_POINTS = 101
"""Rows of iou_curve.csv and center_curve.csv, whatever the number of frames."""


def evaluate_model(
    model: Path,
    shards_dir: Path,
    out: Path,
    *,
    device: str | None = None,
    batch_size: int = 8,
    history: Path | None = None,
) -> dict[str, Any]:
    """Scores a model file on a split and writes what was found.

    Args:
        model: *.pt, *.safetensors or *.onnx.
        shards_dir: of the split, e.g. DIR/validation.
        out: gets metrics.json, per_frame.csv, iou_curve.csv, center_curve.csv, report.html.
        device: for torch, as `device.find_device`; ONNX files run on the CPU.
        batch_size: frames that the network gets at once.
        history: a training run's history.csv, drawn into the report.

    Returns:
        What metrics.json holds: `scoring.summarize`, calibration_error (mean distance of
        confidence and outcome), calibrated_on, model, model_file, preprocessing, data, split. What
        there was no frame for is NaN here and null there.

    Raises:
        CheckpointError: the model file is missing, damaged or foreign.
        DataError: the shards or the history are missing or damaged.
        UsageError: the model was trained on images of another preprocessing than the shards', or
            the device is not there.
        OutputError: `out` cannot be written.
    """
    model, out = Path(model), Path(out)
    if batch_size < 1:
        raise UsageError(f"batch size is {batch_size}, expected 1 or more")
    curves = None if history is None else read_history(history)
    with open_shards(shards_dir) as shards:
        network = open_model(model, device)
        check_preprocessing(shards, network.preprocessing, str(model))

        def frames(indices: Sequence[int]) -> Iterator[Frame]:
            return frames_with_output(shards, network.outputs, indices, batch_size, "evaluate")

        judged: list[tuple[float, float]] = []

        def pairs() -> Iterator[tuple[NDArray[np.uint8], NDArray[np.bool_]]]:
            for image, label, output in frames(range(len(shards))):
                judged.append(judge(image, label, output))
                yield label, masks_from_output(output[None])[0]

        scores = score_frames(list(shards["name"]), pairs())
        certainty = Certainty(*np.array(judged).reshape(-1, 2).T)
        confidence = certainty.confidence(network.calibration)
        found = certainty.found
        curve = reliability(confidence[found], certainty.good[found])
        metrics = summarize(scores) | {
            "calibration_error": curve.error,
            "calibrated_on": "" if network.calibration is None else network.calibration.data,
            "model": network.name,
            "model_file": model.name,
            "preprocessing": network.preprocessing,
            "data": shards.manifest["source"],
            "split": shards.manifest["split"],
        }
        examples = {
            title: [
                Example(_caption(scores, i), image, label, masks_from_output(output[None])[0])
                for i, (image, label, output) in zip(picks, frames(picks), strict=True)
            ]
            for title, picks in choose_examples(scores).items()
        }
    write_tables(scores, confidence, out)
    write_report(out / "report.html", metrics, scores, curve, examples, curves)
    # Last: whoever finds metrics.json finds all.
    write_json(out / "metrics.json", {k: None if v != v else v for k, v in metrics.items()})  # noqa: PLR0124 - NaN
    return metrics


def choose_examples(scores: FrameScores) -> dict[str, list[int]]:
    """Chooses frames to show, at most `EXAMPLES` of a kind.

    Returns:
        Title -> indices: worst, median and best by pupil IoU among the frames with a pupil, no
        frame twice; then blinks, those with a false prediction first, the largest before.
    """
    open_eye = np.flatnonzero(~scores.is_blink)
    order = [int(i) for i in open_eye[np.argsort(scores.pupil_iou[open_eye], kind="stable")]]
    worst = order[:EXAMPLES]
    best = order[EXAMPLES:][-EXAMPLES:][::-1]
    rest = order[len(worst) : len(order) - len(best)]
    middle = max(0, min(len(order) // 2 - EXAMPLES // 2 - len(worst), len(rest) - EXAMPLES))
    blinks = np.flatnonzero(scores.is_blink)
    loudest = np.argsort(-scores.predicted_area_px[blinks], kind="stable")
    return {
        "Worst frames": worst,
        "Median frames": rest[middle : middle + EXAMPLES],
        "Best frames": best,
        "Blinks": [int(i) for i in blinks[loudest][:EXAMPLES]],
    }


def _caption(scores: FrameScores, index: int) -> str:
    """Returns what stands under a frame's picture."""
    if scores.is_blink[index]:
        area = int(scores.predicted_area_px[index])
        verdict = f"{area} px predicted falsely" if area else "no pupil, none predicted"
    elif not scores.found[index]:
        verdict = "pupil not found"
    else:
        error = scores.center_error_px[index]
        verdict = f"IoU {scores.pupil_iou[index]:.4f}, centre {error:.2f} px off"
    return f"{scores.names[index]}: {verdict}"


def write_tables(scores: FrameScores, confidence: NDArray[np.float64], out: Path) -> None:
    """Writes per_frame.csv, iou_curve.csv and center_curve.csv; NaN is an empty cell.

    Raises:
        OutputError: they cannot be written.
    """
    columns = (
        scores.names,
        scores.pupil_iou,
        scores.background_iou,
        scores.center_error_px,
        scores.radius_error_px,
        scores.found.astype(int),
        scores.is_blink.astype(int),
        scores.area_px,
        scores.predicted_area_px,
        confidence,
    )
    _write_csv(out / "per_frame.csv", COLUMNS, columns)
    open_eye = ~scores.is_blink
    if open_eye.any():
        quantile = np.linspace(0, 1, CURVE_POINTS)
        iou = np.quantile(scores.pupil_iou[open_eye], quantile)
    else:
        quantile = iou = np.empty(0)
    _write_csv(out / "iou_curve.csv", ("quantile", "pupil_iou"), (quantile, iou))
    distance = np.linspace(0, CENTER_AXIS_PX, CURVE_POINTS)
    share = share_within(scores.center_error_px[open_eye], distance)
    _write_csv(out / "center_curve.csv", ("center_error_px", "share"), (distance, share))


def _write_csv(path: Path, names: Sequence[str], columns: Sequence[Iterable[Any]]) -> None:
    """Writes columns of equal length atomically."""

    def text(value: Any) -> str:
        if isinstance(value, float):
            return "" if np.isnan(value) else f"{value:.6g}"
        return str(value)

    with (
        atomic_path(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as handle,
    ):
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([text(v) for v in row] for row in zip(*columns, strict=True))
