"""The table of trackers: a tracker is added with one module and one line."""

import logging
import sys
from types import ModuleType

import pytest

from pupilseg.errors import UsageError
from pupilseg.tracking import (
    TRACKERS,
    RunInfo,
    TrackerEntry,
    Trackers,
    enabling_variables,
    start,
)


class Notebook:
    """A tracker that keeps everything in a list."""

    def __init__(self, run, run_id):
        self.run_id = run_id or "new"
        self.calls = [("start", run.name, run.params["lr"])]

    def log_epoch(self, row):
        self.calls.append(("epoch", row["epoch"]))

    def log_file(self, path, folder=""):
        self.calls.append(("file", path.name, folder))

    def end(self, status):
        self.calls.append(("end", status))


@pytest.fixture(autouse=True)
def no_mlflow(monkeypatch):
    for variable in TRACKERS["mlflow"].variables:
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def run(tmp_path):
    return RunInfo("tiny", {"lr": 0.1}, {}, tmp_path / "tiny_history.csv")


@pytest.fixture
def notebook(monkeypatch):
    """Adds a tracker as a contributor would; returns the list of those that were started."""
    started = []
    module = ModuleType("notebook_tracker")

    def open_notebook(run, run_id):
        started.append(Notebook(run, run_id))
        return started[-1]

    module.start = open_notebook
    monkeypatch.setitem(sys.modules, "notebook_tracker", module)
    monkeypatch.setitem(TRACKERS, "notebook", TrackerEntry("notebook_tracker", ("NOTEBOOK",)))
    return started


def test_a_tracker_is_added_with_one_module_and_one_line(notebook, run, tmp_path, monkeypatch):
    monkeypatch.setenv("NOTEBOOK", "on")
    trackers = start(run)
    assert trackers
    trackers.log_epoch({"epoch": 1})
    trackers.log_file(tmp_path / "best.pt", "checkpoints")
    trackers.end("FINISHED")
    (tracker,) = notebook
    assert tracker.calls == [
        ("start", "tiny", 0.1),
        ("epoch", 1),
        ("file", "best.pt", "checkpoints"),
        ("end", "FINISHED"),
    ]
    assert trackers.notes == {"notebook_run": "new"}


def test_the_notes_of_a_run_resume_it(notebook, run, monkeypatch):
    monkeypatch.setenv("NOTEBOOK", "on")
    assert start(run, {"notebook_run": "seven"}).notes == {"notebook_run": "seven"}
    assert start(run, {"mlflow_run": "of another tracker"}).notes == {"notebook_run": "new"}


def test_a_tracker_that_cannot_start_ends_those_before_it(notebook, run, monkeypatch):
    monkeypatch.setenv("NOTEBOOK", "on")
    broken = ModuleType("broken_tracker")

    def fail(_run, _run_id):
        raise UsageError("no server")

    broken.start = fail
    monkeypatch.setitem(sys.modules, "broken_tracker", broken)
    monkeypatch.setitem(TRACKERS, "broken", TrackerEntry("broken_tracker", ("NOTEBOOK",)))
    with pytest.raises(UsageError, match="no server"):
        start(run)
    assert notebook[0].calls[-1] == ("end", "FAILED")


@pytest.mark.parametrize("present", [(), (0,), (1,)], ids=["none", "uri", "experiment"])
def test_without_all_variables_there_is_one_warning(present, run, tmp_path, monkeypatch, caplog):
    variables = TRACKERS["mlflow"].variables
    for number in present:
        monkeypatch.setenv(variables[number], "http://127.0.0.1:9")
    trackers = start(run)
    assert not trackers
    assert trackers.notes == {}
    trackers.log_epoch({"epoch": 1})
    trackers.log_file(tmp_path / "gone")
    trackers.end("FINISHED")
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    for number, variable in enumerate(variables):
        assert (variable in warning) == (number not in present)
    assert not list(tmp_path.iterdir())


def test_no_trackers_do_nothing(tmp_path):
    trackers = Trackers()
    assert not trackers
    trackers.log_file(tmp_path / "gone")
    trackers.end("FAILED")


def test_variables_for_a_process_on_another_machine(notebook, monkeypatch):
    for variable in TRACKERS["mlflow"].credentials:
        monkeypatch.delenv(variable, raising=False)
    assert enabling_variables() == {}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    monkeypatch.setenv("NOTEBOOK", "on")
    assert enabling_variables() == {"NOTEBOOK": "on"}, "half of the variables enable nothing"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "1")
    assert enabling_variables() == {
        "MLFLOW_TRACKING_URI": "http://host",
        "MLFLOW_EXPERIMENT_ID": "1",
        "MLFLOW_TRACKING_PASSWORD": "secret",
        "NOTEBOOK": "on",
    }


def test_the_name_of_an_experiment_replaces_its_id(monkeypatch):
    variables = {
        "MLFLOW_TRACKING_URI": "http://host",
        "MLFLOW_EXPERIMENT_NAME": "pupils",
        "MLFLOW_RUN_NAME": "first",
    }
    for name in ("MLFLOW_EXPERIMENT_ID", *TRACKERS["mlflow"].credentials):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert enabling_variables() == variables
