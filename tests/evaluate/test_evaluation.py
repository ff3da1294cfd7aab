"""Evaluation: scores match the masks, torch and ONNX agree, and all files are written."""

import base64
import csv
import json
import re
import subprocess
import sys
from dataclasses import dataclass, replace

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pupilseg.errors import CheckpointError, DataError, UsageError
from pupilseg.evaluate.confidence import calibrate, confidence_and_error, frames_with_output
from pupilseg.evaluate.evaluation import COLUMNS, choose_examples, evaluate_model
from pupilseg.evaluate.plots import loss_curves, read_history, share_within, training_curves
from pupilseg.evaluate.scoring import FrameScores, score_frames, summarize
from pupilseg.export.onnx import export_onnx
from pupilseg.geometry import HEIGHT, NORMALIZED, WIDTH, ellipse_from_mask, ellipse_vector
from pupilseg.model_files.calibration import Calibration
from pupilseg.model_files.card import ModelCard
from pupilseg.model_files.checkpoint import plain_state_dict, save_model
from pupilseg.model_files.onnx import OnnxNetwork
from pupilseg.models import create_model
from pupilseg.predict.predictor import Predictor
from pupilseg.shards import open_shards, write_shards
from pupilseg.sources import Sample
from pupilseg.train.metrics import EpochMetrics, scores
from tests.helpers.fakes import FakeDataset, random_label
from tests.helpers.onnx_files import ellipse_onnx, threshold_onnx
from tests.helpers.paths import ROOT

CARD = ModelCard(
    model="efficientvit_tiny",
    preprocessing="none",
    data="fake",
    license="MIT",
    metrics={"valid_iou": 0.5},
)
BLINKS = (2, 5)


@dataclass
class DarkPupils(FakeDataset):
    """Dark pupils (about 20 on 120); every third frame also has a dark corner that is not a pupil.

    Attributes:
        only_blinks: no frame has a pupil.
    """

    only_blinks: bool = False

    def sample(self, split, index):
        rng = np.random.default_rng([7, index])
        label = random_label(rng, blink_share=0)
        if index in BLINKS or self.only_blinks:
            label[:] = 0
        dark = label != 0
        if index % 3 == 0 or index == BLINKS[1]:
            dark[: 10 + index, : 30 + index] = True
        # Noise, because on a uniform background all margins are equal and rounding would decide.
        noise = rng.integers(-20, 21, label.shape)
        image = (np.where(dark, 20, 120) + noise).astype(np.uint8)
        return Sample(f"<{split}>/{index}", image, label)


def expected_pair(index):
    sample = DarkPupils().sample("validation", index)
    return sample.label != 0, sample.image < 60


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    directory = tmp_path_factory.mktemp("shards")
    write_shards(DarkPupils(validation=21), "validation", directory, rows_per_shard=8)
    return directory


@pytest.fixture(scope="module")
def threshold(tmp_path_factory):
    return threshold_onnx(tmp_path_factory.mktemp("model") / "t.onnx")


@pytest.fixture(scope="module")
def done(shards, threshold, tmp_path_factory):
    """The output directory and metrics of one evaluation, shared by several tests."""
    out = tmp_path_factory.mktemp("report")
    history = out / "history.csv"
    history.write_text("epoch,train_loss,valid_loss,valid_center_px\n1,2.5,2.0,\n2,1.5,1.0,3.5\n")
    return out, evaluate_model(threshold, shards, out, batch_size=4, history=history)


def read_rows(path):
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def test_scores_are_those_of_training():
    """They equal the scores that `train.metrics` computes with torch, batch by batch."""
    rng = np.random.default_rng(5)
    labels = np.stack([random_label(rng, blink_share=0.3) for _ in range(12)])
    masks = np.stack([random_label(rng, blink_share=0.3) for _ in range(12)])
    masks[:4] = np.roll(labels[:4], 7, axis=2)
    metrics = EpochMetrics((), torch.device("cpu"))
    vectors = np.stack([ellipse_vector(label) for label in labels])
    metrics.update(
        {}, torch.from_numpy(masks != 0), torch.from_numpy(labels), torch.from_numpy(vectors)
    )
    wanted = scores(metrics.names, metrics.sums.tolist(), "valid")
    found = summarize(score_frames([str(i) for i in range(12)], zip(labels, masks, strict=True)))
    assert found["miou"] == pytest.approx(wanted["valid_iou"], abs=1e-12)
    assert found["pupil_iou"] == pytest.approx(wanted["valid_pupil_iou"], abs=1e-12)
    assert found["center_error_px_mean"] == pytest.approx(wanted["valid_center_px"], abs=1e-3)
    assert found["found_share"] == pytest.approx(wanted["valid_found"], abs=1e-12)


