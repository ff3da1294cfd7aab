"""The training loop: a function of its seed, resumable to the bit, with clear errors."""

import csv
import json
import math
import re
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from pupilseg.augment import AugmentConfig
from pupilseg.errors import CheckpointError, OutputError, UsageError
from pupilseg.model_files.checkpoint import load_model, load_tensors, read_card, save_state
from pupilseg.models import list_models, model_entry
from pupilseg.train.config import TrainConfig
from pupilseg.train.loop import evaluate
from pupilseg.train.losses import LOSSES, alpha_schedule
from pupilseg.train.metrics import EpochMetrics, scores
from pupilseg.train.optim import learning_rate
from pupilseg.train.state import notes_of
from tests.helpers.training import BATCH, CPU, PROVENANCE, Loaders, train_with
from tests.train.golden.regenerate import FILE, LR, STEPS, golden_run

every_model = pytest.mark.parametrize("name", list_models())
EACH_TASK = ("efficientvit_tiny", "ellipse")
EACH_CHECKPOINT_RULE = ("efficientvit", *EACH_TASK)


@pytest.fixture(scope="module")
def loaders(tmp_path_factory):
    """Two steps per epoch."""
    made = Loaders(tmp_path_factory.mktemp("shards"), train=4, validation=2)
    yield made
    made.close()


@pytest.fixture(scope="module")
def one_step(tmp_path_factory):
    """One step per epoch, so that an epoch's losses are those of a step."""
    made = Loaders(tmp_path_factory.mktemp("shards"), train=BATCH, validation=1)
    yield made
    made.close()


class Interrupted:
    """A loader that raises KeyboardInterrupt in one of its batches."""

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
    """A loader that ends the run without any cleanup in an epoch, counted from 0."""

    def __init__(self, loader, epoch):
        super().__init__(loader, epoch, 0)

    def __iter__(self):
        if self.loader.epoch == self.epoch:
            raise AssertionError("killed")
        yield from self.loader


def train(loaders, out, *, stop_at=None, options=None, resume=None, **changes):
    """Trains on the CPU; `stop_at` = (epoch, batch), both from 0, interrupts there."""
    config = TrainConfig(**{"epochs": 3, "batch_size": BATCH, "lr": 1e-2, **changes})
    training, validation = loaders(config.seed)
    if stop_at is not None:
        training = Interrupted(training, *stop_at)
    return train_with(config, (training, validation), out, resume=resume, **(options or {}))


def comparable(history):
    """History rows as text, in which NaN equals NaN."""
    return [{key: str(value) for key, value in row.items()} for row in history]


def names_in(path):
    return sorted(file.name for file in path.iterdir())


def state_of(out, name):
    return out / f"{name}_training_state.pt"


def best_of(out, name):
    return out / f"best_{name}_model.pt"


# Seeds


@pytest.mark.parametrize("name", EACH_TASK)
def test_runs_with_the_same_seed_are_identical(loaders, tmp_path, name):
    first, second = (train(loaders, tmp_path / x, model=name, epochs=1) for x in "ab")
    assert comparable(first.history) == comparable(second.history)
    assert names_in(tmp_path / "a") == names_in(tmp_path / "b")
    for file in names_in(tmp_path / "a"):
        a, b = ((tmp_path / x / file).read_bytes() for x in "ab")
        assert a == b, file
    other = train(loaders, tmp_path / "c", model=name, epochs=1, seed=1)
    assert other.history[0]["train_loss"] != first.history[0]["train_loss"]


def test_the_callers_random_state_has_no_influence(loaders, tmp_path):
    runs = []
    for state in (1, 2):
        torch.manual_seed(state)
        np.random.seed(state)  # noqa: NPY002 - training must not draw from it
        runs.append(train(loaders, tmp_path, model="efficientvit_tiny", epochs=1))
    assert comparable(runs[0].history) == comparable(runs[1].history)


def test_augmentation_has_an_effect_and_can_be_disabled(loaders, tmp_path):
    losses = {
        str(augment): train(
            loaders, tmp_path, model="efficientvit_tiny", epochs=1, augment=augment
        ).history[0]["train_loss"]
        for augment in (None, AugmentConfig(), AugmentConfig(flip=0))
    }
    assert len(set(losses.values())) == 3


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mixed_precision_trains_on_a_cpu_too(one_step, tmp_path, dtype):
    config = {"model": "efficientvit_tiny", "epochs": 2, "lr": LR, "augment": None}
    exact = train(one_step, tmp_path / "exact", **config).history
    mixed = train(one_step, tmp_path / "mixed", **config, amp_dtype=dtype).history
    for expected, row in zip(exact, mixed, strict=True):
        assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=0.05)
        assert row["train_loss"] != expected["train_loss"]


