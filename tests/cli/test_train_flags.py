"""Flags of a training run: one per field of the configuration, with its default and checks."""

import argparse
from dataclasses import fields

import pytest
import torch

from pupilseg.augment.config import AugmentConfig
from pupilseg.cli.train_flags import LATEST, add_train_flags, config_from
from pupilseg.errors import UsageError
from pupilseg.train.config import TrainConfig, default_batch_size

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def parse(*flags):
    parser = argparse.ArgumentParser()
    add_train_flags(parser)
    return parser.parse_args(flags)


def config_of(*flags, model="efficientvit"):
    return config_from(parse(*flags), model)


def test_without_flags_the_configuration_has_its_defaults():
    assert config_of(model="ellipse") == TrainConfig(model="ellipse")


OTHER_VALUES = {"amp_dtype": "float16", "epochs": 7}


@pytest.mark.parametrize(
    "name", [f.name for f in fields(TrainConfig) if f.name not in ("model", "architecture")]
)
def test_every_field_of_the_configuration_is_a_flag(name):
    flag, default = f"--{name.replace('_', '-')}", getattr(TrainConfig(), name)
    if name == "augment":
        assert config_of("--no-augment").augment is None
        assert config_of("--augment").augment == AugmentConfig()
    elif isinstance(default, bool):
        assert getattr(config_of(flag.replace("--", "--no-", 1)), name) is False
        assert getattr(config_of(flag), name) is True
    elif name == "defer_metrics":
        assert config_of(flag).defer_metrics is True
        assert config_of("--no-defer-metrics").defer_metrics is False
    else:
        value = OTHER_VALUES.get(name) or (1 if default in (None, 0) else default / 2)
        assert getattr(config_of(flag, str(value)), name) == value


@pytest.mark.parametrize("name", [f.name for f in fields(AugmentConfig)])
def test_every_strength_of_the_augmentation_is_a_flag(name):
    value = getattr(AugmentConfig(), name) * 0.9
    config = config_of(f"--augment-{name.replace('_', '-')}", str(value))
    assert getattr(config.augment, name) == pytest.approx(value)
    others = {f.name for f in fields(AugmentConfig)} - {name}
    assert all(getattr(config.augment, x) == getattr(AugmentConfig(), x) for x in others)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epochs", "0"], "--epochs 0: expected a whole number of at least 1"),
        (["--batch-size", "0"], "--batch-size 0: expected a whole number of at least 1"),
        (["--lr", "0"], "--lr 0: expected a positive number"),
        (["--lr", "-0.5"], "--lr -0.5: expected a positive number"),
        (["--lr", "nan"], "--lr nan: expected a positive number"),
        (["--lr", "inf"], "--lr inf: expected a positive number"),
        (["--seed", "-1"], "--seed -1: expected a whole number of at least 0"),
        (["--warmup", "1.5"], "--warmup 1.5: expected a number from 0 to 1"),
        (["--weight-decay", "-1"], "--weight-decay -1: expected a number of at least 0"),
        (["--augment-flip", "2"], "flip = 2"),
    ],
    ids=str,
)
def test_values_out_of_range_are_usage_errors(flags, message):
    with pytest.raises(UsageError) as caught:
        config_of(*flags)
    assert message in str(caught.value)


def test_the_help_text_names_every_default():
    parser = argparse.ArgumentParser()
    add_train_flags(parser)
    text = " ".join(parser.format_help().split())
    assert "number of passes over the training split (default: 15)" in text
    assert "torch.compile (default: on)" in text
    assert "(default: 4 on a CPU, 32 elsewhere, fewer for few frames)" in text
    assert "share of frames mirrored left to right (default: 0.5)" in text


def test_learning_rate_is_an_alias_of_lr():
    assert config_of("--learning-rate", "0.5") == config_of("--lr", "0.5")


def test_the_type_of_mixed_precision_can_be_chosen(capsys):
    assert config_of("--amp-dtype", "bfloat16").amp_dtype == "bfloat16"
    with pytest.raises(SystemExit):
        parse("--amp-dtype", "float64")
    assert "invalid choice: 'float64'" in capsys.readouterr().err
    with pytest.raises(UsageError, match="--amp-dtype int8: expected auto, float16, bfloat16"):
        TrainConfig(amp_dtype="int8")


def test_loading_threads_and_tracking_are_flags(capsys):
    assert (parse().num_workers, parse().mlflow) == (None, True)
    args = parse("--num-workers", "0", "--no-mlflow")
    assert (args.num_workers, args.mlflow) == (0, False)
    with pytest.raises(SystemExit):
        parse("--num-workers", "-1")
    assert "-1 is negative" in capsys.readouterr().err


def test_resume_without_a_file_means_the_latest():
    assert parse().resume is None
    assert parse("--resume").resume == LATEST
    assert parse("--resume", "x.pt").resume == "x.pt"


# Defaults that depend on the device and the data


@pytest.mark.parametrize(
    ("flags", "device", "expected"),
    [
        ([], CPU, (4, 0.01)),
        ([], CUDA, (32, 0.01 * 8**0.5)),
        (["--batch-size", "16"], CPU, (16, 0.02)),
        (["--batch-size", "16", "--lr", "0.5"], CUDA, (16, 0.5)),
    ],
    ids=str,
)
def test_batch_size_and_rate_suit_the_device_and_each_other(flags, device, expected):
    config = config_of(*flags).resolved(device)
    assert (config.batch_size, config.lr) == pytest.approx(expected)
    assert config.resolved(device) == config


def test_few_frames_make_small_batches_that_all_processes_can_share():
    assert default_batch_size(CUDA, 8916) == 32
    assert default_batch_size(CUDA, 19) == 2
    assert default_batch_size(CPU, 19) == 2
    assert default_batch_size(CPU, 3) == 1
    assert default_batch_size(CPU, 3, processes=2) == 2
    assert default_batch_size(CUDA, 8916, processes=3) == 30


def test_metrics_are_deferred_by_default_for_the_micro_network_on_cuda():
    def deferred(model, device, *flags):
        return config_of(*flags, model=model).resolved(device).defer_metrics

    assert deferred("efficientvit_tiny", CUDA)
    assert not deferred("efficientvit_tiny", CPU)
    assert not deferred("efficientvit", CUDA)
    assert not deferred("efficientvit_tiny", CUDA, "--no-defer-metrics")
    assert deferred("ellipse", CPU, "--defer-metrics")