def test_scores_of_squares():
    square, shifted, nothing = (np.zeros((HEIGHT, WIDTH), bool) for _ in range(3))
    square[100:120, 100:120] = True
    shifted[103:123, 104:124] = True
    pairs = [
        (square, square),
        (square, shifted),
        (square, nothing),
        (nothing, nothing),
        (nothing, square),
    ]
    found = score_frames(list("abcde"), pairs)
    overlap = 17 * 16 / (800 - 17 * 16)
    assert found.pupil_iou == pytest.approx([1, overlap, 0, 1, 0])
    assert found.center_error_px == pytest.approx([0, 5, *[np.nan] * 3], nan_ok=True)
    assert found.found.tolist() == [True, True, False, False, False]
    total = summarize(found)
    assert (total["frames"], total["blinks"], total["blink_false_positives"]) == (5, 2, 1)
    assert total["pupil_iou_mean"] == pytest.approx((1 + overlap) / 3)
    assert total["within_5px_share"] == pytest.approx(2 / 3)  # an error of exactly 5 px counts
    assert total["found_share"] == pytest.approx(2 / 3)
    assert total["center_error_px_p95"] == pytest.approx(4.75)


def test_radius_errors():
    """A run of w pixels has the second moment (w^2 - 1) / 12, and a semi-axis of twice its root."""
    wide, tall = (np.zeros((HEIGHT, WIDTH), bool) for _ in range(2))
    wide[200:220, 300:340] = True
    tall[190:240, 310:330] = True

    def semi_axis(width):
        return 2 * np.sqrt((width**2 - 1) / 12)

    found = score_frames(
        list("abcd"), [(wide, tall), (wide, wide), (wide, ~wide & wide), (tall * 0, tall)]
    )
    along_x, along_y = semi_axis(40) - semi_axis(20), semi_axis(50) - semi_axis(20)
    expected = [(along_x + along_y) / 2, 0, np.nan, np.nan]
    assert found.radius_error_px == pytest.approx(expected, abs=1e-4, nan_ok=True)
    total = summarize(found)
    assert total["radius_error_px_mean"] == pytest.approx(expected[0] / 2, abs=1e-4)
    assert total["radius_error_px_median"] == pytest.approx(expected[0] / 2, abs=1e-4)
    assert total["radius_error_px_p95"] == pytest.approx(0.95 * expected[0], abs=1e-4)


def test_rows_and_metrics_describe_the_raw_mask(done):
    out, metrics = done
    rows = read_rows(out / "per_frame.csv")
    assert tuple(rows[0]) == COLUMNS
    assert [row["name"] for row in rows] == [f"<validation>/{i}" for i in range(21)]
    for index, row in enumerate(rows):
        truth, mask = expected_pair(index)
        union = np.logical_or(truth, mask).sum()
        iou = np.logical_and(truth, mask).sum() / union if union else 1.0
        assert float(row["pupil_iou"]) == pytest.approx(iou, rel=1e-5)
        assert int(row["area_px"]) == truth.sum()
        assert int(row["predicted_area_px"]) == mask.sum()  # includes the dark corner
        assert row["is_blink"] == str(int(index in BLINKS))
        assert row["found"] == str(int(bool(truth.any() and mask.any())))
        if row["found"] == "1":
            centers = [ellipse_from_mask(m)[:2] for m in (truth, mask)]
            error = np.hypot(*np.subtract(*centers))
            assert float(row["center_error_px"]) == pytest.approx(error, rel=1e-5)
        else:
            assert row["center_error_px"] == ""
    pairs = [expected_pair(i) for i in range(21)]
    wanted = summarize(score_frames([""] * 21, pairs))
    assert {k: metrics[k] for k in wanted} == wanted
    assert (metrics["blinks"], metrics["blink_false_positives"]) == (2, 1)
    assert metrics["data"] == "fake"
    assert json.loads((out / "metrics.json").read_text()) == metrics


