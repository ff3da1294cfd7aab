from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest

from benchmarks.eye_statistics import edge_offset, edge_profile
from pupilseg.geometry import HEIGHT, WIDTH, Ellipse, ellipse_from_mask, ellipse_mask
from pupilseg.synthetic import RENDERER_VERSION, Rendered, eye_of, render
from pupilseg.synthetic.anatomy import sample_eye
from pupilseg.synthetic.camera import SHOT_NOISE, _smear, expose, transmit
from pupilseg.synthetic.eyeball import draw_eyeball
from pupilseg.synthetic.frame import Frame
from pupilseg.synthetic.reflections import add_scene, add_spot

if TYPE_CHECKING:
    from numpy.typing import NDArray

SEED = 11
FRAMES = 120


@pytest.fixture(scope="module")
def frames() -> list[Rendered]:
    return [render(i, SEED) for i in range(FRAMES)]


@pytest.fixture(scope="module")
def open_frames(frames: list[Rendered]) -> list[Rendered]:
    return [f for f in frames if f.pupil is not None]


def digest(frame: Rendered) -> str:
    payload = frame.image.tobytes() + frame.classes.tobytes() + repr(frame[2:]).encode()
    return hashlib.sha256(payload).hexdigest()


def around(pupil: NDArray[np.uint8], inner: int, outer: int) -> NDArray[np.bool_]:
    grown = [cv2.dilate(pupil, np.ones((2 * r + 1, 2 * r + 1), np.uint8)) for r in (inner, outer)]
    return (grown[1] - grown[0]) > 0


def radius(ellipse: Ellipse) -> float:
    return math.sqrt(ellipse.semi_axis_a_px * ellipse.semi_axis_b_px)


def test_same_frame_in_another_order_and_another_process(frames: list[Rendered]) -> None:
    chosen = [17, 3, 60, 0]
    here = [digest(render(i, SEED)) for i in chosen]
    assert here == [digest(frames[i]) for i in chosen]
    code = (
        "import hashlib, sys; import cv2; cv2.setNumThreads(1)\n"
        "from pupilseg.synthetic import render\n"
        "for i in map(int, sys.argv[2:]):\n"
        "    f = render(i, int(sys.argv[1]))\n"
        "    b = f.image.tobytes() + f.classes.tobytes() + repr(f[2:]).encode()\n"
        "    print(hashlib.sha256(b).hexdigest())"
    )
    command = [sys.executable, "-c", code, str(SEED), *map(str, chosen)]
    there = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert there == here


def test_rendering_does_not_use_the_global_generator() -> None:
    np.random.seed(1)  # noqa: NPY002 - the global state is under test
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first = digest(render(5, 2))
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002
    np.random.seed(2)  # noqa: NPY002
    assert digest(render(5, 2)) == first


def test_every_index_and_every_seed_gives_a_different_eye(frames: list[Rendered]) -> None:
    assert len({digest(f) for f in frames}) == FRAMES
    assert len({f.pupil for f in frames if f.pupil}) == sum(f.pupil is not None for f in frames)
    assert digest(render(0, SEED + 1)) != digest(frames[0])


@pytest.mark.parametrize(("index", "seed"), [(-1, 0), (0, -1)])
def test_a_negative_index_or_seed_is_refused(index: int, seed: int) -> None:
    with pytest.raises(ValueError, match=r"index and seed must be >= 0, got .*-1"):
        render(index, seed)


def test_shapes_types_and_values(frames: list[Rendered]) -> None:
    assert isinstance(RENDERER_VERSION, int)
    for frame in frames:
        assert frame.image.shape == frame.classes.shape == (HEIGHT, WIDTH)
        assert frame.image.dtype == frame.classes.dtype == np.uint8
        assert frame.image.flags.c_contiguous
        assert frame.classes.max() <= 3
        assert (frame.pupil is None) == (frame.iris is None)
        for ellipse in (frame.pupil, frame.iris):
            if ellipse is not None:
                assert all(type(value) is float and math.isfinite(value) for value in ellipse)
                assert ellipse.semi_axis_a_px >= ellipse.semi_axis_b_px > 0
                assert -math.pi / 2 < ellipse.angle_rad <= math.pi / 2


def test_a_closed_eye_has_no_labels(frames: list[Rendered]) -> None:
    closed = [f for f in frames if f.pupil is None]
    assert closed
    for frame in closed:
        assert not frame.classes.any()


