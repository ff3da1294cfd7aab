"""Loads, validates and runs pupilseg ONNX models; the only module that imports onnxruntime."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from pupilseg.errors import CheckpointError, UsageError
from pupilseg.geometry import HEIGHT, WIDTH
from pupilseg.model_files.calibration import Calibration
from pupilseg.preprocess import PREPROCESSINGS
from pupilseg.weights import TORCH_SUFFIXES

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

INPUT_NAME = "image"
_EXPORT = "python -m pipeline.export --model FILE.pt --out FILE.onnx"


class Output(NamedTuple):
    """The output of a network.

    Attributes:
        name: name in the ONNX graph.
        shape: shape for one frame.
        meaning: description for help texts and model cards.
    """

    name: str
    shape: tuple[int, ...]
    meaning: str


OUTPUTS = {
    "segmentation": Output("logits", (2, HEIGHT, WIDTH), "background, pupil"),
    "ellipse": Output(
        "ellipse", (4,), "cx / 640, cy / 400, rx / R, ry / R, R = hypot(640, 400) / 2"
    ),
}
"""Task -> output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """Metadata of an ONNX file.

    Attributes:
        model: name of the network in the registry.
        task: "segmentation" or "ellipse".
        version: version of pupilseg that wrote the file.
        preprocessing: name in `preprocess.PREPROCESSINGS`, applied before the network.
        data: training data.
        license: license of the weights.
        metrics: validation scores by name.
        parameters: number of trainable parameters; None if not recorded.
        calibration: calibration of the confidence; None if there is none.
    """

    model: str
    task: str
    version: str
    preprocessing: str
    data: str
    license: str
    metrics: dict[str, Any] = field(default_factory=dict)
    parameters: int | None = None
    calibration: Calibration | None = None

    def to_metadata(self) -> dict[str, str]:
        """Returns the metadata as the text entries of an ONNX file."""
        optional = {}
        if self.parameters is not None:
            optional["parameters"] = str(self.parameters)
        if self.calibration is not None:
            optional["calibration"] = self.calibration.to_json()
        return {
            **{key: getattr(self, key) for key in _REQUIRED if key != "metrics"},
            "metrics": json.dumps(self.metrics),
            "input": f"uint8 (N, 1, {HEIGHT}, {WIDTH}), near infrared, normalized inside",
            "classes": json.dumps(["background", "pupil"]),
            **optional,
        }

    @classmethod
    def from_metadata(cls, stored: Mapping[str, str]) -> Self:
        """Reads metadata written by `to_metadata`.

        Raises:
            ValueError: an entry is missing, or is not supported by this version.
        """
        # Earlier versions wrote "licence".
        stored = {"license" if key == "licence" else key: text for key, text in stored.items()}
        missing = [key for key in _REQUIRED if key not in stored]
        if missing:
            raise ValueError(f"its metadata lack {', '.join(missing)}")
        if stored["task"] not in OUTPUTS:
            raise ValueError(f"task is {stored['task']!r}, expected one of: {', '.join(OUTPUTS)}")
        if stored["preprocessing"] not in PREPROCESSINGS:
            raise ValueError(
                f"preprocessing is {stored['preprocessing']!r}, but this version supports: "
                f"{', '.join(PREPROCESSINGS)}; upgrade pupilseg"
            )
        calibration = stored.get("calibration")
        try:
            return cls(
                **{key: stored[key] for key in _REQUIRED if key != "metrics"},
                metrics=json.loads(stored["metrics"]),
                parameters=int(stored["parameters"]) if "parameters" in stored else None,
                calibration=None if calibration is None else Calibration.from_json(calibration),
            )
        except ValueError as error:
            raise ValueError(f"its metadata cannot be read: {error}") from error


_REQUIRED = ("model", "task", "version", "preprocessing", "data", "license", "metrics")


def onnx_session(model: str | os.PathLike[str] | bytes, threads: int = 1) -> Any:
    """Opens an ONNX file, or its bytes, in ONNX Runtime on the CPU.

    Returns:
        An `onnxruntime.InferenceSession`.

    Raises:
        CheckpointError: the file is missing, truncated or not ONNX.
        UsageError: onnxruntime is not installed, or `threads` is not positive.
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
    options.log_severity_level = (
        3  # errors only; they are raised too, and its warnings are of no use to users
    )
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
        raise CheckpointError(
            f"the model file {path} does not exist; make one with: {_EXPORT}"
        ) from error
    except OSError as error:
        raise CheckpointError(f"cannot read the model file {path}: {error.strerror}") from error
    if not encoded:
        raise CheckpointError(f"{path} is empty, expected ONNX; make it again with: {_EXPORT}")
    return str(path), encoded


class OnnxNetwork:
    """A network from an ONNX file written by pupilseg.

    Args:
        model: a file written by `pipeline.export`, or its bytes.
        threads: number of ONNX Runtime threads.

    Attributes:
        info: metadata of the file.

    Raises:
        CheckpointError: the file is missing, damaged, or not written by pupilseg.
    """

    def __init__(self, model: str | os.PathLike[str] | bytes, threads: int = 1) -> None:
        self.path = Path("ONNX bytes" if isinstance(model, bytes) else model)
        self._session = onnx_session(model, threads)
        try:
            self.info = ModelInfo.from_metadata(self._session.get_modelmeta().custom_metadata_map)
            _check_signature(self._session)
        except ValueError as error:
            raise CheckpointError(
                f"{self.path} was not written by pupilseg: {error}; make one with: {_EXPORT}"
            ) from error

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Runs the network.

        Args:
            images: uint8 (N, 400, 640), preprocessed.

        Returns:
            float32: logits (N, 2, 400, 640), or normalized ellipses (N, 4).

        Raises:
            CheckpointError: the output has an unexpected shape.
        """
        output: NDArray[np.float32]
        (output,) = self._session.run(None, {INPUT_NAME: images[:, None]})
        expected = (len(images), *OUTPUTS[self.info.task].shape)
        if output.shape != expected:
            raise CheckpointError(
                f"{self.path} returned shape {output.shape} for {len(images)} frames, expected "
                f"{expected}; export it again with: {_EXPORT}"
            )
        return output


def _check_signature(session: Any) -> None:
    """Checks the input and the number of outputs of a graph.

    Raises:
        ValueError: they differ from those that `pipeline.export` writes.
    """
    inputs = session.get_inputs()
    found = [(value.name, value.type, list(value.shape[1:])) for value in inputs]
    if (
        found != [(INPUT_NAME, "tensor(uint8)", [1, HEIGHT, WIDTH])]
        or isinstance(inputs[0].shape[0], int)  # a fixed batch size
        or len(session.get_outputs()) != 1
    ):
        takes = ", ".join(f"{value.name} {value.type} {value.shape}" for value in inputs)
        raise ValueError(
            f"it takes {takes}, expected {INPUT_NAME} tensor(uint8) [N, 1, {HEIGHT}, {WIDTH}]"
        )
