"""One test per scenario of docs/specification.md, in its order and named after it.

Programs run as in the specification, with stand-ins for what is outside of this machine: a local
Hub, Modal's servers, Colab's runtime; the MLflow server is a real one. Scenarios about CUDA check
on the CPU what can be checked there, and each has a test marked `gpu` beside it.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from pupilseg.cli.train_flags import add_train_flags, config_from
from pupilseg.errors import UsageError
from pupilseg.export.onnx import MAX_BYTES
from pupilseg.geometry import HEIGHT, WIDTH
from pupilseg.loader import cuda_stream, make_loader
from pupilseg.loader.feeds import FeedOptions
from pupilseg.maps import distance_maps, spatial_weights
from pupilseg.model_files.card import ModelCard
from pupilseg.model_files.checkpoint import load_model, plain_state_dict, read_card, save_model
from pupilseg.models import (
    EllipseRegressionNet,
    TinyEfficientViTMicro,
    TinyEfficientViTSeg,
    create_model,
    list_models,
    model_entry,
)
from pupilseg.notebook import colab
from pupilseg.predict.predictor import Predictor
from pupilseg.runtime.compilation import compile_network
from pupilseg.runtime.device import on_device
from pupilseg.shards import open_shards
from pupilseg.train import checkpoints, loop
from pupilseg.train.config import TrainConfig
from pupilseg.train.metrics import EpochMetrics, mean_iou, predicted_mask
from pupilseg.train.state import TrainState, autocast_dtype
from tests.helpers.checkout import copy_checkout
from tests.helpers.hub_server import HubServer
from tests.helpers.mlflow_server import START_SECONDS
from tests.helpers.modal_server.server import ModalServer
from tests.helpers.notebooks import code_cells, executed, pictures, read, results_of, text
from tests.helpers.paths import ROOT
from tests.helpers.processes import Program
from tests.helpers.shared import once
from tests.helpers.source_data import hub_files, table, write
from tests.helpers.training import CPU, Loaders, train_with

CUDA = torch.device("cuda")
COMMIT = "c" * 40
REPOSITORY = "Conner/sddec25-01"
FRAMES = {"train": 2, "validation": 1}
"""Numbers of frames of `hub_files`."""
FONTS = matplotlib.get_cachedir()
FULL_SIZE = (1, HEIGHT, WIDTH)

integration = pytest.mark.integration
gpu = pytest.mark.gpu


# Programs, each run once


def environment(**variables):
    """Returns this process's environment without settings of the Hub and MLflow."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "MLFLOW_"))}
    return {
        **kept,
        "PATH": f"{os.path.dirname(sys.executable)}{os.pathsep}{kept['PATH']}",
        "OMP_NUM_THREADS": "1",
        "MPLCONFIGDIR": FONTS,
        "no_proxy": "*",
        **variables,
    }


def hub_variables(hub, home):
    return {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}


def mlflow_variables(uri, experiment):
    return {
        "MLFLOW_TRACKING_URI": uri,
        "MLFLOW_EXPERIMENT_ID": experiment,
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(START_SECONDS),
    }


