"""Speed of feeding full batches: pupilseg, the earlier project and other loaders, against memcpy.

python -m benchmarks.loader [--samples 256] [--batch-size 64] [--rounds 3] [--write]

A full batch is a float32 image, int64 label, float32 weights and two float32 distance maps:
6.144 MB per sample, shuffled, warm page cache. All loaders take turns, one epoch each, so that a
slow period of the machine affects all of them. Loaders that are not installed are listed with the
command that installs them. On a machine with CUDA, the loader modes for it are measured too.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch

from benchmarks.machine import machine_line
from benchmarks.peers import PEERS, earlier, ffcv
from pupilseg.cli.program import main_program, positive_int
from pupilseg.loader.decode import DECODED, layout_of
from pupilseg.loader.loader import make_loader
from pupilseg.prepare import ensure_shards
from pupilseg.shards import open_shards

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor

    from pupilseg.loader.loader import Loader
    from pupilseg.shards.reader import ShardSet

    Epoch = Callable[[], Iterable[tuple[Tensor, ...]]]

FULL = DECODED[:4]
"""Columns of a full batch, without the 16 bytes of the ellipse."""
LIMIT = "memcpy of the same bytes into a reused buffer, 1 thread (the limit)"
EARLIER = f"{next(iter(PEERS))}, 2 workers"
INSTALL = "pip install 'pupilseg[bench]'"
REPORT = Path(__file__).parents[1] / "docs" / "benchmarks.md"
START, END = "<!-- python -m benchmarks.loader --write -->\n", "<!-- end of benchmarks.loader -->\n"


class Memcpy:
    """Copies the bytes of a batch into a reused buffer, once per batch of an epoch."""

    def __init__(self, samples: int, batch_size: int) -> None:
        self._batches = samples // batch_size
        shapes = [(1, 400, 640), (400, 640), (400, 640), (2, 400, 640)]
        dtypes = [torch.float32, torch.int64, torch.float32, torch.float32]
        self._source, self._buffer = (
            tuple(
                torch.ones((batch_size, *shape), dtype=dtype)
                for shape, dtype in zip(shapes, dtypes, strict=True)
            )
            for _ in range(2)
        )

    def __call__(self) -> Iterator[tuple[Tensor, ...]]:
        """Yields the buffer after each copy."""
        for _ in range(self._batches):
            for buffer, source in zip(self._buffer, self._source, strict=True):
                np.copyto(buffer.numpy(), source.numpy())
            yield self._buffer


def epoch_of(loader: Loader) -> Epoch:
    """Returns an epoch of a pupilseg loader."""
    return lambda: (tuple(getattr(batch, name) for name in FULL) for batch in loader)


def rate(epoch: Epoch, samples: int, device: torch.device) -> float:
    """Returns samples/s of an epoch whose batches are drawn and not used."""
    started = time.perf_counter()
    drawn = sum(len(batch[0]) for batch in epoch())
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    assert drawn == samples, f"{drawn} samples drawn of {samples}"
    return samples / (time.perf_counter() - started)


def checked(name: str, epoch: Epoch, pupil: int | None) -> None:
    """Draws an epoch, as a warm-up, and checks shapes, dtypes and the number of pupil pixels."""
    found = 0
    for image, label, weights, maps in epoch():
        shapes = [tuple(t.shape[1:]) for t in (image, label, weights, maps)]
        dtypes = [t.dtype for t in (image, label, weights, maps)]
        assert shapes == [(1, 400, 640), (400, 640), (400, 640), (2, 400, 640)], (name, shapes)
        assert dtypes == [torch.float32, torch.int64, torch.float32, torch.float32], (name, dtypes)
        found += int(label.sum())
    assert pupil is None or found == pupil, f"{name}: {found} pupil pixels of {pupil}"


def bytes_in(folder: Path) -> int:
    """Returns the bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def peer_epochs(
    shards: ShardSet, args: argparse.Namespace, folder: Path, missing: list[str]
) -> tuple[dict[str, Epoch], dict[str, float]]:
    """Stores the samples as each peer wants them.

    Returns:
        Name -> epoch, and name -> bytes per sample on disk. Those not installed go to `missing`.
    """
    epochs: dict[str, Epoch] = {}
    sizes = {}
    for number, (name, prepare) in enumerate(PEERS.items()):
        own = folder / str(number)
        own.mkdir()
        try:
            make = prepare((shards.sample(i) for i in range(args.samples)), own)
        except ImportError as error:
            hint = "see benchmarks/peers.py" if prepare is ffcv else INSTALL
            missing.append(f"{name}: {error}; {hint}")
            continue
        # The earlier way is by far the slowest: only its usual setting is measured.
        for workers in [2] if prepare is earlier and 2 in args.workers else args.workers:
            title = f"{name}, {_helpers(prepare, workers)}"
            loader = make(args.batch_size, workers)
            epochs[title] = loader.__iter__
            sizes[title] = bytes_in(own) / args.samples
    return epochs, sizes


