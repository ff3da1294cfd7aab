"""Tracking against a real `mlflow server` on loopback, with SQLite behind it."""

import contextlib
import logging
import os
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pupilseg.cli import main
from pupilseg.errors import UsageError
from pupilseg.tracking import outbox
from pupilseg.tracking import tracker as tracking
from pupilseg.tracking.mlflow import METRICS_A_REQUEST, without_password
from pupilseg.tracking.spool import Record
from tests.helpers.mlflow_server import START_SECONDS, eventually
from tests.helpers.paths import ROOT

numbers = count()


class Gate(socketserver.ThreadingTCPServer):
    """What stands before the server: passes bytes on, or takes them and never answers.

    Attributes:
        open: pass on.
        arrived: a request came while it was closed.
        passed: what it passed on.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, port):
        super().__init__(("127.0.0.1", 0), Passage)
        self.behind = port
        self.uri = f"http://127.0.0.1:{self.server_address[1]}"
        self.open, self.arrived = threading.Event(), threading.Event()
        self.open.set()
        self.passed = []

    def close(self):
        self.arrived.clear()
        self.open.clear()


class Passage(socketserver.BaseRequestHandler):
    """A connection through a gate, which may close at each request."""

    def handle(self):
        with socket.create_connection(("127.0.0.1", self.server.behind)) as behind:
            back = threading.Thread(target=self.answers, args=[behind], daemon=True)
            back.start()
            with contextlib.suppress(OSError):
                while data := self.request.recv(1 << 16):
                    if not self.server.open.is_set():
                        self.server.arrived.set()
                        self.hang()
                        break
                    self.server.passed.append(data)
                    behind.sendall(data)
                behind.shutdown(socket.SHUT_WR)
            back.join()

    def hang(self):
        """Reads on, so that who sends is not told, until that one goes away."""
        while self.request.recv(1 << 16):
            pass

    def answers(self, behind):
        with contextlib.suppress(OSError):
            while data := behind.recv(1 << 16):
                self.request.sendall(data)


@pytest.fixture
def gate(server):
    """Before the server; the environment names it (see `environment`)."""
    with Gate(server.port) as gate:
        thread = threading.Thread(target=gate.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield gate
        gate.shutdown()
        thread.join()


@pytest.fixture
def client(gate, server, environment, monkeypatch):
    """A client that goes past the gate; the environment names the gate and a fresh experiment."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=server.uri)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", gate.uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", client.create_experiment(f"pupils{next(numbers)}"))
    return client


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Short patience, and an environment that is as before at the end."""
    for variable in tracking.VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    for variable, value in tracking._DEFAULTS.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")


@pytest.fixture
def spool(tmp_path):
    return tmp_path / "out" / "tiny_mlflow.jsonl"


def start(spool, params=None, **keywords):
    return tracking.start(
        params or {"lr": 0.1}, {"model_type": "T"}, "tiny", spool=spool, **keywords
    )


def row(epoch):
    return {"epoch": epoch, "train_loss": 1 / epoch, "valid_iou": 0.5, "valid_gone": float("nan")}


def steps(client, run_id, name="train_loss"):
    """The steps of a metric as the server has them, which must not repeat one."""
    history = client.get_metric_history(run_id, name)
    assert all(metric.value == row(metric.step)[name] for metric in history)
    return [metric.step for metric in sorted(history, key=lambda metric: metric.step)]


def status(client, run_id):
    return client.get_run(run_id).info.status


def warnings_of(caplog):
    """What the library warned of."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno >= logging.WARNING and record.name.startswith(("pupilseg", "urllib3"))
    ]


def artifact(client, run_id, name, folder):
    return Path(client.download_artifacts(run_id, name, str(folder))).read_bytes()


