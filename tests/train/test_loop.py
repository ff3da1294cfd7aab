"""The loop: a function of its seed, resumable to the bit, with clear ends.

`python tests/train/test_loop.py`, run in the root of the repository, prints GOLDEN anew.
"""

import csv
import json
import math
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pupilseg.augment import AugmentConfig
from pupilseg.errors import CheckpointError, OutputError, UsageError
from pupilseg.loader.loader import make_loader
from pupilseg.model_files.checkpoint import load_model, load_tensors, read_card, save_state
from pupilseg.models import list_models
from pupilseg.shards import open_shards, write_shards
from pupilseg.sources import Sample
from pupilseg.train.config import TrainConfig
from pupilseg.train.loop import evaluate, fit
from pupilseg.train.losses import (
    ELLIPSE_TERMS,
    SEGMENTATION_TERMS,
    alpha_schedule,
    ellipse_loss,
    segmentation_loss,
)
from pupilseg.train.metrics import EpochMetrics, scores
from pupilseg.train.optim import learning_rate
from pupilseg.train.state import notes_of
from tests.helpers.fakes import FakeDataset, random_image, random_label

CPU = torch.device("cpu")
CARD = {"preprocessing": "none", "data": "fake", "licence": "MIT"}
BATCH = 2
STEPS = 20
LR = 1e-3
"""A tenth of the default: after 20 steps at 1e-2 rounding has grown to a hundredth of the loss."""
every_model = pytest.mark.parametrize("name", list_models())

GOLDEN = {
    "efficientvit": [
        1.81418,
        1.74226,
        1.71797,
        1.65402,
        1.58309,
        1.5136,
        1.45249,
        1.39468,
        1.34453,
        1.26388,
        1.2115,
        1.15559,
        1.09722,
        1.04885,
        0.995196,
        0.936712,
        0.880477,
        0.822903,
        0.810334,
        0.760411,
    ],
    "efficientvit_tiny": [
        1.54139,
        1.47607,
        1.40518,
        1.32823,
        1.27126,
        1.20431,
        1.13517,
        1.07164,
        1.05352,
        0.955926,
        0.892946,
        0.842429,
        0.785936,
        0.804026,
        0.674659,
        0.623825,
        0.615208,
        0.554952,
        0.49204,
        0.451697,
    ],
    "efficientvit_base": [
        1.84591,
        1.78638,
        1.7074,
        1.62203,
        1.55532,
        1.48641,
        1.42152,
        1.35134,
        1.30659,
        1.22802,
        1.1655,
        1.11653,
        1.06041,
        1.01737,
        0.9574,
        0.897891,
        0.885821,
        0.782663,
        0.7589,
        0.693796,
    ],
    "ellipse": [
        3.00412,
        2.90007,
        3.00694,
        2.95819,
        2.90805,
        2.83655,
        2.80309,
        2.7541,
        2.67731,
        2.65543,
        2.60945,
        2.58293,
        2.52168,
        2.71335,
        2.60057,
        2.44632,
        2.5443,
        2.41991,
        2.68234,
        2.66209,
    ],
}


class Eyes(FakeDataset):
    """Ellipses darker than what is around them, so that there is something to learn."""

    def sample(self, split, index):
        rng = np.random.default_rng([split == "train", index, 7])
        label = random_label(rng, blink_share=0)
        image = random_image(rng) // 2 + 100
        image[label == 1] -= 90
        return Sample(f"{split}/{index}", image, label)


class Loaders:
    """Shards of a few frames, and loaders over them as `pupilseg.train.session` makes them."""

    def __init__(self, path, train, validation):
        eyes = Eyes(train=train, validation=validation)
        for split in ("train", "validation"):
            write_shards(eyes, split, path / split)
        self.shards = {split: open_shards(path / split) for split in ("train", "validation")}

    def __call__(self, seed=0, **options):
        train, validation = self.shards["train"], self.shards["validation"]
        options = {"batch_size": BATCH, "drop_last": True, **options}
        return (
            make_loader(train, shuffle=True, seed=seed, **options),
            make_loader(validation, batch_size=BATCH),
        )

    def close(self):
        for shards in self.shards.values():
            shards.close()


@pytest.fixture(scope="module")
def loaders(tmp_path_factory):
    """Two steps an epoch."""
    made = Loaders(tmp_path_factory.mktemp("shards"), train=4, validation=2)
    yield made
    made.close()


