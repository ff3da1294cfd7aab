"""Cost of each network: multiply-adds, ONNX bytes, ms per frame, with and without fusion.

python -m benchmarks.networks [--runs 200]

For each network, the exported form (`pupilseg.export.fused`) and the network as it was trained are
timed in turns, so that a slow phase of the machine affects both. Networks are not mixed: nine
sessions evict each other's weights from the cache, which adds a fifth to all times.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.machine import machine_line
from pupilseg.export.onnx import to_onnx
from pupilseg.geometry import HEIGHT, WIDTH
from pupilseg.model_files.onnx import INPUT_NAME, OUTPUTS, onnx_session
from pupilseg.models import create_model, list_models, model_entry


def multiply_adds(model: nn.Module) -> int:
    """Counts the multiply-adds of convolutions, linear layers and attention for one frame."""
    total = 0

    def count(module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            per_value = module.weight[0].numel()
            total += output.numel() * per_value
        elif isinstance(module, nn.Linear):
            total += output.numel() * module.in_features
        else:  # attention: scores and weighted sums in all windows of the 25 x 40 tokens
            window = module.window_size[0] * module.window_size[1]
            total += 1000 * window * module.num_heads * (module.key_dim + module.head_dim)

    kinds = ("Conv2d", "Linear", "CascadedGroupAttention")
    hooks = [
        module.register_forward_hook(count)
        for module in model.modules()
        if type(module).__name__ in kinds
    ]
    with torch.no_grad():
        model.eval()(torch.zeros(1, 1, HEIGHT, WIDTH))
    for hook in hooks:
        hook.remove()
    return total


def time_in_turns(sessions: list[Any], runs: int) -> list[list[float]]:
    """Returns the times of each session in ms, after 10 warm-up runs."""
    image = np.random.default_rng(0).integers(0, 256, (1, 1, HEIGHT, WIDTH), dtype=np.uint8)
    times: list[list[float]] = [[] for _ in sessions]
    for turn in range(runs + 10):
        for session, values in zip(sessions, times, strict=True):
            started = time.perf_counter()
            session.run(None, {INPUT_NAME: image})
            if turn >= 10:
                values.append(1e3 * (time.perf_counter() - started))
    return times


def main() -> None:
    """Measures and prints a Markdown table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.networks", description=__doc__)
    parser.add_argument(
        "--runs", type=int, default=200, help="timed frames per network (default: %(default)s)"
    )
    parser.add_argument("--onnx", type=Path, help="folder to write the ONNX files to")
    args = parser.parse_args()
    rows = []
    for name in list_models():
        output = OUTPUTS[model_entry(name).task].name
        model = create_model(name).eval()
        fused, plain = (
            to_onnx(model, output, fuse=fuse).SerializeToString() for fuse in (True, False)
        )
        times = time_in_turns([onnx_session(file, threads=1) for file in (fused, plain)], args.runs)
        fused_ms, plain_ms = (
            " / ".join(f"{ms:.2f}" for ms in np.percentile(values, [0, 50, 95])) for values in times
        )
        rows.append(
            f"| {name} | {sum(p.numel() for p in model.parameters()):,} "
            f"| {multiply_adds(model) / 1e6:.1f} M | {len(fused):,} | {fused_ms} | {plain_ms} "
            f"| {min(times[0]) / min(times[1]):.2f} |"
        )
        if args.onnx:
            args.onnx.mkdir(parents=True, exist_ok=True)
            (args.onnx / f"{name}.onnx").write_bytes(fused)
    print(machine_line("torch", "onnxruntime"))
    print(f"ONNX Runtime: 1 thread, batch 1, n = {args.runs} after 10\n")
    print(
        "| network | parameters | multiply-adds | ONNX bytes | ms per frame: min / median / p95 "
        "| not fused | ratio of minima |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
