"""Augmentation keeps targets consistent with images and does not write to its input."""

import subprocess
import sys
from dataclasses import fields, replace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from pupilseg.augment import AugmentConfig, apply, augment
from pupilseg.augment.apply import augment_on_device, augment_on_host, constants, make_plan
from pupilseg.augment.move import warp
from pupilseg.augment.part import Part
from pupilseg.augment.parts import PARTS
from pupilseg.augment.streaks import RAYS
from pupilseg.errors import UsageError
from pupilseg.geometry import HEIGHT, RADIUS_UNIT, WIDTH, Ellipse, ellipse_mask, ellipse_vector
from pupilseg.loader.loader import Batch
from pupilseg.maps import distance_maps, spatial_weights
from pupilseg.runtime.distributed import Ranks
from tests.helpers.batches import batch_of, random_batch

CPU = torch.device("cpu")
STILL = AugmentConfig(
    flip=0, scale=0, shift=0, streaks=0, blur=0, gamma=0, gain=0, offset=0, noise=0
)
FLIP = replace(STILL, flip=1)
MOVE = replace(STILL, scale=1, shift=1)
SINGLE = {
    "flip": FLIP,
    "scale": replace(STILL, scale=1),
    "shift": replace(STILL, shift=1),
    "streaks": replace(STILL, streaks=1),
    "blur": replace(STILL, blur=1),
    "gamma": replace(STILL, gamma=0.3),
    "gain": replace(STILL, gain=0.3),
    "offset": replace(STILL, offset=0.3),
    "noise": replace(STILL, noise=0.3),
}
IMAGE_PARTS = ["streaks", "blur", "gamma", "gain", "offset", "noise"]
MOVED = ("image", "label", "spatial_weights", "dist_map", "ellipse")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def copy_of(batch):
    return {f.name: getattr(batch, f.name).clone() for f in fields(batch)}


def bits(array):
    return np.asarray(array).view(np.int32)


def on_device(batch, plan, config):
    return augment_on_device(batch, plan, config, constants(config, CPU))


def discs(radii, centers=None):
    centers = centers or [(WIDTH / 2, HEIGHT / 2)] * len(radii)
    return [
        ellipse_mask(Ellipse(*center, radius, radius, 0.0))
        for radius, center in zip(radii, centers, strict=True)
    ]


def plan_with(plan, **changes):
    """Returns a plan with some values replaced: name -> value of every frame."""
    n = len(plan["flip"].flip)
    values = {name: torch.as_tensor(value) for name, value in changes.items()}
    values = {name: value.expand(n, *value.shape) for name, value in values.items()}
    changed = {}
    for part, drawn in plan.items():
        own = {name: values.pop(name) for name in drawn._fields if name in values}
        changed[part] = drawn._replace(**own)
    assert not values
    return changed


def still_plan(batch, **changes):
    """Returns a plan that does nothing except for the given values, the same for each frame."""
    return plan_with(make_plan(batch, STILL, generator()), **changes)


def pupils(radii):
    """Returns a batch to draw plans for: ellipses of discs in the middle, and no pixels."""
    empty = torch.empty(0)
    radius = torch.as_tensor(radii, dtype=torch.float32) / RADIUS_UNIT
    ellipse = torch.stack([radius.sign() / 2, radius.sign() / 2, radius, radius], dim=1)
    n = len(radii)
    return Batch(
        image=torch.zeros(n, 1, 1, 1),
        label=torch.zeros(n, 1, 1),
        spatial_weights=empty,
        dist_map=empty,
        ellipse=ellipse,
        index=torch.arange(n),
    )


@pytest.fixture(scope="module")
def batch():
    return random_batch(4, seed=3, blink=True)


@pytest.mark.parametrize(
    "changes",
    [{}, {"shift": 1, "reach": 0}, {"blur": 1, "blur_sigma": 0}],
    ids=["all", "reach", "sigma"],
)
def test_a_configuration_with_all_parts_off_changes_nothing(batch, changes):
    # A pupil whose center lies outside the frame: only a shift moves it into view.
    outside = replace(batch, ellipse=batch.ellipse - torch.tensor([1.0, 0, 0, 0]))
    config = replace(STILL, **changes)
    for form in (augment_on_host, on_device):
        out = form(outside, make_plan(outside, config, generator()), config)
        for name in copy_of(outside):
            assert torch.equal(getattr(out, name), getattr(outside, name)), name


