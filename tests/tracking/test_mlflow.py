"""MLflow tracking with a real `mlflow server` on loopback, backed by SQLite."""

import contextlib
import csv
import logging
import os
import signal
import socket
import subprocess
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

from pupilseg.cli.main import main
from pupilseg.errors import UsageError
from pupilseg.tracking import TRACKERS, RunInfo, mlflow
from pupilseg.tracking.mlflow import without_password
from pupilseg.tracking.record import RunData, RunRecord
from tests.helpers.mlflow_server import START_SECONDS
from tests.helpers.paths import ROOT
from tests.helpers.waiting import eventually

numbers = count()
COLUMNS = ["epoch", "train_loss", "valid_iou", "valid_gone"]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Sets request timeouts so long that passing tests never reach them, even on a slow machine."""
    for variable in TRACKERS["mlflow"].variables:
        monkeypatch.delenv(variable, raising=False)
    for variable, value in mlflow._DEFAULTS.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", str(START_SECONDS))


@pytest.fixture
def client(gate, server, environment, monkeypatch):
    """A client that bypasses the gate; the environment names the gate and a new experiment."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=server.uri)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", gate.uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", client.create_experiment(f"pupils{next(numbers)}"))
    return client


@pytest.fixture
def out(tmp_path):
    path = tmp_path / "out"
    path.mkdir()
    return path


@pytest.fixture
def clock(monkeypatch):
    """Sets the time that is logged, in seconds since 1970."""
    time = SimpleNamespace(now_s=0)
    monkeypatch.setattr(mlflow, "now_ms", lambda: 1000 * time.now_s)
    return time


def start(out, params=None, run_id=None):
    tags = {"model_type": "T"}
    run = RunInfo("tiny", params or {"lr": 0.1}, tags, out / "tiny_history.csv")
    return mlflow.start(run, run_id)


def row(epoch):
    return {"epoch": epoch, "train_loss": 1 / epoch, "valid_iou": 0.5, "valid_gone": float("nan")}


def train_epoch(tracker, out, epoch, first=1):
    """Writes the history of a run that began with epoch `first`, and logs the last epoch."""
    temporary = out / ".history"
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(row(number) for number in range(first, epoch + 1))
    temporary.rename(out / "tiny_history.csv")
    tracker.log_epoch({**row(epoch), "train_seconds": 2.5, "valid_seconds": float("nan")})


def record_of(out):
    return out / "tiny_mlflow_run.json"


def steps(client, run_id, name="train_loss"):
    """Returns the steps of a metric on the server, which must not repeat one."""
    history = client.get_metric_history(run_id, name)
    assert all(metric.value == row(metric.step)[name] for metric in history)
    return sorted(metric.step for metric in history)


def times(client, run_id, name):
    history = client.get_metric_history(run_id, name)
    return {metric.step: metric.timestamp for metric in history}


def status(client, run_id):
    return client.get_run(run_id).info.status


def warnings_of(caplog):
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno >= logging.WARNING and record.name.startswith(("pupilseg", "urllib3"))
    ]


def artifact(client, run_id, name, folder):
    return Path(client.download_artifacts(run_id, name, str(folder))).read_bytes()


def upload(path):
    """Runs the command; returns its exit code."""
    code = main(["upload-run", str(path)])
    logging.getLogger("pupilseg").propagate = True  # programs turn it off, and caplog needs it
    return code


def give_up_soon(tracker):
    """Lets `end` wait only half a second when the server is known to hang."""
    tracker._end_timeout_s = 0.5


