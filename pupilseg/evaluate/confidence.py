"""The frames of a split with what a network makes of them, and how far its confidence is right."""

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
    """From preprocessed images, uint8 (N, 400, 640), to logits or normalised ellipses."""

_BATCH = 8
_WHOLE = Letterbox.of((HEIGHT, WIDTH))


def check_preprocessing(shards: ShardSet, trained: str, model: str) -> None:
    """Checks that a model was trained on images such as a split holds.

    Raises:
        UsageError: theirs went through another preprocessing.
    """
    applied = shards.manifest["preprocessing"]
    if trained != applied:
        raise UsageError(
            f"{model} was trained on images with preprocessing {trained!r}, those in "
            f"{shards.directory} have {applied!r}; give shards that "
            f"`python -m pipeline.materialize --preprocessing {trained}` made from raw images, or "
            "a model trained on these"
        )


def frames_with_output(
    shards: ShardSet, outputs: Outputs, indices: Sequence[int], batch_size: int, what: str
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float32]]]:
    """Yields image and label of samples, (400, 640) each, and the network's output.

    Args:
        shards: the split.
        outputs: the network.
        indices: of the samples.
        batch_size: frames that the network gets at once.
        what: stands in front of the progress bar.
    """
    # The label alone is decoded: a sample's distance maps would take ten times as long.
    packed = shards.encoding("label") == BITS
    images = shards["image"]
    starts = range(0, len(indices), batch_size)
    for start in progress_bar(starts, what, unit="batch"):
        part = indices[start : start + batch_size]
        batch = np.stack([images[i] for i in part])
        for i, image, output in zip(part, batch, outputs(batch), strict=True):
            label = unpack_bits(shards["label"][i]) if packed else shards.sample(i)["label"]
            yield image, label, output


def judge(
    image: NDArray[np.uint8], label: NDArray[np.generic], output: NDArray[np.float32]
) -> tuple[float, float]:
    """Returns the raw confidence in a frame's pupil, and how far off its centre is, in px.

    Both are NaN where no pupil was found; the distance is infinite where there is none to be found.
    """
    found = pupil_from_output(output, image, _WHOLE)
    if found.ellipse is None:
        return math.nan, math.nan
    truth = centroid(np.asarray(label) != 0)
    distance = float(np.hypot(*(truth - np.array(found.ellipse[:2]))))
    return found.confidence, math.inf if math.isnan(distance) else distance


class Certainty(NamedTuple):
    """What a predictor said of n frames, and what was so.

    Attributes:
        raw: float64 (n,), raw confidence; NaN where no pupil was found.
        center_error_px: float64 (n,), of the predicted ellipse from the label's centroid; infinite
            where the label has no pupil, NaN where none was found.
    """

    raw: NDArray[np.float64]
    center_error_px: NDArray[np.float64]

    @property
    def found(self) -> NDArray[np.bool_]:
        """(n,): a pupil was found."""
        return ~np.isnan(self.raw)

    @property
    def good(self) -> NDArray[np.bool_]:
        """(n,): one was found, with its centre within `GOOD_PX`."""
        return self.center_error_px <= GOOD_PX

    def confidence(self, calibration: Calibration | None) -> NDArray[np.float64]:
        """Returns what the predictor says, float64 (n,); 0 where it found no pupil.

        Args:
            calibration: the model's; None for a map fitted on these frames, each half of them by
                the other, so that no frame is judged by a map that it made.
        """
        said = np.zeros(len(self.raw))
        raw, good = self.raw[self.found], self.good[self.found]
        if calibration is None:
            said[self.found] = cross_fitted(raw, good)
        else:
            said[self.found] = [calibration(score) for score in raw]
        return said

    def fit(self, data: str) -> Calibration:
        """Returns the map that fits these frames."""
        return fit_calibration(self.raw[self.found], self.good[self.found], data)


def calibrate(network: OnnxNetwork, model: str, shards_dir: Path) -> Calibration:
    """Fits a network's confidence on a split.

    Args:
        network: of any task.
        model: its name, for messages.
        shards_dir: the split, such as DIR/validation.

    Raises:
        DataError: the shards are missing or damaged.
        UsageError: their images went through another preprocessing than the model's.
    """
    with open_shards(shards_dir) as shards:
        check_preprocessing(shards, network.info.preprocessing, model)
        frames = frames_with_output(shards, network, range(len(shards)), _BATCH, "calibrate")
        judged = np.array([judge(*frame) for frame in frames]).reshape(-1, 2)
        split = f"{shards.manifest['source']}, {shards.manifest['split']}"
    return Certainty(*judged.T).fit(split)