def test_the_labeled_pupil_is_the_ellipse_with_a_ragged_edge(
    open_frames: list[Rendered],
) -> None:
    for frame in open_frames:
        pupil = frame.pupil
        assert pupil is not None
        # The edge deviates by at most 2.5 * 0.012 of the radius.
        stray = 1 + 2.5 * 0.012
        a, b = pupil.semi_axis_a_px * stray + 0.5, pupil.semi_axis_b_px * stray + 0.5
        most = ellipse_mask(pupil._replace(semi_axis_a_px=a, semi_axis_b_px=b))
        assert not np.any((frame.classes == 3) & (most == 0))


def test_moments_of_an_uncut_pupil_are_its_ellipse(open_frames: list[Rendered]) -> None:
    uncut = 0
    for frame in open_frames:
        pupil = frame.pupil
        assert pupil is not None
        mask = (frame.classes == 3).astype(np.uint8)
        ring = around(mask, 0, 1)
        if not mask.any() or not np.all(frame.classes[ring] == 2):
            continue
        uncut += 1
        measured = ellipse_from_mask(mask)
        assert measured is not None
        # Measured over 1,288 uncut pupils: center within 0.09 px, semi-axes within 0.11 px.
        for value, wanted, slack in zip(
            measured[:4], pupil[:4], (0.12, 0.12, 0.15, 0.15), strict=True
        ):
            assert value == pytest.approx(wanted, abs=slack)
        if pupil.semi_axis_b_px < 0.95 * pupil.semi_axis_a_px:
            turned = measured.angle_rad - pupil.angle_rad
            assert abs(math.sin(turned)) < 0.1
    assert uncut > FRAMES // 2


def test_the_opening_is_in_one_piece(open_frames: list[Rendered]) -> None:
    """Uneven lids may cut off the last px at a corner, but create no opening beyond it."""
    for frame in open_frames:
        _, _, stats, _ = cv2.connectedComponentsWithStats((frame.classes > 0).astype(np.uint8))
        areas = sorted(stats[1:, cv2.CC_STAT_AREA])
        assert sum(areas[:-1]) <= 12


def test_objects_in_front_do_not_change_the_labels(open_frames: list[Rendered]) -> None:
    """A pupil has no holes or islands: labels are final before glints, lashes and streaks."""
    for frame in open_frames:
        mask = (frame.classes == 3).astype(np.uint8)
        if mask.any():
            parts, _ = cv2.connectedComponents(mask)
            contours, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
            assert parts == 2
            assert len(contours) == 1


def test_the_drawn_edge_is_where_the_label_changes() -> None:
    """Before blur and noise, gray is halfway between pupil and iris at the label's edge."""
    checked = 0
    for index in range(40):
        anatomy, _, eyeball, *_ = np.random.default_rng([SEED, index]).spawn(6)
        eye = sample_eye(anatomy)
        ball = draw_eyeball(eyeball, eye)
        if ball is None or not (ball.classes == 3).any():
            continue
        inside = ball.gray[(ball.classes == 3) & (ball.cover == 1)]
        # At worst, a pixel whose center lies on the edge is half iris.
        assert inside.min() == pytest.approx(eye.levels.pupil, abs=0.01)
        assert np.mean(inside < (eye.levels.pupil + eye.levels.iris) / 2 + 8) > 0.99
        checked += 1
    assert checked > 30


def test_gray_is_halfway_at_the_labels_edge(open_frames: list[Rendered]) -> None:
    """True after halo, blur and noise too: an error of 0.1 px costs a 27 px pupil 0.7 % of IoU."""
    offsets = []
    for frame in open_frames:
        profile = edge_profile(frame.image, frame.classes)
        if profile is not None:
            offsets.append(edge_offset(profile))
    assert np.isfinite(offsets).sum() > 60
    # Measured over 400 frames: -0.03 px, with a scatter of 0.11 px from the iris texture.
    assert abs(np.nanmean(offsets)) < 0.08


