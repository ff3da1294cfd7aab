"""Metrics compared with NumPy on random masks; drawn ellipses compared with geometry."""

import math

import numpy as np
import pytest
import torch

from pupilseg.geometry import (
    ELLIPSE_SCALE,
    RADIUS_UNIT,
    ellipse_from_vector,
    ellipse_mask,
    ellipse_vector,
)
from pupilseg.models import create_model, model_entry
from pupilseg.train.losses import LOSSES
from pupilseg.train.metrics import (
    COUNTS,
    EpochMetrics,
    ellipse_masks,
    mean_iou,
    predicted_mask,
    scores,
)
from tests.helpers.batches import BLINK, random_batch
from tests.helpers.fakes import random_label

CPU = torch.device("cpu")
NO_LOSS = {"loss": torch.tensor(0.0)}


def random_masks(seed, frames=7):
    """Predictions near the truth and far from it, blinks, and empty predictions."""
    rng = np.random.default_rng(seed)
    truth = [random_label(rng, blink_share=0) for _ in range(frames)]
    found = [np.roll(mask, (int(rng.integers(9)), 5), (0, 1)) for mask in truth]
    truth[1] = BLINK  # a prediction without a pupil
    found[2] = BLINK  # a pupil without a prediction
    truth[3] = found[3] = BLINK
    found[4] = random_label(rng, blink_share=0)
    found[5] = 1 - BLINK
    return np.stack(found), np.stack(truth)


def reference(found, truth):
    """Scores from sets of pixels, frame by frame."""
    found, truth = found != 0, truth != 0
    iou = []
    for a, b in [(~found, ~truth), (found, truth)]:
        iou.append((a & b).sum() / (a | b).sum() if (a | b).any() else 1.0)
    errors, shown = [], 0
    for a, b in zip(found, truth, strict=True):
        shown += b.any()
        if a.any() and b.any():
            centers = [np.argwhere(mask).mean(axis=0) for mask in (a, b)]
            errors.append(math.dist(*centers))
    return {
        "iou": np.mean(iou),
        "pupil_iou": iou[1],
        "center_px": np.mean(errors) if errors else math.nan,
        "found": len(errors) / shown if shown else math.nan,
    }


def measured(found, truth, sizes=None):
    """Scores by `EpochMetrics`, in batches of the given sizes."""
    metrics = EpochMetrics(["loss"], CPU)
    start = 0
    for size in sizes or [len(found)]:
        part = slice(start, start + size)
        metrics.update(
            NO_LOSS,
            torch.from_numpy(found[part]) != 0,
            torch.from_numpy(truth[part]),
            torch.from_numpy(np.stack([ellipse_vector(mask) for mask in truth[part]])),
        )
        start += size
    return scores(metrics.names, metrics.sums.tolist(), "valid"), metrics


@pytest.mark.parametrize("seed", range(4))
def test_scores_equal_the_reference(seed):
    found, truth = random_masks(seed)
    values, _ = measured(found, truth)
    for name, expected in reference(found, truth).items():
        # The true center is that of the label's ellipse, stored as float32.
        tolerance = 1e-3 if name == "center_px" else 1e-12
        assert values[f"valid_{name}"] == pytest.approx(expected, abs=tolerance), name


def test_a_perfect_prediction():
    _, truth = random_masks(0)
    values, _ = measured(truth, truth)
    assert values["valid_iou"] == values["valid_pupil_iou"] == values["valid_found"] == 1
    assert values["valid_center_px"] < 1e-3


def test_a_half_overlap_has_an_iou_of_a_third_and_an_error_of_half_the_width():
    truth, found = BLINK.copy(), BLINK.copy()
    truth[100:200, 100:200] = 1
    found[100:200, 150:250] = 1
    values, metrics = measured(found[None], truth[None])
    assert values["valid_pupil_iou"] == pytest.approx(1 / 3)
    assert values["valid_center_px"] == pytest.approx(50, abs=1e-3)
    counts = dict(zip(metrics.names, metrics.sums.tolist(), strict=True))
    assert counts["pupil_intersection"] == 5000
    assert counts["pupil_union"] == 15000
    assert counts["background_intersection"] == 256000 - 15000
    assert counts["background_union"] == 256000 - 5000


