"""Released weights: stored as safetensors with a card, found by name, and used by `--init`."""

from __future__ import annotations

import json

import pytest
import torch

from pupilseg import load_model
from pupilseg import weights as pretrained
from pupilseg.cloud.client import initial_file
from pupilseg.errors import CheckpointError, UsageError
from pupilseg.model_files.card import RENDERED_LICENSE, ModelCard, Provenance
from pupilseg.model_files.checkpoint import plain_state_dict, read_card, read_initial_card
from pupilseg.model_files.safetensors import read_safetensors, write_safetensors
from pupilseg.models import create_model
from pupilseg.train.config import TrainConfig
from pupilseg.train.state import TrainState

CARD = ModelCard(
    model="efficientvit_tiny",
    architecture={"embed_dim": (8, 8, 16)},
    preprocessing="none",
    data="synthetic:9@1",
    license=RENDERED_LICENSE,
    metrics={"valid_pupil_iou": 0.5},
)


@pytest.fixture
def released(tmp_path, monkeypatch):
    """Replaces the released weights by those of one network."""
    torch.manual_seed(3)
    model = create_model("efficientvit_tiny", embed_dim=(8, 8, 16))
    path = tmp_path / "weights" / "efficientvit_tiny.safetensors"
    write_safetensors(path, plain_state_dict(model), CARD)
    monkeypatch.setattr(pretrained, "WEIGHTS_DIR", path.parent)
    return path, model


def test_weights_and_card_come_back_and_the_bytes_are_the_same_each_time(released, tmp_path):
    path, model = released
    weights, card = read_safetensors(path)
    assert card == CARD
    for name, value in model.state_dict().items():
        assert torch.equal(weights[name], value)
        assert weights[name].dtype == value.dtype
    write_safetensors(tmp_path / "again.safetensors", weights, card)
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", ["efficientvit_tiny", "micro"])
def test_a_network_is_loaded_by_name(released, name):
    _, model = released
    found = load_model(name, pretrained=True)
    assert found.card == CARD
    assert not found.training
    frame = torch.rand(1, 1, 400, 640)
    with torch.inference_mode():
        assert torch.equal(found(frame), model.eval()(frame))


def test_a_run_starts_from_them(released):
    path, model = released
    card = read_initial_card(path, "efficientvit_tiny")
    config = TrainConfig(model="efficientvit_tiny", architecture=card.architecture, epochs=1)
    run = TrainState(config, torch.device("cpu"), 1, initial=path)
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in run.model.state_dict().items())
    assert Provenance().starting_from(path, card).init_data == "synthetic:9@1"
    assert initial_file("efficientvit_tiny", "pretrained") == path


def test_missing_and_damaged_files_are_refused(released, tmp_path):
    path, _ = released
    with pytest.raises(UsageError, match="this build has no released weights 'ellipse'; train a"):
        load_model("ellipse", pretrained=True)
    with pytest.raises(UsageError, match="no released weights are named 'other'; choose one"):
        load_model("other", pretrained=True)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_model(tmp_path / "gone.safetensors")
    with pytest.raises(UsageError, match=r"--init .*gone.pt"):
        initial_file("ellipse", str(tmp_path / "gone.pt"))
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    del header["__metadata__"]
    bare = json.dumps(header).encode().ljust(size)
    for damage in (
        b"",
        whole[:100],
        whole[:-5],
        b"PK" + whole[2:],
        whole[:8] + bare + whole[8 + size :],
    ):
        path.write_bytes(damage)
        with pytest.raises(CheckpointError, match="is damaged or was not written by pupilseg"):
            read_card(path)