def _helpers(prepare: object, workers: int) -> str:
    """Describes the workers of a peer."""
    if prepare is ffcv:
        return f"{workers} threads" if workers > 1 else "1 thread"
    return f"{workers} workers" if workers else "no workers"


def table_of(
    shards: ShardSet, args: argparse.Namespace, device: torch.device, folder: Path
) -> list[str]:
    """Measures on the CPU, and on a CUDA device if it has one; returns lines of Markdown."""
    missing: list[str] = []
    packed = bytes_in(shards.directory) / len(shards)
    pupil = sum(int(shards.sample(i)["label"].sum()) for i in range(args.samples))
    epochs: dict[str, Epoch] = {LIMIT: Memcpy(args.samples, args.batch_size)}
    sizes: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        modes: list[tuple[str, dict[str, Any]]] = [
            ("pupilseg, 1 thread, decoding on demand", {"threads": 0}),
            ("pupilseg, 1 thread, one batch ahead", {"threads": 1}),
            ("pupilseg, 2 threads", {"threads": 2}),
        ]
        if device.type == "cuda":
            modes += [
                (f"pupilseg on {device}, {mode}", {"device": device, "mode": mode})
                for mode in ("resident", "stream")
            ]
        for title, options in modes:
            loader = make_loader(
                shards,
                batch_size=args.batch_size,
                shuffle=True,
                columns=FULL,
                limit=args.samples,
                **options,
            )
            epochs[title], sizes[title] = epoch_of(stack.enter_context(loader)), packed
        others, other_sizes = peer_epochs(shards, args, folder, missing)
        epochs, sizes = epochs | others, sizes | other_sizes
        for name, epoch in epochs.items():
            checked(name, epoch, None if name == LIMIT else pupil)
        rates: dict[str, list[float]] = {name: [] for name in epochs}
        for _ in range(args.rounds):
            for name, epoch in epochs.items():
                if name not in others:
                    # Peers fork workers, after which this process copies each page at its next
                    # write. An extra epoch does this before the timed one.
                    rate(epoch, args.samples, device)
                rates[name].append(rate(epoch, args.samples, device))
    lines = [
        "| loader | samples/s, best (median) | of memcpy | x earlier project | bytes per sample |",
        "| --- | --- | --- | --- | --- |",
    ]
    best = {name: max(found) for name, found in rates.items()}
    for name, all_rates in rates.items():
        factor = f"{best[name] / best[EARLIER]:.1f}" if EARLIER in best else "-"
        size = f"{sizes[name]:,.0f}" if name in sizes else "-"
        lines.append(
            f"| {name} | {best[name]:,.0f} ({statistics.median(all_rates):,.0f}) "
            f"| {best[name] / best[LIMIT]:.2f} | {factor} | {size} |"
        )
    return [*lines, *("\nNot installed: " + line for line in missing)]