# --- targets follow the label ---------------------------------------------------------------------


@pytest.mark.parametrize("config", [*SINGLE.values(), AugmentConfig()], ids=[*SINGLE, "all"])
def test_targets_are_those_of_the_label(batch, config):
    for seed in range(3):
        out = augment(batch, config, generator(seed))
        moved = make_plan(batch, config, generator(seed))["move"].moved
        for row, label in enumerate(out.label.numpy()):
            np.testing.assert_array_equal(bits(out.dist_map[row]), bits(distance_maps(label)))
            np.testing.assert_allclose(out.ellipse[row], ellipse_vector(label), atol=1e-5, rtol=0)
            # A flip mirrors the weights; Canny on a mirrored label can differ by one pixel.
            if moved[row] or not config.flip:
                np.testing.assert_array_equal(out.spatial_weights[row], spatial_weights(label))


@pytest.mark.parametrize("place", [(-12, 5), (WIDTH + 8, 200), (300, -9), (5, HEIGHT + 10)])
def test_targets_are_exact_for_a_pupil_cut_by_the_border(place):
    batch = batch_of(discs([30, 11, 25], [place, (320, 3), (638, 398)]))
    for seed in range(3):
        out = augment(batch, MOVE, generator(seed))
        for row, label in enumerate(out.label.numpy()):
            np.testing.assert_array_equal(bits(out.dist_map[row]), bits(distance_maps(label)))
            np.testing.assert_array_equal(out.spatial_weights[row], spatial_weights(label))
            np.testing.assert_allclose(out.ellipse[row], ellipse_vector(label), atol=1e-5, rtol=0)


def test_a_label_that_loses_its_pupil_becomes_a_blink():
    batch = batch_of(discs([20], [(100, 200)]))
    blink = batch_of([np.zeros((HEIGHT, WIDTH), np.uint8)])
    plan = still_plan(batch, moved=True, left=-300)
    out = augment_on_host(batch, plan, MOVE)
    for name in ("label", "spatial_weights", "dist_map", "ellipse"):
        assert torch.equal(getattr(out, name), getattr(blink, name)), name
    other = on_device(batch, plan, MOVE)
    for name in MOVED:
        assert torch.equal(getattr(other, name), getattr(out, name)), name


def test_a_frame_full_of_pupil_has_exact_targets():
    """A crop inside a huge pupil has no background, but is not a blink."""
    batch = batch_of([np.pad(np.ones((300, 500), np.uint8), ((50, 50), (70, 70)))])
    plan = still_plan(batch, moved=True, width=1280, height=800, left=-320, top=-200)
    out = augment_on_host(batch, plan, MOVE)
    label = out.label[0].numpy()
    assert label.all()
    np.testing.assert_array_equal(out.dist_map[0], distance_maps(label))
    np.testing.assert_array_equal(out.spatial_weights[0], spatial_weights(label))


# --- flip -----------------------------------------------------------------------------------------


def test_a_flip_mirrors_every_target(batch):
    out = augment(batch, FLIP, generator())
    for name in ("image", "label", "spatial_weights", "dist_map"):
        flipped = np.flip(getattr(batch, name).numpy(), axis=-1)
        np.testing.assert_array_equal(getattr(out, name).numpy(), flipped, err_msg=name)
    assert torch.equal(out.index, batch.index)


def test_a_flipped_blink_is_still_a_blink(batch):
    out = augment(batch, FLIP, generator())
    assert not batch.ellipse[-1].any()
    assert not out.ellipse[-1].any()


