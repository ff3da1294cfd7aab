"""ONNX files of ours, opened, checked and run; the only module that imports onnxruntime."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pupilseg.errors import CheckpointError, UsageError
from pupilseg.geometry import HEIGHT, WIDTH
from pupilseg.model_files.calibration import Calibration
from pupilseg.preprocess import PREPROCESSINGS
from pupilseg.weights import TORCH_SUFFIXES

if TYPE_CHECKING:
    import os

    import numpy as np
    from numpy.typing import NDArray

OUTPUT_SHAPES: dict[str, tuple[int, ...]] = {
    "segmentation": (2, HEIGHT, WIDTH),
    "ellipse": (4,),
}
"""Shape of the output for one frame, by task; the outputs' names are `logits` and `ellipse`."""
_EXPORT = "python -m pipeline.export --model FILE.pt --out FILE.onnx"


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What an ONNX file says of itself.

    Attributes:
        model: name in the registry.
        task: "segmentation" or "ellipse".
        version: of pupilseg that wrote it.
        preprocessing: name in `preprocess.PREPROCESSINGS`, done before the network.
        data: what it was trained on.
        licence: of the weights.
        metrics: validation scores by name.
        parameters: trainable numbers; None where the file does not say.
        calibration: of the confidence; None where the file has none.
    """

    model: str
    task: str
    version: str
    preprocessing: str
    data: str
    licence: str
    metrics: dict[str, Any] = field(default_factory=dict)
    parameters: int | None = None
    calibration: Calibration | None = None


def onnx_session(model: str | os.PathLike[str] | bytes, threads: int = 1) -> Any:
    """Opens an ONNX file, or its bytes, in ONNX Runtime on the CPU.

    Returns:
        An `onnxruntime.InferenceSession`.

    Raises:
        CheckpointError: the file is missing, truncated or not ONNX.
        UsageError: onnxruntime is not installed, or threads is not positive.
    """
    try:
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as faults
    except ImportError as error:
        raise UsageError(
            "predicting needs the package onnxruntime; run `pip install 'pupilseg[predict]'`"
        ) from error
    if threads < 1:
        raise UsageError(f"threads is {threads}, expected 1 or more")
    name, encoded = ("ONNX bytes", model) if isinstance(model, bytes) else _read(Path(model))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors; they come as exceptions, warnings concern no user
    try:
        return onnxruntime.InferenceSession(
            encoded, sess_options=options, providers=["CPUExecutionProvider"]
        )
    except (
        faults.Fail,
        faults.InvalidArgument,
        faults.InvalidGraph,
        faults.InvalidProtobuf,
        faults.NotImplemented,
        faults.RuntimeException,
    ) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{name} is damaged or not an ONNX model ({reason}); export it again with: {_EXPORT}"
        ) from error


def _read(path: Path) -> tuple[str, bytes]:
    """Returns the name and the bytes of a model file."""
    if path.suffix in TORCH_SUFFIXES:
        raise CheckpointError(f"{path} is a checkpoint, expected ONNX; make one with: {_EXPORT}")
    try:
        encoded = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no model file {path}; make one with: {_EXPORT}") from error
    except OSError as error:
        raise CheckpointError(f"cannot read the model file {path}: {error.strerror}") from error
    if not encoded:
        raise CheckpointError(f"{path} is empty, expected ONNX; make it again with: {_EXPORT}")
    return str(path), encoded


class OnnxNetwork:
    """A network from an ONNX file of ours, and what the file says of itself.

    Args:
        model: a file written by `pipeline.export`, or its bytes.
        threads: of ONNX Runtime.

    Attributes:
        info: the metadata.

    Raises:
        CheckpointError: missing, damaged, or not written by pupilseg.
    """

    def __init__(self, model: str | os.PathLike[str] | bytes, threads: int = 1) -> None:
        self.path = Path("ONNX bytes" if isinstance(model, bytes) else model)
        self._session = onnx_session(model, threads)
        self.info = _info(self._session, self.path)

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Runs the network.

        Args:
            images: uint8 (N, 400, 640), preprocessed.

        Returns:
            float32: logits (N, 2, 400, 640), or normalised ellipses (N, 4).

        Raises:
            CheckpointError: the file gives something else, so it is not ours.
        """
        output: NDArray[np.float32]
        (output,) = self._session.run(None, {"image": images[:, None]})
        expected = (len(images), *OUTPUT_SHAPES[self.info.task])
        if output.shape != expected:
            raise CheckpointError(
                f"{self.path} gives {output.shape} for {len(images)} frames, expected {expected}; "
                f"export it again with: {_EXPORT}"
            )
        return output


def _info(session: Any, path: Path) -> ModelInfo:
    """Returns a file's metadata, after checking that it has our input and output."""
    stored: dict[str, str] = session.get_modelmeta().custom_metadata_map
    required = ("model", "task", "version", "preprocessing", "data", "licence", "metrics")
    missing = [key for key in required if key not in stored]
    inputs, outputs = session.get_inputs(), session.get_outputs()
    problem = None
    if missing:
        problem = f"its metadata lack {', '.join(missing)}"
    elif stored["task"] not in OUTPUT_SHAPES:
        problem = f"task is {stored['task']!r}, expected one of: {', '.join(OUTPUT_SHAPES)}"
    elif stored["preprocessing"] not in PREPROCESSINGS:
        problem = (
            f"preprocessing is {stored['preprocessing']!r}, this version knows: "
            f"{', '.join(PREPROCESSINGS)}; upgrade pupilseg"
        )
    elif (
        [(i.name, i.type, list(i.shape[1:])) for i in inputs]
        != [("image", "tensor(uint8)", [1, HEIGHT, WIDTH])]
        or isinstance(inputs[0].shape[0], int)
        or len(outputs) != 1
    ):
        found = ", ".join(f"{i.name} {i.type} {i.shape}" for i in inputs)
        problem = f"it takes {found}, expected image tensor(uint8) [N, 1, {HEIGHT}, {WIDTH}]"
    if problem is None:
        try:
            metrics = json.loads(stored["metrics"])
            parameters = int(stored["parameters"]) if "parameters" in stored else None
            fitted = stored.get("calibration")
            calibration = None if fitted is None else Calibration.from_json(fitted)
        except ValueError as error:
            problem = f"its metadata cannot be read: {error}"
    if problem is not None:
        raise CheckpointError(
            f"{path} was not written by pupilseg: {problem}; make one with: {_EXPORT}"
        )
    texts = {key: stored[key] for key in required if key != "metrics"}
    return ModelInfo(**texts, metrics=metrics, parameters=parameters, calibration=calibration)
