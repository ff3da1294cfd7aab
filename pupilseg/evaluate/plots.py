"""Plots evaluations and training runs as PNG; the only module that imports matplotlib."""

from __future__ import annotations

import csv
import io
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pupilseg.errors import DataError, UsageError
from pupilseg.evaluate.scoring import share_within
from pupilseg.model_files.calibration import GOOD_PX

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from pupilseg.model_files.calibration import Reliability

CENTER_AXIS_PX = 10.0
"""Upper limit of the center error axis."""
_BLUE, _ORANGE, _GRAY = "#2563eb", "#ea580c", "#6b7280"
_LOSS_TITLES = {
    "loss": "total loss",
    "ce_loss": "cross-entropy",
    "dice_loss": "Dice loss",
    "surface_loss": "surface loss",
    "center_loss": "center loss",
    "radius_loss": "radius loss",
}
_TRAINING_PANELS = (
    ("loss", ("train_loss", "valid_loss")),
    ("mIoU", ("train_iou", "valid_iou")),
    ("pupil IoU", ("train_pupil_iou", "valid_pupil_iou")),
    ("center error (px)", ("train_center_px", "valid_center_px")),
)


def iou_histogram(pupil_iou: NDArray[np.float64]) -> bytes:
    """Draws a histogram of the frames' pupil IoU.

    Args:
        pupil_iou: float64 (n,), one value per frame with a pupil.

    Returns:
        A PNG file.
    """
    figure, (axes,) = _figure(1)
    low = max(0.0, math.floor(10 * float(pupil_iou.min())) / 10) if pupil_iou.size else 0.0
    bars = int(np.clip(2 * math.sqrt(pupil_iou.size), 10, 50))
    axes.hist(pupil_iou, bins=np.linspace(low, 1, bars + 1).tolist(), color=_BLUE)
    if pupil_iou.size:
        median = float(np.median(pupil_iou))
        axes.axvline(median, color=_ORANGE, linewidth=1.2)
        axes.set_title(f"median {median:.4f}, {pupil_iou.size} frames with a pupil", fontsize=9)
    axes.set(xlabel="pupil IoU", ylabel="frames", xlim=(low, 1))
    return _png(figure)


def center_curve(center_error_px: NDArray[np.float64]) -> bytes:
    """Draws the cumulative distribution of the center error.

    Args:
        center_error_px: float64 (n,), one value per frame with a pupil; NaN if no pupil was found.

    Returns:
        A PNG file.
    """
    figure, (axes,) = _figure(1)
    distance = np.linspace(0, CENTER_AXIS_PX, 201)
    axes.plot(distance, share_within(center_error_px, distance), color=_BLUE)
    axes.axvline(GOOD_PX, color=_GRAY, linewidth=0.8, linestyle=":")
    within = share_within(center_error_px, np.array([GOOD_PX]))[0]
    if center_error_px.size:
        axes.set_title(f"{100 * within:.1f} % within {GOOD_PX:g} px", fontsize=9)
    axes.set(xlabel="center error (px)", ylabel="share of frames with a pupil")
    axes.set(xlim=(0, CENTER_AXIS_PX), ylim=(0, 1.02))
    return _png(figure)


def reliability_curve(curve: Reliability) -> bytes:
    """Draws a reliability diagram: the share of good frames against the confidence.

    Args:
        curve: reliability over the frames in which a pupil was found. The area of a dot is
            proportional to its number of frames.

    Returns:
        A PNG file.
    """
    figure, (axes,) = _figure(1)
    axes.plot([0, 1], [0, 1], color=_GRAY, linewidth=0.8, linestyle=":")
    axes.plot(curve.confidence, curve.share_good, color=_BLUE, linewidth=1.2)
    if len(curve.frames):
        sizes = 60 * curve.frames / curve.frames.max()
        axes.scatter(curve.confidence, curve.share_good, s=sizes, color=_BLUE)
        axes.set_title(f"mean calibration error {curve.error:.3f}", fontsize=9)
    axes.set(xlabel="confidence", ylabel=f"share within {GOOD_PX:g} px")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    return _png(figure)


def read_history(path: str | os.PathLike[str]) -> dict[str, list[float]]:
    """Reads the history of a training run, a CSV file with one row per epoch.

    Returns:
        Column -> values; empty cells are NaN.

    Raises:
        DataError: the file is missing, empty, or not numeric.
    """
    path = Path(path)
    hint = "pass the history.csv that training wrote, or omit --history"
    try:
        with path.open(newline="", encoding="utf-8") as handle:
            head, *rows = list(csv.reader(handle, strict=True)) or [[]]
        numbers = [[float(cell or math.nan) for cell in row] for row in rows]
        columns = dict(zip(head, zip(*numbers, strict=True), strict=bool(rows)))
    except FileNotFoundError as error:
        raise DataError(f"the history {path} does not exist; {hint}") from error
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(
            f"{path} is not a CSV file with one row per epoch ({error}); {hint}"
        ) from error
    if "epoch" not in columns:
        raise DataError(
            f"{path} has no column epoch (found: {', '.join(columns) or 'none'}); {hint}"
        )
    return {name: list(values) for name, values in columns.items()}


def training_curves(history: Mapping[str, Sequence[float]]) -> bytes:
    """Draws the loss and scores over the epochs.

    Args:
        history: as returned by `read_history`; missing columns are skipped.

    Returns:
        A PNG file.
    """
    return _curves(
        history,
        [
            (label, [name for name in names if name in history])
            for label, names in _TRAINING_PANELS
            if any(name in history for name in names)
        ],
    )


def loss_curves(history: Mapping[str, Sequence[float]]) -> bytes:
    """Draws each term of the loss over the epochs, for training and validation.

    Args:
        history: as returned by `read_history`.

    Returns:
        A PNG file.
    """
    terms = [
        name.removeprefix("train_") for name in history if re.fullmatch(r"train_(\w+_)?loss", name)
    ]
    panels = [(_LOSS_TITLES.get(term, term), [f"train_{term}", f"valid_{term}"]) for term in terms]
    return _curves(history, panels)


def _curves(
    history: Mapping[str, Sequence[float]], panels: Sequence[tuple[str, Sequence[str]]]
) -> bytes:
    """Draws panels of (title, columns) side by side; returns a PNG file."""
    figure, all_axes = _figure(max(1, len(panels)))
    for axes, (label, names) in zip(all_axes, panels, strict=False):
        for name in names:
            split = "train" if name.startswith("train") else "validation"
            color = _ORANGE if split == "train" else _BLUE
            axes.plot(history["epoch"], history[name], color=color, label=split, marker=".")
        axes.set(xlabel="epoch", title=label)
        axes.xaxis.get_major_locator().set_params(integer=True)  # no tick at epoch 1.5
        axes.legend(frameon=False, fontsize=8)
    return _png(figure)


def _figure(panels: int) -> tuple[Any, Sequence[Any]]:
    """Returns a figure with axes side by side, without the display and global state of pyplot."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(
            "plots need the package matplotlib; run `pip install 'pupilseg[pipeline]'`"
        ) from error
    figure = Figure(figsize=(4.2 * panels, 3.0), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, panels, squeeze=False)[0]
    for axes in all_axes:
        axes.grid(color="#e5e7eb", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, all_axes


def _png(figure: Any) -> bytes:
    """Encodes a figure as PNG, without metadata that differs between matplotlib versions."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
