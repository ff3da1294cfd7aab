"""Tests of every registered network, and of the parts of EfficientViT against NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

import pupilseg
from pupilseg.errors import UsageError
from pupilseg.geometry import ELLIPSE_SCALE, Ellipse, ellipse_mask, ellipse_vector
from pupilseg.models import (
    MODELS,
    EllipseRegressionNet,
    TinyEfficientViTBase,
    TinyEfficientViTMicro,
    TinyEfficientViTSeg,
    create_model,
    list_models,
)
from pupilseg.models.efficientvit import UPSAMPLING, bilinear_subpixel_kernel
from pupilseg.models.layers import CascadedGroupAttention, RelativeBias

PARAMETERS = {
    "efficientvit": 25_785,
    "efficientvit_tiny": 9_737,
    "efficientvit_base": 57_521,
    "ellipse": 25_625,
}
LIMITS = dict.fromkeys(PARAMETERS, 60_000) | {"efficientvit_tiny": 10_000}
CLASSES = {
    "efficientvit": TinyEfficientViTSeg,
    "efficientvit_tiny": TinyEfficientViTMicro,
    "efficientvit_base": TinyEfficientViTBase,
    "ellipse": EllipseRegressionNet,
}
every_model = pytest.mark.parametrize("name", list_models())


def images(frames, seed=0):
    """Smooth random images in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(frames, 1, 25, 40, generator=generator) * 2 - 1
    return functional.interpolate(coarse, size=(400, 640), mode="bilinear", align_corners=False)


