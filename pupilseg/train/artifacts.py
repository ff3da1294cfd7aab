"""What a tracked run shows beside its numbers: curves, sample predictions, the ONNX file."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import torch

from pupilseg.errors import PupilSegError
from pupilseg.evaluate.plots import read_history, training_curves
from pupilseg.files import atomic_path
from pupilseg.geometry import HEIGHT, WIDTH
from pupilseg.model_files.checkpoint import load_model
from pupilseg.pictures import compare, sheet, write_image
from pupilseg.train.metrics import predicted_mask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from pupilseg.shards.reader import ShardSet

log = logging.getLogger(__name__)

SHOWN = 6
"""Validation frames on the sheet, in two columns."""


def make_artifacts(
    model_file: Path, history_file: Path, validation: ShardSet, folder: Path
) -> Iterator[Path]:
    """Writes what shows how a run went, and yields each file once it is there.

    What cannot be made (a package is missing, say) is told in the log and left out: the run is
    over, and its checkpoints are written.

    Args:
        model_file: the best model.
        history_file: a row an epoch.
        validation: frames to show predictions on.
        folder: gets curves.png, predictions.png and an ONNX file named as the model.
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
        log.warning("no %s for this run: %s", path.name, error)
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
    """Draws outlines of label (green) and prediction (red) on frames from all over the split."""
    model = load_model(model_file)
    count = min(SHOWN, len(validation))
    tiles = []
    for index in np.linspace(0, len(validation) - 1, count).round().astype(int):
        sample = validation.sample(int(index))
        image: NDArray[np.uint8] = np.array(sample["image"])
        pixels = torch.from_numpy(image)[None, None].float() / 127.5 - 1
        with torch.no_grad():
            mask = predicted_mask(model(pixels))[0].numpy()
        tiles.append(compare(image, np.asarray(sample["label"]), mask))
    write_image(path, sheet(tiles, (WIDTH, HEIGHT)))
