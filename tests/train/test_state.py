"""A run's state: all of it comes back, and comes back where it belongs."""

import torch

from pupilseg.model_files.checkpoint import save_state
from pupilseg.runtime.host_copy import Snapshot
from pupilseg.train.config import TrainConfig
from pupilseg.train.state import Run

CPU = torch.device("cpu")


def run_of(seed):
    return Run(TrainConfig(model="efficientvit_tiny", epochs=3, seed=seed), CPU, 6, card={})


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


def lived_in(run):
    """Gives every part of a run a value that no fresh run has."""
    for parameter in run.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    run.optimizer.step()
    for buffer in run.model.buffers():
        buffer.add_(1)
    run.averaged.update()
    run.averaged.flat += 0.5
    run.best_flat -= 0.25
    run.best_iou.fill_(0.75)
    run.best_epoch.fill_(1)
    run.rows.normal_()
    torch.rand(3, generator=run.random)
    run.epoch, run.step = 2, 4
    return run


def test_a_state_read_back_is_the_state_that_was_written(tmp_path):
    written = lived_in(run_of(0))
    state = Snapshot(written.state()).read()
    save_state(tmp_path / "x_training_state.pt", state)
    fresh = run_of(0)
    fresh.restore(tmp_path / "x_training_state.pt")
    again = Snapshot(fresh.state()).read()
    expected, found = dict(tensors(state)), dict(tensors(again))
    assert expected.keys() == found.keys()
    for path, tensor in expected.items():
        assert torch.equal(tensor, found[path]), path
    plain = ("epoch", "step", "averaged_steps", "run", "notes", "format")
    assert {name: state[name] for name in plain} == {name: again[name] for name in plain}


def test_two_fresh_runs_differ_in_what_the_test_above_compares():
    """Else it could not fail."""
    fresh, lived = (dict(tensors(r.state())) for r in (run_of(0), lived_in(run_of(0))))
    same = [path for path, tensor in fresh.items() if torch.equal(tensor, lived[path])]
    assert {path[0] for path in lived} >= {"model", "averaged", "best", "random", "rows"}
    assert same == []


def test_the_best_weights_are_kept_by_a_select():
    run = run_of(0)
    kept = []
    for epoch, pupil in enumerate((0.2, 0.9, 0.5)):
        run.averaged.flat.fill_(float(epoch))
        names = list(run.metrics.names)
        row = run.rows[epoch, 1]
        for name, value in (("union", 1.0), ("intersection", pupil)):
            row[names.index(f"pupil_{name}")] = value
            row[names.index(f"background_{name}")] = 1.0
        run.end_epoch()
        kept.append((int(run.best_epoch), float(run.best_iou), float(run.best_flat[0])))
    assert kept == [(1, 0.6, 0.0), (2, 0.95, 1.0), (2, 0.95, 1.0)]