@pytest.fixture(scope="module")
def one_step(tmp_path_factory):
    """One step an epoch, so that an epoch's losses are a step's."""
    made = Loaders(tmp_path_factory.mktemp("shards"), train=BATCH, validation=1)
    yield made
    made.close()


class Interrupted:
    """A loader during whose batch someone presses Ctrl-C."""

    def __init__(self, loader, epoch, batch):
        self.loader, self.epoch, self.batch = loader, epoch, batch

    def __len__(self):
        return len(self.loader)

    def set_epoch(self, epoch):
        self.loader.set_epoch(epoch)

    def __iter__(self):
        epoch = self.loader.epoch
        for number, batch in enumerate(self.loader):
            if (epoch, number) == (self.epoch, self.batch):
                raise KeyboardInterrupt
            yield batch


class Killed(Interrupted):
    """A loader during whose epoch (from 0) the process ends without a word."""

    def __init__(self, loader, epoch):
        super().__init__(loader, epoch, 0)

    def __iter__(self):
        if self.loader.epoch == self.epoch:
            raise AssertionError("killed")
        yield from self.loader


def train(loaders, out, *, stop_at=None, resume=None, options=None, **changes):
    """Trains on the CPU; `stop_at` = (epoch, batch), both from 0, interrupts there."""
    config = TrainConfig(**{"epochs": 3, "batch_size": BATCH, "lr": 1e-2, **changes})
    training, validation = loaders(config.seed)
    if stop_at is not None:
        training = Interrupted(training, *stop_at)
    options = {"resume": resume, **(options or {})}
    return fit(config, training, validation, out, device=CPU, card=CARD, **options)


def comparable(history):
    """Rows with NaN as a value that equals itself."""
    return [{key: str(value) for key, value in row.items()} for row in history]


def names_in(path):
    return sorted(file.name for file in path.iterdir())


def state_of(out, name):
    return out / f"{name}_training_state.pt"


def best_of(out, name):
    return out / f"best_{name}_model.pt"


# Seeds


@every_model
def test_a_seed_gives_a_run_to_the_bit(loaders, tmp_path, name):
    first, second = (train(loaders, tmp_path / x, model=name, epochs=1) for x in "ab")
    assert comparable(first.history) == comparable(second.history)
    assert names_in(tmp_path / "a") == names_in(tmp_path / "b")
    for file in names_in(tmp_path / "a"):
        a, b = ((tmp_path / x / file).read_bytes() for x in "ab")
        assert a == b, file
    other = train(loaders, tmp_path / "c", model=name, epochs=1, seed=1)
    assert other.history[0]["train_loss"] != first.history[0]["train_loss"]


def test_the_callers_random_state_does_not_matter(loaders, tmp_path):
    runs = []
    for state in (1, 2):
        torch.manual_seed(state)
        np.random.seed(state)  # noqa: NPY002 - nothing may draw from it
        runs.append(train(loaders, tmp_path, model="efficientvit_tiny", epochs=1))
    assert comparable(runs[0].history) == comparable(runs[1].history)


def test_augmentation_matters_and_can_be_off(loaders, tmp_path):
    losses = {
        str(augment): train(
            loaders, tmp_path, model="efficientvit_tiny", epochs=1, augment=augment
        ).history[0]["train_loss"]
        for augment in (None, AugmentConfig(), AugmentConfig(flip=0))
    }
    assert len(set(losses.values())) == 3


# Golden losses


def golden_run(one_step, out, name, **options):
    return train(one_step, out, model=name, epochs=STEPS, lr=LR, **options)


@pytest.fixture(scope="module", params=list_models())
def golden(request, one_step, tmp_path_factory):
    out = tmp_path_factory.mktemp(f"golden_{request.param}")
    return request.param, out, golden_run(one_step, out, request.param)


def test_the_first_steps_have_the_losses_they_always_had(golden):
    """Any change of network, loss, schedule, augmentation or optimizer shows here."""
    name, _, result = golden
    found = [row["train_loss"] for row in result.history]
    assert len(found) == STEPS
    np.testing.assert_allclose(found, GOLDEN[name], rtol=1e-3)


def test_a_second_run_in_the_same_process_has_them_exactly(golden, one_step, tmp_path):
    name, _, result = golden

    def stop(row):
        if row["epoch"] == 5:
            raise KeyboardInterrupt

    again = golden_run(one_step, tmp_path, name, options={"on_epoch": stop})
    assert again.interrupted
    assert comparable(again.history) == comparable(result.history[:5])


