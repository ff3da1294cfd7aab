"""Targets in torch equal those of SciPy in float64 and of OpenCV exactly."""

import cv2
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.ndimage import distance_transform_edt

from pupilseg import maps
from pupilseg.augment.targets_device import ellipse_vectors, spatial_weights, squared_distance
from pupilseg.geometry import HEIGHT, WIDTH, Ellipse, ellipse_mask, ellipse_vector
from pupilseg.loader.decode import distance_table, signed_maps

CPU = torch.device("cpu")


def blobs(seed, shape):
    """Returns up to 3 ellipses anywhere, also cut by the border, some with a hole."""
    rng = np.random.default_rng(seed)
    label = np.zeros(shape, np.uint8)
    for turn in range(rng.integers(0, 4)):
        x, y = rng.uniform((-5, -5), (shape[1] + 5, shape[0] + 5))
        a, b = rng.uniform(0.5, max(shape) / 2, 2)
        drawn = ellipse_mask(Ellipse(x, y, a, b, rng.uniform(-1.5, 1.5)), shape)
        label = label & ~drawn & 1 if turn == 2 else label | drawn
    return label


def noise(seed, shape):
    rng = np.random.default_rng(seed)
    return (rng.random(shape) < rng.choice([0.002, 0.05, 0.5, 0.95, 0.998])).astype(np.uint8)


def one_pixel(seed, shape):
    rng = np.random.default_rng(seed)
    label = np.zeros(shape, np.uint8)
    label[rng.integers(shape[0]), rng.integers(shape[1])] = 1
    return label ^ rng.integers(2, dtype=np.uint8)


shapes = st.tuples(st.integers(1, 40), st.integers(1, 60))
seeds = st.integers(0, 2**32 - 1)
labels = st.one_of([st.builds(kind, seeds, shapes) for kind in (blobs, noise, one_pixel)])
EMPTY, FULL = np.zeros((30, 40), np.uint8), np.ones((30, 40), np.uint8)


def scipy_squared(label):
    """Returns u^2 from one float64 transform per class, each zero on the other class."""
    if label.min() == label.max():
        return np.full(label.shape, maps.MAX_DISTANCE_SQUARED)
    distance = distance_transform_edt(label) + distance_transform_edt(1 - label)
    return np.rint(distance**2).astype(np.int64)


@given(labels)
@example(EMPTY)
@example(FULL)
@settings(max_examples=300, deadline=None)
def test_squared_distance_equals_scipys(label):
    got = squared_distance(torch.from_numpy(label)[None])
    assert got.dtype == torch.int32
    np.testing.assert_array_equal(got[0], scipy_squared(label))


def test_row_blocks_do_not_change_the_result(monkeypatch):
    label = torch.from_numpy(np.stack([noise(s, (23, 31)) for s in range(7)]))
    whole = squared_distance(label)
    for values in (1, 31 * 31 * 5):
        monkeypatch.setattr("pupilseg.augment.targets_device.BLOCK_VALUES", values)
        assert torch.equal(squared_distance(label), whole)


def test_frames_of_a_batch_do_not_mix():
    label = np.stack([blobs(1, (30, 40)), EMPTY, noise(2, (30, 40)), FULL, blobs(7, (30, 40))])
    got = squared_distance(torch.from_numpy(label))
    for row, one in enumerate(label):
        np.testing.assert_array_equal(got[row], scipy_squared(one))


@pytest.mark.parametrize(
    "label",
    [
        blobs(2, (HEIGHT, WIDTH)),
        one_pixel(0, (HEIGHT, WIDTH)),
        np.eye(HEIGHT, WIDTH, dtype=np.uint8) & (np.arange(WIDTH) < 1).astype(np.uint8),
    ],
    ids=["blobs", "pixel", "corner"],
)
def test_distance_maps_of_full_frames_equal_those_of_the_maps_module(label):
    """The single corner pixel gives the largest possible u^2."""
    tensor = torch.from_numpy(label)[None]
    squared = squared_distance(tensor)
    np.testing.assert_array_equal(squared[0], maps.squared_distance(label))
    got = signed_maps(squared, tensor, distance_table(CPU))[0].numpy()
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got.view(np.int32), maps.distance_maps(label).view(np.int32))