@pytest.mark.integration
def test_a_run_is_recorded(client, out, tmp_path, caplog, clock):
    params = {
        "lr": 0.1,
        "data": "fake",
        "architecture": {"depth": [1, 1], "head": {"kind": "soft"}},
        "augment": None,
        "overrides": {},
        "long": "x" * 7000,
    }
    tracker = start(out, params)
    assert status(client, tracker.run_id) == "RUNNING"
    file = out / "best.pt"
    for epoch in (1, 2, 3):
        clock.now_s = 10**9 + epoch
        train_epoch(tracker, out, epoch)
        file.write_bytes(b"weights %d" % epoch)
        tracker.log_file(file)
    curve = tmp_path / "elsewhere.png"
    curve.write_bytes(b"picture")
    tracker.log_file(curve, "plots/curves")
    tracker.end("FINISHED")
    found = client.get_run(tracker.run_id)
    assert found.info.status == "FINISHED"
    assert found.info.end_time == 1000 * (10**9 + 3)
    assert found.info.run_name == "tiny"
    assert found.info.experiment_id == os.environ["MLFLOW_EXPERIMENT_ID"]
    assert found.data.tags["model_type"] == "T"
    long = found.data.params.pop("long")
    assert len(long) == 6000
    assert long.endswith("x... (cut, 7000 characters)")
    assert found.data.params == {
        "lr": "0.1",
        "data": "fake",
        "architecture.depth": "[1, 1]",
        "architecture.head.kind": "soft",
        "augment": "null",
        "overrides": "{}",
    }
    assert found.inputs.dataset_inputs == []
    assert set(found.data.metrics) == {"train_loss", "valid_iou", "train_seconds"}
    assert steps(client, tracker.run_id) == [1, 2, 3]
    for name in ("train_loss", "train_seconds"):
        assert times(client, tracker.run_id, name) == {n: 1000 * (10**9 + n) for n in (1, 2, 3)}
    assert artifact(client, tracker.run_id, "best.pt", tmp_path) == b"weights 3"
    assert artifact(client, tracker.run_id, "plots/curves/elsewhere.png", tmp_path) == b"picture"
    assert warnings_of(caplog) == []
    assert {path.name for path in out.iterdir()} == {
        *("best.pt", "tiny_history.csv", "tiny_mlflow_run.json")
    }


@pytest.mark.integration
def test_a_server_that_dies_causes_a_warning(
    client, gate, out, tmp_path, monkeypatch, caplog, capsys, clock
):
    """Training continues; the command in the warning sends the rest, without duplicates."""
    tracker = start(out)
    clock.now_s = 10**9 + 1
    train_epoch(tracker, out, 1)
    eventually(lambda: steps(client, tracker.run_id) == [1])
    gate.kill()
    file = out / "best.pt"
    for epoch in (2, 3, 4):
        clock.now_s = 10**9 + epoch
        train_epoch(tracker, out, epoch)
        file.write_bytes(b"weights %d" % epoch)
        tracker.log_file(file, "checkpoints")
        eventually(lambda: warnings_of(caplog))
    tracker.end("FINISHED")
    (warning,) = warnings_of(caplog)
    command = f"pupilseg upload-run {record_of(out)}"
    assert gate.uri in warning
    assert f"`{command}`" in warning
    assert main(command.split()[1:]) == 1
    printed = capsys.readouterr().err
    assert "does not respond" in printed
    assert command in printed
    gate.revive()
    moved = out.rename(tmp_path / "moved")
    assert upload(moved) == 0
    printed = capsys.readouterr().out
    assert f"run {tracker.run_id} (tiny) at {gate.uri}: 3 epochs and 1 files sent" in printed
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # the record holds it
    for path in (moved, record_of(moved)):
        assert upload(path) == 0
        assert f"{path}: nothing to send" in capsys.readouterr().out
    for name in ("train_loss", "valid_iou"):
        assert steps(client, tracker.run_id, name) == [1, 2, 3, 4]
    assert times(client, tracker.run_id, "valid_iou") == {
        n: 1000 * (10**9 + n) for n in (1, 2, 3, 4)
    }
    assert status(client, tracker.run_id) == "FINISHED"
    assert artifact(client, tracker.run_id, "checkpoints/best.pt", tmp_path) == b"weights 4"


@pytest.mark.integration
def test_upload_restores_what_the_server_has_lost(client, server, out, tmp_path, capsys):
    tracker = start(out)
    train_epoch(tracker, out, 1)
    for name in ("kept.pt", "lost.pt"):
        (out / name).write_bytes(name.encode())
        tracker.log_file(out / name, "checkpoints")
    tracker.end("FINISHED")
    (lost,) = server.artifacts.glob(f"*/{tracker.run_id}/artifacts/checkpoints/lost.pt")
    lost.unlink()
    assert upload(out) == 0
    assert "0 epochs and 1 files sent" in capsys.readouterr().out
    assert artifact(client, tracker.run_id, "checkpoints/lost.pt", tmp_path) == b"lost.pt"


