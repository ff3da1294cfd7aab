"""Statistics of near-infrared eye frames, computed only from pixels and labels.

They can be computed for rendered and for recorded frames, to compare their ranges.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import cv2
import numpy as np

from pupilseg.geometry import ellipse_from_mask, ellipse_mask

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pupilseg.geometry import Ellipse

    Image = NDArray[np.uint8]
    Mask = NDArray[np.bool_]
    Profile = NDArray[np.floating]

SCLERA, IRIS, PUPIL = 1, 2, 3
SATURATED = 250
LEAST_PX = 300
"""Classes with fewer pixels are not measured."""
RING_PERIODS = (6.6, 8.2)
"""Range of periods of lens rings, px."""
BLOCK = 64
"""Side of the squares whose spectrum is computed, px."""
STEPS = np.arange(-10, 12.01, 0.25)
"""Positions of the profile across the pupil's edge, px along its normal."""


def grown(mask: Mask, px: int) -> Mask:
    """Returns the mask dilated by `px`."""
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * px + 1, 2 * px + 1))
    return np.asarray(cv2.dilate(mask.astype(np.uint8), kernel) > 0)


def radius(ellipse: Ellipse) -> float:
    """Returns the radius of a disc with the same area."""
    return math.sqrt(ellipse.semi_axis_a_px * ellipse.semi_axis_b_px)


def spots(image: Image, where: Mask) -> list[tuple[int, Mask]]:
    """Returns area and mask of every saturated spot of at least 5 px in `where`."""
    bright = ((image >= SATURATED) & where).astype(np.uint8)
    count, parts, stats, _ = cv2.connectedComponentsWithStats(bright)
    return [
        (int(stats[k, cv2.CC_STAT_AREA]), parts == k)
        for k in range(1, count)
        if stats[k, cv2.CC_STAT_AREA] >= 5
    ]