@pytest.mark.parametrize("value", [0, 1])
def test_distance_maps_of_an_absent_class_equal_those_of_the_maps_module(value):
    label = np.full((HEIGHT, WIDTH), value, np.uint8)
    squared = torch.full((1, HEIGHT, WIDTH), maps.MAX_DISTANCE_SQUARED, dtype=torch.int32)
    got = signed_maps(squared, torch.from_numpy(label)[None], distance_table(CPU))
    np.testing.assert_array_equal(got[0], maps.distance_maps(label))


def cv2_weights(label):
    """Returns `maps.spatial_weights` for frames of any size."""
    edges = cv2.Canny(label * 255, *maps.CANNY_THRESHOLDS)
    return (cv2.dilate(edges, maps.DILATION_KERNEL) > 0) * maps.EDGE_WEIGHT


@given(labels)
@example(EMPTY)
@example(FULL)
@settings(max_examples=1000, deadline=None)
def test_weights_equal_opencvs(label):
    got = spatial_weights(torch.from_numpy(label)[None])
    assert got.dtype == torch.float32
    np.testing.assert_array_equal(got[0], cv2_weights(label))


def test_every_small_neighborhood_has_opencvs_weights():
    """All 4096 patterns of 3 x 4 pixels, with margins wide enough that they do not interact."""
    bits = (np.arange(4096)[:, None] >> np.arange(12)) & 1
    tiles = np.pad(bits.reshape(64, 64, 3, 4).astype(np.uint8), ((0, 0), (0, 0), (4, 4), (4, 4)))
    sheet = np.ascontiguousarray(tiles.transpose(0, 2, 1, 3).reshape(64 * 11, 64 * 12))
    np.testing.assert_array_equal(
        spatial_weights(torch.from_numpy(sheet)[None])[0], cv2_weights(sheet)
    )


def test_weights_of_full_frames_equal_those_of_the_maps_module():
    label = np.stack([blobs(s, (HEIGHT, WIDTH)) for s in range(20)])
    got = spatial_weights(torch.from_numpy(label)).numpy()
    for row, one in enumerate(label):
        np.testing.assert_array_equal(got[row], maps.spatial_weights(one))


@given(seeds)
@settings(max_examples=40, deadline=None)
def test_ellipses_equal_those_of_geometry(seed):
    kinds = (blobs, noise, one_pixel)
    label = np.stack([kind(seed, (HEIGHT, WIDTH)) for kind in kinds])
    got = ellipse_vectors(torch.from_numpy(label))
    wanted = np.stack([ellipse_vector(one) for one in label])
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got, wanted, atol=1e-6, rtol=0)


def test_label_types_do_not_matter():
    label = torch.from_numpy(blobs(1, (30, 40)))
    for dtype in (torch.bool, torch.int64, torch.float32):
        other = label.to(dtype)[None]
        assert torch.equal(squared_distance(other), squared_distance(label[None]))
        assert torch.equal(spatial_weights(other), spatial_weights(label[None]))


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [True, False])
def test_cuda_gives_the_same_without_synchronizing(compiled):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda")
    label = torch.from_numpy(np.stack([blobs(s, (HEIGHT, WIDTH)) for s in range(3)]))
    there = label.to(device)
    table = distance_table(device)

    def targets(x, table):
        squared = squared_distance(x)
        return squared, signed_maps(squared, x, table), spatial_weights(x), ellipse_vectors(x)

    form = torch.compile(targets) if compiled else targets
    form(there, table)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = form(there, table)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for row, one in enumerate(label.numpy()):
        np.testing.assert_array_equal(got[0][row].cpu(), maps.squared_distance(one))
        np.testing.assert_array_equal(got[1][row].cpu(), maps.distance_maps(one))
        np.testing.assert_array_equal(got[2][row].cpu(), maps.spatial_weights(one))
        np.testing.assert_allclose(got[3][row].cpu(), ellipse_vector(one), atol=1e-6)