def run(line, cwd, env):
    """Runs a command line; returns its output."""
    done = subprocess.run(
        line.split(), cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return {"stdout": done.stdout, "stderr": done.stderr}


def tracked_run(server, experiment):
    """Returns the data of the only run of an experiment on an MLflow server."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=server.uri)
    (found,) = client.search_runs([experiment])
    run_id, data = found.info.run_id, found.data
    top = client.list_artifacts(run_id)
    below = [client.list_artifacts(run_id, item.path) for item in top if item.is_dir]
    histories = {name: client.get_metric_history(run_id, name) for name in data.metrics}
    return {
        "status": found.info.status,
        "tags": {k: v for k, v in data.tags.items() if not k.startswith("mlflow.")},
        "params": data.params,
        "steps": {name: [point.step for point in found] for name, found in histories.items()},
        "artifacts": sorted(item.path for items in (top, *below) for item in items),
    }


def new_experiment(server, name):
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=server.uri).create_experiment(name)


def make_local(server, folder):
    """Runs two local scripts without options in a new home; the second finds the first's cache.

    Writes output, MLflow run, number of requests to the Hub and new files of each.
    """
    home, work = folder / "home", folder / "work"
    home.mkdir()
    work.mkdir()
    (work / "training").symlink_to(ROOT / "training")
    files = hub_files(folder / "repository", nested=True, own_targets=True)
    results = {}
    with HubServer(REPOSITORY, {COMMIT: files}, {"main": COMMIT}) as hub:
        for model in ("efficientvit", "efficientvit_tiny"):
            experiment = new_experiment(server, f"local {model}")
            env = environment(
                HOME=str(home),
                **hub_variables(hub, folder / "hf"),
                **mlflow_variables(server.uri, experiment),
            )
            before = set(folder.rglob("*"))
            results[model] = run(f"python training/train_{model}_local.py", work, env)
            results[model] |= {
                "mlflow": tracked_run(server, experiment),
                "requests": len(hub.requests),
                "new": [str(p.relative_to(folder)) for p in {*folder.rglob("*")} - before],
            }
            hub.requests.clear()
    (folder / "results.json").write_text(json.dumps(results))


def make_chosen_flags(folder):
    """Runs a script with two options and without MLflow, killed after its first epoch."""
    for split, count in {"train": 64, "validation": 2}.items():
        columns = table(range(count), nested=False, maps=False)
        write(folder / "source" / split / "0.parquet", columns)
    (folder / "training").symlink_to(ROOT / "training")
    line = "python training/train_efficientvit_local.py --epochs 10 --batch-size 64"
    words = [*line.split(), "--data-dir", "data", "--dataset", "source"]
    with Program(words, folder, environment()) as program:
        program.wait_for("epoch   1/10")
        program.kill_all()
        _, output = program.end()
    (folder / "output.txt").write_text(output)


def make_modal_run(server, folder):
    """Runs both training scripts of Modal, with data from the Hub and MLflow in the shell.

    Writes the data volume's folder, and output and MLflow run of each network.
    """
    clone = folder / "clone"
    clone.mkdir()
    copy_checkout(clone)
    files = hub_files(folder / "repository", nested=True, own_targets=True)
    results = {}
    with HubServer(REPOSITORY, {COMMIT: files}, {"main": COMMIT}) as hub:
        # A container's home is empty: it gets matplotlib's list of fonts, which takes seconds.
        shutil.copytree(FONTS, folder / "fonts")
        variables = hub_variables(hub, folder / "hf") | {"MPLCONFIGDIR": str(folder / "fonts")}
        with ModalServer(folder / "modal", secrets={"hub": variables}) as modal:
            modal.hide(clone)
            for model, epochs in {"efficientvit": 2, "ellipse": 11}.items():
                experiment = new_experiment(server, f"modal {model}")
                env = {**environment(), **modal.env}
                env |= mlflow_variables(server.uri, experiment)
                line = f"modal run training/train_{model}.py --secret hub"
                line += f" --epochs {epochs} --batch-size 2"
                results[model] = run(line, clone, env)
                results[model]["mlflow"] = tracked_run(server, experiment)
            results["volume"] = str(modal.volume("openeds-dataset-cache"))
    (folder / "results.json").write_text(json.dumps(results))


@pytest.fixture(scope="session")
def programs(request, tmp_path_factory, server, in_colab):
    """Runs the programs that the selected tests need, two at a time.

    Returns a function: name -> folder of the results, when they are complete.
    """
    makers = {  # the longest first
        "modal_run": partial(make_modal_run, server),
        "local": partial(make_local, server),
        "chosen_flags": make_chosen_flags,
    }
    needed = {name for item in request.session.items for name in item.fixturenames}
    with ThreadPoolExecutor(2) as pool:
        futures = {}
        for name in [name for name in makers if name in needed]:
            futures[name] = pool.submit(once, tmp_path_factory, name, makers[name])
        for model in ("efficientvit", "ellipse") if "notebook" in needed else ():
            futures[model] = pool.submit(in_colab, model)
        yield lambda name: futures[name].result()


@pytest.fixture(scope="session")
def local(programs):
    """Returns the folder and the results of `make_local`."""
    folder = programs("local")
    return folder, json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="session")
def chosen_flags(programs):
    """Returns the folder and the output of `make_chosen_flags`."""
    folder = programs("chosen_flags")
    return folder, (folder / "output.txt").read_text()


@pytest.fixture(scope="session")
def modal_run(programs):
    """Returns the clone and the results of `make_modal_run`."""
    folder = programs("modal_run")
    return folder / "clone", json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="session")
def notebook(programs):
    """Returns a function: network -> folder of the run of its notebook, its cells by title."""

    def notebook(model):
        folder = programs(model)
        return folder, code_cells(executed(folder))

    return notebook


def check_shards(shards, repository):
    """Asserts that shards hold a repository's own images, maps and ellipses, decoded exactly."""
    for split, count in FRAMES.items():
        with open_shards(shards / split) as opened:
            assert opened.manifest["source"] == f"{REPOSITORY}@{COMMIT}"
            assert opened.manifest["preprocessing"] == "gamma0.8+clahe1.5"  # that of the source
            (path,) = (repository / "data").glob(f"{split}-*.parquet")
            stored = pq.read_table(path)
            assert len(opened) == count
            for row in range(len(opened)):
                sample = opened.sample(row)
                for name in ("image", "label", "spatial_weights", "dist_map"):
                    values = flat(stored[name], row)
                    np.testing.assert_array_equal(sample[name].ravel(), values, err_msg=name)
                ellipse = [stored[name][row].as_py() for name in ("cx", "cy", "rx", "ry")]
                np.testing.assert_array_equal(sample["ellipse"], np.float32(ellipse))
                # Other values than those that this library computes from the label.
                assert (sample["spatial_weights"] != spatial_weights(sample["label"])).any()
                assert (sample["dist_map"] != distance_maps(sample["label"])).any()


def flat(column, row):
    """Returns the numbers of a nested list."""
    scalar = column[row]
    if isinstance(scalar, pa.ExtensionScalar):  # once `datasets` was imported in this process
        scalar = scalar.value
    values = scalar.values
    while pa.types.is_nested(values.type):
        values = values.flatten()
    return values.to_numpy()


def parameters(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def check_forward(model):
    for frames in (1, 2):
        with torch.no_grad():
            output = model.eval()(torch.zeros(frames, *FULL_SIZE))
        assert output.shape == (frames, 2, HEIGHT, WIDTH)


def check_onnx(path):
    """Asserts that an ONNX file finds a pupil, or none, without torch, and is small."""
    assert path.stat().st_size < MAX_BYTES == 300_000
    found = Predictor(path)(np.full((HEIGHT, WIDTH), 128, np.uint8))
    assert found.mask.shape == (HEIGHT, WIDTH)


def check_checkpoint(path):
    """Asserts that a file is a plain, contiguous state_dict that torch opens by itself."""
    weights = torch.load(path, weights_only=True)
    assert all(type(value) is torch.Tensor for value in weights.values())
    assert all(value.is_contiguous() for value in weights.values())
    assert weights.keys() == load_model(path).state_dict().keys()
    assert not any("_orig_mod" in name for name in weights)
    return weights


def shapes(weights):
    return {name: tuple(value.shape) for name, value in weights.items()}


# Requirement: EfficientViT Training Script


@integration
def test_efficientvit_training_script__training_script_execution(modal_run):
    clone, results = modal_run
    found = results["efficientvit"]
    assert "best: checkpoints/best_efficientvit_model.pt (mIoU " in found["stdout"]
    assert found["mlflow"]["status"] == "FINISHED"
    assert found["mlflow"]["params"]["data"] == f"{REPOSITORY}@{COMMIT}"
    assert found["mlflow"]["steps"]["valid_loss"] == [1, 2]
    assert "best_efficientvit_model.onnx" in found["mlflow"]["artifacts"]
    # The server of this test is on this machine, which Modal's containers could not reach.
    assert found["stderr"].count("warning: ") == found["stderr"].count("cannot reach") == 1
    check_onnx(clone / "checkpoints" / "best_efficientvit_model.onnx")


def test_efficientvit_training_script__model_parameter_constraint():
    assert 0 < parameters(TinyEfficientViTSeg()) < 60_000


@integration
def test_efficientvit_training_script__dataset_loading(modal_run):
    """The images, weights and maps of the repository are used as they are."""
    clone, results = modal_run
    data = (clone.parent / results["volume"], clone.parent / "repository")
    check_shards(data[0] / "shards", data[1])
    card = read_card(clone / "checkpoints" / "best_efficientvit_model.pt")
    assert (card.data, card.preprocessing) == (f"{REPOSITORY}@{COMMIT}", "gamma0.8+clahe1.5")


# Requirement: TinyEfficientViT Model Architecture


def test_tinyefficientvit_model_architecture__model_configuration():
    defaults = TinyEfficientViTSeg.defaults
    assert defaults.embed_dim == (8, 16, 24)
    assert defaults.depth == (1, 1, 1)
    assert defaults.num_heads == (1, 1, 2)
    model = TinyEfficientViTSeg()
    features = model.eval().encoder(torch.zeros(1, *FULL_SIZE))
    assert tuple(level.shape[1] for level in features) == defaults.embed_dim
    assert tuple(len(stage) for stage in model.encoder.stages) == defaults.depth


def test_tinyefficientvit_model_architecture__forward_pass():
    check_forward(TinyEfficientViTSeg())


# Requirement: Segmentation Decoder


def test_segmentation_decoder__decoder_with_skip_connections():
    """Each scale reaches each part of the full-size output."""
    torch.manual_seed(0)
    model = TinyEfficientViTSeg().eval()
    with torch.no_grad():
        features = model.encoder(torch.rand(1, *FULL_SIZE))
        assert [level.shape[2:] for level in features] == [(100, 160), (50, 80), (25, 40)]
        output = model.head(model.decoder(features))
        assert output.shape == (1, 2, HEIGHT, WIDTH)
        for name, level in features._asdict().items():
            changed = model.head(model.decoder(features._replace(**{name: level + 1})))
            assert (changed != output).float().mean() > 0.9, name


# Requirement: MLflow Integration

TERMS = ("loss", "iou", "ce_loss", "dice_loss", "surface_loss")


@integration
def test_mlflow_integration__metric_logging(modal_run, local):
    for found, epochs in ((modal_run[1]["efficientvit"], 2), (local[1]["efficientvit"], 15)):
        for name in (f"{split}_{term}" for split in ("train", "valid") for term in TERMS):
            assert found["mlflow"]["steps"][name] == list(range(1, epochs + 1)), name
        assert found["mlflow"]["params"]["epochs"] == str(epochs)
        assert "checkpoints/best_efficientvit_model.pt" in found["mlflow"]["artifacts"]


@integration
def test_mlflow_integration__model_tagging(modal_run):
    tags = modal_run[1]["efficientvit"]["mlflow"]["tags"]
    assert tags == {"model_type": "TinyEfficientViT", "architecture": "TinyEfficientViTSeg"}
    assert "ShallowNet" not in tags["architecture"]


# Requirement: Ellipse Model PyTorch Checkpoint Export


@integration
def test_ellipse_model_pytorch_checkpoint_export__pytorch_checkpoint_export(modal_run):
    clone, _results = modal_run
    best = clone / "checkpoints" / "best_ellipse_model.pt"
    weights = check_checkpoint(best)
    assert shapes(weights) == shapes(EllipseRegressionNet().state_dict())
    history = (clone / "checkpoints" / "ellipse_history.csv").read_text().splitlines()
    column = history[0].split(",").index("valid_iou")
    ious = [float(line.split(",")[column]) for line in history[1:]]
    assert read_card(best).metrics["valid_iou"] == max(ious)
    # For fine-tuning: the file is a valid start of another run.
    assert load_model(best).card.model == "ellipse"


@integration
def test_ellipse_model_pytorch_checkpoint_export__epoch_checkpoints(modal_run):
    """11 epochs: the tenth, and the last one."""
    clone, results = modal_run
    names = {path.name for path in (clone / "checkpoints").glob("ellipse_model_epoch_*.pt")}
    assert names == {"ellipse_model_epoch_10.pt", "ellipse_model_epoch_11.pt"}
    uploaded = {f"checkpoints/{name}" for name in (*names, "best_ellipse_model.pt")}
    artifacts = set(results["ellipse"]["mlflow"]["artifacts"])
    assert {name for name in artifacts if name.endswith(".pt")} == uploaded
    for name in names:
        check_checkpoint(clone / "checkpoints" / name)


def test_ellipse_model_pytorch_checkpoint_export__compiled_model_handling(tmp_path):
    model = EllipseRegressionNet()
    wrapped = torch.compile(model)
    assert all(name.startswith("_orig_mod.") for name in wrapped.state_dict())
    path = tmp_path / "best_ellipse_model.pt"
    save_model(path, plain_state_dict(wrapped), ModelCard(model="ellipse"))
    for name, value in check_checkpoint(path).items():
        assert torch.equal(value, model.state_dict()[name])


# Requirement: Ellipse Regression Colab Notebook


def check_executed(cells):
    """Asserts that all cells of a notebook ran, without an error."""
    for title, cell in cells.items():
        assert cell.execution_count is not None, title
        assert not [out for out in cell.outputs if out.output_type == "error"], title


@integration
def test_ellipse_regression_colab_notebook__notebook_execution_in_colab(notebook):
    folder, cells = notebook("ellipse")
    assert read("ellipse", "training").metadata.accelerator == "GPU"
    check_executed(cells)
    assert re.search(r"^best: epoch \d, mIoU ", text(cells["Train"]), re.MULTILINE)
    check_onnx(results_of(folder, "ellipse") / "best_ellipse_model.onnx")


@integration
def test_ellipse_regression_colab_notebook__dataset_loading_from_huggingface(notebook):
    folder, cells = notebook("ellipse")
    assert f'DATASET = "{REPOSITORY}"' in code_cells(read("ellipse", "training"))["Settings"].source
    data = folder / "content" / "pupilseg_run" / "data" / REPOSITORY.replace("/", "--")
    for split, count in FRAMES.items():
        with open_shards(data / "shards" / split) as shards:
            assert shards.manifest["source"].startswith(f"{REPOSITORY}@")
            assert len(shards) == count
            (path,) = (folder / "repository" / "data").glob(f"{split}-*.parquet")
            stored = pq.read_table(path, columns=["cx", "cy", "rx", "ry"])
            ellipses = np.stack([column.to_numpy() for column in stored.columns], axis=1)
            np.testing.assert_array_equal(shards["ellipse"], ellipses)
        if split == "train":
            shown = " ".join(f"{value:.4f}" for value in ellipses[0])
            assert shown in re.sub(" +", " ", text(cells["Download and show"]))


@integration
def test_ellipse_regression_colab_notebook__model_architecture_consistency(notebook, modal_run):
    check_same_network(notebook, modal_run, "ellipse")
    model = create_model("ellipse").eval()
    assert isinstance(model, EllipseRegressionNet)
    with torch.no_grad():
        assert model(torch.zeros(2, *FULL_SIZE)).shape == (2, 4)
    _, cells = notebook("ellipse")
    assert "-> output (2, 4)" in text(cells["Parameters and output shape"])


def check_same_network(notebook, modal_run, model):
    """Asserts that a notebook and the script of Modal train the same network."""
    folder, _ = notebook(model)
    clone, _ = modal_run
    paths = [results_of(folder, model), clone / "checkpoints"]
    cards = [read_card(path / f"best_{model}_model.pt") for path in paths]
    assert cards[0].model == cards[1].model == model
    assert cards[0].architecture == cards[1].architecture
    weights = [check_checkpoint(path / f"best_{model}_model.pt") for path in paths]
    assert shapes(weights[0]) == shapes(weights[1])
    return weights[0]


@integration
def test_ellipse_regression_colab_notebook__training_visualization(notebook):
    check_visualization(notebook, "ellipse", ("loss", "center_loss", "radius_loss"))
    _, cells = notebook("ellipse")
    printed = text(cells["Curves, predictions, scores"])
    assert re.search(r"^center error +\d+\.\d+ px mean|^center error +no pupil", printed, re.M)
    assert re.search(r"^radius error +\d+\.\d+ px mean|^radius error +no pupil", printed, re.M)


def check_visualization(notebook, model, terms):
    """Asserts that a notebook shows the curves of loss terms, predictions, and the mIoU."""
    folder, cells = notebook(model)
    cell = cells["Curves, predictions, scores"]
    header = results_of(folder, model).joinpath(f"{model}_history.csv").read_text().split("\n")[0]
    assert {f"train_{term}" for term in terms} <= set(header.split(","))
    curves, predictions = pictures(cell)
    plots = sum(name.startswith("train_") and name.endswith("loss") for name in header.split(","))
    assert curves.shape[1] == pytest.approx(462 * plots, abs=2)  # 4.2 in per term, 110 dpi
    assert len(np.unique(curves)) > 50
    assert len(np.unique(predictions)) > 50
    metrics = json.loads((results_of(folder, model) / "evaluation/metrics.json").read_text())
    assert re.search(rf"^mIoU +{metrics['miou']:.4f}$", text(cell), re.MULTILINE)
    return metrics


# Requirement: Colab Runtime Configuration


def test_colab_runtime_configuration__gpu_availability_check(monkeypatch, capsys):
    card = SimpleNamespace(name="Tesla T4", total_memory=15 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: card)
    assert colab.choose_device(allow_cpu=False) == CUDA
    assert "GPU: Tesla T4, 15.0 GiB" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="no GPU"):
        colab.choose_device(allow_cpu=False)
    for model in ("efficientvit", "ellipse"):
        assert "choose_device(" in code_cells(read(model, "training"))["GPU"].source


@gpu
def test_colab_runtime_configuration__gpu_availability_check_on_a_gpu(capsys):
    assert colab.choose_device(allow_cpu=False) == CUDA
    assert f"GPU: {torch.cuda.get_device_name(0)}, " in capsys.readouterr().out


SPECIFIED = (
    "torch, torchvision, opencv-python, datasets, pillow, scikit-learn, tqdm, matplotlib, onnx"
)


@integration
def test_colab_runtime_configuration__dependency_installation(notebook, monkeypatch, capsys):
    """The cell ran; and in a runtime without any of the packages, pip is asked for all."""
    _, cells = notebook("ellipse")
    assert cells["Packages"].execution_count is not None
    assert [name for name in colab.REQUIRED if find_spec(name) is None] == []
    lines = []

    def install(line, **_):
        lines.append(line)
        return subprocess.CompletedProcess(line, 0, stdout="")

    monkeypatch.setattr(colab, "find_spec", lambda _name: None)
    monkeypatch.setattr(colab.subprocess, "run", install)
    colab.install_missing()
    asked = {re.split("[=<>]", word)[0] for line in lines for word in line}
    assert set(SPECIFIED.split(", ")) <= asked
    assert all(line[1:4] == ["-m", "pip", "install"] for line in lines)


# Requirement: Model Export from Colab


@integration
def test_model_export_from_colab__onnx_export(notebook):
    folder, cells = notebook("ellipse")
    path = results_of(folder, "ellipse") / "best_ellipse_model.onnx"
    check_onnx(path)
    shown = f"best_ellipse_model.onnx: {path.stat().st_size:,} bytes"
    assert shown in text(cells["Export to ONNX"])


@integration
def test_model_export_from_colab__model_download(notebook):
    folder, _ = notebook("ellipse")
    check_onnx(folder / "downloads" / "best_ellipse_model.onnx")


# Requirement: EfficientViT Segmentation Colab Notebook


@integration
def test_efficientvit_segmentation_colab_notebook__notebook_execution_in_colab(notebook):
    folder, cells = notebook("efficientvit")
    assert read("efficientvit", "training").metadata.accelerator == "GPU"
    check_executed(cells)
    check_checkpoint(results_of(folder, "efficientvit") / "best_efficientvit_model.pt")


@integration
def test_efficientvit_segmentation_colab_notebook__dataset_loading_from_huggingface(notebook):
    folder, cells = notebook("efficientvit")
    repository = "Conner/openeds-precomputed"
    settings = code_cells(read("efficientvit", "training"))["Settings"].source
    assert f'DATASET = "{repository}"' in settings
    data = folder / "content" / "pupilseg_run" / "data" / repository.replace("/", "--")
    for split, count in FRAMES.items():
        with open_shards(data / "shards" / split) as shards:
            assert shards.manifest["source"].startswith(f"{repository}@")
            assert len(shards) == count
        assert f"{split}: {count} frames" in text(cells["Download and show"])


@integration
def test_efficientvit_segmentation_colab_notebook__model_architecture_consistency(
    notebook, modal_run
):
    weights = check_same_network(notebook, modal_run, "efficientvit")
    assert shapes(weights) == shapes(TinyEfficientViTSeg().state_dict())
    assert parameters(TinyEfficientViTSeg()) < 60_000
    _, cells = notebook("efficientvit")
    shown = "input (2, 1, 400, 640) -> output (2, 2, 400, 640)"
    assert shown in text(cells["Parameters and output shape"])


@integration
def test_efficientvit_segmentation_colab_notebook__training_visualization(notebook):
    terms = ("loss", "ce_loss", "dice_loss", "surface_loss")
    metrics = check_visualization(notebook, "efficientvit", terms)
    _, cells = notebook("efficientvit")
    printed = text(cells["Curves, predictions, scores"])
    for name in ("background", "pupil"):
        iou = metrics[f"{name}_iou"]
        assert re.search(rf"^IoU of {name} +{iou:.4f}$", printed, re.MULTILINE)


# Requirement: EfficientViT Model Export


@integration
def test_efficientvit_model_export__pytorch_checkpoint_save(notebook):
    folder, cells = notebook("efficientvit")
    path = results_of(folder, "efficientvit") / "best_efficientvit_model.pt"
    check_checkpoint(path)
    shown = f"best_efficientvit_model.pt: {path.stat().st_size:,} bytes"
    assert shown in text(cells["Export to ONNX"])


@integration
def test_efficientvit_model_export__onnx_export(notebook):
    folder, _ = notebook("efficientvit")
    check_onnx(results_of(folder, "efficientvit") / "best_efficientvit_model.onnx")


@integration
def test_efficientvit_model_export__model_download(notebook):
    folder, _ = notebook("efficientvit")
    check_checkpoint(folder / "downloads" / "best_efficientvit_model.pt")
    check_onnx(folder / "downloads" / "best_efficientvit_model.onnx")


# Requirement: Ultra-Tiny EfficientViT Training Script


@integration
def test_ultra_tiny_efficientvit_training_script__training_script_execution(local):
    folder, results = local
    found = results["efficientvit_tiny"]
    assert found["mlflow"]["status"] == "FINISHED"
    assert found["mlflow"]["steps"]["valid_iou"] == list(range(1, 16))
    best = folder / "work" / "checkpoints" / "best_efficientvit_tiny_model.pt"
    assert "best: checkpoints/best_efficientvit_tiny_model.pt (mIoU " in found["stdout"]
    assert parameters(load_model(best)) < 10_000


@integration
def test_ultra_tiny_efficientvit_training_script__distinct_checkpoint_filenames(local):
    """Both networks were trained into the same directory."""
    _, results = local
    written = {
        model: {name.rpartition("/")[2] for name in found["new"] if name.endswith(".pt")}
        for model, found in results.items()
    }
    assert written["efficientvit_tiny"] == {
        "best_efficientvit_tiny_model.pt",
        "efficientvit_tiny_model_epoch_10.pt",
        "efficientvit_tiny_model_epoch_15.pt",
        "efficientvit_tiny_training_state.pt",
    }
    names = [
        {
            entry.best_file,
            entry.state_file,
            entry.history_file,
            *(entry.epoch_file(epoch, 0.5) for epoch in (1, 10)),
        }
        for entry in map(model_entry, list_models())
    ]
    assert len(set.union(*names)) == sum(map(len, names))


def test_ultra_tiny_efficientvit_training_script__model_parameter_constraint():
    assert 0 < parameters(TinyEfficientViTMicro()) < 10_000


# Requirement: TinyEfficientViT-Micro Model Architecture


def test_tinyefficientvit_micro_model_architecture__model_configuration():
    defaults = TinyEfficientViTMicro.defaults
    assert defaults.embed_dim == (8, 12, 18)
    assert defaults.decoder_dim == 8
    assert defaults.num_heads == (1, 1, 1)
    model = TinyEfficientViTMicro().eval()
    features = model.encoder(torch.zeros(1, *FULL_SIZE))
    assert tuple(level.shape[1] for level in features) == (8, 12, 18)
    assert model.decoder(features).shape[1] == 8


def test_tinyefficientvit_micro_model_architecture__forward_pass():
    check_forward(TinyEfficientViTMicro())


# Requirement: GPU Training Optimizations


class ReachedError(Exception):
    """Ends a training at the place that a test is about."""


@pytest.fixture(scope="module")
def loaders(tmp_path_factory):
    made = Loaders(tmp_path_factory.mktemp("eyes"), train=4, validation=2)
    yield made
    made.close()


MICRO = TrainConfig(model="efficientvit_tiny", epochs=3, batch_size=2)


def reach(monkeypatch, name, action):
    """Trains as on a GPU until a function of the loop is called; `action` is called in its place.

    A GPU's work cannot begin here, so `action` ends the training.
    """
    state = TrainState(MICRO, CPU, 6)
    state.device = CUDA

    def end(*_):
        action()
        raise ReachedError

    monkeypatch.setattr(loop, name, end)
    with pytest.raises(ReachedError):
        loop.fit(state, [None], [None], None)


def kernels(model):
    """Returns the weights with the four dimensions of a convolution's."""
    return [weight for weight in model.parameters() if weight.ndim == 4]


def test_gpu_training_optimizations__memory_format_optimization(monkeypatch):
    state = TrainState(MICRO, CPU, 6)
    found = kernels(state.model)
    assert found
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in found)
    assert state.memory_format is torch.channels_last
    reach(monkeypatch, "compile_model", lambda: None)  # called on a GPU, before the first step
    modes = []
    monkeypatch.setattr(nn.Module, "compile", lambda _self, mode: modes.append(mode))
    image = torch.zeros(1, *FULL_SIZE)
    compile_network(state.model, image, torch.sum, state.autocast)
    assert modes == ["max-autotune"]