def test_the_loss_falls(golden):
    name, _, result = golden
    losses = [row["train_loss"] for row in result.history]
    assert np.mean(losses[-3:]) < 0.95 * np.mean(losses[:3]), name


def test_rows_hold_what_the_design_names(golden):
    name, _, result = golden
    terms = ["loss", "ce_loss", "dice_loss", "surface_loss"] if "efficient" in name else ["loss"]
    for number, row in enumerate(result.history):
        for prefix in ("train", "valid"):
            for term in [*terms, "iou", "pupil_iou", "center_px"]:
                assert f"{prefix}_{term}" in row
            assert math.isfinite(row[f"{prefix}_loss"])
            assert 0 <= row[f"{prefix}_pupil_iou"] <= 2 * row[f"{prefix}_iou"] <= 2
        assert row["epoch"] == number + 1
        assert row["lr"] == learning_rate(number, STEPS, LR, 0.15)
        assert row["alpha"] == alpha_schedule(number, STEPS)
        assert not any(key.endswith("_seconds") for key in row)


def test_files_are_named_as_the_design_says(golden):
    name, out, result = golden
    expected = {best_of(out, name).name, state_of(out, name).name, f"{name}_history.csv"}
    if name == "efficientvit":
        best = -1.0
        for row in result.history:
            if row["valid_iou"] > best:
                best = row["valid_iou"]
                expected.add(f"efficientvit_epoch{row['epoch']}_miou{best:.4f}.pt")
    else:
        expected |= {f"{name}_model_epoch_{epoch}.pt" for epoch in (10, STEPS)}
    assert names_in(out) == sorted(expected)
    assert result.best_file == best_of(out, name)


def test_the_last_epoch_is_kept_though_no_multiple_of_ten(one_step, tmp_path):
    train(one_step, tmp_path, model="efficientvit_tiny", epochs=1)
    assert "efficientvit_tiny_model_epoch_1.pt" in names_in(tmp_path)


def test_the_best_is_the_highest_validation_miou(golden):
    name, out, result = golden
    best = max(result.history, key=lambda row: row["valid_iou"])
    assert result.best == best
    assert not result.interrupted
    card = read_card(out / best_of(out, name).name)
    assert card["model"] == name
    assert card["epoch"] == best["epoch"]
    assert card["metrics"]["valid_iou"] == best["valid_iou"]
    assert "valid_seconds" not in card["metrics"]
    assert card["config"]["epochs"] == STEPS
    assert {key: card[key] for key in CARD} == CARD


def test_the_description_is_json_to_any_reader(golden):
    """NaN is no JSON: an epoch that found no pupil has no centre error."""
    name, out, _ = golden

    def refuse(constant):
        raise AssertionError(f"{constant} in the description of {name}")

    for file in out.glob("*model*.pt"):
        json.loads(json.dumps(read_card(file)), parse_constant=refuse)


def test_the_saved_weights_are_those_that_were_scored(golden, one_step):
    name, _, result = golden
    segments = name != "ellipse"
    metrics = EpochMetrics(SEGMENTATION_TERMS if segments else ELLIPSE_TERMS, CPU)
    criterion = segmentation_loss if segments else ellipse_loss
    off = {"device_type": "cpu", "enabled": False}
    model = load_model(result.best_file).to(memory_format=torch.channels_last)
    model.with_map = True
    evaluate(model, one_step()[1], metrics, criterion, result.best["alpha"], autocast=off)
    found = scores(metrics.names, metrics.sums.tolist(), "valid")
    expected = {key: result.best[key] for key in found}
    assert found == pytest.approx(expected, rel=1e-6, nan_ok=True)


def test_a_run_learns(one_step, tmp_path):
    """Two frames by heart."""
    config = {"model": "efficientvit_tiny", "augment": None, "epochs": 30, "ema_decay": 0.5}
    result = train(one_step, tmp_path, **config)
    assert result.history[-1]["train_pupil_iou"] > 0.9


def test_each_epoch_is_told_with_its_times_and_nothing_is_printed(one_step, tmp_path, capsys):
    told = []
    result = train(
        one_step, tmp_path, model="efficientvit_tiny", epochs=2, options={"on_epoch": told.append}
    )
    assert all(row.pop(key) > 0 for row in told for key in ("train_seconds", "valid_seconds"))
    assert comparable(told) == comparable(result.history)
    assert capsys.readouterr().out == ""