def test_blinks_alone():
    values, _ = measured(np.stack([BLINK, BLINK]), np.stack([BLINK, BLINK]))
    assert values["valid_iou"] == values["valid_pupil_iou"] == 1
    assert math.isnan(values["valid_center_px"])
    assert math.isnan(values["valid_found"])


def test_without_a_prediction_nothing_is_found_and_there_is_no_distance():
    truth = BLINK.copy()
    truth[10:20, 10:20] = 1
    values, _ = measured(BLINK[None], truth[None])
    assert values["valid_found"] == values["valid_pupil_iou"] == 0
    assert math.isnan(values["valid_center_px"])


@pytest.mark.parametrize("sizes", [[1] * 7, [2, 2, 2, 1], [5, 2]], ids=str)
def test_batches_of_any_size_add_up_to_one_big_batch(sizes):
    found, truth = random_masks(9)
    whole, one = measured(found, truth)
    parts, several = measured(found, truth, sizes)
    assert parts == pytest.approx(whole, rel=1e-6)
    assert several.sums.tolist() == pytest.approx(one.sums.tolist(), rel=1e-6)


def test_losses_are_averaged_over_frames_not_batches():
    metrics = EpochMetrics(["loss", "ce_loss"], CPU)
    for frames, loss in [(3, 1.0), (1, 5.0)]:
        empty = torch.zeros(frames, 400, 640, dtype=torch.bool)
        losses = {"loss": torch.tensor(loss), "ce_loss": torch.tensor(2 * loss)}
        metrics.update(losses, empty, empty, torch.zeros(frames, 4))
    values = scores(metrics.names, metrics.sums.tolist(), "train")
    assert values["train_loss"] == 2
    assert values["train_ce_loss"] == 4
    assert not any(f"train_{name}" in values for name in COUNTS)


def test_reset_zeroes_the_same_buffer():
    found, truth = random_masks(0)
    _, metrics = measured(found, truth)
    before = metrics.sums.data_ptr()
    metrics.reset()
    assert not metrics.sums.any()
    assert metrics.sums.data_ptr() == before


def test_counts_stay_exact_over_a_million_frames():
    """float32 would stop counting pixels at 2^24, after 66 frames."""
    metrics = EpochMetrics(["loss"], CPU)
    metrics.sums += 256000.0 * 1e6
    truth = torch.zeros(1, 400, 640, dtype=torch.bool)
    truth[0, 0, 0] = True
    before = metrics.sums.clone()
    metrics.update(NO_LOSS, truth, truth, torch.zeros(1, 4))
    change = dict(zip(metrics.names, (metrics.sums - before).tolist(), strict=True))
    assert change["pupil_intersection"] == 1
    assert change["background_intersection"] == 255999


def test_counts_of_a_large_batch_are_exact():
    """66 full frames minus one pixel: an odd number above 2^24, which float32 would round."""
    metrics = EpochMetrics(["loss"], CPU)
    mask = torch.ones(66, 400, 640, dtype=torch.bool)
    mask[0, 0, 0] = False
    label = mask.clone()
    label[1, 0, 0] = False
    metrics.update(NO_LOSS, mask, label, torch.zeros(66, 4))
    change = dict(zip(metrics.names, metrics.sums.tolist(), strict=True))
    assert change["pupil_intersection"] == 66 * 256_000 - 2
    assert change["pupil_union"] == 66 * 256_000 - 1
    assert change["background_intersection"] == 1
    assert change["background_union"] == 2


def test_updates_keep_no_autograd_graph():
    metrics = EpochMetrics(["loss"], CPU)
    loss = torch.ones((), requires_grad=True) * 2
    empty = torch.zeros(1, 400, 640, dtype=torch.bool)
    metrics.update({"loss": loss}, empty, empty, torch.zeros(1, 4))
    assert not metrics.sums.requires_grad