@gpu
def test_gpu_training_optimizations__memory_format_optimization_on_a_gpu(
    loaders, tmp_path, monkeypatch
):
    seen = []
    step = loop.train_step
    monkeypatch.setattr(loop, "train_step", lambda state, *a: (seen.append(state), step(state, *a)))
    train_with(MICRO, loaders(device=CUDA), tmp_path, device=CUDA)
    model = seen[0].model
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in kernels(model))
    assert model._compiled_call_impl is not None


def test_gpu_training_optimizations__mixed_precision_training(loaders, monkeypatch):
    """float16 scales its gradients; bfloat16, which GPUs that have it use, needs no scaling."""
    for native, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda native=native, **_: native)
        assert autocast_dtype(TrainConfig(), CUDA) == dtype
    check_mixed_precision(TrainConfig(model="efficientvit_tiny", amp_dtype="float16"), loaders, CPU)


@gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gpu_training_optimizations__mixed_precision_training_on_a_gpu(loaders, dtype):
    check_mixed_precision(TrainConfig(model="efficientvit_tiny", amp_dtype=dtype), loaders, CUDA)


def check_mixed_precision(config, loaders, device):
    """Asserts that a step computes in a config's type and that float16 is scaled."""
    state = TrainState(config, device, 4)
    dtypes, scaled = set(), []
    for module in state.model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _m, _inputs, output: dtypes.add(output.dtype))
    scale = state.scaler.scale
    state.scaler.scale = lambda loss: scaled.append(loss) or scale(loss)
    training, validation = loaders(device=device)
    loop.train_step(state, next(iter(training)), state.alphas[0])
    assert dtypes == {getattr(torch, config.amp_dtype)}
    assert len(scaled) == 1
    assert state.scaler.is_enabled() == (config.amp_dtype == "float16")
    assert (state.scaler.get_scale() > 1) == (config.amp_dtype == "float16")
    for loader in (training, validation):
        loader.close()


