"""Rented GPUs: what Modal runs, on what, and the command line that starts it.

The one module that imports modal. It is imported twice: on a machine that has nothing but modal
installed, for the command line, and in the container, where modal looks its functions up by name.
So its own imports are the standard library and modal; what needs more is in `cloud_jobs`, imported
where it runs.

Volume openeds-dataset-cache  a data directory: shards/, raw/ and the Hub's cache; or one a folder
Volume pupilseg-checkpoints   a folder for each run, with the files of a local run and result.json
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import modal

from pupilseg.cloud.client import (
    bring,
    checked,
    errors_told,
    folder_prefix,
    initial_file,
    present,
    read_flags,
    remote_dataset,
    result_of,
    run_name,
    send_initial,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pupilseg.cloud.jobs import Data

PYTHON = "3.11"
SYSTEM_LIBRARIES = ("libgl1", "libglib2.0-0")
"""What the wheel of OpenCV links to and a slim image lacks."""
PACKAGES = (
    *("filelock", "numpy", "opencv-python", "pyarrow", "tqdm", "PyYAML"),
    *("torch", "safetensors", "huggingface_hub", "mlflow", "matplotlib"),
    *("onnx", "onnxscript", "onnxruntime"),
)
HOME = Path(__file__).resolve().parents[2]
"""The clone; in the container /root, where Modal puts source."""
CONTAINER_HOME = "/root"
PARAMS, CONSTRAINTS = "params.yaml", "constraints.txt"
DATA_VOLUME, DATA = "openeds-dataset-cache", "/data"
CHECKPOINT_VOLUME, CHECKPOINTS = "pupilseg-checkpoints", "/checkpoints"
GPUS = "L40S,A100,H100"
"""Tried in this order."""
HOUR = 3600
COMMIT_SECONDS = 10
"""A container that is lost costs at most this much of training, besides the epoch under way."""
CPU_WORKERS, GPU_WORKERS = 8, 4
BUILDERS = 5
"""Containers that make shards at once: a bound on what a run costs in an hour."""

_DATA_FLAGS = {
    "dataset": "owner/name[@revision] or synthetic:N[@seed] (default: shards that were put into "
    "the volume, else the source in params.yaml)",
    "data_dir": f"folder of the volume {DATA_VOLUME} that holds the data set",
    "secret": "names of Modal secrets, such as mlflow,huggingface (default: none)",
}
TRAIN_FLAGS = _DATA_FLAGS | {
    "epochs": "default: as in params.yaml",
    "batch_size": "default: as in params.yaml",
    "lr": "peak learning rate (default: as in params.yaml)",
    "seed": "default: as in params.yaml",
    "gpu": "kinds to try, in this order",
    "output_dir": "gets the checkpoints and the ONNX file",
    "resume": f"go on with a run of the volume {CHECKPOINT_VOLUME}, or bring its files",
    "init": "start from the weights of a model file of this machine, or: pretrained",
    "limit": "use the first N frames of each split",
    "augment": "change the frames at random (default: yes)",
    "compile": "torch.compile (default: yes)",
}
MATERIALIZE_FLAGS = _DATA_FLAGS | {"rows_per_shard": "default: as pipeline.materialize"}

data_volume = modal.Volume.from_name(DATA_VOLUME, create_if_missing=True)
checkpoint_volume = modal.Volume.from_name(CHECKPOINT_VOLUME, create_if_missing=True)


def make_image() -> modal.Image:
    """Returns what containers run: pinned packages, this library as it is here, `params.yaml`."""
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
        .env({"HF_HOME": f"{DATA}/huggingface"})
        .add_local_python_source("pupilseg")
        .add_local_file(HOME / PARAMS, f"{CONTAINER_HOME}/{PARAMS}")
    )


class TrainingApp(NamedTuple):
    """An app that trains one network; a script unpacks it, since modal looks for globals."""

    app: modal.App
    prepare: modal.Function[..., Any, Any]
    train: modal.Function[..., Any, Any]
    main: modal.app.LocalEntrypoint


class MaterializingApp(NamedTuple):
    """An app that makes shards in many containers."""

    app: modal.App
    fetch: modal.Function[..., Any, Any]
    build: modal.Function[..., Any, Any]
    prepare: modal.Function[..., Any, Any]
    main: modal.app.LocalEntrypoint


def training_app(model: str, argv: Sequence[str]) -> TrainingApp:
    """Returns the app that trains a network.

    Args:
        model: name in `pupilseg.models`.
        argv: the command line.
    """

    def main(
        *,
        epochs: int | None = None,
        batch_size: int | None = None,
        lr: float | None = None,
        seed: int | None = None,
        gpu: str = GPUS,
        dataset: str | None = None,
        data_dir: str = "/",
        output_dir: str = "checkpoints",
        resume: str | None = None,
        init: str | None = None,
        limit: int | None = None,
        augment: bool = True,
        compile: bool = True,
        secret: str | None = None,
    ) -> None:
        values = {"epochs": epochs, "batch-size": batch_size, "lr": lr, "seed": seed}
        values["limit"] = limit
        flags = [f"--{name}={value}" for name, value in values.items() if value is not None]
        flags += ["--no-augment"] * (not augment) + ["--no-compile"] * (not compile)
        with errors_told():
            data = (remote_dataset(dataset, DATA_VOLUME), folder_prefix(data_dir))
            run = run_name(model, resume, checkpoint_volume, CHECKPOINT_VOLUME)
            result = result_of(checkpoint_volume, run)
            if result is None:
                if init is not None:
                    send_initial(checkpoint_volume, run, initial_file(model, init))
                print(f"run {run} on {gpu}; to go on if it is cut off: --resume {run}", flush=True)
                if not present(data_volume, f"{data[1]}/shards/validation/manifest.json"):
                    checked(prepare.remote(model, flags, *data))
                result = checked(train.remote(model, run, flags, *data))
            _tell(result, bring(checkpoint_volume, run, result, Path(output_dir)))

    asked = read_flags(main, TRAIN_FLAGS, argv, f"training/train_{model}.py")
    secrets = _secrets(asked["secret"])
    app = modal.App(f"pupilseg-{model.replace('_', '-')}", image=make_image(), include_source=False)
    prepare = app.function(secrets=secrets, **_ON_CPU)(prepare_data)
    train = app.function(
        gpu=_names(asked["gpu"]),
        cpu=GPU_WORKERS,
        memory=16 * 1024,
        volumes={DATA: data_volume, CHECKPOINTS: checkpoint_volume},
        secrets=secrets,
        timeout=6 * HOUR,
        retries=modal.Retries(max_retries=3, initial_delay=1.0, backoff_coefficient=1.0),
        single_use_containers=True,
    )(train_network)
    return TrainingApp(app, prepare, train, _entrypoint(app, main))


def _entrypoint(app: modal.App, main: Callable[..., None]) -> modal.app.LocalEntrypoint:
    """Makes a function an app's command line.

    Modal takes no function that a container could not import, by its qualified name; but this one
    never leaves the machine that asks.
    """
    main.__qualname__ = main.__name__
    return app.local_entrypoint()(main)


def _tell(result: dict[str, Any], paths: dict[str, Path]) -> None:
    """Says what a run came to, and where its files are."""
    metrics = result["metrics"]
    print("best epoch: " + "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    print(
        f"onnx: {paths[result['onnx']]} ({result['bytes'] / 1e3:.0f} KB, within "
        f"{result['parity']:.1e} of torch)"
    )
    print(f"best: {paths[result['best']]} (mIoU {metrics['valid_iou']:.4f})")


def materializing_app(argv: Sequence[str]) -> MaterializingApp:
    """Returns the app that makes the shards of a source in many containers.

    Args:
        argv: the command line.
    """

    def main(
        *,
        dataset: str | None = None,
        data_dir: str = "/",
        rows_per_shard: int | None = None,
        secret: str | None = None,
    ) -> None:
        with errors_told():
            data = (remote_dataset(dataset, DATA_VOLUME), folder_prefix(data_dir), rows_per_shard)
            parts = checked(fetch.remote(*data))["parts"]
            calls = [(*part, *data) for part in parts]
            for done, answer in enumerate(build.starmap(calls, order_outputs=False), 1):
                print(f"part {done} of {len(parts)}: {checked(answer)['rows']} frames", flush=True)
            rows = checked(prepare.remote("efficientvit", [], *data))["rows"]
            print(f"{rows['train']} training and {rows['validation']} validation frames")
            print(f"bring them with: modal volume get {DATA_VOLUME} {data[1]}/shards FOLDER")

    asked = read_flags(main, MATERIALIZE_FLAGS, argv, "pipeline/materialize_modal.py")
    secrets = _secrets(asked["secret"])
    app = modal.App("pupilseg-materialize", image=make_image(), include_source=False)
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


def _names(text: str | None) -> list[str]:
    """Returns names that are separated by commas."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _secrets(text: str | None) -> list[modal.Secret]:
    return [modal.Secret.from_name(name) for name in _names(text)]


