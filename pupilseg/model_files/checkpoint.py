"""Checkpoints and training states: written atomically, loaded with `weights_only=True`.

A checkpoint is a plain `state_dict` as `torch.save` writes it: `torch.load(f, weights_only=True)`
opens it. The `ModelCard` needed to rebuild the network is an additional member of the same zip
archive, which torch ignores, so that weights and card cannot be separated.
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pupilseg.errors import CheckpointError, UsageError
from pupilseg.files import atomic_path
from pupilseg.model_files.card import ModelCard
from pupilseg.model_files.safetensors import read_safetensors
from pupilseg.models import create_model
from pupilseg.weights import SAFETENSORS, weights_path

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from torch import Tensor, nn

CARD_MEMBER = "archive/pupilseg.json"
"""Name of the card inside the archive; "archive" is the root folder that torch.save uses."""
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)
"""Earliest date that zip supports. A fixed date makes the bytes reproducible."""
_WIDE_MICRO: dict[str, Any] = {
    "embed_dim": (16, 16, 16),
    "ratios": (1, 1, 1),
    "key_dim": 2,
    "stem_dim": 6,
}
"""Architecture of `efficientvit_tiny` in files of pupilseg 0.1.0, where it was the default."""
_NOT_AN_ARCHIVE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
)
"""Errors that zipfile and json raise on damaged bytes (found by flipping bits)."""
_NOT_A_STATE_DICT = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""Errors that torch.load raises on other pickles (found by flipping bits)."""


def plain_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Returns detached, contiguous CPU copies of the weights without torch.compile's prefix."""
    return {
        # `contiguous()` would keep the channels_last strides of 1x1 kernels, and store them.
        name.replace("_orig_mod.", ""): value.detach()
        .cpu()
        .clone(memory_format=torch.contiguous_format)
        for name, value in model.state_dict().items()
    }


