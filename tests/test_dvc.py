"""The DVC pipelines: compares deps with imports and runs `dvc repro` in a copy of the checkout."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers.checkout import copy_checkout
from tests.helpers.import_graph import imported_files, is_under
from tests.helpers.paths import ROOT

STAGES = ("download", "materialize", "train", "evaluate", "export")
MODELS = ("efficientvit", "efficientvit_tiny", "ellipse")
OBSERVERS = ("pupilseg/__init__.py", "pupilseg/tracking/", "pupilseg/train/artifacts.py")
"""The version number and the uploads to MLflow. Their imports are ignored too."""
NO_RESULT = {
    "every stage": (
        *OBSERVERS,
        "pupilseg/errors.py",
        "pupilseg/files.py",  # how files are written, not their content
        "pupilseg/pages.py",
        "pupilseg/cli/",
        "pupilseg/weights/",  # no stage uses released weights
        "pupilseg/predict/__init__.py",  # re-exports
    ),
    # Checks only: frames are processed in the next stage.
    "download": (
        "pupilseg/geometry.py", "pupilseg/maps.py", "pupilseg/preprocess.py", "pupilseg/sample.py",
    ),
    "materialize": ("pupilseg/runtime/",),
    # `train` lists the modules that affect numerics: compilation, device and processes.
    "train": (
        "pupilseg/runtime/",
        "pupilseg/train/__init__.py",
        "pupilseg/model_files/__init__.py",
        "pupilseg/model_files/safetensors.py",  # only with --init
        "pupilseg/preprocess.py",  # the images of a split have been processed
        "pupilseg/sample.py",
        # `pupilseg train` also prepares data; the stage gets shards.
        "pupilseg/letterbox.py",
        "pupilseg/prepare.py",
        "pupilseg/sources/",
        "pupilseg/synthetic/",
    ),
    "evaluate": ("pupilseg/runtime/", "pupilseg/sample.py"),
    "export": (
        "pupilseg/runtime/",
        "pupilseg/sample.py",
        "pupilseg/evaluate/__init__.py",
        "pupilseg/export/safetensors.py",  # another format
    ),
}  # fmt: skip
"""Files and folders that a stage imports but that do not affect its result; editing them reruns
nothing."""


@pytest.mark.parametrize("folder", [".", "demo", "pretrained"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_what_decides_its_result(folder, stage):
    spec = yaml.safe_load((ROOT / folder / "dvc.yaml").read_text())["stages"][stage]
    deps = {os.path.normpath(os.path.join(folder, dep)) for dep in spec["deps"]}
    code = {dep for dep in deps if dep.startswith(("pupilseg", "pipeline"))}
    imported = imported_files(f"pipeline/{stage}.py", without=OBSERVERS)
    covered = {f for f in imported if is_under(f, [*code, *(f"{dep}/" for dep in code)])}
    without = NO_RESULT["every stage"] + NO_RESULT[stage]
    assert {f for f in imported - covered if not is_under(f, without)} == set()
    unused = {dep for dep in code if not any(is_under(f, [dep, f"{dep}/"]) for f in imported)}
    assert unused == set()


def test_a_change_of_the_viewer_or_the_command_line_reruns_nothing():
    """The deps list single files of `predict`, not the folder."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    deps = {dep for stage in stages.values() for dep in stage["deps"]}
    for file in ("predict/view.py", "predict/video.py", "cli/main.py", "notebook/display.py"):
        assert (ROOT / "pupilseg" / file).exists()
        assert not is_under(f"pupilseg/{file}", [*deps, *(f"{dep}/" for dep in deps)])


@pytest.mark.parametrize("folder", ["demo", "pretrained"])
def test_it_is_the_same_pipeline(folder):
    """The files only differ in their paths."""
    root = (ROOT / "dvc.yaml").read_text().split("\n", 1)[1]
    other = (ROOT / folder / "dvc.yaml").read_text().split("\n", 1)[1]
    for text in ("cd .. && ", "../", f"{folder}/"):
        other = other.replace(text, "")
    if folder == "pretrained":  # trains one more network
        other, plots = re.subn(r".*efficientvit_base_history.*\n", "", other)
        assert plots == 2
    assert other == root
    real, rendered = (
        yaml.safe_load((ROOT / where / "params.yaml").read_text()) for where in (".", folder)
    )
    more = {"efficientvit_base"} if folder == "pretrained" else set()
    assert set(rendered.pop("models")) == set(real.pop("models")) | more
    assert {k: set(v) for k, v in real.items()} == {k: set(v) for k, v in rendered.items()}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return copy_checkout(tmp_path_factory.mktemp("checkout"))


