"""Model cards, and runs that start from existing weights."""

from __future__ import annotations

import json
import zipfile
from dataclasses import fields

import pytest
import torch

from pupilseg.errors import CheckpointError, UsageError
from pupilseg.export.onnx import onnx_info
from pupilseg.model_files.card import DATA_LICENSE, RENDERED_LICENSE, ModelCard, Provenance
from pupilseg.model_files.checkpoint import CARD_MEMBER, load_model, read_card, read_initial_card
from pupilseg.shards import write_shards
from pupilseg.train.config import TrainConfig
from pupilseg.train.state import TrainState
from tests.helpers.checkpoints import ORIGIN, model_file
from tests.helpers.fakes import FakeDataset
from tests.helpers.processes import run_here

NARROW = {"embed_dim": (8, 8, 16)}
FULL = ModelCard(
    model="efficientvit_tiny",
    architecture=NARROW,
    epoch=3,
    metrics={"valid_iou": 0.5},
    config={"epochs": 4},
    data="synthetic:9@1",
    split_rule="by subject",
    data_digest="00ff",
    train_frames=8,
    preprocessing="none",
    license=RENDERED_LICENSE,
    init="a.pt sha256:12",
    init_data="synthetic:8@1",
    extra={"note": [1, 2]},
)


def stored(**changes):
    """Returns the parsed JSON of a full card."""
    return json.loads(json.dumps(FULL.to_dict() | changes))


def test_a_card_survives_json():
    assert all(getattr(FULL, item.name) for item in fields(FULL))
    assert ModelCard.from_dict(stored(), "m.pt") == FULL
    assert stored()["note"] == [1, 2]


def test_a_card_stores_only_what_is_known():
    least = ModelCard(model="ellipse")
    assert least.to_dict() == {"format": 1, "model": "ellipse", "architecture": {}}
    assert ModelCard.from_dict(least.to_dict(), "m.pt") == least
    assert Provenance(data="x").to_dict() == {"data": "x"}


def test_names_of_earlier_versions_are_read():
    old = stored(architecture={"embed_dims": [8, 8, 16]})
    old["licence"] = old.pop("license")
    assert ModelCard.from_dict(old, "m.pt") == FULL
    old["architecture"] = {"depths": [1, 2, 1], "num_heads": [1, 1, 2], "decoder_dim": 8}
    expected = {"depth": (1, 2, 1), "num_heads": (1, 1, 2), "decoder_dim": 8}
    assert ModelCard.from_dict(old, "m.pt").architecture == expected


def test_a_checkpoint_of_an_earlier_version_is_loaded(tmp_path):
    """The file has a card in the old format and weights of a non-default architecture."""
    path = model_file(tmp_path / "m.pt", architecture=NARROW)
    old = {"format": 1, "model": "efficientvit_tiny", "architecture": {"embed_dims": [8, 8, 16]}}
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members[CARD_MEMBER] = json.dumps(old).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    assert load_model(path).card.architecture == NARROW


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("model", None, "str"),
        ("model", 3, "str"),
        ("architecture", [1], "dict"),
        ("metrics", [0.5], "dict"),
        ("config", "none", "dict"),
        ("epoch", "three", "int"),
        ("train_frames", [8], "int"),
        ("data", {}, "str"),
        ("license", ["MIT"], "str"),
        ("init", 1, "str"),
    ],
)
def test_values_of_a_wrong_type_are_refused(key, value, expected):
    with pytest.raises(CheckpointError) as caught:
        ModelCard.from_dict(stored(**{key: value}), "m.pt")
    assert str(caught.value).startswith(f"m.pt records {key} = {value!r}, expected {expected}")


def test_other_descriptions_are_refused():
    with pytest.raises(CheckpointError, match=r"m\.pt records 'high' as a metric"):
        ModelCard.from_dict(stored(metrics={"valid_iou": "high"}), "m.pt")
    with pytest.raises(CheckpointError, match=r"m\.pt has format 2, .* reads 1; upgrade"):
        ModelCard.from_dict(stored(format=2), "m.pt")
    for value in ([], None, "card", 3):
        with pytest.raises(CheckpointError, match=rf"in m\.pt is a {type(value).__name__}"):
            ModelCard.from_dict(value, "m.pt")