@pytest.mark.integration
def test_a_server_that_hangs_does_not_block_training(client, gate, out, caplog):
    """Epochs are logged while a request in progress is never answered."""
    tracker = start(out)
    give_up_soon(tracker)
    gate.hang()
    train_epoch(tracker, out, 1)
    assert gate.arrived.wait(START_SECONDS)
    for epoch in (2, 3):
        train_epoch(tracker, out, epoch)
        assert f'"{epoch}": {{' in record_of(out).read_text()
    tracker.end("FINISHED")
    (warning,) = warnings_of(caplog)
    assert "did not accept everything within 0.5 s" in warning
    assert steps(client, tracker.run_id) == []
    gate.hanging = False
    assert upload(out) == 0
    assert steps(client, tracker.run_id) == [1, 2, 3]


@pytest.mark.integration
def test_a_server_that_comes_back_gets_what_it_missed(client, gate, out, monkeypatch, caplog):
    monkeypatch.setattr(mlflow, "_RETRY_SECONDS", 0.1)
    tracker = start(out)
    gate.kill()
    for epoch in (1, 2):
        train_epoch(tracker, out, epoch)
    eventually(lambda: warnings_of(caplog))
    gate.revive()
    eventually(lambda: steps(client, tracker.run_id) == [1, 2])
    train_epoch(tracker, out, 3)
    tracker.end("FINISHED")
    assert steps(client, tracker.run_id) == [1, 2, 3]
    assert len(warnings_of(caplog)) == 1
    assert status(client, tracker.run_id) == "FINISHED"


@pytest.mark.integration
def test_metrics_whose_confirmation_was_lost_are_not_sent_twice(client, gate, out, monkeypatch):
    monkeypatch.setattr(mlflow, "_RETRY_SECONDS", 0.1)
    tracker = start(out)
    gate.losing = True
    train_epoch(tracker, out, 1)
    eventually(lambda: steps(client, tracker.run_id) == [1])
    gate.losing = False
    train_epoch(tracker, out, 2)
    tracker.end("FINISHED")
    assert steps(client, tracker.run_id) == [1, 2]


TRAINING = """
import sys
from pathlib import Path
from tests.tracking.test_mlflow import give_up_soon, start, train_epoch

out = Path(sys.argv[1])
tracker = start(out)
give_up_soon(tracker)
train_epoch(tracker, out, 1)
print(tracker.run_id, flush=True)
input()
train_epoch(tracker, out, 2)
print("logged", flush=True)
input()
tracker.end("FINISHED")
"""