def test_the_history_is_a_table_of_all_epochs(golden):
    name, out, result = golden
    with (out / f"{name}_history.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == comparable(result.history)


# Stopping and going on


@pytest.mark.parametrize(
    ("name", "stop_at"),
    [*((name, (1, 0)) for name in list_models()), ("efficientvit_tiny", (2, 1))],
    ids=str,
)
def test_stopped_and_resumed_equals_uninterrupted(loaders, tmp_path, name, stop_at):
    whole = train(loaders, tmp_path / "whole", model=name)
    out = tmp_path / "parts"
    part = train(loaders, out, model=name, stop_at=stop_at)
    assert part.interrupted
    assert len(part.history) == stop_at[0]
    torch.manual_seed(99)  # what the process did before plays no part
    rest = train(loaders, out, model=name, resume=state_of(out, name))
    assert not rest.interrupted
    assert comparable(rest.history) == comparable(whole.history)
    assert comparable([rest.best]) == comparable([whole.best])
    assert names_in(out) == names_in(tmp_path / "whole")
    for file in names_in(out):
        if "training_state" not in file:
            assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    states = [load_tensors(state_of(path, name)) for path in (out, tmp_path / "whole")]
    for key in ("model", "averaged"):
        first, second = (state[key] for state in states)
        assert all(torch.equal(first[k], second[k]) for k in second)


def test_an_interrupt_before_the_first_epochs_end_is_raised(loaders, tmp_path):
    """There is nothing to go on from."""
    with pytest.raises(KeyboardInterrupt):
        train(loaders, tmp_path, model="efficientvit_tiny", stop_at=(0, 1))
    assert names_in(tmp_path) == []


def test_a_finished_run_resumed_trains_no_more(loaders, tmp_path):
    name = "efficientvit_tiny"
    whole = train(loaders, tmp_path, model=name)
    before = best_of(tmp_path, name).read_bytes()
    again = train(loaders, tmp_path, model=name, resume=state_of(tmp_path, name))
    assert comparable(again.history) == comparable(whole.history)
    assert best_of(tmp_path, name).read_bytes() == before
    assert again.best_file == whole.best_file


def test_a_request_to_stop_is_met_at_the_epochs_end(loaders, tmp_path):
    name, asked = "efficientvit_tiny", []

    def stop():
        asked.append(names_in(tmp_path) if tmp_path.exists() else [])
        return len(asked) == 2

    result = train(loaders, tmp_path, model=name, options={"stop": stop})
    assert result.interrupted
    assert len(result.history) == 2
    rest = train(loaders, tmp_path, model=name, resume=state_of(tmp_path, name))
    assert not rest.interrupted
    assert len(rest.history) == 3


def test_a_request_in_the_last_epoch_is_no_interruption(loaders, tmp_path):
    name = "efficientvit_tiny"
    result = train(loaders, tmp_path, model=name, epochs=1, options={"stop": lambda: True})
    assert not result.interrupted


def test_notes_come_back(loaders, stopped, tmp_path):
    name = "efficientvit_tiny"
    train(loaders, tmp_path, model=name, epochs=1, options={"notes": {"run": "abc"}})
    assert notes_of(state_of(tmp_path, name)) == {"run": "abc"}
    assert notes_of(state_of(stopped, name)) == {}


def test_each_numbered_checkpoint_is_told_once_it_is_there(one_step, tmp_path):
    told = []

    def on_file(path):
        assert path.exists()
        told.append(path.name)

    options = {"on_file": on_file}
    train(one_step, tmp_path, model="efficientvit_tiny", epochs=11, options=options)
    assert told == [f"efficientvit_tiny_model_epoch_{n}.pt" for n in (10, 11)]


# Deferred metrics


@pytest.fixture(scope="module")
def deferred(one_step, tmp_path_factory):
    """Each network's run twice: with its numbers told as they come, and all at the end."""
    made = {}
    for name in ("efficientvit", "efficientvit_tiny"):
        out = tmp_path_factory.mktemp(f"deferred_{name}")
        written = []

        def tell(row, out=out, name=name, written=written):
            assert state_of(out / "late", name).exists()
            written.append((row, names_in(out / "late")))

        now = train(one_step, out / "now", model=name, epochs=12)
        options = {"on_epoch": tell}
        late = train(
            one_step, out / "late", model=name, epochs=12, defer_metrics=True, options=options
        )
        made[name] = out, now, late, written
    return made


@pytest.mark.parametrize("name", ["efficientvit", "efficientvit_tiny"])
def test_deferred_metrics_are_the_same_metrics(deferred, name):
    out, now, late, written = deferred[name]
    assert comparable(late.history) == comparable(now.history)
    assert comparable([late.best]) == comparable([now.best])
    assert [row["epoch"] for row, _ in written] == list(range(1, 13))
    assert all(row["train_seconds"] > 0 for row, _ in written)
    best = [best_of(out / part, name) for part in ("now", "late")]
    weights = [load_tensors(file) for file in best]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_deferred_metrics_are_told_when_all_is_written(deferred):
    out, _, _, written = deferred["efficientvit_tiny"]
    assert all(names == names_in(out / "late") for _, names in written)
    assert names_in(out / "late") == names_in(out / "now")


def test_a_deferred_run_leaves_a_state_every_ten_epochs(one_step, deferred, tmp_path):
    """Killed at any moment, it loses nine epochs at the most, and no row is left untold."""
    name, told = "efficientvit_tiny", []
    _, now, *_ = deferred[name]
    options = {"on_epoch": told.append}
    config = {"model": name, "epochs": 12, "defer_metrics": True}
    with pytest.raises(AssertionError, match="killed"):
        train(
            lambda seed: (Killed(one_step(seed)[0], epoch=10), one_step(seed)[1]),
            tmp_path,
            options=options,
            **config,
        )
    assert told == []
    assert load_tensors(state_of(tmp_path, name))["epoch"] == 10
    rest = train(one_step, tmp_path, resume=state_of(tmp_path, name), options=options, **config)
    assert comparable(rest.history) == comparable(now.history)
    assert [row["epoch"] for row in told] == list(range(1, 13))


@pytest.fixture(scope="module")
def stopped(loaders, tmp_path_factory):
    out = tmp_path_factory.mktemp("stopped")
    train(loaders, out, model="efficientvit_tiny", stop_at=(1, 0))
    return out


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"lr": 2e-3}, "lr 0.01 there, 0.002 here"),
        ({"epochs": 4}, "epochs 3 there, 4 here"),
        ({"seed": 5}, "seed 0 there, 5 here"),
        ({"augment": None}, "augment"),
        ({"architecture": {"decoder_dim": 4}}, "architecture"),
        ({"model": "efficientvit"}, "model 'efficientvit_tiny' there, 'efficientvit' here"),
    ],
    ids=str,
)
def test_a_state_of_another_run_is_refused(loaders, stopped, tmp_path, changes, text):
    config = {"model": "efficientvit_tiny", **changes}
    state = state_of(stopped, "efficientvit_tiny")
    with pytest.raises(CheckpointError) as caught:
        train(loaders, tmp_path, resume=state, **config)
    assert f"{state} belongs to another run" in str(caught.value)
    assert text in str(caught.value)
    assert "resume with the same flags and data, or start anew" in str(caught.value)
    assert names_in(tmp_path) == []


