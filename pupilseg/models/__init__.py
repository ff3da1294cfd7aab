"""The networks, and the registry that makes them by name."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any, NamedTuple

from pupilseg.errors import UsageError
from pupilseg.models.efficientvit import (
    TinyEfficientViTBase,
    TinyEfficientViTMicro,
    TinyEfficientViTSeg,
)
from pupilseg.models.ellipse import EllipseRegressionNet

if TYPE_CHECKING:
    from torch import nn

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


class ModelEntry(NamedTuple):
    """What is known of a network by its name.

    Attributes:
        builder: the class; its keyword arguments are the architecture.
        task: "segmentation" (logits (N, 2, 400, 640)) or "ellipse" ((N, 4)).
        model_type: the MLflow tag `model_type`.
        summary: one line on what it is.
    """

    builder: type[nn.Module]
    task: str
    model_type: str
    summary: str


MODELS = {
    "efficientvit": ModelEntry(
        TinyEfficientViTSeg,
        "segmentation",
        "TinyEfficientViT",
        "EfficientViT (MSRA) encoder with cascaded group attention and skip decoder",
    ),
    "efficientvit_tiny": ModelEntry(
        TinyEfficientViTMicro,
        "segmentation",
        "TinyEfficientViT-Micro",
        "TinyEfficientViT, its encoder and decoder narrower: under 10,000 parameters",
    ),
    "efficientvit_base": ModelEntry(
        TinyEfficientViTBase,
        "segmentation",
        "TinyEfficientViT-Base",
        "TinyEfficientViT, its encoder wider: just under 60,000 parameters",
    ),
    "ellipse": ModelEntry(
        EllipseRegressionNet,
        "ellipse",
        "EllipseRegressionNet",
        "upright ellipse, the moments of a soft mask of 4 px cells",
    ),
}


def list_models() -> list[str]:
    """Returns the names that `create_model` takes."""
    return list(MODELS)


def model_entry(name: str) -> ModelEntry:
    """Returns the registry entry of a name.

    Raises:
        UsageError: there is no network of that name.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"unknown model {name!r}; there are: {', '.join(MODELS)}.{hint}")
    return MODELS[name]


def create_model(name: str, **architecture: Any) -> nn.Module:
    """Builds a network with freshly initialised weights.

    Args:
        name: one of `list_models()`.
        **architecture: overrides of the class's keyword arguments (embed_dims, depths, ...).

    Raises:
        UsageError: unknown name, or an argument that the network does not take.
    """
    builder = model_entry(name).builder
    try:
        return builder(**architecture)
    except TypeError as error:
        raise UsageError(f"model {name!r} cannot be built with {architecture}: {error}") from error