@contextlib.contextmanager
def training(client, gate, out):
    """Yields a process that trains, and its run's id, once the server hangs since epoch 2."""
    with subprocess.Popen(
        [sys.executable, "-c", TRAINING, str(out)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            run_id = process.stdout.readline().strip()
            eventually(lambda: steps(client, run_id) == [1])
            gate.hang()
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "logged\n"
            assert gate.arrived.wait(START_SECONDS)
            yield process, run_id
        finally:
            process.kill()


@pytest.mark.integration
def test_what_a_killed_process_did_not_send_is_uploaded(client, gate, out, capsys):
    with training(client, gate, out) as (process, run_id):
        assert upload(out) == 1
        assert f"is in use by pid {process.pid} on " in capsys.readouterr().err
        process.send_signal(signal.SIGKILL)
        process.wait()
    gate.hanging = False
    assert steps(client, run_id) == [1]
    assert upload(out) == 0
    assert steps(client, run_id) == [1, 2]
    assert status(client, run_id) == "KILLED"


@pytest.mark.integration
def test_a_process_ends_while_the_server_hangs(client, gate, out):
    """Neither `end` nor the exit of the interpreter waits for the request in progress."""
    with training(client, gate, out) as (process, run_id):
        process.stdin.write("\n")
        process.stdin.close()
        assert process.wait(START_SECONDS) == 0
    gate.hanging = False
    resumed = start(out, run_id=run_id)
    train_epoch(resumed, out, 3)
    resumed.end("FINISHED")
    assert steps(client, run_id) == [1, 2, 3], "with what the first process did not send"


@pytest.mark.integration
def test_a_resumed_run_continues_the_same_mlflow_run(client, out, caplog):
    caplog.set_level(logging.INFO, "pupilseg")
    first = start(out, {"lr": 0.1, "epochs": 2})
    for epoch in (1, 2):
        train_epoch(first, out, epoch)
    first.end("KILLED")
    assert status(client, first.run_id) == "KILLED"
    record_of(out).unlink()  # the id in the training state is enough
    second = start(out, {"lr": 0.1, "epochs": 4, "seed": 0}, run_id=first.run_id)
    assert second.run_id == first.run_id
    assert status(client, first.run_id) == "RUNNING"
    assert client.get_run(first.run_id).data.params == {"lr": "0.1", "epochs": "2", "seed": "0"}
    assert f"resuming MLflow run {first.run_id}" in caplog.text
    assert "; parameter epochs stays 2, now 4" in caplog.text
    for epoch in (2, 3, 4):
        train_epoch(second, out, epoch)
    second.end("FINISHED")
    assert steps(client, first.run_id) == [1, 2, 3, 4]
    assert status(client, first.run_id) == "FINISHED"
    assert warnings_of(caplog) == []


@pytest.mark.integration
@pytest.mark.parametrize("gone", ["deleted", "unknown"])
def test_a_run_that_the_server_no_longer_has(client, gate, out, caplog, capsys, gone):
    """Uploading it fails with the reason; resuming it opens a new run, which gets all epochs."""
    first = start(out)
    gate.kill()
    train_epoch(first, out, 1)
    first.end("KILLED")
    gate.revive()
    run_id = first.run_id
    if gone == "deleted":
        client.delete_run(run_id)
    else:
        run_id = "0" * 32
        record_of(out).write_text(record_of(out).read_text().replace(first.run_id, run_id))
    assert upload(out) == 1
    printed = capsys.readouterr().err
    assert f"has no run {run_id}" in printed
    assert f"deleting {record_of(out)}" in printed
    caplog.clear()
    second = start(out, run_id=run_id)
    assert second.run_id not in (first.run_id, run_id)
    (warning,) = warnings_of(caplog)
    assert f"no run {run_id} to resume" in warning
    train_epoch(second, out, 2)
    second.end("FINISHED")
    assert steps(client, second.run_id) == [1, 2]


@pytest.mark.integration
def test_a_new_run_finishes_the_earlier_one_in_its_folder(client, gate, out, caplog):
    """The rows of the earlier run are not mixed with those of the new one."""
    first = start(out)
    give_up_soon(first)
    gate.hang()
    for epoch in (1, 2):
        train_epoch(first, out, epoch)
    first._record.close()  # as after a kill: no status
    gate.hanging = False
    caplog.clear()
    second = start(out)
    assert second.run_id != first.run_id
    assert steps(client, first.run_id) == [1, 2]
    assert status(client, first.run_id) == "KILLED"
    second._record.close()  # killed before its first epoch
    assert upload(out) == 0
    assert steps(client, second.run_id) == []
    third = start(out)
    train_epoch(third, out, 1)
    third.end("FINISHED")
    assert steps(client, third.run_id) == [1]
    assert warnings_of(caplog) == []


@pytest.mark.integration
def test_a_file_that_has_changed_is_not_uploaded(client, gate, out, tmp_path, caplog, capsys):
    tracker = start(out)
    file = out / "best.pt"
    tracker.log_file(file)
    assert warnings_of(caplog) == [
        f"cannot read {file} (No such file or directory); it is not sent to MLflow"
    ]
    gate.kill()
    file.write_bytes(b"mine")
    tracker.log_file(file)
    train_epoch(tracker, out, 1)
    tracker.end("FINISHED")
    gate.revive()
    for content in (b"another", None):
        file.unlink() if content is None else file.write_bytes(content)
        assert upload(out) == 1
        assert f"{file} is missing, or has changed since it was logged" in capsys.readouterr().err
        assert steps(client, tracker.run_id) == [1]
        assert client.list_artifacts(tracker.run_id) == []
        assert status(client, tracker.run_id) == "FINISHED"
    file.write_bytes(b"mine")
    assert upload(out) == 0
    assert artifact(client, tracker.run_id, "best.pt", tmp_path) == b"mine"


@pytest.mark.integration
def test_an_unknown_experiment(client, out, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "987654321")
    with pytest.raises(UsageError, match=r"987654321.*unset them to train without tracking"):
        start(out)
    assert not list(out.iterdir())


@pytest.mark.integration
def test_the_experiment_and_the_run_have_names_of_the_environment(client, out, monkeypatch):
    """The first run creates the experiment, and the second finds it."""
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "night shift")
    monkeypatch.setenv("MLFLOW_RUN_NAME", "low rate")
    for _ in range(2):
        tracker = start(out)
        tracker.end("FINISHED")
        found = client.get_run(tracker.run_id).info
        assert found.run_name == "low rate"
        assert found.experiment_id == client.get_experiment_by_name("night shift").experiment_id


@pytest.mark.parametrize("kind", ["refuses", "silent"])
def test_a_server_that_does_not_respond_at_the_start_is_an_error(kind, out, monkeypatch):
    if kind == "silent":
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")  # it never responds
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1] if kind == "silent" else 9
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{port}")
        monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "0")
        with pytest.raises(UsageError, match=rf":{port} did.*unset them to train with") as error:
            start(out)
    assert "secret" not in str(error.value)
    assert not list(out.iterdir())


