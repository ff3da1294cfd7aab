"""Speed of writing shards: frames/s of a split, time per step, and the earlier method.

python -m benchmarks.materialize [--frames 1024] [--rounds 3]

The data are 64 rendered eyes, stored repeatedly in an OpenEDS folder. For each frame, the earlier
method computes the same targets as RITnet and the author of the data set: Canny and dilation, four
exact distance transforms with SciPy, and `cv2.fitEllipse`. It then writes the rows to parquet as
lists. The methods take turns, so that slow periods of the machine affect all of them.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.ndimage import distance_transform_edt

from benchmarks.machine import machine_line
from pupilseg import maps
from pupilseg.files import file_digest
from pupilseg.sample import check_sample
from pupilseg.shards import open_shards, verify, write_shards
from pupilseg.shards.codec import FrameDecoder
from pupilseg.shards.columns import ShardColumns
from pupilseg.sources import download, open_dataset
from pupilseg.synthetic import render

if TYPE_CHECKING:
    from collections.abc import Callable

    from pupilseg.sources import Dataset, Sample

FLOAT_BYTES = 400 * 640 * (1 + 1 + 4 + 8)
"""Bytes per sample of the earlier method: image, label, float32 weights, two float32 maps."""


def write_folder(root: Path, frames: int, different: int) -> None:
    """Writes an OpenEDS folder of rendered frames, each stored several times with new names."""
    for number in range(different):
        eye = render(number)
        encoded = cv2.imencode(".png", eye.image)[1].tobytes()
        for split, count in (("train", frames), ("validation", 1)):
            for index in range(number, count, different):
                for kind in ("images", "labels"):
                    (root / split / kind).mkdir(parents=True, exist_ok=True)
                (root / split / "images" / f"{index:06d}.png").write_bytes(encoded)
                np.save(root / split / "labels" / f"{index:06d}.npy", eye.classes)


def earlier_maps(sample: Sample) -> tuple[np.ndarray, np.ndarray, tuple]:
    """Returns weights, both distance maps and an ellipse, computed with the earlier method."""
    weights = cv2.dilate(cv2.Canny(sample.label * 255, 0, 3), (3, 3)) / 255 * 20
    both = []
    for cls in (0, 1):
        inside = sample.label == cls
        outside = ~inside
        # RITnet, utils.py: one_hot2dist
        both.append(
            distance_transform_edt(outside) * outside
            - (distance_transform_edt(inside) - 1) * inside
        )
    contours, _ = cv2.findContours(sample.label, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    longest = max(contours, key=len, default=())
    ellipse = cv2.fitEllipse(longest) if len(longest) >= 5 else ()
    scaled = np.stack(both) / maps.DIAGONAL
    return weights.astype(np.float32), scaled.astype(np.float32), ellipse


def earlier_parquet(path: Path, samples: list[Sample]) -> None:
    """Writes parquet rows of flat Arrow lists, as in revision B, without Python lists."""
    rows = [(s.image, s.label, *earlier_maps(s)[:2]) for s in samples]
    columns = {}
    for place, name in enumerate(("image", "label", "spatial_weights", "dist_map")):
        values = np.concatenate([row[place].reshape(-1) for row in rows])
        offsets = np.arange(len(rows) + 1, dtype=np.int32) * (len(values) // len(rows))
        columns[name] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
    pq.write_table(pa.table(columns), path)


def build(dataset: Dataset, out: Path, workers: int) -> None:
    """Writes the shards of a split to a new directory, as `pipeline.materialize` does."""
    with tempfile.TemporaryDirectory(dir=out) as folder:
        write_shards(dataset, "train", Path(folder), workers=workers, progress=False)


def parts(dataset: Dataset, shards_dir: Path, count: int) -> dict[str, Callable[[], object]]:
    """Returns the steps of building shards by name, each for `count` frames."""
    samples = list(dataset.read("train", 0, count))
    with open_shards(shards_dir) as shards:
        stored = [shards.shards[0].row(row) for row in range(count)]
        path = shards.shards[0].path
    decoder, out = FrameDecoder(), np.empty((2, 400, 640), np.float32)

    def pack() -> None:
        columns = ShardColumns(count)
        for sample in samples:
            columns.append(sample, sample.image)

    return {
        "read PNG and label": lambda: list(dataset.read("train", 0, count)),
        "check": lambda: [check_sample(sample) for sample in samples],
        "u^2": lambda: [maps.squared_distance(sample.label) for sample in samples],
        "weights": lambda: [maps.spatial_weights(sample.label) for sample in samples],
        "u^2, weights, ellipses, pack, decode to compare": pack,
        "digest of a shard": lambda: file_digest(path),
        "decode distance maps": lambda: [
            decoder.distances(row["dist_map"], row["dist_map_first"], row["label"], out)
            for row in stored
        ],
    }


def peak_memory(raw: Path, out: Path) -> tuple[float, float]:
    """Builds with two workers; returns peak resident MB of this process and of a worker."""
    build(open_dataset(raw), out, 2)
    status = Path("/proc/self/status").read_text()  # ru_maxrss includes the parent's
    own = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return int(own.split()[1]) / 1024, worker / 1024


def main() -> None:
    """Measures and prints Markdown tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.materialize", description=__doc__)
    parser.add_argument("--frames", type=int, default=1024, help="frames in the split (1024)")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds (3)")
    parser.add_argument("--dir", type=Path, help="output folder (default: the temporary folder)")
    parser.add_argument("--different", type=int, default=64, help="number of different frames (64)")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    different = min(args.different, args.frames, 64)  # samples of a shard
    frames = args.frames
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        root = Path(folder)
        write_folder(root / "eyes", frames, different)
        download(str(root / "eyes"), root / "raw")
        dataset = open_dataset(root / "raw")
        few = list(dataset.read("train", 0, different))
        work: dict[str, tuple[int, Callable[[], object]]] = {
            "earlier way: read, maps": (
                different,
                lambda: [earlier_maps(s) for s in dataset.read("train", 0, different)],
            ),
            "earlier way: read, maps, parquet": (
                different,
                lambda: earlier_parquet(
                    root / "x.parquet", list(dataset.read("train", 0, different))
                ),
            ),
            "shards, 1 process": (frames, partial(build, dataset, root, 1)),
            "shards, 2 processes": (frames, partial(build, dataset, root, 2)),
        }
        times = measure(work, args.rounds)
        base = np.array(times["earlier way: read, maps"])
        print(machine_line("numpy", "scipy", "cv2", "pyarrow"))
        print(f"{frames} frames, {different} different; n = {args.rounds} rounds\n")
        print("| way | frames/s: median (min to max) | x the earlier way's maps |")
        print("| --- | --- | --- |")
        for name, found in times.items():
            rate, ratio = 1 / np.array(found), base / np.array(found)
            print(
                f"| {name} | {np.median(rate):.1f} ({rate.min():.1f} to {rate.max():.1f}) | "
                f"{np.median(ratio):.1f} ({ratio.min():.1f} to {ratio.max():.1f}) |"
            )
        manifest = write_shards(dataset, "train", root / "train", progress=False)
        size = sum(entry["bytes"] for entry in manifest["files"])
        costs = parts(dataset, root / "train", different)
        spent = measure({name: (different, call) for name, call in costs.items()}, 5 * args.rounds)
        alone = measure({"four": (different, lambda: [earlier_maps(s) for s in few])}, args.rounds)
        print("\n| part, one core | ms per frame: min / median |")
        print("| --- | --- |")
        for name, found in (*spent.items(), ("earlier way, maps alone", alone["four"])):
            print(f"| {name} | {1e3 * min(found):.2f} / {1e3 * np.median(found):.2f} |")
        pack = min(spent["u^2, weights, ellipses, pack, decode to compare"])
        unpack = min(spent["decode distance maps"])
        checked = measure({"verify": (frames, lambda: verify(root / "train"))}, args.rounds)
        print(
            f"\n{size / frames:,.0f} bytes per sample on disk, {FLOAT_BYTES:,} as float32; encode "
            f"{FLOAT_BYTES / pack / 1e9:.2f} GB/s, decode of distance maps "
            f"{8 * 400 * 640 / unpack / 1e9:.2f} GB/s (of decoded bytes, one core); verify "
            f"{1 / min(checked['verify']):.0f} frames/s"
        )
        with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
            own, worker = fresh.submit(peak_memory, root / "raw", root).result()
        print(
            f"peak memory of a run with 2 processes: {own:.0f} MB in the first, {worker:.0f} MB in "
            "the larger worker"
        )


def measure(
    work: dict[str, tuple[int, Callable[[], object]]], rounds: int
) -> dict[str, list[float]]:
    """Returns the seconds per frame of each round, alternating, after an untimed round."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(rounds + 1):
        for name, (frames, call) in work.items():
            started = time.perf_counter()
            call()
            if turn:
                times[name].append((time.perf_counter() - started) / frames)
    return times


if __name__ == "__main__":
    main()
