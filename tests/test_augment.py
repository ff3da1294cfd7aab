"""Augmentation keeps every target with its image, and writes to nobody's buffers."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from batches import random_batch

from pupilseg.augment import AugmentConfig, augment
from pupilseg.geometry import ellipse_vector
from pupilseg.maps import distance_maps

STILL = AugmentConfig(flip=0, gain=0, offset=0, gamma=0, noise=0)
FLIP = replace(STILL, flip=1)
MOVED = ("image", "label", "spatial_weights", "dist_map", "ellipse")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def copy_of(batch):
    return {f.name: getattr(batch, f.name).clone() for f in fields(batch)}


@pytest.fixture(scope="module")
def batch():
    return random_batch(4, seed=3, blink=True)


def test_everything_off_changes_nothing(batch):
    out = augment(batch, STILL, generator())
    for name in copy_of(batch):
        assert torch.equal(getattr(out, name), getattr(batch, name)), name


def test_a_flip_mirrors_every_target(batch):
    out = augment(batch, FLIP, generator())
    for name in ("image", "label", "spatial_weights", "dist_map"):
        flipped = np.flip(getattr(batch, name).numpy(), axis=-1)
        np.testing.assert_array_equal(getattr(out, name).numpy(), flipped, err_msg=name)
    assert torch.equal(out.index, batch.index)


def test_a_flipped_frames_targets_are_those_of_its_flipped_label(batch):
    out = augment(batch, FLIP, generator())
    for row, label in enumerate(out.label.numpy()):
        np.testing.assert_array_equal(out.dist_map[row], distance_maps(label))
        np.testing.assert_allclose(out.ellipse[row], ellipse_vector(label), atol=1e-5, rtol=0)


def test_a_flipped_blink_is_still_a_blink(batch):
    out = augment(batch, FLIP, generator())
    assert not batch.ellipse[-1].any()
    assert not out.ellipse[-1].any()


def test_two_flips_are_none(batch):
    out = augment(augment(batch, FLIP, generator()), FLIP, generator())
    for name in ("image", "label", "spatial_weights", "dist_map"):
        assert torch.equal(getattr(out, name), getattr(batch, name)), name
    torch.testing.assert_close(out.ellipse, batch.ellipse, atol=1e-6, rtol=0)


def test_a_frame_is_flipped_as_a_whole_or_not_at_all(batch):
    """With half a probability both happen, each with all of its frame's targets."""
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


@pytest.mark.parametrize("config", [AugmentConfig(), FLIP], ids=["default", "flip"])
def test_the_input_is_not_written_to(batch, config):
    before = copy_of(batch)
    augment(batch, config, generator())
    for name, value in before.items():
        assert torch.equal(getattr(batch, name), value), name


def test_a_seed_gives_a_result(batch):
    first, second = (augment(batch, AugmentConfig(), generator(5)) for _ in range(2))
    for name in copy_of(batch):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    other = augment(batch, AugmentConfig(), generator(6))
    assert not torch.equal(first.image, other.image)


def test_the_global_generator_is_left_alone(batch):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    augment(batch, AugmentConfig(), generator())
    assert torch.equal(torch.get_rng_state(), before)


def test_values_stay_in_range_at_any_strength(batch):
    strong = AugmentConfig(gain=2, offset=1, gamma=2, noise=1)
    for seed in range(4):
        image = augment(batch, strong, generator(seed)).image
        assert torch.isfinite(image).all()
        assert image.min() >= -1
        assert image.max() <= 1


@pytest.mark.parametrize("part", ["gain", "offset", "gamma", "noise"])
def test_photometric_parts_change_each_frame_and_nothing_but_the_image(batch, part):
    out = augment(batch, replace(STILL, **{part: 0.3}), generator(2))
    for row in range(len(batch)):
        assert not torch.equal(out.image[row], batch.image[row])
    for name in MOVED[1:]:
        assert torch.equal(getattr(out, name), getattr(batch, name)), name
    changes = (out.image - batch.image).flatten(1).mean(dim=1)
    assert len(set(changes.tolist())) == len(batch)  # each frame draws for itself


@pytest.mark.parametrize("part", ["gain", "offset", "gamma"])
def test_brightness_order_is_kept(batch, part):
    """A brighter pixel stays at least as bright: these parts are curves over grey levels."""
    out = augment(batch, replace(STILL, **{part: 0.3}), generator(2))
    for row in range(len(batch)):
        order = batch.image[row].flatten().argsort(stable=True)
        assert (out.image[row].flatten()[order].diff() >= -1e-6).all()


def test_columns_that_were_not_asked_for_stay_empty(batch):
    empty = torch.empty(0)
    slim = replace(batch, spatial_weights=empty, dist_map=empty)
    out = augment(slim, AugmentConfig(), generator())
    assert out.spatial_weights.shape == out.dist_map.shape == (0,)
    full = augment(batch, AugmentConfig(), generator())
    assert torch.equal(out.image, full.image)
    assert torch.equal(out.label, full.label)
