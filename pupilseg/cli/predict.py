"""The commands that use a model: predict, view, info, bench."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pupilseg.cli.program import finishing, positive_int
from pupilseg.cli.table import print_table
from pupilseg.errors import UsageError
from pupilseg.geometry import HEIGHT, WIDTH
from pupilseg.weights import DEFAULT, NAMES, SAFETENSORS, TORCH_SUFFIXES, model_path

if TYPE_CHECKING:
    from pupilseg.model_files.calibration import Calibration


OUT = "found"
"""Where predictions go that nobody gave a place to."""


def add_predict_commands(commands: Any) -> None:
    """Adds the commands to those of `pupilseg`."""
    predict = commands.add_parser(
        "predict",
        help="find the pupil in images, folders, videos, or a camera",
        description="Writes OUT/pupil.csv (a row a frame, none left out), OUT/overlays (pictures; "
        "of a video a video) and, if asked for, OUT/masks. Lengths are in the frame's own pixels. "
        "Exit code 1 if something could not be read; the rest is done.",
    )
    predict.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="image, video, folder, pattern, or number of a camera (Ctrl-C ends it)",
    )
    predict.add_argument(
        "--out",
        type=Path,
        help=f"directory for what is written (default: {OUT}; where that has something, {OUT}-2, "
        "and so on)",
    )
    predict.add_argument("--masks", action="store_true", help="also write masks as PNG (0, 255)")
    predict.add_argument(
        "--no-overlays", dest="overlays", action="store_false", help="write no pictures: quicker"
    )
    predict.add_argument(
        "--skip-existing",
        action="store_true",
        help="go on where an earlier run into OUT was stopped; finished files stay as they are",
    )
    predict.add_argument(
        "--roi",
        metavar="X,Y,W,H",
        help="look in this part of each frame only: first column, first row, width, height",
    )
    predict.add_argument(
        "--mm-per-px",
        type=_positive_number,
        metavar="MM",
        help="size of a frame's pixel at the eye; adds the column diameter_mm",
    )
    predict.set_defaults(command=_predict)

    view = commands.add_parser(
        "view",
        help="step through what predict found",
        description="Writes DIR/view.html, one page that needs no other file and no network: "
        "frames to step through, diameter and centre over time, lowest confidence first. Opens it.",
    )
    view.add_argument("directory", type=Path, metavar="DIR", help="OUT of a `pupilseg predict`")
    view.add_argument(
        "--no-open", dest="open", action="store_false", help="write the page, open no browser"
    )
    view.add_argument(
        "--pictures",
        type=positive_int,
        default=400,
        help="most frames whose picture the page holds, doubtful ones first (default: %(default)s)",
    )
    view.set_defaults(command=_view)

    info = commands.add_parser("info", help="say what a model file holds")
    info.add_argument("file", help=f"FILE.onnx, FILE.pt, FILE{SAFETENSORS}, or {', '.join(NAMES)}")
    info.set_defaults(command=_info)

    bench = commands.add_parser("bench", help="measure milliseconds a frame on this machine")
    bench.add_argument("file", nargs="?", default=DEFAULT, help="as --model of predict")
    bench.add_argument("--repeats", type=positive_int, default=200, help="default: %(default)s")
    bench.set_defaults(command=_bench)

    predict.add_argument(
        "--model", default=DEFAULT, help=f"FILE.onnx, or {', '.join(NAMES)} (default: %(default)s)"
    )
    for command in (predict, bench):
        command.add_argument(
            "--threads", type=positive_int, default=1, help="of the network (default: %(default)s)"
        )


def _positive_number(text: str) -> float:
    """Parses a finite number above 0, for argparse."""
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return value


def _default_out(*, going_on: bool) -> Path:
    """Returns a directory without results of an earlier run, or the first to go on there."""
    names = itertools.chain([OUT], (f"{OUT}-{number}" for number in itertools.count(2)))
    free = (path for path in map(Path, names) if going_on or not path.exists())
    return next(free)


def _predict(args: argparse.Namespace) -> int:
    """Finds pupils, and says how many."""
    from pupilseg.predict.journal import CSV_NAME
    from pupilseg.predict.predictor import Predictor
    from pupilseg.predict.roi import Roi
    from pupilseg.predict.runner import Options, predict_paths

    _limit_threads(args.threads)
    options = Options(
        overlays=args.overlays,
        masks=args.masks,
        skip_existing=args.skip_existing,
        mm_per_px=args.mm_per_px,
        roi=None if args.roi is None else Roi.parse(args.roi),
    )
    predictor = Predictor(args.model, args.threads)
    out = args.out or _default_out(going_on=args.skip_existing)
    camera = any(path.isdecimal() and not Path(path).exists() for path in args.paths)
    until = finishing("this frame") if camera else contextlib.nullcontext(lambda: False)
    try:
        with until as stop:
            done = predict_paths(predictor, args.paths, out, options, stop=stop)
    except KeyboardInterrupt:
        goes_on = f"--out {out} --skip-existing goes on behind them"
        sys.stderr.write(f"finished files are kept; {goes_on}\n")
        raise
    rate = f" ({done.frames / done.seconds:.0f} frames/s)" if done.frames else ""
    skipped = f", {done.skipped} files done before" if done.skipped else ""
    print(
        f"{done.frames} frames, {done.blinks} without a pupil, {len(done.failed)} failed{skipped}"
        f"{rate}: {out / CSV_NAME}"
    )
    return 1 if done.failed else 0


def _view(args: argparse.Namespace) -> int:
    """Writes the page and opens it."""
    import webbrowser

    from pupilseg.predict.view import write_view

    _limit_threads(1)
    page = write_view(args.directory, pictures=args.pictures)
    print(page)
    if args.open:
        webbrowser.open(page.resolve().as_uri())
    return 0


def _info(args: argparse.Namespace) -> int:
    """Prints what a model file says of itself."""
    file = model_path(args.file)
    if file.suffix in TORCH_SUFFIXES:
        lines = _checkpoint_lines(file)
    elif file.suffix == ".onnx":
        lines = _onnx_lines(file)
    else:
        raise UsageError(
            f"{file} has the suffix {file.suffix!r}, expected .pt, {SAFETENSORS} or .onnx"
        )
    print_table({"file": f"{file} ({file.stat().st_size:,} bytes)"} | lines)
    return 0


def _onnx_lines(file: Path) -> dict[str, Any]:
    """Returns what an ONNX file says, by heading."""
    from pupilseg.model_files.onnx import OUTPUTS, OnnxNetwork

    info = OnnxNetwork(file).info
    output = OUTPUTS[info.task]
    shape = ", ".join(str(size) for size in output.shape)
    return {
        "model": f"{info.model} ({info.task}), written by pupilseg {info.version}",
        "parameters": "not recorded" if info.parameters is None else f"{info.parameters:,}",
        "input": f"image: uint8 (N, 1, {HEIGHT}, {WIDTH}), near infrared, normalised inside",
        "output": f"{output.name}: float32 (N, {shape})",
        "preprocessing": info.preprocessing,
        "data": info.data,
        "metrics": info.metrics,
        "confidence": _confidence(info.calibration),
        "license": info.license,
    }


def _confidence(calibration: Calibration | None) -> str:
    """Says what a model's confidence means."""
    from pupilseg.model_files.calibration import GOOD_PX

    if calibration is None:
        return "uncalibrated: a raw score; export with --calibrate SHARDS/validation"
    return (
        f"calibrated on {calibration.frames} frames of {calibration.data}: the probability that "
        f"the centre is within {GOOD_PX:g} px"
    )


def _checkpoint_lines(file: Path) -> dict[str, Any]:
    """Returns what a checkpoint says, by heading."""
    try:
        from pupilseg.model_files.checkpoint import load_model_and_card
        from pupilseg.models import model_entry
    except ImportError as error:
        raise UsageError(
            f"{file} needs the package torch; run `pip install 'pupilseg[train]'`"
        ) from error
    network, card = load_model_and_card(file)
    entry = model_entry(card.model)
    return {
        "model": f"{card.model} ({entry.task}): {entry.summary}",
        "parameters": f"{sum(p.numel() for p in network.parameters()):,}",
        "input": f"float32 (N, 1, {HEIGHT}, {WIDTH}) in [-1, 1]: (x / 255 - 0.5) / 0.5",
        "preprocessing": card.preprocessing or "not recorded",
        "data": card.data or "not recorded",
        "metrics": card.metrics,
        "license": card.license or "not recorded",
    }


def _bench(args: argparse.Namespace) -> int:
    """Measures and prints."""
    from pupilseg.predict.benchmark import measure

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


def _limit_threads(threads: int) -> None:
    """Keeps OpenCV, which resizes and equalises, to as many threads as ONNX Runtime."""
    import cv2

    cv2.setNumThreads(threads)