def test_training_on_a_cpu_warns_once_with_the_time_of_an_epoch(loaders, tmp_path, caplog):
    train(loaders, tmp_path, model="efficientvit_tiny", epochs=2)
    (warning,) = [r.message for r in caplog.records if "training on a CPU" in r.message]
    assert re.search(r"an epoch takes about \d+ (s|min), plus validation; a GPU is faster", warning)


# Golden losses


@pytest.fixture(scope="module", params=list_models())
def golden(request, one_step, tmp_path_factory):
    out = tmp_path_factory.mktemp(f"golden_{request.param}")
    return request.param, out, golden_run(one_step, out, request.param)


def test_the_first_losses_equal_the_recorded_ones(golden):
    """Any change to the network, loss, schedule, augmentation or optimizer changes them.

    After an intended change: `python -m tests.train.golden.regenerate [NAME ...]`.
    """
    name, _, result = golden
    found = [row["train_loss"] for row in result.history]
    assert len(found) == STEPS
    np.testing.assert_allclose(found, json.loads(FILE.read_text())[name], rtol=1e-3)


def test_a_second_run_in_the_same_process_is_identical(golden, one_step, tmp_path):
    name, _, result = golden

    def stop(row):
        if row["epoch"] == 5:
            raise KeyboardInterrupt

    again = golden_run(one_step, tmp_path, name, on_epoch=stop)
    assert again.interrupted
    assert comparable(again.history) == comparable(result.history[:5])


def test_the_loss_falls(golden):
    name, _, result = golden
    losses = [row["train_loss"] for row in result.history]
    assert np.mean(losses[-3:]) < 0.95 * np.mean(losses[:3]), name


def test_history_rows_have_the_documented_columns(golden):
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


def test_files_have_the_documented_names(golden):
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


def test_the_last_epoch_is_saved_even_if_no_multiple_of_ten(one_step, tmp_path):
    train(one_step, tmp_path, model="efficientvit_tiny", epochs=1)
    assert "efficientvit_tiny_model_epoch_1.pt" in names_in(tmp_path)


def test_the_best_is_the_highest_validation_miou(golden):
    name, out, result = golden
    best = max(result.history, key=lambda row: row["valid_iou"])
    assert result.best == best
    assert not result.interrupted
    card = read_card(out / best_of(out, name).name)
    assert card.model == name
    assert card.epoch == best["epoch"]
    assert card.metrics["valid_iou"] == best["valid_iou"]
    assert "valid_seconds" not in card.metrics
    assert card.config["epochs"] == STEPS
    assert PROVENANCE.to_dict().items() <= card.to_dict().items()


def test_cards_are_strict_json(golden):
    """JSON has no NaN, which is the center error of an epoch that found no pupil."""
    name, out, _ = golden

    def refuse(constant):
        raise AssertionError(f"{constant} in the description of {name}")

    for file in out.glob("*model*.pt"):
        json.loads(json.dumps(read_card(file).to_dict()), parse_constant=refuse)


def test_the_saved_weights_are_the_scored_ones(golden, one_step):
    name, _, result = golden
    loss, terms = LOSSES[model_entry(name).task]
    metrics = EpochMetrics(terms, CPU)
    off = {"device_type": "cpu", "enabled": False}
    model = load_model(result.best_file).to(memory_format=torch.channels_last)
    model.with_map = True
    evaluate(model, one_step()[1], metrics, loss, result.best["alpha"], autocast=off)
    found = scores(metrics.names, metrics.sums.tolist(), "valid")
    expected = {key: result.best[key] for key in found}
    assert found == pytest.approx(expected, rel=1e-6, nan_ok=True)


def test_a_run_learns(one_step, tmp_path):
    """Memorizes two frames."""
    config = {"model": "efficientvit_tiny", "augment": None, "epochs": 30, "ema_decay": 0.5}
    result = train(one_step, tmp_path, **config)
    assert result.history[-1]["train_pupil_iou"] > 0.9


def test_each_epoch_is_reported_with_its_times_and_nothing_is_printed(one_step, tmp_path, capsys):
    reported = []
    result = train(
        one_step,
        tmp_path,
        model="efficientvit_tiny",
        epochs=2,
        options={"on_epoch": reported.append},
    )
    assert all(row.pop(key) > 0 for row in reported for key in ("train_seconds", "valid_seconds"))
    assert comparable(reported) == comparable(result.history)
    assert capsys.readouterr().out == ""