def repro(checkout, target="dvc.yaml"):
    """Runs `dvc repro`; returns the names of the stages that ran, in order."""
    # Any use of the network fails.
    env = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(checkout),
        "HF_HUB_OFFLINE": "1",
        "HF_ENDPOINT": "http://127.0.0.1:9",
    }
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "repro", target],
        cwd=checkout, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("Running stage")]
    return [line.split("'")[1].split(":")[-1] for line in lines]


def git_status(checkout):
    """Returns changed and untracked files, as `git status` reports them."""
    command = ["git", "status", "--porcelain", "--untracked-files=all"]
    return subprocess.run(
        command, cwd=checkout, capture_output=True, text=True, check=True
    ).stdout.splitlines()


def set_params(path, **groups):
    """Overwrites parameters of some groups in a params.yaml."""
    params = yaml.safe_load(path.read_text())
    for group, values in groups.items():
        if isinstance(values, dict):
            params[group].update(values)
        else:
            params[group] = values
    path.write_text(yaml.safe_dump(params))


@pytest.mark.integration
@pytest.mark.long
def test_demo_repro_end_to_end(checkout):
    """A second run does nothing; a new training parameter rebuilds no data; the tree is clean."""
    params = checkout / "demo" / "params.yaml"
    set_params(params, download={"source": "synthetic:10@3"}, train={"epochs": 1, "batch_size": 2})
    before = git_status(checkout)
    ran = repro(checkout, "demo/dvc.yaml")
    per_model = {f"{stage}@{model}" for stage in STAGES[2:] for model in MODELS}
    assert set(ran) == {"download", "materialize"} | per_model
    for model in MODELS:
        made = checkout / "demo" / "models" / model
        assert (made / f"best_{model}_model.pt").stat().st_size > 10_000
        assert (made / f"best_{model}_model.onnx").stat().st_size < 300_000
        reports = checkout / "demo" / "reports" / model
        metrics = json.loads((reports / "metrics.json").read_text())
        assert metrics["frames"] == 2
        assert 0 <= metrics["pupil_iou"] <= 1
        assert 0 <= metrics["miou"] <= 1
        assert len((reports / "per_frame.csv").read_text().splitlines()) == 3
        assert b"<img" in (reports / "report.html").read_bytes()

    assert repro(checkout, "demo/dvc.yaml") == []
    assert git_status(checkout) == before

    shards = checkout / "demo" / "data" / "shards"
    times = {f: f.stat().st_mtime_ns for f in shards.rglob("*") if f.is_file()}
    set_params(params, train={"lr": 0.005}, models=["efficientvit_tiny"])
    ran = repro(checkout, "demo/dvc.yaml")
    assert ran[0] == "train@efficientvit_tiny"
    assert sorted(ran[1:]) == ["evaluate@efficientvit_tiny", "export@efficientvit_tiny"]
    assert {f: f.stat().st_mtime_ns for f in shards.rglob("*") if f.is_file()} == times

    cached = sum(f.stat().st_size for f in (checkout / ".dvc" / "cache").rglob("*") if f.is_file())
    assert cached < sum(f.stat().st_size for f in shards.rglob("*.arrow"))

    done = subprocess.run(
        [sys.executable, "-m", "pipeline.summarize", "demo"],
        cwd=checkout, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert all(model in done.stdout for model in MODELS)


@pytest.mark.integration
def test_repro_on_an_openeds_folder(checkout, tmp_path):
    """Runs the pipeline for real data on frames in the layout of OpenEDS."""
    import cv2
    import numpy as np

    from pupilseg.synthetic import render

    subject = tmp_path / "openeds" / "S_1"
    subject.mkdir(parents=True)
    for index in range(10):
        frame = render(index, seed=5)
        cv2.imwrite(str(subject / f"{index}.png"), frame.image)
        np.save(subject / f"{index}.npy", frame.classes)
    set_params(
        checkout / "params.yaml",
        download={"source": str(tmp_path / "openeds")},
        train={"epochs": 1, "batch_size": 2},
        models=["efficientvit_tiny"],
    )
    ran = repro(checkout)
    assert ran[:3] == ["download", "materialize", "train@efficientvit_tiny"]
    assert sorted(ran[3:]) == ["evaluate@efficientvit_tiny", "export@efficientvit_tiny"]
    manifest = json.loads((checkout / "data/shards/validation/manifest.json").read_text())
    assert manifest["rows"] == 2
    assert "contiguous blocks of one subject" in manifest["split_rule"]