def test_two_flips_restore_the_batch(batch):
    out = augment(augment(batch, FLIP, generator()), FLIP, generator())
    for name in ("image", "label", "spatial_weights", "dist_map"):
        assert torch.equal(getattr(out, name), getattr(batch, name)), name
    torch.testing.assert_close(out.ellipse, batch.ellipse, atol=1e-6, rtol=0)


def test_a_frame_is_flipped_as_a_whole_or_not_at_all(batch):
    """At a probability of one half, some frames are flipped and some are not."""
    flips = set()
    for seed in range(8):
        out = augment(batch, replace(STILL, flip=0.5), generator(seed))
        for row in range(len(batch) - 1):
            flipped = {
                name: not torch.equal(getattr(out, name)[row], getattr(batch, name)[row])
                for name in MOVED
            }
            assert len(set(flipped.values())) == 1, flipped
            flips.add(flipped["image"])
    assert flips == {True, False}


# --- scale and shift ------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [15.0, 28.5, 50.0])
def test_scale_gives_the_requested_radius(wanted):
    radii = [r for r in (10, 20, 33, 47, 80, 95) if 0.5 <= wanted / r <= 2]
    batch = batch_of(discs(radii))
    config = replace(STILL, scale=1, radius_min=wanted, radius_max=wanted)
    out = augment(batch, config, generator())
    got = out.ellipse[:, 2:] * RADIUS_UNIT
    np.testing.assert_allclose(got, wanted, rtol=0.02)


@pytest.mark.parametrize("flip", [0, 1])
def test_a_scaled_pupil_stays_in_place_or_at_its_mirror_image(flip):
    """The center is the fixed point, up to rounding: frames are placed at whole pixels."""
    batch = batch_of(discs([20, 45], [(250, 180), (480, 240)]))
    for seed in range(4):
        out = augment(batch, replace(STILL, scale=1, flip=flip), generator(seed))
        x = batch.ellipse[:, 0] * WIDTH
        wanted = WIDTH - 1 - x if flip else x
        assert (out.ellipse[:, 0] * WIDTH - wanted).abs().max() < 0.6
        assert ((out.ellipse - batch.ellipse)[:, 1] * HEIGHT).abs().max() < 0.6


def test_a_scaled_ellipse_matches_the_scaled_mask():
    ellipse = Ellipse(300.0, 180.0, 40.0, 28.0, 0.6)
    batch = batch_of([ellipse_mask(ellipse)])
    for width, height in ((448, 280), (800, 500), (1120, 700)):
        plan = still_plan(batch, moved=True, width=width, height=height, left=-100, top=-40)
        out = augment_on_host(batch, plan, MOVE)
        s = width / WIDTH
        x, y = (300.5 * s - 0.5 - 100, 180.5 * s - 0.5 - 40)
        wanted = ellipse_vector(ellipse_mask(Ellipse(x, y, 40 * s, 28 * s, 0.6)))
        pixels = (out.ellipse[0].numpy() - wanted) * [WIDTH, HEIGHT, RADIUS_UNIT, RADIUS_UNIT]
        assert np.abs(pixels).max() < 0.2


def test_scales_are_bounded_and_radii_log_uniform():
    batch = pupils([8, 30, 120, 0] * 600)
    width = make_plan(batch, replace(STILL, scale=1), generator())["move"].width
    small, middle, large, blink = (width.double() / WIDTH).view(600, 4).T
    assert small.min() >= 15 / 8 - 0.02  # 15 / 8 or more was requested
    assert small.max() == 2
    assert large.min() == 0.5
    assert large.max() <= 65 / 120 + 0.02
    radius = middle * 30
    assert radius.min() + 0.05 >= 15
    assert radius.max() <= 60.05  # 65 would be more than twice the size
    share = torch.log(radius[radius < 60] / 15) / np.log(65 / 15)
    np.testing.assert_allclose(np.quantile(share, [0.25, 0.5, 0.75]), [0.24, 0.47, 0.71], atol=0.05)
    factor = blink.log2()
    np.testing.assert_allclose(np.quantile(factor, [0, 0.5, 1]), [-1, 0, 1], atol=0.1)


