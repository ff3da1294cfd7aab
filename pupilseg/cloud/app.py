"""Modal apps: hardware, images, volumes, and the functions that run in containers.

This is the only module that imports modal. It is imported on the local machine, where only modal
may be installed, and in the container, where modal finds its functions by name. It therefore
imports only the standard library, modal, and light modules of pupilseg. `cloud.jobs`, which needs
more packages, is imported inside the functions.

Volume openeds-dataset-cache  data directories: shards/ and raw/, with the download
Volume pupilseg-checkpoints   one folder per run, with the files of a local run and result.json
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import modal

from pupilseg.cloud import client
from pupilseg.tracking import enabling_variables

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from pupilseg.cloud.jobs import Data

PYTHON = "3.11"
SYSTEM_LIBRARIES = ("libgl1", "libglib2.0-0")
"""Libraries that OpenCV's wheel needs and the slim image lacks."""
PACKAGES = (
    "filelock", "numpy", "opencv-python", "pyarrow", "tqdm", "PyYAML",
    "torch", "safetensors", "huggingface_hub", "mlflow", "matplotlib",
    "onnx", "onnxscript", "onnxruntime",
)  # fmt: skip
"""Packages in the image, with the versions in constraints.txt."""
HOME = Path(__file__).resolve().parents[2]
"""The checkout; /root in a container, where Modal places the source."""
CONTAINER_HOME = "/root"
PARAMS = "params.yaml"
CONSTRAINTS = "constraints.txt"
DATA_VOLUME = "openeds-dataset-cache"
DATA = "/data"
"""Mount point of `DATA_VOLUME` in containers."""
CHECKPOINT_VOLUME = "pupilseg-checkpoints"
CHECKPOINTS = "/checkpoints"
"""Mount point of `CHECKPOINT_VOLUME` in containers."""
HOUR = 3600
COMMIT_SECONDS = 10
"""Minimum time between commits of the checkpoint volume. A lost container loses at most this much
training in addition to the current epoch."""
CPU_WORKERS = 8
"""CPU cores of a container that prepares data."""
GPU_WORKERS = 4
"""CPU cores of a container that trains."""
BUILDERS = 5
"""Maximum number of containers that build shards at the same time, to limit the cost per hour."""

data_volume = modal.Volume.from_name(DATA_VOLUME, create_if_missing=True)
checkpoint_volume = modal.Volume.from_name(CHECKPOINT_VOLUME, create_if_missing=True)


def make_image() -> modal.Image:
    """Returns the image, with pinned packages, the local source of pupilseg, and `params.yaml`."""
    lines = (HOME / CONSTRAINTS).read_text(encoding="utf-8").splitlines()
    versions = dict(line.split("==") for line in lines)
    constraints = f"{CONTAINER_HOME}/{CONSTRAINTS}"
    return (
        modal.Image.debian_slim(python_version=PYTHON)
        .apt_install(*SYSTEM_LIBRARIES)
        .add_local_file(HOME / CONSTRAINTS, constraints, copy=True)
        .uv_pip_install(
            *(f"{name}=={versions[name]}" for name in PACKAGES),
            extra_options=f"--constraint {constraints}",
        )
        .add_local_python_source("pupilseg")
        .add_local_file(HOME / PARAMS, f"{CONTAINER_HOME}/{PARAMS}")
    )


class TrainingApp(NamedTuple):
    """An app that trains one network. Scripts unpack it because modal looks for global names."""

    app: modal.App
    prepare: modal.Function[..., Any, Any]
    train: modal.Function[..., Any, Any]
    main: modal.app.LocalEntrypoint


class MaterializingApp(NamedTuple):
    """An app that builds shards in many containers."""

    app: modal.App
    fetch: modal.Function[..., Any, Any]
    build: modal.Function[..., Any, Any]
    prepare: modal.Function[..., Any, Any]
    main: modal.app.LocalEntrypoint


