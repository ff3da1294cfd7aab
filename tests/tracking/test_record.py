"""The record of an MLflow run: logged data is written to disk immediately."""

import hashlib
import json
import logging
import math
import os

import pytest

from pupilseg.errors import DataError, LockedError, OutputError
from pupilseg.tracking.record import LoggedFile, Metric, RunData, RunRecord


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out" / "tiny_mlflow_run.json"


def data(run_id="a", earlier_history=""):
    return RunData(
        run_id=run_id,
        uri="http://127.0.0.1:9",
        experiment="1",
        name="tiny",
        history="tiny_history.csv",
        earlier_history=earlier_history,
        changed_ms=5,
    )


@pytest.fixture
def record(path):
    record = RunRecord(path)
    record.begin(data())
    yield record
    record.close()


def reopened(record):
    record.close()
    return RunRecord(record.path)


def write_history(record, text="epoch,loss,center_px\n1,0.5,nan\n2,0.25,3\n"):
    path = record.path.parent / "tiny_history.csv"
    path.write_text(text)
    os.utime(path, (1e9, 1e9))
    return path


def test_each_change_is_written_at_once(record):
    """A killed process does not have to call close."""
    with record.change() as run:
        run.epochs["1"] = {"time_ms": 10, "train_seconds": 1 / 3}
        run.files["plots/x.png"] = LoggedFile("x.png", "12")
    content = json.loads(record.path.read_text())
    assert content["epochs"] == {"1": {"time_ms": 10, "train_seconds": 1 / 3}}
    before = record.run
    record = reopened(record)
    assert record.run == before
    assert record.files() == {"plots/x.png": LoggedFile("x.png", "12")}
    record.close()


def test_a_resumed_run_keeps_what_was_logged(record):
    with record.change() as run:
        run.status, run.closed = "KILLED", True
        run.epochs["1"] = {"time_ms": 10}
    record.begin(data())
    assert (record.run.status, record.run.closed) == ("RUNNING", False)
    assert record.run.epochs == {"1": {"time_ms": 10}}
    record.begin(data("b"))
    assert record.run.epochs == {}


def test_metrics_come_from_the_history_and_times_from_the_record(record):
    assert record.metrics(ended=True) == []
    write_history(record)
    with record.change() as run:
        run.epochs["1"] = {"time_ms": 10, "train_seconds": 7.5}
    assert record.metrics(ended=True) == [
        Metric("loss", 1, 0.5, 10),
        Metric("train_seconds", 1, 7.5, 10),
        # Killed before the epoch was logged: the time of the history.
        Metric("loss", 2, 0.25, 10**12),
        Metric("center_px", 2, 3.0, 10**12),
    ]
    assert {metric.step for metric in record.metrics(ended=False)} == {1}


def test_the_history_of_an_earlier_run_is_ignored(path):
    record = RunRecord(path)
    record.begin(data())
    history = write_history(record)
    record.begin(data("b", hashlib.sha256(history.read_bytes()).hexdigest()))
    assert record.metrics(ended=True) == []
    write_history(record, "epoch,loss\n1,0.125\n")
    assert [metric.value for metric in record.metrics(ended=True)] == [0.125]
    record.close()


@pytest.mark.parametrize("text", ["loss\n0.5\n", "epoch,loss\n1,x\n", "epoch,loss\n1\n", "\x00"])
def test_a_damaged_history_is_an_error(record, text):
    write_history(record, text)
    if text == "\x00":
        (record.path.parent / "tiny_history.csv").write_bytes(b"\xff\xfe\n\xff")
    with pytest.raises(DataError, match=r"tiny_history\.csv is not a history of epochs"):
        assert not record.metrics(ended=True)


def test_only_one_process_at_a_time(path, record):
    with pytest.raises(LockedError, match=rf"{path} is in use by pid {os.getpid()} on "):
        RunRecord(path)
    record.close()
    RunRecord(path).close()
    assert [file.name for file in path.parent.iterdir()] == [path.name], "no lock file stays"


def test_a_change_after_close_is_not_written(record):
    before = record.path.read_text()
    record.close()
    with record.change() as run:
        run.status = "FINISHED"
    assert record.path.read_text() == before


@pytest.mark.parametrize("content", ["epoch,loss\n1,0.5\n", '{"a": 1}\n', "[1]\n", "\x00\x01"])
def test_another_kind_of_file_is_left_unchanged(path, content):
    path.parent.mkdir()
    path.write_text(content)
    for _ in range(2):  # the first error released the lock
        with pytest.raises(DataError, match=r"tiny_mlflow_run\.json.*name another file, or del"):
            RunRecord(path)
    assert path.read_text() == content


def test_a_directory_that_cannot_be_created(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="a file is where a directory must be"):
        RunRecord(tmp_path / "file" / "x_mlflow_run.json")


def test_a_full_disk_causes_one_warning(record, monkeypatch, caplog):
    """The content in memory stays correct, so that a server that responds gets everything."""

    def full(path, _value):
        raise OutputError(f"cannot write {path}: the disk is full")

    monkeypatch.setattr("pupilseg.tracking.record.write_json", full)
    for epoch in ("1", "2"):
        with record.change() as run:
            run.epochs[epoch] = {"time_ms": math.pi}
    assert list(record.run.epochs) == ["1", "2"]
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "the disk is full" in warning.getMessage()
