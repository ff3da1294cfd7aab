"""Opens a model file, for torch or ONNX, as a function from images to outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pupilseg.errors import CheckpointError, UsageError
from pupilseg.geometry import IMAGE_TABLE, ellipse_from_vector, ellipse_mask
from pupilseg.model_files.onnx import OnnxNetwork
from pupilseg.weights import RELEASED, TORCH_SUFFIXES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from pupilseg.model_files.calibration import Calibration


def masks_from_output(output: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Returns the raw masks that a network's output stands for, no blob refused.

    Args:
        output: logits (N, 2, 400, 640), or normalised ellipses (N, 4).

    Returns:
        bool (N, 400, 640).
    """
    if output.ndim == 4:
        masks: NDArray[np.bool_] = output[:, 1] > output[:, 0]
        return masks
    return np.stack([ellipse_mask(ellipse_from_vector(vector)) != 0 for vector in output])


class LoadedModel(NamedTuple):
    """A network, ready to run.

    Attributes:
        name: in the registry.
        preprocessing: that its images must have gone through.
        outputs: from images, uint8 (N, 400, 640), to float32 logits (N, 2, 400, 640) or normalised
            ellipses (N, 4).
        calibration: of its confidence, where the file holds one.
    """

    name: str
    preprocessing: str
    outputs: Callable[[NDArray[np.uint8]], NDArray[np.float32]]
    calibration: Calibration | None = None

    def masks(self, images: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Returns the raw masks of images, bool (N, 400, 640), no blob refused."""
        return masks_from_output(self.outputs(images))


def open_model(model: Path, device: str | None = None) -> LoadedModel:
    """Opens a model file.

    Args:
        model: *.pt, *.safetensors (need torch) or *.onnx (needs onnxruntime).
        device: for torch, as `device.find_device`; ONNX files run on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged or foreign.
        UsageError: another kind of file, a device that is not there, a package not installed.
    """
    if model.suffix in TORCH_SUFFIXES:
        return _open_checkpoint(model, device)
    if model.suffix != ".onnx":
        raise UsageError(
            f"{model} has the suffix {model.suffix!r}, expected .pt, {RELEASED} or .onnx"
        )
    if device not in (None, "cpu"):
        raise UsageError(f"an ONNX file runs on the CPU, not on {device!r}; leave --device out")
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
    from pupilseg.model_files.checkpoint import load_model
    from pupilseg.runtime.device import find_device

    chosen = find_device(device)
    network = load_model(model, chosen)
    card: dict[str, Any] = network.card  # type: ignore[assignment]  # set by load_model

    def outputs(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        batch = torch.from_numpy(IMAGE_TABLE[images][:, None]).to(chosen)
        with torch.inference_mode():
            return np.asarray(network(batch).cpu().numpy(), dtype=np.float32)

    preprocessing = card.get("preprocessing")
    if preprocessing is None:
        raise CheckpointError(
            f"{model} does not say which preprocessing its images went through; train it with "
            "`python -m pipeline.train`"
        )
    return LoadedModel(card["model"], preprocessing, outputs)
