"""Output of the notebooks: data, networks, training progress, scores, files."""

from __future__ import annotations

import logging
import math
import os
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from IPython.display import FileLink, Image, display

from pupilseg.evaluate.plots import loss_curves, read_history, training_curves
from pupilseg.geometry import ELLIPSE_SCALE
from pupilseg.model_files.opening import open_model
from pupilseg.notebook.colab import download, in_colab
from pupilseg.pictures import compare, encode, sheet
from pupilseg.shards import open_shards
from pupilseg.sources import SPLITS
from pupilseg.train.checkpoints import epoch_line

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import nn

TILE_PX = (480, 300)
"""Width and height of each frame in a picture; two are side by side."""
PICTURE_PX = 960
"""Width of a picture in the notebook."""


def show_log() -> None:
    """Shows the library's log in the notebook."""
    logger = logging.getLogger("pupilseg")
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler(sys.stdout))
        logger.propagate = False
    logger.setLevel(logging.INFO)


def show_splits(shards_dir: Path) -> None:
    """Prints source, split rule and counts of the shards in a directory."""
    for split in SPLITS:
        with open_shards(shards_dir / split) as shards:
            manifest = shards.manifest
            if split == SPLITS[0]:
                print(f"source: {manifest['source']}; preprocessing: {manifest['preprocessing']}")
                print(f"splits: {manifest['split_rule']}")
            pupils = np.count_nonzero(shards["ellipse"][:][:, 2])
            size = sum(file["bytes"] for file in manifest["files"])
            print(
                f"{split}: {len(shards):,} frames, {pupils:,} with a pupil, "
                f"{size / 1e6:,.0f} MB of shards"
            )


def show_ellipses(split_dir: Path, count: int = 4) -> None:
    """Prints the labels' ellipses of the frames that `show_frames` shows."""
    print(f"{'frame':24}{'cx':>8}{'cy':>8}{'rx':>8}{'ry':>8}   in px: cx, cy, rx, ry")
    with open_shards(split_dir) as shards:
        for index in _spread(len(shards), count):
            vector = shards["ellipse"][index]
            normalized = "".join(f"{value:8.4f}" for value in vector)
            pixels = ", ".join(f"{value:.1f}" for value in vector * ELLIPSE_SCALE)
            print(f"{shards['name'][index]:24}{normalized}   {pixels if vector[2] else 'no pupil'}")


def _spread(frames: int, count: int) -> list[int]:
    """Returns at most `count` indices, spread evenly over a split."""
    picks: list[int] = np.linspace(0, frames - 1, min(count, frames)).round().astype(int).tolist()
    return picks


def show_frames(split_dir: Path, model_file: Path | None = None, count: int = 4) -> None:
    """Shows frames spread over a split, with the label outlined in green.

    Args:
        split_dir: shards of the split.
        model_file: if given, each frame is shown again with this network's prediction in red.
        count: number of frames.
    """
    with open_shards(split_dir) as shards:
        samples = [shards.sample(index) for index in _spread(len(shards), count)]
    images = np.stack([sample["image"] for sample in samples])
    labels = [sample["label"] for sample in samples]
    nothing = np.zeros_like(labels[0])
    tiles = [[compare(*pair, nothing)] for pair in zip(images, labels, strict=True)]
    print("green: label" if model_file is None else "left: label (green); right: prediction (red)")
    if model_file is not None:
        masks = open_model(model_file).masks
        for row, image, mask in zip(tiles, images, masks(images), strict=True):
            row.append(compare(image, nothing, mask))
    print("frames:", *(sample["name"] for sample in samples))
    _show(encode(sheet([tile for row in tiles for tile in row], TILE_PX), ".jpg"))


def _show(encoded: bytes) -> None:
    display(Image(encoded, width=PICTURE_PX))


def show_layers(model: nn.Module) -> int:
    """Prints the parameter count of each part of a network; returns the total."""
    counts = {
        name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()
    }
    for name, part in model.named_children():
        print(f"{name:10} {counts[name]:>8,}  {type(part).__name__}")
    total = sum(p.numel() for p in model.parameters())
    print(f"{'total':10} {total:>8,}  {type(model).__name__}")
    return total


class LiveRun:
    """Prints one line per epoch and updates the curves; pass it to `train` as `on_epoch`.

    Args:
        history_file: written by the run; a resumed run extends it.
        epochs: of the whole run.
        after_epoch: called after each epoch, when its files have been written.
    """

    def __init__(
        self, history_file: Path, epochs: int, after_epoch: Callable[[], None] = lambda: None
    ) -> None:
        self._history_file = history_file
        self._epochs = epochs
        self._after_epoch = after_epoch
        self._picture: Any = None

    def __call__(self, row: Mapping[str, float]) -> None:
        """Shows an epoch's row."""
        drawn = Image(training_curves(read_history(self._history_file)), width=PICTURE_PX)
        if self._picture is None:
            self._picture = display(drawn, display_id=True)
        else:
            self._picture.update(drawn)
        print(epoch_line(row, self._epochs), flush=True)
        self._after_epoch()


def show_loss_curves(history_file: Path) -> None:
    """Shows each term of a run's loss against the epoch."""
    _show(loss_curves(read_history(history_file)))


def show_scores(metrics: Mapping[str, Any]) -> None:
    """Prints the most important metrics that `evaluate_model` returns."""
    print(f"{metrics['model']} on {metrics['frames']} frames ({metrics['blinks']} without a pupil)")
    for title, key in (
        ("mIoU", "miou"),
        ("IoU of background", "background_iou"),
        ("IoU of pupil", "pupil_iou"),
    ):
        print(f"{title:24} {metrics[key]:.4f}")
    for title, key in (("center error", "center_error_px"), ("radius error", "radius_error_px")):
        mean, median, high = (metrics[f"{key}_{kind}"] for kind in ("mean", "median", "p95"))
        numbers = f"{mean:.2f} px mean, {median:.2f} px median, {high:.2f} px 95th percentile"
        print(f"{title:24} {'no pupil was found' if math.isnan(mean) else numbers}")
    share = metrics["found_share"]
    found = "no frame has a pupil" if math.isnan(share) else f"{100 * share:.1f} %"
    print(f"{'pupils found':24} {found}")
    false = metrics["blink_false_positives"]
    print(f"{'false pupils':24} {false} in the {metrics['blinks']} frames without one")


def offer_files(paths: Sequence[Path]) -> None:
    """Downloads files through the browser in Colab; shows links to them elsewhere."""
    if in_colab():
        download(paths)
        return
    for path in paths:
        display(FileLink(os.path.relpath(path)))