def noise_slope(image: Image, where: Mask) -> float:
    """Returns the variance of the noise divided by the gray level, in smooth parts of `where`.

    The second difference in both directions (Immerkaer, 1996) is zero on planes. Only the half of
    all 16 px squares with the smallest values is used, because they contain no hairs.
    """
    kernel = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
    response = cv2.filter2D(image.astype(np.float32), cv2.CV_32F, kernel) ** 2 / 36
    slopes = []
    for top in range(0, image.shape[0] - 15, 16):
        for left in range(0, image.shape[1] - 15, 16):
            square = np.s_[top : top + 16, left : left + 16]
            if where[square].all() and image[square].max() < SATURATED:
                slopes.append(float(response[square].mean() / image[square].mean()))
    # The lower half of values with a relative deviation of 1/12 has 0.93 times their mean.
    slopes.sort()
    return float(np.mean(slopes[: len(slopes) // 2]) / 0.93) if len(slopes) > 7 else math.nan


def ring_amplitude(image: Image, where: Mask) -> float:
    """Returns the largest amplitude, in gray levels, of a wave with the period of lens rings.

    In frames without rings, noise gives 0.5 to 1.
    """
    window = np.outer(np.hanning(BLOCK), np.hanning(BLOCK))
    rate = np.fft.fftfreq(BLOCK)
    frequency = np.hypot(rate[:, None], rate[None, :])
    band = (frequency > 1 / RING_PERIODS[1]) & (frequency < 1 / RING_PERIODS[0])
    best = math.nan
    for top in range(0, image.shape[0] - BLOCK + 1, BLOCK // 2):
        for left in range(0, image.shape[1] - BLOCK + 1, BLOCK // 2):
            square = np.s_[top : top + BLOCK, left : left + BLOCK]
            if where[square].mean() > 0.98:
                part = image[square].astype(np.float64)
                spectrum = np.abs(np.fft.fft2((part - part.mean()) * window))
                best = np.fmax(best, 2 * spectrum[band].max() / window.sum())
    return float(best)


def border(image: Image, pupil_level: float) -> Mask:
    """Returns the areas darker than the pupil that touch the edge of the frame."""
    dark = (cv2.blur(image, (9, 9)) < pupil_level - 4).astype(np.uint8)
    _, parts = cv2.connectedComponents(dark)
    at_edge = np.unique(np.concatenate([parts[0], parts[-1], parts[:, 0], parts[:, -1]]))
    return np.isin(parts, at_edge[at_edge > 0])


def lash_density(image: Image, classes: Image) -> float:
    """Returns the share of dark strokes within 40 px above the upper lid."""
    open_ = classes > 0
    columns = np.flatnonzero(open_.sum(axis=0) > 20)
    if len(columns) < 40:
        return math.nan
    top = open_[:, columns].argmax(axis=0)
    rows = np.arange(image.shape[0])[:, None]
    band = (rows < top - 3) & (rows >= top - 43)
    hat = cv2.morphologyEx(image, cv2.MORPH_BLACKHAT, np.ones((15, 15), np.uint8))[:, columns]
    level = cv2.morphologyEx(image, cv2.MORPH_CLOSE, np.ones((15, 15), np.uint8))[:, columns]
    return float(np.mean((hat > 0.2 * level.astype(np.float32) + 4)[band]))


def edge_profile(image: Image, classes: Image) -> Profile | None:
    """Returns the mean gray level across the pupil's edge at `STEPS`; None if the edge is hidden.

    Each of 360 profiles is aligned with the label's edge, so that a ragged edge stays sharp.
    Profiles that touch a lid or a reflection are left out.
    """
    mask = classes == PUPIL
    ring = grown(mask, 1) & ~mask
    ellipse = ellipse_from_mask(mask.astype(np.uint8))
    if ellipse is None or mask.sum() < LEAST_PX or not np.all(classes[ring] == IRIS):
        return None
    angle = np.linspace(0, 2 * math.pi, 360, endpoint=False)
    turn, a, b = ellipse.angle_rad, ellipse.semi_axis_a_px, ellipse.semi_axis_b_px
    cos, sin = np.cos(angle), np.sin(angle)
    normal = np.stack([cos / a, sin / b]) / np.hypot(cos / a, sin / b)
    points = np.stack([a * cos, b * sin])[:, :, None] + normal[:, :, None] * STEPS
    x = ellipse.center_x_px + math.cos(turn) * points[0] - math.sin(turn) * points[1]
    y = ellipse.center_y_px + math.sin(turn) * points[0] + math.cos(turn) * points[1]
    gray, inside, iris = (
        cv2.remap(layer.astype(np.float32), x.astype(np.float32), y.astype(np.float32), 1)
        for layer in (image, mask, classes >= IRIS)
    )
    kept = (iris.min(axis=1) >= 1) & (gray.max(axis=1) < np.median(image[mask]) + 90)
    if kept.sum() < 120:
        return None
    edge = inside.sum(axis=1) * 0.25 + STEPS[0] - 0.125
    rows = zip(edge[kept], gray[kept], strict=True)
    aligned = [np.interp(STEPS, STEPS - at, row) for at, row in rows]
    return np.asarray(np.mean(aligned, axis=0))


def edge_offset(profile: Profile) -> float:
    """Returns the distance from the label's edge to the halfway gray level, px."""
    low, high = profile[STEPS < -4].mean(), profile[(STEPS > 2) & (STEPS < 4)].mean()
    if high - low < 12:
        return math.nan
    half = (low + high) / 2
    at = np.flatnonzero((profile[:-1] < half) & (profile[1:] >= half))
    if len(at) == 0:
        return math.nan
    k = at[np.abs(STEPS[at]).argmin()]
    return float(STEPS[k] + 0.25 * (half - profile[k]) / (profile[k + 1] - profile[k]))


def edge_width(profile: Profile) -> float:
    """Returns the distance over which the level rises from 20 to 80 % of the step, px."""
    low, high = profile[STEPS < -4].mean(), profile[(STEPS > 2) & (STEPS < 4)].mean()
    rise = (profile - low) / max(high - low, 1e-3)
    return float(STEPS[(rise > 0.8).argmax()] - STEPS[(rise > 0.2).argmax()])


def measure(image: Image, classes: Image) -> dict[str, float]:
    """Returns the statistics of an open eye; NaN if one cannot be measured.

    Args:
        image: uint8 (400, 640), as captured.
        classes: uint8 (400, 640) of {0, 1, 2, 3}.
    """
    values: dict[str, float] = {}
    open_, pupil = classes > 0, classes == PUPIL
    glints = spots(image, open_)
    halo = grown((image >= SATURATED) & open_, 5)
    near = grown(open_, 70)
    for name, mask in (
        ("pupil gray", pupil),
        ("iris gray", classes == IRIS),
        ("sclera gray", classes == SCLERA),
        ("skin gray", near & ~grown(open_, 8)),
    ):
        free = mask & ~halo
        share = 75 if name == "skin gray" else 50
        values[name] = (
            float(np.percentile(image[free], share)) if free.sum() > LEAST_PX else math.nan
        )
    pupil_level = values["pupil gray"]
    iris = (classes == IRIS) & ~grown(classes < IRIS, 5) & ~grown(pupil, 4) & ~halo
    values["iris texture std"] = float(image[iris].std()) if iris.sum() > 1500 else math.nan
    values["glints"] = len(glints)
    values["glints on the pupil"] = sum(bool((mask & pupil).any()) for _, mask in glints)
    values["glint area px"] = float(np.median([area for area, _ in glints])) if glints else math.nan
    lit = ~near
    values["noise variance / gray"] = noise_slope(image, lit & (image > 60))
    values["ring amplitude"] = ring_amplitude(image, lit & (image > 45))
    if not math.isnan(pupil_level):
        dark = border(image, pupil_level)
        values["border share of frame"] = float(dark.mean())
        big = dark.mean() > 0.01
        values["border gray below pupil"] = (
            pupil_level - float(np.median(image[dark])) if big else math.nan
        )
        values["border flatness std"] = (
            float(cv2.blur(image, (9, 9))[~grown(~dark, 8)].std()) if big else math.nan
        )
    values["saturated skin share"] = float(np.mean(image[lit] >= SATURATED)) if lit.any() else 0.0
    values["lash density"] = lash_density(image, classes)
    profile = edge_profile(image, classes)
    if profile is not None:
        values["edge step"] = float(profile[(STEPS > 2) & (STEPS < 6)].mean() - profile[:24].mean())
        values["edge width px"] = edge_width(profile)
        values["edge offset px"] = edge_offset(profile)
    return values


def visible_share(classes: Image, iris: Ellipse) -> float:
    """Returns the visible share of the iris, including the pupil."""
    return float((classes >= IRIS).sum() / (math.pi * iris.semi_axis_a_px * iris.semi_axis_b_px))


def is_cut(classes: Image, whole: Ellipse) -> bool:
    """Returns True if a lid covers part of the pupil."""
    return bool((classes == PUPIL).sum() < 0.97 * ellipse_mask(whole).sum())