def test_the_pupils_center_stays_in_view():
    places = [(3.0, 4.0), (636.0, 200.0), (320.0, 396.0), (320.0, 200.0)]
    batch = batch_of(discs([25] * 4, places))
    far = replace(MOVE, reach=0.6)
    for seed in range(12):
        label = augment(batch, far, generator(seed)).label
        assert label.flatten(1).any(dim=1).all()


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [(320, 200), (450, 281), (640, 400), (903, 564), (1280, 800)])
def test_image_and_label_stay_registered(size, flip):
    """The center of the dark pixels in the image is the center of the label."""
    batch = batch_of(discs([24], [(330, 190)]))
    batch = replace(batch, image=1 - 2 * batch.label[:, None].float())
    left, top = 300 - round(330 * size[0] / WIDTH), 210 - round(190 * size[1] / HEIGHT)
    left += round((330 - 309) * size[0] / WIDTH) if flip else 0
    plan = still_plan(
        batch, flip=flip, moved=True, width=size[0], height=size[1], left=left, top=top, border=1.0
    )
    out = augment_on_host(batch, plan, replace(MOVE, flip=0.5))
    dark = (1 - out.image[0, 0].double()) / 2
    label = out.label[0].double()
    assert label.sum() > 400
    y, x = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    for axis in (x, y):
        assert abs((dark * axis).sum() / dark.sum() - (label * axis).sum() / label.sum()) < 0.1
    # At exactly half the size, a fifth of the edge pixels have the value 1/2, which is background.
    assert abs(dark.sum() / label.sum() - 1) < 0.04


def test_the_area_outside_the_frame_is_flat():
    batch = batch_of(discs([30]))
    batch = replace(batch, image=torch.zeros_like(batch.image))
    plan = still_plan(batch, moved=True, width=320, height=200, left=100, top=50, border=-0.75)
    image = augment_on_host(batch, plan, MOVE).image[0, 0]
    wanted = torch.full((HEIGHT, WIDTH), -0.75)
    wanted[50:250, 100:420] = 0
    assert torch.equal(image, wanted)
    levels = (make_plan(pupils([30] * 64), MOVE, generator())["move"].border + 1) / 2
    assert levels.min() >= 0
    assert levels.max() <= 0.6
    assert 0.4 < (levels < 33 / 255).float().mean() < 0.8


def test_one_random_number_decides_both_scale_and_shift():
    config = replace(STILL, scale=0.5, shift=0.5)
    both = make_plan(pupils([30] * 64), config, generator())["move"]
    assert 20 <= both.moved.sum() <= 44
    assert torch.equal(both.moved, both.width != WIDTH)


# --- parts that change the image only -------------------------------------------------------------


@pytest.mark.parametrize("part", IMAGE_PARTS[1:])
def test_image_parts_change_each_frame_and_no_target(batch, part):
    out = augment(batch, SINGLE[part], generator(2))
    for row in range(len(batch)):
        assert not torch.equal(out.image[row], batch.image[row])
    for name in MOVED[1:]:
        assert torch.equal(getattr(out, name), getattr(batch, name)), name
    changes = (out.image - batch.image).flatten(1).mean(dim=1)
    assert len(set(changes.tolist())) == len(batch)  # each frame has its own draw


@pytest.mark.parametrize("part", ["gain", "offset", "gamma"])
def test_brightness_order_is_kept(batch, part):
    """These parts are monotonic curves over gray levels."""
    out = augment(batch, SINGLE[part], generator(2))
    for row in range(len(batch)):
        order = batch.image[row].flatten().argsort(stable=True)
        assert (out.image[row].flatten()[order].diff() >= -1e-6).all()


def test_tone_is_the_documented_curve():
    batch = batch_of(discs([30]))
    config = replace(STILL, gamma=1, gain=1, offset=1)
    plan = still_plan(batch, gamma=1.7, gain=0.8, offset=0.15)
    got = augment_on_host(batch, plan, config).image
    level = (batch.image.double() + 1) / 2
    wanted = (1.6 * level**1.7 - 1 + 0.15).clamp(-1, 1)
    np.testing.assert_allclose(got, wanted, atol=5e-6)


