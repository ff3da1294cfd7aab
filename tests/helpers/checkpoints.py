"""Model files of untrained networks."""

from __future__ import annotations

import torch

from pupilseg.model_files.card import RENDERED_LICENSE, ModelCard
from pupilseg.model_files.checkpoint import plain_state_dict, save_model
from pupilseg.models import create_model

ORIGIN = {"preprocessing": "none", "data": "synthetic:9@1", "license": RENDERED_LICENSE}
"""Provenance recorded by default."""


def model_file(path, name="efficientvit_tiny", architecture=None, **card):
    """Writes a network with seeded weights, and its card; returns the path."""
    torch.manual_seed(7)
    model = create_model(name, **(architecture or {}))
    card = ModelCard(model=name, architecture=architecture or {}, **{**ORIGIN, **card})
    save_model(path, plain_state_dict(model), card)
    return path
