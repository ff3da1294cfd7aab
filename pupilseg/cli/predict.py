"""The commands that use or describe a model: predict, view, info, bench."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import shlex
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
"""Default output directory."""


def add_predict_commands(commands: Any) -> None:
    """Adds these commands to the parser of `pupilseg`.

    Args:
        commands: the result of `ArgumentParser.add_subparsers`.
    """
    predict = commands.add_parser(
        "predict",
        help="find the pupil in images, folders, videos, or a camera",
        description="Writes OUT/pupil.csv with one row per frame, OUT/overlays (an image or video "
        "per file) and, with --masks, OUT/masks. Lengths are in pixels of the original frame. If a "
        "file cannot be read, the others are predicted and the exit code is 1.",
    )
    predict.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="image, video, folder, glob pattern, or camera number (stop a camera with Ctrl-C)",
    )
    predict.add_argument(
        "--out",
        type=Path,
        help=f"output directory (default: {OUT}, or {OUT}-2 and so on if that exists)",
    )
    predict.add_argument(
        "--masks", action="store_true", help="also write masks, as PNG with values 0 and 255"
    )
    predict.add_argument(
        "--no-overlays", dest="overlays", action="store_false", help="write no overlays (faster)"
    )
    predict.add_argument(
        "--skip-existing",
        action="store_true",
        help="resume an earlier run in OUT and skip the files that it finished",
    )
    predict.add_argument(
        "--roi",
        metavar="X,Y,W,H",
        help="use only this part of each frame: first column, first row, width, height",
    )
    predict.add_argument(
        "--mm-per-px",
        type=_positive_number,
        metavar="MM",
        help="size of a pixel at the eye in mm; adds the column diameter_mm",
    )
    predict.set_defaults(command=_predict)

    view = commands.add_parser(
        "view",
        help="step through the results of predict",
        description="Writes DIR/view.html, a self-contained page, and opens it. It shows frames, "
        "diameter and center over time, and the frames with the lowest confidence.",
    )
    view.add_argument("directory", type=Path, metavar="DIR", help="OUT of a `pupilseg predict` run")
    view.add_argument(
        "--no-open", dest="open", action="store_false", help="write the page without opening it"
    )
    view.add_argument(
        "--pictures",
        type=positive_int,
        default=400,
        help="maximum number of frames shown with an image (default: %(default)s)",
    )
    view.set_defaults(command=_view)

    info = commands.add_parser("info", help="describe a model file")
    info.add_argument("file", help=f"FILE.onnx, FILE.pt, FILE{SAFETENSORS}, or {', '.join(NAMES)}")
    info.set_defaults(command=_info)

    model = f"FILE.onnx, or {', '.join(NAMES)} (default: %(default)s)"
    bench = commands.add_parser("bench", help="measure milliseconds per frame on this machine")
    bench.add_argument("file", nargs="?", default=DEFAULT, help=model)
    bench.add_argument(
        "--repeats", type=positive_int, default=200, help="timed calls (default: %(default)s)"
    )
    bench.set_defaults(command=_bench)

    predict.add_argument("--model", default=DEFAULT, help=model)
    for command in (predict, bench):
        command.add_argument(
            "--threads",
            type=positive_int,
            default=1,
            help="threads of the network (default: %(default)s)",
        )


def _positive_number(text: str) -> float:
    """Parses a finite number above 0 for argparse."""
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return value


def _default_out(*, resume: bool) -> Path:
    """Returns the default directory when resuming, else the first of its names that is free."""
    names = itertools.chain([OUT], (f"{OUT}-{number}" for number in itertools.count(2)))
    free = (path for path in map(Path, names) if resume or not path.exists())
    return next(free)


def _predict(args: argparse.Namespace) -> int:
    """Runs `pupilseg predict`."""
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
    out = args.out or _default_out(resume=args.skip_existing)
    camera = any(path.isdecimal() and not Path(path).exists() for path in args.paths)
    until = finishing("this frame") if camera else contextlib.nullcontext(lambda: False)
    try:
        with until as stop:
            done = predict_paths(predictor, args.paths, out, options, stop=stop)
    except KeyboardInterrupt:
        words = shlex.join(["--out", str(out), "--skip-existing"])
        sys.stderr.write(f"finished files are kept; resume with {words}\n")
        raise
    rate = f" ({done.frames / done.seconds:.0f} frames/s)" if done.frames else ""
    skipped = f", {done.skipped} files skipped" if done.skipped else ""
    print(
        f"{done.frames} frames, {done.blinks} without a pupil, {len(done.failed)} failed{skipped}"
        f"{rate}: {out / CSV_NAME}"
    )
    return 1 if done.failed else 0


def _view(args: argparse.Namespace) -> int:
    """Runs `pupilseg view`."""
    import webbrowser

    from pupilseg.predict.view import write_view

    _limit_threads(1)
    page = write_view(args.directory, pictures=args.pictures)
    print(page)
    if args.open:
        webbrowser.open(page.resolve().as_uri())
    return 0


def _info(args: argparse.Namespace) -> int:
    """Runs `pupilseg info`."""
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
    """Returns heading -> text for an ONNX file."""
    from pupilseg.model_files.onnx import OUTPUTS, OnnxNetwork

    info = OnnxNetwork(file).info
    output = OUTPUTS[info.task]
    shape = ", ".join(str(size) for size in output.shape)
    return {
        "model": f"{info.model} ({info.task}), written by pupilseg {info.version}",
        "parameters": "not recorded" if info.parameters is None else f"{info.parameters:,}",
        "input": f"image: uint8 (N, 1, {HEIGHT}, {WIDTH}), near infrared, normalized inside",
        "output": f"{output.name}: float32 (N, {shape})",
        "preprocessing": info.preprocessing,
        "data": info.data,
        "metrics": info.metrics,
        "confidence": _confidence(info.calibration),
        "license": info.license,
    }


def _confidence(calibration: Calibration | None) -> str:
    """Describes a model's confidence."""
    from pupilseg.model_files.calibration import GOOD_PX

    if calibration is None:
        return "uncalibrated: a raw score; export with --calibrate SHARDS/validation"
    return (
        f"calibrated on {calibration.frames} frames of {calibration.data}: the probability that "
        f"the center is within {GOOD_PX:g} px"
    )


def _checkpoint_lines(file: Path) -> dict[str, Any]:
    """Returns heading -> text for a checkpoint."""
    try:
        from pupilseg.model_files.checkpoint import load_model_and_card
        from pupilseg.models import model_entry
    except ImportError as error:
        raise UsageError(
            f"reading {file} needs torch; run: pip install 'pupilseg[train]'"
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
    """Runs `pupilseg bench`."""
    from pupilseg.predict.benchmark import measure

    _limit_threads(args.threads)
    found = measure(args.file, threads=args.threads, repeats=args.repeats)
    print_table(
        {
            "end to end": f"{found['total_median_ms']:.2f} ms median, "
            f"{found['total_p95_ms']:.2f} ms p95 (preprocessing, network, ellipse; no decoding)",
            "network": f"{found['network_median_ms']:.2f} ms median, "
            f"{found['network_p95_ms']:.2f} ms p95",
            "measured on": f"{args.repeats} frames of {HEIGHT} x {WIDTH}, one per call, "
            f"{args.threads} thread{'s' if args.threads > 1 else ''}",
            "machine": found["machine"],
        }
    )
    return 0


def _limit_threads(threads: int) -> None:
    """Sets the number of threads of OpenCV, which is used for resizing and preprocessing."""
    import cv2

    cv2.setNumThreads(threads)
