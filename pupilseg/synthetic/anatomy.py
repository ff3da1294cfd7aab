"""A random eye as geometry and gray levels: pose, lids, gaze, pupil, iris.

Eye coordinates: the origin is the middle between the eye corners, x points to the outer corner (so
left and right eyes are mirror images), y points down, and the unit is one px at scale 1. Sizes and
shares were measured on near-infrared frames of OpenEDS.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pupilseg.geometry import HEIGHT, WIDTH, Ellipse
from pupilseg.synthetic.fields import smooth_noise
from pupilseg.synthetic.ranges import between

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pupilseg.synthetic.fields import Field

CLOSED_SHARE = 0.05
"""Share of frames with a closed eye."""
SLIT_SHARE = 0.03
"""Share of frames in the middle of a blink."""
CUT_SHARE = 0.14
"""Share of frames in which a lid may cover part of the pupil."""
OBLIQUE_SHARE = 0.12
"""Share of frames with a camera far off the optical axis, like many head-mounted ones."""
TAIL = 3.0
"""Extent of lid curves from the middle, in half-widths: past both borders of any frame."""


class Pose(NamedTuple):
    """Position of the eye in the frame.

    Attributes:
        x_px: column of the middle between the eye corners.
        y_px: row of that point.
        scale: frame px per unit of eye coordinates, 1 to 1.6.
        angle_rad: rotation of the head, from +x toward +y.
        side: 1 if the outer corner is on the right, else -1.
    """

    x_px: float
    y_px: float
    scale: float
    angle_rad: float
    side: int

    def to_frame(self, points: NDArray[np.floating]) -> Field:
        """Returns frame coordinates, float32 (..., 2), of points in eye coordinates."""
        cos, sin = self.scale * math.cos(self.angle_rad), self.scale * math.sin(self.angle_rad)
        x, y = points[..., 0] * self.side, points[..., 1]
        frame = np.stack([self.x_px + cos * x - sin * y, self.y_px + sin * x + cos * y], axis=-1)
        return frame.astype(np.float32)


class Levels(NamedTuple):
    """Gray levels under even light, before the camera's tone curve."""

    border: float
    pupil: float
    iris: float
    sclera: float
    skin: float


class Lids(NamedTuple):
    """The lid opening in eye coordinates; t is -1 at the inner corner and 1 at the outer one."""

    half_width: float
    upper: float
    lower: float
    upper_power: float
    lower_power: float
    skew: float
    tilt: float

    def curves(self, t: NDArray[np.floating], lift: float = 1.0) -> tuple[Field, Field]:
        """Returns y of the upper and of the lower lid at t; `lift` scales their distance.

        Beyond the corners the two curves have crossed, so the eye is not open there.
        """
        inside = np.clip(t, -1, 1)
        bent = inside + self.skew * (1 - inside**2)
        past = np.maximum(np.abs(t) - 1, 0)
        middle = self.tilt * t * self.half_width + 0.18 * self.half_width * past
        gap = np.where(past > 0, 2.0, 0.0)
        up = middle - lift * self.upper * (1 - np.abs(bent) ** self.upper_power) + gap
        low = middle + lift * self.lower * (1 - np.abs(inside) ** self.lower_power) - gap
        return up.astype(np.float32), low.astype(np.float32)


@dataclass(frozen=True, slots=True)
class Eye:
    """One eye in one frame.

    Attributes:
        pose: position in the frame.
        lids: the opening in eye coordinates.
        upper: float32 (640,), row of the upper lid's edge in each column.
        lower: float32 (640,), row of the lower lid's edge; the opening is upper <= y <= lower.
        pupil: the full pupil in frame px, including the part behind a lid.
        iris: the full iris in frame px.
        closed: whether there is no opening.
        levels: gray levels.
    """

    pose: Pose
    lids: Lids
    upper: Field
    lower: Field
    pupil: Ellipse
    iris: Ellipse
    closed: bool
    levels: Levels


def _levels(rng: np.random.Generator) -> Levels:
    pupil = between(rng, 31.5, 39.5, peak=1.5)
    iris = float(np.clip(pupil + 15 + 47 * rng.random() ** 1.35, 52, 96))
    # Before the shading of lids and corners, which darkens the median by a sixth.
    sclera = float(np.clip(iris + between(rng, 9, 44, peak=1.4), 76, 124))
    # In one of six frames, the lamps are close enough to saturate the skin above the eye.
    skin = between(rng, 160, 235) if rng.random() < 1 / 6 else between(rng, 102, 168, peak=1.3)
    skin = max(skin, sclera + 8)
    # Mostly about 11 levels below the pupil; a lens mount that scatters no light is black.
    border = between(rng, 7, 14) if rng.random() < 0.8 else between(rng, 14, pupil)
    return Levels(pupil - border, pupil, iris, sclera, skin)


def _lids(rng: np.random.Generator, opening: float) -> Lids:
    upper = between(rng, 0.52, 0.8)
    return Lids(
        half_width=between(rng, 150, 200),
        upper=opening * upper,
        lower=opening * (1 - upper),
        upper_power=between(rng, 1.6, 2.7),
        lower_power=between(rng, 1.5, 3.6),
        skew=between(rng, -0.22, 0.22, peak=2),
        tilt=between(rng, -0.10, 0.10, peak=2),
    )