def test_black_stays_finite_under_a_power():
    batch = batch_of(discs([30]))
    batch = replace(batch, image=torch.full_like(batch.image, -1 - 2e-7))
    for form in (augment_on_host, on_device):
        image = form(batch, still_plan(batch, gamma=0.5), replace(STILL, gamma=1)).image
        np.testing.assert_allclose(image, -1, atol=3e-3)


def test_streaks_only_brighten_and_cover_little_of_the_frame():
    batch = batch_of(discs([30] * 16))
    out = augment(batch, SINGLE["streaks"], generator(1))
    change = out.image - batch.image
    assert change.min() >= 0
    lit = (change > 0.02).flatten(1).float().mean(dim=1)
    assert (lit > 0).sum() >= 12  # the rays of a lamp beside the frame may miss it
    assert lit.max() < 0.15
    for name in MOVED[1:]:
        assert torch.equal(getattr(out, name), getattr(batch, name)), name


def test_a_streak_fades_from_its_source():
    batch = batch_of(discs([30]))
    batch = replace(batch, image=torch.full_like(batch.image, -1.0))
    one = torch.zeros(RAYS)
    plan = still_plan(
        batch,
        source=torch.tensor([100.0, 50.0]),
        ray=torch.tensor([[0.6, 0.8]] * RAYS),
        start=one + 20,
        length=one + 200,
        thickness=one + 3,
        glow=one.index_fill(0, torch.tensor([0]), 1.0),
    )
    image = augment_on_host(batch, plan, SINGLE["streaks"]).image[0, 0] + 1
    along = torch.stack([image[50 + round(0.8 * r), 100 + round(0.6 * r)] for r in (0, 30, 120)])
    np.testing.assert_allclose(along, [0, 0.95, 0.5], atol=0.01)
    assert image[50 + 180, 100 + 135] == 0  # 225 px from the source: past its end


def test_blur_is_a_gaussian_of_the_drawn_sigma():
    batch = batch_of(discs([30]))
    image = torch.zeros_like(batch.image)
    image[0, 0, 200, 300] = 1
    batch = replace(batch, image=image)
    for sigma in (0.8, 1.2, 1.6):
        out = augment_on_host(batch, still_plan(batch, sigma=sigma), SINGLE["blur"]).image[0, 0]
        spot = out[180:221, 280:321].double()
        place = torch.arange(-20, 21)
        assert abs(spot.sum() - 1) < 1e-5
        for axis in (0, 1):
            assert abs((spot.sum(axis) * place**2).sum().sqrt() - sigma) < 0.04 * sigma


def test_noise_is_normal_and_half_as_strong_on_black():
    batch = batch_of(discs([30] * 3))
    level = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1)
    batch = replace(batch, image=(level * 0.8).expand(3, 1, HEIGHT, WIDTH).contiguous())
    plan = still_plan(batch, deviation=0.04)
    plan["noise"] = plan["noise"]._replace(first=torch.tensor([0, 300_000, 1_024_000]))
    change = augment_on_host(batch, plan, SINGLE["noise"]).image - batch.image
    deviation = change.flatten(1).double().std(dim=1)
    np.testing.assert_allclose(deviation, 0.04 * np.array([0.55, 0.75, 0.95]), rtol=0.01)
    assert change.flatten(1).mean(dim=1).abs().max() < 5e-4
    together = np.corrcoef(change.flatten(1))
    assert np.abs(together - np.eye(3)).max() < 0.01
    beside = np.corrcoef(change[0, 0, :, 1:].flatten(), change[0, 0, :, :-1].flatten())
    assert abs(beside[0, 1]) < 0.01


def test_values_stay_in_range_at_any_strength(batch):
    strong = AugmentConfig(streaks=1, blur=1, gain=2, offset=1, gamma=2, noise=1)
    for seed in range(4):
        image = augment(batch, strong, generator(seed)).image
        assert torch.isfinite(image).all()
        assert image.min() >= -1
        assert image.max() <= 1


# --- host form and device form agree --------------------------------------------------------------