def test_the_history_file_has_one_row_per_epoch(golden):
    name, out, result = golden
    with (out / f"{name}_history.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == comparable(result.history)


# Stopping and resuming


@pytest.mark.parametrize(
    ("name", "stop_at"),
    [*((name, (1, 0)) for name in EACH_CHECKPOINT_RULE), ("efficientvit_tiny", (2, 1))],
    ids=str,
)
def test_stopped_and_resumed_equals_uninterrupted(loaders, tmp_path, name, stop_at):
    whole = train(loaders, tmp_path / "whole", model=name)
    out = tmp_path / "parts"
    part = train(loaders, out, model=name, stop_at=stop_at)
    assert part.interrupted
    assert len(part.history) == stop_at[0]
    torch.manual_seed(99)  # the global random state must not matter
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
    """There is nothing to resume from."""
    with pytest.raises(KeyboardInterrupt):
        train(loaders, tmp_path, model="efficientvit_tiny", stop_at=(0, 1))
    assert names_in(tmp_path) == []


def test_resuming_a_finished_run_changes_nothing(loaders, tmp_path):
    name = "efficientvit_tiny"
    whole = train(loaders, tmp_path, model=name)
    before = best_of(tmp_path, name).read_bytes()
    again = train(loaders, tmp_path, model=name, resume=state_of(tmp_path, name))
    assert comparable(again.history) == comparable(whole.history)
    assert best_of(tmp_path, name).read_bytes() == before
    assert again.best_file == whole.best_file


def test_a_stop_request_takes_effect_at_the_end_of_the_epoch(loaders, tmp_path):
    name, requests = "efficientvit_tiny", []

    def stop():
        requests.append(names_in(tmp_path) if tmp_path.exists() else [])
        return len(requests) == 2

    result = train(loaders, tmp_path, model=name, options={"stop": stop})
    assert result.interrupted
    assert len(result.history) == 2
    rest = train(loaders, tmp_path, model=name, resume=state_of(tmp_path, name))
    assert not rest.interrupted
    assert len(rest.history) == 3


def test_a_stop_request_in_the_last_epoch_is_no_interruption(loaders, tmp_path):
    name = "efficientvit_tiny"
    result = train(loaders, tmp_path, model=name, epochs=1, options={"stop": lambda: True})
    assert not result.interrupted


def test_notes_are_restored(loaders, stopped, tmp_path):
    name = "efficientvit_tiny"
    train(loaders, tmp_path, model=name, epochs=1, options={"notes": {"run": "abc"}})
    assert notes_of(state_of(tmp_path, name)) == {"run": "abc"}
    assert notes_of(state_of(stopped, name)) == {}


def test_each_numbered_checkpoint_is_reported_once_it_exists(one_step, tmp_path):
    reported = []

    def on_file(path):
        assert path.exists()
        reported.append(path.name)

    options = {"on_file": on_file}
    train(one_step, tmp_path, model="efficientvit_tiny", epochs=11, options=options)
    assert reported == [f"efficientvit_tiny_model_epoch_{n}.pt" for n in (10, 11)]


# Deferred metrics


@pytest.fixture(scope="module")
def deferred(one_step, tmp_path_factory):
    """Two runs of each network: reporting each epoch at once, and all epochs at the end."""
    made = {}
    for name in ("efficientvit", "efficientvit_tiny"):
        out = tmp_path_factory.mktemp(f"deferred_{name}")
        written = []

        def report(row, out=out, name=name, written=written):
            assert state_of(out / "late", name).exists()
            written.append((row, names_in(out / "late")))

        now = train(one_step, out / "now", model=name, epochs=12)
        options = {"on_epoch": report}
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


def test_deferred_metrics_are_reported_after_all_files_are_written(deferred):
    out, _, _, written = deferred["efficientvit_tiny"]
    assert all(names == names_in(out / "late") for _, names in written)
    assert names_in(out / "late") == names_in(out / "now")


def test_a_deferred_run_writes_a_state_every_ten_epochs(one_step, deferred, tmp_path):
    """A kill loses at most nine epochs, and every row is reported."""
    name, reported = "efficientvit_tiny", []
    _, now, *_ = deferred[name]
    options = {"on_epoch": reported.append}
    config = {"model": name, "epochs": 12, "defer_metrics": True}
    with pytest.raises(AssertionError, match="killed"):
        train(
            lambda seed: (Killed(one_step(seed)[0], epoch=10), one_step(seed)[1]),
            tmp_path,
            options=options,
            **config,
        )
    assert reported == []
    assert load_tensors(state_of(tmp_path, name))["epoch"] == 10
    rest = train(one_step, tmp_path, resume=state_of(tmp_path, name), options=options, **config)
    assert comparable(rest.history) == comparable(now.history)
    assert [row["epoch"] for row in reported] == list(range(1, 13))


@pytest.fixture(scope="module")
def stopped(loaders, tmp_path_factory):
    out = tmp_path_factory.mktemp("stopped")
    train(loaders, out, model="efficientvit_tiny", stop_at=(1, 0))
    return out


def test_a_resumed_run_may_have_more_epochs(loaders, tmp_path):
    """Finished epochs keep their rate and alpha, new ones follow the longer schedule.

    Stopped and resumed again, the run gives the same files.
    """
    name, options = "efficientvit_tiny", {"epochs": 5}
    short = train(loaders, tmp_path / "short", model=name).history
    state = state_of(tmp_path / "short", name)
    longer = train(loaders, tmp_path / "longer", model=name, resume=state, **options)
    assert longer.history[:3] == short
    for epoch in (3, 4):
        row, steps = longer.history[epoch], 5 * 2
        assert row["lr"] == learning_rate(2 * epoch + 1, steps, 0.01, TrainConfig().warmup)
        assert row["alpha"] == alpha_schedule(epoch, 5)
    out = tmp_path / "parts"
    train(loaders, out, model=name, resume=state, stop_at=(1, 0), **options)
    again = train(loaders, out, model=name, resume=state_of(out, name), **options)
    assert again.history == longer.history
    assert (out / again.best_file.name).read_bytes() == longer.best_file.read_bytes()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"lr": 2e-3}, "lr is 0.01 in the file and 0.002 now"),
        ({"epochs": 2}, "epochs is 3 in the file and 2 now"),
        ({"seed": 5}, "seed is 0 in the file and 5 now"),
        ({"augment": None}, "augment"),
        ({"architecture": {"decoder_dim": 4}}, "architecture"),
        (
            {"model": "efficientvit"},
            "model is 'efficientvit_tiny' in the file and 'efficientvit' now",
        ),
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
    assert "resume with the same flags and data, or start a new run" in str(caught.value)
    assert names_in(tmp_path) == []


