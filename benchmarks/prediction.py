"""Measures postprocessing: ellipses, confidence, INT8 against float, and whole runs over files.

python -m benchmarks.prediction --model FILE.onnx [--frames 300] [--only ellipse int8 ...]

Frames are rendered. Fitting and calibration use another seed than evaluation. Alternatives are
timed alternately, frame by frame.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

from benchmarks.machine import machine_line
from pupilseg.evaluate.confidence import PredictedConfidence, confidence_and_error
from pupilseg.geometry import HEIGHT, WIDTH, ellipse_from_mask, ellipse_mask
from pupilseg.letterbox import Letterbox
from pupilseg.model_files.calibration import reliability
from pupilseg.model_files.onnx import OnnxNetwork, onnx_session
from pupilseg.pictures import write_image
from pupilseg.predict.postprocess import find_blob, margin_near, sub_pixel_ellipse
from pupilseg.predict.predictor import Predictor
from pupilseg.predict.runner import Options, predict_paths
from pupilseg.predict.video import VideoFile
from pupilseg.synthetic import render

FIT_SEED, JUDGE_SEED = 7001, 7002
PUPIL = 3
"""Class of the pupil in a rendered frame."""
WHOLE = Letterbox.of((HEIGHT, WIDTH))


def ellipses(network: OnnxNetwork, frames: int) -> None:
    """Prints the errors of center and semi-axes for two ways to compute the ellipse."""
    errors: dict[str, list[tuple[float, ...]]] = {"mask's moments": [], "sub-pixel border": []}
    for index in range(frames):
        frame = render(index, JUDGE_SEED)
        if frame.pupil is None:
            continue
        whole = np.count_nonzero(ellipse_mask(frame.pupil))
        if np.count_nonzero(frame.classes == PUPIL) < 0.97 * whole:
            continue  # cut by a lid, so the mask has another ellipse
        (logits,) = network(frame.image[None])
        blob = find_blob(logits[1] > logits[0], WHOLE)
        if blob is None:
            continue
        of_mask = ellipse_from_mask(blob.mask)
        assert of_mask is not None  # a blob has pixels
        found = (of_mask, sub_pixel_ellipse(blob, margin_near(logits, blob), WHOLE))
        for into, ellipse in zip(errors.values(), found, strict=True):
            gap = np.abs(np.subtract(ellipse[:4], frame.pupil[:4]))
            into.append((float(np.hypot(*gap[:2])), float(gap[2]), float(gap[3])))
    print("| ellipse from | pupils | center px median / mean | semi-axis a | semi-axis b |")
    print("| --- | --- | --- | --- | --- |")
    for name, rows in errors.items():
        table = np.array(rows)
        cells = [f"{np.median(c):.3f} / {c.mean():.3f}" for c in table.T]
        print(f"| {name} | {len(rows)} | {' | '.join(cells)} |")
    closer = np.mean(np.array(errors["sub-pixel border"]) < np.array(errors["mask's moments"]), 0)
    print("sub-pixel border closer in", ", ".join(f"{100 * share:.0f} %" for share in closer))


def predicted_confidence(network: OnnxNetwork, frames: int, seed: int) -> PredictedConfidence:
    """Returns confidences and errors for rendered frames."""
    rows = []
    for index in range(frames):
        frame = render(index, seed)
        output = network(frame.image[None])[0]
        rows.append(confidence_and_error(frame.image, frame.classes == PUPIL, output))
    return PredictedConfidence(*np.array(rows).T)


def confidence(network: OnnxNetwork, frames: int) -> None:
    """Prints predicted and actual confidence, before and after calibration."""
    calibration = predicted_confidence(network, frames, FIT_SEED).fit("rendered")
    print(f"fitted on {calibration.frames} frames: {calibration}")
    predicted = predicted_confidence(network, 2 * frames, JUDGE_SEED)
    good, found = predicted.good, predicted.found
    print("| confidence | mean error | frames over 0.9 | of these within 5 px | under 0.9 |")
    print("| --- | --- | --- | --- | --- |")
    for name, said in (("raw", predicted.raw), ("calibrated", predicted.calibrated(calibration))):
        sure, unsure = found & (said > 0.9), found & (said <= 0.9)
        shares = [f"{100 * good[part].mean():.1f} %" for part in (sure, unsure)]
        error = reliability(said[found], good[found]).error
        print(f"| {name} | {error:.3f} | {sure.sum()} of {found.sum()} | {' | '.join(shares)} |")


def int8(model: Path, frames: int, runs: int) -> None:
    """Prints time and IoU of a static INT8 model (QDQ, per channel) and of the float model."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quant_pre_process,
        quantize_static,
    )

    class Frames(CalibrationDataReader):
        def __init__(self) -> None:
            self._left = iter(range(100))

        def get_next(self) -> dict[str, np.ndarray] | None:
            index = next(self._left, None)
            if index is None:
                return None
            return {"image": render(index, FIT_SEED).image[None, None]}

    with tempfile.TemporaryDirectory() as folder:
        prepared, small = Path(folder) / "p.onnx", Path(folder) / "q.onnx"
        quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared), str(small), Frames(), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
        sizes = [path.stat().st_size for path in (model, small)]
        sessions = [onnx_session(path) for path in (model, small)]
    times: list[list[float]] = [[], []]
    shares: list[list[float]] = [[], []]
    for index in range(frames):
        frame = render(index, JUDGE_SEED)
        truth = frame.classes == PUPIL
        for session, into in zip(sessions, shares, strict=True):
            (logits,) = session.run(None, {"image": frame.image[None, None]})
            mask = logits[0, 1] > logits[0, 0]
            union = np.count_nonzero(mask | truth)
            into.append(np.count_nonzero(mask & truth) / union if union else 1.0)
    image = frame.image[None, None]
    for _ in range(runs):
        for session, into in zip(sessions, times, strict=True):
            started = time.perf_counter()
            session.run(None, {"image": image})
            into.append(1e3 * (time.perf_counter() - started))
    print("| model | bytes | pupil IoU per frame, mean / p5 | ms min / median |")
    print("| --- | --- | --- | --- |")
    for name, size, share, ms in zip(("float", "INT8"), sizes, shares, times, strict=True):
        print(
            f"| {name} | {size:,} | {np.mean(share):.4f} / {np.quantile(share, 0.05):.4f} "
            f"| {min(ms):.2f} / {np.median(ms):.2f} |"
        )
    print(f"ratio of the minimum times, INT8 / float: {min(times[1]) / min(times[0]):.2f}")


