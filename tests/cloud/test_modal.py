"""Rented GPUs: what is asked of Modal, what a container does, and every command of the README.

Jobs run here as they are, on folders. Whole commands run with the real client against a server on
this machine, where `modal_offline.py` is at hand.
"""

import argparse
import hashlib
import importlib.util
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import typing
from dataclasses import replace
from pathlib import Path

import modal
import pytest
import yaml

from pupilseg.cli.train import add_train_arguments
from pupilseg.cloud import app as cloud
from pupilseg.cloud import client as cloud_client
from pupilseg.cloud import jobs as cloud_jobs
from pupilseg.errors import DataError, UsageError
from pupilseg.model_files.checkpoint import read_card
from pupilseg.prepare import write_splits
from pupilseg.sources import download
from tests.helpers.checkout import copy_checkout
from tests.helpers.import_graph import imports, module_of
from tests.helpers.paths import ROOT
from tests.helpers.processes import Program
from tests.test_readme import marked_commands

OFFLINE = ROOT.parent / "shared" / "tools" / "modal_offline.py"
SCRIPTS = {
    "efficientvit": "training/train_efficientvit.py",
    "ellipse": "training/train_ellipse.py",
}
MATERIALIZE = "pipeline/materialize_modal.py"
SOURCE = "synthetic:12@1"
needs_offline = pytest.mark.skipif(not OFFLINE.exists(), reason=f"no {OFFLINE}")


@pytest.fixture
def load(monkeypatch):
    """Imports a script as `modal run SCRIPT FLAG...` does."""

    def load(script, *flags):
        monkeypatch.setattr(sys, "argv", ["modal", "run", "--detach", script, *flags])
        spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


# What is asked of Modal


@pytest.mark.parametrize("model", SCRIPTS)
def test_training_is_asked_for_on_a_gpu(load, model):
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


def flags_of(script):
    """Returns name -> (type, default) of an entrypoint's flags, as Modal reads them."""
    function = script.main.info.raw_f
    kinds = typing.get_type_hints(function)
    return {
        name: (kinds[name], parameter.default)
        for name, parameter in inspect.signature(function).parameters.items()
    }


def test_the_command_line_is_typed(load):
    expected = {
        **dict.fromkeys(("epochs", "batch_size", "seed", "limit"), (int | None, None)),
        **dict.fromkeys(("dataset", "init", "resume", "secret"), (str | None, None)),
        **dict.fromkeys(("augment", "compile"), (bool, True)),
        "lr": (float | None, None),
        "gpu": (str, "L40S,A100,H100"),
        "data_dir": (str, "/"),
        "output_dir": (str, "checkpoints"),
    }
    for script in SCRIPTS.values():
        assert flags_of(load(script)) == expected
    assert set(flags_of(load(MATERIALIZE))) == {"dataset", "data_dir", "rows_per_shard", "secret"}


def test_help_says_what_each_flag_means(load, capsys):
    for script in (*SCRIPTS.values(), MATERIALIZE):
        with pytest.raises(SystemExit) as ended:
            load(script, "--help")
        assert ended.value.code == 0
        told = capsys.readouterr().out
        assert f"usage: modal run {script}" in told
        for name in flags_of(load(script)):
            assert f"--{name.replace('_', '-')}" in told


def test_every_training_flag_is_one_of_a_local_run(load):
    parser = argparse.ArgumentParser()
    add_train_arguments(parser)
    local = {option for action in parser._actions for option in action.option_strings}
    for name, (kind, _) in flags_of(load(SCRIPTS["ellipse"])).items():
        flag = ("--no-" if kind is bool else "--") + name.replace("_", "-")
        if name not in ("gpu", "dataset", "data_dir", "output_dir", "secret"):
            assert flag in local


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
    assert set(cloud_jobs.read_params(cloud.HOME / cloud.PARAMS)) == {
        *("download", "materialize", "train"),
    }


# What a container does


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("volume")
    data = cloud_jobs.Data(folder, SOURCE, ROOT / "params.yaml", "remove it", workers=1)
    assert cloud_jobs.prepare(data, "ellipse", []) == {"rows": {"train": 10, "validation": 2}}
    return data


