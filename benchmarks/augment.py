"""Measures augmentation: ms per frame of each part, of all parts, and of a training step.

python -m benchmarks.augment [--device cpu] [--batch-size 8] [--runs 20]

They take turns in each run, so that a slow phase of the machine affects all of them.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks.machine import machine_line
from pupilseg.augment import AugmentConfig, augment
from pupilseg.geometry import NORMALIZED, ellipse_vector
from pupilseg.loader.loader import Batch
from pupilseg.maps import distance_maps, spatial_weights
from pupilseg.models import create_model
from pupilseg.runtime.device import find_device
from pupilseg.synthetic import render
from pupilseg.train.losses import segmentation_loss

if TYPE_CHECKING:
    from collections.abc import Callable

DEFAULT = AugmentConfig()
OFF = replace(
    DEFAULT, flip=0, scale=0, shift=0, streaks=0, blur=0, gamma=0, gain=0, offset=0, noise=0
)
PARTS = {
    "flip": replace(OFF, flip=1),
    "scale and shift, new targets": replace(OFF, scale=1, shift=1),
    "streaks": replace(OFF, streaks=1),
    "blur": replace(OFF, blur=1),
    "gamma, gain, offset": replace(
        OFF, gamma=DEFAULT.gamma, gain=DEFAULT.gain, offset=DEFAULT.offset
    ),
    "noise": replace(OFF, noise=DEFAULT.noise),
    "all, default shares": DEFAULT,
}
"""Configurations to time: each part alone, applied to every frame, and the default."""
SHARES = (DEFAULT.flip, DEFAULT.scale, DEFAULT.streaks, DEFAULT.blur, 1.0, 1.0)
STEP = "efficientvit, forward and backward"


def rendered_batch(frames: int, device: torch.device) -> Batch:
    """Returns a batch of rendered eyes with all targets."""
    eyes = [render(index) for index in range(frames)]
    labels = [(eye.classes == 3).astype(np.uint8) for eye in eyes]

    def column(arrays: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.stack(arrays)).to(device)

    return Batch(
        image=column([NORMALIZED[eye.image][None] for eye in eyes]),
        label=column(labels).long(),
        spatial_weights=column([spatial_weights(label) for label in labels]),
        dist_map=column([distance_maps(label) for label in labels]),
        ellipse=column([ellipse_vector(label) for label in labels]),
        index=torch.arange(frames, device=device),
    )


def training_step(batch: Batch, device: torch.device) -> Callable[[], None]:
    """Returns a function that runs network and loss on the batch, forward and backward."""
    model = create_model("efficientvit").to(device, memory_format=torch.channels_last).train()
    image = batch.image.contiguous(memory_format=torch.channels_last)

    def step() -> None:
        segmentation_loss(model(image), batch, 0.5)["loss"].backward()
        model.zero_grad(set_to_none=True)

    return step


def main() -> None:
    """Prints the measurements as a Markdown table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.augment", description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (cpu)")
    parser.add_argument("--batch-size", type=int, default=8, help="frames per batch (8)")
    parser.add_argument("--runs", type=int, default=20, help="number of timed batches (20)")
    parser.add_argument(
        "--no-compile", action="store_true", help="do not use torch.compile on CUDA"
    )
    args = parser.parse_args()
    device = find_device(args.device)
    batch = rendered_batch(args.batch_size, device)
    generator = torch.Generator(device).manual_seed(0)
    compiled = not args.no_compile
    work: dict[str, Callable[[], object]] = {
        name: partial(augment, batch, config, generator, compiled=compiled)
        for name, config in PARTS.items()
    }
    work[STEP] = training_step(batch, device)
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type)
    times: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(args.runs + 3):
        for name, call in work.items():
            started = time.perf_counter()
            call()
            if wait is not None:
                wait()
            if turn >= 3:
                times[name].append(1e3 * (time.perf_counter() - started) / args.batch_size)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    print(machine_line("torch", "cv2"))
    print(
        f"{where}, {torch.get_num_threads()} threads, batch {args.batch_size}, "
        f"n = {args.runs} batches after 3\n"
    )
    print("| part | ms per frame: min / median / p95 | share of frames | median x share |")
    print("| --- | --- | --- | --- |")
    for name, share in zip(times, (*SHARES, 1.0, 1.0), strict=True):
        low, median, high = np.percentile(times[name], [0, 50, 95])
        print(
            f"| {name} | {low:.2f} / {median:.2f} / {high:.2f} | {share} | {median * share:.2f} |"
        )
    ratio = np.median(np.array(times["all, default shares"]) / np.array(times[STEP]))
    print(f"\naugmentation / {STEP}: {100 * ratio:.1f} % (median of the runs' ratios)")


if __name__ == "__main__":
    main()
