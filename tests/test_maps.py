"""Maps equal independent float64 references exactly."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from scipy.ndimage import distance_transform_edt

from pupilseg import maps
from pupilseg.geometry import Ellipse, ellipse_mask
from tests.helpers.masks import CORNERS, EDGES, EMPTY, FULL, blobs, labels, pixels

DIAGONAL = np.hypot(399.0, 639.0)


def with_edge_cases(test):
    for label in [*CORNERS, *EDGES, pixels((200, 300))]:
        test = example(label)(test)
    return settings(max_examples=12, deadline=None)(test)


def reference_distance_maps(label):
    """SciPy in float64, class by class, as in RITnet's `one_hot2dist`."""
    both = []
    for cls in (0, 1):
        inside = label == cls
        positive = distance_transform_edt(~inside)
        negative = (distance_transform_edt(inside) - 1) * inside
        both.append((positive - negative) / DIAGONAL)
    return np.stack(both).astype(np.float32)


@with_edge_cases
@given(labels.filter(lambda label: 0 < label.sum() < label.size))
def test_distances_equal_scipy(label):
    got = maps.distance_maps(label)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, reference_distance_maps(label))
    other = distance_transform_edt(label) + distance_transform_edt(1 - label)
    squared = maps.squared_distance(label)
    np.testing.assert_array_equal(squared, np.rint(other**2).astype(np.int64))
    assert squared.dtype == np.int32
    assert squared.min() >= 1
    assert squared.max() <= maps.MAX_DISTANCE_SQUARED == 567_522


@with_edge_cases
@given(labels)
def test_the_integers_can_be_recovered_from_the_maps(label):
    squared = np.empty(label.shape, np.float32)
    maps.write_squared_from_maps(maps.distance_maps(label), squared)
    np.testing.assert_array_equal(squared, maps.squared_distance(label))


@with_edge_cases
@given(labels)
def test_maps_are_finite_and_signed(label):
    got = maps.distance_maps(label)
    assert np.isfinite(got).all()
    assert np.abs(got).max() <= 1
    assert (got[1][label == 0] > 0).all()
    assert (got[1][label == 1] <= 0).all()
    assert (got[0][label == 1] > 0).all()
    assert (got[0][label == 0] <= 0).all()


@with_edge_cases
@given(labels)
def test_maps_are_equivariant_to_flips(label):
    got = maps.distance_maps(label)
    np.testing.assert_array_equal(maps.distance_maps(label[:, ::-1]), got[..., ::-1])
    np.testing.assert_array_equal(maps.distance_maps(label[::-1]), got[:, ::-1])
    np.testing.assert_array_equal(maps.distance_maps(1 - label), got[::-1])


@with_edge_cases
@given(labels)
def test_tables_equal_the_maps(label):
    squared = maps.squared_distance(label)
    outside, inside = maps.signed_tables()[:, squared]
    got = maps.distance_maps(label)
    np.testing.assert_array_equal(got[0], np.where(label == 1, outside, inside))
    np.testing.assert_array_equal(got[1], np.where(label == 1, inside, outside))


@pytest.mark.parametrize(("label", "absent"), [(EMPTY, 1), (FULL, 0)])
def test_an_absent_class(label, absent):
    got = maps.distance_maps(label)
    assert (got[absent] == 1).all()
    np.testing.assert_array_equal(got[1 - absent], np.float32(-(DIAGONAL - 1) / DIAGONAL))
    assert (maps.squared_distance(label) == maps.MAX_DISTANCE_SQUARED).all()
    assert not maps.spatial_weights(label).any()


@with_edge_cases
@given(labels)
def test_weights_are_the_edge_and_the_row_below(label):
    edge = cv2.Canny(label * 255, 0, 3) > 0
    band = edge.copy()
    band[1:] |= edge[:-1]
    got = maps.spatial_weights(label)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, np.where(band, np.float32(20), np.float32(0)))


def test_dilation_equals_the_original_call():
    """The scripts of RITnet and of the data set call `cv2.dilate(x, (3, 3))`."""
    for seed in range(4):
        edges = cv2.Canny(blobs(seed) * 255, 0, 3)
        earlier = cv2.dilate(edges, (3, 3))
        np.testing.assert_array_equal(cv2.dilate(edges, maps.DILATION_KERNEL), earlier)


def test_weights_lie_on_the_boundary():
    label = ellipse_mask(Ellipse(320, 200, 40, 30, 0.2))
    weights = maps.spatial_weights(label)
    assert weights[maps.squared_distance(label) > 9].max() == 0
    eroded, dilated = (f(label, np.ones((3, 3), np.uint8)) for f in (cv2.erode, cv2.dilate))
    contour = np.count_nonzero(dilated != eroded) / 2
    assert contour < np.count_nonzero(weights) < 4 * contour


def test_label_is_checked():
    good = EMPTY
    for bad, words in [
        (good[:, :639], r"shape \(400, 639\), expected \(400, 640\)"),
        (good.astype(np.float32), "dtype float32"),
        (good + 2, "values 2..2, expected"),
        (good.astype(np.int8) - 1, "values -1..-1"),
    ]:
        for function in (maps.spatial_weights, maps.distance_maps):
            with pytest.raises(ValueError, match=words):
                function(bad)
    for dtype in (bool, np.int64):
        label = blobs(3).astype(dtype)
        np.testing.assert_array_equal(maps.distance_maps(label), maps.distance_maps(blobs(3)))
    flipped = blobs(3)[:, ::-1]
    assert not flipped.flags.c_contiguous
    maps.spatial_weights(flipped)