def stamps(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def epochs_told(text):
    """Returns the numbers of the epochs that a text has a line about."""
    return re.findall(r"^epoch +(\d)/\d ", text, flags=re.MULTILINE)


def test_a_stopped_training_goes_on_and_is_exported(data, tmp_path):
    run_dir, told = tmp_path / "run", []
    flags = ["--epochs=3", "--limit=8", "--batch-size=4"]

    def tell(line):
        told.append(line)
        if len(told) == 1:
            os.kill(os.getpid(), signal.SIGINT)  # as Modal does before it takes a container away

    before = stamps(data.folder)
    with pytest.raises(InterruptedError, match="the next attempt goes on"):
        cloud_jobs.train(data, "ellipse", flags, run_dir, tell)
    assert epochs_told("\n".join(told)) == ["1", "2"]
    told[:] = ["going on"]
    result = cloud_jobs.train(data, "ellipse", flags, run_dir, tell)
    assert epochs_told("\n".join(told)) == ["3"]
    assert stamps(data.folder) == before
    assert result["files"] == [
        *("best_ellipse_model.onnx", "best_ellipse_model.pt", "ellipse_history.csv"),
        *("ellipse_model_epoch_3.pt", "ellipse_training_state.pt"),
    ]
    assert result["parity"] < 1e-3
    assert (run_dir / "best_ellipse_model.onnx").stat().st_size == result["bytes"] < 300_000
    assert len((run_dir / "ellipse_history.csv").read_text().splitlines()) == 4
    before = stamps(run_dir)
    assert cloud_jobs.train(data, "ellipse", flags, run_dir, pytest.fail) == result
    assert stamps(run_dir) == before


def test_training_takes_what_is_left_out_from_params(tmp_path):
    params = tmp_path / "params.yaml"
    text = (ROOT / "params.yaml").read_text()
    params.write_text(text.replace("epochs: 15", "epochs: 7").replace("seed: 0", "seed: 5"))
    args = cloud_jobs.parse_flags(["--seed=9", "--no-compile"], params)
    batch_size = yaml.safe_load(text)["train"]["batch_size"]
    assert (args.epochs, args.seed, args.batch_size, args.no_compile) == (7, 9, batch_size, True)
    params.write_text(text.replace("epochs:", "epoch:"))
    with pytest.raises(UsageError, match="unrecognized arguments: --epoch=15"):
        cloud_jobs.parse_flags([], params)
    params.write_text("train: {}")
    with pytest.raises(DataError, match="has no group 'download'"):
        cloud_jobs.parse_flags([], params)


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--epochs=0"], "0 is less than 1"), (["--lr=-1"], "--lr -1"), (["--gpus=1"], "--gpus=1")],
)
def test_a_wrong_flag_is_an_answer_and_costs_nothing(tmp_path, flags, message):
    data = cloud_jobs.Data(tmp_path, SOURCE, ROOT / "params.yaml", "remove it", workers=1)
    answer = cloud_jobs.answered(lambda: cloud_jobs.prepare(data, "ellipse", flags))
    assert message in answer["error"]
    assert answer["exit_code"] == 2
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(cloud_client.PupilSegError, match=message) as caught:
        cloud_client.checked(answer)
    assert caught.value.exit_code == 2


def test_another_data_set_is_refused_with_the_way_out(data):
    for dataset in ("synthetic:12@2", "synthetic:13@1", None):
        other = replace(data, dataset=dataset)
        with pytest.raises(DataError, match=f"holds {SOURCE}, not .*; remove it"):
            cloud_jobs.find_shards(other)


def test_shards_that_were_put_there_are_used(data, tmp_path):
    """`pipeline.materialize` leaves no record beside them."""
    write_splits(data.raw, tmp_path / "shards", workers=1, progress=False)
    before = stamps(tmp_path)
    for dataset in (None, SOURCE):
        there = replace(data, folder=tmp_path, dataset=dataset)
        assert cloud_jobs.find_shards(there) == tmp_path / "shards"
    for dataset in ("synthetic:12", "synthetic:12@2", "someone/eyes"):
        with pytest.raises(DataError, match=f"holds {SOURCE}, not {dataset}; remove it"):
            cloud_jobs.find_shards(replace(data, folder=tmp_path, dataset=dataset))
    assert stamps(tmp_path) == before