def prepare_data(
    model: str,
    flags: list[str],
    dataset: str | None,
    folder: str,
    rows_per_shard: int | None = None,
) -> dict[str, Any]:
    """Makes the shards in the data volume, unless they are there; checks a run's flags before."""
    from pupilseg.cloud import jobs as cloud_jobs

    data = _data(dataset, folder, CPU_WORKERS, rows_per_shard)
    return _saved(lambda: cloud_jobs.prepare(data, model, flags))


def fetch_source(dataset: str | None, folder: str, rows_per_shard: int | None) -> dict[str, Any]:
    """Downloads a source into the data volume and divides the making of its shards."""
    from pupilseg.cloud import jobs as cloud_jobs

    data = _data(dataset, folder, CPU_WORKERS, rows_per_shard)
    return _saved(lambda: cloud_jobs.fetch(data))


def build_shards(
    split: str, start: int, stop: int, dataset: str | None, folder: str, rows_per_shard: int | None
) -> dict[str, Any]:
    """Makes some shards of a fetched source in the data volume."""
    from pupilseg.cloud import jobs as cloud_jobs

    data = _data(dataset, folder, CPU_WORKERS, rows_per_shard)
    return _saved(lambda: cloud_jobs.write_shards_part(data, split, start, stop))


def train_network(
    model: str, run: str, flags: list[str], dataset: str | None, folder: str
) -> dict[str, Any]:
    """Trains and exports a network; a retry goes on where the container before was lost."""
    from pupilseg.cloud import jobs as cloud_jobs

    data = _data(dataset, folder, GPU_WORKERS)
    committed = time.monotonic()

    def tell(line: str) -> None:
        nonlocal committed
        print(line, flush=True)
        if time.monotonic() - committed > COMMIT_SECONDS:
            checkpoint_volume.commit()
            committed = time.monotonic()

    try:
        run_dir = Path(CHECKPOINTS) / run
        return _saved(lambda: cloud_jobs.train(data, model, flags, run_dir, tell))
    finally:
        checkpoint_volume.commit()


def _saved(job: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Runs a job on what the data volume holds now; keeps what it made there, failed or not."""
    from pupilseg.cloud.jobs import answered

    data_volume.reload()
    try:
        return answered(job)
    finally:
        data_volume.commit()


def _data(
    dataset: str | None, folder: str, workers: int, rows_per_shard: int | None = None
) -> Data:
    """Returns where a job finds its data."""
    from pupilseg.cloud.jobs import Data

    remove = " && ".join(
        f"modal volume rm -r {DATA_VOLUME} {folder}/{name}" for name in ("shards", "raw")
    )
    mend = f"use another --data-dir, or remove what it holds: {remove}"
    return Data(Path(DATA + folder), dataset, HOME / PARAMS, mend, workers, rows_per_shard)