def training_app(model: str, argv: Sequence[str]) -> TrainingApp:
    """Returns the app that trains a network.

    Hardware and secrets must be known when the app is created, so the command line is parsed here,
    before modal calls the entrypoint. Invalid flags and `--help` therefore end the program here.

    Args:
        model: name in `pupilseg.models`.
        argv: the command line.
    """
    words = client.words_after(f"train_{model}", argv)
    with client.errors_reported():
        args, flags = client.parse_training(model, words, DATA_VOLUME, CHECKPOINT_VOLUME)
    tracking = enabling_variables() if args.mlflow else {}
    if not tracking and not args.secret:
        flags = [*flags, "--no-mlflow"]  # avoids a second warning from the container

    def main(*_words: str) -> None:
        with client.errors_reported():
            data = _remote_data(args)
            run = client.run_name(model, args.resume, checkpoint_volume, CHECKPOINT_VOLUME)
            result = client.result_of(checkpoint_volume, run)
            if result is None:
                if args.mlflow:
                    client.warn_about_tracking(tracking, args.secret)
                if args.init is not None:
                    initial = client.initial_file(model, args.init)
                    client.upload_initial(checkpoint_volume, run, initial)
                print(f"run {run} on {args.gpu}; to resume it: --resume {run}", flush=True)
                if not client.exists(data_volume, f"{data[1]}/shards/validation/manifest.json"):
                    client.checked(prepare.remote(model, flags, *data))
                result = client.checked(train.remote(model, run, flags, *data))
            paths = client.download_files(checkpoint_volume, run, result, args.output_dir)
            _print_result(result, paths)

    app = modal.App(f"pupilseg-{model.replace('_', '-')}", image=make_image(), include_source=False)
    secrets = _secrets(args.secret)
    # Modal applies secrets in order, so secrets named by the user override those of this shell.
    local = [modal.Secret.from_dict(dict(tracking))] if tracking else []
    prepare = app.function(secrets=secrets, **_ON_CPU)(prepare_data)
    train = app.function(
        gpu=client.names(args.gpu),
        cpu=GPU_WORKERS,
        memory=16 * 1024,
        volumes={DATA: data_volume, CHECKPOINTS: checkpoint_volume},
        secrets=[*local, *secrets],
        timeout=6 * HOUR,
        retries=modal.Retries(max_retries=3, initial_delay=1.0, backoff_coefficient=1.0),
        single_use_containers=True,
    )(train_network)
    return TrainingApp(app, prepare, train, _entrypoint(app, main))


def _entrypoint(app: modal.App, main: Callable[..., None]) -> modal.app.LocalEntrypoint:
    """Makes a local function the app's entrypoint; its `*words` let modal accept any flag.

    Modal rejects functions whose qualified name a container could not import. An entrypoint only
    runs on this machine, so its qualified name is replaced.
    """
    main.__qualname__ = main.__name__
    return app.local_entrypoint()(main)


def _remote_data(args: argparse.Namespace) -> tuple[str | None, str]:
    """Returns the requested data set and folder of the volume."""
    return client.remote_dataset(args.dataset, DATA_VOLUME), client.folder_prefix(args.data_dir)


def _print_result(result: dict[str, Any], paths: dict[str, Path]) -> None:
    metrics = result["metrics"]
    print("best epoch: " + "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    print(
        f"onnx: {paths[result['onnx']]} ({result['bytes'] / 1e3:.0f} KB, within "
        f"{result['parity']:.1e} of torch)"
    )
    print(f"best: {paths[result['best']]} (mIoU {metrics['valid_iou']:.4f})")


