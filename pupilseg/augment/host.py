"""Applies a plan frame by frame on the CPU, with OpenCV: what `dense` does, at a tenth of the cost.

A frame pays only for the parts that it drew. Frames are shared out to as many threads as torch may
use; OpenCV and NumPy release the GIL. Scratch arrays live as long as their thread, because fresh
ones cost more in page faults than the work done in them.
"""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch

from pupilseg.augment.dense import LIFT, mirrored_center
from pupilseg.augment.plan import BLUR_RADIUS, LARGEST, PIXELS, Plan, noise_field
from pupilseg.augment.targets import TargetMaker
from pupilseg.geometry import HEIGHT, WIDTH

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from pupilseg.augment.config import AugmentConfig
    from pupilseg.loader.loader import Batch

    Field = NDArray[np.float32]
    Columns = dict[str, NDArray[Any]]

TARGETS = ("label", "spatial_weights", "dist_map", "ellipse")
TAPS = 2 * BLUR_RADIUS + 1


def augment_on_host(batch: Batch, plan: Plan, config: AugmentConfig) -> Batch:
    """Returns the augmented batch; see `dense.augment_dense`, whose result it is within 1e-5.

    Labels are the same but for pixels whose interpolated value is within 1e-3 of 1/2; the targets
    are always those of the label.

    Args:
        batch: on the CPU; not written to.
        plan: on the CPU.
        config: says which parts are on; strengths are in the plan.
    """
    drawn = [dict(zip(Plan._fields, row, strict=True)) for row in zip(*_rows(plan), strict=True)]
    changed = ["image"] if config.toned or config.noise else []
    if any(d["flip"] or d["moved"] for d in drawn):
        changed = ["image", *TARGETS]
    elif any(max(d["glow"]) or d["sigma"] for d in drawn):
        changed = ["image"]
    filled = [name for name in changed if getattr(batch, name).numel()]
    out = {name: torch.empty_like(getattr(batch, name)) for name in filled}
    if "ellipse" in out:
        mirrored = torch.stack([mirrored_center(batch.ellipse), *batch.ellipse.T[1:]], dim=1)
        out["ellipse"] = torch.where(plan.flip[:, None], mirrored, batch.ellipse)
    old: Columns = {name: getattr(batch, name).numpy() for name in out}
    new: Columns = {name: tensor.numpy() for name, tensor in out.items()}

    def frame(row: int) -> None:
        before = {name: column[row] for name, column in old.items()}
        after = {name: column[row] for name, column in new.items()}
        _scratch.worker.frame(before, after, drawn[row], config)

    if changed:
        _for_each(frame, len(batch))
    return replace(batch, **out)


def _rows(plan: Plan) -> list[list[Any]]:
    """Returns the plan's columns as lists; small arrays where a frame has several values."""
    return [list(v.numpy()) if v.ndim > 1 else v.tolist() for v in plan]


def _for_each(work: Callable[[int], None], count: int) -> None:
    """Calls `work` with 0 .. count - 1, shared out to as many threads as torch may use."""
    workers = min(torch.get_num_threads(), count)
    if workers < 2:
        for number in range(count):
            work(number)
    else:
        list(_pool(workers).map(work, range(count)))


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="augment")


