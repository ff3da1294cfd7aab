"""Releasing weights, and the recorded digests and scores of the released weights."""

from __future__ import annotations

import json

import cv2
import pytest
import torch

from pupilseg import load_model
from pupilseg.errors import UsageError
from pupilseg.export import release
from pupilseg.files import file_digest
from pupilseg.model_files.card import DATA_LICENSE, RENDERED_LICENSE
from pupilseg.predict.predictor import Predictor
from pupilseg.shards import write_shards
from pupilseg.synthetic import RENDERER_VERSION
from pupilseg.weights import WEIGHTS_DIR
from tests.helpers.checkpoints import model_file
from tests.helpers.fakes import FakeDataset

RECORDED = (
    json.loads((WEIGHTS_DIR / release.RECORD).read_text())
    if (WEIGHTS_DIR / release.RECORD).exists()
    else {}
)


TRAINING = {
    "train_frames": 7,
    "config": {"epochs": 3, "batch_size": 4, "seed": 5},
    "metrics": {"valid_pupil_iou": 0.25, "valid_center_px": 7.5},
}
"""Card entries that the Markdown model card shows."""


def test_released_files_can_be_loaded_and_scored_again(tmp_path, monkeypatch):
    monkeypatch.setattr(release, "FRAMES", 6)
    monkeypatch.setattr(release, "FEW_FRAMES", 2)
    write_shards(FakeDataset(validation=3), "validation", tmp_path / "validation")
    out = tmp_path / "weights"
    path = model_file(tmp_path / "m.pt", **TRAINING)
    entry = release.release(path, tmp_path / "validation", out, "Real eyes: 3 of 4.")
    assert json.loads((out / "released.json").read_text()) == {"efficientvit_tiny": entry}
    assert entry["renderer_version"] == RENDERER_VERSION
    assert {name: file_digest(out / name) for name in entry["sha256"]} == entry["sha256"]
    assert sorted(entry["sha256"]) == ["efficientvit_tiny.onnx", "efficientvit_tiny.safetensors"]
    for name in entry["sha256"]:
        assert (out / name).stat().st_size < 300_000
    given, released = load_model(path), load_model(out / "efficientvit_tiny.safetensors")
    assert released.card == given.card
    for name, value in given.state_dict().items():
        assert torch.equal(released.state_dict()[name], value)
    assert Predictor(out / "efficientvit_tiny.onnx").info.calibration.frames <= 3
    again = release.score_summary(release.score(out / "efficientvit_tiny.onnx", 2))
    assert {key: again[key] for key in entry["scores"]} == pytest.approx(entry["scores"], abs=1e-5)
    assert entry["scores"].keys() | {"center_px"} == again.keys()
    assert cv2.imread(str(out / "efficientvit_tiny_worst.jpg")).shape == (900, 960, 3)
    card = (out / "efficientvit_tiny.md").read_text()
    assert card.startswith("---\nlicense: mit\n")
    for text in (
        "| parameters | 9,737 |",
        "synthetic:9@1",
        f"renderer version {RENDERER_VERSION}",
        "3 epochs",
        "IoU is 0.2500",
        "the 6 rendered frames",
    ):
        assert text in card
    assert "Real eyes: 3 of 4." in card
    assert "{" not in card

    # Records of other networks are kept.
    record = out / "released.json"
    record.write_text(json.dumps({"ellipse": {"scores": {}}}))
    release.release(path, tmp_path / "validation", out)
    assert sorted(json.loads(record.read_text())) == ["efficientvit_tiny", "ellipse"]
    assert "Real eyes: not measured." in (out / "efficientvit_tiny.md").read_text()


@pytest.mark.parametrize("license", [DATA_LICENSE, None])
def test_weights_trained_on_other_data_are_not_released(tmp_path, license):
    path = model_file(tmp_path / "m.pt", **TRAINING, license=license)
    with pytest.raises(UsageError, match="only weights trained on rendered eyes alone"):
        release.release(path, tmp_path / "validation", tmp_path / "weights")
    assert not (tmp_path / "weights").exists()


@pytest.mark.skipif(not RECORDED, reason="this build has no released weights")
@pytest.mark.parametrize("name", RECORDED)
def test_released_weights_have_the_recorded_digests_and_scores(name):
    entry = RECORDED[name]
    for file, digest in entry["sha256"].items():
        assert file_digest(WEIGHTS_DIR / file) == digest
        assert (WEIGHTS_DIR / file).stat().st_size < 300_000
    found = release.score_summary(release.score(WEIGHTS_DIR / f"{name}.onnx", release.FEW_FRAMES))
    # Other processors may round differently.
    assert found["pupil_iou"] == pytest.approx(entry["scores"]["pupil_iou"], abs=0.003)
    assert found["center_px"] == pytest.approx(entry["scores"]["center_px"], abs=0.1)
    assert Predictor(name).info.model == name
    card = load_model(name, pretrained=True).card
    assert card.license == RENDERED_LICENSE
    assert card.data.startswith("synthetic:")