def device_speeds(
    shards: ShardSet, batch_size: int, batches: int, device: str = "cuda"
) -> dict[str, float]:
    """Returns bytes/s on a CUDA device.

    Returns:
        "resident" and "device copy": bytes read and written in the device's memory.
        "stream" and "pinned copy": encoded bytes over the bus, batch by batch.
    """
    layout = layout_of(shards, FULL)
    packed = layout.row_bytes * batch_size
    target = torch.device(device)
    host = torch.empty(packed, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(packed, dtype=torch.uint8, device=target)
    full = 6_144_000 * batch_size
    one, other = (torch.empty(full, dtype=torch.uint8, device=target) for _ in range(2))
    epochs = -(-batches * batch_size // (len(shards) // batch_size * batch_size))

    def drain(loader: Loader) -> None:
        for _ in range(epochs):
            for _ in loader:
                pass

    with contextlib.ExitStack() as stack:
        loaders = {
            mode: stack.enter_context(
                make_loader(
                    shards,
                    batch_size=batch_size,
                    shuffle=True,
                    drop_last=True,
                    columns=FULL,
                    device=target,
                    mode=mode,
                )
            )
            for mode in ("resident", "stream")
        }
        count = epochs * len(loaders["resident"])
        work: dict[str, tuple[Callable[[], object], int]] = {
            "resident": (lambda: drain(loaders["resident"]), count * (packed + full)),
            "device copy": (lambda: [one.copy_(other) for _ in range(count)], count * 2 * full),
            "stream": (lambda: drain(loaders["stream"]), count * packed),
            "pinned copy": (
                lambda: [there.copy_(host, non_blocking=True) for _ in range(count)],
                count * packed,
            ),
        }
        found = dict.fromkeys(work, 0.0)
        for turn in range(4):
            for name, (call, moved) in work.items():
                torch.cuda.synchronize(target)
                started = time.perf_counter()
                call()
                torch.cuda.synchronize(target)
                if turn:  # the first turn compiles
                    found[name] = max(found[name], moved / (time.perf_counter() - started))
        return found


def write(lines: list[str]) -> None:
    """Replaces the table that an earlier run wrote to docs/benchmarks.md."""
    text = REPORT.read_text(encoding="utf-8")
    before, rest = text.split(START)
    _, after = rest.split(END)
    REPORT.write_text(f"{before}{START}{chr(10).join(lines)}\n{END}{after}", encoding="utf-8")


def main() -> None:
    """Parses the command line, measures, prints and writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=__doc__)
    parser.add_argument("--samples", type=positive_int, default=256)
    parser.add_argument("--batch-size", type=positive_int, default=64)
    parser.add_argument("--rounds", type=positive_int, default=3)
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[0, 2], help="worker processes of other loaders"
    )
    parser.add_argument(
        "--write", action="store_true", help="write the table to docs/benchmarks.md"
    )
    parser.add_argument("--data-dir", type=Path, help="keep the rendered eyes here for later runs")
    args = parser.parse_args()
    args.samples -= args.samples % args.batch_size
    if not args.samples:
        parser.error(f"--samples must be at least --batch-size, {args.batch_size}")
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as temporary:
        # A fifth of the rendered frames is validation data.
        directory = ensure_shards(
            args.data_dir or Path(temporary) / "eyes",
            f"synthetic:{-(-args.samples * 5 // 4)}",
            progress=False,
        )
        with open_shards(directory / "train") as shards:
            lines = [
                f"{machine_line('torch', 'numpy', 'cv2', 'datasets')}; {args.samples} "
                f"rendered eyes, batch {args.batch_size}, {args.rounds} rounds in turn:\n",
                *table_of(shards, args, device, Path(temporary)),
            ]
            if device.type == "cuda":
                speeds = device_speeds(shards, args.batch_size, 100)
                lines.append(f"\n{torch.cuda.get_device_name(device)}, GB/s: ")
                lines += [f"- {name}: {speed / 1e9:.1f}" for name, speed in speeds.items()]
    print("\n".join(lines))
    if args.write:
        write(lines)


if __name__ == "__main__":
    main_program(main)
