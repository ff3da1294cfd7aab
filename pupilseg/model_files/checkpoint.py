"""Model files and training states: written whole or not at all, loaded without pickle's powers.

A model file is a plain `state_dict` as `torch.save` writes it: `torch.load(f, weights_only=True)`
opens it. What is needed to rebuild the network (name, architecture, preprocessing, metrics) is one
more member of the same zip archive, which torch skips: the two can never part.
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from pupilseg.errors import CheckpointError, UsageError
from pupilseg.files import atomic_path
from pupilseg.model_files.safetensors import read_weights
from pupilseg.models import create_model
from pupilseg.weights import RELEASED, weights_path

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from torch import Tensor, nn

FORMAT_VERSION = 1
CARD_MEMBER = "archive/pupilseg.json"
"""Name of the description inside the archive; "archive" is the root that torch.save gives it."""
_EPOCH = (1980, 1, 1, 0, 0, 0)
"""Zip's earliest date: the same weights give the same bytes whenever they are written."""
_NOT_AN_ARCHIVE = (
    *(zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError),
)
"""What zipfile and json raise on damaged bytes (found by flipping bits)."""
_REFUSED = (
    *(pickle.UnpicklingError, AttributeError, EOFError, LookupError, RuntimeError, TypeError),
    ValueError,
)
"""What torch.load raises on a pickle that is no checkpoint (found by flipping bits)."""


class CheckpointNames(NamedTuple):
    """File names of one network's checkpoints.

    Attributes:
        best: the best by validation mIoU.
        epoch: pattern of the numbered ones, with {epoch} and {miou}.
        every: epochs between numbered ones (the last always); 0 writes one at each improvement.
    """

    best: str
    epoch: str
    every: int

    @property
    def state(self) -> str:
        """The full training state, for `--resume`."""
        return self.best.replace("best_", "").replace("_model.pt", "_training_state.pt")

    @property
    def history(self) -> str:
        """A row an epoch as CSV, for plots and DVC."""
        return self.best.replace("best_", "").replace("_model.pt", "_history.csv")


CHECKPOINT_NAMES = {
    "efficientvit": CheckpointNames(
        "best_efficientvit_model.pt", "efficientvit_epoch{epoch}_miou{miou:.4f}.pt", 0
    ),
    "efficientvit_tiny": CheckpointNames(
        "best_efficientvit_tiny_model.pt", "efficientvit_tiny_model_epoch_{epoch}.pt", 10
    ),
    "efficientvit_base": CheckpointNames(
        "best_efficientvit_base_model.pt", "efficientvit_base_model_epoch_{epoch}.pt", 10
    ),
    "ellipse": CheckpointNames("best_ellipse_model.pt", "ellipse_model_epoch_{epoch}.pt", 10),
}


def plain_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Returns detached, contiguous CPU copies of the weights, without a compiler's prefix."""
    return {
        # `contiguous()` would keep the strides of a 1x1 kernel in channels_last, and store them.
        name.replace("_orig_mod.", ""): value.detach()
        .cpu()
        .clone(memory_format=torch.contiguous_format)
        for name, value in model.state_dict().items()
    }


