"""Opens a torch or ONNX model file as a function from images to outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pupilseg.errors import CheckpointError, UsageError
from pupilseg.geometry import NORMALIZED, ellipse_from_vector, ellipse_mask
from pupilseg.model_files.onnx import OnnxNetwork
from pupilseg.weights import SAFETENSORS, TORCH_SUFFIXES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from pupilseg.model_files.calibration import Calibration


def masks_from_output(output: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Converts a network's output to masks, without the postprocessing of `predict`.

    Args:
        output: logits (N, 2, 400, 640), or normalized ellipses (N, 4).

    Returns:
        bool (N, 400, 640).
    """
    if output.ndim == 4:
        masks: NDArray[np.bool_] = output[:, 1] > output[:, 0]
        return masks
    return np.stack([ellipse_mask(ellipse_from_vector(vector)) != 0 for vector in output])


class LoadedModel(NamedTuple):
    """A network that is ready to run.

    Attributes:
        name: name of the network in the registry.
        preprocessing: required preprocessing of the images.
        outputs: maps images, uint8 (N, 400, 640), to float32 logits (N, 2, 400, 640) or normalized
            ellipses (N, 4).
        calibration: calibration of the confidence; None if the file has none.
    """

    name: str
    preprocessing: str
    outputs: Callable[[NDArray[np.uint8]], NDArray[np.float32]]
    calibration: Calibration | None = None

    def masks(self, images: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Returns the masks of images, bool (N, 400, 640), without postprocessing."""
        return masks_from_output(self.outputs(images))


def open_model(model: Path, device: str | None = None) -> LoadedModel:
    """Opens a model file.

    Args:
        model: *.pt, *.safetensors (need torch) or *.onnx (needs onnxruntime).
        device: device for torch (see `runtime.device.find_device`); ONNX files run on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, or not written by pupilseg.
        UsageError: the suffix is unknown, the device is unavailable, or a package is missing.
    """
    if model.suffix in TORCH_SUFFIXES:
        return _open_checkpoint(model, device)
    if model.suffix != ".onnx":
        raise UsageError(
            f"{model} has the suffix {model.suffix!r}, expected .pt, {SAFETENSORS} or .onnx"
        )
    if device not in (None, "cpu"):
        raise UsageError(f"an ONNX file runs on the CPU, not on {device!r}; omit --device")
    network = OnnxNetwork(model)
    info = network.info
    return LoadedModel(info.model, info.preprocessing, network, info.calibration)


def _open_checkpoint(model: Path, device: str | None) -> LoadedModel:
    """Opens a checkpoint; see `open_model`."""
    try:
        import torch
    except ImportError as error:
        raise UsageError(
            f"{model} needs the package torch; run `pip install 'pupilseg[train]'`, or export it "
            "to ONNX where torch is installed"
        ) from error
    from pupilseg.model_files.checkpoint import load_model_and_card
    from pupilseg.runtime.device import find_device

    chosen = find_device(device)
    network, card = load_model_and_card(model, chosen)

    def outputs(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        batch = torch.from_numpy(NORMALIZED[images][:, None]).to(chosen)
        with torch.inference_mode():
            return np.asarray(network(batch).cpu().numpy(), dtype=np.float32)

    if card.preprocessing is None:
        raise CheckpointError(
            f"{model} does not record the preprocessing of its training images; train it with "
            "`python -m pipeline.train`"
        )
    return LoadedModel(card.model, card.preprocessing, outputs)
