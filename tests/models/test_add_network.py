"""Adding a network takes one module and one entry in the registry; everything else follows."""

import csv

import onnxruntime
import pytest
import torch
from torch import nn

from pupilseg.errors import UsageError
from pupilseg.export import export_model
from pupilseg.model_files.checkpoint import load_model, read_card
from pupilseg.models import EllipseRegressionNet, ModelEntry, create_model, list_models, registry
from pupilseg.predict import Predictor
from pupilseg.shards import write_shards
from pupilseg.train import train
from pupilseg.train.config import TrainConfig
from tests.helpers.fakes import FakeDataset


class TenLineNet(nn.Module):
    """Logits from one convolution on an eighth of the image's size."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.shrink = nn.Conv2d(1, width, 8, stride=8)
        self.norm = nn.BatchNorm2d(width)
        self.grow = nn.ConvTranspose2d(width, 2, 8, stride=8)

    def forward(self, image):
        return self.grow(torch.relu(self.norm(self.shrink(image))))


@pytest.fixture
def entry(monkeypatch):
    entry = ModelEntry(
        name="ten_lines",
        builder=f"{__name__}:TenLineNet",
        task="segmentation",
        model_type="TenLineNet",
        summary="one convolution",
        checkpoint_every=2,
    )
    monkeypatch.setitem(registry.MODELS, entry.name, entry)
    return entry


def test_a_network_of_ten_lines_is_trained_saved_and_exported(entry, tmp_path):
    assert entry.name in list_models()
    for split in ("train", "validation"):
        shards = tmp_path / "shards" / split
        write_shards(FakeDataset(train=4, validation=2), split, shards, progress=False)
    out = tmp_path / "out"
    config = TrainConfig(model=entry.name, architecture={"width": 3}, epochs=3, batch_size=4)
    train(config, tmp_path / "shards", out, device=torch.device("cpu"))

    assert {path.name for path in out.iterdir() if path.suffix in (".pt", ".csv")} == {
        "best_ten_lines_model.pt",
        "ten_lines_model_epoch_2.pt",
        "ten_lines_model_epoch_3.pt",
        "ten_lines_training_state.pt",
        "ten_lines_history.csv",
    }
    with (out / entry.history_file).open() as file:
        assert len(list(csv.DictReader(file))) == 3
    best = out / entry.best_file
    card = read_card(best)
    assert card.model == "ten_lines"
    assert card.architecture == {"width": 3}
    assert card.data == "fake"

    report = export_model(best, tmp_path / "ten_lines.onnx")
    assert report.parity < 1e-3
    assert report.parameters == sum(p.numel() for p in load_model(best).parameters())
    session = onnxruntime.InferenceSession(tmp_path / "ten_lines.onnx")
    assert [value.name for value in session.get_outputs()] == ["logits"]
    image = next(iter(FakeDataset().read("train", 0, 1))).image
    assert Predictor(tmp_path / "ten_lines.onnx")(image).mask.shape == image.shape

    export_model(best, tmp_path / "ten_lines.safetensors")
    again = load_model(tmp_path / "ten_lines.safetensors")
    assert again.card == card
    assert all(torch.equal(a, b) for a, b in zip(
        again.state_dict().values(), load_model(best).state_dict().values(), strict=True
    ))  # fmt: skip


def test_a_suffix_without_an_exporter_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"'\.tflite', expected one of: \.onnx, \.safetensors"):
        export_model(tmp_path / "m.pt", tmp_path / "m.tflite")
    with pytest.raises(UsageError, match="cannot store a calibration"):
        export_model(tmp_path / "m.pt", tmp_path / "m.safetensors", calibrate_on=tmp_path)


def test_builders_are_imported_by_name(entry):
    assert entry.class_name == "TenLineNet"
    assert create_model("ten_lines", width=5).shrink.out_channels == 5
    assert type(create_model("ellipse")) is EllipseRegressionNet