def test_a_state_of_more_data_is_refused(one_step, stopped, tmp_path):
    state = state_of(stopped, "efficientvit_tiny")
    with pytest.raises(CheckpointError, match="steps is 6 in the file and 3 now"):
        train(one_step, tmp_path, model="efficientvit_tiny", resume=state)


def test_a_state_of_other_data_is_refused(loaders, stopped, tmp_path):
    state = state_of(stopped, "efficientvit_tiny")
    options = {"provenance": replace(PROVENANCE, data="other eyes")}
    with pytest.raises(CheckpointError, match="data is 'fake' in the file and 'other eyes' now"):
        train(loaders, tmp_path, model="efficientvit_tiny", resume=state, options=options)


def test_a_run_resumed_in_another_folder_writes_its_best_model_there(loaders, stopped, tmp_path):
    """Even if it is stopped again before another epoch ends."""
    state = state_of(stopped, "efficientvit_tiny")
    result = train(loaders, tmp_path, model="efficientvit_tiny", resume=state, stop_at=(1, 0))
    assert result.interrupted
    assert result.best_file.parent == tmp_path
    best = best_of(stopped, "efficientvit_tiny")
    assert result.best_file.read_bytes() == best.read_bytes()


def test_a_run_may_be_resumed_without_compiling(loaders, stopped, tmp_path):
    state = state_of(stopped, "efficientvit_tiny")
    result = train(loaders, tmp_path, model="efficientvit_tiny", resume=state, compile=False)
    assert len(result.history) == 3