@pytest.mark.integration
def test_a_run_is_recorded(client, spool, tmp_path, caplog):
    params = {
        "lr": 0.1,
        "data": "fake",
        "architecture": {"depth": [1, 1], "head": {"kind": "soft"}},
        "augment": None,
        "overrides": {},
        "long": "x" * 7000,
    }
    tracker = start(spool, params)
    assert status(client, tracker.run_id) == "RUNNING"
    file = tmp_path / "out" / "best.pt"
    for epoch in (1, 2, 3):
        tracker.log_epoch(row(epoch), time_s=1e9 + epoch)
        file.write_bytes(b"weights %d" % epoch)
        tracker.log_artifact(file)
    curve = tmp_path / "elsewhere.png"
    curve.write_bytes(b"picture")
    tracker.log_artifact(curve, "plots/curves")
    tracker.end("FINISHED")
    found = client.get_run(tracker.run_id)
    assert found.info.status == "FINISHED"
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
    assert set(found.data.metrics) == {"train_loss", "valid_iou"}
    assert steps(client, tracker.run_id) == [1, 2, 3]
    history = client.get_metric_history(tracker.run_id, "train_loss")
    assert [metric.timestamp for metric in history] == [10**12 + 1000 * n for n in (1, 2, 3)]
    assert artifact(client, tracker.run_id, "best.pt", tmp_path) == b"weights 3"
    assert artifact(client, tracker.run_id, "plots/curves/elsewhere.png", tmp_path) == b"picture"
    assert warnings_of(caplog) == []
    assert not spool.exists()


@pytest.mark.integration
def test_a_server_that_dies_costs_a_warning(
    client, server, spool, tmp_path, monkeypatch, caplog, capsys
):
    """The run goes on; the command in the warning sends the rest, and sends nothing twice."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    tracker = start(spool)
    tracker.log_epoch(row(1), time_s=1e9)
    eventually(lambda: steps(client, tracker.run_id) == [1])
    server.kill()
    file = tmp_path / "out" / "best.pt"
    for epoch in (2, 3, 4):
        tracker.log_epoch(row(epoch), time_s=1e9 + epoch)
        file.write_bytes(b"weights %d" % epoch)
        tracker.log_artifact(file)
        eventually(lambda: warnings_of(caplog))
    tracker.end("FINISHED")
    (warning,) = warnings_of(caplog)
    command = f"pupilseg upload-run {spool}"
    assert server.uri in warning
    assert f"`{command}`" in warning
    words = command.split()[1:]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "does not answer" in said
    assert command in said
    server.start()
    moved = spool.parent.rename(tmp_path / "moved")
    shutil.copy(moved / spool.name, tmp_path / "copy")
    assert main(["upload-run", str(moved)]) == 0
    assert f"run {tracker.run_id} (tiny)" in capsys.readouterr().out
    assert not (moved / spool.name).exists()
    for again in (False, True):
        if again:
            shutil.copy(tmp_path / "copy", moved / spool.name)
            monkeypatch.delenv("MLFLOW_TRACKING_URI")  # the file says which server it was
            assert main(["upload-run", str(moved / spool.name)]) == 0
        assert steps(client, tracker.run_id) == [1, 2, 3, 4]
        assert steps(client, tracker.run_id, "valid_iou") == [1, 2, 3, 4]
        times = {m.timestamp for m in client.get_metric_history(tracker.run_id, "valid_iou")}
        assert times == {10**12 + 1000 * n for n in (0, 2, 3, 4)}
        assert status(client, tracker.run_id) == "FINISHED"
        assert artifact(client, tracker.run_id, "best.pt", tmp_path) == b"weights 4"
    capsys.readouterr()
    assert main(["upload-run", str(moved)]) == 0
    assert "nothing left to send" in capsys.readouterr().out


@pytest.mark.integration
def test_a_server_that_hangs_holds_nothing_up(client, gate, spool, monkeypatch, caplog):
    """Rows are logged while a request is under way that is never answered."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", str(10 * START_SECONDS))
    tracker = start(spool)
    gate.close()
    tracker.log_epoch(row(1))
    assert gate.arrived.wait(START_SECONDS)
    for epoch in (2, 3):
        tracker.log_epoch(row(epoch))
        assert f'"step": {epoch}' in spool.read_text()
    tracker.end("FINISHED", timeout_s=0.5)
    (warning,) = warnings_of(caplog)
    assert "4 messages not taken within 0.5 s" in warning
    assert steps(client, tracker.run_id) == []
    gate.open.set()
    assert main(["upload-run", str(spool)]) == 0
    assert steps(client, tracker.run_id) == [1, 2, 3]


@pytest.mark.integration
def test_a_server_that_comes_back_gets_what_it_missed(client, gate, spool, monkeypatch, caplog):
    monkeypatch.setattr(outbox, "_RETRY_SECONDS", 0.1)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    tracker = start(spool)
    gate.close()
    for epoch in (1, 2):
        tracker.log_epoch(row(epoch))
    eventually(lambda: warnings_of(caplog))
    for _ in range(2):  # a second attempt since then comes when the first has failed
        gate.arrived.clear()
        assert gate.arrived.wait(START_SECONDS)
    gate.passed.clear()
    gate.open.set()
    eventually(lambda: steps(client, tracker.run_id) == [1, 2])
    assert b"get-history" in gate.passed[0], "it may have had them, and is asked"
    tracker.log_epoch(row(3))
    tracker.end("FINISHED")
    assert steps(client, tracker.run_id) == [1, 2, 3]
    assert len(warnings_of(caplog)) == 1
    assert not spool.exists()


