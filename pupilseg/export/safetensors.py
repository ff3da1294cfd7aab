"""Exports a checkpoint as safetensors: the same weights and card in a file without code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pupilseg.errors import UsageError
from pupilseg.export import ExportReport
from pupilseg.model_files.checkpoint import load_model_and_card, plain_state_dict
from pupilseg.model_files.safetensors import write_safetensors

if TYPE_CHECKING:
    from pathlib import Path


def export_safetensors(
    model_file: Path, out: Path, *, calibrate_on: Path | None = None
) -> ExportReport:
    """Writes a model file as safetensors; see `pupilseg.export.export_model`."""
    if calibrate_on is not None:
        raise UsageError(f"{out} cannot store a calibration; omit --calibrate or export *.onnx")
    model, card = load_model_and_card(model_file)
    write_safetensors(out, plain_state_dict(model), card)
    return ExportReport(out.stat().st_size, sum(p.numel() for p in model.parameters()), parity=0.0)
