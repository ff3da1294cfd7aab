"""Runs that start from given weights: which, and what their own files say of them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from pupilseg.errors import CheckpointError, UsageError
from pupilseg.export.onnx import metadata_of
from pupilseg.model_files.checkpoint import load_model, read_card
from pupilseg.model_files.initial import (
    DATA_LICENCE,
    RENDERED_LICENCE,
    initial_architecture,
    initial_card,
)
from pupilseg.shards import write_shards
from pupilseg.train.config import TrainConfig
from pupilseg.train.state import Run
from tests.helpers.checkpoints import CARD, model_file
from tests.helpers.fakes import FakeDataset
from tests.helpers.paths import ROOT

NARROW = {"embed_dims": (8, 8, 16)}


def test_a_run_starts_from_the_weights_and_averages_from_them(tmp_path):
    path = model_file(tmp_path / "a.pt")
    config = TrainConfig(model="efficientvit_tiny", epochs=1)
    run = Run(config, torch.device("cpu"), 6, {}, initial=path)
    fresh = Run(config, torch.device("cpu"), 6, {})
    given = load_model(path).state_dict()
    assert all(torch.equal(given[name], value) for name, value in run.model.state_dict().items())
    averaged = run.averaged.values
    assert all(torch.equal(given[name], value) for name, value in averaged.items())
    assert any(not torch.equal(given[n], v) for n, v in fresh.model.state_dict().items())


def test_the_network_of_the_file_is_taken_with_its_widths(tmp_path):
    path = model_file(tmp_path / "narrow.pt", architecture=NARROW)
    assert initial_architecture(path, "efficientvit_tiny") == NARROW
    with pytest.raises(UsageError, match=r"narrow.pt holds the network 'efficientvit_tiny', this"):
        initial_architecture(path, "ellipse")
    with pytest.raises(CheckpointError, match="there is no file"):
        initial_architecture(tmp_path / "gone.pt", "ellipse")


@pytest.mark.parametrize(
    ("before", "now", "licence"),
    [
        (RENDERED_LICENCE, RENDERED_LICENCE, RENDERED_LICENCE),
        (RENDERED_LICENCE, DATA_LICENCE, DATA_LICENCE),
        (DATA_LICENCE, RENDERED_LICENCE, DATA_LICENCE),
        (None, RENDERED_LICENCE, DATA_LICENCE),
    ],
)
def test_bound_weights_stay_bound(tmp_path, before, now, licence):
    path = model_file(tmp_path / "a.pt", licence=before)
    card = initial_card(path, CARD | {"licence": now})
    assert card["licence"] == licence
    assert card["init"].startswith("a.pt sha256:")


def test_what_weights_have_seen_is_told_to_the_end(tmp_path):
    first = model_file(tmp_path / "a.pt")
    own = CARD | {"data": "openeds:eyes", "licence": DATA_LICENCE}
    second = model_file(tmp_path / "b.pt", **(own | initial_card(first, own)))
    card = initial_card(second, own | {"data": "other"})
    assert card["init_data"] == "synthetic:9@1, then openeds:eyes"
    written = {"model": "efficientvit_tiny", **own, **card, "data": "other"}
    stored = metadata_of(written, "segmentation", "c.pt")
    assert stored["data"] == "synthetic:9@1, then openeds:eyes, then other"


@pytest.mark.integration
def test_scripts_take_it_and_resume_wants_it_again(tmp_path):
    for split in ("train", "validation"):
        write_shards(FakeDataset(train=4, validation=2), split, tmp_path / "shards" / split)
    start = model_file(tmp_path / "start.pt", architecture=NARROW)

    def train(*flags):
        return subprocess.run(
            [
                *(sys.executable, "-m", "pipeline.train", "--model", "efficientvit_tiny"),
                *("--shards", tmp_path / "shards", "--out", tmp_path / "out", "--epochs", "2"),
                *("--batch-size", "2", "--device", "cpu", *flags),
            ],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip

    done = train("--init", start)
    assert done.returncode == 0, done.stderr
    card = read_card(tmp_path / "out" / "best_efficientvit_tiny_model.pt")
    assert card["architecture"]["embed_dims"] == list(NARROW["embed_dims"])
    assert card["init_data"] == "synthetic:9@1"
    assert card["licence"] == DATA_LICENCE
    again = train("--resume")
    assert again.returncode == 1
    assert "belongs to another run" in again.stderr
    assert "Traceback" not in again.stderr
    assert train("--resume", "--init", start).returncode == 0
    other = train("--init", model_file(tmp_path / "ellipse.pt", "ellipse"))
    assert other.returncode == 2
    assert "holds the network 'ellipse'" in other.stderr