def test_a_state_of_more_data_is_refused(one_step, stopped, tmp_path):
    state = state_of(stopped, "efficientvit_tiny")
    with pytest.raises(CheckpointError, match="steps 6 there, 3 here"):
        train(one_step, tmp_path, model="efficientvit_tiny", resume=state)


def test_a_state_of_other_data_is_refused(loaders, stopped, tmp_path, monkeypatch):
    state = state_of(stopped, "efficientvit_tiny")
    monkeypatch.setitem(CARD, "data", "other eyes")
    with pytest.raises(CheckpointError, match=r"data '.*' there, 'other eyes' here"):
        train(loaders, tmp_path, model="efficientvit_tiny", resume=state)


def test_a_run_that_moves_brings_its_best_model(loaders, stopped, tmp_path):
    """Stopped again before another epoch is over, it still has the best so far."""
    state = state_of(stopped, "efficientvit_tiny")
    result = train(loaders, tmp_path, model="efficientvit_tiny", resume=state, stop_at=(1, 0))
    assert result.interrupted
    assert result.best_file.parent == tmp_path
    best = best_of(stopped, "efficientvit_tiny")
    assert result.best_file.read_bytes() == best.read_bytes()


def test_compiling_or_not_is_no_other_run(loaders, stopped, tmp_path):
    state = state_of(stopped, "efficientvit_tiny")
    result = train(loaders, tmp_path, model="efficientvit_tiny", resume=state, compile=False)
    assert len(result.history) == 3