def materializing_app(argv: Sequence[str]) -> MaterializingApp:
    """Returns the app that builds the shards of a data set in many containers.

    Args:
        argv: the command line.
    """
    args = client.parse_materializing(client.words_after("materialize_modal", argv), DATA_VOLUME)

    def main(*_words: str) -> None:
        with client.errors_reported():
            data = (*_remote_data(args), args.rows_per_shard)
            parts = client.checked(fetch.remote(*data))["parts"]
            calls = [(*part, *data) for part in parts]
            for done, answer in enumerate(build.starmap(calls, order_outputs=False), 1):
                rows = client.checked(answer)["rows"]
                print(f"part {done} of {len(parts)}: {rows} frames", flush=True)
            rows = client.checked(prepare.remote("efficientvit", [], *data))["rows"]
            print(f"{rows['train']} training and {rows['validation']} validation frames")
            print(f"to download them: modal volume get {DATA_VOLUME} {data[1]}/shards FOLDER")

    app = modal.App("pupilseg-materialize", image=make_image(), include_source=False)
    secrets = _secrets(args.secret)
    fetch = app.function(secrets=secrets, **_ON_CPU)(fetch_source)
    build = app.function(secrets=secrets, **_ON_CPU, max_containers=BUILDERS)(build_shards)
    prepare = app.function(secrets=secrets, **_ON_CPU)(prepare_data)
    return MaterializingApp(app, fetch, build, prepare, _entrypoint(app, main))


_ON_CPU: dict[str, Any] = {
    "cpu": CPU_WORKERS,
    "memory": 16 * 1024,
    "volumes": {DATA: data_volume},
    "timeout": 12 * HOUR,
    "retries": 2,
    "single_use_containers": True,
}


def _secrets(names: list[str]) -> list[modal.Secret]:
    return [modal.Secret.from_name(name) for name in names]


def prepare_data(
    model: str,
    flags: list[str],
    dataset: str | None,
    folder: str,
    rows_per_shard: int | None = None,
) -> dict[str, Any]:
    """Checks the flags of a run, and builds its shards in the data volume if they are missing."""
    from pupilseg.cloud import jobs

    data = _data(dataset, folder, CPU_WORKERS, rows_per_shard)
    return _saved(lambda: jobs.prepare(data, model, flags))


def fetch_source(dataset: str | None, folder: str, rows_per_shard: int | None) -> dict[str, Any]:
    """Downloads a data set into the data volume and divides it into parts to build."""
    from pupilseg.cloud import jobs

    data = _data(dataset, folder, CPU_WORKERS, rows_per_shard)
    return _saved(lambda: jobs.fetch(data))


def build_shards(
    split: str, start: int, stop: int, dataset: str | None, folder: str, rows_per_shard: int | None
) -> dict[str, Any]:
    """Builds some shards of a downloaded data set in the data volume."""
    from pupilseg.cloud import jobs

    data = _data(dataset, folder, CPU_WORKERS, rows_per_shard)
    return _saved(lambda: jobs.write_shards_part(data, split, start, stop))


def train_network(
    model: str, run: str, flags: list[str], dataset: str | None, folder: str
) -> dict[str, Any]:
    """Trains and exports a network; a retry resumes the run after a lost container."""
    from pupilseg.cloud import jobs

    data = _data(dataset, folder, GPU_WORKERS)
    committed = time.monotonic()

    def print_line(line: str) -> None:
        nonlocal committed
        print(line, flush=True)
        if time.monotonic() - committed > COMMIT_SECONDS:
            checkpoint_volume.commit()
            committed = time.monotonic()

    try:
        run_dir = Path(CHECKPOINTS) / run
        return _saved(lambda: jobs.train(data, model, flags, run_dir, print_line))
    finally:
        checkpoint_volume.commit()


def _saved(job: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Runs a job on the current contents of the data volume, and commits its changes."""
    from pupilseg.cloud.jobs import as_answer

    data_volume.reload()
    try:
        return as_answer(job)
    finally:
        data_volume.commit()


def _data(
    dataset: str | None, folder: str, workers: int, rows_per_shard: int | None = None
) -> Data:
    """Returns the description of a job's data."""
    from pupilseg.cloud.jobs import Data

    remove = " && ".join(
        f"modal volume rm -r {DATA_VOLUME} {folder}/{name}" for name in ("shards", "raw")
    )
    hint = f"use another --data-dir, or remove the contents of the folder: {remove}"
    return Data(Path(DATA + folder), dataset, HOME / PARAMS, hint, workers, rows_per_shard)
