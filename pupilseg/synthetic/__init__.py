"""A renderer of near-infrared eyes: images with exact labels, determined by an index and a seed.

On one machine, a frame has the same bytes in every process and in any order; the vector units of
another processor may round a pixel differently. No files are read. Only the ranges of the
parameters were measured on recorded eyes. The steps:

    eye -> skin, eyeball (labels) -> light -> hair -> lens -> blur -> reflections -> noise -> tone
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pupilseg.geometry import HEIGHT, WIDTH, Ellipse
from pupilseg.synthetic.anatomy import Eye, sample_eye
from pupilseg.synthetic.camera import blur, crop_to_bars, expose, tone, transmit
from pupilseg.synthetic.eyeball import draw_eyeball
from pupilseg.synthetic.frame import Frame
from pupilseg.synthetic.hair import add_hair
from pupilseg.synthetic.lens import add_corners, add_lens, light_field
from pupilseg.synthetic.reflections import add_glints, add_scene, add_sparkles
from pupilseg.synthetic.skin import draw_skin
from pupilseg.synthetic.spectacles import add_spectacles

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pupilseg.synthetic.eyeball import Eyeball
    from pupilseg.synthetic.fields import Field

__all__ = ["RENDERER_VERSION", "Rendered", "eye_of", "render"]

RENDERER_VERSION = 3
"""Increased by every change that alters a rendered byte. Manifests of rendered data record it, so
that shards of another version are recognized as stale."""
BEFORE_BLUR = (add_lens, add_corners)
AFTER_BLUR = (add_glints, add_sparkles, add_scene, add_spectacles)
"""Effects in the order in which they draw from the optics' random stream (see `Frame`)."""


class Rendered(NamedTuple):
    """One rendered frame.

    Attributes:
        image: uint8 (400, 640).
        classes: uint8 (400, 640) of {0 background, 1 sclera, 2 iris, 3 pupil}. A pixel belongs to a
            structure if its center lies inside the drawn edge and inside the lid opening, also
            under reflections and lashes.
        pupil: the full pupil in px, including the part behind a lid; None for a closed eye. The
            drawn edge is slightly ragged.
        iris: the full iris in px; None for a closed eye.
        traits: sorted names of random features: the tone curve ("raw", "clahe", "equalized" or
            "curve") and any of "closed", "spectacles", "border", "rings", "corners", "mascara",
            "scene", "enlarged", "compressed", "bars".
    """

    image: NDArray[np.uint8]
    classes: NDArray[np.uint8]
    pupil: Ellipse | None
    iris: Ellipse | None
    traits: tuple[str, ...]


def render(index: int, seed: int = 0) -> Rendered:
    """Renders a frame.

    Each part has its own random stream, so that changing one does not alter the others.

    Args:
        index: number of the frame, >= 0; every index is a different eye.
        seed: number of the series, >= 0.

    Raises:
        ValueError: index or seed is negative.
    """
    anatomy, flesh, eyeball, hair, optics, camera = _streams(index, seed)
    eye = sample_eye(anatomy)
    traits = {"closed"} if eye.closed else set()
    frame = Frame(
        eye,
        image=draw_skin(flesh, eye),
        classes=np.zeros((HEIGHT, WIDTH), np.uint8),
        on_eye=np.zeros((HEIGHT, WIDTH), np.float32),
    )
    _paste(draw_eyeball(eyeball, eye), frame)
    _light(light_field(optics, eye), frame)
    traits |= add_hair(hair, frame)
    for effect in BEFORE_BLUR:
        traits |= effect(optics, frame)
    frame = frame._replace(image=blur(camera, frame.image))
    for effect in AFTER_BLUR:
        traits |= effect(optics, frame)
    image, curve = tone(camera, expose(camera, frame.image))
    image, transmission = transmit(camera, image)
    traits |= {curve} | transmission | crop_to_bars(camera, eye, image, frame.classes)
    pupil, iris = (None, None) if eye.closed else (eye.pupil, eye.iris)
    return Rendered(image, frame.classes, pupil, iris, tuple(sorted(traits)))


def _paste(ball: Eyeball | None, frame: Frame) -> None:
    if ball is None:
        return
    part = frame.image[ball.window]
    part *= ball.rim
    part += (ball.gray - part) * ball.cover
    frame.classes[ball.window] = ball.classes
    frame.on_eye[ball.window] = ball.cover


def _light(light: Field, frame: Frame) -> None:
    """Applies the light in place; stray light at the pupil's level is uniform and not scaled."""
    haze, image = np.float32(frame.eye.levels.pupil), frame.image
    image -= haze
    image *= light
    image += haze


def eye_of(index: int, seed: int = 0) -> Eye:
    """Returns the eye of a frame, without drawing it: pose, lids and gray levels.

    Raises:
        ValueError: index or seed is negative.
    """
    return sample_eye(_streams(index, seed)[0])


def _streams(index: int, seed: int) -> list[np.random.Generator]:
    """Returns the random streams of eye, skin, eyeball, hair, optics and camera."""
    if index < 0 or seed < 0:
        raise ValueError(f"index and seed must be >= 0, got index={index}, seed={seed}")
    return np.random.default_rng([seed, index]).spawn(6)
