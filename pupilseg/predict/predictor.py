"""Finds the pupil in frames of any size with an ONNX model, without torch.

    predictor = Predictor("m.onnx")
    mask, ellipse, confidence = predictor(frame)  # frame: uint8 (H, W)

The model file records the preprocessing that the network was trained with; it is applied here too.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pupilseg.geometry import Ellipse, ellipse_from_vector
from pupilseg.letterbox import Letterbox
from pupilseg.model_files.onnx import OnnxNetwork
from pupilseg.predict.postprocess import (
    blob_confidence,
    draw_ellipse,
    ellipse_confidence,
    find_blob,
    margin_near,
    sub_pixel_ellipse,
)
from pupilseg.preprocess import get_preprocessing
from pupilseg.runtime.threads import in_background
from pupilseg.weights import model_path

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

    from numpy.typing import NDArray

BATCH_SIZE = 16
"""Number of frames per call of the network in `Predictor.batch`; their logits take 33 MB."""


class Prediction(NamedTuple):
    """The pupil in one frame, in pixels of that frame.

    Attributes:
        mask: uint8 (H, W) of {0, 1}; all zero if no pupil was found.
        ellipse: None if no pupil was found, for example in a closed eye.
        confidence: in [0, 1]; 0 if no pupil was found. If the model file contains a calibration,
            the probability that the center is within 5 px at the network's size of 640 x 400;
            otherwise the raw score of `postprocess.blob_confidence` or
            `postprocess.ellipse_confidence`.
    """

    mask: NDArray[np.uint8]
    ellipse: Ellipse | None
    confidence: float


def pupil_from_output(
    output: NDArray[np.float32], image: NDArray[np.uint8], box: Letterbox
) -> Prediction:
    """Converts a network's output for one frame to a prediction with a raw confidence.

    Args:
        output: logits (2, 400, 640), or a normalized ellipse (4,).
        image: uint8 (400, 640), the network's input.
        box: position of the frame in that image.
    """
    shape = (box.frame_height, box.frame_width)
    if output.ndim == 1:
        ellipse = ellipse_from_vector(output)
        if ellipse is None:
            return Prediction(np.zeros(shape, dtype=np.uint8), None, 0.0)
        confidence = ellipse_confidence(ellipse, image, box)
        ellipse = box.ellipse_to_frame(ellipse)
        return Prediction(draw_ellipse(ellipse, shape), ellipse, confidence)
    raw = output[1] > output[0]
    blob = find_blob(raw, box)
    if blob is None:
        return Prediction(np.zeros(shape, dtype=np.uint8), None, 0.0)
    margin = margin_near(output, blob)
    return Prediction(
        box.mask_to_frame(margin, blob.mask),
        box.ellipse_to_frame(sub_pixel_ellipse(blob, margin, box)),
        blob_confidence(blob, margin, raw, box),
    )


class Predictor:
    """Finds the pupil in single frames, batches and streams.

    Args:
        path: an ONNX file written by `pipeline.export`, or one of `weights.NAMES`.
        threads: number of ONNX Runtime threads; 1 is fastest for these networks.

    Raises:
        CheckpointError: the file is missing, damaged, or not written by pupilseg.
        UsageError: onnxruntime is not installed, or no weights have that name.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int = 1) -> None:
        self.network = OnnxNetwork(model_path(os.fspath(path)), threads)
        self.info = self.network.info
        self._preprocess = get_preprocessing(self.info.preprocessing)

    def __call__(self, frame: NDArray[np.uint8]) -> Prediction:
        """Returns the pupil in one frame, uint8 (H, W).

        Raises:
            ValueError: the frame has another dtype or shape.
        """
        return self.batch([frame])[0]

    def batch(self, frames: Iterable[NDArray[np.uint8]]) -> list[Prediction]:
        """Returns the pupils in frames, uint8 (H, W) each, which may differ in size.

        Raises:
            ValueError: a frame has another dtype or shape.
        """
        every = list(frames)
        found: list[Prediction] = []
        for start in range(0, len(every), BATCH_SIZE):
            part = every[start : start + BATCH_SIZE]
            boxes = [Letterbox.of(_shape_of(frame)) for frame in part]
            fitted = [self._preprocess(b.fit(frame)) for b, frame in zip(boxes, part, strict=True)]
            images = np.stack(fitted) if len(fitted) > 1 else fitted[0][None]  # np.stack copies
            rows = zip(self.network(images), images, boxes, strict=True)
            found += [self._predict(*row) for row in rows]
        return found

    def stream(
        self, frames: Iterable[NDArray[np.uint8]], *, slots: int = 2
    ) -> Generator[Prediction]:
        """Yields the pupil in each frame, with the same results as `predictor(frame)`.

        A background thread reads frames and runs the network while the caller uses earlier results.

        Args:
            frames: uint8 (H, W) each; may be endless, like those of a camera.
            slots: maximum number of results computed ahead. With 0, there is no thread, and a frame
                is read only when its result is requested.

        Raises:
            ValueError: a frame has another dtype or shape.
        """
        found = (self(frame) for frame in frames)
        return in_background(found, slots) if slots else found

    def _predict(
        self, output: NDArray[np.float32], image: NDArray[np.uint8], box: Letterbox
    ) -> Prediction:
        """Returns the prediction for one frame, calibrated if the model has a calibration."""
        found = pupil_from_output(output, image, box)
        if found.ellipse is None or self.info.calibration is None:
            return found
        return found._replace(confidence=self.info.calibration(found.confidence))


def _shape_of(frame: NDArray[np.generic]) -> tuple[int, int]:
    """Returns (height, width) of a frame.

    Raises:
        ValueError: it is not uint8 (H, W), or it is empty.
    """
    if frame.ndim == 2 and frame.dtype == np.uint8 and frame.size:
        return frame.shape
    hint = "pass a frame with at least one pixel"
    if frame.dtype == np.uint16:
        hint = "reduce 16 bits to 8: (frame >> 8).astype(np.uint8)"
    elif frame.dtype != np.uint8:
        hint = "scale its values to 0 .. 255 and convert it: frame.astype(np.uint8)"
    elif frame.ndim == 3 and frame.size:
        hint = (
            "convert color to gray: cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY); "
            "for several frames use batch or stream"
        )
    raise ValueError(f"a frame is {frame.dtype} {frame.shape}, expected uint8 (H, W); {hint}")