def test_what_is_no_training_state_is_refused(loaders, stopped, tmp_path):
    def resume(path):
        train(loaders, tmp_path, model="efficientvit_tiny", resume=path)

    model = best_of(stopped, "efficientvit_tiny")
    with pytest.raises(CheckpointError, match=r"is not a training state; give .*_training_state"):
        resume(model)
    with pytest.raises(CheckpointError, match=r"no file .*none\.pt"):
        resume(tmp_path / "none.pt")
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(state_of(stopped, "efficientvit_tiny").read_bytes()[:-400])
    with pytest.raises(CheckpointError, match=r"damaged\.pt .* damaged"):
        resume(damaged)


def test_a_state_of_another_format_is_refused(loaders, stopped, tmp_path):
    state = load_tensors(state_of(stopped, "efficientvit_tiny"))
    newer = tmp_path / "newer.pt"
    save_state(newer, {**state, "format": 99})
    with pytest.raises(CheckpointError, match="format 99"):
        train(loaders, tmp_path, model="efficientvit_tiny", resume=newer)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@every_model
def test_between_the_first_step_and_the_last_nothing_waits_for_the_device(
    tmp_path, tmp_path_factory, name, compiled
):
    """From the second epoch on, in which kernels are chosen, to the end of the fourth."""
    made = Loaders(tmp_path_factory.mktemp("shards"), train=4, validation=2)
    config = TrainConfig(model=name, epochs=5, batch_size=BATCH, compile=compiled)
    device = torch.device("cuda")
    options = {"batch_size": BATCH, "device": device}
    training = make_loader(made.shards["train"], shuffle=True, drop_last=True, **options)
    validation = make_loader(made.shards["validation"], **options)

    def watch(row):
        torch.cuda.set_sync_debug_mode("error" if row["epoch"] < 4 else "default")

    try:
        result = fit(
            config, training, validation, tmp_path, device=device, card=CARD, on_epoch=watch
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
        made.close()
    assert len(result.history) == 5
    assert all(math.isfinite(row["valid_loss"]) for row in result.history)


@pytest.mark.gpu
@every_model
def test_a_gpu_learns_what_a_cpu_learns(loaders, tmp_path, name):
    config = TrainConfig(model=name, epochs=2, batch_size=BATCH, lr=LR, augment=None, amp=False)
    rows = {}
    for device in ("cpu", "cuda"):
        options = {"batch_size": BATCH, "device": device}
        training = make_loader(loaders.shards["train"], shuffle=True, drop_last=True, **options)
        validation = make_loader(loaders.shards["validation"], **options)
        rows[device] = fit(
            replace(config, compile=False, tf32=False),
            training,
            validation,
            tmp_path / device,
            device=torch.device(device),
            card=CARD,
        ).history
    for cpu, cuda in zip(rows["cpu"], rows["cuda"], strict=True):
        assert cuda["train_loss"] == pytest.approx(cpu["train_loss"], rel=1e-3)


# Ends that a user can cause


def test_a_loss_that_is_no_number_stops_the_run_and_says_what_to_lower(loaders, tmp_path):
    with pytest.raises(UsageError, match=r"training loss is (nan|inf) after epoch 1; lower --lr"):
        train(loaders, tmp_path, model="efficientvit_tiny", lr=1e30)
    assert names_in(tmp_path) == []


def test_an_unknown_model_is_a_usage_error(loaders, tmp_path):
    with pytest.raises(UsageError, match="unknown model 'unet'"):
        train(loaders, tmp_path, model="unet")


def test_fewer_frames_than_a_batch_is_a_usage_error(loaders, tmp_path):
    training, validation = loaders(limit=1)
    config = TrainConfig(model="efficientvit_tiny", batch_size=BATCH)
    with pytest.raises(UsageError, match=r"0 training .* --batch-size"):
        fit(config, training, validation, tmp_path, device=CPU, card=CARD)


def test_an_output_that_cannot_be_written_is_named(one_step, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OutputError, match="file"):
        train(one_step, file / "out", model="efficientvit_tiny", epochs=1)
    assert file.read_text() == ""


def test_the_configuration_goes_through_json():
    config = replace(TrainConfig(), architecture={"embed_dims": (8, 8, 8)})
    assert json.loads(json.dumps(asdict(config)))["augment"]["flip"] == 0.5


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        frames = Loaders(Path(folder), train=BATCH, validation=1)
        for model_name in list_models():
            run = golden_run(frames, Path(folder) / model_name, model_name)
            values = ", ".join(f"{row['train_loss']:.6g}" for row in run.history)
            print(f'    "{model_name}": [{values}],')
        frames.close()
