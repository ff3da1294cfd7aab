"""Encodings of single frames are exact, to the bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pupilseg import maps
from pupilseg.errors import DataError
from pupilseg.geometry import HEIGHT, WIDTH
from pupilseg.shards import codec
from tests.helpers.fakes import random_label

SHAPE = (HEIGHT, WIDTH)


def bits_of(array):
    return np.ascontiguousarray(array).view(np.uint32)


@st.composite
def masks(draw):
    """Empty, full, single pixels, border strips, blobs and noise, also inverted."""
    kind = draw(st.sampled_from(["empty", "pixel", "border", "blobs", "noise"]))
    mask = np.zeros(SHAPE, dtype=np.uint8)
    y, x = st.integers(0, HEIGHT - 1), st.integers(0, WIDTH - 1)
    if kind == "pixel":
        mask[draw(y), draw(x)] = 1
    elif kind == "border":
        mask[: draw(y), : draw(x)] = 1
    elif kind in ("blobs", "noise"):
        rng = np.random.default_rng(draw(st.integers(0, 2**32)))
        if kind == "noise":
            mask = (rng.random(SHAPE) < draw(st.floats(0, 1))).astype(np.uint8)
        else:
            for _ in range(draw(st.integers(1, 4))):
                mask |= random_label(rng, blink_share=0)
    return 1 - mask if draw(st.booleans()) else mask


@settings(max_examples=40, deadline=None)
@given(masks())
def test_every_encoding_is_exact(mask):
    decoder = codec.FrameDecoder()
    bits = codec.pack_bits(mask)
    assert bits.shape == (32000,)
    np.testing.assert_array_equal(codec.unpack_bits(bits), mask)

    squared = maps.squared_distance(mask)
    words, first = codec.pack_squared(squared)
    np.testing.assert_array_equal(decoder.squared(words, first), squared)
    out = np.full((2, *SHAPE), np.nan, dtype=np.float32)
    decoder.distances(words, first, bits, out)
    np.testing.assert_array_equal(bits_of(out), bits_of(maps.distance_maps(mask)))

    weights = maps.spatial_weights(mask)
    packed = codec.pack_values(weights, None)
    assert packed is not None
    decoded = np.full(SHAPE, np.nan, dtype=np.float32)
    decoder.weights(packed[0], packed[1] or 0.0, decoded)
    np.testing.assert_array_equal(bits_of(decoded), bits_of(weights))


def test_tables_equal_the_definition_for_every_integer():
    squared = np.arange(maps.MAX_DISTANCE_SQUARED + 1)
    for label in (0, 1):
        wanted = maps.maps_from_squared(squared, np.full(squared.shape, label))
        outside, inside = codec.distance_tables()
        found = (inside, outside) if label == 0 else (outside, inside)
        np.testing.assert_array_equal(bits_of(np.stack(found)), bits_of(wanted))


def test_zero_has_one_sign():
    assert not np.signbit(codec.distance_tables()[codec.distance_tables() == 0]).any()


@pytest.mark.parametrize(
    "odd",
    [
        pytest.param(19.0, id="third value"),
        pytest.param(-0.0, id="minus zero"),
        pytest.param(np.nextafter(np.float32(20), np.float32(0)), id="last bit"),
    ],
)
def test_weights_of_three_values_are_refused(odd):
    weights = np.zeros(SHAPE, dtype=np.float32)
    weights[100:120, 5:50] = 20
    assert codec.pack_values(weights, None) is not None
    assert codec.pack_values(weights, 20.0) is not None
    assert codec.pack_values(weights, 19.0) is None, "the value of previous rows is used"
    weights[3, 4] = odd
    assert codec.pack_values(weights, None) is None


@pytest.mark.parametrize("start", [0, 256_000, maps.MAX_DISTANCE_SQUARED + 1 - 256_000])
def test_decoded_distances_equal_the_tables_for_every_integer(start):
    """The float64 computation is exact on this CPU."""
    band, row, column = np.ogrid[: HEIGHT // codec.BAND, : codec.BAND, :WIDTH]
    squared = start + ((band * WIDTH + column) * codec.BAND + row).reshape(SHAPE)
    assert len(np.unique(squared)) == 256_000
    outside, inside = codec.distance_tables()
    out = np.empty((2, *SHAPE), dtype=np.float32)
    for pupil in (0, 1):
        bits = codec.pack_bits(np.full(SHAPE, pupil))
        codec.FrameDecoder().distances(*codec.pack_squared(squared), bits, out)
        np.testing.assert_array_equal(bits_of(out[1 - pupil]), bits_of(outside[squared]))
        np.testing.assert_array_equal(bits_of(out[pupil]), bits_of(inside[squared]))


@pytest.mark.parametrize(
    ("row", "column", "message"),
    [
        pytest.param(7, None, "starts row 7 with the squared distance", id="first of a row"),
        pytest.param(20, None, "starts row 0 with the squared distance", id="first of a band"),
        pytest.param(9, 0, "starts row 9 with the squared distance", id="word of the first pixel"),
        pytest.param(20, 600, r"squared distances -?\d+..\d+, expected 0..567522", id="word"),
    ],
)
def test_damaged_distances_are_detected(row, column, message):
    mask = np.zeros(SHAPE, dtype=np.uint8)
    mask[:60, 600:] = 1
    words, first = codec.pack_squared(maps.squared_distance(mask))
    if column is None:
        first[row] += 600_000
    else:
        words[row * WIDTH + column] ^= 0x8000
    out = np.empty((2, *SHAPE), dtype=np.float32)
    with pytest.raises(DataError, match=message):
        codec.FrameDecoder().distances(words, first, codec.pack_bits(mask), out)


def test_image_is_normalized_as_documented():
    image = (np.arange(HEIGHT * WIDTH) % 256).astype(np.uint8).reshape(SHAPE)
    out = np.empty(SHAPE, dtype=np.float32)
    codec.write_network_input(image, out)
    wanted = (torch.from_numpy(image).float() / 255 - 0.5) / 0.5
    np.testing.assert_array_equal(out, wanted.numpy())
    assert out.min() == -1
    assert out.max() == 1