def assert_same_result(got, wanted):
    assert (got.image - wanted.image).abs().max() < 2e-6
    for name in ("label", "spatial_weights", "dist_map"):
        assert torch.equal(getattr(got, name), getattr(wanted, name)), name
    torch.testing.assert_close(got.ellipse, wanted.ellipse, atol=1e-6, rtol=0)


@pytest.mark.parametrize("part", ["flip", *IMAGE_PARTS])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_both_forms_agree(batch, part, share):
    config = SINGLE[part]
    if part in ("flip", "streaks", "blur"):
        config = replace(config, **{part: share})
    for seed in range(3):
        plan = make_plan(batch, config, generator(seed))
        assert_same_result(on_device(batch, plan, config), augment_on_host(batch, plan, config))


def test_both_forms_agree_on_frames_that_move():
    """All parts at once. Labels differ only where the interpolated value is near 1/2."""
    batch = random_batch(3, seed=3, blink=True)
    config = AugmentConfig(scale=0.7, shift=0.8, streaks=0.5, blur=0.5)
    plan = make_plan(batch, config, generator(4))
    moved = plan["move"].moved & torch.tensor([True, False, True])
    assert moved[0]
    plan["move"] = plan["move"]._replace(moved=moved)
    got, wanted = on_device(batch, plan, config), augment_on_host(batch, plan, config)
    assert (got.image - wanted.image).abs().max() < 1e-4
    differ = (got.label != wanted.label).flatten(1).sum(dim=1)
    assert differ.sum() <= 2
    same = differ == 0
    for name in ("spatial_weights", "dist_map", "ellipse"):
        values = getattr(got, name)[same], getattr(wanted, name)[same]
        torch.testing.assert_close(*values, rtol=0, atol=1e-6)


class _CapturedError(Exception):
    """Ends a compiled call once its graph has been captured."""


def test_the_device_form_is_one_graph():
    """Reading a value back (item, nonzero, a boolean index, `if`) would break the graph."""
    batch = random_batch(1, seed=3)
    config = AugmentConfig(streaks=0.5, blur=0.5)
    graphs = []

    def capture(module, _inputs):
        graphs.append(module.graph)

        def stop(*_):
            raise _CapturedError

        return stop

    torch._dynamo.reset()
    form = torch.compile(augment_on_device, backend=capture, fullgraph=True)
    plan = make_plan(batch, config, generator())
    with pytest.raises(_CapturedError):
        form(batch, plan, config, constants(config, CPU))
    assert len(graphs) == 1
    reductions = [node for node in graphs[0].nodes if node.target == "amin"]
    assert len(reductions) == 1  # one fused reduction over all rows, not one per block


def test_labels_of_both_forms_agree_over_many_frames():
    batch = random_batch(8, seed=5)
    slim = replace(batch, spatial_weights=torch.empty(0), dist_map=torch.empty(0))
    for seed in range(6):
        plan = make_plan(slim, MOVE, generator(seed))
        value = warp(slim.label.float(), plan["move"], torch.zeros(8))
        label = augment_on_host(slim, plan, MOVE).label
        clear = (value - 0.5).abs() > 1e-3
        assert torch.equal((value > 0.5)[clear], label.bool()[clear])


def test_threads_do_not_change_the_result(batch):
    config = AugmentConfig()
    one = augment(batch, config, generator(8))
    torch.set_num_threads(2)
    try:
        two = augment(batch, config, generator(8))
    finally:
        torch.set_num_threads(1)
    for name in copy_of(batch):
        assert torch.equal(getattr(one, name), getattr(two, name)), name


# --- parts and their random numbers ---------------------------------------------------------------


