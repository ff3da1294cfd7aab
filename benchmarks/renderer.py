"""Measures the renderer: frames per second, and statistics of its frames next to real ones.

python -m benchmarks.renderer [--frames 400] [--seed 3] [--speed 200] [--sheet FILE.png]

The target ranges were measured on frames of OpenEDS (docs/renderer.md). Each row of the table gives
the 5th percentile, the median and the 95th percentile over open eyes in raw frames.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import NamedTuple

import cv2
import numpy as np

from benchmarks.eye_statistics import is_cut, measure, radius, visible_share
from benchmarks.machine import machine_line
from pupilseg.synthetic import RENDERER_VERSION, eye_of, render

GRAY_LEVELS = {
    "pupil gray": "33 to 39",
    "iris gray": "53 to 88",
    "sclera gray": "65 to 103",
    "skin gray": "100 to 164",
    "edge step": "15 to 90",
    "iris texture std": "6 to 19",
    "noise variance / gray": "0.10",
}
SIZES = {
    "pupil radius px": "22 to 62",
    "iris radius px": "84 to 161",
    "visible iris": "0.49 to 0.98",
    "opening height px": "85 to 185",
    "opening width px": "300 to 400",
    "pupil off the iris center": "slightly off-center",
    "pupil's axes, short / long": "off-axis",
    "edge offset px": "0 within 0.1",
    "edge width px": "slight blur",
}
FRONT = {
    "glints": "3 to 16",
    "glint area px": "5 to 70",
    "glints on the pupil": "0 to 3",
    "lash density": "0.02 to 0.27",
    "ring amplitude": "2 to 6",
    "border share of frame": "up to 0.17",
    "border gray below pupil": "11",
    "border flatness std": "flat",
    "saturated skin share": "up to saturated",
}
SHARES = {
    "closed": "blinks",
    "cut": "1 in 15 cut by a lid",
    "spectacles": "1 in 7",
    "border": "-",
    "corners": "-",
    "rings": "-",
    "mascara": "-",
    "scene": "-",
    "enlarged": "-",
    "compressed": "-",
    "bars": "-",
    "raw": "most",
    "clahe": "-",
    "equalized": "-",
    "curve": "-",
    "right side": "half",
}
ONLY_WITH = {"ring amplitude": "rings", "border share of frame": "border"}
"""Statistic -> trait of the frames that it is computed for."""
NOT_AS_CAPTURED = {"bars", "enlarged", "compressed", "scene"}
"""Traits that no frame of OpenEDS has."""


class Measured(NamedTuple):
    """Traits of a frame, and its statistics if the eye is open and the frame raw."""

    traits: frozenset[str]
    values: dict[str, float]


def measure_frame(index: int, seed: int) -> Measured:
    """Renders and measures one frame."""
    cv2.setNumThreads(1)
    frame, eye = render(index, seed), eye_of(index, seed)
    traits = frozenset(frame.traits) | ({"right side"} if eye.pose.side > 0 else set())
    if frame.pupil is None or frame.iris is None:
        return Measured(traits, {})
    if is_cut(frame.classes, frame.pupil):
        traits |= {"cut"}
    pupil, iris, lids = frame.pupil, frame.iris, eye.lids
    values = {}
    if "raw" in traits and not traits & NOT_AS_CAPTURED:
        values = measure(frame.image, frame.classes)
        away = np.hypot(pupil.center_x_px - iris.center_x_px, pupil.center_y_px - iris.center_y_px)
        values |= {
            "pupil radius px": pupil.semi_axis_a_px,
            "iris radius px": iris.semi_axis_a_px,
            "visible iris": visible_share(frame.classes, iris),
            # At scale 1, like the target ranges.
            "opening height px": lids.upper + lids.lower,
            "opening width px": 2 * lids.half_width,
            "pupil off the iris center": away / radius(iris),
            "pupil's axes, short / long": pupil.semi_axis_b_px / pupil.semi_axis_a_px,
        }
    for name, trait in ONLY_WITH.items():
        if trait not in traits:
            values.pop(name, None)
    return Measured(traits, values)


def print_statistics(frames: list[Measured]) -> None:
    """Prints the tables of statistics and of shares."""
    raw = [frame.values for frame in frames if frame.values]
    print(f"\n{len(raw)} of {len(frames)} frames show an open eye as OpenEDS records it:\n")
    print("| statistic | target | rendered: 5 % | median | 95 % |")
    print("| --- | --- | --- | --- | --- |")
    for name, target in (GRAY_LEVELS | SIZES | FRONT).items():
        column = np.array([values.get(name, np.nan) for values in raw])
        low, middle, high = np.nanpercentile(column, [5, 50, 95])
        print(f"| {name} | {target} | {low:.3g} | {middle:.3g} | {high:.3g} |")
    offset = np.nanmean([values.get("edge offset px", np.nan) for values in raw])
    print(f"\nThe drawn edge lies {offset:+.3f} px outside the label's edge on average.\n")
    print("| share of all frames | target | rendered |\n| --- | --- | --- |")
    for name, target in SHARES.items():
        share = np.mean([name in frame.traits for frame in frames])
        print(f"| {name} | {target} | {share:.3f} |")


def frame_time(index: int) -> tuple[float, float]:
    """Returns the wall time and the CPU time of rendering a frame, in seconds."""
    cv2.setNumThreads(1)
    start, start_cpu = time.perf_counter(), time.process_time()
    render(index, 1)
    return time.perf_counter() - start, time.process_time() - start_cpu


def print_speed(frames: int) -> None:
    """Prints ms per frame with one process and frames per second with two."""
    for index in range(5):
        frame_time(index)
    wall, cpu = 1e3 * np.array([frame_time(index) for index in range(frames)]).T
    print(
        f"one process: {np.median(wall):.1f} ms per frame (median), {wall.min():.1f} ms (minimum); "
        f"{cpu.mean():.1f} ms of CPU time (mean), or {2e3 / cpu.mean():.0f} frames per second on "
        "two idle cores"
    )
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        list(pool.map(frame_time, range(8)))  # imports
        start = time.perf_counter()
        list(pool.map(frame_time, range(frames), chunksize=10))
        print(f"two processes: {frames / (time.perf_counter() - start):.1f} frames per second")


def write_sheet(path: str, seed: int) -> None:
    """Writes 24 rendered frames at 40 % of their size, 4 x 6."""
    small = [
        cv2.resize(render(index, seed).image, (256, 160), interpolation=cv2.INTER_AREA)
        for index in range(24)
    ]
    rows = [np.hstack(small[first : first + 6]) for first in range(0, 24, 6)]
    cv2.imwrite(path, np.vstack(rows))


def main() -> None:
    """Runs the requested measurements."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--frames", type=int, default=400, help="frames to measure (%(default)s)")
    parser.add_argument("--seed", type=int, default=3, help="seed of the frames (%(default)s)")
    parser.add_argument("--speed", type=int, default=200, help="frames to time (%(default)s)")
    parser.add_argument("--sheet", metavar="FILE", help="write a sheet of 24 frames as an image")
    args = parser.parse_args()
    print(machine_line("numpy", "cv2"))
    print(f"renderer version {RENDERER_VERSION}, seed {args.seed}")
    if args.sheet:
        write_sheet(args.sheet, args.seed)
    if args.speed:
        print_speed(args.speed)
    if args.frames:
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            work = partial(measure_frame, seed=args.seed)
            print_statistics(list(pool.map(work, range(args.frames), chunksize=10)))


if __name__ == "__main__":
    main()