# Runs that start from existing weights


def test_a_run_starts_from_the_weights_and_averages_from_them(tmp_path):
    path = model_file(tmp_path / "a.pt")
    config = TrainConfig(model="efficientvit_tiny", epochs=1)
    run = TrainState(config, torch.device("cpu"), 6, initial=path)
    fresh = TrainState(config, torch.device("cpu"), 6)
    given = load_model(path).state_dict()
    assert all(torch.equal(given[name], value) for name, value in run.model.state_dict().items())
    averaged = run.average.network.state_dict()
    assert all(torch.equal(given[name], value) for name, value in averaged.items())
    assert any(not torch.equal(given[n], v) for n, v in fresh.model.state_dict().items())


def test_the_architecture_comes_from_the_file(tmp_path):
    path = model_file(tmp_path / "narrow.pt", architecture=NARROW)
    assert read_initial_card(path, "efficientvit_tiny").architecture == NARROW
    with pytest.raises(UsageError, match=r"narrow.pt holds the network 'efficientvit_tiny', but"):
        read_initial_card(path, "ellipse")
    with pytest.raises(CheckpointError, match=r"gone\.pt does not exist"):
        read_initial_card(tmp_path / "gone.pt", "ellipse")


@pytest.mark.parametrize(
    ("before", "own", "expected"),
    [
        (RENDERED_LICENSE, RENDERED_LICENSE, RENDERED_LICENSE),
        (RENDERED_LICENSE, DATA_LICENSE, DATA_LICENSE),
        (DATA_LICENSE, RENDERED_LICENSE, DATA_LICENSE),
        (None, RENDERED_LICENSE, DATA_LICENSE),
    ],
)
def test_a_restrictive_license_is_inherited(tmp_path, before, own, expected):
    path = model_file(tmp_path / "a.pt", license=before)
    after = Provenance(license=own).starting_from(path, read_card(path))
    assert after.license == expected
    assert after.init.startswith("a.pt sha256:")


def test_all_earlier_training_data_are_recorded(tmp_path):
    first = model_file(tmp_path / "a.pt")
    own = Provenance(**ORIGIN | {"data": "openeds:eyes"}).starting_from(first, read_card(first))
    second = model_file(tmp_path / "b.pt", **own.to_dict())
    last = Provenance(**ORIGIN | {"data": "other"}).starting_from(second, read_card(second))
    assert last.init_data == "synthetic:9@1, then openeds:eyes"
    card = ModelCard(model="efficientvit_tiny", **last.to_dict())
    stored = onnx_info(card, 5, "c.pt").to_metadata()
    assert stored["data"] == "synthetic:9@1, then openeds:eyes, then other"
    unnamed = ModelCard(model="efficientvit_tiny", init_data="synthetic:9@1")
    assert unnamed.all_data == "synthetic:9@1, then data that its file does not name"


@pytest.mark.integration
def test_a_script_starts_from_a_file_and_resume_needs_the_same_file(tmp_path):
    for split in ("train", "validation"):
        write_shards(FakeDataset(train=4, validation=2), split, tmp_path / "shards" / split)
    start = model_file(tmp_path / "start.pt", architecture=NARROW)

    def train(*flags):
        return run_here(
            *("-m", "pipeline.train", "--model", "efficientvit_tiny"),
            *("--shards", tmp_path / "shards", "--out", tmp_path / "out", "--epochs", "2"),
            *("--batch-size", "2", "--device", "cpu", *flags),
        )

    done = train("--init", start)
    assert done.returncode == 0, done.stderr
    card = read_card(tmp_path / "out" / "best_efficientvit_tiny_model.pt")
    assert card.architecture["embed_dim"] == NARROW["embed_dim"]
    assert card.init_data == "synthetic:9@1"
    assert card.license == DATA_LICENSE
    again = train("--resume")
    assert again.returncode == 1
    assert "belongs to another run" in again.stderr
    assert train("--resume", "--init", start).returncode == 0
    other = train("--init", model_file(tmp_path / "ellipse.pt", "ellipse"))
    assert other.returncode == 2
    assert "holds the network 'ellipse'" in other.stderr
