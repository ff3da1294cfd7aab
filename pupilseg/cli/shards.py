"""The command `pupilseg shards`: info, verify, show."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pupilseg.cli.table import print_table
from pupilseg.errors import UsageError

if TYPE_CHECKING:
    import argparse


def add_shards_command(commands: argparse._SubParsersAction[Any]) -> None:
    """Adds the command `shards` and its actions to the parser of `pupilseg`."""
    shards = commands.add_parser("shards", help="inspect shards")
    actions = shards.add_subparsers(required=True, metavar="ACTION")
    for name, function, text in (
        ("info", _info, "show the contents of a split"),
        ("verify", _verify, "check every byte of a split"),
        ("show", _show, "draw a sample: image, label, weights and distance maps"),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument("dir", type=Path, help="a split, e.g. DIR/train")
        action.set_defaults(command=function)
        if name == "show":
            action.add_argument(
                "--index", type=int, default=0, help="sample number (default: %(default)s)"
            )
            action.add_argument(
                "--out",
                type=Path,
                help="PNG or JPEG file to write (default: SPLIT-INDEX.png in this directory)",
            )


def _info(args: argparse.Namespace) -> int:
    from pupilseg.shards import open_shards
    from pupilseg.shards.codec import bytes_per_sample

    with open_shards(args.dir) as shards:
        manifest = shards.manifest
        size = sum(entry["bytes"] for entry in manifest["files"])
        encodings = {name: shards.encoding(name) or "differs" for name in shards.columns[:-1]}
        packed = {bytes_per_sample(entry["encodings"]) for entry in manifest["files"]}
        print_table(
            {
                "samples": f"{len(shards):,} in {len(manifest['files'])} files, "
                f"{size / 1e6:,.1f} MB",
                "bytes per sample": " or ".join(f"{count:,}" for count in sorted(packed))
                + f", with names and headers {size / len(shards):,.0f}",
                "source": manifest["source"],
                "split": f"{manifest['split']} ({manifest['split_rule']})",
                "preprocessing": manifest["preprocessing"],
                "columns": ", ".join(f"{name} ({how})" for name, how in encodings.items()),
                "skipped": dict(Counter(s["error"] for s in manifest["skipped"])) or "nothing",
                "written by": f"pupilseg {manifest['code_version']}, format {manifest['version']}",
            }
        )
    return 0


def _verify(args: argparse.Namespace) -> int:
    from pupilseg.shards import verify

    print(f"{args.dir}: {verify(args.dir, progress=True)} samples, all digests match")
    return 0


def _show(args: argparse.Namespace) -> int:
    from pupilseg.pictures import SUFFIXES, write_image
    from pupilseg.shards import open_shards
    from pupilseg.shards.picture import sample_picture

    with open_shards(args.dir) as shards:
        if not 0 <= args.index < len(shards):
            raise UsageError(
                f"--index is {args.index}, expected 0..{len(shards) - 1} for {args.dir}"
            )
        sample = shards.sample(args.index)
    out = args.out or Path(f"{args.dir.resolve().name}-{args.index:05d}.png")
    if out.suffix not in SUFFIXES:
        raise UsageError(f"--out is {out}, expected a file name ending in {' or '.join(SUFFIXES)}")
    write_image(out, sample_picture(sample))
    print(f"{args.dir}[{args.index}] {sample['name']!r}: {out}")
    return 0
