"""Two processes give the results of one, and no process waits forever for another."""

import csv
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from pupilseg.cli import train_run
from pupilseg.errors import ParallelError, UsageError
from pupilseg.runtime.batch_norm import RankedBatchNorm, synchronize_norms
from pupilseg.runtime.distributed import ALONE, Ranks
from pupilseg.train.config import TrainConfig
from tests.helpers.paths import ROOT
from tests.helpers.processes import Program
from tests.helpers.training import write_eyes

CPU = torch.device("cpu")

# Communication between ranks


def in_ranks(function, folder, *arguments, world_size=2):
    """Runs function(ranks, *arguments) in `world_size` processes; returns their results."""
    mp.spawn(_rank, (world_size, folder, function, arguments), nprocs=world_size)
    return [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]


def _rank(rank, world_size, folder, function, arguments):
    torch.set_num_threads(1)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.device_count() >= world_size else "gloo"
    torch.distributed.init_process_group(
        backend, init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    torch.save(function(Ranks(rank, world_size), *arguments), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def _messages(ranks):
    weight = nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.full((2, 2), float(ranks.rank))
    unused = nn.Parameter(torch.zeros(3))
    ranks.average_gradients([weight, unused])
    done = []
    ranks.after_first(lambda: done.append(ranks.rank))
    return {
        "sum": ranks.sum_(torch.tensor([1.0, ranks.rank])),
        "one": ranks.any(ranks.rank == 1),
        "none": ranks.any(False),
        "gradient": weight.grad,
        "share": ranks.share_of(6),
        "done": done,
    }


def test_ranks_exchange_values(tmp_path):
    for rank, found in enumerate(in_ranks(_messages, tmp_path)):
        assert found["sum"].tolist() == [2, 1]
        assert (found["one"], found["none"]) == (True, False)
        assert found["gradient"].tolist() == [[0.5, 0.5], [0.5, 0.5]]
        assert found["share"] == 3
        assert found["done"] == [rank]


def test_a_single_process_does_not_communicate():
    weight = nn.Parameter(torch.zeros(1))
    weight.grad = torch.ones(1)
    ALONE.average_gradients([weight])
    assert weight.grad == 1
    assert ALONE.sum_(torch.ones(1)) == 1
    assert ALONE.any(True)
    assert not ALONE.any(False)
    assert ALONE.after_first(lambda: 5) == 5
    model = nn.Sequential(nn.BatchNorm2d(2))
    assert type(synchronize_norms(model, ALONE)[0]) is nn.BatchNorm2d


def test_batches_that_cannot_be_divided_are_refused():
    with pytest.raises(
        UsageError, match=r"--batch-size 7 .* must be a multiple of their number, 2"
    ):
        Ranks(0, 2).share_of(7)


def test_a_batch_norm_stays_on_its_device():
    (norm,) = synchronize_norms(nn.Sequential(nn.BatchNorm2d(3, device="meta")), Ranks(0, 2))
    assert type(norm) is RankedBatchNorm
    assert {value.device.type for value in norm.state_dict().values()} == {"meta"}


def _normalize(ranks, image, upstream, name="cpu"):
    """Forward, backward and statistics of a batch norm over this rank's half."""
    device = torch.device(name, ranks.rank) if name == "cuda" else CPU
    torch.manual_seed(1)
    norm = nn.BatchNorm2d(3)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.uniform_(-1, 1)
    model = synchronize_norms(nn.Sequential(norm).to(device), ranks)
    image = image[ranks.rank :: ranks.world_size].to(device, copy=True).requires_grad_()
    out = model(image)
    (out * upstream[ranks.rank :: ranks.world_size].to(device)).sum().backward()
    return {
        "kind": type(model[0]) is RankedBatchNorm,
        "out": out.detach().cpu(),
        "image": image.grad.cpu(),
        "weight": model[0].weight.grad.cpu(),
        "bias": model[0].bias.grad.cpu(),
        "state": {name: value.cpu() for name, value in model.state_dict().items()},
    }


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_batch_norm_over_two_ranks_equals_one_over_all_frames(tmp_path, device):
    """Compares with torch's batch norm, at a mean whose square is imprecise in float32."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    torch.manual_seed(0)
    image = torch.randn(4, 3, 5, 7) * 0.1 + torch.tensor([0.0, 30.0, -5.0])[:, None, None]
    upstream = torch.randn_like(image)
    whole = _normalize(ALONE, image, upstream)
    parts = in_ranks(_normalize, tmp_path, image, upstream, device)
    assert not whole["kind"]
    for rank, part in enumerate(parts):
        assert part["kind"]
        for name in ("out", "image"):
            torch.testing.assert_close(part[name], whole[name][rank::2], rtol=1e-4, atol=1e-4)
        assert list(part["state"]) == list(whole["state"])
        for name, value in whole["state"].items():
            torch.testing.assert_close(part["state"][name], value, rtol=1e-5, atol=1e-6)
    for name in ("weight", "bias"):
        total = sum(part[name] for part in parts)
        torch.testing.assert_close(total, whole[name], rtol=1e-4, atol=1e-3)


def _leave(ranks):
    if ranks.rank == 1:
        os._exit(0)
    try:
        ranks.any(True)
    except ParallelError as error:
        return str(error)
    return "no error"


def test_a_lost_rank_raises_a_readable_error(tmp_path):
    mp.spawn(_rank, (2, tmp_path, _leave, ()), nprocs=2)
    message = torch.load(tmp_path / "0.pt")
    assert "another process of this job ended" in message
    assert "--resume" in message


# Whole jobs


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Shards of 8 training and 3 validation frames."""
    return write_eyes(tmp_path_factory.mktemp("shards"), train=8, validation=3)


TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
LOCAL = ("--processes", "2")


def command(shards, out, *flags, launcher=(), model="efficientvit_tiny"):
    """Returns the command line of a training job."""
    program = [sys.executable, *launcher, "-m", "pipeline.train", "--model", model]
    files = ["--shards", str(shards), "--out", str(out)]
    return [*program, *files, "--device", "cpu", "--batch-size", "4", "--lr", "1e-3", *flags]


def run(line):
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)


def history(out, model="efficientvit_tiny"):
    with (out / f"{model}_history.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


@pytest.mark.integration
@pytest.mark.parametrize(
    ("model", "launcher", "flags"),
    [("efficientvit_tiny", (), LOCAL), ("ellipse", TORCHRUN, ())],
    ids=["local", "torchrun"],
)
def test_two_processes_give_the_results_of_one(shards, tmp_path, model, launcher, flags):
    """Rounding differences grow with each step: 4 steps at a tenth of the usual learning rate."""
    for name, start, extra in (("one", (), ()), ("two", launcher, flags)):
        line = command(
            shards, tmp_path / name, "--epochs", "2", *extra, launcher=start, model=model
        )
        done = run(line)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("epoch ") == 2  # only the first rank prints
        assert done.stdout.count("best: ") == 1
        assert done.stderr.count("configuration: ") == 1
        assert done.stderr.count("not tracked") == 1
        assert ("on 2 processes" in done.stderr) == (name == "two")
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == sorted(
        p.name for p in (tmp_path / "two").iterdir()
    )
    one, two = (history(tmp_path / name, model) for name in ("one", "two"))
    for row, other in zip(one, two, strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=2e-3)
        assert row["valid_loss"] == pytest.approx(other["valid_loss"], rel=5e-3)
        assert row["valid_iou"] == pytest.approx(other["valid_iou"], abs=5e-3)
        assert row["lr"] == other["lr"]


@pytest.mark.integration
def test_a_job_resumes_with_another_number_of_processes(shards, tmp_path):
    done = run(command(shards, tmp_path / "whole", "--epochs", "2"))
    assert done.returncode == 0, done.stderr
    line = command(shards, tmp_path / "parts", "--epochs", "2", *LOCAL)
    with Program(line, ROOT) as job:
        job.wait_for("epoch   1/2")
        job.kill_all()
    resumed = run(command(shards, tmp_path / "parts", "--epochs", "2", "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    whole, parts = (history(tmp_path / name) for name in ("whole", "parts"))
    np.testing.assert_allclose(
        [row["train_loss"] for row in parts], [row["train_loss"] for row in whole], rtol=5e-3
    )


@pytest.mark.integration
@pytest.mark.parametrize(
    ("launcher", "flags", "message"),
    [
        ((), LOCAL, "process 1 was ended by SIGKILL"),
        (TORCHRUN, (), "SIGKILL"),
    ],
    ids=["local", "torchrun"],
)
def test_a_killed_rank_ends_the_job_with_a_message(shards, tmp_path, launcher, flags, message):
    line = command(shards, tmp_path / "out", "--epochs", "500", *flags, launcher=launcher)
    with Program(line, ROOT) as job:
        job.wait_for("epoch   1/500")
        os.kill(job.children()[-1], signal.SIGKILL)
        code, text = job.end(timeout_s=120)
    assert code != 0
    assert message in text
    assert (tmp_path / "out" / "efficientvit_tiny_training_state.pt").exists()
    if not launcher:
        assert code == 1
        assert "another process of this job ended" in text
        assert "Traceback" not in text


@pytest.mark.integration
def test_when_the_first_process_is_killed_the_others_end(shards, tmp_path):
    line = command(shards, tmp_path / "out", "--epochs", "500", *LOCAL)
    with Program(line, ROOT) as job:
        job.wait_for("epoch   1/500")
        others = job.children()[1:]
        os.kill(job.pid, signal.SIGKILL)
        job.end(timeout_s=120)
        until = time.monotonic() + 120
        while any(is_running(pid) for pid in others):
            assert time.monotonic() < until, f"still running: {others}"
            time.sleep(0.05)


@pytest.mark.integration
def test_ctrl_c_ends_all_processes_after_the_epoch(shards, tmp_path):
    line = command(shards, tmp_path / "out", "--epochs", "500", *LOCAL)
    with Program(line, ROOT) as job:
        job.wait_for("epoch   1/500")
        job.send(signal.SIGINT)
        code, text = job.end(timeout_s=120)
    assert code == 130
    assert "finishing this epoch" in text
    assert "continue with --resume" in text
    assert "Traceback" not in text
    assert (tmp_path / "out" / "efficientvit_tiny_training_state.pt").exists()


@pytest.mark.integration
@pytest.mark.parametrize(
    ("launcher", "flags"), [((), LOCAL), (TORCHRUN, ())], ids=["local", "torchrun"]
)
def test_a_batch_that_cannot_be_divided_is_refused(shards, tmp_path, launcher, flags):
    line = command(shards, tmp_path / "out", "--batch-size", "3", *flags, launcher=launcher)
    done = run(line)
    assert done.returncode != 0
    assert "error: --batch-size 3 is the total over all processes" in done.stderr
    assert f'File "{ROOT}/pupilseg' not in done.stderr  # torchrun prints its own traceback
    assert not (tmp_path / "out").exists()


def is_running(pid):
    """Returns whether a process exists and is not a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


# The choice of the number of processes


@pytest.mark.parametrize(
    ("cores", "batch_size", "epochs", "processes"),
    [(2, 4, 500, 2), (8, 4, 500, 4), (3, 4, 500, 2), (2, 3, 500, 1), (1, 4, 500, 1), (2, 4, 1, 1)],
)
def test_the_cores_that_divide_a_batch_are_used(
    shards, monkeypatch, caplog, cores, batch_size, epochs, processes
):
    """Short runs use one process: 8 frames for one epoch finish before others have started."""
    monkeypatch.setattr(train_run, "available_cores", lambda: cores)
    args = Namespace(processes=None, limit=None)
    config = TrainConfig(batch_size=batch_size, epochs=epochs)
    with caplog.at_level("INFO", "pupilseg"):
        assert train_run._choose_processes(args, config, shards) == processes
    assert ("one process: the run takes about 0 s" if epochs == 1 else "CPU cores") in caplog.text