def test_parts_take_their_random_numbers_in_order(batch):
    """The result of a seed, and with it the golden losses, depends on these positions."""
    assert sum(part.numbers for part in PARTS) == 17 + 6 * RAYS
    plan = make_plan(batch, AugmentConfig(flip=0.5, blur=1, offset=1), generator(7))
    values = torch.rand((len(batch), 17 + 6 * RAYS), generator=generator(7))
    assert torch.equal(plan["flip"].flip, values[:, 0] < 0.5)
    assert torch.equal(plan["move"].border, 1.2 * values[:, 3] ** 3 - 1)
    assert torch.equal(plan["streaks"].source[:, 0], values[:, 8] * WIDTH)
    assert torch.equal(plan["blur"].sigma, 0.3 + values[:, -6] * 1.7)
    assert torch.equal(plan["tone"].offset, 2 * values[:, -3] - 1)
    assert torch.equal(plan["noise"].first, (values[:, -1] * 4 * HEIGHT * WIDTH).int())


@pytest.mark.parametrize("change", [-1, 1])
@pytest.mark.parametrize("part", PARTS, ids=[part.name for part in PARTS])
def test_a_part_must_take_the_numbers_it_declares(monkeypatch, part, change):
    monkeypatch.setattr(type(part), "numbers", part.numbers + change)
    with pytest.raises((AssertionError, IndexError, RuntimeError, ValueError)) as error:
        make_plan(pupils([30]), AugmentConfig(), generator())
    if change == 1:
        expected = f"part {part.name} took {part.numbers - 1} random numbers .*expected"
        assert error.match(expected)


class InvertDraw(NamedTuple):
    invert: torch.Tensor


class Invert(Part[InvertDraw]):
    """A complete new part, which inverts half of the frames."""

    name = "invert"
    numbers = 1

    def is_on(self, config):
        return True

    def draw(self, numbers, batch, config, earlier):
        return InvertDraw(numbers.one() < 0.5)

    def changes(self, drawn):
        return drawn.invert

    def on_device(self, batch, drawn, config, constant):
        sign = 1 - 2 * drawn.invert.float()
        return replace(batch, image=batch.image * sign[:, None, None, None])

    def on_host(self, frame, drawn, config):
        np.negative(frame.image, out=frame.image)


@pytest.mark.parametrize("position", [0, 1, len(PARTS)])
def test_a_new_part_needs_one_line_in_the_table(batch, monkeypatch, position):
    monkeypatch.setattr(apply, "PARTS", (*PARTS[:position], Invert(), *PARTS[position:]))
    config = replace(STILL, flip=1)
    plan = make_plan(batch, config, generator(1))
    inverted = plan["invert"].invert
    assert inverted.any()
    assert not inverted.all()
    sign = 1 - 2 * inverted.float()[:, None, None, None]
    for form in (augment_on_host, on_device):
        out = form(batch, plan, config)
        assert torch.equal(out.image, batch.image.flip(-1) * sign)
        assert torch.equal(out.label, batch.label.flip(-1))


