"""Weights that a run starts from, and what its own files then say of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pupilseg.errors import UsageError
from pupilseg.files import file_digest
from pupilseg.model_files.checkpoint import architecture_of, read_card

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

RENDERED_LICENCE = "MIT; trained on rendered eyes only"
DATA_LICENCE = "bound by the licence of its training data; OpenEDS is for research only"


def initial_architecture(path: Path, model: str) -> dict[str, Any]:
    """Returns the architecture in a model file, for a network that is to take its weights.

    Args:
        path: a model file.
        model: name of the network that is trained.

    Raises:
        CheckpointError: missing, damaged or foreign.
        UsageError: it holds another network.
    """
    card = read_card(path)
    if card["model"] != model:
        raise UsageError(
            f"--init {path} holds the network {card['model']!r}, this trains {model!r}; give a "
            "file of that network, or leave --init out"
        )
    return architecture_of(card)


def initial_card(path: Path, card: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the files of a run say of the weights that it started from.

    Args:
        path: a model file.
        card: of the run's own data.

    Returns:
        init: name and digest; init_data: what those weights were trained on; licence: of both
            data, so that weights once trained on bound data stay bound.

    Raises:
        CheckpointError: missing, damaged or foreign.
    """
    before = read_card(path)
    sources = [before.get("init_data"), before.get("data", "data that its file does not name")]
    free = before.get("licence") == card["licence"] == RENDERED_LICENCE
    return {
        "init": f"{path.name} sha256:{file_digest(path)}",
        "init_data": ", then ".join(source for source in sources if source),
        "licence": RENDERED_LICENCE if free else DATA_LICENCE,
    }
