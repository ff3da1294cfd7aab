"""Two processes train like one, and none waits forever for another."""

import csv
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from pupilseg.errors import ParallelError, UsageError
from pupilseg.runtime.batch_norm import RankedBatchNorm, synchronize_norms
from pupilseg.runtime.distributed import ALONE, Ranks
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
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
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


def test_a_single_process_communicates_with_none():
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


def _normalize(ranks, image, upstream):
    """Forward, backward and statistics of a batch norm over this rank's half."""
    torch.manual_seed(1)
    norm = nn.BatchNorm2d(3)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.uniform_(-1, 1)
    model = synchronize_norms(nn.Sequential(norm), ranks)
    image = image[ranks.rank :: ranks.world_size].clone().requires_grad_()
    out = model(image)
    (out * upstream[ranks.rank :: ranks.world_size]).sum().backward()
    return {
        "kind": type(model[0]) is RankedBatchNorm,
        "out": out.detach(),
        "image": image.grad,
        "weight": model[0].weight.grad,
        "bias": model[0].bias.grad,
        "state": dict(model.state_dict()),
    }


def test_batch_norm_over_two_ranks_equals_one_over_all_frames(tmp_path):
    """Compared with torch's own, at a mean whose square float32 represents badly."""
    torch.manual_seed(0)
    image = torch.randn(4, 3, 5, 7) * 0.1 + torch.tensor([0.0, 30.0, -5.0])[:, None, None]
    upstream = torch.randn_like(image)
    whole = _normalize(ALONE, image, upstream)
    parts = in_ranks(_normalize, tmp_path, image, upstream)
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


def command(shards, out, *flags, ranks=2, model="efficientvit_tiny"):
    """Returns the command line of a training job."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
    return [
        sys.executable, *(torchrun if ranks > 1 else []), "-m", "pipeline.train",
        "--model", model, "--shards", str(shards), "--out", str(out), "--device", "cpu",
        "--batch-size", "4", "--lr", "1e-3", *flags,
    ]  # fmt: skip


def run(line):
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)


def history(out, model="efficientvit_tiny"):
    with (out / f"{model}_history.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


@pytest.mark.integration
@pytest.mark.parametrize("model", ["efficientvit_tiny", "ellipse"])
def test_two_processes_give_the_results_of_one(shards, tmp_path, model):
    """Rounding differences grow with each step: 4 steps at a tenth of the usual learning rate."""
    for ranks, name in ((1, "one"), (2, "two")):
        done = run(command(shards, tmp_path / name, "--epochs", "2", ranks=ranks, model=model))
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("epoch ") == 2  # only the first rank prints
        assert done.stdout.count("best: ") == 1
        assert done.stderr.count("configuration: ") == 1
        assert done.stderr.count("not tracked") == 1
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
    done = run(command(shards, tmp_path / "whole", "--epochs", "2", ranks=1))
    assert done.returncode == 0, done.stderr
    with Program(command(shards, tmp_path / "parts", "--epochs", "2"), ROOT) as job:
        job.wait_for("epoch   1/2")
        job.kill_all()
    resumed = run(command(shards, tmp_path / "parts", "--epochs", "2", "--resume", ranks=1))
    assert resumed.returncode == 0, resumed.stderr
    whole, parts = (history(tmp_path / name) for name in ("whole", "parts"))
    np.testing.assert_allclose(
        [row["train_loss"] for row in parts], [row["train_loss"] for row in whole], rtol=5e-3
    )


@pytest.mark.integration
def test_a_killed_rank_ends_the_job_with_a_message(shards, tmp_path):
    line = command(shards, tmp_path / "out", "--epochs", "500")
    with Program(line, ROOT) as job:
        job.wait_for("epoch   1/500")
        victim = job.children()[-1]
        started = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        code, text = job.end(timeout_s=120)
    assert code != 0
    assert time.monotonic() - started < 120
    assert "SIGKILL" in text or "another process of this job ended" in text
    assert (tmp_path / "out" / "efficientvit_tiny_training_state.pt").exists()


@pytest.mark.integration
def test_a_batch_that_cannot_be_divided_ends_the_job_without_our_traceback(shards, tmp_path):
    done = run(command(shards, tmp_path / "out", "--batch-size", "3"))
    assert done.returncode != 0
    assert "error: --batch-size 3 is the total over all processes" in done.stderr
    assert f'File "{ROOT}/pupilseg' not in done.stderr  # torchrun prints its own traceback
    assert not (tmp_path / "out").exists()
