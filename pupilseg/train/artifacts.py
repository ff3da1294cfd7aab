"""Files of a tracked run in addition to its metrics: curves, sample predictions, ONNX file."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from pupilseg.errors import PupilSegError
from pupilseg.evaluate.plots import read_history, training_curves
from pupilseg.files import atomic_path
from pupilseg.geometry import HEIGHT, WIDTH
from pupilseg.model_files.opening import open_model
from pupilseg.pictures import compare, sheet, write_image

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pupilseg.shards.reader import ShardSet

log = logging.getLogger(__name__)

SAMPLES = 6
"""Validation frames in predictions.png."""


def make_artifacts(
    model_file: Path, history_file: Path, validation: ShardSet, folder: Path
) -> Iterator[Path]:
    """Writes the files and yields the path of each once it exists.

    A file that cannot be written, for example because a package is missing, is skipped with a
    warning, since the run has finished and its checkpoints are complete.

    Args:
        model_file: the best model.
        history_file: CSV with one row per epoch.
        validation: frames for sample predictions.
        folder: receives curves.png, predictions.png and an ONNX file named after the model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in (
        ("curves.png", lambda path: _write_curves(history_file, path)),
        ("predictions.png", lambda path: _write_predictions(model_file, validation, path)),
        (f"{model_file.stem}.onnx", lambda path: _write_onnx(model_file, validation, path)),
    ):
        if _made(make, folder / name):
            yield folder / name


def _made(make: Callable[[Path], None], path: Path) -> bool:
    try:
        make(path)
    except PupilSegError as error:
        log.warning("%s is missing from this run: %s", path.name, error)
        return False
    return True


def _write_curves(history_file: Path, path: Path) -> None:
    drawn = training_curves(read_history(history_file))
    with atomic_path(path) as temporary:
        temporary.write_bytes(drawn)


def _write_onnx(model_file: Path, validation: ShardSet, path: Path) -> None:
    from pupilseg.export.onnx import export_onnx

    export_onnx(model_file, path, calibrate_on=validation.directory)


def _write_predictions(model_file: Path, validation: ShardSet, path: Path) -> None:
    """Draws the outlines of label (green) and prediction (red) on frames spread over the split."""
    count = min(SAMPLES, len(validation))
    indices = np.linspace(0, len(validation) - 1, count).round().astype(int)
    samples = [validation.sample(int(index)) for index in indices]
    images = np.stack([sample["image"] for sample in samples])
    labels = [sample["label"] for sample in samples]
    masks = open_model(model_file, "cpu").masks(images)
    tiles = [compare(*parts) for parts in zip(images, labels, masks, strict=True)]
    write_image(path, sheet(tiles, (WIDTH, HEIGHT)))
