"""Samples are checked before they are written; errors name the place, value and expectation."""

from __future__ import annotations

import numpy as np
import pytest

from pupilseg.errors import DataError
from pupilseg.sample import Sample, check_sample

FRAME = np.zeros((400, 640), np.uint8)
MAPS = np.zeros((2, 400, 640), np.float32)


def sample_with(**changes):
    return Sample(
        **({"name": "x", "image": FRAME, "label": FRAME, "origin": "file row 3"} | changes)
    )


def at(array, place, value):
    array = array.copy()
    array[place] = value
    return array


def test_a_valid_sample_is_returned_unchanged():
    for label in (FRAME, FRAME + 1, at(FRAME, (0, 0), 1)):
        sample = sample_with(
            label=label, spatial_weights=MAPS[0], dist_map=MAPS, ellipse=np.zeros(4, np.float32)
        )
        assert check_sample(sample) is sample


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": ""}, "the name is '', expected a string"),
        ({"name": 7}, "the name is 7"),
        (
            {"image": FRAME[:, :600]},
            r"column image is uint8 \(400, 600\), expected uint8 \(400, 640\)",
        ),
        ({"image": FRAME.T}, r"column image is uint8 \(640, 400\)"),
        ({"image": FRAME.astype(np.float32)}, "column image is float32"),
        ({"label": FRAME.astype(np.int64)}, "column label is int64"),
        ({"label": FRAME.astype(np.float32)}, "column label is float32"),
        ({"label": at(FRAME, (399, 639), 3)}, r"column label has values 0..3, expected \{0, 1\}"),
        ({"spatial_weights": np.zeros((400, 640))}, "column spatial_weights is float64"),
        ({"spatial_weights": at(MAPS[0], (5, 5), np.nan)}, "spatial_weights holds NaN or infinity"),
        ({"dist_map": MAPS[0]}, r"column dist_map is float32 \(400, 640\)"),
        ({"dist_map": at(MAPS, (1, 5, 5), np.inf)}, "column dist_map holds NaN or infinity"),
        ({"dist_map": at(MAPS, np.s_[0, 5, 5:7], [np.inf, -np.inf])}, "dist_map holds NaN"),
        ({"ellipse": np.zeros(5, np.float32)}, "column ellipse is float32"),
        ({"ellipse": np.full(4, np.nan, np.float32)}, "column ellipse holds NaN"),
    ],
)
def test_errors_name_the_place_and_the_problem(changes, words):
    with pytest.raises(DataError, match="^file row 3: .*" + words):
        check_sample(sample_with(**changes))