def check_fast_arithmetic():
    assert torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "high"
    assert torch.backends.cuda.matmul.allow_tf32


def test_gpu_training_optimizations__cuda_optimizations(monkeypatch):
    monkeypatch.setattr(loop, "compile_model", lambda *_: None)
    reach(monkeypatch, "train_epoch", check_fast_arithmetic)


@gpu
def test_gpu_training_optimizations__cuda_optimizations_on_a_gpu(loaders, tmp_path, monkeypatch):
    checked = []
    step = loop.train_step
    monkeypatch.setattr(
        loop, "train_step", lambda *a: (checked.append(check_fast_arithmetic()), step(*a))
    )
    train_with(MICRO, loaders(device=CUDA), tmp_path, device=CUDA)
    assert checked


def test_gpu_training_optimizations__gpu_metrics_accumulation(loaders, tmp_path, monkeypatch):
    """On a GPU, the micro network's metrics stay there until the last epoch."""
    assert MICRO.resolved(CUDA).defer_metrics
    # Tensors of the device `meta` have no values: an operation that needs one, or a copy to another
    # device, is an error.
    device = torch.device("meta")
    metrics = EpochMetrics(("loss", "ce_loss"), device)
    logits = torch.empty(2, 2, HEIGHT, WIDTH, device=device)
    losses = {name: logits.mean() for name in ("loss", "ce_loss")}
    label = torch.empty(2, HEIGHT, WIDTH, dtype=torch.uint8, device=device)
    sums = metrics.sums
    for _ in range(2):
        metrics.update(losses, predicted_mask(logits), label, torch.empty(2, 4, device=device))
    assert metrics.sums is sums
    assert sums.device == mean_iou(metrics.names, sums).device == device
    with pytest.raises(RuntimeError, match="meta"):
        sums.sum().item()
    check_deferred(loaders(), tmp_path, CPU, monkeypatch)


