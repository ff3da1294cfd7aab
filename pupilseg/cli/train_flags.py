"""Flags of a training run, generated from the fields of its configuration.

`pipeline.train`, the local scripts and `modal run` share these flags. This module imports neither
torch nor NumPy, because `modal run` parses flags on machines where only modal is installed.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from pupilseg.augment.config import AugmentConfig
from pupilseg.cli.program import positive_int, whole_number
from pupilseg.train.config import TrainConfig
from pupilseg.weights import PRETRAINED

if TYPE_CHECKING:
    from dataclasses import Field

LATEST = "latest"
"""Value of `--resume` without a file: use the training state in the output directory."""
AUGMENT = "augment_"
"""Prefix of the flags for `AugmentConfig`."""


def add_train_flags(parser: argparse.ArgumentParser) -> None:
    """Adds all flags of a local training run."""
    add_config_flags(parser)
    add_start_flags(parser)
    parser.add_argument(
        "--device",
        help="auto, cpu, cuda, cuda:N or mps (default: auto, cuda if available)",
    )
    parser.add_argument(
        "--processes",
        type=positive_int,
        metavar="N",
        help="processes that share each batch on a CPU (default: one per core, or 1 for runs "
        "shorter than half a minute)",
    )
    parser.add_argument(
        "--threads",
        type=positive_int,
        metavar="N",
        help="threads per process on a CPU (default: 1)",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const=LATEST,
        metavar="FILE",
        help="resume from a training state (without FILE: the one in the output directory)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the run of this network in the output directory; its files are removed after "
        "the first epoch of the new run",
    )


def add_start_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags outside the configuration that are also valid in containers."""
    parser.add_argument(
        "--init",
        type=Path,
        metavar="FILE",
        help="start from the weights of a model file (*.pt, *.safetensors), or from released "
        f"weights ({PRETRAINED})",
    )
    parser.add_argument(
        "--limit", type=positive_int, metavar="N", help="use the first N frames of each split"
    )
    parser.add_argument(
        "--num-workers",
        type=whole_number,
        metavar="N",
        help="number of threads that load data, instead of worker processes; 0 loads data in the "
        "training thread (default: the number of torch threads, at most 4)",
    )
    parser.add_argument(
        "--no-mlflow",
        dest="mlflow",
        action="store_false",
        help="do not track the run, even if the MLFLOW_* variables are set",
    )


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """Adds one flag per field of `TrainConfig` and `AugmentConfig`; omitted flags are None."""
    cuda = parser.add_argument_group("CUDA performance")
    types = get_type_hints(TrainConfig)
    for field in _option_fields():
        group = cuda if field.metadata["cuda"] else parser
        _add_flag(group, field.name, types[field.name], field)
    augment = parser.add_argument_group("augmentation")
    augment.add_argument(
        "--augment",
        action=argparse.BooleanOptionalAction,
        help="augment the training frames (default: on)",
    )
    types = get_type_hints(AugmentConfig)
    for field in fields(AugmentConfig):
        _add_flag(augment, AUGMENT + field.name, types[field.name], field)


def _option_fields() -> list[Field[Any]]:
    """Returns the fields of `TrainConfig` that have a flag."""
    return [field for field in fields(TrainConfig) if "help" in field.metadata]


def _add_flag(group: Any, name: str, hint: Any, field: Field[Any]) -> None:
    flags = [f"--{name.replace('_', '-')}"]
    if field.metadata.get("alias"):
        flags.append(field.metadata["alias"])
    kind = next(kind for kind in get_args(hint) or (hint,) if kind is not NoneType)
    default = field.default
    if kind is bool:
        default = "on" if default else "off"
    default = field.metadata.get("shown_default") or default
    text = f"{field.metadata['help']} (default: {default})".replace("%", "%%")
    if kind is bool:
        group.add_argument(*flags, action=argparse.BooleanOptionalAction, help=text)
        return
    choices = field.metadata.get("choices")
    metavar = None if choices else {int: "N", float: "X"}[kind]
    group.add_argument(*flags, dest=name, type=kind, choices=choices, metavar=metavar, help=text)


def config_from(args: argparse.Namespace, model: str) -> TrainConfig:
    """Creates a configuration from the flags of `add_config_flags`.

    Args:
        args: the parsed command line.
        model: name in `pupilseg.models`.

    Raises:
        UsageError: a value is out of range.
    """
    given = _given(args, "", [field.name for field in _option_fields()])
    augment = AugmentConfig(
        **_given(args, AUGMENT, [field.name for field in fields(AugmentConfig)])
    )
    return TrainConfig(model=model, augment=None if args.augment is False else augment, **given)


def _given(args: argparse.Namespace, prefix: str, names: list[str]) -> dict[str, Any]:
    """Returns the values of the flags that the user passed."""
    values = {name: getattr(args, prefix + name) for name in names}
    return {name: value for name, value in values.items() if value is not None}
