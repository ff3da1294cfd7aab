"""The command `download`: downloads a data source."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from pupilseg.cli.command import Command


def _add_flags(parser: argparse.ArgumentParser) -> None:
    from pupilseg.sources import FORMS, SourceOptions

    default = SourceOptions()
    switch = argparse.BooleanOptionalAction
    parser.epilog = FORMS
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--source", required=True, help="data source; see below")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub source")
    parser.add_argument("--out", required=True, type=Path, help="output directory, one per source")
    parser.add_argument(
        "--augmented-train",
        action=switch,
        default=default.augmented_train,
        help="keep rows named *_flip, *_blur or *_lines in train (default: yes)",
    )
    parser.add_argument(
        "--augmented-validation",
        action=switch,
        default=default.augmented_validation,
        help="keep these rows in validation (default: no)",
    )
    parser.add_argument(
        "--resize",
        default=default.resize,
        help="letterbox or stretch: how to resize frames to 400 x 640 (default: %(default)s)",
    )
    parser.add_argument(
        "--validation-fraction",
        type=float,
        default=default.validation_fraction,
        help="fraction held out for validation if the source has no splits (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=default.seed, help="seed of rendered eyes (default: 0)"
    )


def _run(args: argparse.Namespace) -> int:
    """Downloads the source if necessary, and prints the number of frames."""
    from pupilseg.files import read_json
    from pupilseg.sources import SourceOptions, download

    options = SourceOptions(**{f.name: getattr(args, f.name) for f in fields(SourceOptions)})
    path = download(args.source, args.out, revision=args.revision, options=options)
    manifest = read_json(path, hint=f"remove {path} and run again")
    counts = ", ".join(f"{count} {split}" for split, count in manifest["counts"].items())
    print(f"{manifest['source']}: {counts} ({manifest['split_rule']}); recorded in {path}")
    return 0


COMMAND = Command(
    description="Download a data source.", extras="data", add_flags=_add_flags, run=_run
)
