"""Losses compared with float64 NumPy, with closed forms, and with numerical gradients."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, log_expit, log_softmax, softmax

from pupilseg.geometry import ELLIPSE_SCALE
from pupilseg.models.ellipse import EllipseOutput
from pupilseg.train.losses import (
    ELLIPSE_TERMS,
    SEGMENTATION_TERMS,
    alpha_schedule,
    ellipse_loss,
    segmentation_loss,
    segmentation_terms,
)
from pupilseg.train.losses.ellipse import COVER_CE_WEIGHT, cover_loss
from tests.helpers.batches import BLINK, batch_of, random_batch

SMALL = (3, 7, 9)


def reference(logits, label, weights, dist_map, alpha):
    """The four terms in float64, with two channels and a loop over frames, as in the papers."""
    logits = np.asarray(logits, dtype=np.float64)
    probability = softmax(logits, axis=1)
    truth = np.stack([label == 0, label == 1], axis=1).astype(np.float64)
    ce = -(truth * log_softmax(logits, axis=1)).sum(axis=1)
    ce = np.mean(ce * (1 + np.asarray(weights, dtype=np.float64)))
    dice = []
    for r, p in zip(truth, probability, strict=True):
        intersection = union = 0.0
        for c in range(2):
            if r[c].any():
                weight = 1 / r[c].sum() ** 2
                intersection += weight * (r[c] * p[c]).sum()
                union += weight * (r[c] + p[c]).sum()
        dice.append(1 - 2 * intersection / union)
    per_class = (probability * np.asarray(dist_map, dtype=np.float64)).mean(axis=(2, 3))
    boundary = per_class.mean(axis=1).mean()
    total = ce + alpha * np.mean(dice) + (1 - alpha) * boundary
    return dict(zip(SEGMENTATION_TERMS, (total, ce, np.mean(dice), boundary), strict=True))


def random_logits(frames, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(frames, 2, 400, 640, generator=generator) * scale


def perfect_logits(label, size=12.0):
    z = (label.float() * 2 - 1) * size
    return torch.stack([-z / 2, z / 2], dim=1)


def terms(losses):
    return {name: float(value) for name, value in losses.items()}


@pytest.fixture(scope="module")
def batch():
    return random_batch(3, seed=1, blink=True)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_segmentation_loss_equals_the_reference(batch, alpha):
    logits = random_logits(3)
    found = terms(segmentation_loss(logits, batch, alpha))
    targets = (batch.label, batch.spatial_weights, batch.dist_map)
    expected = reference(logits.numpy(), *(x.numpy() for x in targets), alpha)
    assert tuple(found) == SEGMENTATION_TERMS
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=2e-6), name


def small_case(data, dtype=np.float64):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    share = data.draw(st.sampled_from([0.0, 0.01, 0.3, 1.0]))
    scale = data.draw(st.sampled_from([0.1, 5.0, 60.0]))
    return (
        rng.normal(size=(SMALL[0], 2, *SMALL[1:])) * scale,
        (rng.random(SMALL) < share).astype(np.int64),
        (rng.random(SMALL) * 20).astype(dtype),
        rng.normal(size=(SMALL[0], 2, *SMALL[1:])).astype(dtype),
    )


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_terms_equal_the_reference_for_any_share_of_pupil(data):
    """Compares in float64, so that rounding cannot hide a wrong formula."""
    logits, label, weights, dist_map = small_case(data)
    expected = reference(logits, label, weights, dist_map, 0.5)
    z = torch.from_numpy(logits[:, 1] - logits[:, 0])
    targets = (torch.from_numpy(x) for x in (label, weights, dist_map))
    ce, dice, boundary = (float(term) for term in segmentation_terms(z, *targets))
    # torch's softplus is linear above 20, an error of 2e-9.
    assert ce == pytest.approx(expected["ce_loss"], rel=1e-7, abs=1e-7)
    assert dice == pytest.approx(expected["dice_loss"], rel=1e-9, abs=1e-12)
    assert boundary == pytest.approx(expected["surface_loss"], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0], ids=["blink", "pupil", "full"])
def test_gradients_by_finite_differences(share):
    generator = torch.Generator().manual_seed(3)
    shape = (2, 4, 5)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    label = (torch.rand(shape, generator=generator) < share).double()
    weights, dist_map = draw(*shape).abs(), draw(2, 2, 4, 5)
    z = draw(*shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: segmentation_terms(x, label, weights, dist_map), z)


def test_the_gradient_equals_that_of_a_softmax_over_two_channels(batch):
    """The one-channel form must give both logits the gradient of the two-channel form."""
    logits = random_logits(3, seed=2).requires_grad_()
    (found,) = torch.autograd.grad(segmentation_loss(logits, batch, 0.4)["loss"], logits)
    wide = logits.detach().double().requires_grad_()
    p, log_p = wide.softmax(dim=1), wide.log_softmax(dim=1)
    truth = torch.stack([batch.label == 0, batch.label == 1], dim=1).double()
    ce = (-(truth * log_p).sum(dim=1) * (1 + batch.spatial_weights.double())).mean()
    size = truth.sum(dim=(2, 3))
    weight = torch.where(size > 0, 1 / size.clamp(min=1) ** 2, 0)
    intersection = (weight * (p * truth).sum(dim=(2, 3))).sum(dim=1)
    union = (weight * (p + truth).sum(dim=(2, 3))).sum(dim=1)
    dice = (1 - 2 * intersection / union).mean()
    boundary = (p * batch.dist_map.double()).mean()
    (expected,) = torch.autograd.grad(ce + 0.4 * dice + 0.6 * boundary, wide)
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error < 1e-5


def test_closed_forms(batch):
    undecided = terms(segmentation_loss(torch.zeros(3, 2, 400, 640), batch, 0.5))
    weight = 1 + batch.spatial_weights.double().mean().item()
    assert undecided["ce_loss"] == pytest.approx(np.log(2) * weight, rel=1e-5)
    distance = batch.dist_map.double().mean().item()
    assert undecided["surface_loss"] == pytest.approx(distance / 2, rel=1e-5)
    perfect = terms(segmentation_loss(perfect_logits(batch.label, 40), batch, 0.5))
    assert perfect["ce_loss"] < 1e-7
    assert abs(perfect["dice_loss"]) < 1e-6


def test_dice_of_a_half_overlap():
    """A pupil of 4 of 16 pixels; the prediction has two of them and two others."""
    label, z = torch.zeros(1, 4, 4), torch.full((1, 4, 4), -40.0)
    label[0, 0] = 1
    z[0, 0, :2] = z[0, 1, :2] = 40
    # pupil: w 1/16, intersection 2, union 8; background: w 1/144, intersection 10, union 24
    expected = 1 - 2 * (2 / 16 + 10 / 144) / (8 / 16 + 24 / 144)
    _, dice, _ = segmentation_terms(z, label, torch.zeros(1, 4, 4), torch.zeros(1, 2, 4, 4))
    assert float(dice) == pytest.approx(expected, abs=1e-6)


def test_better_predictions_score_better(batch):
    shifted = torch.roll(batch.label, 12, dims=2)
    far = torch.roll(batch.label, 80, dims=2)
    ladder = [batch.label, shifted, far, 1 - batch.label]
    scored = [terms(segmentation_loss(perfect_logits(x, 6), batch, 0.5)) for x in ladder]
    for name in SEGMENTATION_TERMS:
        values = [row[name] for row in scored]
        assert values == sorted(values), name
        assert len(set(values)) == len(values), name


@pytest.mark.parametrize("label", [BLINK, 1 - BLINK], ids=["blink", "full"])
@pytest.mark.parametrize("size", [1.0, 200.0])
def test_a_frame_of_one_class_has_finite_losses_and_gradients(label, size):
    batch = batch_of([label])
    logits = (random_logits(1) * size).requires_grad_()
    losses = segmentation_loss(logits, batch, 0.5)
    losses["loss"].backward()
    assert all(torch.isfinite(value) for value in losses.values())
    assert torch.isfinite(logits.grad).all()
    right = terms(segmentation_loss(perfect_logits(batch.label), batch, 0.5))
    wrong = terms(segmentation_loss(perfect_logits(1 - batch.label), batch, 0.5))
    assert all(right[name] < wrong[name] for name in SEGMENTATION_TERMS)
    assert abs(right["dice_loss"]) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_converted_first(batch, dtype):
    logits = random_logits(3).to(dtype)
    logits[0, 0, 0, 0], logits[0, 1, 0, 0] = 60000, -60000  # their difference overflows float16
    found = segmentation_loss(logits, batch, 0.5)
    wide = segmentation_loss(logits.float(), batch, 0.5)
    for name in SEGMENTATION_TERMS:
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], wide[name]), name


@pytest.mark.parametrize("epochs", [1, 2, 15, 125])
def test_alpha_equals_that_of_ritnet(epochs):
    n = min(epochs, 125)
    expected = 1 - np.arange(1, n + 1) / n
    found = [alpha_schedule(epoch, epochs) for epoch in range(epochs)]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_alpha_of_a_long_run_falls_over_125_epochs_and_stays_at_zero():
    found = np.array([alpha_schedule(epoch, 300) for epoch in range(300)])
    np.testing.assert_allclose(found[:125], 1 - np.arange(1, 126) / 125, atol=1e-12)
    assert (found[125:] == 0).all()


def test_label_of_any_integer_type_gives_the_same_loss(batch):
    from dataclasses import replace

    logits = random_logits(3)
    for dtype in (torch.uint8, torch.bool):
        other = segmentation_loss(logits, replace(batch, label=batch.label.to(dtype)), 0.5)
        assert terms(other) == terms(segmentation_loss(logits, batch, 0.5))


def ellipse_reference(prediction, cover, batch):
    """The five terms in float64 by NumPy and SciPy, frame by frame."""
    prediction, truth = np.float64(prediction), np.float64(batch.ellipse)
    size = np.abs(prediction - truth) * ELLIPSE_SCALE / 10
    smooth = np.where(size < 1, 0.5 * size**2, size - 0.5)
    rows = []
    for error, logit, mask in zip(smooth, np.float64(cover), batch.label.numpy(), strict=True):
        cells = np.add.reduceat(np.add.reduceat(mask, range(0, 400, 4), 0), range(0, 640, 4), 1)
        target, p = cells / 16, expit(logit)
        ce = -(target * log_expit(logit) + (1 - target) * log_expit(-logit)).mean()
        if mask.any():
            dice = 1 - 2 * (p * target).sum() / ((p**2).sum() + (target**2).sum())
            rows.append([COVER_CE_WEIGHT * ce + dice, ce, dice, error[:2].sum(), error[2:].sum()])
        else:
            rows.append([COVER_CE_WEIGHT * ce, ce, 0, 0, 0])
    return dict(zip(ELLIPSE_TERMS, np.mean(rows, axis=0), strict=True))


def random_cover(frames, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(frames, 100, 160, generator=generator) * 3


def perfect_cover(label):
    """Logits whose sigmoid is each cell's share of pupil."""
    share = torch.nn.functional.avg_pool2d(label[:, None].double(), 4)[:, 0]
    return torch.logit(share, eps=1e-9)