@gpu
def test_gpu_training_optimizations__gpu_metrics_accumulation_on_a_gpu(
    loaders, tmp_path, monkeypatch
):
    """PyTorch itself raises an error where the host waits for the device."""
    check_deferred(loaders(device=CUDA), tmp_path, CUDA, monkeypatch)


def check_deferred(pair, out, device, monkeypatch):
    """Trains four epochs; asserts one copy to the host, after the last, and no allocation."""
    events, buffers = [], set()
    copy, validate = checkpoints.HostCopy, loop.validate

    def note_copy(tree):
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        events.append("copy")
        return copy(tree)

    def note_epoch(state, loader):
        validate(state, loader)
        buffers.add((state.rows.data_ptr(), state.metrics.sums.data_ptr()))
        assert state.rows.shape[:2] == (4, 2)
        events.append("epoch")
        if device.type == "cuda" and len(events) == 2:
            torch.cuda.set_sync_debug_mode("error")  # the first epochs choose and record kernels

    monkeypatch.setattr(checkpoints, "HostCopy", note_copy)
    monkeypatch.setattr(loop, "validate", note_epoch)
    config = TrainConfig(model="efficientvit_tiny", epochs=4, batch_size=2, defer_metrics=True)
    try:
        report = partial(events.append)
        result = train_with(config, pair, out, device=device, on_epoch=report)
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert events[:5] == ["epoch", "epoch", "epoch", "epoch", "copy"]
    assert [row["epoch"] for row in events[5:]] == [1, 2, 3, 4]
    assert len(result.history) == 4
    assert len(buffers) == 1


