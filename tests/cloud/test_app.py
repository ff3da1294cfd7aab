"""The Modal app: its requests to Modal, its command line, and its checks of arguments."""

import argparse
import importlib.util
import re
import sys
from pathlib import Path

import modal
import pytest

from pupilseg.cli.train_flags import add_train_flags
from pupilseg.cloud import app as cloud
from pupilseg.cloud import client, jobs
from pupilseg.errors import UsageError
from pupilseg.tracking import TRACKERS
from tests.helpers.import_graph import imports, module_of
from tests.helpers.paths import ROOT

SCRIPTS = {
    "efficientvit": "training/train_efficientvit.py",
    "ellipse": "training/train_ellipse.py",
}
MATERIALIZE = "pipeline/materialize_modal.py"


@pytest.fixture
def load(monkeypatch):
    """Imports a script as `modal run SCRIPT FLAG...` does."""

    for name in (*TRACKERS["mlflow"].variables, *TRACKERS["mlflow"].credentials):
        monkeypatch.delenv(name, raising=False)

    def load(script, *flags):
        monkeypatch.setattr(sys, "argv", ["modal", "run", "--detach", script, *flags])
        spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.mark.parametrize("model", SCRIPTS)
def test_training_requests_a_gpu(load, model):
    script = load(SCRIPTS[model])
    assert isinstance(script.app, modal.App)
    info = script.train.info()
    assert info.gpus == [("L40S", 1), ("A100", 1), ("H100", 1)]
    assert {path: volume.name for path, volume in info.volumes.items()} == {
        "/data": "openeds-dataset-cache",
        "/checkpoints": "pupilseg-checkpoints",
    }
    assert 3600 <= info.timeout <= 24 * 3600
    assert info.max_retries == 3
    assert info.single_use_containers
    assert info.secrets == []


@pytest.mark.parametrize("script", [*SCRIPTS.values(), MATERIALIZE])
def test_data_are_prepared_without_a_gpu(load, script):
    functions = [f for f in vars(load(script)).values() if isinstance(f, modal.Function)]
    for function in functions:
        info = function.info()
        if "/checkpoints" in info.volumes:
            continue
        assert info.gpus == []
        assert [volume.name for volume in info.volumes.values()] == ["openeds-dataset-cache"]
        assert info.cpu == 8
        assert 3600 <= info.timeout <= 24 * 3600
        assert info.single_use_containers
    assert len(functions) == (3 if script == MATERIALIZE else 2)


@pytest.mark.parametrize(
    ("flags", "gpus"),
    [
        (["--gpu", "H100, T4"], [("H100", 1), ("T4", 1)]),
        (["--epochs", "3", "--gpu=A100:2"], [("A100", 2)]),
    ],
)
def test_flags_choose_gpus_and_secrets(load, flags, gpus):
    script = load(SCRIPTS["ellipse"], *flags, "--secret", "mlflow,huggingface")
    assert script.train.info().gpus == gpus
    for function in (script.train, script.prepare):
        named = [f"modal.Secret.from_name({name!r})" for name in ("mlflow", "huggingface")]
        assert function.info().secrets == named


SERVER = {
    "MLFLOW_TRACKING_URI": "https://mlflow.example.org",
    "MLFLOW_EXPERIMENT_ID": "1",
    "MLFLOW_TRACKING_USERNAME": "me",
    "MLFLOW_TRACKING_PASSWORD": "secret",
    "MLFLOW_TRACKING_TOKEN": "token",
}


def test_training_gets_the_mlflow_variables_of_the_shell(load, monkeypatch):
    """Named secrets come last, because Modal gives precedence to the last one."""
    made = []
    from_dict = modal.Secret.from_dict
    monkeypatch.setattr(modal.Secret, "from_dict", lambda d: made.append(d) or from_dict(d))
    for name, value in {**SERVER, "MLFLOW_TRACKING_TOKEN": "", "UNRELATED": "1"}.items():
        monkeypatch.setenv(name, value)
    script = load(SCRIPTS["ellipse"], "--secret", "huggingface")
    assert made == [{k: v for k, v in SERVER.items() if k != "MLFLOW_TRACKING_TOKEN"}]
    named = "modal.Secret.from_name('huggingface')"
    assert script.prepare.info().secrets == [named]
    first, second = script.train.info().secrets
    assert "MLFLOW_TRACKING_PASSWORD" in first
    assert second == named
    assert load(SCRIPTS["ellipse"], "--no-mlflow").train.info().secrets == []
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID")
    assert load(SCRIPTS["ellipse"]).train.info().secrets == []
    assert len(made) == 1


@pytest.mark.parametrize(
    ("variables", "secrets", "warning"),
    [
        ({}, [], "not tracked: set MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_ID in this shell"),
        ({}, ["mlflow"], None),
        (SERVER, [], None),
        ({**SERVER, "MLFLOW_TRACKING_URI": "http://localhost:5000"}, [], "cannot reach"),
    ],
)
def test_one_warning_about_tracking(capsys, variables, secrets, warning):
    client.warn_about_tracking(variables, secrets)
    warned = capsys.readouterr().err
    assert warned.count("warning: ") == (warning is not None)
    assert (warning or "") in warned


