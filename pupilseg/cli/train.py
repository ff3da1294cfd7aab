"""The command `train`, and its variants for the pipeline and the local scripts."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pupilseg.cli.command import Command
from pupilseg.cli.train_flags import add_train_flags
from pupilseg.errors import UsageError

if TYPE_CHECKING:
    import argparse

DATA_DIR = "~/.cache/openeds"
OUTPUT_DIR = Path("checkpoints")


def _add_model(parser: argparse.ArgumentParser) -> None:
    from pupilseg.models import list_models

    parser.add_argument("--model", required=True, help=", ".join(list_models()))


def _add_shards(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument(
        "--shards",
        type=Path,
        required=required,
        help="directory with train/ and validation/"
        + ("" if required else ", instead of --data-dir and --dataset"),
    )


def _add_data(parser: argparse.ArgumentParser) -> None:
    from pupilseg.prepare import DATASET
    from pupilseg.preprocess import NONE, PREPROCESSINGS

    parser.add_argument(
        "--data-dir",
        type=lambda text: Path(text).expanduser(),
        help=f"directory for the data set, filled on first use (default: {DATA_DIR})",
    )
    parser.add_argument(
        "--dataset",
        help=f"owner/name[@revision], a folder, or synthetic:N[@seed] (default: {DATASET})",
    )
    parser.add_argument(
        "--preprocessing",
        choices=list(PREPROCESSINGS),
        help=f"preprocessing of the images (default: {NONE})",
    )


def _add_output_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output-dir",
        "--checkpoint-dir",
        type=Path,
        default=OUTPUT_DIR,
        help=f"directory for the checkpoints (default: ./{OUTPUT_DIR})",
    )


def _add_stage_flags(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    _add_shards(parser, required=True)
    parser.add_argument(
        "--out", type=Path, required=True, help="output directory for checkpoints and history"
    )
    add_train_flags(parser)


def _add_local_flags(parser: argparse.ArgumentParser) -> None:
    _add_data(parser)
    _add_output_dir(parser)
    add_train_flags(parser)


def _add_all_flags(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    _add_shards(parser, required=False)
    _add_local_flags(parser)


def _run_stage(args: argparse.Namespace) -> int:
    from pupilseg.cli.train_run import run_training

    return run_training(
        args, args.model, args.out, lambda: args.shards, partial(print, flush=True), "--out"
    )


def _run_local(args: argparse.Namespace, model: str) -> int:
    from pupilseg.cli.train_run import run_training

    return run_training(
        args, model, args.output_dir, partial(_find_shards, args), partial(print, flush=True)
    )


def _run(args: argparse.Namespace) -> int:
    given = [
        f"--{name.replace('_', '-')}"
        for name in ("data_dir", "dataset", "preprocessing")
        if getattr(args, name) is not None
    ]
    if args.shards is None or not given:
        return _run_local(args, args.model)
    raise UsageError(f"--shards {args.shards} contains built shards; omit {' and '.join(given)}")


def _find_shards(args: argparse.Namespace) -> Path:
    """Returns the directory of the shards, which are downloaded and built on first use."""
    from pupilseg.prepare import DATASET, ensure_shards
    from pupilseg.preprocess import NONE

    shards: Path | None = getattr(args, "shards", None)
    if shards is not None:
        return shards
    return ensure_shards(
        args.data_dir or Path(DATA_DIR).expanduser(),
        args.dataset or DATASET,
        preprocessing=args.preprocessing or NONE,
    )


COMMAND = Command(
    description="Train a network on a data set, which is downloaded and converted to shards on "
    "first use, or on existing shards.",
    extras="train",
    add_flags=_add_all_flags,
    run=_run,
)
STAGE = Command(
    description="Train a network on existing shards.",
    extras="train",
    add_flags=_add_stage_flags,
    run=_run_stage,
)


def local_command(model: str) -> Command:
    """Returns the command for a local training script."""
    return Command(
        description=f"Train {model} on this machine.",
        extras="train",
        add_flags=_add_local_flags,
        run=partial(_run_local, model=model),
    )
