"""A run that is killed repeatedly writes the same bytes as an undisturbed run."""

import csv
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from pupilseg.files import LOCK_NAME
from pupilseg.model_files.checkpoint import load_tensors
from tests.helpers.paths import ROOT
from tests.helpers.processes import Program
from tests.helpers.training import write_eyes
from tests.helpers.victim import Victim

pytestmark = pytest.mark.integration

MODEL = "efficientvit_tiny"
STATE = f"{MODEL}_training_state.pt"
EPOCHS = 12
KILLS = 20


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Shards of a few frames, for epochs of two steps in a few tenths of a second."""
    return write_eyes(tmp_path_factory.mktemp("data"), train=4, validation=2)


def line(data_dir, out, *flags, epochs=EPOCHS):
    """Returns a training command."""
    return [
        sys.executable, "-m", "pipeline.train", "--model", MODEL, "--device", "cpu",
        "--shards", str(data_dir), "--out", str(out), "--batch-size", "2",
        "--epochs", str(epochs), *flags,
    ]  # fmt: skip


def resume_flag(out):
    """Returns the flag for a directory that may hold the files of a killed run."""
    return ["--resume"] if (out / STATE).exists() else ["--overwrite"]


def whole_epochs(out):
    """Returns the number of finished epochs according to the training state on disk."""
    return load_tensors(out / STATE)["epoch"] if (out / STATE).exists() else 0


def files_of(out):
    """Returns all files except the state as bytes, and the state's content.

    A killed process leaves its lock file, which locks nothing any more.
    """
    state = load_tensors(out / STATE)
    files = [path for path in out.iterdir() if path.name not in (STATE, LOCK_NAME)]
    return {path.name: path.read_bytes() for path in files}, state


def run(command):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def undisturbed(data_dir, tmp_path_factory):
    """Output directory of an undisturbed run, and the seconds of its start and of an epoch."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    with Program(line(data_dir, out), ROOT) as program:
        started = time.monotonic()
        program.wait_for("epoch   1/")
        first = time.monotonic()
        program.wait_for("best: ")
        last = time.monotonic()
        assert program.end()[0] == 0
    return out, first - started, (last - first) / (EPOCHS - 1)


def same(first, second):
    """Asserts that two output directories hold the same results."""
    (files, state), (others, other) = files_of(first), files_of(second)
    assert sorted(files) == sorted(others)
    for name, content in files.items():
        assert content == others[name], name
    for key in ("model", "averaged", "best"):
        for name, value in state[key].items():
            assert value.equal(other[key][name]), (key, name)
    assert state["random"].equal(other["random"])
    assert state["rows"].equal(other["rows"])


@pytest.mark.long
def test_sigkill_at_random_moments_costs_only_the_current_epoch(data_dir, undisturbed, tmp_path):
    whole, start_s, epoch_s = undisturbed
    out = tmp_path / "out"
    rng = np.random.default_rng(3)
    kills = in_epochs = 0
    while kills < KILLS:
        before, reported = whole_epochs(out), 0
        with Program(line(data_dir, out, *resume_flag(out)), ROOT) as program:
            # Sometimes before the first epoch ends, mostly within two epochs after it.
            if rng.random() < 0.2:
                time.sleep(rng.uniform(0, start_s))
            else:
                wanted = f"epoch {before + 1:3d}/" if before < EPOCHS else "best: "
                program.wait_for(wanted)
                time.sleep(rng.uniform(0, 2 * epoch_s))
            program.kill_all()
            kills += 1
            reported = program.text.count("\nepoch ") + program.text.startswith("epoch ")
        after = whole_epochs(out)
        assert after >= before + reported  # every reported epoch is on disk
        assert after <= before + reported + 1
        in_epochs += after < EPOCHS
        if after == EPOCHS:
            same(out, whole)
            for path in out.iterdir():
                path.unlink()
    assert in_epochs >= KILLS // 2
    run(line(data_dir, out, *resume_flag(out)))
    same(out, whole)


