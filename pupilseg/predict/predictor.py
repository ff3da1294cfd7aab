"""Finds the pupil in a frame with an ONNX file: no torch, any frame size, preprocessing applied.

    predictor = Predictor("m.onnx")
    mask, ellipse, confidence = predictor(frame)  # frame: uint8 (H, W)

What a network needs done to its images is read from the file's metadata, so a caller cannot get it
wrong.
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
"""Frames that `Predictor.batch` gives the network at once; their logits take 33 MB."""


class Prediction(NamedTuple):
    """The pupil of one frame, in the frame's own pixels.

    Attributes:
        mask: uint8 (H, W) of {0, 1}; all zero where no pupil was found.
        ellipse: None where no pupil was found: a closed eye is an answer, not an error.
        confidence: 0 .. 1, and 0 where no pupil was found. The probability that the centre is
            within 5 px (of the network's 640 x 400) where the model file holds a calibration; else
            the raw score, `postprocess.blob_confidence` or `postprocess.ellipse_confidence`.
    """

    mask: NDArray[np.uint8]
    ellipse: Ellipse | None
    confidence: float


def pupil_from_output(
    output: NDArray[np.float32], image: NDArray[np.uint8], box: Letterbox
) -> Prediction:
    """Returns the pupil that a network's output for one frame stands for; confidence is raw.

    Args:
        output: logits (2, 400, 640), or a normalised ellipse (4,).
        image: uint8 (400, 640), what the network saw.
        box: where the frame lies in it.
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
        path: an ONNX file written by `pipeline.export`, or a name of `pretrained.NAMES`.
        threads: of ONNX Runtime; one is the quickest for these networks.

    Raises:
        CheckpointError: the file is missing, damaged or not ours.
        UsageError: onnxruntime is not installed, or there are no weights of that name.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int = 1) -> None:
        self.network = OnnxNetwork(model_path(os.fspath(path)), threads)
        self.info = self.network.info
        self._preprocess = get_preprocessing(self.info.preprocessing)

    def __call__(self, frame: NDArray[np.uint8]) -> Prediction:
        """Returns the pupil of one frame, uint8 (H, W) of any size.

        Raises:
            ValueError: the frame has another dtype or shape.
        """
        return self.batch([frame])[0]

    def batch(self, frames: Iterable[NDArray[np.uint8]]) -> list[Prediction]:
        """Returns the pupils of frames, uint8 (H, W) each, which may differ in size.

        Raises:
            ValueError: a frame has another dtype or shape.
        """
        every = list(frames)
        found: list[Prediction] = []
        for start in range(0, len(every), BATCH_SIZE):
            part = every[start : start + BATCH_SIZE]
            boxes = [Letterbox.of(_checked(frame)) for frame in part]
            fitted = [self._preprocess(b.fit(frame)) for b, frame in zip(boxes, part, strict=True)]
            images = np.stack(fitted) if len(fitted) > 1 else fitted[0][None]  # one is no copy
            rows = zip(self.network(images), images, boxes, strict=True)
            found += [self._predict(*row) for row in rows]
        return found

    def stream(
        self, frames: Iterable[NDArray[np.uint8]], *, slots: int = 2
    ) -> Generator[Prediction]:
        """Yields the pupil of each frame, in order, as `predictor(frame)` gives it.

        A thread draws the frames and runs the network while the caller works on earlier ones.

        Args:
            frames: uint8 (H, W) each; may be endless, such as a camera's.
            slots: pupils that may wait for the caller; 0 for no thread: a frame is then drawn
                only when its pupil is asked for.

        Raises:
            ValueError: a frame has another dtype or shape.
        """
        found = (self(frame) for frame in frames)
        return in_background(found, slots) if slots else found

    def _predict(
        self, output: NDArray[np.float32], image: NDArray[np.uint8], box: Letterbox
    ) -> Prediction:
        """Turns one frame's output into its pupil."""
        found = pupil_from_output(output, image, box)
        if found.ellipse is None or self.info.calibration is None:
            return found
        return found._replace(confidence=self.info.calibration(found.confidence))


def _checked(frame: NDArray[np.generic]) -> tuple[int, int]:
    """Returns (height, width) of a frame.

    Raises:
        ValueError: it is not uint8 (H, W), or has no pixel.
    """
    if frame.ndim == 2 and frame.dtype == np.uint8 and frame.size:
        return frame.shape
    mend = "give a frame with at least one pixel"
    if frame.dtype == np.uint16:
        mend = "bring 16 bits to 8: (frame >> 8).astype(np.uint8)"
    elif frame.dtype != np.uint8:
        mend = "bring its greys to 0 .. 255 and convert it: frame.astype(np.uint8)"
    elif frame.ndim == 3 and frame.size:
        mend = "make colour grey: cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY); for frames one after the"
        mend += " other use batch or stream"
    raise ValueError(f"a frame is {frame.dtype} {frame.shape}, expected uint8 (H, W); {mend}")