TRAINING = """
import sys
from pathlib import Path
from pupilseg.tracking import tracker as tracking

tracker = tracking.start({"lr": 0.1}, {}, "tiny", spool=Path(sys.argv[1]))
tracker.log_epoch({"epoch": 1, "train_loss": 1.0})
print(tracker.run_id, flush=True)
input()
tracker.log_epoch({"epoch": 2, "train_loss": 0.5})
print("logged", flush=True)
input()
tracker.end("FINISHED", timeout_s=0.5)
"""


@contextlib.contextmanager
def training(client, gate, spool):
    """A process that trains; yields it, with the run's id, when the server hangs since epoch 2."""
    with subprocess.Popen(
        [sys.executable, "-c", TRAINING, str(spool)],
        cwd=ROOT,
        env=os.environ | {"MLFLOW_HTTP_REQUEST_TIMEOUT": str(10 * START_SECONDS)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            run_id = process.stdout.readline().strip()
            eventually(lambda: steps(client, run_id) == [1])
            gate.close()
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "logged\n"
            assert gate.arrived.wait(START_SECONDS)
            yield process, run_id
        finally:
            process.kill()


@pytest.mark.integration
def test_a_killed_process_leaves_what_was_not_sent(client, gate, spool, capsys):
    with training(client, gate, spool) as (process, run_id):
        assert main(["upload-run", str(spool)]) == 1
        assert "in use by another training run" in capsys.readouterr().err
        process.send_signal(signal.SIGKILL)
        process.wait()
    gate.open.set()
    assert steps(client, run_id) == [1]
    assert main(["upload-run", str(spool)]) == 0
    assert steps(client, run_id) == [1, 2]
    assert status(client, run_id) == "KILLED"


@pytest.mark.integration
def test_a_process_ends_while_the_server_hangs(client, gate, spool):
    """Neither `end` nor the interpreter's own end waits for the request under way."""
    with training(client, gate, spool) as (process, run_id):
        process.stdin.write("\n")
        process.stdin.close()
        assert process.wait(START_SECONDS) == 0
    gate.open.set()
    resumed = start(spool, run_id=run_id)
    resumed.log_epoch(row(3))
    resumed.end("FINISHED")
    assert steps(client, run_id) == [1, 2, 3], "what the killed one left goes along"
    assert not spool.exists()


@pytest.mark.integration
def test_a_resumed_run_is_taken_up_again(client, spool, caplog):
    caplog.set_level(logging.INFO, "pupilseg")
    first = start(spool, {"lr": 0.1, "epochs": 2})
    for epoch in (1, 2):
        first.log_epoch(row(epoch))
    first.end("KILLED")
    assert status(client, first.run_id) == "KILLED"
    second = start(spool, {"lr": 0.1, "epochs": 4, "seed": 0}, run_id=first.run_id)
    assert second.run_id == first.run_id
    assert status(client, first.run_id) == "RUNNING"
    assert client.get_run(first.run_id).data.params == {"lr": "0.1", "epochs": "2", "seed": "0"}
    assert f"{first.run_id}" in caplog.text
    assert "taken up again; epochs stays 2 there, is 4" in caplog.text
    for epoch in (2, 3, 4):
        second.log_epoch(row(epoch))
    second.end("FINISHED")
    assert steps(client, first.run_id) == [1, 2, 3, 4]
    assert status(client, first.run_id) == "FINISHED"
    assert warnings_of(caplog) == []


@pytest.mark.integration
@pytest.mark.parametrize("gone", ["deleted", "unknown"])
def test_a_run_that_is_not_there_any_more(client, gate, spool, caplog, capsys, gone):
    """To go on, a new one is opened; what was kept for it is not sent, and why is told."""
    first = start(spool)
    gate.close()
    first.log_epoch(row(1))
    assert gate.arrived.wait(START_SECONDS)
    first.end("KILLED", timeout_s=0)
    gate.open.set()
    caplog.clear()
    run_id = first.run_id
    if gone == "deleted":
        client.delete_run(run_id)
    else:
        spool.write_text(spool.read_text().replace(run_id, "0" * 32))
        run_id = "0" * 32
    second = start(spool, run_id=run_id)
    assert second.run_id not in (first.run_id, run_id)
    (warning,) = warnings_of(caplog)
    assert f"no run {run_id} to take up again" in warning
    second.log_epoch(row(1))
    second.end("FINISHED")
    assert steps(client, second.run_id) == [1]
    assert main(["upload-run", str(spool)]) == 1
    said = capsys.readouterr().err
    assert f"has no run {run_id}" in said
    assert f"deleting {spool}" in said
    assert spool.exists()


@pytest.mark.integration
def test_a_file_that_another_run_replaced_is_not_sent(
    client, gate, spool, tmp_path, caplog, capsys
):
    tracker = start(spool)
    gate.close()
    file = spool.parent / "best.pt"
    tracker.log_artifact(file)
    assert warnings_of(caplog) == [
        f"cannot read {file} (No such file or directory): MLflow does not get it"
    ]
    file.write_bytes(b"mine")
    tracker.log_artifact(file)
    assert gate.arrived.wait(START_SECONDS)
    tracker.log_epoch(row(1))
    tracker.end("FINISHED", timeout_s=0)
    gate.open.set()
    for content in (b"another", None):
        file.unlink() if content is None else file.write_bytes(content)
        assert main(["upload-run", str(spool)]) == 1
        assert f"{file} is not there any more as it was logged" in capsys.readouterr().err
        assert steps(client, tracker.run_id) == [1]
        assert client.list_artifacts(tracker.run_id) == []
        assert status(client, tracker.run_id) == "FINISHED"
    file.write_bytes(b"mine")
    assert main(["upload-run", str(spool)]) == 0
    assert artifact(client, tracker.run_id, "best.pt", tmp_path) == b"mine"
    assert not spool.exists()


@pytest.mark.integration
def test_an_experiment_that_is_not_there(client, spool, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "987654321")
    with pytest.raises(UsageError, match=r"987654321.*unset them to train untracked"):
        start(spool)
    assert not spool.exists()


@pytest.mark.parametrize("present", [(), (0,), (1,)], ids=["none", "uri", "experiment"])
def test_without_both_variables_one_warning(present, spool, tmp_path, monkeypatch, caplog):
    for number in present:
        monkeypatch.setenv(tracking.VARIABLES[number], "http://127.0.0.1:9")
    tracker = start(spool)
    assert tracker.run_id is None
    tracker.log_epoch(row(1))
    tracker.log_artifact(tmp_path / "gone")
    tracker.end("FINISHED")
    (warning,) = warnings_of(caplog)
    for number, variable in enumerate(tracking.VARIABLES):
        assert (variable in warning) == (number not in present)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["nobody", "silent"])
def test_a_server_that_is_not_there_is_told_at_once(kind, spool, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1] if kind == "silent" else 9
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{port}")
        monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "0")
        with pytest.raises(UsageError, match=rf":{port} did.*unset them to train unt") as error:
            start(spool)
    assert "secret" not in str(error.value)
    assert not spool.exists()


