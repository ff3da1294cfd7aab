"""Training commands: their directories, their flags, and packages that are not installed."""

import argparse
import os
import subprocess
import sys

import pytest

from pupilseg.cli import download, evaluate, export, materialize, train
from pupilseg.cli.main import PIPELINE
from pupilseg.errors import OutputError
from pupilseg.files import LOCK_NAME, directory_lock
from pupilseg.train import checkpoints
from tests.helpers.paths import ROOT
from tests.helpers.processes import run_here
from tests.helpers.training import write_eyes

MODEL = "efficientvit_tiny"
STATE = f"{MODEL}_training_state.pt"
BEST = f"best_{MODEL}_model.pt"
LAST = f"{MODEL}_model_epoch_1.pt"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_eyes(tmp_path_factory.mktemp("shards"), train=2, validation=1)


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory):
    """The output directory of a finished run of one epoch."""
    out = tmp_path_factory.mktemp("a run") / "its files"
    done = stage(shards, out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def out(finished, tmp_path):
    """A copy of the finished run's directory."""
    copy = tmp_path / "its files"
    copy.mkdir()
    for path in finished.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def stage(shards, out, *flags, model=MODEL):
    """Runs `pipeline.train` for one epoch of one step."""
    return run_here(
        "-m", "pipeline.train", "--model", model, "--shards", shards, "--out", out,
        "--epochs", "1", "--batch-size", "2", "--device", "cpu", "--no-mlflow", *flags,
    )  # fmt: skip


def package(shards, out, *flags):
    """Runs `pupilseg train` in the same way."""
    return run_here(
        "-m", "pupilseg.cli.main", "train", "--model", MODEL, "--shards", shards,
        "--output-dir", out, "--epochs", "1", "--batch-size", "2", "--device", "cpu",
        "--no-mlflow", *flags,
    )  # fmt: skip


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Directories


@pytest.mark.parametrize("flags", [(), ("--overwrite",), ("--resume",)])
def test_a_second_run_in_a_locked_directory_names_the_holder(shards, out, flags):
    before = content(out)
    with directory_lock(out):
        done = stage(shards, out, *flags)
    assert done.returncode == 1
    assert f"error: {out} is in use by pid {os.getpid()} on " in done.stderr
    assert content(out) == before


def test_a_run_holds_the_lock(shards, tmp_path, monkeypatch):
    held = []
    save = checkpoints.save_state

    def save_state(path, state):
        held.append((path.parent / LOCK_NAME).read_text())
        save(path, state)

    monkeypatch.setattr(checkpoints, "save_state", save_state)
    assert stage(shards, tmp_path / "out").returncode == 0
    assert held[0].startswith(f"pid {os.getpid()} on ")
    assert LOCK_NAME not in content(tmp_path / "out")


@pytest.mark.parametrize(("program", "flag"), [(stage, "--out"), (package, "--output-dir")])
def test_another_run_is_not_overwritten(shards, out, program, flag):
    before = content(out)
    done = program(shards, out)
    assert done.returncode == 2
    assert f"error: {out} holds another run of {MODEL} ({STATE})" in done.stderr
    assert f"--resume to continue that run, --overwrite to replace it, or another {flag}\n" in (
        done.stderr
    )
    assert content(out) == before


def test_a_run_without_a_state_can_only_be_overwritten(shards, out):
    (out / STATE).unlink()
    done = stage(shards, out)
    assert done.returncode == 2
    assert f"({BEST}), which ended too early to --resume; pass --overwrite to" in done.stderr
    done = stage(shards, out, "--resume")
    assert done.returncode == 2
    assert f"nothing to resume: {out / STATE} does not exist; run with --overwrite" in done.stderr
    assert stage(shards, out, "--overwrite").returncode == 0


def test_overwriting_removes_all_files_of_the_earlier_run(shards, out):
    (out / f"{MODEL}_model_epoch_90.pt").write_bytes(b"of a longer run")
    others = dict.fromkeys(("notes.txt", "best_ellipse_model.pt", f"{MODEL}.onnx"), b"kept")
    for name, text in others.items():
        (out / name).write_bytes(text)
    best = (out / BEST).read_bytes()
    done = stage(shards, out, "--overwrite", "--seed", "5")
    assert done.returncode == 0, done.stderr
    after = content(out)
    assert set(after) == {*others, STATE, BEST, LAST, f"{MODEL}_history.csv"}
    assert after[BEST] != best
    assert others.items() <= after.items()


def test_the_earlier_run_stays_until_there_is_an_epoch_to_replace_it(shards, out):
    before = content(out)
    done = stage(shards, out, "--overwrite", "--limit", "1")
    assert done.returncode == 2
    assert "0 training and 1 validation batches" in done.stderr
    assert content(out) == before


def test_overwriting_may_start_from_the_weights_that_it_replaces(shards, out):
    done = stage(shards, out, "--overwrite", "--init", out / BEST)
    assert done.returncode == 0, done.stderr


def test_networks_share_a_directory(shards, out):
    before = content(out)
    done = stage(shards, out, model="ellipse")
    assert done.returncode == 0, done.stderr
    after = content(out)
    assert before.items() <= after.items()
    assert "best_ellipse_model.pt" in after


def test_a_state_from_elsewhere_does_not_mix_with_another_run(shards, finished, out):
    before = content(out)
    done = stage(shards, out, "--resume", finished / STATE)
    assert done.returncode == 2
    assert f"{out} holds another run of {MODEL}" in done.stderr
    assert content(out) == before
    (out / LAST).write_bytes(b"of the other run")
    assert stage(shards, out, "--resume", finished / STATE, "--overwrite").returncode == 0
    assert LAST not in content(out)
    assert (out / BEST).read_bytes() == before[BEST]


def test_resume_and_overwrite_contradict_each_other(shards, out):
    done = stage(shards, out, "--resume", "--overwrite")
    assert done.returncode == 2
    assert "--resume continues the run that --overwrite removes" in done.stderr


def test_more_epochs_continue_and_another_rate_needs_a_new_run(shards, out):
    done = stage(shards, out, "--resume", "--epochs", "2")
    assert done.returncode == 0, done.stderr
    assert "resuming after epoch 1 with 2 epochs instead of 1" in done.stderr
    assert (out / f"{MODEL}_history.csv").read_text().count("\n") == 3
    done = stage(shards, out, "--resume", "--epochs", "2", "--lr", "0.5")
    assert done.returncode == 1
    assert "lr is " in done.stderr
    assert f"in another directory, from its weights: --init '{out / BEST}'\n" in done.stderr


def test_a_failed_run_leaves_no_empty_directory(shards, tmp_path):
    assert stage(tmp_path / "gone", tmp_path / "out").returncode == 1
    assert list(tmp_path.iterdir()) == []


def test_after_a_full_disk_the_flag_to_continue_is_named(shards, out, monkeypatch):
    def full(path, state):
        raise OutputError(f"cannot write {path}: the disk is full")

    monkeypatch.setattr(checkpoints, "save_state", full)
    done = stage(shards, out, "--resume", "--epochs", "2")
    assert done.returncode == 1
    assert done.stderr.endswith(
        "the disk is full; then add --resume to continue after the last saved epoch\n"
    )
    done = stage(shards, out.with_name("new"))
    assert done.stderr.endswith("the disk is full; then add --overwrite\n")


def test_a_data_directory_of_another_source_names_the_flag_of_the_program(tmp_path):
    data = tmp_path / "its eyes"
    done = run_here("-m", "pipeline.download", "--source", "synthetic:5@3", "--out", data / "raw")
    assert done.returncode == 0
    other = ("--source", "synthetic:6@3", "--out", data / "raw")
    record = data / "raw" / "source.json"
    remove = f"or remove the record of its contents: rm '{record}'\n"
    for flag, words in {
        "--out": ("-m", "pipeline.download", *other),
        "--data-dir": (
            *("training/train_ellipse_local.py", "--dataset", "synthetic:6@3"),
            *("--data-dir", data, "--output-dir", tmp_path / "out", "--device", "cpu"),
        ),
    }.items():
        done = run_here(*words)
        assert done.returncode == 1
        assert done.stderr.endswith(f"not synthetic:6@3; use another {flag}, {remove}")


# Flags


def options(command):
    parser = argparse.ArgumentParser()
    command.set_up(parser)
    return {option for action in parser._actions for option in action.option_strings}


def test_the_package_trains_on_shards_or_on_a_data_set(shards, tmp_path):
    added = {"--model", "--shards"}
    local = options(train.local_command(MODEL))
    assert options(train.COMMAND) == local | added
    assert {"--data-dir", "--dataset", "--output-dir", "--checkpoint-dir"} <= local
    assert options(train.STAGE) - options(train.COMMAND) == {"--out"}
    done = package(shards, tmp_path, "--dataset", "synthetic:5", "--data-dir", tmp_path / "data")
    assert done.returncode == 2
    assert f"--shards {shards} contains built shards; omit --data-dir and --dataset" in (
        done.stderr
    )


def test_the_package_prepares_trains_evaluates_and_exports(tmp_path):
    """Each command has the flags, output and files of its stage."""
    data, raw, out = tmp_path / "data", tmp_path / "raw", tmp_path / "out"
    model = out / BEST

    def pupilseg(*words):
        done = run_here("-m", "pupilseg.cli.main", *words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    printed = pupilseg("download", "--source", "synthetic:5@3", "--out", raw)
    assert printed.startswith("synthetic:5@3: 4 train, 1 validation")
    printed = pupilseg("materialize", "--raw", raw, "--out", data)
    assert printed.startswith("train: 4 samples, ")
    printed = pupilseg(
        *("train", "--model", MODEL, "--data-dir", tmp_path / "eyes", "--dataset", "synthetic:5@3"),
        *("--output-dir", out, "--epochs", "1", "--batch-size", "2", "--device", "cpu"),
        "--no-mlflow",
    )
    assert f"best: {model} (mIoU " in printed
    split = data / "validation"
    printed = pupilseg(
        "evaluate", "--model", model, "--shards", split, "--out", tmp_path / "report",
        "--device", "cpu",
    )  # fmt: skip
    assert printed.startswith(f"{MODEL} on 1 frames: pupil IoU ")
    printed = pupilseg("export", "--model", model, "--out", tmp_path / "eye.onnx")
    assert "differs from torch by at most" in printed


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("download", download.COMMAND),
        ("materialize", materialize.COMMAND),
        ("train", train.STAGE),
        ("evaluate", evaluate.COMMAND),
        ("export", export.COMMAND),
    ],
)
def test_a_stage_and_a_command_are_the_same(name, command):
    assert name in PIPELINE
    for words in (("-m", f"pipeline.{name}"), ("-m", "pupilseg.cli.main", name)):
        done = run_here(*words, "--help")
        assert done.returncode == 0
        for option in options(command) - {"--out"}:
            assert option in done.stdout


