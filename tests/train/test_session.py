"""Training programs: their output, their files and their MLflow runs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pupilseg.errors import CheckpointError
from pupilseg.model_files.checkpoint import load_model, read_card
from pupilseg.models import list_models
from pupilseg.train.state import notes_of
from tests.helpers.mlflow_server import START_SECONDS
from tests.helpers.paths import ROOT
from tests.helpers.processes import Program, run_here
from tests.helpers.training import write_eyes

SCRIPTS = {name: f"training/train_{name}_local.py" for name in list_models()}
SYNTHETIC = "synthetic:5@3"


@pytest.fixture(scope="module", autouse=True)
def untracked():
    """Removes the variables that enable tracking."""
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.startswith("MLFLOW_"):
                patch.delenv(name)
        yield


def run(*command, env=None):
    """Runs a program as a user does, in its own process."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """A data directory filled by the first run of a script, its output directory, its output."""
    path = tmp_path_factory.mktemp("data") / "eyes"
    out = path.parent / "checkpoints"
    done = run(
        SCRIPTS["efficientvit_tiny"], "--data-dir", path, "--dataset", SYNTHETIC,
        "--checkpoint-dir", out, "--epochs", "2", "--batch-size", "2", "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return path, out, done


# Scripts


@pytest.mark.integration
def test_the_first_run_builds_the_data_and_logs_its_configuration(rendered):
    path, out, done = rendered
    assert (path / "shards" / "train" / "manifest.json").exists()
    assert "network efficientvit_tiny: 9,737 parameters" in done.stderr
    printed = next(line for line in done.stderr.splitlines() if line.startswith("configuration: "))
    configuration = json.loads(printed.removeprefix("configuration: "))
    best = out / "best_efficientvit_tiny_model.pt"
    assert read_card(best).config == configuration
    assert configuration["epochs"] == 2
    assert done.stderr.count("not tracked: ") == 1
    assert re.search(
        r"^waited for data in \d+\.\d % of the training time", done.stderr, re.MULTILINE
    )
    assert done.stdout.count("\nepoch ") + done.stdout.startswith("epoch ") == 2
    assert f"best: {best} (mIoU " in done.stdout


@pytest.mark.integration
@pytest.mark.parametrize("name", [n for n in list_models() if n != "efficientvit_tiny"])
def test_a_second_run_needs_no_source(rendered, tmp_path, name):
    """All scripts use the same shards, without raw data or network.

    `torch.load` opens the model file, and `load_model` rebuilds the network.
    """
    path, *_ = rendered
    done = run_here(
        SCRIPTS[name], "--data-dir", path, "--dataset", SYNTHETIC, "--output-dir", tmp_path,
        "--epochs", "1", "--batch-size", "2", "--device", "cpu",
        env={"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "samples in" not in done.stderr  # nothing was materialized
    best = tmp_path / f"best_{name}_model.pt"
    weights = torch.load(best, weights_only=True)
    assert all(type(v) is torch.Tensor and v.is_contiguous() for v in weights.values())
    model = load_model(best)
    assert model.state_dict().keys() == weights.keys()
    assert model.card.preprocessing == "none"


@pytest.mark.integration
def test_a_pipeline_stage_and_a_script_write_the_same_bytes(rendered, tmp_path):
    """Whatever the number of loading threads; `--no-mlflow` ignores the environment."""
    path, out, _ = rendered
    done = run_here(
        "-m", "pipeline.train", "--model", "efficientvit_tiny", "--shards", path / "shards",
        "--out", tmp_path, "--epochs", "2", "--batch-size", "2", "--device", "cpu",
        "--num-workers", "1", "--no-mlflow",
        env={"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_EXPERIMENT_ID": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--num-workers 1: data is loaded by 1 threads" in done.stderr
    assert "MLflow" not in done.stderr
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in tmp_path.iterdir())
    for file in out.iterdir():
        if "training_state" not in file.name:
            assert file.read_bytes() == (tmp_path / file.name).read_bytes(), file.name


# Tracking


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_eyes(tmp_path_factory.mktemp("shards"), train=4, validation=3)


def train_line(shards, out, *flags, model="efficientvit"):
    return [
        "-m", "pipeline.train", "--model", model, "--shards", str(shards), "--out", str(out),
        "--batch-size", "2", "--device", "cpu", *flags,
    ]  # fmt: skip


def environment(server, experiment):
    """Enables tracking, with a timeout that no request reaches on a busy machine."""
    return {
        "MLFLOW_TRACKING_URI": server.uri,
        "MLFLOW_EXPERIMENT_ID": experiment,
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(START_SECONDS),
    }


def client_of(server):
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=server.uri)


def only_run(client, experiment):
    (found,) = client.search_runs([experiment])
    return client.get_run(found.info.run_id)


def artifacts(client, run_id, folder=None):
    return {item.path for item in client.list_artifacts(run_id, folder)}


@pytest.mark.integration
@pytest.mark.parametrize("defer", [False, True], ids=["as they come", "deferred"])
def test_a_tracked_run_has_everything_on_the_server(server, shards, tmp_path, defer):
    client = client_of(server)
    experiment = client.create_experiment(f"whole run {defer}")
    out = tmp_path / "out"
    flags = ["--epochs", "3", *(["--defer-metrics"] if defer else [])]
    done = run_here(*train_line(shards, out, *flags), env=environment(server, experiment))
    assert done.returncode == 0, done.stderr
    assert "tracked by MLflow" in done.stderr
    found = only_run(client, experiment)
    assert found.info.status == "FINISHED"
    assert found.data.tags["model_type"] == "TinyEfficientViT"
    assert found.data.tags["architecture"] == "TinyEfficientViTSeg"
    params = found.data.params
    assert float(params["lr"]) == pytest.approx(0.01 * (2 / 4) ** 0.5)
    assert params["augment.flip"] == "0.5"
    assert params["data"] == "fake"
    assert params["train_frames"] == "4"
    assert len(params["data_digest"]) == 64
    terms = ("loss", "iou", "pupil_iou", "ce_loss", "dice_loss", "surface_loss")
    names = [f"{split}_{term}" for split in ("train", "valid") for term in terms]
    for name in [*names, "lr", "alpha", "train_seconds", "valid_seconds"]:
        history = client.get_metric_history(found.info.run_id, name)
        assert [point.step for point in history] == [1, 2, 3], name
    there = artifacts(client, found.info.run_id)
    assert there == {
        "checkpoints",
        "curves.png",
        "predictions.png",
        "best_efficientvit_model.onnx",
        "efficientvit_history.csv",
    }
    checkpoints = artifacts(client, found.info.run_id, "checkpoints")
    assert "checkpoints/best_efficientvit_model.pt" in checkpoints
    numbered = {f"checkpoints/{p.name}" for p in out.glob("efficientvit_epoch*.pt")}
    assert numbered
    assert checkpoints == numbered | {"checkpoints/best_efficientvit_model.pt"}
    best = client.download_artifacts(
        found.info.run_id, "checkpoints/best_efficientvit_model.pt", str(tmp_path)
    )
    assert Path(best).read_bytes() == (out / "best_efficientvit_model.pt").read_bytes()
    assert notes_of(out / "efficientvit_training_state.pt") == {"mlflow_run": found.info.run_id}
    record = json.loads((out / "efficientvit_mlflow_run.json").read_text())
    assert record["closed"]
    assert all(file["sent"] == file["sha256"] for file in record["files"].values())
    assert not list(out.glob(".*"))


@pytest.mark.integration
def test_a_killed_run_resumes_in_the_same_mlflow_run(server, shards, tmp_path):
    client = client_of(server)
    experiment = client.create_experiment("killed")
    out, model = tmp_path / "out", "efficientvit_tiny"
    line = train_line(shards, out, "--epochs", "6", model=model)
    env = {**os.environ, **environment(server, experiment)}
    with Program([sys.executable, *line], ROOT, env) as program:
        program.wait_for("epoch   2/")
        program.kill_all()
    done = run(*line, "--resume", env=environment(server, experiment))
    assert done.returncode == 0, done.stderr
    found = only_run(client, experiment)
    assert found.info.status == "FINISHED"
    history = client.get_metric_history(found.info.run_id, "valid_iou")
    assert sorted(point.step for point in history) == [1, 2, 3, 4, 5, 6]


@pytest.mark.integration
def test_a_run_whose_server_stops_warns_and_can_be_uploaded_later(server, gate, shards, tmp_path):
    """The run finishes normally, and one command uploads the missing data."""
    client = client_of(server)
    experiment = client.create_experiment("dies")
    out, model = tmp_path / "out", "efficientvit_tiny"
    line = train_line(shards, out, "--epochs", "3", model=model)
    gate.fatal = b"valid_iou"  # dies when the first metrics arrive
    done = run_here(*line, env=environment(gate, experiment))
    assert done.returncode == 0, done.stderr
    assert "best: " in done.stdout
    assert done.stderr.count("training continues without it") == 1, done.stderr
    assert f"`pupilseg upload-run {out / model}_mlflow_run.json`" in done.stderr
    assert (out / f"best_{model}_model.pt").exists()
    assert only_run(client, experiment).info.status == "RUNNING"
    gate.revive()
    sent = run_here("-m", "pupilseg.cli.main", "upload-run", out)
    assert sent.returncode == 0, sent.stderr
    found = only_run(client, experiment)
    assert found.info.status == "FINISHED"
    history = client.get_metric_history(found.info.run_id, "valid_iou")
    assert [point.step for point in history] == [1, 2, 3]
    assert "curves.png" in artifacts(client, found.info.run_id)


def test_a_damaged_state_is_reported_before_tracking_starts(tmp_path):
    state = tmp_path / "efficientvit_training_state.pt"
    state.write_bytes(b"no archive")
    with pytest.raises(CheckpointError, match="damaged"):
        notes_of(state)