class _Worker:
    """Augments single frames; keeps its scratch, so one object serves one thread."""

    def __init__(self) -> None:
        self._plane = np.empty((HEIGHT, WIDTH), np.float32)
        self._scaled = np.empty(round(LARGEST**2 * PIXELS), np.float32)
        self._targets = TargetMaker()
        self._x = np.arange(WIDTH, dtype=np.float32)
        self._y = np.arange(HEIGHT, dtype=np.float32)[:, None]

    def frame(
        self, old: Columns, new: Columns, drawn: dict[str, Any], config: AugmentConfig
    ) -> None:
        """Writes the columns of one frame.

        Args:
            old: column -> array, as it was.
            new: column -> array to be written; the ellipse already flipped.
            drawn: the frame's row of the plan.
            config: says which parts are on.
        """
        image = new["image"][0]
        if drawn["moved"]:
            self._warp(_faced(old["image"][0], drawn), image, drawn, drawn["border"])
            if "label" in new:
                self._move_targets(old["label"], new, drawn)
        else:
            np.copyto(image, _faced(old["image"][0], drawn))
            for name in TARGETS[:-1]:
                if name in new:
                    np.copyto(new[name], _faced(old[name], drawn))
        if max(drawn["glow"]) > 0:
            self._add_streaks(image, drawn)
        if drawn["sigma"] > 0:
            size, border = (TAPS, TAPS), cv2.BORDER_REPLICATE
            cv2.GaussianBlur(image, size, drawn["sigma"], dst=image, borderType=border)
        if config.toned:
            self._tone(image, drawn, config)
        if config.noise:
            self._add_noise(image, drawn)
        if config.toned or config.noise:
            np.clip(image, -1, 1, out=image)

    def _warp(self, source: Field, out: Field, drawn: dict[str, Any], border: float) -> None:
        """Scales and shifts a plane; `dense.warp` is the same in torch."""
        width, height, left, top = (drawn[name] for name in ("width", "height", "left", "top"))
        scaled = self._scaled[: width * height].reshape(height, width)
        cv2.resize(source, (width, height), dst=scaled, interpolation=cv2.INTER_LINEAR)
        rows = slice(max(top, 0), min(top + height, HEIGHT))
        columns = slice(max(left, 0), min(left + width, WIDTH))
        if (rows.stop - rows.start, columns.stop - columns.start) != (HEIGHT, WIDTH):
            out.fill(border)
        out[rows, columns] = scaled[
            rows.start - top : rows.stop - top, columns.start - left : columns.stop - left
        ]

    def _move_targets(self, label: NDArray[Any], new: Columns, drawn: dict[str, Any]) -> None:
        source = self._plane
        np.copyto(source, _faced(label, drawn))
        moved = self._targets.level
        self._warp(source, moved, drawn, 0.0)
        self._targets.write(moved > 0.5, new)

    def _add_streaks(self, image: Field, drawn: dict[str, Any]) -> None:
        """Adds each streak within its bounding box; beyond it there is no light."""
        for k in np.flatnonzero(drawn["glow"]):
            ray, thickness, length = drawn["ray"][k], drawn["thickness"][k], drawn["length"][k]
            near = drawn["source"] + drawn["start"][k] * ray
            ends = np.stack([near, near + length * ray])
            low = np.floor(ends.min(axis=0) - thickness).astype(int).clip(0)
            high = np.ceil(ends.max(axis=0) + thickness).astype(int).clip(0) + 1
            box = np.s_[low[1] : high[1], low[0] : high[0]]
            x = self._x[low[0] : high[0]] - drawn["source"][0]
            y = self._y[low[1] : high[1]] - drawn["source"][1]
            along = x * ray[0] + (y * ray[1] - drawn["start"][k])
            across = np.abs(y * ray[0] - x * ray[1])
            across /= -thickness
            across += 1
            fade = along / -length
            fade += 1
            np.minimum(fade, along, out=fade)
            np.clip(fade, 0, 1, out=fade)
            fade *= np.maximum(across, 0, out=across)
            fade *= drawn["glow"][k]
            image[box] += fade
        np.minimum(image, 1, out=image)

    def _tone(self, image: Field, drawn: dict[str, Any], config: AugmentConfig) -> None:
        gamma, gain, offset = drawn["gamma"], drawn["gain"], drawn["offset"]
        if config.gamma:
            image += LIFT
            cv2.log(image, dst=image)
            image *= gamma
            image += math.log(2 * gain) - gamma * math.log(2)
            cv2.exp(image, dst=image)
            image += offset - 1
        else:
            image *= gain
            image += gain + offset - 1

    def _add_noise(self, image: Field, drawn: dict[str, Any]) -> None:
        at = drawn["noise_at"]
        window = noise_field(torch.device("cpu")).numpy()[at : at + PIXELS].reshape(HEIGHT, WIDTH)
        noise = np.multiply(image, 0.25 * drawn["noise"], out=self._plane)
        noise += 0.75 * drawn["noise"]
        noise *= window
        image += noise


def _faced(array: NDArray[Any], drawn: dict[str, Any]) -> NDArray[Any]:
    """Returns the array, mirrored if the frame drew a flip: a view."""
    return array[..., ::-1] if drawn["flip"] else array


class _Scratch(threading.local):
    """One worker a thread."""

    def __init__(self) -> None:
        self.worker = _Worker()


_scratch = _Scratch()