def test_confidence_equals_that_of_predictor(done, shards, threshold, tmp_path):
    """It uses the calibration in the file, or one fitted on the other half of the frames."""
    out, metrics = done
    assert metrics["calibrated_on"] == ""
    assert 0 <= metrics["calibration_error"] < 0.3
    assert "each half with a fit on the other half" in (out / "report.html").read_text()
    calibration = Calibration(2.0, 1.0, 40, "<there>")
    model = threshold_onnx(tmp_path / "c.onnx", calibration=calibration.to_json())
    metrics = evaluate_model(model, shards, tmp_path / "out")
    assert metrics["calibrated_on"] == "<there>"
    page = (tmp_path / "out" / "report.html").read_text()
    assert re.search(r"calibrated on\s+&lt;there&gt;\.", page)
    predictor = Predictor(model)
    said = [float(row["confidence"]) for row in read_rows(tmp_path / "out" / "per_frame.csv")]
    frames = [DarkPupils().sample("validation", i) for i in range(21)]
    found = [predictor(frame.image) for frame in frames]
    assert said == pytest.approx([f.confidence for f in found], rel=1e-4)
    assert 0 < sum(f.ellipse is None for f in found) < 21
    raw = [f.confidence for f in map(Predictor(threshold), [f.image for f in frames])]
    with open_shards(shards) as split:
        network = OnnxNetwork(threshold)
        outputs = frames_with_output(split, network, range(21), 4, "test")
        measured = [confidence_and_error(*frame) for frame in outputs]
    for frame, pupil, score, (seen, distance) in zip(frames, found, raw, measured, strict=True):
        if pupil.ellipse is None:
            assert np.isnan([seen, distance]).all()
            continue
        assert seen == score
        truth = ellipse_from_mask(frame.label)
        wanted = np.inf if truth is None else np.hypot(*np.subtract(truth[:2], pupil.ellipse[:2]))
        assert distance == pytest.approx(wanted)


def test_calibration_is_stored_at_export(both_forms, shards, threshold, tmp_path):
    stored = OnnxNetwork(both_forms / "m.onnx").info.calibration
    assert stored == calibrate(OnnxNetwork(both_forms / "m.onnx"), "m", shards)
    assert stored.data == "fake, validation"
    fitted = calibrate(OnnxNetwork(threshold), "t", shards)
    assert 10 < fitted.frames <= 21
    save_model(
        tmp_path / "g.pt",
        plain_state_dict(create_model("efficientvit_tiny")),
        replace(CARD, preprocessing="gamma0.8+clahe1.5"),
    )
    with pytest.raises(UsageError, match="pass shards that"):
        export_onnx(tmp_path / "g.pt", tmp_path / "d.onnx", calibrate_on=shards)
    with pytest.raises(DataError, match="has no manifest"):
        export_onnx(both_forms / "m.pt", tmp_path / "d.onnx", calibrate_on=tmp_path)
    assert not (tmp_path / "d.onnx").exists()


def test_curves(done):
    out, metrics = done
    iou = [float(row["pupil_iou"]) for row in read_rows(out / "iou_curve.csv")]
    assert iou == sorted(iou)
    assert iou[50] == pytest.approx(metrics["pupil_iou_median"], rel=1e-5)
    center = read_rows(out / "center_curve.csv")
    share = {float(row["center_error_px"]): float(row["share"]) for row in center}
    assert list(share.values()) == sorted(share.values())
    assert share[5.0] == pytest.approx(metrics["within_5px_share"], rel=1e-5)
    errors = np.array([1.0, np.nan, 3.0, 3.0])
    assert share_within(errors, np.array([0.5, 1, 3, 99])).tolist() == [0, 0.25, 0.75, 0.75]


def test_report_is_self_contained_and_escaped(done):
    out, metrics = done
    page = (out / "report.html").read_text()
    sources = re.findall(r'src="([^"]*)"', page)
    pictures = [s for s in sources if s.startswith("data:image/")]
    assert len(pictures) == len(sources) == 4 + 6 + 6 + 6 + 2
    assert not re.search(r"https?:|<script|<link|url\(", page)
    assert "default-src &#39;none&#39;" in page
    assert f"{metrics['pupil_iou']:.4f}" in page
    assert "&lt;validation&gt;/5" in page
    assert "<validation>" not in page
    assert re.search(r"no pupil, but \d+ px predicted", page)
    assert 'alt="training curves by epoch"' in page
    assert "&amp;lt;" not in page  # escaped once
    for source in pictures:
        kind, data = source.split(";base64,")
        image = cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR)
        assert image.shape[2] == 3
        if kind.endswith("jpeg"):
            assert image.shape == (2 * HEIGHT, 2 * WIDTH, 3)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 100)), min_size=1, max_size=40))
