"""The training state: every part is stored and restored."""

import json

import pytest
import torch

from pupilseg.errors import CheckpointError
from pupilseg.model_files.checkpoint import save_state
from pupilseg.runtime.host_copy import HostCopy
from pupilseg.train.config import TrainConfig
from pupilseg.train.state import TrainState

CPU = torch.device("cpu")


def new_state(**changes):
    return TrainState(TrainConfig(model="efficientvit_tiny", epochs=3, **changes), CPU, 6)


def tensors(tree, path=()):
    """Yields (path, tensor) of nested dicts and lists."""
    if isinstance(tree, torch.Tensor):
        yield path, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from tensors(value, (*path, key))
    elif isinstance(tree, list | tuple):
        for key, value in enumerate(tree):
            yield from tensors(value, (*path, key))


def changed(state):
    """Gives every part of a state a value that a new state does not have."""
    for parameter in state.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    state.optimizer.step()
    for buffer in state.model.buffers():
        buffer.add_(1)
    state.average.update()
    for value in state.average.network.state_dict().values():
        value.add_(1)
    for value in state.best_weights.values():
        value.sub_(1)
    state.best_iou.fill_(0.75)
    state.best_epoch.fill_(1)
    state.rows.normal_()
    torch.rand(3, generator=state.random)
    state.epoch, state.step = 2, 4
    return state


def test_a_restored_state_equals_the_written_one(tmp_path):
    written = changed(new_state())
    state = HostCopy(written.state_dict()).read()
    save_state(tmp_path / "x_training_state.pt", state)
    fresh = new_state()
    fresh.restore(tmp_path / "x_training_state.pt")
    again = HostCopy(fresh.state_dict()).read()
    expected, found = dict(tensors(state)), dict(tensors(again))
    assert expected.keys() == found.keys()
    for path, tensor in expected.items():
        assert torch.equal(tensor, found[path]), path
    plain = ("epoch", "step", "averaged_steps", "run", "notes", "format")
    assert {name: state[name] for name in plain} == {name: again[name] for name in plain}


def test_a_state_without_a_newer_field_of_the_configuration_is_restored(tmp_path):
    state = HostCopy(new_state().state_dict()).read()
    for missing in ("amp_dtype", "seed"):
        identity = json.loads(state["run"])
        del identity[missing]
        path = tmp_path / f"{missing}_training_state.pt"
        save_state(path, {**state, "run": json.dumps(identity)})
        new_state().restore(path)
        with pytest.raises(CheckpointError, match="seed is 0 in the file and 5 now"):
            new_state(seed=5).restore(path)


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({}, None),
        ({"amp_dtype": "float16"}, torch.float16),
        ({"amp_dtype": "bfloat16"}, torch.bfloat16),
        ({"amp_dtype": "float16", "amp": False}, None),
    ],
    ids=str,
)
def test_float16_scales_the_gradients_and_nothing_else_does(changes, dtype):
    state = new_state(**changes)
    assert state.autocast["enabled"] == (dtype is not None)
    assert dtype is None or state.autocast["dtype"] == dtype
    assert state.scaler.is_enabled() == (dtype == torch.float16)


def test_new_and_changed_states_differ_in_every_tensor():
    """Otherwise the test above could not fail."""
    states = (new_state(), changed(new_state()))
    before, after = (dict(tensors(state.state_dict())) for state in states)
    same = [path for path, tensor in before.items() if torch.equal(tensor, after[path])]
    assert {path[0] for path in after} >= {"model", "averaged", "best", "random", "rows"}
    assert same == []


def test_the_weights_of_the_best_epoch_are_kept():
    state = new_state()
    kept = []
    for epoch, pupil in enumerate((0.2, 0.9, 0.5)):
        for value in state.average.network.state_dict().values():
            value.fill_(epoch)
        names = list(state.metrics.names)
        row = state.rows[epoch, 1]
        for name, value in (("union", 1.0), ("intersection", pupil)):
            row[names.index(f"pupil_{name}")] = value
            row[names.index(f"background_{name}")] = 1.0
        state.end_epoch()
        values = {float(value.max()) for value in state.best_weights.values()}
        kept.append((int(state.best_epoch), float(state.best_iou), values))
    assert kept == [(1, 0.6, {0.0}), (2, 0.95, {1.0}), (2, 0.95, {1.0})]