def test_drawn_ellipses_equal_those_of_geometry():
    rng = np.random.default_rng(1)
    pixels = np.stack(
        [
            rng.uniform(low, high, 40)
            for low, high in [(-20, 660), (-20, 420), (0.2, 150), (0.2, 150)]
        ],
        axis=1,
    )
    vectors = (pixels / ELLIPSE_SCALE).astype(np.float32)
    drawn = ellipse_masks(torch.from_numpy(vectors)).numpy()
    assert drawn.dtype == bool
    different = sum(
        (mask != ellipse_mask(ellipse_from_vector(vector))).sum()
        for mask, vector in zip(drawn, vectors, strict=True)
    )
    assert drawn.sum() > 100_000
    assert different <= 2  # a pixel exactly on the border, rounded in float32


def test_a_drawn_ellipse_includes_its_border():
    radii = torch.arange(3.0, 60.0)
    normalized = radii / RADIUS_UNIT
    exact = radii[normalized * RADIUS_UNIT == radii].int().tolist()  # the others are rounded
    assert len(exact) > 10
    for r in exact:
        mask = ellipse_masks(torch.tensor([[0.5, 0.5, r / RADIUS_UNIT, r / RADIUS_UNIT]]))[0]
        assert mask[[200 - r, 200 + r, 200, 200], [320, 320, 320 - r, 320 + r]].all()


@pytest.mark.parametrize("radii", [(0, 0), (0, 0.1), (0.1, 0), (-0.1, 0.1)], ids=str)
def test_an_ellipse_without_area_is_an_empty_mask(radii):
    assert not ellipse_masks(torch.tensor([[0.5, 0.5, *radii]])).any()


def test_masks_of_both_kinds_of_output():
    logits = torch.zeros(2, 2, 400, 640)
    logits[0, 1, 3, 4] = 1e-3
    logits[1, 0] = 5
    mask = predicted_mask(logits)
    assert mask.dtype == torch.bool
    assert mask.nonzero().tolist() == [[0, 3, 4]]
    vectors = torch.tensor([[0.5, 0.5, 0.1, 0.1]])
    assert torch.equal(predicted_mask(vectors), ellipse_masks(vectors))


@pytest.mark.parametrize("name", ["efficientvit_tiny", "ellipse"])
def test_loss_and_metrics_trace_into_one_graph(name):
    """A break would cost launches on CUDA, and passes over memory."""
    batch = random_batch(2, seed=3)
    loss, terms = LOSSES[model_entry(name).task]
    output = create_model(name).train()(batch.image)
    metrics = EpochMetrics(terms, CPU)

    def both(output, alpha):
        losses = loss(output, batch, alpha)
        metrics.update(losses, predicted_mask(output), batch.label, batch.ellipse)
        return losses["loss"]

    torch._dynamo.reset()
    traced = torch._dynamo.explain(both)(output, torch.tensor(0.5))
    assert traced.graph_count == 1, traced.break_reasons


def test_half_precision_ellipses_are_drawn_in_float32():
    vector = torch.tensor([[0.5, 0.5, 0.125, 0.125]])
    assert torch.equal(ellipse_masks(vector.half()), ellipse_masks(vector))


@pytest.mark.parametrize("blink", [False, True])
@pytest.mark.parametrize("found", [False, True])
def test_the_mean_iou_on_the_device_equals_that_of_the_scores(blink, found):
    metrics = EpochMetrics(("loss",), torch.device("cpu"))
    label = torch.zeros(2, 400, 640, dtype=torch.int64)
    mask = torch.zeros(2, 400, 640, dtype=torch.bool)
    if not blink:
        label[:, 50:90, 100:151] = 1
    if found:
        mask[:, 60:97, 110:153] = True
    metrics.update({"loss": torch.ones(())}, mask, label, torch.zeros(2, 4))
    expected = scores(metrics.names, metrics.sums.tolist(), "valid")["valid_iou"]
    assert mean_iou(metrics.names, metrics.sums).item() == expected