# Packages that are not installed

WITHOUT = """
import runpy, sys
for name in {missing}:
    sys.modules[name] = None
sys.argv = {words}
sys.path[0] = "."
if sys.argv[0] == "-m":
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
TRAIN = ("--model", MODEL, "--shards", "x")


@pytest.mark.parametrize(
    ("missing", "extras", "words"),
    [
        ("torch", "train", ("training/train_efficientvit_local.py", "--dataset", "synthetic:5")),
        ("pyarrow", "train", ("training/train_ellipse_local.py",)),
        ("torch", "train", ("-m", "pipeline.train", *TRAIN, "--out", "y")),
        ("torch", "train", ("-m", "pupilseg.cli.main", "train", *TRAIN)),
        ("pyarrow", "data", ("-m", "pipeline.download", "--source", "synthetic:5", "--out", "y")),
        ("pyarrow", "data", ("-m", "pupilseg.cli.main", "materialize", "--help")),
        (
            "pyarrow",
            "train,predict,pipeline",
            ("-m", "pipeline.evaluate", "--model", "m.pt", "--shards", "x", "--out", "y"),
        ),
    ],
    ids=str,
)
def test_a_missing_package_is_reported_with_its_extra(missing, extras, words):
    program = WITHOUT.format(missing=[missing], words=list(words))
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    command = f"pip install 'pupilseg[{extras}]'"
    assert done.stderr == f"error: this command needs {missing}; run: {command}\n"
