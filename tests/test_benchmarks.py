"""Each benchmark runs and prints its table; the measured values are not tested."""

import subprocess
import sys

import pytest
import torch

from benchmarks.training import kept
from pupilseg.models.ellipse import EllipseOutput
from tests.helpers.checkpoints import model_file
from tests.helpers.onnx_files import threshold_onnx
from tests.helpers.paths import ROOT


@pytest.mark.integration
@pytest.mark.long
@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("networks --runs 1", "| efficientvit_tiny | 9,737 | 40.4 M |"),
        ("renderer --frames 12 --speed 4", "| border share of frame | up to 0.17 |"),
        ("prediction --model {model} --frames 16 --runs 2", "| calibrated | "),
        (
            "robustness --source synthetic:4@1 --model {model}",
            "| pupil IoU, mean | 5th percentile | center, mean px | found |",
        ),
        (
            "finetune --source synthetic:8@1 --model efficientvit_tiny --init {weights} --epochs 1 "
            "--lr 0.001 --seeds 1 --device cpu",
            "| fine-tuned, rate 0.001, seed 0 | ",
        ),
        ("augment --runs 1 --batch-size 2", "all, default shares"),
        ("materialize --frames 8 --different 8 --rounds 1", "| shards, 2 processes |"),
        (
            "training --model efficientvit_tiny --frames 4 --rounds 1 --batch-size 2 --device cpu",
            "outside forward and backward",
        ),
        (
            "training --model ellipse --frames 4 --batch-size 2 --device cpu --to-iou 0",
            "epoch   1: ",
        ),
        (
            "loader --samples 2 --batch-size 2 --rounds 1 --workers 0",
            "| pupilseg, 1 thread, one batch ahead |",
        ),
    ],
    ids=[
        *("networks", "renderer", "prediction", "robustness", "finetune", "augment", "materialize"),
        *("training", "training to an IoU", "loader"),
    ],
)
def test_it_runs_and_prints(line, text, tmp_path):
    check(line, text, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["efficientvit_tiny", "ellipse"])
def test_training_is_measured_on_a_gpu(model, tmp_path):
    line = f"training --model {model} --frames 16 --rounds 1 --batch-size 4 --device cuda"
    check(line, "outside forward and backward", tmp_path)


def test_the_training_benchmark_keeps_an_output_that_is_overwritten():
    """As a compiled network's is by its next call, where compilation uses CUDA graphs."""
    logits = torch.ones(2, 2, requires_grad=True)
    ellipse = EllipseOutput(torch.ones(2, 4), torch.ones(2, 1, 1))
    copies = kept(logits), *kept(ellipse)
    with torch.no_grad():
        for tensor in (logits, *ellipse):
            tensor.zero_()
    assert all((copy == 1).all() and not copy.requires_grad for copy in copies)


def check(line, text, tmp_path):
    """Runs a benchmark and looks for a text in its output."""
    if "{model}" in line:
        line = line.format(model=threshold_onnx(tmp_path / "m.onnx", 40))
    if "{weights}" in line:
        line = line.format(weights=model_file(tmp_path / "m.pt", preprocessing="none"))
    done = subprocess.run(
        [sys.executable, "-m", *f"benchmarks.{line}".split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert text in done.stdout
    assert "cores, Python" in done.stdout  # the machine
