"""Preprocessing equals that of RITnet and revision A, and is applied only once."""

import cv2
import numpy as np
import pytest

from pupilseg.errors import DataError, UsageError
from pupilseg.preprocess import PREPROCESSINGS, get_preprocessing, remaining_preprocessing
from tests.helpers.fakes import random_image

GC = "gamma0.8+clahe1.5"


def test_gamma_clahe_equals_its_definition():
    image = random_image(np.random.default_rng(0))
    before = image.copy()
    table = np.array([int(255.0 * (i / 255.0) ** 0.8) for i in range(256)], dtype=np.uint8)
    wanted = cv2.createCLAHE(1.5, (8, 8)).apply(table[image])
    found = get_preprocessing(GC)(image)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(image, before)
    assert not np.array_equal(found, image)
    assert PREPROCESSINGS["none"](image) is image


@pytest.mark.parametrize(
    ("applied", "wanted", "result"),
    [
        ("none", "none", ("none", "none")),
        ("none", GC, (GC, GC)),
        (GC, GC, ("none", GC)),
        (GC, "none", ("none", GC)),
    ],
)
def test_nothing_is_applied_twice(applied, wanted, result):
    assert remaining_preprocessing(applied, wanted) == result


def test_impossible_requests_are_refused():
    with pytest.raises(DataError, match="equalized"):
        remaining_preprocessing("equalized", GC)
    with pytest.raises(UsageError, match="none, gamma"):
        remaining_preprocessing("none", "gamma")