def test_other_files_are_refused_as_training_states(loaders, stopped, tmp_path):
    def resume(path):
        train(loaders, tmp_path, model="efficientvit_tiny", resume=path)

    model = best_of(stopped, "efficientvit_tiny")
    with pytest.raises(CheckpointError, match=r"is not a training state; pass .*_training_state"):
        resume(model)
    with pytest.raises(CheckpointError, match=r"none\.pt does not exist"):
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
@pytest.mark.parametrize("amp_dtype", ["auto", "float16"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@every_model
def test_within_an_epoch_nothing_waits_for_the_device(
    tmp_path, tmp_path_factory, caplog, name, compiled, amp_dtype
):
    """Checks from the second epoch, after kernels were selected, to the end of the fourth.

    float16, which scales the gradients, is the automatic choice on older GPUs only.
    """
    made = Loaders(tmp_path_factory.mktemp("shards"), train=4, validation=2)
    config = TrainConfig(
        model=name,
        epochs=5,
        batch_size=BATCH,
        compile=compiled,
        amp_dtype=amp_dtype,
        defer_metrics=False,
    )
    device = torch.device("cuda")

    def watch(row):
        torch.cuda.set_sync_debug_mode("error" if row["epoch"] < 4 else "default")

    try:
        loaders = made(device=device)
        result = train_with(config, loaders, tmp_path, device=device, on_epoch=watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        made.close()
    assert len(result.history) == 5
    assert all(math.isfinite(row["valid_loss"]) for row in result.history)
    assert "is not compiled" not in caplog.text


@pytest.mark.gpu
@every_model
def test_a_gpu_reaches_the_same_result_as_a_cpu(loaders, tmp_path, name):
    config = TrainConfig(model=name, epochs=2, batch_size=BATCH, lr=LR, augment=None, amp=False)
    config = replace(config, compile=False, tf32=False)
    rows = {}
    for device in (CPU, torch.device("cuda")):
        out = tmp_path / device.type
        result = train_with(config, loaders(device=device), out, device=device)
        rows[device.type] = result.history
    for cpu, cuda in zip(rows["cpu"], rows["cuda"], strict=True):
        assert cuda["train_loss"] == pytest.approx(cpu["train_loss"], rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes", [{"compile": True}, {"amp": True}, {"amp": True, "amp_dtype": "float16"}], ids=str
)
@every_model
def test_compilation_and_mixed_precision_change_losses_little(
    loaders, tmp_path, caplog, name, changes
):
    plain = TrainConfig(
        model=name, epochs=2, batch_size=BATCH, lr=LR, augment=None, amp=False, compile=False
    )
    device = torch.device("cuda")
    histories = []
    for config in (plain, replace(plain, **changes)):
        out = tmp_path / str(len(histories))
        histories.append(train_with(config, loaders(device=device), out, device=device).history)
    for expected, found in zip(*histories, strict=True):
        assert found["train_loss"] == pytest.approx(expected["train_loss"], rel=0.02)
    assert "is not compiled" not in caplog.text


@pytest.mark.gpu
@every_model
def test_a_run_on_a_gpu_resumes_with_its_moments(loaders, tmp_path, name):
    """Fused AdamW would pair the contiguous moments of a file with the wrong weights."""
    config = TrainConfig(model=name, epochs=3, batch_size=BATCH, lr=LR, amp=False, compile=False)
    device = torch.device("cuda")
    whole = train_with(config, loaders(device=device), tmp_path / "a", device=device)
    out = tmp_path / "b"
    stops = iter([True])
    train_with(config, loaders(device=device), out, device=device, stop=lambda: next(stops))
    again = train_with(
        config, loaders(device=device), out, device=device, resume=state_of(out, name)
    )
    for expected, found in zip(whole.history, again.history, strict=True):
        assert found["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-3)


# Errors that a user can cause


def test_a_loss_that_is_not_finite_stops_the_run_with_a_hint(loaders, tmp_path):
    with pytest.raises(
        UsageError, match=r"training loss is (nan|inf) after epoch 1; pass a lower --lr"
    ):
        train(loaders, tmp_path, model="efficientvit_tiny", lr=1e30)
    assert names_in(tmp_path) == []


def test_an_unknown_model_is_a_usage_error(loaders, tmp_path):
    with pytest.raises(UsageError, match="unknown model 'unet'"):
        train(loaders, tmp_path, model="unet")


def test_fewer_frames_than_a_batch_is_a_usage_error(loaders, tmp_path):
    training, validation = loaders(limit=1)
    config = TrainConfig(model="efficientvit_tiny", batch_size=BATCH)
    with pytest.raises(UsageError, match=r"0 training .* --batch-size"):
        train_with(config, (training, validation), tmp_path)


def test_an_output_that_cannot_be_written_is_named(one_step, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OutputError, match="file"):
        train(one_step, file / "out", model="efficientvit_tiny", epochs=1)
    assert file.read_text() == ""


def test_the_configuration_can_be_stored_as_json():
    config = replace(TrainConfig(), architecture={"embed_dim": (8, 8, 8)})
    assert json.loads(json.dumps(asdict(config)))["augment"]["flip"] == 0.5