def _foreshortened(center: Field, radius: float, ratio: float, direction: float) -> Ellipse:
    """Returns a disc seen at an angle: scaled by `ratio` along `direction`."""
    angle = (direction + math.pi) % math.pi - math.pi / 2
    angle = angle if angle > -math.pi / 2 else math.pi / 2
    return Ellipse(float(center[0]), float(center[1]), radius, radius * ratio, angle)


def sample_eye(rng: np.random.Generator) -> Eye:
    """Returns a random eye: lids, gaze, pupil, iris, pose and gray levels."""
    fate = rng.random()
    closed = bool(fate < CLOSED_SHARE)
    slit = not closed and fate < CLOSED_SHARE + SLIT_SHARE
    opening = between(rng, 20, 80) if slit else between(rng, 88, 186, peak=1.3)
    lids = _lids(rng, opening)
    if closed:
        # The upper lid meets the lower one, which keeps its curve.
        sag = lids.lower * between(rng, 0.2, 1.1)
        lids = lids._replace(upper=-sag, lower=sag, upper_power=2.0, lower_power=2.0, skew=0.0)
    pose = Pose(
        x_px=WIDTH / 2 + between(rng, -75, 75, peak=1.5),
        y_px=HEIGHT / 2 + between(rng, -50, 65, peak=1.5),
        scale=1 + 0.6 * float(rng.beta(0.9, 1.8)),
        angle_rad=between(rng, -0.16, 0.16, peak=2),
        side=1 if rng.random() < 0.5 else -1,
    )

    radius = between(rng, 84, 101, peak=1.3)
    gaze_x = between(rng, -0.5, 0.5, peak=1.8) * lids.half_width
    t = np.array(gaze_x / lids.half_width)
    up, low = (float(v) for v in lids.curves(t))
    # The lids follow the gaze, so the iris stays near the middle of the opening. Looking straight
    # ahead, the lower lid touches it and the upper one covers its top.
    drift = between(rng, -0.25, 0.25, peak=1.8) * (low - up)
    # Uniform on a logarithmic scale, because small pupils are harder to outline.
    pupil_px = math.exp(between(rng, math.log(22), math.log(62)))
    pupil_radius = min(pupil_px / pose.scale, 0.62 * radius)
    room = (low - up) / 2 - pupil_radius - 6
    if room > 0 and rng.random() > CUT_SHARE:
        drift = float(np.clip(drift, -room, room))
    center = np.array([gaze_x, (up + low) / 2 + drift])
    toward = np.array(
        [gaze_x / 210 + between(rng, -0.2, 0.2), drift / 150 + between(rng, -0.45, 0.45)]
    )
    oblique = rng.random() < OBLIQUE_SHARE
    if oblique:
        turn, more = between(rng, 0, 2 * math.pi), between(rng, 0.35, 0.8)
        toward += more * np.array([math.cos(turn), math.sin(turn)])
    tilt = min(float(np.hypot(*toward)), 1.05 if oblique else 0.75)
    ratio = math.cos(tilt)
    direction = math.atan2(toward[1], toward[0] * pose.side) + pose.angle_rad

    # The pupil's center is up to 5 % of the iris radius closer to the nose than the center of the
    # iris; refraction adds a little.
    off = np.array([-between(rng, 0.0, 0.05), 0.0]) + rng.normal(0, 0.02, 2)
    iris_xy = pose.to_frame(center)
    pupil_xy = pose.to_frame(center + off * radius)
    iris = _foreshortened(iris_xy, radius * pose.scale, ratio, direction)
    # Through the cornea, a pupil seen from the side looks rounder than the iris.
    pupil = _foreshortened(
        pupil_xy,
        pupil_radius * pose.scale,
        min(1.0, ratio ** between(rng, 0.7, 1.0) * between(rng, 0.97, 1.03)),
        direction + between(rng, -0.1, 0.1),
    )

    upper, lower = frame_curves(pose, lids)
    if closed:
        lower = upper - 1
    else:
        # Folds and lash roots make a lid's edge uneven by 1 or 2 px, but must not create an opening
        # beyond the corners.
        is_open = (lower > upper).astype(np.float32)
        upper, lower = (
            edge + smooth_noise(rng, (1, 24), (1, WIDTH))[0] * is_open * between(rng, 0.0, 1.6)
            for edge in (upper, lower)
        )
    return Eye(pose, lids, upper, lower, pupil, iris, closed, _levels(rng))


def frame_curves(pose: Pose, lids: Lids) -> tuple[Field, Field]:
    """Returns the rows of both lids' edges in every frame column, float32 (640,) each."""
    t = np.linspace(-TAIL, TAIL, 361)
    x = t * lids.half_width
    columns = np.arange(WIDTH)
    rows = []
    for y in lids.curves(t):
        points = pose.to_frame(np.stack([x, y], axis=-1))
        order = np.argsort(points[:, 0])
        rows.append(np.interp(columns, points[order, 0], points[order, 1]).astype(np.float32))
    return rows[0], rows[1]
