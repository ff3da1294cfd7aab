"""Evaluates a model file on the frames of a split; torch is not needed for ONNX files."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pupilseg.errors import UsageError
from pupilseg.evaluate.confidence import (
    PredictedConfidence,
    check_preprocessing,
    confidence_and_error,
    frames_with_output,
)
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
"""Maximum number of frames of each kind in the report."""
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
"""Columns of per_frame.csv. The errors are empty if the label or the prediction has no pupil.
`confidence` is that of `Predictor`, after postprocessing; it is 0 if no pupil was found."""
CURVE_POINTS = 101
"""Number of rows of iou_curve.csv and center_curve.csv, whatever the number of frames."""


def evaluate_model(
    model: Path,
    shards_dir: Path,
    out: Path,
    *,
    device: str | None = None,
    batch_size: int = 8,
    history: Path | None = None,
) -> dict[str, Any]:
    """Scores a model file on a split and writes tables and a report.

    Args:
        model: *.pt, *.safetensors or *.onnx.
        shards_dir: directory of the split, such as DIR/validation.
        out: receives metrics.json, per_frame.csv, iou_curve.csv, center_curve.csv, report.html.
        device: device for torch (see `runtime.device.find_device`); ONNX files run on the CPU.
        batch_size: number of frames per call of the network.
        history: history.csv of a training run, to plot in the report.

    Returns:
        The content of metrics.json: the scores of `scoring.summarize`, calibration_error (mean
        difference between confidence and outcome), calibrated_on, model, model_file,
        preprocessing, data, split. A metric that no frame contributes to is NaN here and null in
        the file.

    Raises:
        CheckpointError: the model file is missing, damaged, or not written by pupilseg.
        DataError: the shards or the history are missing or damaged.
        UsageError: the preprocessing of the shards differs from that of the model's training
            images, or the device is unavailable.
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

        confidences: list[tuple[float, float]] = []

        def pairs() -> Iterator[tuple[NDArray[np.uint8], NDArray[np.bool_]]]:
            for image, label, output in frames(range(len(shards))):
                confidences.append(confidence_and_error(image, label, output))
                yield label, masks_from_output(output[None])[0]

        scores = score_frames(list(shards["name"]), pairs())
        predicted = PredictedConfidence(*np.array(confidences).reshape(-1, 2).T)
        confidence = predicted.calibrated(network.calibration)
        found = predicted.found
        curve = reliability(confidence[found], predicted.good[found])
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
    # Written last: its presence marks a complete evaluation.
    write_json(out / "metrics.json", {k: None if v != v else v for k, v in metrics.items()})  # noqa: PLR0124 - NaN
    return metrics


def choose_examples(scores: FrameScores) -> dict[str, list[int]]:
    """Chooses the frames that the report shows, at most `EXAMPLES` of a kind.

    Returns:
        Title -> indices: the worst, median and best frames with a pupil by pupil IoU, without
        duplicates; then blinks, with the largest false prediction first.
    """
    open_eye = np.flatnonzero(~scores.is_blink)
    order = [int(i) for i in open_eye[np.argsort(scores.pupil_iou[open_eye], kind="stable")]]
    worst = order[:EXAMPLES]
    best = order[EXAMPLES:][-EXAMPLES:][::-1]
    rest = order[len(worst) : len(order) - len(best)]
    middle = max(0, min(len(order) // 2 - EXAMPLES // 2 - len(worst), len(rest) - EXAMPLES))
    blinks = np.flatnonzero(scores.is_blink)
    by_false_area = np.argsort(-scores.predicted_area_px[blinks], kind="stable")
    return {
        "Worst frames": worst,
        "Median frames": rest[middle : middle + EXAMPLES],
        "Best frames": best,
        "Blinks": [int(i) for i in blinks[by_false_area][:EXAMPLES]],
    }


def _caption(scores: FrameScores, index: int) -> str:
    """Returns the caption of a frame in the report."""
    if scores.is_blink[index]:
        area = int(scores.predicted_area_px[index])
        verdict = f"no pupil, but {area} px predicted" if area else "no pupil, none predicted"
    elif not scores.found[index]:
        verdict = "pupil not found"
    else:
        error = scores.center_error_px[index]
        verdict = f"IoU {scores.pupil_iou[index]:.4f}, center error {error:.2f} px"
    return f"{scores.names[index]}: {verdict}"


def write_tables(scores: FrameScores, confidence: NDArray[np.float64], out: Path) -> None:
    """Writes per_frame.csv, iou_curve.csv and center_curve.csv; NaN becomes an empty cell.

    Raises:
        OutputError: a file cannot be written.
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
