"""Cost of each network: multiply-adds, ONNX bytes, ms per frame.

python -m benchmarks.networks [--runs 200]

The networks are timed in turns, so that a slow phase of the machine affects all of them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

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


def main() -> None:
    """Measures and prints a Markdown table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.networks", description=__doc__)
    parser.add_argument(
        "--runs", type=int, default=200, help="timed frames per network (default: %(default)s)"
    )
    parser.add_argument("--onnx", type=Path, help="folder to write the ONNX files to")
    args = parser.parse_args()
    image = np.random.default_rng(0).integers(0, 256, (1, 1, HEIGHT, WIDTH), dtype=np.uint8)
    sessions, sizes, times = {}, {}, {name: [] for name in list_models()}
    for name in list_models():
        output = OUTPUTS[model_entry(name).task].name
        encoded = to_onnx(create_model(name).eval(), output).SerializeToString()
        sizes[name] = len(encoded)
        sessions[name] = onnx_session(encoded, threads=1)
        if args.onnx:
            args.onnx.mkdir(parents=True, exist_ok=True)
            (args.onnx / f"{name}.onnx").write_bytes(encoded)
    for turn in range(args.runs + 10):
        for name, session in sessions.items():
            started = time.perf_counter()
            session.run(None, {INPUT_NAME: image})
            if turn >= 10:
                times[name].append(1e3 * (time.perf_counter() - started))
    print(machine_line("torch", "onnxruntime"))
    print(f"ONNX Runtime: 1 thread, batch 1, n = {args.runs} after 10\n")
    print(
        "| network | parameters | multiply-adds | ONNX bytes | ms per frame: min / median / p95 |"
    )
    print("| --- | --- | --- | --- | --- |")
    for name in list_models():
        model = create_model(name)
        low, median, high = np.percentile(times[name], [0, 50, 95])
        print(
            f"| {name} | {sum(p.numel() for p in model.parameters()):,} "
            f"| {multiply_adds(model) / 1e6:.1f} M | {sizes[name]:,} "
            f"| {low:.2f} / {median:.2f} / {high:.2f} |"
        )


if __name__ == "__main__":
    main()