def test_traits_describe_the_frame(frames: list[Rendered]) -> None:
    for frame in frames:
        assert list(frame.traits) == sorted(set(frame.traits))
        assert len({"raw", "clahe", "equalized", "curve"} & set(frame.traits)) == 1
        assert ("closed" in frame.traits) == (frame.pupil is None)
        sides = np.s_[:, :53], np.s_[:, WIDTH - 53 :]
        barred = all(not frame.image[part].any() for part in sides)
        assert ("bars" in frame.traits) == barred
        if barred:
            assert not any(frame.classes[part].any() for part in sides)
    for name, low, high in (
        ("spectacles", 0.07, 0.22),
        ("border", 0.35, 0.65),
        ("rings", 0.4, 0.7),
        ("corners", 0.2, 0.5),
        ("mascara", 0.1, 0.3),
        ("bars", 0.01, 0.12),
        ("scene", 0.02, 0.2),
        ("enlarged", 0.02, 0.16),
        ("compressed", 0.04, 0.22),
        ("raw", 0.5, 0.75),
    ):
        assert low < np.mean([name in frame.traits for frame in frames]) < high, name


def test_eye_of_gives_the_eye_without_drawing_it(frames: list[Rendered]) -> None:
    for index, frame in enumerate(frames[:20]):
        eye = eye_of(index, SEED)
        assert eye.closed == (frame.pupil is None)
        if frame.pupil is not None:
            assert (frame.pupil, frame.iris) == (eye.pupil, eye.iris)


def test_transmission_moves_no_edge(frames: list[Rendered]) -> None:
    """Enlarging and compressing keep every edge where its label says it is."""
    rng = np.random.default_rng(3)
    disc = ellipse_mask(Ellipse(320.3, 200.6, 50.0, 40.0, 0.4)).astype(np.uint8) * 60
    image = 120 - disc
    seen = set()
    for _ in range(80):
        arrived, traits = transmit(rng, image)
        assert arrived.shape == image.shape
        assert (arrived is image) == (not traits)
        measured = ellipse_from_mask((arrived < 90).astype(np.uint8))
        assert measured is not None
        assert measured[:4] == pytest.approx((320.3, 200.6, 50.0, 40.0), abs=0.15)
        seen |= traits
    assert seen == {"enlarged", "compressed"}


def test_a_mirrored_scene_adds_light_to_the_eye_only() -> None:
    eye = eye_of(0, SEED)
    on_eye = np.zeros((HEIGHT, WIDTH), np.float32)
    on_eye[:, :320] = 1
    lights = []
    for seed in range(60):
        image = np.full((HEIGHT, WIDTH), 50, np.float32)
        frame = Frame(eye, image, np.zeros((HEIGHT, WIDTH), np.uint8), on_eye)
        if add_scene(np.random.default_rng(seed), frame):
            lights.append(image[:, :320].max() - 50)
        assert np.all(image[:, 320:] == 50)
        assert image.min() == 50
    assert 1 < len(lights) < 20
    assert max(lights) <= 61


def test_motion_blur_is_symmetric() -> None:
    image = np.zeros((60, 60), np.float32)
    image[20:41, 20:41] = 100
    for angle in (0.0, 0.7, 2.4):
        smeared = _smear(image, 7.0, angle)
        assert smeared.sum() == pytest.approx(image.sum(), rel=1e-5)
        y, x = np.indices(image.shape)
        assert (smeared * x).sum() / smeared.sum() == pytest.approx(30, abs=1e-3)
        assert (smeared * y).sum() / smeared.sum() == pytest.approx(30, abs=1e-3)
        assert smeared.max() <= 100 + 1e-3


def test_the_pupil_is_darker_than_its_surroundings(open_frames: list[Rendered]) -> None:
    steps = []
    for frame in open_frames:
        mask = (frame.classes == 3).astype(np.uint8)
        ring = around(mask, 2, 7) & (frame.classes == 2)
        if mask.sum() > 300 and ring.sum() > 100:
            inside, outside = frame.image[mask == 1], frame.image[ring]
            steps.append(float(np.median(outside)) - float(np.median(inside)))
    assert np.mean(np.array(steps) > 5) > 0.97
    # Real frames: 15 to 90.
    assert 20 < np.median(steps) < 50
    assert np.percentile(steps, 95) < 110


def test_gray_levels_are_those_of_real_frames(open_frames: list[Rendered]) -> None:
    """Raw real frames: pupil 33-39, iris 53-88, sclera 65-103, skin 100-164."""
    for label, low, high in ((3, 33, 39), (2, 53, 88), (1, 60, 103), (0, 75, 164)):
        medians = []
        for frame in open_frames:
            chosen = frame.classes == label
            if chosen.sum() > 200:
                medians.append(float(np.median(frame.image[chosen])))
        # Stretched and equalized frames, 38 % of all, may be outside the range.
        assert np.mean([low - 3 <= m <= high + 3 for m in medians]) > 0.6
        assert low < np.median(medians) < high