def test_mlflow_that_is_not_installed(out, monkeypatch):
    for variable in TRACKERS["mlflow"].variables:
        monkeypatch.setenv(variable, "1")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UsageError, match=r"mlflow is not installed.*pupilseg\[track\].*unset it"):
        start(out)
    assert not list(out.iterdir())


class FakeClient:
    """A stand-in for MLflow's client that records batch sizes and can fail."""

    def __init__(self, fail_at=()):
        self.sizes, self.fail_at = [], set(fail_at)

    def log_batch(self, _run_id, metrics):
        self.sizes.append(len(metrics))
        if len(self.sizes) in self.fail_at:
            raise ConnectionError("cut")

    def get_run(self, _run_id):
        return SimpleNamespace(data=SimpleNamespace(metrics={"m0": 1.0}))

    def get_metric_history(self, _run_id, _name):
        return [SimpleNamespace(step=step) for step in (1, 2)]

    def list_artifacts(self, _run_id, _folder):
        return []


def server_run(client, monkeypatch):
    monkeypatch.setattr(mlflow, "_client", lambda _uri: client)
    run = SimpleNamespace(data=SimpleNamespace(params={}), info=SimpleNamespace(run_id="a"))
    return mlflow.MlflowRun("http://127.0.0.1:9", run, new=True)


@pytest.fixture
def record(out):
    """A record of 30 epochs with 100 metrics each."""
    record = RunRecord(record_of(out))
    record.begin(RunData("a", "http://127.0.0.1:9", "1", "tiny", "tiny_history.csv", "", 0))
    names = ["epoch", *(f"m{number}" for number in range(100))]
    lines = [",".join([str(epoch), *["0.5"] * 100]) for epoch in range(1, 31)]
    (out / "tiny_history.csv").write_text("\n".join([",".join(names), *lines]))
    yield record
    record.close()


def test_requests_hold_as_many_metrics_as_mlflow_accepts(record, monkeypatch):
    client = FakeClient()
    run = server_run(client, monkeypatch)
    assert run.send(record, ended=True).epochs == set(range(1, 31))
    assert client.sizes == [1000, 1000, 1000]
    assert run.send(record, ended=True).epochs == set(), "nothing is sent twice"


def test_after_a_failure_the_server_is_asked_what_it_has(record, monkeypatch):
    client = FakeClient(fail_at=[2])
    run = server_run(client, monkeypatch)
    with pytest.raises(mlflow.NoAnswerError, match="cut"):
        run.send(record, ended=True)
    run.send(record, ended=True)
    assert client.sizes == [1000, 1000, 1000, 1000, 998]


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://me:s%40cret@host:5000/a?b", "https://host:5000/a?b"),
        ("http://me:secret@host", "http://host"),
        ("http://me@host/a@b", "http://b"),
        ("http://me:se/cr#e?t@host:5000", "http://host:5000"),
        ("postgresql://me:secret@host/db", "postgresql://host/db"),
    ],
)
def test_a_password_is_never_shown(uri, shown):
    assert without_password(uri) == shown
    for message in (f"cannot parse {uri}/api", f"Retries of {uri} (Caused by Failure('{uri}'))"):
        with pytest.raises(mlflow.TrackingError) as raised, mlflow._tracking_errors(uri):
            raise OSError(message)
        for secret in ("secret", "cret@", "me:"):
            assert secret not in str(raised.value)


@pytest.mark.parametrize(
    "uri",
    [
        *("http://127.0.0.1:5000", "http://host:5000/a@b", "sqlite:////a/b@c.db", "mlruns"),
        *("databricks://profile", "databricks"),
    ],
)
def test_an_address_without_password_is_unchanged(uri):
    assert without_password(uri) == uri
