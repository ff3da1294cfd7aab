"""Training speed: seconds per epoch, frames/s, and the share of time outside the network.

python -m benchmarks.training [--frames 64] [--rounds 5] [--batch-size 8] [--device cpu]
python -m benchmarks.training --to-iou 0.95 --frames 8916 [--model efficientvit]

Whole epochs of the training loop alternate with bare forward and backward passes over the same
number of batches, so that a slow phase of the machine affects both. Frames are rendered eyes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.machine import machine_line
from pupilseg.augment import augment
from pupilseg.cli.program import main_program, positive_int
from pupilseg.loader.loader import Batch, make_loader
from pupilseg.models import list_models
from pupilseg.models.ellipse import EllipseOutput
from pupilseg.prepare import ensure_shards
from pupilseg.runtime.device import fast_arithmetic, find_device
from pupilseg.runtime.host import keep_freed_memory
from pupilseg.shards import open_shards
from pupilseg.train.config import TrainConfig
from pupilseg.train.loop import compile_model, train_epoch
from pupilseg.train.metrics import predicted_mask
from pupilseg.train.session import train
from pupilseg.train.state import TrainState

if TYPE_CHECKING:
    from collections.abc import Callable


def clock(device: torch.device) -> float:
    """Waits for the device to finish its work and returns the host's clock in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Returns the duration of a call in seconds, including its work on the device."""
    started = clock(device)
    work()
    return clock(device) - started


def cloned(batch: Batch) -> Batch:
    """Returns a copy of a batch, because a loader overwrites its buffers."""
    names = ("image", "label", "spatial_weights", "dist_map", "ellipse", "index")
    return Batch(**{name: getattr(batch, name).clone() for name in names})


def kept(output: torch.Tensor | EllipseOutput) -> torch.Tensor | EllipseOutput:
    """Returns a copy of an output, because CUDA graphs overwrite theirs in the next call."""
    if isinstance(output, tuple):
        return EllipseOutput(*(tensor.detach().clone() for tensor in output))
    return output.detach().clone()


def parts_of(training: TrainState, batch: Batch) -> dict[str, Callable[[], object]]:
    """Returns the parts of a training step, to be timed separately."""
    image = batch.image.contiguous(memory_format=training.memory_format)
    alpha = training.alphas[0]
    training.model.train()

    def network() -> torch.Tensor | EllipseOutput:
        training.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(**training.autocast):
            output: torch.Tensor | EllipseOutput = training.model(image)
        training.loss(output, batch, alpha)["loss"].backward()
        return output

    output = kept(network())
    with torch.no_grad():
        losses = training.loss(output, batch, alpha)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(training.model.parameters(), training.config.clip)
        training.optimizer.step()
        training.average.update()

    config = training.config.augment
    assert config is not None
    return {
        "forward, loss, backward": network,
        "augmentation": lambda: augment(
            batch, config, training.random, compiled=training.config.compile
        ),
        "optimizer and averages": update,
        "metrics": lambda: training.metrics.update(
            losses, predicted_mask(output), batch.label, batch.ellipse
        ),
    }


def measure(name: str, shards_dir: Path, args: argparse.Namespace) -> None:
    """Prints the measurements of one network."""
    device = find_device(args.device)
    config = TrainConfig(
        model=name,
        batch_size=args.batch_size,
        epochs=args.rounds + 1,
        compile=not args.no_compile,
    )
    with (
        open_shards(shards_dir / "train") as shards,
        make_loader(
            shards,
            batch_size=args.batch_size,
            device=device,
            shuffle=True,
            drop_last=True,
            limit=args.frames,
            label_dtype=torch.uint8,  # as in training
            compiled=not args.no_compile,
        ) as loader,
        fast_arithmetic(device),
    ):
        steps = len(loader)
        frames = steps * args.batch_size
        training = TrainState(config, device, steps * config.epochs)
        if device.type == "cuda" and not args.no_compile:
            compile_model(training, loader)
        train_epoch(training, loader)  # warm-up of memory, threads and compilers
        batch = cloned(next(iter(loader)))
        parts = parts_of(training, batch)
        whole: list[float] = []
        alone: dict[str, list[float]] = {part: [] for part in parts}
        waited = loader.wait_s
        for training.epoch in range(1, args.rounds + 1):
            whole.append(seconds(lambda: train_epoch(training, loader), device))
            for part, work in parts.items():
                alone[part].append(
                    seconds(lambda work=work: [work() for _ in range(steps)], device)  # type: ignore[misc]
                )
        waited = (loader.wait_s - waited) / args.rounds
    epoch = statistics.median(whole)
    ratio = [
        1 - inner / outer
        for inner, outer in zip(alone["forward, loss, backward"], whole, strict=True)
    ]
    print(f"\n{name}: {frames} frames, batch {args.batch_size}, {args.rounds} rounds")
    print(
        f"  epoch {epoch:.2f} s (from {min(whole):.2f} to {max(whole):.2f}), "
        f"{frames / epoch:.1f} frames/s"
    )
    for part, times in alone.items():
        print(f"  {part:26} {1000 * statistics.median(times) / frames:8.3f} ms per frame")
    print(f"  {'waiting for data':26} {1000 * waited / frames:8.3f} ms per frame")
    print(
        f"  outside forward and backward: {100 * statistics.median(ratio):.1f} % "
        f"(from {100 * min(ratio):.1f} to {100 * max(ratio):.1f})"
    )


def until(name: str, shards_dir: Path, args: argparse.Namespace) -> None:
    """Trains until a validation IoU is reached and prints the training time."""
    device = find_device(args.device)
    config = TrainConfig(model=name, batch_size=args.batch_size, compile=not args.no_compile)
    total = {"train": 0.0, "all": 0.0}
    reached = False

    def print_epoch(row: dict[str, float]) -> None:
        nonlocal reached
        total["train"] += row["train_seconds"]
        total["all"] += row["train_seconds"] + row["valid_seconds"]
        print(
            f"  epoch {row['epoch']:3.0f}: {row['train_seconds']:7.2f} s, pupil IoU "
            f"{row['valid_pupil_iou']:.4f} after {total['train']:.1f} s of training, "
            f"{total['all']:.1f} s with validation",
            flush=True,
        )
        reached = row["valid_pupil_iou"] >= args.to_iou

    with tempfile.TemporaryDirectory() as out:
        train(
            config,
            shards_dir,
            Path(out),
            device=device,
            limit=args.frames,
            on_epoch=print_epoch,
            stop=lambda: reached,
        )


def main() -> None:
    """Parses the command line and measures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--model", action="append", choices=list_models(), help="default: all")
    parser.add_argument("--frames", type=positive_int, default=64)
    parser.add_argument("--rounds", type=positive_int, default=5)
    parser.add_argument("--batch-size", type=positive_int, default=8)
    parser.add_argument("--device")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--to-iou", type=float, help="train until this validation pupil IoU")
    parser.add_argument("--data-dir", type=Path, help="directory that keeps the rendered eyes")
    args = parser.parse_args()
    if find_device(args.device).type == "cpu":
        keep_freed_memory()  # as the training programs do
    print(machine_line("torch", "numpy"))
    print(f"device {find_device(args.device)}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as temporary:
        # A fifth of the rendered frames are validation frames.
        shards = ensure_shards(
            args.data_dir or temporary, f"synthetic:{-(-args.frames * 5 // 4)}", progress=False
        )
        for name in args.model or list_models():
            (measure if args.to_iou is None else until)(name, shards, args)


if __name__ == "__main__":
    main_program(main)