def save_model(
    path: str | os.PathLike[str], weights: Mapping[str, Tensor], card: Mapping[str, Any]
) -> None:
    """Writes a model file atomically; the same weights and card give the same bytes.

    Args:
        path: usually `*.pt`.
        weights: a plain `state_dict`.
        card: JSON-able description; `model` and `architecture` must be in it.

    Raises:
        ValueError: the card holds NaN or infinity, which JSON has no name for.
        OutputError: the disk is full or read-only.
    """
    buffer = io.BytesIO()
    # A fresh dict: an nn.Module's own carries a `_metadata` attribute that is pickled along.
    torch.save(dict(weights), buffer)
    text = json.dumps(
        {"format": FORMAT_VERSION, **card}, indent=2, ensure_ascii=False, allow_nan=False
    )
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr(zipfile.ZipInfo(CARD_MEMBER, _EPOCH), text)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def _checked(path: Path) -> dict[str, Any] | None:
    """Reads every byte of an archive against its checksums, which torch itself does not do.

    Returns:
        The description inside; None where there is none (a training state).

    Raises:
        CheckpointError: the file is missing, cannot be read, is no archive, or is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            if damaged is not None:
                raise zipfile.BadZipFile(f"checksum of {damaged!r} differs")
            if CARD_MEMBER not in archive.namelist():
                return None
            card = json.loads(archive.read(CARD_MEMBER))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"there is no file {path}; train a model with `python -m pipeline.train`"
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path} ({error.strerror}), expected a model file (*.pt)"
        ) from error
    except _NOT_AN_ARCHIVE as error:
        raise CheckpointError(
            f"{path} is not a model file or is damaged ({error}); train again or copy it anew"
        ) from error
    if not isinstance(card, dict):
        raise CheckpointError(f"{path} has a damaged {CARD_MEMBER}; train again or copy it anew")
    return card


def read_card(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the description stored in a model file.

    Raises:
        CheckpointError: the file is missing, damaged, foreign, or of a newer format.
    """
    path = Path(path)
    card = read_weights(path)[1] if path.suffix == RELEASED else _checked(path)
    if card is None:
        raise CheckpointError(
            f"{path} does not say which network it holds (no {CARD_MEMBER} inside); pass a file "
            "written by pupilseg, or build the network with create_model() and load_state_dict()"
        )
    if card.get("format") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {card.get('format')!r}, this version of pupilseg reads "
            f"{FORMAT_VERSION}; upgrade pupilseg"
        )
    return card


def load_tensors(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Opens a file of tensors and plain values; never runs code that a pickle may hold.

    Raises:
        CheckpointError: missing, damaged, or holding anything but tensors and plain values.
    """
    path = Path(path)
    if path.suffix == RELEASED:
        return dict(read_weights(path)[0])
    _checked(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except _REFUSED as error:
        # torch's own text advises to load without the restriction; it must not reach a user.
        raise CheckpointError(
            f"{path} holds something else than tensors and plain values, and was not loaded; "
            "give a file written by pupilseg"
        ) from error
    if not isinstance(loaded, dict):
        raise CheckpointError(
            f"{path} holds a {type(loaded).__name__}, expected named tensors; give a file written "
            "by pupilseg"
        )
    return loaded


def load_weights(
    model: nn.Module, weights: Mapping[str, Tensor], path: str | os.PathLike[str]
) -> None:
    """Loads weights into a network of the same architecture.

    Raises:
        CheckpointError: names or shapes differ; the first difference is in the message.
    """
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(getattr(value, "shape", ())) for name, value in weights.items()}
    if expected != found:
        differ = sorted(
            name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
        )
        name = differ[0]
        raise CheckpointError(
            f"{path} holds another network than {type(model).__name__}: {len(differ)} weights "
            f"differ, such as {name!r} with shape {found.get(name, 'missing')}, expected "
            f"{expected.get(name, 'none of that name')}; give the file of that network"
        )
    model.load_state_dict(dict(weights))


def load_model(
    path: str | os.PathLike[str], device: str | torch.device = "cpu", *, pretrained: bool = False
) -> nn.Module:
    """Rebuilds a trained network from its file alone, or from the released weights.

    Args:
        path: a model file (*.pt, *.safetensors); with `pretrained`, a network's name.
        device: where the network is to be.
        pretrained: take the weights of that name that come with the package.

    Returns:
        The network in evaluation mode on `device`; its `card` attribute holds the description
        (model, architecture, preprocessing, metrics, ...).

    Raises:
        CheckpointError: the file is missing, damaged or foreign.
        UsageError: there are no released weights of that name.
    """
    if pretrained:
        path = weights_path(str(path), RELEASED)
    card = read_card(path)
    try:
        model = create_model(card["model"], **architecture_of(card))
    except (UsageError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} describes a network that this version of pupilseg cannot build ({error}); "
            "upgrade pupilseg or give another file"
        ) from error
    load_weights(model, load_tensors(path), path)
    model.card = card  # type: ignore[assignment]  # nn.Module types every attribute as a tensor
    return model.to(device).eval()


def architecture_of(card: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the network's arguments in a card: the lists of JSON are tuples again."""
    stored = card["architecture"]
    return {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}


def save_state(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Writes a full training state (tensors and plain values) atomically.

    Raises:
        OutputError: the disk is full or read-only.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getvalue())
