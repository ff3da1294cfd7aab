"""Confidence calibration: an increasing map that generalizes to other frames."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pupilseg.model_files.calibration import Calibration, cross_fitted, fit_calibration, reliability


def frames(seed, count=4000):
    """Returns raw scores and outcomes with P(good) = sigmoid(3 logit(raw) - 2)."""
    rng = np.random.default_rng(seed)
    raw = rng.beta(6, 1.2, count)
    chance = 1 / (1 + np.exp(-(3 * np.log(raw / (1 - raw)) - 2)))
    return raw, rng.random(count) < chance


def test_fit_finds_the_map():
    raw, good = frames(0)
    found = fit_calibration(raw, good, "drawn")
    assert (found.slope, found.intercept) == pytest.approx((3, -2), abs=0.35)
    assert (found.frames, found.data) == (4000, "drawn")


def test_the_map_holds_for_other_frames():
    raw, good = frames(0, 1000)
    other, outcome = frames(1)
    calibration = fit_calibration(raw, good)
    confidence = np.array([calibration(score) for score in other])
    assert reliability(confidence, outcome).error < 0.02 < 0.08 < reliability(other, outcome).error
    sure = confidence > 0.9
    assert sure.sum() > 1000
    assert outcome[sure].mean() > 0.9
    assert reliability(cross_fitted(raw, good), good).error < 0.03


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.booleans()), max_size=40),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_any_frames_give_an_increasing_map(pairs, low, high):
    raw, good = np.array([p for p, _ in pairs]), np.array([g for _, g in pairs], bool)
    found = fit_calibration(raw, good)
    assert 0 <= found(min(low, high)) <= found(max(low, high)) < 1
    assert found(0.1) < found(0.9)
    assert Calibration.from_json(found.to_json()) == found


def test_a_misleading_score_keeps_its_order():
    raw, good = np.repeat([0.2, 0.9], 20), np.repeat([True, False], 20)
    found = fit_calibration(raw, good)
    assert found(0.2) < found(0.9)
    assert found(0.9) == pytest.approx(0.5, abs=0.1)


def test_few_good_frames_give_a_low_bound():
    assert fit_calibration(np.full(3, 0.99), np.ones(3, bool))(0.99) <= 0.8
    assert fit_calibration(np.empty(0), np.empty(0, bool))(1.0) <= 0.5
    assert fit_calibration(np.full(998, 0.99), np.ones(998, bool))(0.99) > 0.99


def test_reliability_groups_frames_by_confidence():
    confidence, good = np.linspace(0, 1, 100), np.arange(100) % 2 == 0
    table = reliability(confidence, good, bins=4)
    assert table.frames.tolist() == [25] * 4
    assert table.confidence == pytest.approx([0.121, 0.374, 0.626, 0.879], abs=1e-3)
    assert table.share_good == pytest.approx([0.52, 0.48, 0.52, 0.48])
    assert np.isnan(reliability(np.empty(0), np.empty(0, bool)).error)


@pytest.mark.parametrize("text", ["", "3", "{}", '{"slope": "x"}', "null"])
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError):  # noqa: PT011 - some messages come from json
        Calibration.from_json(text)
