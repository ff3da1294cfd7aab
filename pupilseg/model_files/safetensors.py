"""Weights in the safetensors format, with the model card in the file's metadata.

Released weights use this format because it contains no code and other programs can read it. This is
the only module that imports safetensors.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pupilseg.errors import CheckpointError, UsageError
from pupilseg.files import atomic_path
from pupilseg.model_files.card import ModelCard
from pupilseg.weights import SAFETENSORS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

_CARD_KEY = "pupilseg"
"""Metadata key under which the card is stored as JSON."""


def write_safetensors(path: Path, weights: Mapping[str, Tensor], card: ModelCard) -> None:
    """Writes weights and card atomically; the same input gives the same bytes.

    Raises:
        ValueError: the card holds NaN or infinity, which JSON cannot represent.
        OutputError: the disk is full or read-only.
        UsageError: safetensors is not installed.
    """
    text = json.dumps(card.to_dict(), ensure_ascii=False, allow_nan=False)
    encoded = _package().torch.save(dict(weights), metadata={_CARD_KEY: text})
    with atomic_path(path) as temporary:
        temporary.write_bytes(encoded)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], ModelCard]:
    """Returns the weights and the card of a file.

    Raises:
        CheckpointError: the file is missing, damaged, or not written by pupilseg.
        UsageError: safetensors is not installed.
    """
    package = _package()
    try:
        with package.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        card = json.loads(metadata[_CARD_KEY])
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; pass a *{SAFETENSORS} file") from error
    except (OSError, package.SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged or was not written by pupilseg ({error}); copy it again"
        ) from error
    return weights, ModelCard.from_dict(card, str(path))


def _package() -> Any:
    """Imports safetensors with its torch module."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise UsageError(
            f"*{SAFETENSORS} files need the package safetensors; run: pip install 'pupilseg[train]'"
        ) from error
    return safetensors
