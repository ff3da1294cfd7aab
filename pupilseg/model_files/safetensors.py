"""Weights as safetensors, with the card of `checkpoint` beside them: the form that is released.

Nothing in such a file can be run, and other programs read it. This is the only module that imports
safetensors.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pupilseg.errors import CheckpointError, UsageError
from pupilseg.files import atomic_path
from pupilseg.weights import RELEASED

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

_CARD = "pupilseg"
"""Key of the card in the file's metadata, as JSON."""


def write_weights(path: Path, weights: Mapping[str, Tensor], card: Mapping[str, Any]) -> None:
    """Writes weights and card atomically; the same ones give the same bytes.

    Raises:
        ValueError: the card holds NaN or infinity, which JSON has no name for.
        OutputError: the disk is full or read-only.
        UsageError: safetensors is not installed.
    """
    text = json.dumps(card, ensure_ascii=False, allow_nan=False)
    encoded = _package().torch.save(dict(weights), metadata={_CARD: text})
    with atomic_path(path) as temporary:
        temporary.write_bytes(encoded)


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the weights and the card of a file.

    Raises:
        CheckpointError: the file is missing, damaged or not one of ours.
        UsageError: safetensors is not installed.
    """
    package = _package()
    try:
        with package.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
        card = json.loads(metadata[_CARD])
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {path}; give another *{RELEASED}") from error
    except (OSError, package.SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged or was not written by pupilseg ({error}); copy it anew"
        ) from error
    return weights, card


def _package() -> Any:
    """Returns `safetensors` with its torch part."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise UsageError(
            f"*{RELEASED} files need the package safetensors; run: pip install 'pupilseg[train]'"
        ) from error
    return safetensors