def test_parts_are_the_bytes_of_the_local_stage(tmp_path):
    data = cloud_jobs.Data(
        tmp_path / "volume", SOURCE, ROOT / "params.yaml", "", workers=1, rows_per_shard=1
    )
    parts = cloud_jobs.fetch(data)["parts"]
    assert parts == [
        *(["train", 0, 4], ["train", 4, 8], ["train", 8, 10], ["validation", 0, 2]),
    ]
    for part in reversed(parts):
        assert cloud_jobs.write_shards_part(data, *part) == {"rows": part[2] - part[1]}
    made = {p: t for p, t in stamps(data.shards).items() if p.suffix == ".arrow"}
    cloud_jobs.prepare(data, "ellipse", [])
    assert {p: p.stat().st_mtime_ns for p in made} == made
    assert cloud_jobs.fetch(data) == {"parts": []}

    download(SOURCE, tmp_path / "raw")
    write_splits(tmp_path / "raw", tmp_path / "local", rows_per_shard=1, workers=1, progress=False)
    for split in ("train", "validation"):
        local = {p.name: p.read_bytes() for p in (tmp_path / "local" / split).iterdir()}
        assert {p.name: p.read_bytes() for p in (data.shards / split).iterdir()} == local
        assert len(local) > 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cloud_client.remote_dataset(str(ROOT), "v"), "modal volume put v data/shards"),
        (lambda: cloud_client.folder_prefix("../x"), "--data-dir ../x must be a folder"),
    ],
)
def test_what_a_container_cannot_see_is_refused_here(call, message):
    with pytest.raises(UsageError, match=message):
        call()


def test_folders_of_a_volume():
    assert [cloud_client.folder_prefix(text) for text in ("/", "trial", "/a/b/")] == [
        *("", "/trial", "/a/b"),
    ]


# Whole commands


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A clean clone with shards that were made in it: a batch of `params.yaml` and more."""
    clone = copy_checkout(tmp_path_factory.mktemp("clone"))
    download("synthetic:24@1", clone / "data" / "raw")
    write_splits(clone / "data" / "raw", clone / "data" / "shards", workers=1, progress=False)
    return clone


def offline(clone, summary, *words):
    """Returns the command line of modal_offline and the environment to run it in."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    line = [sys.executable, str(OFFLINE), "--strict", "--summary", str(summary), *words]
    return {"args": line, "cwd": clone, "env": env}