@pytest.mark.parametrize("near", [0.001, 0.3])
def test_ellipse_loss_equals_the_reference(batch, near):
    """The error of the numbers is quadratic near the truth and linear far from it."""
    rng = np.random.default_rng(5)
    prediction = batch.ellipse.numpy() + rng.normal(size=(3, 4)).astype(np.float32) * near
    cover = random_cover(3)
    found = terms(ellipse_loss(EllipseOutput(torch.from_numpy(prediction), cover), batch, 0.5))
    assert tuple(found) == ELLIPSE_TERMS
    for name, value in ellipse_reference(prediction, cover.numpy(), batch).items():
        assert found[name] == pytest.approx(value, rel=1e-4), name


def test_the_true_shares_have_the_lowest_loss(batch):
    label = batch.label[:2]
    perfect = perfect_cover(label)
    ce, dice = cover_loss(perfect, label)
    assert abs(float(dice)) < 1e-6
    for other in (torch.roll(perfect, 1, dims=2), perfect * 0.9, perfect * 1.1):
        worse_ce, worse_dice = cover_loss(other, label)
        assert worse_ce > ce
        assert worse_dice > dice


def test_gradients_of_the_soft_mask_by_finite_differences():
    generator = torch.Generator().manual_seed(3)
    label = (torch.rand(3, 8, 12, generator=generator) < 0.4).double()
    label[2] = 0
    cover = torch.randn(3, 2, 3, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: cover_loss(x, label), cover)