def test_the_configuration_imports_neither_torch_nor_numpy():
    program = (
        "import sys; from pupilseg.augment import AugmentConfig; AugmentConfig()\n"
        "print(sorted({'torch', 'numpy', 'cv2'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_every_strength_has_a_help_text():
    for field in fields(AugmentConfig):
        assert len(field.metadata["help"]) > 10, field.name


# --- contract -------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [AugmentConfig(), *SINGLE.values()], ids=["default", *SINGLE])
def test_the_input_is_not_written_to(batch, config):
    before = copy_of(batch)
    for seed in range(2):
        augment(batch, config, generator(seed))
    for name, value in before.items():
        assert torch.equal(getattr(batch, name), value), name


def test_a_seed_determines_the_result(batch):
    first, second = (augment(batch, AugmentConfig(), generator(5)) for _ in range(2))
    for name in copy_of(batch):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    other = augment(batch, AugmentConfig(), generator(6))
    assert not torch.equal(first.image, other.image)


def test_turning_a_part_off_keeps_the_draws_of_the_others(batch):
    whole = make_plan(batch, AugmentConfig(), generator(5))
    less = make_plan(batch, replace(AugmentConfig(), flip=0, streaks=0), generator(5))
    for part, drawn in whole.items():
        for name in set(drawn._fields) - {"flip", "glow", "left"}:
            assert torch.equal(getattr(drawn, name), getattr(less[part], name)), name


def test_the_global_generator_is_not_used(batch):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    augment(batch, AugmentConfig(), generator())
    assert torch.equal(torch.get_rng_state(), before)


def test_columns_that_were_not_loaded_stay_empty(batch):
    empty = torch.empty(0)
    full = augment(batch, AugmentConfig(scale=1), generator())
    for missing in (("spatial_weights", "dist_map"), ("ellipse",), MOVED[1:]):
        slim = replace(batch, **dict.fromkeys(missing, empty))
        out = augment(slim, AugmentConfig(scale=1), generator())
        for name in missing:
            assert getattr(out, name).shape == (0,)
        if "label" not in missing:  # without it, the pupil's position is unknown
            for name in set(MOVED) - set(missing):
                assert torch.equal(getattr(out, name), getattr(full, name)), name


def test_targets_without_their_label_are_refused(batch):
    slim = replace(batch, label=torch.empty(0))
    with pytest.raises(
        UsageError, match=r"spatial_weights but no label to recompute it.*load the column label"
    ):
        augment(slim, MOVE, generator())
    augment(slim, FLIP, generator())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flip": 1.5}, r"flip = 1.5, expected 0 to 1"),
        ({"streaks": float("nan")}, r"streaks = nan"),
        ({"radius_min": 0}, r"radii from 0 to 65.0 px.*set scale = 0"),
        ({"radius_min": 30, "radius_max": 20}, r"radii from 30 to 20 px"),
        ({"blur_sigma": 3}, r"blur_sigma = 3 px, expected 0 to 2"),
    ],
)
def test_an_invalid_configuration_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        AugmentConfig(**changes)


def test_labels_keep_their_type(batch):
    small = replace(batch, label=batch.label.to(torch.uint8))
    out = augment(small, AugmentConfig(scale=1), generator(3))
    assert out.label.dtype == torch.uint8
    wanted = augment(batch, AugmentConfig(scale=1), generator(3))
    assert torch.equal(out.label.long(), wanted.label)


def to(batch, device):
    return replace(batch, **{f.name: getattr(batch, f.name).to(device) for f in fields(batch)})


def plan_to(plan, device):
    return {part: type(d)(*(value.to(device) for value in d)) for part, d in plan.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [True, False])
def test_cuda_never_synchronizes_and_agrees_with_the_cpu(compiled):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda")
    config = AugmentConfig(scale=0.7, streaks=0.5, blur=0.5)
    batch = random_batch(6, seed=3, blink=True)
    there = to(batch, device)
    own = torch.Generator(device).manual_seed(1)
    augment(there, config, own, compiled=compiled)
    assert not compiled or apply._compiled().compiled
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        augment(there, config, own, compiled=compiled)
    finally:
        torch.cuda.set_sync_debug_mode("default")

    plan = make_plan(batch, config, generator(4))
    form = torch.compile(augment_on_device) if compiled else augment_on_device
    got = form(there, plan_to(plan, device), config, constants(config, device))
    got, wanted = to(got, CPU), augment_on_host(batch, plan, config)
    assert (got.image - wanted.image).abs().max() < 1e-3
    same = (got.label == wanted.label).flatten(1).all(dim=1)
    assert (got.label != wanted.label).sum() <= 4
    for name in ("spatial_weights", "dist_map", "ellipse"):
        values = getattr(got, name)[same], getattr(wanted, name)[same]
        torch.testing.assert_close(*values, rtol=0, atol=1e-6)


def test_ranks_augment_each_frame_as_a_single_process_does():
    batch = random_batch(4, seed=3, blink=True)
    whole = augment(batch, AugmentConfig(), generator(4))
    state = {}
    for rank in range(2):
        part = Batch(**{f.name: getattr(batch, f.name)[rank::2] for f in fields(batch)})
        own = generator(4)
        out = augment(part, AugmentConfig(), own, Ranks(rank, 2))
        for name in MOVED:
            assert torch.equal(getattr(out, name), getattr(whole, name)[rank::2]), name
        state[rank] = own.get_state()
    assert torch.equal(state[0], state[1])
