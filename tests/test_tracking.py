"""Tracking against a real `mlflow server` on loopback, with SQLite behind it."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch

from pupilseg import tracking
from pupilseg.config import TrainConfig
from pupilseg.errors import UsageError
from pupilseg.shards.writer import write_shards
from pupilseg.train import train
from tests.fakes import FakeDataset

START_SECONDS = 120
CONFIG = TrainConfig(model="efficientvit_tiny", epochs=3, batch_size=2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tracked") / "shards"
    for split in ("train", "validation"):
        write_shards(FakeDataset(train=4, validation=2), split, folder / split, progress=False)
    return folder


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server's process; the environment names it and a fresh experiment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    log = (tmp_path / "server.log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
         "--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db",
         "--artifacts-destination", str(tmp_path / "artifacts"), "--workers", "1"],
        stdout=log, stderr=log, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                with urllib.request.urlopen(f"{uri}/health", timeout=5):
                    break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                assert process.poll() is None, (tmp_path / "server.log").read_text()
                assert time.monotonic() < deadline, (tmp_path / "server.log").read_text()
                time.sleep(0.5)
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=uri)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", client.create_experiment("pupils"))
        for variable in tracking._PATIENCE:
            monkeypatch.setenv(variable, "1")
        yield process, client
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()


def run(shards, out, on_epoch=None):
    return train(CONFIG, shards, out, device=torch.device("cpu"), on_epoch=on_epoch)


def warnings_of(caplog):
    """What the library warned of; urllib3 adds its own lines on retries."""
    return [
        record.message
        for record in caplog.records
        if record.levelno == logging.WARNING and record.name.startswith("pupilseg")
    ]


@pytest.mark.integration
def test_a_run_is_recorded(server, shards, tmp_path):
    _, client = server
    result = run(shards, tmp_path / "out")
    (found,) = client.search_runs([os.environ["MLFLOW_EXPERIMENT_ID"]])
    assert found.info.status == "FINISHED"
    assert found.data.tags["model_type"] == "TinyEfficientViT-Micro"
    assert found.data.tags["architecture"] == "TinyEfficientViTMicro"
    assert found.data.params["epochs"] == "3"
    assert found.data.params["data"] == "fake"
    assert len(found.data.params["data_digest"]) == 64
    for name in ("train_loss", "train_ce_loss", "valid_pupil_iou", "valid_iou", "lr", "alpha"):
        history = client.get_metric_history(found.info.run_id, name)
        assert [metric.step for metric in history] == [1, 2, 3]
        assert [metric.value for metric in history] == [row[name] for row in result.history]
    files = {file.path for file in client.list_artifacts(found.info.run_id)}
    assert files == {"best_efficientvit_tiny_model.pt", "efficientvit_tiny_history.csv"}


@pytest.mark.integration
def test_a_server_that_dies_costs_a_warning(server, shards, tmp_path, caplog):
    process, _ = server

    def kill(row):
        if row["epoch"] == 1:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    result = run(shards, tmp_path / "out", on_epoch=kill)
    assert len(result.history) == 3
    assert not result.interrupted
    (warning,) = warnings_of(caplog)
    assert "MLflow stopped answering" in warning
    assert len((tmp_path / "out/efficientvit_tiny_history.csv").read_text().splitlines()) == 4


@pytest.mark.parametrize("present", [(), (0,), (1,)], ids=["none", "uri", "experiment"])
def test_without_both_variables_one_warning(present, monkeypatch, caplog):
    for number, variable in enumerate(tracking.VARIABLES):
        if number in present:
            monkeypatch.setenv(variable, "http://127.0.0.1:9")
        else:
            monkeypatch.delenv(variable, raising=False)
    tracker = tracking.start({}, {}, "x")
    assert tracker.run_id is None
    (warning,) = warnings_of(caplog)
    for number, variable in enumerate(tracking.VARIABLES):
        assert (variable in warning) == (number not in present)


def test_a_server_that_is_not_there_is_told_at_once(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "0")
    for variable in tracking._PATIENCE:
        monkeypatch.setenv(variable, "1")
    with pytest.raises(UsageError, match=r"127\.0\.0\.1:9.*unset them to train untracked"):
        tracking.start({"lr": 0.1}, {}, "x")