def files(model: Path, frames: int) -> None:
    """Prints frames per second of whole runs over a video and images, with and without threads."""
    predictor = Predictor(model)
    eyes = [render(index, JUDGE_SEED).image for index in range(12)]
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        video = VideoFile(folder / "video.mp4", 30)
        for index in range(frames):
            video.write(cv2.cvtColor(eyes[index % 12], cv2.COLOR_GRAY2BGR))
            write_image(folder / "images" / f"{index}.png", eyes[index % 12])
        video.finish()
        rates: dict[tuple[str, bool, bool], list[float]] = {}
        kinds = itertools.product(("video.mp4", "images"), (True, False), (True, False))
        for name, overlays, threads in list(kinds) * 3:
            options = Options(overlays=overlays, threads=threads)
            done = predict_paths(predictor, [str(folder / name)], folder / "out", options)
            rates.setdefault((name, overlays, threads), []).append(done.frames / done.seconds)
    print("| input | overlays | three threads, frames/s | one thread | ratio |")
    print("| --- | --- | --- | --- | --- |")
    for name, overlays in itertools.product(("video.mp4", "images"), (True, False)):
        many, one = (max(rates[name, overlays, threads]) for threads in (True, False))
        drawn = "yes" if overlays else "no"
        print(f"| {name} | {drawn} | {many:.0f} | {one:.0f} | {many / one:.2f} |")


def main() -> None:
    """Runs the benchmark and prints Markdown tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prediction", description=__doc__)
    parser.add_argument(
        "--model", type=Path, required=True, help="FILE.onnx of a segmentation network"
    )
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--runs", type=int, default=200, help="timed calls (default: 200)")
    parts = ("ellipse", "confidence", "int8", "files")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    args = parser.parse_args()
    cv2.setNumThreads(1)
    print(machine_line("onnxruntime", "cv2", "numpy"))
    network = OnnxNetwork(args.model)
    if "ellipse" in args.only:
        ellipses(network, args.frames)
    if "confidence" in args.only:
        confidence(network, args.frames)
    if "int8" in args.only:
        int8(args.model, args.frames, args.runs)
    if "files" in args.only:
        files(args.model, args.frames)


if __name__ == "__main__":
    main()