def test_sizes_are_those_of_real_frames(open_frames: list[Rendered]) -> None:
    pupils = np.array([radius(f.pupil) for f in open_frames if f.pupil])
    irises = np.array([radius(f.iris) for f in open_frames if f.iris])
    # Semi-axes are 22-62 and 84-161 px from the front; from the side, one is half as long.
    assert pupils.min() > 15
    assert pupils.max() < 63
    assert pupils.max() - pupils.min() > 25
    assert irises.min() > 59
    assert irises.max() < 162
    assert irises.max() > 125
    assert np.all(pupils / irises < 0.7)
    visible = [
        (f.classes >= 2).sum() / ellipse_mask(f.iris).sum()
        for f in open_frames
        if f.iris is not None
    ]
    assert np.mean([0.45 < v <= 1 for v in visible]) > 0.85
    assert 0.65 < np.median(visible) < 0.9
    aspects = np.array([f.pupil[3] / f.pupil[2] for f in open_frames if f.pupil])
    assert aspects.min() < 0.7
    assert np.median(aspects) > 0.9
    centers = np.array([f.pupil[:2] for f in open_frames if f.pupil])
    assert np.all(centers.std(axis=0) > (50, 15))


def test_shares_of_blinks_cut_pupils_borders_and_glints(frames: list[Rendered]) -> None:
    open_ = [f for f in frames if f.pupil is not None]
    assert 0.01 <= 1 - len(open_) / FRAMES <= 0.12
    cut = np.mean([(f.classes == 3).sum() < 0.97 * ellipse_mask(f.pupil).sum() for f in open_])
    assert 0.02 <= cut <= 0.16
    glints, darker, on_pupil = [], [], []
    for frame in open_:
        spots, _, stats, _ = cv2.connectedComponentsWithStats(
            ((frame.image >= 250) & (frame.classes > 0)).astype(np.uint8)
        )
        glints.append(sum(int(s[4]) >= 5 for s in stats[1:spots]))
        pupil = frame.classes == 3
        if pupil.sum() > 300:
            on_pupil.append((frame.image[pupil] >= 250).any())
            smooth = cv2.blur(frame.image, (9, 9))
            darker.append(np.mean(smooth < np.median(frame.image[pupil]) - 4))
    assert 3 <= np.median(glints) <= 12
    assert np.percentile(glints, 95) <= 20
    assert 0.2 < np.mean(on_pupil) < 0.8
    # Many frames have no border darker than the pupil; in others it takes up to a sixth.
    assert 0.25 < np.mean(np.array(darker) > 0.01) < 0.85
    assert np.percentile(darker, 90) < 0.35
    assert max(darker) > 0.1


def test_shot_noise_grows_with_the_gray_level() -> None:
    rng = np.random.default_rng(0)
    for level in (40.0, 160.0):
        variances = [expose(rng, np.full((100, 100), level, np.float32)).var() for _ in range(40)]
        # 1/12 is the variance of rounding to whole levels.
        assert np.median(variances) - 1 / 12 == pytest.approx(SHOT_NOISE * level, rel=0.2)


@pytest.mark.parametrize("area", [5.0, 20.0, 70.0])
@pytest.mark.parametrize("stretch", [1.0, 1.5])
def test_a_spot_saturates_over_the_requested_area(area: float, stretch: float) -> None:
    image = np.full((60, 60), 45, np.float32)
    add_spot(image, 30.3, 29.6, area, stretch=stretch, angle=0.4)
    saturated = (image >= 255).sum()
    assert 0.7 * area * stretch - 3 <= saturated <= 1.4 * area * stretch + 3
    assert image[:8].max() == pytest.approx(45, abs=1)


@pytest.mark.parametrize("at", [(-30.0, 5.0), (0.0, 0.0), (700.0, 500.0), (59.0, 30.0)])
def test_a_spot_at_or_outside_the_border_is_clipped(at: tuple[float, float]) -> None:
    image = np.zeros((60, 60), np.float32)
    add_spot(image, *at, 20.0)
    near = 0 <= at[0] < 60 and 0 <= at[1] < 60
    assert (image.max() > 255) == near