@pytest.mark.integration
@needs_offline
def test_readme_commands_run_in_order(clone, tmp_path):
    lines = [line for block in marked_commands("tests/cloud/test_modal.py") for line in block]
    assert len(lines) == 7
    done = subprocess.run(
        **offline(clone, tmp_path / "s.json", "--execute", "--", "bash", "-ec", "\n".join(lines)),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in ("best_ellipse_model.pt", "best_ellipse_model.onnx", "ellipse_model_epoch_1.pt"):
        assert (clone / "checkpoints" / name).is_file()
    for name in ("best_efficientvit_model.pt", "best_efficientvit_model.onnx"):
        assert (clone / "models" / "efficientvit" / name).is_file()
    assert (clone / "shards" / "train" / "manifest.json").is_file()
    summary = json.loads((tmp_path / "s.json").read_text())
    called = [call["function"] for call in summary["calls"]]
    assert called == [
        *("prepare_data", "train_network"),  # nothing in the volume
        "train_network",  # shards that were put there
        *("fetch_source", "build_shards", "prepare_data"),
    ]
    home = cloud.CONTAINER_HOME
    train = next(f for f in summary["functions"] if f["name"] == "train_network")
    steps = "\n".join(train["image"]["commands"])
    assert "apt-get install -y libgl1 libglib2.0-0" in steps
    assert " torch==" in steps
    assert {"torch", "opencv-python", "mlflow"} <= set(train["image"]["packages"])
    assert {f"{home}/params.yaml", f"{home}/pupilseg/cloud/app.py"} <= set(train["local_files"])
    assert all("pupilseg" in note for note in summary["notes"]), "a package that the image lacks"


@pytest.mark.integration
@needs_offline
def test_a_lost_container_is_followed_by_one_that_goes_on(clone, tmp_path):
    for name in ("data", "runs"):
        (tmp_path / name).mkdir()
    volumes = (
        *("--volume", f"openeds-dataset-cache={tmp_path / 'data'}"),
        *("--volume", f"pupilseg-checkpoints={tmp_path / 'runs'}"),
        *("--secret", "mlflow:MLFLOW_TRACKING_URI=http://127.0.0.1:9,MLFLOW_EXPERIMENT_ID=1"),
    )
    run = ("modal", "run", "training/train_ellipse.py", "--dataset", SOURCE, "--limit", "8")
    run += ("--batch-size", "4")
    summary = tmp_path / "s.json"
    words = ("--execute", *volumes, "--", *run, "--epochs", "2", "--output-dir", str(tmp_path))
    command = offline(clone, summary, *words)
    with Program(command["args"], command["cwd"], command["env"]) as program:
        program.wait_for("epoch   1/2")
        for pid in program.children():
            if b"--as-container" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
        code, text = program.end(300)
    assert code == 0, text
    assert epochs_told(text) == ["1", "2"]
    assert len((tmp_path / "ellipse_history.csv").read_text().splitlines()) == 3
    calls = json.loads(summary.read_text())["calls"]
    assert [(c["function"], c["details"][0]["attempts"]) for c in calls] == [
        *(("prepare_data", 1), ("train_network", 2)),
    ]

    # The second run: nothing is prepared, and the secret reaches the container.
    before = stamps(tmp_path / "data")
    done = subprocess.run(
        **offline(clone, summary, "--execute", *volumes, "--", *run, "--secret", "mlflow"),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "error: MLflow at http://127.0.0.1:9 did not open a run" in done.stderr
    assert "Traceback" not in done.stderr
    assert [c["function"] for c in json.loads(summary.read_text())["calls"]] == ["train_network"]
    assert stamps(tmp_path / "data") == before

    # What a finished run left can be brought again, without a container.
    (name,) = (
        path.name for path in (tmp_path / "runs").iterdir() if (path / "result.json").exists()
    )
    again = ("modal", "run", "training/train_ellipse.py", "--resume", name)
    done = subprocess.run(
        **offline(clone, summary, *volumes, "--", *again, "--output-dir", str(tmp_path / "again")),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(summary.read_text())["calls"] == []
    brought = (tmp_path / "again" / "best_ellipse_model.pt").read_bytes()
    assert brought == (tmp_path / "best_ellipse_model.pt").read_bytes()

    # A further run starts from its weights, which travel there.
    start = ("modal", "run", "training/train_ellipse.py", "--dataset", SOURCE, "--limit", "4")
    start += ("--batch-size", "4", "--epochs", "1", "--output-dir", str(tmp_path / "tuned"))
    start += ("--init", str(tmp_path / "best_ellipse_model.pt"))
    done = subprocess.run(
        **offline(clone, summary, "--execute", *volumes, "--", *start),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    card = read_card(tmp_path / "tuned" / "best_ellipse_model.pt")
    assert card["init"].endswith(hashlib.sha256(brought).hexdigest())
    assert not list((tmp_path / "tuned").glob("initial*"))


@pytest.mark.integration
@needs_offline
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--gpu", "Z9000"), "'Z9000' is not a known GPU type"),
        (("--secret", "nope"), "Secret 'nope' not found"),
        (("--resume", "nope"), "error: there is no run nope; see: modal volume ls"),
    ],
)
def test_what_modal_does_not_have_is_told(clone, tmp_path, flags, message):
    run = ("modal", "run", "training/train_efficientvit.py", *flags)
    done = subprocess.run(
        **offline(clone, tmp_path / "s.json", "--", *run),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