def test_examples_are_distinct_and_in_order(frames):
    area = np.array([100 * is_open for is_open, _ in frames])
    inter = np.array([overlap * is_open for is_open, overlap in frames])
    predicted = np.array([overlap for _, overlap in frames])
    found = FrameScores(
        [""] * len(frames), area, predicted, inter, *np.full((2, len(frames)), np.nan)
    )
    worst, median, best, blinks = choose_examples(found).values()
    shown = [*worst, *median, *best, *blinks]
    assert len(shown) == len(set(shown))
    eyes = int((area > 0).sum())
    assert len(worst) + len(median) + len(best) == min(18, eyes)
    assert len(blinks) == min(6, len(frames) - eyes)
    iou = found.pupil_iou
    ordered = [iou[i] for i in [*worst, *median, *best[::-1]]]
    assert ordered == sorted(ordered)
    if eyes:
        low, high = min(iou[area > 0]), max(iou[area > 0])
        assert iou[worst[0]] == low
        assert eyes <= 6 or iou[best[0]] == high


@pytest.fixture(scope="module")
def both_forms(tmp_path_factory, shards):
    """An untrained network as .pt and .onnx, biased to predict half of each frame as pupil."""
    directory = tmp_path_factory.mktemp("forms")
    torch.manual_seed(3)
    model = create_model("efficientvit_tiny").eval()
    image = torch.from_numpy(NORMALIZED[DarkPupils().sample("validation", 0).image])[None, None]

    @torch.no_grad()
    def median_margin():
        logits = model(image)
        return (logits[:, 1] - logits[:, 0]).median()

    before = median_margin()
    model.head.upsample.bias.data += 1
    model.head.upsample.bias.data -= 1 + before / (median_margin() - before)
    assert abs(median_margin()) < 1e-3
    save_model(directory / "m.pt", plain_state_dict(model), CARD)
    export_onnx(directory / "m.pt", directory / "m.onnx", calibrate_on=shards)
    return directory


def test_pt_and_onnx_have_the_same_scores(both_forms, shards, tmp_path):
    found = {}
    for form in ("pt", "onnx"):
        found[form] = evaluate_model(both_forms / f"m.{form}", shards, tmp_path / form)
    rows = [read_rows(tmp_path / form / "per_frame.csv") for form in found]
    a, b = (np.array([int(row["predicted_area_px"]) for row in part]) for part in rows)
    assert 0.3 < a[0] / (HEIGHT * WIDTH) < 0.7  # otherwise the comparison proves little
    # Logits differ by rounding, which may change one pixel in 10,000.
    assert np.abs(a - b).max() <= 25
    numbers = [{k: v for k, v in f.items() if isinstance(v, float)} for f in found.values()]
    assert numbers[0] == pytest.approx(numbers[1], abs=0.02, rel=1e-3, nan_ok=True)
    assert numbers[0]["miou"] == pytest.approx(numbers[1]["miou"], abs=1e-4)


def test_ellipse_models_are_scored_by_the_drawn_ellipse(shards, tmp_path):
    label = expected_pair(1)[0]
    model = ellipse_onnx(tmp_path / "e.onnx", ellipse_vector(label))
    metrics = evaluate_model(model, shards, tmp_path / "out")
    rows = read_rows(tmp_path / "out" / "per_frame.csv")
    upright = ellipse_from_mask(label)
    assert metrics["model"] == "ellipse"
    assert float(rows[1]["center_error_px"]) < 0.5
    assert int(rows[1]["predicted_area_px"]) == pytest.approx(label.sum(), rel=0.5), upright
    assert metrics["blink_false_positives"] == 2
    torch.manual_seed(0)
    card = replace(CARD, model="ellipse")
    save_model(tmp_path / "e.pt", plain_state_dict(create_model("ellipse")), card)
    assert evaluate_model(tmp_path / "e.pt", shards, tmp_path / "pt")["frames"] == 21


def test_only_blinks(threshold, tmp_path):
    write_shards(DarkPupils(validation=2, only_blinks=True), "validation", tmp_path / "s")
    metrics = evaluate_model(threshold, tmp_path / "s", tmp_path / "out")
    text = (tmp_path / "out" / "metrics.json").read_text()
    stored = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert stored["center_error_px_mean"] is None
    assert np.isnan(metrics["center_error_px_mean"])
    assert (stored["frames"], stored["blinks"], stored["blink_false_positives"]) == (2, 2, 1)
    assert (tmp_path / "out" / "iou_curve.csv").read_text() == "quantile,pupil_iou\n"
    assert "none" in (tmp_path / "out" / "report.html").read_text()