def perturbed(name, seed=0):
    """A network with gains, biases and statistics that differ from their initial values."""
    torch.manual_seed(seed)
    model = create_model(name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(0.05 * torch.rand(value.shape, generator=generator))
        for key, value in model.state_dict().items():
            if key.endswith(".1.weight") and value.ndim == 1:  # gains of the norms
                value.add_(0.3)
        if name == "ellipse":  # otherwise every cell of every frame is saturated
            model.score.weight.mul_(0.02)
            model.score.bias.fill_(-6)
    return model


def main(output):
    """The output, without the map that the ellipse network adds in training."""
    return output.ellipse if isinstance(output, tuple) else output


def all_of(output):
    """All numbers of an output as one vector per frame."""
    parts = output if isinstance(output, tuple) else (output,)
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def run(model, image):
    with torch.no_grad():
        return model.eval()(image)


def test_every_model_is_listed_above():
    assert set(list_models()) == set(PARAMETERS) == set(LIMITS) == set(CLASSES)


@every_model
def test_parameters_are_as_listed_and_below_the_limit(name):
    model = create_model(name)
    count = sum(p.numel() for p in model.parameters())
    assert type(model) is CLASSES[name]
    assert count == PARAMETERS[name]
    assert count < LIMITS[name]


def test_default_architectures_are_those_specified():
    small, micro = TinyEfficientViTSeg.defaults, TinyEfficientViTMicro.defaults
    assert (small.embed_dim, small.depth, small.num_heads) == ((8, 16, 24), (1, 1, 1), (1, 1, 2))
    assert (micro.embed_dim, micro.num_heads, micro.decoder_dim) == ((8, 12, 18), (1, 1, 1), 8)


@every_model
@pytest.mark.parametrize("frames", [1, 2, 3])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_output_shape_and_finite_values(name, frames, training):
    model = perturbed(name).train(training)
    with torch.no_grad():
        whole = model(images(frames))
    output = main(whole)
    expected = (frames, 4) if MODELS[name].task == "ellipse" else (frames, 2, 400, 640)
    assert output.shape == expected
    assert output.dtype == torch.float32
    assert torch.isfinite(all_of(whole)).all()


@every_model
def test_constant_images_give_finite_outputs_and_gradients(name):
    """The norms see a variance of zero, and the heat map is flat."""
    for value in (-1.0, 1.0):
        model = create_model(name).train()
        output = all_of(model(torch.full((2, 1, 400, 640), value)))
        output.square().mean().backward()
        assert torch.isfinite(output).all()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@every_model
def test_a_frames_output_does_not_depend_on_the_rest_of_its_batch(name):
    model = perturbed(name)
    batch = images(3)
    together = run(model, batch)
    for row in range(3):
        alone = run(model, batch[row : row + 1])[0]
        torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


@every_model
def test_a_gradient_reaches_every_parameter(name):
    model = perturbed(name).train()
    output = all_of(model(images(2)))
    generator = torch.Generator().manual_seed(1)
    (output * torch.rand(output.shape, generator=generator)).sum().backward()
    without = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@every_model
def test_after_a_few_steps_a_gradient_reaches_every_parameter(name):
    """Gains that start at zero block gradients at first, but not after a few steps."""
    torch.manual_seed(0)
    model = create_model(name).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    shape = all_of(model(images(2))).shape
    weights = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        optimizer.zero_grad()
        (all_of(model(images(2))) * weights).mean().backward()
        optimizer.step()
    without = [key for key, p in model.named_parameters() if not p.grad.any()]
    assert without == []


@every_model
def test_state_dict_round_trip(name):
    first, second = perturbed(name, seed=1), perturbed(name, seed=2)
    assert not torch.allclose(run(first, images(1)), run(second, images(1)), atol=1e-4)
    second.load_state_dict(first.state_dict())
    assert torch.equal(run(first, images(1)), run(second, images(1)))


@every_model
def test_the_same_seed_gives_the_same_weights(name):
    torch.manual_seed(3)
    first = create_model(name).state_dict()
    torch.manual_seed(3)
    second = create_model(name).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


@every_model
def test_channels_last_gives_the_same_output(name):
    # In float64: the perturbed logits reach thousands, which magnifies rounding in float32.
    model, image = perturbed(name).double(), images(2).double()
    plain = run(model, image)
    model = model.to(memory_format=torch.channels_last)
    other = run(model, image.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(other, plain, rtol=1e-9, atol=1e-9)


@every_model
@pytest.mark.parametrize(
    "shape",
    [
        *[(1, 1, 200, 320), (1, 1, 640, 400), (1, 3, 400, 640)],
        *[(1, 1, 480, 640), (1, 1, 800, 640), (5, 1, 400, 768)],  # multiples of the window size
    ],
    ids=str,
)
def test_other_shapes_are_rejected(name, shape):
    with pytest.raises(ValueError, match=r"400.*640"):
        create_model(name).eval()(torch.zeros(shape))


@pytest.mark.parametrize("name", ["efficientvit", "efficientvit_tiny"])
def test_local_changes_have_local_effects(name):
    """A change at the border or in the middle affects the logits there, and not those far away."""
    model = perturbed(name)
    before = run(model, images(1))
    for y, x in [(4, 4), (4, 620), (380, 4), (380, 620), (200, 320)]:
        image = images(1)
        image[0, 0, y : y + 12, x : x + 12] *= -1
        moved = (run(model, image) - before)[0, 1].abs()
        far = moved[:, :200] if x >= 320 else moved[:, 440:]
        near = moved[y : y + 12, x : x + 12].max()
        assert near > 1e-2, (y, x)
        assert far.max() < near / 50, (y, x)


def test_the_two_logits_are_opposite_halves_of_one_number():
    output = run(perturbed("efficientvit"), images(1))
    assert torch.equal(output[:, 0], -output[:, 1])


def test_architecture_can_be_overridden():
    model = create_model("efficientvit", embed_dim=(8, 8, 8), depth=(1, 2, 1), num_heads=(1, 2, 4))
    assert run(model, images(1)).shape == (1, 2, 400, 640)


def test_unknown_model_error_lists_the_models_and_the_closest_one():
    with pytest.raises(UsageError, match=r"'eficientvit'.*efficientvit_tiny.*mean 'efficientvit'"):
        create_model("eficientvit")
    with pytest.raises(UsageError) as caught:
        create_model("unet")
    assert "mean" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_unknown_argument_is_named():
    with pytest.raises(UsageError, match="'channels'"):
        create_model("efficientvit", channels=3)


def test_heads_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(ValueError, match=r"dim 10 .* num_heads 3"):
        CascadedGroupAttention(10, 3, 4, (5, 8))


def test_public_names_at_the_top():
    assert pupilseg.create_model is create_model
    assert pupilseg.list_models() == list(PARAMETERS)
    with pytest.raises(AttributeError, match="create_modle"):
        _ = pupilseg.create_modle


# Cascaded group attention


def attention(dim=6, heads=3, window=(2, 3), stride=1, seed=0):
    """A layer in evaluation mode whose weights and statistics differ from their initial values."""
    torch.manual_seed(seed)
    layer = CascadedGroupAttention(dim, heads, 4, window, stride).double().eval()
    with torch.no_grad():
        for value in layer.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.rand_like(value) + 0.1)
    return layer


def numpy_conv(x, block, groups=1):
    """Convolution and norm of a `ConvNorm` on (C, H, W), by loops."""
    conv, norm = block
    weight = conv.weight.detach().numpy()
    size = weight.shape[-1]
    padded = np.pad(x, ((0, 0), (size // 2,) * 2, (size // 2,) * 2))
    out = np.zeros((len(weight), *x.shape[1:]))
    for o, kernel in enumerate(weight):
        first = o * len(kernel) if groups > 1 else 0
        for c, taps in enumerate(kernel):
            for dy in range(size):
                for dx in range(size):
                    shifted = padded[first + c, dy : dy + x.shape[1], dx : dx + x.shape[2]]
                    out[o] += taps[dy, dx] * shifted
    mean, var = norm.running_mean.numpy(), norm.running_var.numpy()
    gain, shift = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    column = (slice(None), None, None)
    return (out - mean[column]) / np.sqrt(var + norm.eps)[column] * gain[column] + shift[column]


def numpy_attention(layer, x, *, cascade=True):
    """Computes the layer on one frame (C, H, W), one query and window at a time."""
    stride, (wh, ww) = layer.stride, layer.window_size
    c, h, w = x.shape
    pooled = x.reshape(c, h // stride, stride, w // stride, stride).mean(axis=(2, 4))
    _, h, w = pooled.shape
    heads, previous = [], 0.0
    for j in range(layer.num_heads):
        part = pooled[j * layer.head_dim : (j + 1) * layer.head_dim] + cascade * previous
        qkv = numpy_conv(part, layer.qkv[j])
        q, k, v = np.split(qkv, [layer.key_dim, 2 * layer.key_dim])
        q = numpy_conv(q, layer.query_mix[j], groups=layer.key_dim)
        rows = layer.bias[j].rows.detach().numpy()
        columns = layer.bias[j].columns.detach().numpy()
        out = np.zeros_like(v)
        for y in range(h):
            for x_ in range(w):
                top, left = y - y % wh, x_ - x_ % ww
                keys = [(top + a, left + b) for a in range(wh) for b in range(ww)]
                score = np.array(
                    [
                        q[:, y, x_] @ k[:, ky, kx] / np.sqrt(layer.key_dim)
                        + rows[ky - y + wh - 1]
                        + columns[kx - x_ + ww - 1]
                        for ky, kx in keys
                    ]
                )
                share = np.exp(score - score.max())
                share /= share.sum()
                out[:, y, x_] = sum(s * v[:, a, b] for s, (a, b) in zip(share, keys, strict=True))
        heads.append(out)
        previous = out
    out = numpy_conv(np.maximum(np.concatenate(heads), 0), layer.project)
    return x + out.repeat(stride, axis=1).repeat(stride, axis=2)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (4, 6)),
        ({"heads": 1}, (4, 6)),
        ({"heads": 2, "window": (3, 2)}, (3, 8)),
        ({"stride": 2}, (8, 6)),
    ],
    ids=str,
)
def test_attention_equals_a_loop_over_windows(options, size):
    layer = attention(**options)
    x = torch.randn(2, 6, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = layer(x).detach().numpy()
    for row, frame in enumerate(x.numpy()):
        np.testing.assert_allclose(found[row], numpy_attention(layer, frame), rtol=1e-9, atol=1e-9)
        if layer.num_heads > 1:
            without = numpy_attention(layer, frame, cascade=False)
            assert np.abs(found[row] - without).max() > 1e-3


def exposed(**options):
    """An attention layer whose residual is the heads' outputs after the ReLU."""
    layer = attention(dim=4, heads=2, **options)
    conv, norm = layer.project
    with torch.no_grad():
        conv.weight.copy_(torch.eye(4, dtype=torch.float64)[:, :, None, None])
        norm.weight.fill_(1), norm.bias.zero_(), norm.running_mean.zero_()
        norm.running_var.fill_(1 - norm.eps)
    return layer


def test_heads_cascade():
    """Head 1 depends on the slice of head 0 through head 0 only; head 0 never depends on head 1."""
    layer = exposed()
    x = torch.rand(1, 4, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def heads_moved_by(head):
        changed = x.clone()
        changed[:, 2 * head : 2 * head + 2] += 1
        with torch.no_grad():
            moved = (layer(changed) - changed) - (layer(x) - x)
        return [bool(moved[:, 2 * j : 2 * j + 2].abs().max() > 1e-6) for j in range(2)]

    assert heads_moved_by(0) == [True, True]
    assert heads_moved_by(1) == [False, True]
    # With the cascade cut (head 0 returns zeros), its slice cannot affect head 1.
    with torch.no_grad():
        norm = layer.qkv[0][1]
        norm.weight[-2:], norm.bias[-2:] = 0, 0
    assert heads_moved_by(0) == [False, False]
    assert heads_moved_by(1) == [False, True]


def test_the_segmentation_network_has_cascaded_heads():
    heads = [
        m.num_heads
        for m in create_model("efficientvit").modules()
        if isinstance(m, CascadedGroupAttention)
    ]
    assert heads == [1, 1, 2]


def test_attention_starts_as_the_identity():
    layer = CascadedGroupAttention(6, 2, 4, (2, 3)).eval()
    x = torch.randn(1, 6, 4, 6)
    assert torch.equal(layer(x), x)


def test_windows_that_do_not_tile_are_refused():
    with pytest.raises(ValueError, match=r"5 x 6 .* 2 x 3 windows"):
        attention()(torch.zeros(1, 6, 5, 6, dtype=torch.float64))


def test_relative_bias_depends_on_the_offset_only():
    bias = RelativeBias((2, 3))
    with torch.no_grad():
        bias.rows.copy_(torch.tensor([10.0, 20, 30]))
        bias.columns.copy_(torch.tensor([1.0, 2, 3, 4, 5]))
    found = bias().detach().view(2, 3, 2, 3)  # query y, x, key y, x
    for yi, xi, yj, xj in np.ndindex(2, 3, 2, 3):
        assert found[yi, xi, yj, xj] == 10 * (yj - yi + 2) + (xj - xi + 3)


# Heads


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_the_subpixel_kernel_is_bilinear_upsampling(scale):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, 6, 7, generator=generator, dtype=torch.float64)
    kernel = bilinear_subpixel_kernel(scale).double()
    found = functional.pixel_shuffle(functional.conv2d(x, kernel, padding=1), scale)
    expected = functional.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
    inner = (..., slice(scale, -scale), slice(scale, -scale))
    torch.testing.assert_close(found[inner], expected[inner], rtol=0, atol=1e-6)


def test_segmentation_starts_with_a_bilinear_head():
    head = create_model("efficientvit").head
    assert torch.equal(head.upsample.weight, bilinear_subpixel_kernel(UPSAMPLING))
    assert not head.upsample.bias.any()


class Cover(torch.nn.Module):
    """Replaces the last convolution: returns logits of the share of pupil in each cell of masks.

    Args:
        masks: uint8 (N, 400, 640).
        limit: logit of a cell that is all pupil; cells without pupil have its negative.
    """

    def __init__(self, masks, limit=30.0):
        super().__init__()
        pixels = torch.from_numpy(np.stack(masks)).double()[:, None]
        share = functional.avg_pool2d(pixels, 4)
        self.logits = torch.logit(share, eps=1e-12).clamp(-limit, limit).float()

    def forward(self, features):
        return self.logits


def moments_of(masks, *, mixed=False, limit=30.0):
    """Returns the network's output for perfect maps of masks: (N, 4) in px."""
    model = create_model("ellipse").eval()
    model.score = Cover(masks, limit)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
        found = run(model, images(len(masks)))
    assert found.dtype == torch.float32
    return found.numpy() * ELLIPSE_SCALE


def drawn(x, y, a, b, angle=0.0):
    return ellipse_mask(Ellipse(x, y, a, b, angle))


@settings(max_examples=40, deadline=None)
@given(
    st.floats(40, 600), st.floats(30, 370), st.floats(20, 65), st.floats(0.7, 1), st.floats(0, 3)
)
def test_moments_of_a_map_equal_those_of_the_mask(x, y, a, flat, angle):
    """Includes tilted ellipses and ellipses cut by the border (only the visible part counts)."""
    mask = drawn(x, y, a, a * flat, angle)
    expected = ellipse_vector(mask) * ELLIPSE_SCALE
    np.testing.assert_allclose(moments_of([mask])[0], expected, rtol=0, atol=0.3)


def test_the_moments_of_cells_have_little_bias():
    """Tests small pupils, for which the cells are coarsest; 0.1 px is 1.4 % of the area."""
    rng = np.random.default_rng(0)
    masks = [drawn(*rng.uniform(150, 250, 2), *rng.uniform(14, 18, 2)) for _ in range(60)]
    expected = np.stack([ellipse_vector(mask) for mask in masks]) * ELLIPSE_SCALE
    error = (moments_of(masks) - expected).mean(axis=0)
    assert np.abs(error[:2]).max() < 0.03
    assert np.abs(error[2:]).max() < 0.1


def test_mixed_precision_keeps_the_precision():
    masks = [drawn(601.3, 377.8, 22, 18)]
    plain, mixed = moments_of(masks), moments_of(masks, mixed=True)
    np.testing.assert_allclose(mixed, plain, rtol=0, atol=1e-3)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        output = perturbed("ellipse").train()(images(2))
    assert output.cover.dtype == output.ellipse.dtype == torch.float32


def test_a_dark_corner_has_no_effect():
    """If the corner is smaller than the pupil, the fullest square is on the pupil."""
    pupil, corner = drawn(400.2, 220.7, 34, 30), drawn(30, 60, 20, 20)
    alone, both = moments_of([pupil]), moments_of([pupil | corner])
    np.testing.assert_allclose(both, alone, rtol=0, atol=1e-3)


@pytest.mark.parametrize("limit", [3.0, 6.0])
def test_low_shares_do_not_add_up(limit):
    """At a logit of -3, each of 16,000 cells has a share of 0.05, in total more than the pupil."""
    mask = drawn(200.4, 150.6, 18, 15)
    np.testing.assert_allclose(moments_of([mask], limit=limit), moments_of([mask]), atol=0.3)


def test_a_map_without_pupil_has_no_size():
    blink = np.zeros((400, 640), np.uint8)
    speck = drawn(300, 200, 2, 2)
    found = moments_of([blink, speck, drawn(300, 200, 8, 8)])
    assert not found[:2, 2:].any()
    assert (found[2, 2:] > 7).all()


def test_a_full_map_is_finite_and_normalized():
    found = moments_of([np.ones((400, 640), np.uint8)]) / ELLIPSE_SCALE
    assert found.min() >= 0
    assert found.max() <= 1


def test_ellipse_output_is_normalized():
    for seed in range(3):
        output = run(perturbed("ellipse", seed), images(3, seed))
        assert output.min() >= 0
        assert output.max() <= 1


def test_the_map_is_returned_in_training_and_on_request():
    model, image = perturbed("ellipse"), images(2)
    plain = run(model, image)
    model.with_map = True
    output = run(model, image)
    assert torch.equal(output.ellipse, plain)
    assert output.cover.shape == (2, 100, 160)
    model.with_map = False
    with torch.no_grad():
        trained = model.train()(image)
    assert trained.cover.shape == output.cover.shape
    assert trained.ellipse.shape == plain.shape