def test_only_the_soft_mask_is_trained(batch):
    ellipse = (batch.ellipse + 0.1).requires_grad_()
    cover = random_cover(3).requires_grad_()
    losses = ellipse_loss(EllipseOutput(ellipse, cover), batch, 0.5)
    losses["loss"].backward()
    assert losses["center_loss"] > 0
    assert losses["radius_loss"] > 0
    assert ellipse.grad is None
    assert (cover.grad != 0).all()


def test_the_target_of_a_blink_is_an_empty_mask():
    batch = batch_of([BLINK])
    cover = random_cover(1).requires_grad_()
    losses = ellipse_loss(EllipseOutput(torch.full((1, 4), 0.3), cover), batch, 0.5)
    losses["loss"].backward()
    assert (cover.grad > 0).all()
    found = {name: float(value.detach()) for name, value in losses.items()}
    assert [found[name] for name in ("dice_loss", "center_loss", "radius_loss")] == [0, 0, 0]
    empty = ellipse_loss(EllipseOutput(torch.zeros(1, 4), torch.full_like(cover, -30)), batch, 0.5)
    assert terms(empty)["loss"] < 1e-9


def test_a_full_frame_has_a_finite_loss_and_gradient():
    batch = batch_of([1 - BLINK])
    cover = (random_cover(1) * 100).requires_grad_()
    losses = ellipse_loss(EllipseOutput(torch.zeros(1, 4), cover), batch, 0.5)
    losses["loss"].backward()
    assert all(torch.isfinite(value) for value in losses.values())
    assert torch.isfinite(cover.grad).all()


def test_ellipse_loss_in_half_precision_is_float32(batch):
    output = EllipseOutput(batch.ellipse.half(), random_cover(3).half())
    losses = ellipse_loss(output, batch, 0.5)
    assert {value.dtype for value in losses.values()} == {torch.float32}


@pytest.mark.parametrize("criterion", [segmentation_loss, ellipse_loss])
def test_losses_of_equal_frames_do_not_depend_on_their_number(criterion):
    one, two = random_batch(1, seed=4), random_batch(1, seed=4)
    two = batch_of([one.label[0].numpy().astype(np.uint8)] * 2)
    if criterion is segmentation_loss:
        output = random_logits(1)
    else:
        output = EllipseOutput(torch.tensor([[0.5, 0.5, 0.1, 0.1]]), random_cover(1))
    single = terms(criterion(output, one, 0.5))
    if criterion is segmentation_loss:
        output = torch.cat([output, output])
    else:
        output = EllipseOutput(*(torch.cat([part, part]) for part in output))
    assert terms(criterion(output, two, 0.5)) == pytest.approx(single, rel=1e-5)
