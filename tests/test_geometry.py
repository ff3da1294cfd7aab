"""Mask, ellipse and vector: exact moments, and round trips within a tenth of a pixel."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pupilseg.geometry import (
    ELLIPSE_SCALE,
    HEIGHT,
    NO_PUPIL,
    NORMALIZED,
    RADIUS_UNIT,
    WIDTH,
    Ellipse,
    ellipse_from_mask,
    ellipse_from_vector,
    ellipse_mask,
    ellipse_vector,
)


def reference_moments(mask):
    """Float64 moments computed from the definition."""
    y, x = np.nonzero(mask)
    return x.mean(), y.mean(), x.var(), y.var(), ((x - x.mean()) * (y - y.mean())).mean()


@st.composite
def whole_ellipses(draw):
    """Ellipses inside the frame, of the sizes of pupils."""
    b = draw(st.floats(15, 90))
    a = draw(st.floats(b, 2 * b))
    reach = a + 2
    x = draw(st.floats(reach, WIDTH - 1 - reach))
    y = draw(st.floats(reach, HEIGHT - 1 - reach))
    return Ellipse(x, y, a, b, draw(st.floats(-math.pi / 2 + 1e-6, math.pi / 2)))


masks = st.builds(
    lambda seed, share: np.random.default_rng(seed).random((30, 40)) < share,
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.002, 0.1, 0.5, 0.99]),
).filter(np.any)


def test_constants():
    assert (HEIGHT, WIDTH) == (400, 640)
    assert pytest.approx(377.3592, abs=1e-4) == RADIUS_UNIT
    assert ELLIPSE_SCALE.tolist() == [640, 400, RADIUS_UNIT, RADIUS_UNIT]


AXES = ("center_x_px", "center_y_px", "semi_axis_a_px", "semi_axis_b_px")


@settings(max_examples=60, deadline=None)
@given(whole_ellipses())
def test_ellipse_to_mask_to_ellipse(ellipse):
    """True also if many pixel centers lie on the outline, as with integer semi-axes."""
    got = ellipse_from_mask(ellipse_mask(ellipse))
    for name in AXES:
        assert getattr(got, name) == pytest.approx(getattr(ellipse, name), abs=0.4), name
    # The angle of a near-circle is noise: compare the end of the axis.
    turn = math.sin(got.angle_rad - ellipse.angle_rad)
    assert abs(turn) * (ellipse.semi_axis_a_px - ellipse.semi_axis_b_px) < 0.4


def test_ellipse_to_mask_to_ellipse_is_unbiased():
    rng = np.random.default_rng(0)
    errors = []
    for _ in range(300):
        b = rng.uniform(15, 60)
        place, a = rng.uniform((140, 140), (180, 180)), b * rng.uniform(1, 1.8)
        ellipse = Ellipse(*place, a, b, rng.uniform(-1.5, 1.5))
        got = ellipse_from_mask(ellipse_mask(ellipse, (320, 320)))
        errors.append([getattr(got, name) - getattr(ellipse, name) for name in AXES])
    worst = np.abs(errors).max(axis=1)
    assert np.median(worst) < 0.05
    assert np.quantile(worst, 0.97) < 0.1
    # No bias; `cv2.fitEllipse` on the contour is 0.4 px too small.
    np.testing.assert_allclose(np.mean(errors, axis=0), 0, atol=0.01)


@settings(max_examples=60, deadline=None)
@given(masks)
def test_moments_equal_the_definition(mask):
    x, y, var_x, var_y, cov = reference_moments(mask)
    ellipse = ellipse_from_mask(mask)
    small, large = np.linalg.eigvalsh([[var_x, cov], [cov, var_y]])
    expected = (x, y, 2 * math.sqrt(large), 2 * math.sqrt(max(small, 0)))
    assert ellipse[:4] == pytest.approx(expected, abs=1e-6)
    assert -math.pi / 2 < ellipse.angle_rad <= math.pi / 2
    # Along the long axis the variance is the larger eigenvalue.
    direction = np.array([math.cos(ellipse.angle_rad), math.sin(ellipse.angle_rad)])
    along = direction @ np.array([[var_x, cov], [cov, var_y]]) @ direction
    assert along == pytest.approx(large, abs=1e-9)
    vector = ellipse_vector(mask)
    assert vector.dtype == np.float32
    pixels = np.array([x, y, 2 * math.sqrt(var_x), 2 * math.sqrt(var_y)])
    np.testing.assert_array_equal(vector, (pixels / ELLIPSE_SCALE).astype(np.float32))


@settings(max_examples=30, deadline=None)
@given(whole_ellipses())
def test_flip_mirrors_the_ellipse(ellipse):
    mask = ellipse_mask(ellipse)
    vector, flipped = ellipse_vector(mask), ellipse_vector(mask[:, ::-1])
    assert flipped[0] == pytest.approx((WIDTH - 1) / WIDTH - vector[0], abs=1e-6)
    np.testing.assert_allclose(flipped[1:], vector[1:], rtol=1e-6)
    there, back = ellipse_from_mask(mask), ellipse_from_mask(mask[:, ::-1])
    assert back.semi_axis_a_px == pytest.approx(there.semi_axis_a_px)
    assert math.sin(back.angle_rad + there.angle_rad) == pytest.approx(0, abs=1e-6)


@settings(max_examples=100)
@given(*[st.floats(0, 1, width=32)] * 2, *[st.floats(2**-8, 1, width=32)] * 2)
def test_vector_round_trip(cx, cy, rx, ry):
    ellipse = ellipse_from_vector([cx, cy, rx, ry])
    assert ellipse.semi_axis_a_px >= ellipse.semi_axis_b_px
    along_x = (ellipse.semi_axis_a_px, ellipse.semi_axis_b_px)
    if ellipse.angle_rad != 0:
        assert ellipse.angle_rad == math.pi / 2
        along_x = along_x[::-1]
    pixels = np.array([ellipse.center_x_px, ellipse.center_y_px, *along_x])
    np.testing.assert_allclose(pixels / ELLIPSE_SCALE, [cx, cy, rx, ry], rtol=1e-12)


@pytest.mark.parametrize("rx_over_ry", [0.5, 2])
def test_vector_to_mask_to_vector(rx_over_ry):
    vector = np.array([0.4, 0.6, 0.1 * math.sqrt(rx_over_ry), 0.1 / math.sqrt(rx_over_ry)])
    got = ellipse_vector(ellipse_mask(ellipse_from_vector(vector)))
    np.testing.assert_allclose(got * ELLIPSE_SCALE, vector * ELLIPSE_SCALE, atol=0.1)


def test_blink():
    empty = np.zeros((HEIGHT, WIDTH), np.uint8)
    assert ellipse_from_mask(empty) is None
    vector = ellipse_vector(empty)
    np.testing.assert_array_equal(vector, NO_PUPIL)
    vector[0] = 1  # a copy: the constant does not change
    assert NO_PUPIL[0] == 0
    assert ellipse_from_vector(NO_PUPIL) is None
    assert not ellipse_mask(None).any()
    assert not ellipse_mask(Ellipse(10, 10, 5, 0, 0)).any()


@pytest.mark.parametrize("vector", [[0.5, 0.5, -0.1, 0.2], [0.5, 0.5, 0.1, math.nan]])
def test_invalid_vectors_give_no_ellipse(vector):
    assert ellipse_from_vector(vector) is None


def test_one_pixel_and_full_mask():
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[7, 9] = True
    assert ellipse_from_mask(mask) == Ellipse(9, 7, 0, 0, 0)
    full = ellipse_from_mask(np.ones((HEIGHT, WIDTH)))
    assert full[:2] == (319.5, 199.5)
    assert full.semi_axis_a_px == pytest.approx(2 * math.sqrt((640**2 - 1) / 12))


def test_upright_ellipse_points_down_not_up():
    for x in np.linspace(100, 101, 23):
        got = ellipse_from_mask(ellipse_mask(Ellipse(float(x), 150.0, 60, 20, math.pi / 2)))
        assert -math.pi / 2 < got.angle_rad <= math.pi / 2


def test_normalized_levels_are_those_of_torch_in_float32():
    levels = torch.arange(256, dtype=torch.uint8)
    assert NORMALIZED.dtype == np.float32
    np.testing.assert_array_equal(NORMALIZED, (levels.float() / 255 - 0.5) / 0.5)


def test_mask_of_another_shape_and_dtype():
    mask = ellipse_mask(Ellipse(30, 20, 10, 8, 0.3), (50, 60))
    assert (mask.shape, mask.dtype) == ((50, 60), np.uint8)
    assert ellipse_from_mask(mask * 255) == ellipse_from_mask(mask.astype(bool))
