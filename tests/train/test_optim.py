"""Learning rate, parameter groups and averaged weights."""

import copy
import math

import numpy as np
import pytest
import torch

from pupilseg.models import create_model
from pupilseg.runtime.host_copy import HostCopy
from pupilseg.train.optim import (
    WeightAverage,
    copy_where,
    learning_rate,
    load_optimizer,
    load_scaler,
    parameter_groups,
    scaler_state,
)


def rates(steps, peak=1e-2, warmup=0.15):
    return np.array([learning_rate(step, steps, peak, warmup) for step in range(steps)])


def test_the_rate_rises_linearly_and_falls_as_half_a_cosine():
    found = rates(100)
    np.testing.assert_allclose(found[:15], 1e-2 * np.arange(1, 16) / 15, rtol=1e-12)
    progress = np.arange(85) / 85
    cosine = 1e-2 * (0.01 + 0.99 * (1 + np.cos(np.pi * progress)) / 2)
    np.testing.assert_allclose(found[15:], cosine, rtol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("warmup", [0.0, 0.15, 1.0])
def test_the_rate_has_one_peak_and_stays_positive(steps, warmup):
    found = rates(steps, warmup=warmup)
    assert found.max() == pytest.approx(1e-2)
    assert (found > 0).all()
    top = found.argmax()
    assert (np.diff(found[: top + 1]) >= 0).all()
    assert (np.diff(found[top:]) <= 0).all()


def test_the_rate_ends_near_a_hundredth_of_the_peak():
    assert rates(1000)[-1] == pytest.approx(1e-4, rel=1e-3)


@pytest.mark.parametrize("name", ["efficientvit", "ellipse"])
def test_only_matrices_and_kernels_have_weight_decay(name):
    model = create_model(name)
    kernels, others = parameter_groups(model, 0.3)
    assert (kernels["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    every = [id(p) for group in (kernels, others) for p in group["params"]]
    assert sorted(every) == sorted(id(p) for p in model.parameters())
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    spared = {id(p) for p in others["params"]}
    assert all(id(m.weight) in spared and id(m.bias) in spared for m in norms)
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    decayed = {id(p) for p in kernels["params"]}
    assert all(id(m.weight) in decayed for m in layers)


class Point(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.register_buffer("count", torch.tensor(0))


def average_of(model, decay):
    return WeightAverage(model, copy.deepcopy(model), decay)


def test_the_average_follows_the_formula():
    model = Point()
    average = average_of(model, decay=0.5)
    expected = np.zeros(2)
    for step in range(20):
        with torch.no_grad():
            model.weight += torch.tensor([1.0, -2.0])
            model.count += 1
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach().numpy()
        np.testing.assert_allclose(average.network.weight, expected, rtol=1e-5)
        assert average.network.count == step + 1  # an integer is copied, not averaged
    assert not average.network.weight.requires_grad
    assert model.weight.requires_grad


def test_the_average_is_a_copy():
    model = Point()
    average = average_of(model, decay=0.9)
    with torch.no_grad():
        model.weight += 1
    assert not average.network.weight.any()


def test_an_average_resumes_from_loaded_weights_in_any_memory_format():
    model = create_model("efficientvit_tiny").to(memory_format=torch.channels_last)
    first, second = average_of(model, 0.9), average_of(model, 0.9)

    def step():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)

    step()
    first.update()
    stored = {k: v.clone().contiguous() for k, v in first.network.state_dict().items()}
    second.network.load_state_dict(stored)
    second.steps = first.steps
    step()
    for average in (first, second):
        average.update()
    found = second.network.state_dict()
    assert all(torch.equal(value, found[k]) for k, value in first.network.state_dict().items())
    assert not torch.equal(found["head.score.weight"], stored["head.score.weight"])


@pytest.mark.parametrize("condition", [False, True])
def test_copy_where_copies_all_tensors_or_none(condition):
    source = {"a": torch.full((2, 3), float("nan")), "n": torch.tensor(7)}
    target = {"a": torch.ones(2, 3), "n": torch.tensor(1)}
    copy_where(torch.tensor(condition), source, target)
    assert target["n"] == (7 if condition else 1)
    assert target["a"].isnan().all() == condition
    assert (target["a"] == 1).all() != condition


def test_an_optimizer_resumes_in_any_memory_format():
    """Fused kernels would pair a file's contiguous moments with the wrong weights."""

    def make():
        torch.manual_seed(0)
        model = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)

    def step(model, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.grad = torch.empty_like(parameter).copy_(noise)
        optimizer.step()

    first, optimizer = make()
    step(first, optimizer, 1)
    stored = HostCopy({"model": first.state_dict(), "optimizer": optimizer.state_dict()}).read()
    second, other = make()
    second.load_state_dict(stored["model"])
    load_optimizer(other, stored["optimizer"])
    step(first, optimizer, 2)
    step(second, other, 2)
    assert torch.equal(first.weight, second.weight)


def scaled_step(scaler, gradient):
    """Makes a step whose scaled gradient is finite or not."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler.scale(weight.sum()).backward()
    weight.grad.fill_(gradient)
    scaler.step(optimizer)
    scaler.update()


def test_a_scaler_resumes_from_tensors_or_numbers():
    scaler = torch.amp.GradScaler("cpu", growth_interval=3)
    for gradient in (1.0, math.inf, 1.0, 1.0):  # the scale is halved; two good steps follow
        scaled_step(scaler, gradient)
    expected = scaler.state_dict()
    assert (expected["scale"], expected["_growth_tracker"]) == (2.0**15, 2)
    for stored in (HostCopy(scaler_state(scaler)).read(), expected):
        other = torch.amp.GradScaler("cpu", growth_interval=3)
        load_scaler(other, stored)
        assert other.state_dict() == expected
        scaled_step(other, 1.0)
        assert other.get_scale() == 2.0**16


def test_the_state_of_a_scaler_is_not_read_from_its_device():
    """Reading it would wait for the device at the end of each epoch."""
    scaler = torch.amp.GradScaler("cpu")
    assert scaler_state(scaler) == scaler.state_dict()  # not used yet
    scaled_step(scaler, 1.0)
    state = scaler_state(scaler)
    assert state.keys() == scaler.state_dict().keys()
    assert isinstance(state["scale"], torch.Tensor)
    assert isinstance(state["_growth_tracker"], torch.Tensor)
    load_scaler(torch.amp.GradScaler("cpu", enabled=False), {})