TRAIN = """
import sys
import pupilseg.cli.train_run, torch._dynamo  # otherwise each run imports them, in two seconds
from pipeline import train

def run(folder):
    resume = ["--resume" if (folder / STATE).exists() else "--overwrite"]
    sys.argv = ["train", *LINE, "--out", str(folder), *resume]
    train.main()
"""


def test_a_kill_before_each_change_to_a_file(tmp_path):
    """Covers every state in which a kill can leave the files."""
    shards = write_eyes(tmp_path / "data", train=2, validation=1)  # an epoch is one step
    words = line(shards, tmp_path, epochs=2)[3:]
    del words[words.index("--out") : words.index("--out") + 2]
    with Victim(f"STATE, LINE = {STATE!r}, {words}" + TRAIN) as victim:
        victim.run(tmp_path / "undisturbed")
        whole = []
        for folder in victim.each_kill(tmp_path):
            whole.append(whole_epochs(folder))
            victim.run(folder)
            same(folder, tmp_path / "undisturbed")
    assert list(dict.fromkeys(whole)) == [0, 1, 2], "the last change removes the lock"


def test_ctrl_c_ends_the_epoch_with_a_checkpoint(data_dir, undisturbed, tmp_path):
    out = tmp_path / "out"
    with Program(line(data_dir, out), ROOT) as program:
        program.wait_for("epoch   2/")
        program.send(signal.SIGINT)
        code, text = program.end()
    assert code == 130
    assert "finishing this epoch, then stopping" in text
    assert "Traceback" not in text
    stopped = whole_epochs(out)
    assert f"interrupted after epoch {stopped}; continue with --resume" in text
    assert text.count("\nepoch ") == stopped
    run(line(data_dir, out, "--resume"))
    same(out, undisturbed[0])


def test_a_second_ctrl_c_stops_immediately(data_dir, tmp_path):
    """The state of the last whole epoch exists."""
    out = tmp_path / "out"
    with Program(line(data_dir, out, epochs=500), ROOT) as program:
        program.wait_for("epoch   1/")
        program.send(signal.SIGINT)
        program.wait_for("finishing this epoch")
        program.send(signal.SIGINT)
        code, text = program.end()
    assert code == 130
    assert "Traceback" not in text
    assert whole_epochs(out) >= 1


def test_ctrl_c_before_the_first_epoch_ends(data_dir, tmp_path):
    """Ctrl-C is sent twice, because the first one finishes the epoch; there may be no state yet."""
    out = tmp_path / "out"
    with Program(line(data_dir, out), ROOT) as program:
        program.wait_for("configuration: ")
        program.send(signal.SIGINT)
        program.wait_for("finishing this epoch")
        program.send(signal.SIGINT)
        code, text = program.end()
    assert code == 130
    assert "Traceback" not in text
    done = subprocess.run(
        line(data_dir, out, "--resume"), cwd=ROOT, capture_output=True, text=True, check=False
    )
    if not (out / STATE).exists():
        assert done.returncode == 2
        assert "nothing to resume" in done.stderr


def test_a_moved_run_resumes_elsewhere_with_its_best_model(data_dir, undisturbed, tmp_path):
    """`--resume FILE --output-dir ELSEWHERE` writes the best model so far to the new folder."""
    first, second = tmp_path / "first", tmp_path / "second"
    with Program(line(data_dir, first), ROOT) as program:
        program.wait_for("epoch   5/")
        program.kill_all()
    os.rename(first, tmp_path / "archive")
    run(line(data_dir, second, "--resume", str(tmp_path / "archive" / STATE)))
    best = f"best_{MODEL}_model.pt"
    assert (second / best).read_bytes() == (undisturbed[0] / best).read_bytes()
    with (second / f"{MODEL}_history.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == EPOCHS
