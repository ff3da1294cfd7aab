"""Export formats and the release of trained weights.

To add a format, write one module here with a function such as `onnx.export_onnx`, and add one line
to `EXPORTERS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pupilseg.errors import UsageError

if TYPE_CHECKING:
    import os

__all__ = ["EXPORTERS", "ExportReport", "Exporter", "export_model"]

EXPORTERS = {
    ".onnx": "pupilseg.export.onnx:export_onnx",
    ".safetensors": "pupilseg.export.safetensors:export_safetensors",
}
"""Output file suffix -> "module:function", imported on first use."""


@dataclass(frozen=True, slots=True)
class ExportReport:
    """Result of an export.

    Attributes:
        bytes: size of the file.
        parameters: number of trainable parameters.
        parity: largest difference from the torch output, relative to the largest output
            magnitude; 0 for a format that stores the weights themselves.
    """

    bytes: int
    parameters: int
    parity: float


class Exporter(Protocol):
    """Signature of the functions in `EXPORTERS`."""

    def __call__(
        self, model_file: Path, out: Path, *, calibrate_on: Path | None = None
    ) -> ExportReport:
        """Writes a model file in another format, atomically; see `export_model`."""


def export_model(
    model_file: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    calibrate_on: str | os.PathLike[str] | None = None,
) -> ExportReport:
    """Exports a trained network in the format given by the suffix of the output file.

    Args:
        model_file: written by `pupilseg.model_files.checkpoint.save_model`.
        out: path with one of the suffixes in `EXPORTERS`.
        calibrate_on: shards of the validation split, on which the confidence is calibrated; None
            keeps the raw score.

    Raises:
        UsageError: the suffix is unknown, a package is missing, or the format cannot store a
            calibration.
        CheckpointError: the model file is damaged, or the exported network differs from torch.
        OutputError: `out` cannot be written.
    """
    out = Path(out)
    if out.suffix not in EXPORTERS:
        raise UsageError(
            f"cannot export to {out}: the suffix is {out.suffix!r}, expected one of: "
            f"{', '.join(EXPORTERS)}"
        )
    module, _, name = EXPORTERS[out.suffix].partition(":")
    exporter: Exporter = getattr(import_module(module), name)
    shards = None if calibrate_on is None else Path(calibrate_on)
    return exporter(Path(model_file), out, calibrate_on=shards)
