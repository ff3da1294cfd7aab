"""Measures prediction time per frame, end to end and for the network alone."""

from __future__ import annotations

import platform
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pupilseg.predict.predictor import Predictor
from pupilseg.synthetic import render

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

FRAMES = 8
"""Number of rendered eyes that the calls cycle through."""


def machine() -> str:
    """Returns the processor and the operating system as one line of text."""
    name = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        if models:
            name = f"{models[0]}, {len(models)} logical processors"
    return f"{name or platform.machine()}, {platform.system()}"


def measure(
    model: str | os.PathLike[str], *, threads: int = 1, repeats: int = 200, warmup: int = 20
) -> dict[str, Any]:
    """Times a model on rendered eyes of 400 x 640 pixels, one frame per call, without decoding.

    Args:
        model: an ONNX file, or the name of released weights.
        threads: number of ONNX Runtime threads.
        repeats: number of timed calls.
        warmup: number of untimed calls that come first.

    Returns:
        A dictionary with total_median_ms and total_p95_ms (preprocessing, network, blob, ellipse
        and confidence), network_median_ms and network_p95_ms, threads, repeats, machine.

    Raises:
        PupilSegError: the errors of `Predictor`.
    """
    predictor = Predictor(model, threads)
    frames = [render(index).image for index in range(FRAMES)]
    stacked = [frame[None] for frame in frames]
    total: list[float] = []
    network: list[float] = []
    # The two alternate so that a slow phase of the machine affects both.
    for index in range(warmup + repeats):
        which = index % FRAMES
        total.append(_milliseconds(partial(predictor, frames[which])))
        network.append(_milliseconds(partial(predictor.network, stacked[which])))
    total, network = total[warmup:], network[warmup:]
    return {
        "total_median_ms": float(np.median(total)),
        "total_p95_ms": float(np.quantile(total, 0.95)),
        "network_median_ms": float(np.median(network)),
        "network_p95_ms": float(np.quantile(network, 0.95)),
        "threads": threads,
        "repeats": repeats,
        "machine": machine(),
    }


def _milliseconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - started)
