"""Model files of fresh networks, for tests."""

from __future__ import annotations

import torch

from pupilseg.model_files.checkpoint import plain_state_dict, save_model
from pupilseg.model_files.initial import RENDERED_LICENCE
from pupilseg.models import create_model

CARD = {"preprocessing": "none", "data": "synthetic:9@1", "licence": RENDERED_LICENCE}


def model_file(path, name="efficientvit_tiny", architecture=None, **card):
    """Writes a network with seeded weights, and a card; returns the path."""
    torch.manual_seed(7)
    model = create_model(name, **(architecture or {}))
    card = {"model": name, "architecture": architecture or {}, **CARD, **card}
    save_model(path, plain_state_dict(model), card)
    return path
