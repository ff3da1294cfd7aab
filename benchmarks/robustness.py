"""Measures how well networks find the pupil in frames unlike those that they were trained on.

python -m benchmarks.robustness --source FOLDER [--model micro ellipse FILE.onnx] [--every 2]

All frames with a pupil, of both splits of a source, are predicted as `pupilseg predict` does: as
they are, and as another camera might record them, with other brightness, focus, noise and distance.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from benchmarks.machine import machine_line
from benchmarks.score_table import print_head, print_row
from pupilseg.cli.program import main_program, positive_int
from pupilseg.evaluate.scoring import centroid, score_frames, summarize
from pupilseg.geometry import HEIGHT, WIDTH
from pupilseg.predict.predictor import Predictor
from pupilseg.preprocess import gamma_clahe
from pupilseg.sample import SPLITS
from pupilseg.sources import download, open_dataset
from pupilseg.weights import NAMES

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Frame = tuple[NDArray[np.uint8], NDArray[np.uint8]]
    """Image and label, uint8 (400, 640) each."""


def toned(change: Callable[[NDArray[np.uint8]], object]) -> Callable[[Frame], Frame]:
    """Returns a change of the image that leaves the label as it is."""
    return lambda frame: (np.asarray(change(frame[0]), dtype=np.uint8), frame[1])


def noisy(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Adds normal noise with a standard deviation of 8 gray levels."""
    noise = np.random.default_rng(0).normal(0, 8, image.shape)
    return np.clip(np.rint(image + noise), 0, 255).astype(np.uint8)


def scaled(factor: float) -> Callable[[Frame], Frame]:
    """Returns a change that scales the frame and centers the pupil; the rest is black."""

    def change(frame: Frame) -> Frame:
        image, label = frame
        x, y = centroid(label != 0)
        to_middle = ((factor, 0, WIDTH / 2 - factor * x), (0, factor, HEIGHT / 2 - factor * y))
        matrix, size = np.array(to_middle), (WIDTH, HEIGHT)
        # warpAffine does not average when it reduces, so blur first.
        soft = cv2.GaussianBlur(image, (0, 0), 0.5 / factor) if factor < 1 else image
        share = cv2.warpAffine(label.astype(np.float32), matrix, size)
        return (
            np.asarray(cv2.warpAffine(soft, matrix, size), dtype=np.uint8),
            (share > 0.5).astype(np.uint8),
        )

    return change


CHANGES: dict[str, Callable[[Frame], Frame]] = {
    "as captured": lambda frame: frame,
    "gamma 0.8 + CLAHE": toned(gamma_clahe),
    "histogram equalized": toned(cv2.equalizeHist),
    "0.6 times as bright": toned(lambda image: cv2.convertScaleAbs(image, alpha=0.6)),
    "1.7 times as bright": toned(lambda image: cv2.convertScaleAbs(image, alpha=1.7)),
    "blurred, sigma 2 px": toned(lambda image: cv2.GaussianBlur(image, (0, 0), 2)),
    "with added noise, sigma 8 levels": toned(noisy),
    "mirrored": lambda frame: (
        np.ascontiguousarray(frame[0][:, ::-1]),
        np.ascontiguousarray(frame[1][:, ::-1]),
    ),
    "0.6 times as large": scaled(0.6),
    "1.6 times as large": scaled(1.6),
}


def frames_of(source: str, every: int) -> list[Frame]:
    """Returns every n-th frame with a pupil of a source."""
    with tempfile.TemporaryDirectory() as raw:
        download(source, Path(raw))
        dataset = open_dataset(Path(raw))
        samples = [
            sample for split in SPLITS for sample in dataset.read(split, 0, dataset.count(split))
        ]
    return [(sample.image, sample.label) for sample in samples if sample.label.any()][::every]


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.robustness", description=__doc__)
    parser.add_argument("--source", required=True, help="as for --source of pipeline.download")
    parser.add_argument(
        "--model", nargs="+", default=NAMES, help="names or *.onnx; default: all released weights"
    )
    parser.add_argument("--every", type=positive_int, default=1, help="use every N-th frame only")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    frames = frames_of(args.source, args.every)
    names = [str(index) for index in range(len(frames))]
    print(machine_line("onnxruntime", "numpy"))
    print(f"{len(frames)} frames with a pupil of {args.source}")
    for model in args.model:
        predictor = Predictor(model)
        print(f"\n{model}\n")
        print_head("frames")
        for name, change in CHANGES.items():
            pairs = ((label, predictor(image).mask) for image, label in map(change, frames))
            print_row(name, summarize(score_frames(names, pairs)))


if __name__ == "__main__":
    main_program(main)