def save_model(
    path: str | os.PathLike[str], weights: Mapping[str, Tensor], card: ModelCard
) -> None:
    """Writes a checkpoint atomically; the same weights and card give the same bytes.

    Args:
        path: usually `*.pt`.
        weights: a plain `state_dict`.
        card: stored in the same file.

    Raises:
        ValueError: the card holds NaN or infinity, which JSON cannot represent.
        OutputError: the disk is full or read-only.
    """
    buffer = io.BytesIO()
    # A new dict, because that of an nn.Module has a `_metadata` attribute that would be pickled.
    torch.save(dict(weights), buffer)
    text = json.dumps(card.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr(zipfile.ZipInfo(CARD_MEMBER, _ZIP_EPOCH), text)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def _read_archive(path: Path) -> dict[str, Any] | None:
    """Checks all checksums of an archive, which torch itself does not do.

    Returns:
        The stored card, not validated; None if the file has none (a training state).

    Raises:
        CheckpointError: the file is missing, unreadable, damaged, or not an archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            if damaged is not None:
                raise zipfile.BadZipFile(f"checksum of {damaged!r} differs")
            if CARD_MEMBER not in archive.namelist():
                return None
            stored = json.loads(archive.read(CARD_MEMBER))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} does not exist; train a model with `python -m pipeline.train`"
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path} ({error.strerror}), expected a model file (*.pt)"
        ) from error
    except _NOT_AN_ARCHIVE as error:
        raise CheckpointError(
            f"{path} is not a model file or is damaged ({error}); train again or copy it again"
        ) from error
    if not isinstance(stored, dict):
        raise CheckpointError(f"{path} has a damaged {CARD_MEMBER}; train again or copy it again")
    return stored


def read_card(path: str | os.PathLike[str]) -> ModelCard:
    """Returns the card stored in a model file (*.pt, *.safetensors).

    Raises:
        CheckpointError: the file is missing, damaged, not written by pupilseg, or of a newer
            format.
    """
    path = Path(path)
    if path.suffix == SAFETENSORS:
        return read_safetensors(path)[1]
    stored = _read_archive(path)
    if stored is None:
        raise CheckpointError(
            f"{path} does not record which network it holds (no {CARD_MEMBER} inside); pass a file "
            "written by pupilseg, or build the network with create_model() and load_state_dict()"
        )
    return ModelCard.from_dict(stored, str(path))


def load_tensors(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Loads a file of tensors and plain values; never runs code from a pickle.

    Raises:
        CheckpointError: the file is missing, damaged, or contains anything except tensors and
            plain values.
    """
    path = Path(path)
    if path.suffix == SAFETENSORS:
        return dict(read_safetensors(path)[0])
    _read_archive(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except _NOT_A_STATE_DICT as error:
        # torch's own message suggests disabling weights_only, so it must not be shown to users.
        raise CheckpointError(
            f"{path} contains more than tensors and plain values, and was not loaded; pass a file "
            "written by pupilseg"
        ) from error
    if not isinstance(loaded, dict):
        raise CheckpointError(
            f"{path} holds a {type(loaded).__name__}, expected named tensors; pass a file written "
            "by pupilseg"
        )
    return loaded


def load_weights(
    model: nn.Module, weights: Mapping[str, Tensor], path: str | os.PathLike[str]
) -> None:
    """Loads weights into a network of the same architecture.

    Raises:
        CheckpointError: names or shapes differ. The message shows the first difference.
    """
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(getattr(value, "shape", ())) for name, value in weights.items()}
    if expected != found:
        differ = sorted(
            name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
        )
        name = differ[0]
        raise CheckpointError(
            f"{path} does not hold the weights of {type(model).__name__}: {len(differ)} weights "
            f"differ, such as {name!r} with shape {found.get(name, 'missing')}, expected "
            f"{expected.get(name, 'none of that name')}; pass a file of that network"
        )
    model.load_state_dict(dict(weights))


def load_model(
    path: str | os.PathLike[str], device: str | torch.device = "cpu", *, pretrained: bool = False
) -> nn.Module:
    """Rebuilds a trained network from its file or from released weights.

    Args:
        path: a model file (*.pt, *.safetensors); with `pretrained`, the name of a network.
        device: device of the returned network.
        pretrained: load the released weights of that name.

    Returns:
        The network in evaluation mode on `device`; its `card` attribute holds the `ModelCard`.

    Raises:
        CheckpointError: the file is missing, damaged, or not written by pupilseg.
        UsageError: no released weights have that name.
    """
    return load_model_and_card(
        weights_path(str(path), SAFETENSORS) if pretrained else path, device
    )[0]


def load_model_and_card(
    path: str | os.PathLike[str], device: str | torch.device = "cpu"
) -> tuple[nn.Module, ModelCard]:
    """Returns the network as `load_model` does, and its card.

    Raises:
        CheckpointError: the file is missing, damaged, or not written by pupilseg.
    """
    weights = load_tensors(path)
    card = _with_architecture(read_card(path), weights)
    try:
        model = create_model(card.model, **card.architecture)
    except (UsageError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} describes a network that this version of pupilseg cannot build ({error}); "
            "upgrade pupilseg or pass another file"
        ) from error
    load_weights(model, weights, path)
    model.card = card  # type: ignore[assignment]  # nn.Module types every attribute as a tensor
    return model.to(device).eval(), card


def read_initial_card(path: Path, model: str) -> ModelCard:
    """Returns the card of the initial weights of a training run.

    Args:
        path: value of `--init`, a model file.
        model: name of the network to be trained.

    Raises:
        CheckpointError: the file is missing, damaged, or not written by pupilseg.
        UsageError: the file holds another network.
    """
    card = read_card(path)
    if card.model != model:
        raise UsageError(
            f"--init {path} holds the network {card.model!r}, but this run trains {model!r}; pass "
            "a file of that network, or omit --init"
        )
    return _with_architecture(card, load_tensors(path))


def _with_architecture(card: ModelCard, weights: Mapping[str, Any]) -> ModelCard:
    """Adds the architecture to a card of an earlier version, which does not record it."""
    if card.model == "efficientvit_tiny" and not card.architecture:
        stem = weights.get("encoder.stem.0.0.weight", ())
        if len(stem) == _WIDE_MICRO["stem_dim"]:
            return replace(card, architecture=_WIDE_MICRO)
    return card


def save_state(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Writes a full training state (tensors and plain values) atomically.

    Raises:
        OutputError: the disk is full or read-only.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getvalue())