def test_mlflow_that_is_not_installed(spool, monkeypatch):
    for variable in tracking.VARIABLES:
        monkeypatch.setenv(variable, "1")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UsageError, match=r"mlflow is not installed.*pupilseg\[track\].*unset it"):
        start(spool)
    assert not spool.exists()


@given(st.lists(st.integers(0, 1500), max_size=20))
def test_epochs_share_requests_up_to_the_limit(sizes):
    epochs = [
        Record(number, "epoch", 0, {"step": number, "metrics": dict.fromkeys(range(size), 0.0)})
        for number, size in enumerate(sizes)
    ]
    groups = list(outbox._requests(epochs))
    assert [record for group in groups for record in group] == epochs
    totals = [sum(sizes[record.id] for record in group) for group in groups]
    for group, total in zip(groups, totals, strict=True):
        assert total <= METRICS_A_REQUEST or len(group) == 1
    for total, following in zip(totals, groups[1:], strict=False):
        assert total + sizes[following[0].id] > METRICS_A_REQUEST, "room for one more was left"


def test_no_password_is_written_down():
    assert without_password("https://me:s%40cret@host:5000/a?b") == "https://host:5000/a?b"
    for uri in ("http://127.0.0.1:5000", "sqlite:////a/b@c.db", "mlruns", "databricks://profile"):
        assert without_password(uri) == uri
