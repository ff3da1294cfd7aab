"""The networks and the registry that builds them by name; torch is imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pupilseg.models.registry import MODELS, ModelEntry, create_model, list_models, model_entry

if TYPE_CHECKING:
    from pupilseg.models.efficientvit import (
        TinyEfficientViTBase,
        TinyEfficientViTMicro,
        TinyEfficientViTSeg,
    )
    from pupilseg.models.ellipse import EllipseRegressionNet

__all__ = [
    "MODELS",
    "EllipseRegressionNet",
    "ModelEntry",
    "TinyEfficientViTBase",
    "TinyEfficientViTMicro",
    "TinyEfficientViTSeg",
    "create_model",
    "list_models",
    "model_entry",
]


def __getattr__(name: str) -> Any:
    """Imports the class of a registered network on first use (PEP 562)."""
    for entry in MODELS.values():
        if entry.class_name == name:
            return entry.builder_class
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
