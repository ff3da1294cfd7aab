"""The file that holds what MLflow has not confirmed: nothing in it is lost or sent twice."""

import json
import logging
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pupilseg.errors import DataError, LockedError, OutputError
from pupilseg.tracking.spool import Spool

RUN = {"uri": "http://127.0.0.1:9", "experiment": "1", "name": "tiny"}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out" / "tiny_mlflow.jsonl"


def filled(path, epochs=3):
    spool = Spool(path)
    spool.open_run("a", **RUN, time_ms=5)
    for step in range(1, epochs + 1):
        spool.add("a", "epoch", 10 * step, {"step": step, "metrics": {"loss": 1 / 3}})
    return spool


def steps(spool, run="a"):
    return [record.data["step"] for record in spool.pending(run)]


def test_what_is_not_confirmed_is_there_again(path):
    spool = filled(path)
    spool.confirm([spool.pending("a")[1]])
    spool.close()
    again = Spool(path)
    assert steps(again) == [1, 3]
    assert again.pending("a")[0].data["metrics"] == {"loss": 1 / 3}
    (run,) = again.unfinished()
    assert (run.id, run.uri, run.experiment, run.name) == ("a", *RUN.values())
    assert run.last_ms == 30
    again.add("a", "epoch", 40, {"step": 4, "metrics": {}})
    ids = [record.id for record in again.pending("a")]
    assert ids == [0, 2, 3]
    again.close()


def test_a_killed_process_loses_nothing(path):
    """Each record is on its way to the disk when `add` returns; no close is needed."""
    spool = filled(path)
    assert [json.loads(line)["kind"] for line in path.read_text().splitlines()] == [
        *("run", "epoch", "epoch", "epoch")
    ]
    spool.close()


def test_the_file_goes_when_all_is_sent(path):
    spool = filled(path)
    spool.confirm(spool.pending("a"))
    assert [run.id for run in spool.unfinished()] == ["a"], "its end is missing"
    spool.add("a", "end", 50, {"status": "FINISHED"})
    spool.confirm(spool.pending("a"))
    assert spool.unfinished() == []
    assert path.exists()
    spool.close()
    assert not path.exists()


def test_one_run_does_not_take_the_rows_of_another_along(path):
    filled(path).close()
    spool = Spool(path)
    spool.open_run("b", **RUN, time_ms=60)
    spool.add("b", "end", 70, {"status": "FINISHED"})
    spool.confirm(spool.pending("b"))
    spool.close()
    again = Spool(path)
    assert [run.id for run in again.unfinished()] == ["a"]
    assert steps(again) == [1, 2, 3]
    again.close()


@pytest.mark.parametrize("confirmed", [False, True])
def test_a_run_that_is_taken_up_again_has_not_ended(path, confirmed):
    spool = filled(path)
    spool.add("a", "end", 50, {"status": "KILLED"})
    if confirmed:
        spool.confirm(spool.pending("a"))
    spool.open_run("a", **RUN, time_ms=60)
    for read_again in (False, True):
        if read_again:
            spool.close()
            spool = Spool(path)
        assert [run.ended for run in spool.unfinished()] == [False]
        assert steps(spool) == ([] if confirmed else [1, 2, 3])
    spool.close()


def test_one_process_at_a_time(path):
    spool = filled(path)
    with pytest.raises(LockedError, match=r"tiny_mlflow\.jsonl is in use"):
        Spool(path)
    spool.close()
    Spool(path).close()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_cut_anywhere_costs_only_what_was_cut(tmp_path_factory, data):
    """As a full disk or a power cut leaves the file; what is written next stands on its own."""
    path = tmp_path_factory.mktemp("cut") / "x_mlflow.jsonl"
    spool = filled(path, epochs=data.draw(st.integers(1, 4)))
    confirmed = data.draw(st.booleans())
    if confirmed:
        spool.confirm(spool.pending("a")[:1])
    spool.close()
    content = path.read_bytes()
    run_line = content.index(b"\n")
    cut = data.draw(st.integers(run_line, len(content)))
    path.write_bytes(content[:cut])
    # A cut before a line's end leaves all of its record.
    whole = [json.loads(line) for line in content[: cut + 1].split(b"\n")[:-1]]
    sent = {number for line in whole if line["kind"] == "sent" for number in line["ids"]}
    expected = [x["step"] for x in whole if x["kind"] == "epoch" and x["id"] not in sent]
    spool = Spool(path)
    assert steps(spool) == expected
    spool.add("a", "epoch", 99, {"step": 99, "metrics": {}})
    spool.close()
    spool = Spool(path)
    assert steps(spool) == [*expected, 99]
    spool.close()


def test_damage_is_told(path, caplog):
    filled(path).close()
    lines = path.read_text().splitlines()
    lines[2] = lines[2][:20]
    path.write_text("\n".join(lines) + "\n")
    spool = Spool(path)
    assert steps(spool) == [1, 3]
    assert "1 damaged lines are left out (line 3)" in caplog.text
    spool.close()


@pytest.mark.parametrize("content", ["epoch,loss\n1,0.5\n", '{"a": 1}\n', "[1]\n", "\x00\x01"])
def test_another_kind_of_file_is_left_as_it_is(path, content):
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(DataError, match=r"tiny_mlflow\.jsonl holds no run"):
        Spool(path)
    assert path.read_text() == content


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="a file is where a directory must be"):
        Spool(tmp_path / "file" / "x_mlflow.jsonl")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_costs_one_warning(tmp_path, caplog):
    """What cannot be written is still pending, so that a server that answers gets it."""
    spool = filled(tmp_path / "x_mlflow.jsonl", epochs=1)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, spool._fd)
    os.close(full)
    for step in (2, 3):
        spool.add("a", "epoch", step, {"step": step, "metrics": {}})
    assert steps(spool) == [1, 2, 3]
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "cannot write" in warning.getMessage()
    assert "No space left" in warning.getMessage()
    spool.close()
