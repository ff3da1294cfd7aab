"""The table of networks: everything that depends on a network's name.

To add a network, write its module in this package and add one entry to `MODELS`; its checkpoint
names, command-line choices, loss, export and MLflow tags follow from the entry. Importing this
module does not import torch: `create_model` imports a network's module when it is built.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from pupilseg.errors import UsageError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """A network, and the names of the files that its training writes.

    Attributes:
        name: name in commands, model files and file names.
        builder: "module:Class"; the class's keyword arguments are the architecture.
        task: "segmentation" (logits, (N, 2, 400, 640)) or "ellipse" (normalized, (N, 4)); decides
            the loss and the ONNX output.
        model_type: MLflow tag `model_type`.
        summary: one line of description.
        checkpoint_every: epochs between numbered checkpoints; the last epoch always has one. 0
            writes one at each improvement, with the mIoU in its name.
        defer_metrics: on CUDA, keep metrics on the device until training ends by default, for
            networks whose epochs are so short that one transfer per epoch is noticeable.
        nickname: name of its released weights, if not `name`.
        released: whether the package includes trained weights.
    """

    name: str
    builder: str
    task: Literal["segmentation", "ellipse"]
    model_type: str
    summary: str
    checkpoint_every: int = 10
    defer_metrics: bool = False
    nickname: str | None = None
    released: bool = False

    @property
    def class_name(self) -> str:
        """Name of the network's class."""
        return self.builder.partition(":")[2]

    @property
    def builder_class(self) -> type[nn.Module]:
        """The network's class; imports torch."""
        module, _, name = self.builder.partition(":")
        found: type[nn.Module] = getattr(import_module(module), name)
        return found

    @property
    def best_file(self) -> str:
        """Name of the checkpoint with the best validation mIoU."""
        return f"best_{self.name}_model.pt"

    @property
    def state_file(self) -> str:
        """Name of the full training state, for `--resume`."""
        return f"{self.name}_training_state.pt"

    @property
    def history_file(self) -> str:
        """Name of the CSV file with one row per epoch."""
        return f"{self.name}_history.csv"

    def epoch_file(self, epoch: int, miou: float) -> str:
        """Returns the name of a numbered checkpoint.

        Args:
            epoch: counted from 1.
            miou: validation mIoU, which is part of the name if checkpoints mark improvements.
        """
        if self.checkpoint_every == 0:
            return f"{self.name}_epoch{epoch}_miou{miou:.4f}.pt"
        return f"{self.name}_model_epoch_{epoch}.pt"

    @property
    def epoch_files(self) -> str:
        """Pattern of the names of numbered checkpoints, for `Path.glob`."""
        if self.checkpoint_every == 0:
            return f"{self.name}_epoch[0-9]*_miou*.pt"
        return f"{self.name}_model_epoch_[0-9]*.pt"


_ENTRIES = (
    ModelEntry(
        name="efficientvit",
        builder="pupilseg.models.efficientvit:TinyEfficientViTSeg",
        task="segmentation",
        model_type="TinyEfficientViT",
        summary="EfficientViT (MSRA) encoder with cascaded group attention and skip decoder",
        checkpoint_every=0,
        released=True,
    ),
    ModelEntry(
        name="efficientvit_tiny",
        builder="pupilseg.models.efficientvit:TinyEfficientViTMicro",
        task="segmentation",
        model_type="TinyEfficientViT-Micro",
        summary="TinyEfficientViT with a narrower encoder and decoder: under 10,000 parameters",
        defer_metrics=True,
        nickname="micro",
        released=True,
    ),
    ModelEntry(
        name="efficientvit_base",
        builder="pupilseg.models.efficientvit:TinyEfficientViTBase",
        task="segmentation",
        model_type="TinyEfficientViT-Base",
        summary="TinyEfficientViT with a wider encoder: just under 60,000 parameters",
        released=True,
    ),
    ModelEntry(
        name="ellipse",
        builder="pupilseg.models.ellipse:EllipseRegressionNet",
        task="ellipse",
        model_type="EllipseRegressionNet",
        summary="upright ellipse from the moments of a soft mask with cells of 4 px",
        released=True,
    ),
)
MODELS = {entry.name: entry for entry in _ENTRIES}


def list_models() -> list[str]:
    """Returns the names that `create_model` accepts."""
    return list(MODELS)


def model_entry(name: str) -> ModelEntry:
    """Returns the registry entry of a network.

    Raises:
        UsageError: no network has that name.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=1)
        suggestion = f" Did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"unknown model {name!r}; choose one of: {', '.join(MODELS)}.{suggestion}")
    return MODELS[name]


def create_model(name: str, **architecture: Any) -> nn.Module:
    """Builds a network with freshly initialized weights.

    Args:
        name: one of `list_models()`.
        **architecture: overrides of the class's keyword arguments (embed_dim, depth, ...).

    Raises:
        UsageError: unknown name, or an argument that the network does not take.
    """
    builder = model_entry(name).builder_class
    try:
        return builder(**architecture)
    except TypeError as error:
        raise UsageError(f"model {name!r} cannot be built with {architecture}: {error}") from error
