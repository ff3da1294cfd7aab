"""The command `pupilseg`: predict, info, bench, shards, upload-run."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pupilseg import __version__
from pupilseg.cli_shards import add_shards_command
from pupilseg.cli_table import print_table
from pupilseg.errors import UsageError
from pupilseg.geometry import HEIGHT, WIDTH
from pupilseg.program import positive_int, run

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code.

    Args:
        argv: without the program's name; None takes `sys.argv`.

    Returns:
        0 done; 1 data, disk, or a file of several that could not be read; 2 a request that cannot
        be met; 130 interrupted.
    """
    try:
        run(lambda: _command(argv))
    except SystemExit as end:  # how `run` and argparse hand over the code
        return int(end.code or 0)


def _command(argv: Sequence[str] | None) -> int:
    """Parses the arguments and runs what they ask for."""
    args = _parser().parse_args(argv)
    code: int = args.command(args)
    return code


def _parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="pupilseg", description="Find the pupil in near-infrared eye images."
    )
    parser.add_argument("--version", action="version", version=f"pupilseg {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    predict = commands.add_parser(
        "predict",
        help="find the pupil in images and folders",
        description="Writes OUT/pupil.csv (a row a frame, none left out), OUT/overlays and, if "
        "asked for, OUT/masks. Lengths are in the frame's own pixels. Exit code 1 if a file could "
        "not be read; the others are done.",
    )
    predict.add_argument("paths", nargs="+", metavar="PATH", help="image, folder or pattern")
    predict.add_argument("--model", type=Path, required=True, help="FILE.onnx")
    predict.add_argument("--out", type=Path, required=True, help="directory for what is written")
    predict.add_argument("--masks", action="store_true", help="also write masks as PNG (0, 255)")
    predict.set_defaults(command=_predict)

    info = commands.add_parser("info", help="say what a model file holds")
    info.add_argument("file", type=Path, help="FILE.onnx or FILE.pt")
    info.set_defaults(command=_info)

    bench = commands.add_parser("bench", help="measure milliseconds a frame on this machine")
    bench.add_argument("file", type=Path, help="FILE.onnx")
    bench.add_argument("--repeats", type=positive_int, default=200, help="default: %(default)s")
    bench.set_defaults(command=_bench)
    for command in (predict, bench):
        command.add_argument("--threads", type=positive_int, default=1, help="default: %(default)s")

    add_shards_command(commands)

    upload = commands.add_parser(
        "upload-run",
        help="send to MLflow what it missed of a training run",
        description="Sends what an MLflow server that was down missed of training runs (numbers, "
        "files, status), and removes the files that held it. What the server has is not sent "
        "again. Set MLFLOW_TRACKING_URI if the server has another address now.",
    )
    upload.add_argument(
        "path", type=Path, help="directory with checkpoints, or a *_mlflow.jsonl in one"
    )
    upload.set_defaults(command=_upload_run)
    return parser


def _predict(args: argparse.Namespace) -> int:
    """Finds pupils, and says how many."""
    from pupilseg.predict import Predictor
    from pupilseg.predict_files import CSV_NAME, predict_paths

    _limit_threads(args.threads)
    done = predict_paths(
        Predictor(args.model, args.threads), args.paths, args.out, masks=args.masks
    )
    rate = f" ({done.frames / done.seconds:.0f} frames/s)" if done.frames else ""
    print(
        f"{done.frames} frames, {done.blinks} without a pupil, {len(done.failed)} failed"
        f"{rate}: {args.out / CSV_NAME}"
    )
    return 1 if done.failed else 0


def _info(args: argparse.Namespace) -> int:
    """Prints what a model file says of itself."""
    if args.file.suffix == ".pt":
        lines = _checkpoint_lines(args.file)
    elif args.file.suffix == ".onnx":
        lines = _onnx_lines(args.file)
    else:
        raise UsageError(f"{args.file} has the suffix {args.file.suffix!r}, expected .pt or .onnx")
    print_table({"file": f"{args.file} ({args.file.stat().st_size:,} bytes)"} | lines)
    return 0


def _onnx_lines(file: Path) -> dict[str, Any]:
    """Returns what an ONNX file says, by heading."""
    from pupilseg.predict import OUTPUT_SHAPES, OnnxNetwork

    info = OnnxNetwork(file).info
    name = "logits" if info.task == "segmentation" else "ellipse"
    output = ", ".join(str(size) for size in OUTPUT_SHAPES[info.task])
    return {
        "model": f"{info.model} ({info.task}), written by pupilseg {info.version}",
        "parameters": "not recorded" if info.parameters is None else f"{info.parameters:,}",
        "input": f"image: uint8 (N, 1, {HEIGHT}, {WIDTH}), near infrared, normalised inside",
        "output": f"{name}: float32 (N, {output})",
        "preprocessing": info.preprocessing,
        "data": info.data,
        "metrics": info.metrics,
        "licence": info.licence,
    }


def _checkpoint_lines(file: Path) -> dict[str, Any]:
    """Returns what a checkpoint says, by heading."""
    try:
        from pupilseg.checkpoint import load_model
        from pupilseg.models import model_entry
    except ImportError as error:
        raise UsageError(
            f"{file} needs the package torch; run `pip install 'pupilseg[train]'`"
        ) from error
    network = load_model(file)
    card: dict[str, Any] = network.card  # type: ignore[assignment]  # set by load_model
    entry = model_entry(card["model"])
    return {
        "model": f"{card['model']} ({entry.task}): {entry.summary}",
        "parameters": f"{sum(p.numel() for p in network.parameters()):,}",
        "input": f"float32 (N, 1, {HEIGHT}, {WIDTH}) in [-1, 1]: (x / 255 - 0.5) / 0.5",
        "preprocessing": card.get("preprocessing", "not recorded"),
        "data": card.get("data", "not recorded"),
        "metrics": card.get("metrics", {}),
        "licence": card.get("licence", "not recorded"),
    }


def _bench(args: argparse.Namespace) -> int:
    """Measures and prints."""
    from pupilseg.bench import measure

    _limit_threads(args.threads)
    found = measure(args.file, threads=args.threads, repeats=args.repeats)
    print_table(
        {
            "end to end": f"{found['total_median_ms']:.2f} ms median, "
            f"{found['total_p95_ms']:.2f} ms p95 (preprocessing, network, ellipse; no decoding)",
            "network": f"{found['network_median_ms']:.2f} ms median, "
            f"{found['network_p95_ms']:.2f} ms p95",
            "measured on": f"{args.repeats} frames of {HEIGHT} x {WIDTH}, one a call, "
            f"{args.threads} thread{'s' if args.threads > 1 else ''}",
            "machine": found["machine"],
        }
    )
    return 0


def _upload_run(args: argparse.Namespace) -> int:
    """Sends what a server missed, and says what that was."""
    from pupilseg.upload import upload

    done = upload(args.path, os.environ.get("MLFLOW_TRACKING_URI"))
    for sent in done:
        print(
            f"run {sent.run_id} ({sent.name}) at {sent.uri}: {sent.epochs} epochs and "
            f"{sent.artifacts} files sent"
        )
    if not done:
        print(f"{args.path}: nothing left to send")
    return 0


def _limit_threads(threads: int) -> None:
    """Keeps OpenCV, which resizes and equalises, to as many threads as ONNX Runtime."""
    import cv2

    cv2.setNumThreads(threads)


if __name__ == "__main__":
    sys.exit(main())