def test_other_preprocessing_is_refused(shards, tmp_path):
    model = threshold_onnx(tmp_path / "g.onnx", preprocessing="gamma0.8+clahe1.5")
    with pytest.raises(UsageError, match=r"'gamma0.8\+clahe1.5', but those in .* have 'none'"):
        evaluate_model(model, shards, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_invalid_requests(shards, threshold, tmp_path):
    cases = [
        (
            {"model": tmp_path / "m.bin"},
            UsageError,
            r"suffix '.bin', expected .pt, .safetensors or .onnx",
        ),
        ({"model": tmp_path / "m.pt"}, CheckpointError, "m.pt"),
        ({"device": "cuda:9"}, UsageError, "omit --device"),
        ({"batch_size": 0}, UsageError, "batch size is 0"),
        ({"shards_dir": tmp_path}, DataError, "has no manifest.json"),
        ({"history": tmp_path / "h.csv"}, DataError, r"the history .*h\.csv does not exist"),
    ]
    for change, error, message in cases:
        arguments = {"model": threshold, "shards_dir": shards, "out": tmp_path / "out"} | change
        with pytest.raises(error, match=message):
            evaluate_model(**arguments)
    save_model(tmp_path / "m.pt", {}, ModelCard(model="efficientvit_tiny"))
    with pytest.raises(CheckpointError):
        evaluate_model(tmp_path / "m.pt", shards, tmp_path / "out")
    weights = plain_state_dict(create_model("ellipse"))
    save_model(tmp_path / "m.pt", weights, ModelCard(model="ellipse"))
    with pytest.raises(CheckpointError, match="does not record the preprocessing"):
        evaluate_model(tmp_path / "m.pt", shards, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_history(tmp_path):
    path = tmp_path / "h.csv"
    path.write_text("epoch,train_loss,valid_loss\n1,0.5,\n2,0.25,0.75\n")
    history = read_history(path)
    assert history["train_loss"] == [0.5, 0.25]
    picture = cv2.imdecode(np.frombuffer(training_curves(history), np.uint8), cv2.IMREAD_COLOR)
    assert picture.size
    assert training_curves(history) == training_curves(history)
    for text in ("", "epoch\n", "epoch,a\n1\n", "epoch\nx\n", "a,b\n1,2\n", "epoch\n1,2\n"):
        path.write_text(text)
        with pytest.raises(DataError, match=re.escape(str(path))):
            read_history(path)
    path.write_bytes(b"\x00\xff\x00")
    with pytest.raises(DataError):
        read_history(path)


def test_each_term_of_the_loss_has_a_panel():
    columns = ("train_loss", "valid_loss", "train_ce_loss", "valid_ce_loss", "train_iou")
    history = {"epoch": [1.0, 2.0], **{name: [1.0, 0.5] for name in columns}}
    for terms in (2, 3):
        png = loss_curves(history)
        assert int.from_bytes(png[16:20]) == pytest.approx(462 * terms, abs=1)  # 4.2 in, 110 dpi
        history |= {"train_heat_loss": [3.0, 2.0], "valid_heat_loss": [np.nan, np.nan]}


def test_onnx_needs_no_torch(shards, threshold, tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path\n"
        "from pupilseg.evaluate.evaluation import evaluate_model\n"
        f"m = evaluate_model(Path({str(threshold)!r}), Path({str(shards)!r}), "
        f"Path({str(tmp_path)!r}))\n"
        "print(m['frames'])\n"
        "try: evaluate_model(Path('m.pt'), Path(" + repr(str(shards)) + "), Path('o'))\n"
        "except Exception as error: print(error)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.stdout.splitlines()[0] == "21", ran.stderr
    assert "pip install 'pupilseg[train]'" in ran.stdout


@pytest.mark.integration
def test_program(shards, threshold, tmp_path):
    command = [sys.executable, "-m", "pipeline.evaluate", "--model", str(threshold)]
    command += ["--shards", str(shards), "--out", str(tmp_path / "out")]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "efficientvit_tiny on 21 frames: pupil IoU 0." in ran.stdout
    assert "1 of 2 blinks have a false pupil" in ran.stdout
    assert str(tmp_path / "out" / "report.html") in ran.stdout
    command[4] = str(tmp_path / "gone.onnx")
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert re.match(r"error: the model file .*gone\.onnx does not exist", ran.stderr)