class Stream:
    """Stands for a CUDA stream or event."""

    def __init__(self, *_, **__):
        pass

    def wait_stream(self, _):
        pass

    wait_event = record = wait_stream

    def synchronize(self):
        pass


def test_gpu_training_optimizations__efficient_data_loading(loaders, monkeypatch):
    """The feed of a GPU, with stand-ins for its streams, on the CPU."""
    pinned, copies = [], []
    empty, copy = torch.empty, torch.Tensor.copy_

    def allocate(*size, pin_memory=False, **options):
        tensor = empty(*size, **options)
        if pin_memory:
            pinned.append(tensor.data_ptr())
        return tensor

    def note(tensor, source, non_blocking=False):
        if source.data_ptr() in pinned:
            copies.append(non_blocking)
        return copy(tensor, source, non_blocking)

    for name in ("Stream", "Event"):
        monkeypatch.setattr(torch.cuda, name, Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    monkeypatch.setattr(torch, "empty", allocate)
    monkeypatch.setattr(torch.Tensor, "copy_", note)
    shards = loaders.shards["train"]
    columns = ("image", "label", "spatial_weights", "dist_map", "ellipse")
    options = FeedOptions(columns, 4, 2, torch.uint8, CPU, 2, 1, False)
    feed = cuda_stream.StreamFeed(shards, options)
    batches = list(feed.batches([np.array([0, 1]), np.array([2, 3])]))
    feed.close()
    assert pinned
    assert len(copies) == 2 * len(pinned) / cuda_stream._SLOTS
    assert all(copies)
    for batch, rows in zip(batches, ([0, 1], [2, 3]), strict=True):
        images = np.stack([shards.sample(row)["image"] for row in rows])
        np.testing.assert_array_equal((batch["image"] * 0.5 + 0.5).mul(255).round()[:, 0], images)


@gpu
def test_gpu_training_optimizations__efficient_data_loading_on_a_gpu(loaders, monkeypatch):
    """Pinned memory, and no wait while a batch is drawn."""
    assert on_device(torch.zeros(4), CUDA).is_cuda
    with make_loader(loaders.shards["train"], batch_size=2, device="cuda", mode="stream") as loader:
        slots = loader._feed._pinned
        assert all(tensor.is_pinned() for slot in slots for tensor in slot.values())
        list(loader)
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert len(list(loader)) == 2
        finally:
            torch.cuda.set_sync_debug_mode("default")


# Requirement: MLflow Tagging for Micro Variant


@integration
def test_mlflow_tagging_for_micro_variant__model_tagging(local):
    tags = {model: found["mlflow"]["tags"] for model, found in local[1].items()}
    assert tags["efficientvit_tiny"] == {
        "model_type": "TinyEfficientViT-Micro",
        "architecture": "TinyEfficientViTMicro",
    }
    assert tags["efficientvit"]["model_type"] == "TinyEfficientViT"


# Requirement: Local EfficientViT Training Script


@integration
def test_local_efficientvit_training_script__local_training_script_execution(local):
    folder, results = local
    stderr = results["efficientvit"]["stderr"]
    assert re.search(r"^training on Conner/sddec25-01@c+: 2 frames, .* on cpu$", stderr, re.M)
    new = results["efficientvit"]["new"]
    assert "home/.cache/openeds/shards/train/manifest.json" in new
    assert "work/checkpoints/best_efficientvit_model.pt" in new
    check_checkpoint(folder / "work" / "checkpoints" / "best_efficientvit_model.pt")
    places = ("home/.cache", "work/checkpoints", "hf")
    assert [name for name in new if not name.startswith(places)] == []


def defaults_of(model):
    """Returns the configuration of a script without options, as JSON stores it."""
    parser = argparse.ArgumentParser()
    add_train_flags(parser)
    return json.loads(json.dumps(asdict(config_from(parser.parse_args([]), model))))


@integration
def test_local_efficientvit_training_script__cli_argument_configuration(chosen_flags):
    folder, output = chosen_flags
    (line,) = re.findall(r"^configuration: (.*)$", output, re.MULTILINE)
    config = json.loads(line)
    assert (config["epochs"], config["batch_size"]) == (10, 64)
    assert "on cpu" in output
    card = read_card(folder / "checkpoints" / "best_efficientvit_model.pt")
    assert card.config == config
    given = TrainConfig(model="efficientvit", epochs=10, batch_size=64).resolved(CPU, 64)
    assert config["lr"] == given.lr  # follows from the batch size
    default = defaults_of("efficientvit")
    changed = {name for name, value in default.items() if config[name] != value}
    assert changed == {"epochs", "batch_size", "lr", "defer_metrics"}  # None before it is resolved


@integration
@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_local_efficientvit_training_script__device_selection(tmp_path, local):
    done = subprocess.run(
        [sys.executable, "training/train_efficientvit_local.py", "--device", "cuda"],
        cwd=ROOT,
        env=environment(HOME=str(tmp_path)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    (error,) = done.stderr.splitlines()
    assert error.startswith("error: device 'cuda' is not available: this machine has 0 CUDA")
    assert "pass --device cpu" in error
    assert not list(tmp_path.iterdir())  # before any download


@gpu
def test_local_efficientvit_training_script__device_selection_on_a_gpu(tmp_path):
    line = "python training/train_efficientvit_local.py --device cuda --epochs 1 --batch-size 2"
    line += f" --dataset synthetic:6@1 --data-dir {tmp_path}/data --output-dir {tmp_path}/out"
    found = run(line, ROOT, environment())
    assert re.search(r"^training on .* on cuda$", found["stderr"], re.MULTILINE)


@integration
def test_local_efficientvit_training_script__mlflow_credentials_via_environment(
    local, chosen_flags
):
    _, results = local
    assert results["efficientvit"]["mlflow"]["status"] == "FINISHED"
    assert results["efficientvit"]["mlflow"]["steps"]["train_loss"] == list(range(1, 16))
    assert "not tracked" not in results["efficientvit"]["stderr"]
    _, output = chosen_flags
    warning = "not tracked: set MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_ID to track this run"
    assert output.count(warning) == 1
    assert output.index(warning) < output.index("epoch   1/10")  # training continued


@integration
def test_local_efficientvit_training_script__local_dataset_caching(local):
    folder, results = local
    cache = folder / "home" / ".cache" / "openeds"
    assert results["efficientvit"]["requests"] > 0
    check_shards(cache / "shards", folder / "repository")
    downloaded = {path.name for path in (cache / "raw" / "hub" / COMMIT).rglob("*.parquet")}
    assert downloaded == {"train-0.parquet", "validation-0.parquet"}
    assert not [name for name in results["efficientvit"]["new"] if re.match("hf/.*parquet", name)]
    assert results["efficientvit_tiny"]["requests"] == 0
    assert not [name for name in results["efficientvit_tiny"]["new"] if "openeds/" in name]


@integration
def test_local_efficientvit_training_script__model_checkpoint_output(local):
    """One checkpoint per improvement, with epoch and mIoU in its name."""
    folder, _results = local
    out = folder / "work" / "checkpoints"
    history = (out / "efficientvit_history.csv").read_text().splitlines()
    column = history[0].split(",").index("valid_iou")
    best, expected = -1.0, []
    for epoch, line in enumerate(history[1:], 1):
        iou = float(line.split(",")[column])
        if iou > best:
            best = iou
            expected.append(f"efficientvit_epoch{epoch}_miou{iou:.4f}.pt")
    assert sorted(path.name for path in out.glob("efficientvit_epoch*.pt")) == sorted(expected)
    weights = check_checkpoint(out / expected[-1])
    for name, value in check_checkpoint(out / "best_efficientvit_model.pt").items():
        assert torch.equal(value, weights[name])


# The specification itself


def slug(words):
    return re.sub(r"[^a-z0-9]+", "_", words.lower()).strip("_")


def test_there_is_one_test_per_scenario():
    """In the order of the specification; tests on a GPU stand beside them."""
    page = (ROOT / "docs" / "specification.md").read_text(encoding="utf-8")
    requirement, expected = "", []
    for kind, title in re.findall(r"^#+ (Requirement|Scenario): (.*)$", page, re.MULTILINE):
        if kind == "Requirement":
            requirement = slug(title)
        else:
            expected.append(f"test_{requirement}__{slug(title)}")
    assert len(expected) == 43
    source = (ROOT / "tests" / "test_specification.py").read_text(encoding="utf-8")
    defined = re.findall(r"^def (test_\w+__\w+)\(", source, re.MULTILINE)
    assert [name for name in defined if not name.endswith("_on_a_gpu")] == expected


def test_the_specification_is_a_copy():
    original = ROOT.parent / "shared" / "specification.md"
    if not original.exists():
        pytest.skip("the original is not on this machine")
    assert (ROOT / "docs" / "specification.md").read_bytes() == original.read_bytes()