@pytest.mark.parametrize(
    ("uri", "local"),
    [
        ("http://127.0.0.1:5000", True),
        ("http://me:secret@LOCALHOST/mlflow", True),
        ("http://[::1]:5000", True),
        ("http://0.0.0.0:5000", True),
        ("http://app.localhost", True),
        ("file:///tmp/mlruns", True),
        ("mlruns", True),
        ("sqlite:///mlflow.db", True),
        ("https://mlflow.example.org", False),
        ("http://10.1.2.3:5000", False),  # a private network may reach Modal
        ("http://localhost.example.org", False),
        ("databricks", False),
        ("databricks://profile", False),
    ],
)
def test_addresses_that_a_container_cannot_reach(uri, local):
    assert client.is_on_this_machine(uri) == local


MODAL_FLAGS = {"--dataset", "--data-dir", "--output-dir", "--resume", "--gpu", "--secret"}
"""Flags of `modal run` that a local run does not have, or that mean something else there."""


def options(parser):
    return {option for action in parser._actions for option in action.option_strings}


def test_help_describes_each_flag(load, capsys):
    local = argparse.ArgumentParser()
    add_train_flags(local)
    training = (
        options(local) - {"--device", "--overwrite", "--processes", "--threads"}
    ) | MODAL_FLAGS
    materializing = {"--dataset", "--data-dir", "--rows-per-shard", "--secret"}
    scripts = {**dict.fromkeys(SCRIPTS.values(), training), MATERIALIZE: materializing}
    for script, flags in scripts.items():
        with pytest.raises(SystemExit) as ended:
            load(script, "--help")
        assert ended.value.code == 0
        text = capsys.readouterr().out
        assert f"usage: modal run {script}" in text
        assert set(re.findall(r"(?<=[ ,\[])--?[a-z][a-z0-9-]*", text)) >= flags


def test_training_flags_are_those_of_a_local_run():
    """Flags for Modal are used locally; all others are passed on unchanged."""
    words = ["--epochs=3", "--gpu", "T4", "--no-compile", "--lr", "0.01", "--augment-noise=0.1"]
    args, flags = client.parse_training("ellipse", [*words, "--limit", "5", "--seed=4"], "d", "c")
    assert flags == [
        *("--epochs=3", "--no-compile", "--lr", "0.01", "--augment-noise=0.1"),
        *("--limit", "5", "--seed=4"),
    ]
    assert (args.epochs, args.gpu, args.compile, args.lr) == (3, "T4", False, 0.01)
    assert (args.data_dir, args.output_dir, args.limit) == ("/", Path("checkpoints"), 5)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("modal run training/train_ellipse.py", []),
        ("modal run --detach training/train_ellipse.py::main --lr 1", ["--lr", "1"]),
        ("modal run -m training.train_ellipse --lr 1", ["--lr", "1"]),
        ("/usr/lib/modal/_container_entrypoint.py", []),
    ],
)
def test_words_that_follow_the_script(line, words):
    assert client.words_after("train_ellipse", line.split()) == words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", "three"], "argument --epochs: invalid int value: 'three'"),
        (["--epoch", "3"], "unrecognized arguments: --epoch 3"),
        (["--lr=-1"], "error: --lr -1: expected a positive number"),
    ],
)
def test_a_wrong_flag_ends_the_program_before_the_app_starts(load, capsys, words, message):
    for script in SCRIPTS.values():
        with pytest.raises(SystemExit) as ended:
            load(script, *words)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


def test_the_client_imports_modal_and_the_standard_library():
    seen, todo = set(), [ROOT / path for path in (*SCRIPTS.values(), MATERIALIZE)]
    while todo:
        path = todo.pop()
        seen.add(path)
        for name in imports(path, lazy=False):
            parts = name.split(".")
            if parts[0] != "pupilseg":
                assert parts[0] in {"modal", *sys.stdlib_module_names}, path
            files = (ROOT / Path(*parts, "__init__.py"), ROOT / Path(*parts).with_suffix(".py"))
            todo += [file for file in files if file.is_file() and file not in seen]
    assert {"pupilseg.cloud.app", "pupilseg.files"} <= {module_of(path) for path in seen}


def test_the_package_knows_where_params_are():
    assert (cloud.HOME / cloud.PARAMS).is_file()
    assert set(jobs.read_params(cloud.HOME / cloud.PARAMS)) == {
        *("download", "materialize", "train"),
    }


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: client.remote_dataset(str(ROOT), "v"), "modal volume put v data/shards"),
        (lambda: client.folder_prefix("../x"), "--data-dir ../x must be a folder"),
    ],
)
def test_paths_that_a_container_cannot_see_are_refused(call, message):
    with pytest.raises(UsageError, match=message):
        call()


def test_folders_of_a_volume():
    assert [client.folder_prefix(text) for text in ("/", "trial", "/a/b/")] == [
        *("", "/trial", "/a/b"),
    ]
