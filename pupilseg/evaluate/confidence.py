"""Runs a model on a split and calibrates its confidence."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pupilseg.errors import UsageError
from pupilseg.evaluate.scoring import centroid
from pupilseg.geometry import HEIGHT, WIDTH
from pupilseg.letterbox import Letterbox
from pupilseg.model_files.calibration import GOOD_PX, Calibration, cross_fitted, fit_calibration
from pupilseg.predict.predictor import pupil_from_output
from pupilseg.runtime.progress import progress_bar
from pupilseg.shards import open_shards
from pupilseg.shards.codec import unpack_bits
from pupilseg.shards.format import BITS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from pupilseg.model_files.onnx import OnnxNetwork
    from pupilseg.shards import ShardSet

    Outputs = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
    """Maps preprocessed images, uint8 (N, 400, 640), to logits or normalized ellipses."""

_BATCH_SIZE = 8
_WHOLE_IMAGE = Letterbox.of((HEIGHT, WIDTH))


def check_preprocessing(shards: ShardSet, trained: str, model: str) -> None:
    """Checks that a model was trained on images with the same preprocessing as a split.

    Args:
        shards: the split.
        trained: preprocessing of the model's training images.
        model: its name, for messages.

    Raises:
        UsageError: the preprocessing differs.
    """
    applied = shards.manifest["preprocessing"]
    if trained != applied:
        raise UsageError(
            f"{model} was trained on images with preprocessing {trained!r}, but those in "
            f"{shards.directory} have {applied!r}; pass shards that "
            f"`python -m pipeline.materialize --preprocessing {trained}` made from raw images, or "
            "a model trained on these shards"
        )


def frames_with_output(
    shards: ShardSet, outputs: Outputs, indices: Sequence[int], batch_size: int, description: str
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float32]]]:
    """Yields the image and label of each sample, (400, 640) each, and the network's output.

    Args:
        shards: the split.
        outputs: the network.
        indices: indices of the samples.
        batch_size: number of frames per call of the network.
        description: label of the progress bar.
    """
    # Decode only the label: decoding the distance maps too would take ten times as long.
    packed = shards.encoding("label") == BITS
    images = shards["image"]
    starts = range(0, len(indices), batch_size)
    for start in progress_bar(starts, description, unit="batch"):
        part = indices[start : start + batch_size]
        batch = np.stack([images[i] for i in part])
        for i, image, output in zip(part, batch, outputs(batch), strict=True):
            label = unpack_bits(shards["label"][i]) if packed else shards.sample(i)["label"]
            yield image, label, output


def confidence_and_error(
    image: NDArray[np.uint8], label: NDArray[np.generic], output: NDArray[np.float32]
) -> tuple[float, float]:
    """Returns the raw confidence of the predicted pupil, and the error of its center in px.

    Both are NaN if no pupil was found. The error is infinite if the label has no pupil.
    """
    predicted = pupil_from_output(output, image, _WHOLE_IMAGE)
    if predicted.ellipse is None:
        return math.nan, math.nan
    truth = centroid(np.asarray(label) != 0)
    distance = float(np.hypot(*(truth - np.array(predicted.ellipse[:2]))))
    return predicted.confidence, math.inf if math.isnan(distance) else distance


class PredictedConfidence(NamedTuple):
    """Predicted confidence and actual center error of n frames.

    Attributes:
        raw: float64 (n,), raw confidence; NaN if no pupil was found.
        center_error_px: float64 (n,), distance between the predicted ellipse's center and the
            label's centroid; infinite if the label has no pupil, NaN if none was found.
    """

    raw: NDArray[np.float64]
    center_error_px: NDArray[np.float64]

    @property
    def found(self) -> NDArray[np.bool_]:
        """Bool (n,): a pupil was found."""
        return ~np.isnan(self.raw)

    @property
    def good(self) -> NDArray[np.bool_]:
        """Bool (n,): a pupil was found and its center error is at most `GOOD_PX`."""
        return self.center_error_px <= GOOD_PX

    def calibrated(self, calibration: Calibration | None) -> NDArray[np.float64]:
        """Returns the calibrated confidence, float64 (n,); 0 if no pupil was found.

        Args:
            calibration: calibration of the model; None fits one on each half of these frames and
                applies it to the other half.
        """
        confidence = np.zeros(len(self.raw))
        raw, good = self.raw[self.found], self.good[self.found]
        if calibration is None:
            confidence[self.found] = cross_fitted(raw, good)
        else:
            confidence[self.found] = [calibration(score) for score in raw]
        return confidence

    def fit(self, data: str) -> Calibration:
        """Returns the calibration fitted on these frames; `data` names their source."""
        return fit_calibration(self.raw[self.found], self.good[self.found], data)


def calibrate(network: OnnxNetwork, model: str, shards_dir: Path) -> Calibration:
    """Calibrates a network's confidence on a split.

    Args:
        network: a segmentation or ellipse network.
        model: its name, for messages.
        shards_dir: the split, such as DIR/validation.

    Raises:
        DataError: the shards are missing or damaged.
        UsageError: the preprocessing of their images differs from that of the model.
    """
    with open_shards(shards_dir) as shards:
        check_preprocessing(shards, network.info.preprocessing, model)
        frames = frames_with_output(shards, network, range(len(shards)), _BATCH_SIZE, "calibrate")
        rows = np.array([confidence_and_error(*frame) for frame in frames]).reshape(-1, 2)
        split = f"{shards.manifest['source']}, {shards.manifest['split']}"
    return PredictedConfidence(*rows.T).fit(split)
