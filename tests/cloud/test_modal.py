"""Runs commands of the Modal client against a stand-in for Modal's servers."""

import hashlib
import re

import pytest

from pupilseg.cloud import app as cloud
from pupilseg.model_files.checkpoint import read_card
from pupilseg.prepare import write_splits
from pupilseg.sources import download
from tests.helpers.checkout import copy_checkout
from tests.helpers.checkpoints import model_file
from tests.helpers.modal_server.server import ModalServer
from tests.helpers.processes import Program
from tests.test_readme import commands, marked_blocks

SOURCE = "synthetic:12@1"
DATA, RUNS = "openeds-dataset-cache", "pupilseg-checkpoints"

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A clean clone."""
    return copy_checkout(tmp_path_factory.mktemp("clone"))


@pytest.fixture
def modal_server(tmp_path):
    with ModalServer(tmp_path / "modal", secrets={}) as server:
        yield server


def called(server):
    """Returns the functions called since the last time, and clears the list."""
    names = [call.function.name for call in server.calls]
    server.calls.clear()
    return names


def stamps(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def reported_epochs(text):
    """Returns the numbers of the epochs that a text has a line about."""
    return re.findall(r"^epoch +(\d)/\d ", text, flags=re.MULTILINE)


@pytest.mark.long
def test_commands_of_the_guide_run_in_order(clone, modal_server):
    # The guide uploads local shards: one batch of params.yaml, and more for validation.
    download("synthetic:20@1", clone / "data" / "raw")
    write_splits(clone / "data" / "raw", clone / "data" / "shards", workers=1, progress=False)
    blocks = [text for _, text in marked_blocks("tests/cloud/test_modal.py")]
    lines = [line for text in blocks for line in commands(f"```bash\n{text}```")]
    assert len(lines) == 7
    done = modal_server.run("bash", "-ec", "\n".join(lines), cwd=clone)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("best_ellipse_model.pt", "best_ellipse_model.onnx", "ellipse_model_epoch_1.pt"):
        assert (clone / "checkpoints" / name).is_file()
    for name in ("best_efficientvit_model.pt", "best_efficientvit_model.onnx"):
        assert (clone / "models" / "efficientvit" / name).is_file()
    assert (clone / "shards" / "train" / "manifest.json").is_file()
    assert called(modal_server) == [
        *("prepare_data", "train_network"),  # the volume is empty
        "train_network",  # on the uploaded shards
        *("fetch_source", "build_shards", "prepare_data"),
    ]
    check_image(modal_server.function("train_network"))


def check_image(function):
    """Asserts that a function's image has what the library needs, and its files."""
    steps = "\n".join(function.image)
    assert "apt-get install -y libgl1 libglib2.0-0" in steps
    assert " torch==" in steps
    assert {"torch", "opencv-python", "mlflow"} <= function.packages
    home = cloud.CONTAINER_HOME
    assert {f"{home}/params.yaml", f"{home}/pupilseg/cloud/app.py"} <= set(function.files)


def contents(folder):
    """Returns the bytes of the files of a split."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_many_containers_build_the_shards_of_the_local_stage(clone, tmp_path, modal_server):
    line = ("modal", "run", "pipeline/materialize_modal.py", "--data-dir", "large")
    done = modal_server.run(*line, "--dataset", SOURCE, cwd=clone)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 training and 2 validation frames" in done.stdout
    (build,) = (c for c in modal_server.calls if c.function.name == "build_shards")
    assert len(build.inputs) == 2
    check_image(build.function)
    assert called(modal_server) == ["fetch_source", "build_shards", "prepare_data"]
    done = modal_server.run("modal", "volume", "get", DATA, "/large/shards", ".", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr

    download(SOURCE, tmp_path / "raw")
    write_splits(tmp_path / "raw", tmp_path / "local", workers=1, progress=False)
    for split in ("train", "validation"):
        assert contents(tmp_path / "shards" / split) == contents(tmp_path / "local" / split)


def test_a_run_survives_its_container_and_can_be_fetched_again(clone, tmp_path, modal_server):
    run = ["modal", "run", "training/train_ellipse.py", "--dataset", SOURCE]
    run += ["--limit", "8", "--batch-size", "4", "--output-dir"]
    initial = model_file(tmp_path / "initial.pt", "ellipse")
    line = [*run, str(tmp_path / "first"), "--epochs", "2", "--init", str(initial)]
    modal_server.hide(clone)
    with Program(line, clone, modal_server.env) as program:
        program.wait_for("epoch   1/2")
        modal_server.kill_containers()
        code, text = program.end()
    assert code == 0, text
    assert reported_epochs(text) == ["1", "2"]
    assert len((tmp_path / "first" / "ellipse_history.csv").read_text().splitlines()) == 3
    attempts = [(c.function.name, c.inputs[0].attempts) for c in modal_server.calls]
    assert attempts == [("prepare_data", 1), ("train_network", 2)]

    # It starts from the weights of a local file, which are not part of its result.
    card = read_card(tmp_path / "first" / "best_ellipse_model.pt")
    assert card.init.endswith(hashlib.sha256(initial.read_bytes()).hexdigest())
    assert not list((tmp_path / "first").glob("initial*"))

    # A second run does not prepare data again, and its secret reaches the container.
    modal_server.calls.clear()
    before = stamps(modal_server.volume(DATA))
    values = ("MLFLOW_TRACKING_URI=http://127.0.0.1:9", "MLFLOW_EXPERIMENT_ID=1")
    done = modal_server.run("modal", "secret", "create", "mlflow", *values, cwd=clone)
    assert done.returncode == 0, done.stdout + done.stderr
    done = modal_server.run(*run, str(tmp_path / "second"), "--secret", "mlflow", cwd=clone)
    assert done.returncode == 2
    assert "error: MLflow at http://127.0.0.1:9 did not open a run" in done.stderr
    assert "Traceback" not in done.stderr
    assert called(modal_server) == ["train_network"]
    assert stamps(modal_server.volume(DATA)) == before

    # The result of the finished run can be downloaded again, without a container.
    runs = modal_server.volume(RUNS).iterdir()
    (name,) = (path.name for path in runs if (path / "result.json").exists())
    done = modal_server.run(*run, str(tmp_path / "again"), "--resume", name, cwd=clone)
    assert done.returncode == 0, done.stdout + done.stderr
    assert called(modal_server) == []
    again = (tmp_path / "again" / "best_ellipse_model.pt").read_bytes()
    assert again == (tmp_path / "first" / "best_ellipse_model.pt").read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--gpu", "Z9000"), "'Z9000' is not a known GPU type"),
        (("--secret", "nope"), "Secret 'nope' not found"),
        (("--resume", "nope"), "error: run nope does not exist; see: modal volume ls"),
    ],
)
def test_requests_that_modal_refuses(clone, modal_server, flags, message):
    done = modal_server.run("modal", "run", "training/train_efficientvit.py", *flags, cwd=clone)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert called(modal_server) == []
