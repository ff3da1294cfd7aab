"""Evaluates a model file, .pt or .onnx, on the frames of a split; an ONNX file without torch."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pupilseg.errors import CheckpointError, UsageError
from pupilseg.files import atomic_path, write_json
from pupilseg.plots import CENTER_AXIS_PX, read_history
from pupilseg.predict import OnnxNetwork
from pupilseg.progress import progress_bar
from pupilseg.report import Example, write_report
from pupilseg.scoring import FrameScores, masks_from_output, score_frames, share_within, summarise
from pupilseg.shards import open_shards
from pupilseg.shards.codec import IMAGE_TABLE, unpack_bits
from pupilseg.shards.format import BITS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from pupilseg.shards import ShardSet

    Masks = Callable[[NDArray[np.uint8]], NDArray[np.bool_]]
    """From preprocessed images, uint8 (N, 400, 640), to masks, bool (N, 400, 640)."""

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
)
"""Columns of per_frame.csv; the errors are empty where label or prediction has no pupil."""
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
        model: *.pt or *.onnx.
        shards_dir: of the split, e.g. DIR/validation.
        out: gets metrics.json, per_frame.csv, iou_curve.csv, center_curve.csv, report.html.
        device: for *.pt, as `device.find_device`; ONNX files run on the CPU.
        batch_size: frames that the network gets at once.
        history: a training run's history.csv, drawn into the report.

    Returns:
        What metrics.json holds: `scoring.summarise`, model, model_file, preprocessing, data,
        split. What there was no frame for is NaN here and null there.

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
        name, trained, masks = load_masks(model, device)
        applied = shards.manifest["preprocessing"]
        if trained != applied:
            raise UsageError(
                f"{model} was trained on images with preprocessing {trained!r}, those in "
                f"{shards_dir} have {applied!r}; give shards that `python -m pipeline.materialize "
                f"--preprocessing {trained}` made from raw images, or a model trained on these"
            )
        every = range(len(shards))
        pairs = ((label, mask) for _, label, mask in _frames(shards, masks, every, batch_size))
        scores = score_frames(list(shards["name"]), pairs)
        metrics = summarise(scores) | {
            "model": name,
            "model_file": model.name,
            "preprocessing": applied,
            "data": shards.manifest["source"],
            "split": shards.manifest["split"],
        }
        examples = {
            title: [
                Example(_caption(scores, i), *frame)
                for i, frame in zip(picks, _frames(shards, masks, picks, batch_size), strict=True)
            ]
            for title, picks in choose_examples(scores).items()
        }
    write_tables(scores, out)
    write_report(out / "report.html", metrics, scores, examples, curves)
    # Last: whoever finds metrics.json finds all.
    write_json(out / "metrics.json", {k: None if v != v else v for k, v in metrics.items()})  # noqa: PLR0124 - NaN
    return metrics


def load_masks(model: Path, device: str | None = None) -> tuple[str, str, Masks]:
    """Opens a model file as a function from images to raw masks.

    Args:
        model: *.pt (needs torch) or *.onnx (needs onnxruntime).
        device: for *.pt.

    Returns:
        The network's name, the preprocessing that its images went through, and the function.

    Raises:
        CheckpointError: the file is missing, damaged or foreign.
        UsageError: another kind of file, a device that is not there, a package not installed.
    """
    if model.suffix == ".pt":
        return _load_torch(model, device)
    if model.suffix != ".onnx":
        raise UsageError(f"{model} has the suffix {model.suffix!r}, expected .pt or .onnx")
    if device not in (None, "cpu"):
        raise UsageError(f"an ONNX file runs on the CPU, not on {device!r}; leave --device out")
    network = OnnxNetwork(model)
    info = network.info
    return info.model, info.preprocessing, lambda images: masks_from_output(network(images))


def _load_torch(model: Path, device: str | None) -> tuple[str, str, Masks]:
    """Opens a checkpoint; see `load_masks`."""
    try:
        import torch
    except ImportError as error:
        raise UsageError(
            f"{model} needs the package torch; run `pip install 'pupilseg[train]'`, or export it "
            "to ONNX where torch is installed"
        ) from error
    from pupilseg.checkpoint import load_model
    from pupilseg.device import find_device
    from pupilseg.metrics import predicted_mask

    chosen = find_device(device)
    network = load_model(model, chosen)
    card: dict[str, Any] = network.card  # type: ignore[assignment]  # set by load_model

    def masks(images: NDArray[np.uint8]) -> NDArray[np.bool_]:
        batch = torch.from_numpy(IMAGE_TABLE[images][:, None]).to(chosen)
        with torch.inference_mode():
            output = network(batch)
        # Ellipses are drawn by one routine for both forms, so only the numbers can differ.
        if output.ndim == 4:
            found: NDArray[np.bool_] = predicted_mask(output).cpu().numpy()
            return found
        return masks_from_output(output.cpu().numpy())

    preprocessing = card.get("preprocessing")
    if preprocessing is None:
        raise CheckpointError(
            f"{model} does not say which preprocessing its images went through; train it with "
            "`python -m pipeline.train`"
        )
    return card["model"], preprocessing, masks


def _frames(
    shards: ShardSet, masks: Masks, indices: Sequence[int], batch_size: int
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.bool_]]]:
    """Yields image, label and predicted mask of samples, (400, 640) each."""
    # The label alone is decoded: a sample's distance maps would take ten times as long.
    packed = shards.encoding("label") == BITS
    images = shards["image"]
    starts = range(0, len(indices), batch_size)
    for start in progress_bar(starts, "evaluate", unit="batch"):
        part = indices[start : start + batch_size]
        batch = np.stack([images[i] for i in part])
        for i, image, mask in zip(part, batch, masks(batch), strict=True):
            label = unpack_bits(shards["label"][i]) if packed else shards.sample(i)["label"]
            yield image, label, mask


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


def write_tables(scores: FrameScores, out: Path) -> None:
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
