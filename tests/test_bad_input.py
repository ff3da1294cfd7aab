"""Bad input: each program reports what is wrong, exits with a non-zero code and loses no data."""

import os
import subprocess
import sys

import cv2
import numpy as np
import pytest

from pupilseg.model_files.card import ModelCard
from pupilseg.model_files.checkpoint import save_model
from pupilseg.models import create_model
from pupilseg.shards.writer import write_shards
from pupilseg.sources import SourceOptions, download
from tests.helpers.fakes import FakeDataset
from tests.helpers.paths import ROOT
from tests.helpers.processes import run_here

pytestmark = pytest.mark.integration


def program(name, *args):
    """Runs a program of the pipeline in this process; returns its exit code and stderr."""
    done = run_here("-m", f"pipeline.{name}", *args)
    return done.returncode, done.stderr


def process(name, *args):
    """Runs a program of the pipeline as a user does; returns its exit code and stderr."""
    done = subprocess.run(
        [sys.executable, "-m", f"pipeline.{name}", *map(str, args)],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return done.returncode, done.stderr


def refused(result, code, *words):
    """Asserts the exit code, an error line with the words, and no traceback."""
    returned, stderr = result
    assert "Traceback" not in stderr, stderr
    assert returned == code, stderr
    last = [line for line in stderr.splitlines() if "error" in line][-1]
    for word in words:
        assert str(word) in last, stderr


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Six training and two validation frames of random ellipses."""
    folder = tmp_path_factory.mktemp("bad") / "shards"
    for split in ("train", "validation"):
        write_shards(FakeDataset(train=6, validation=2), split, folder / split, progress=False)
    return folder


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    """An untrained ellipse network as a model file."""
    path = tmp_path_factory.mktemp("model") / "ellipse.pt"
    card = ModelCard(model="ellipse", preprocessing="none", data="none", license="MIT")
    model = create_model("ellipse")
    save_model(path, model.state_dict(), card)
    return path


@pytest.mark.parametrize("source", ["synthetic:many", "no such place", "synthetic:0"])
def test_unknown_source(source, tmp_path):
    refused(program("download", "--source", source, "--out", tmp_path / "raw"), 2, source)


def test_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    result = process("download", "--source", tmp_path / "empty", "--out", tmp_path / "raw")
    refused(result, 1, tmp_path / "empty")


@pytest.mark.parametrize("fault", ["unreadable", "label values", "label shape", "color"])
def test_bad_frame_in_an_openeds_folder(fault, tmp_path):
    subject = tmp_path / "eyes" / "S_1"
    subject.mkdir(parents=True)
    for index in range(5):
        image = np.full((400, 640), 90, np.uint8)
        label = np.zeros((400, 640), np.uint8)
        label[150:200, 300:350] = 3
        if index == 3 and fault == "label values":
            label[0, 0] = 7
        if index == 3 and fault == "label shape":
            label = label[:300]
        if index == 3 and fault == "color":
            image = np.dstack([image, image // 2, image])
        cv2.imwrite(str(subject / f"{index}.png"), image)
        np.save(subject / f"{index}.npy", label)
    if fault == "unreadable":
        whole = (subject / "3.png").read_bytes()
        (subject / "3.png").write_bytes(whole[: len(whole) // 2])
    raw, out = tmp_path / "raw", tmp_path / "shards"
    code, stderr = program("download", "--source", tmp_path / "eyes", "--out", raw)
    if code == 0:
        run = process if fault == "label shape" else program
        code, stderr = run("materialize", "--raw", raw, "--out", out, "--workers", "1")
    refused((code, stderr), 1, "3.")
    assert not (out / "train" / "manifest.json").exists()


def test_missing_split(tmp_path, shards):
    (tmp_path / "half").mkdir()
    os.symlink(shards / "train", tmp_path / "half" / "train")
    result = process(
        "train", "--model", "ellipse", "--shards", tmp_path / "half", "--out", tmp_path / "out"
    )
    refused(result, 1, "validation")


def test_another_source_in_the_same_place(tmp_path):
    raw = tmp_path / "raw"
    download("synthetic:4@0", raw, options=SourceOptions())
    before = (raw / "source.json").read_bytes()
    refused(program("download", "--source", "synthetic:5@0", "--out", raw), 1, "synthetic:4@0")
    assert (raw / "source.json").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "efficientvitt"], ["efficientvitt", "efficientvit"]),
        (["--model", "ellipse", "--device", "cuda:7"], ["cuda:7"]),
        (["--model", "ellipse", "--device", "gpu"], ["gpu"]),
        (["--model", "ellipse", "--epochs", "0"], ["--epochs"]),
        (["--model", "ellipse", "--lr", "-1"], ["--lr"]),
        (["--model", "ellipse", "--batch-size", "100"], ["--batch-size"]),
        (["--model", "ellipse", "--resume"], ["resume"]),
    ],
)
def test_invalid_request(flags, words, shards, tmp_path):
    result = program("train", "--shards", shards, "--out", tmp_path / "out", *flags)
    refused(result, 2, *words)


def test_checkpoint_of_another_model(model_file, shards, tmp_path):
    result = program(
        "train", "--model", "efficientvit", "--shards", shards, "--out", tmp_path,
        "--batch-size", "2", "--resume", model_file,
    )  # fmt: skip
    refused(result, 1, model_file)


@pytest.mark.parametrize("name", ["evaluate", "export"])
@pytest.mark.parametrize("fault", ["missing", "truncated", "not a model"])
def test_invalid_model_file(name, fault, model_file, shards, tmp_path):
    path = tmp_path / "model.pt"
    if fault == "truncated":
        path.write_bytes(model_file.read_bytes()[:5000])
    elif fault == "not a model":
        path.write_text("weights")
    more = ["--out", tmp_path / "x.onnx"]
    if name == "evaluate":
        more = ["--out", tmp_path / "report", "--shards", shards / "validation"]
    run = process if fault == "truncated" else program
    refused(run(name, "--model", path, *more), 1, path)
    assert not (tmp_path / "x.onnx").exists()


@pytest.mark.parametrize("kind", ["full", "read-only"])
def test_output_disk(kind, shards, tmp_path):
    """Uses a real small file system, if the user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    options = "size=64k" if kind == "full" else "ro"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        result = program(
            "train", "--model", "ellipse", "--shards", shards, "--out", disk / "out",
            "--epochs", "1", "--batch-size", "2",
        )  # fmt: skip
        refused(result, 1, "cannot write", disk)
        assert not list(disk.rglob("*.pt"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
