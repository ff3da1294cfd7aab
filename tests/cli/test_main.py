"""The command `pupilseg`: output, exit codes, and no traceback for user errors."""

import csv
import logging
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import cv2
import numpy as np
import pytest

from pupilseg.cli.main import main
from pupilseg.model_files.calibration import Calibration
from pupilseg.model_files.checkpoint import load_tensors, read_card
from pupilseg.model_files.safetensors import write_safetensors
from pupilseg.shards import write_shards
from tests.helpers.checkpoints import model_file
from tests.helpers.fakes import FakeDataset
from tests.helpers.frames import write_video
from tests.helpers.onnx_files import threshold_onnx
from tests.helpers.paths import ROOT


@pytest.fixture(autouse=True)
def restored_logger():
    """Restores the package's logger, to which `main_program` adds a handler."""
    logger = logging.getLogger("pupilseg")
    before = logger.handlers[:], logger.propagate, logger.level
    logger.handlers = []
    threads = cv2.getNumThreads()
    yield
    logger.handlers, logger.propagate = before[:2]
    logger.setLevel(before[2])
    cv2.setNumThreads(threads)


@pytest.fixture
def model(tmp_path):
    return threshold_onnx(tmp_path / "m.onnx", parameters="7481")


@pytest.fixture
def image(tmp_path):
    frame = np.full((400, 640), 120, np.uint8)
    frame = cv2.circle(frame, (320, 200), 40, 20, -1)
    assert cv2.imwrite(str(tmp_path / "eye.png"), frame)
    return tmp_path / "eye.png"


def test_predict(model, image, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["predict", str(image), "--model", str(model), "--out", str(out), "--masks"]) == 0
    assert "1 frames, 0 without a pupil, 0 failed" in capsys.readouterr().out
    with (out / "pupil.csv").open(newline="") as handle:
        (row,) = csv.DictReader(handle)
    assert float(row["center_x_px"]) == pytest.approx(320, abs=0.1)
    assert (out / "overlays" / "eye.jpg").is_file()
    assert (out / "masks" / "eye.png").is_file()


def test_predict_reports_bad_files_and_continues(model, image, tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"no image")
    paths = [str(tmp_path / name) for name in ("bad.png", "eye.png", "gone.png")]
    out = tmp_path / "out"
    assert main(["predict", *paths, "--model", str(model), "--out", str(out)]) == 1
    output = capsys.readouterr()
    assert "1 frames, 0 without a pupil, 2 failed" in output.out
    assert "bad.png is damaged, or not an image" in output.err
    assert "gone.png does not exist" in output.err
    assert len((out / "pupil.csv").read_text().splitlines()) == 2
    assert not (out / "masks").exists()


def test_predict_and_view_a_video(model, tmp_path, capsys, monkeypatch):
    frames = [np.full((400, 640), 120, np.uint8) for _ in range(4)]
    for i in range(3):
        cv2.circle(frames[i], (300 + 20 * i, 200), 40, 20, -1)
    video = write_video(tmp_path / "v.avi", frames, fps=50)
    out = str(tmp_path / "out")
    words = ["predict", str(video), "--model", str(model), "--out", out, "--skip-existing"]
    words += ["--roi", "100,50,500,300", "--mm-per-px", "0.1"]
    assert main(words) == 0
    assert "4 frames, 1 without a pupil, 0 failed (" in capsys.readouterr().out
    with (tmp_path / "out" / "pupil.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [row["time_s"] for row in rows] == ["0.000000", "0.020000", "0.040000", "0.060000"]
    assert [float(row["center_x_px"]) for row in rows[:3]] == pytest.approx(
        [300, 320, 340], abs=0.3
    )
    assert float(rows[0]["diameter_mm"]) == pytest.approx(8, abs=0.1)
    assert main(words) == 0
    assert "0 frames, 0 without a pupil, 0 failed, 1 files skipped: " in capsys.readouterr().out
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    assert main(["view", out, "--no-open"]) == 0
    page = Path(capsys.readouterr().out.strip())
    assert page == tmp_path / "out" / "view.html"
    assert not opened
    assert main(["view", out]) == 0
    assert opened == [page.as_uri()]


def test_info_of_each_form(model, tmp_path, capsys):
    assert main(["info", str(model)]) == 0
    output = capsys.readouterr().out
    for part in ("efficientvit_tiny", "7,481", "uint8 (N, 1, 400, 640)", "none", "valid_iou: 0.5"):
        assert part in output
    assert "uncalibrated" in output
    fitted = Calibration(2.0, 1.0, 40, "eyes, validation").to_json()
    assert main(["info", str(threshold_onnx(tmp_path / "c.onnx", calibration=fitted))]) == 0
    assert "calibrated on 40 frames of eyes, validation" in capsys.readouterr().out
    model_file(
        tmp_path / "m.pt",
        preprocessing="gamma0.8+clahe1.5",
        license="MIT",
        metrics={"valid_iou": 0.25},
    )
    write_safetensors(
        tmp_path / "m.safetensors",
        load_tensors(tmp_path / "m.pt"),
        read_card(tmp_path / "m.pt"),
    )
    for name in ("m.pt", "m.safetensors"):
        assert main(["info", str(tmp_path / name)]) == 0
        output = capsys.readouterr().out
        for part in ("9,737", "gamma0.8+clahe1.5", "synthetic:9@1", "valid_iou: 0.25", "MIT"):
            assert part in output


def test_released_weights_are_found_by_name(model, image, tmp_path, monkeypatch, capsys):
    weights = tmp_path / "weights"
    weights.mkdir()
    monkeypatch.setattr("pupilseg.weights.WEIGHTS_DIR", weights)
    for name in ("efficientvit_tiny", "ellipse"):
        (weights / f"{name}.onnx").write_bytes(model.read_bytes())
    monkeypatch.chdir(tmp_path)
    for place in ("found", "found-2"):  # an existing directory is not overwritten
        assert main(["predict", str(image)]) == 0
        assert capsys.readouterr().out.strip().endswith(str(Path(place, "pupil.csv")))
    assert main(["predict", str(image), "--skip-existing"]) == 0
    assert "1 files skipped: found/pupil.csv" in capsys.readouterr().out
    assert main(["info", "ellipse"]) == 0
    assert f"{weights / 'ellipse.onnx'} (" in capsys.readouterr().out


def test_interrupted_run_prints_how_to_resume(model, image, tmp_path, monkeypatch, capsys):
    def interrupted(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pupilseg.predict.runner.predict_paths", interrupted)
    (tmp_path / "found").mkdir()  # from an earlier run
    assert main(["predict", str(image), "--model", str(model)]) == 130
    assert "; resume with --out found-2 --skip-existing\n" in capsys.readouterr().err


def test_bench(model, capsys):
    assert main(["bench", str(model), "--repeats", "5"]) == 0
    output = capsys.readouterr().out
    assert output.count("ms median") == output.count("ms p95") == 2
    assert "5 frames of 400 x 640" in output
    assert "machine" in output


def test_shards(tmp_path, capsys):
    write_shards(FakeDataset(), "train", tmp_path / "train")
    assert main(["shards", "info", str(tmp_path / "train")]) == 0
    assert "6 in 1 files" in capsys.readouterr().out
    assert main(["shards", "verify", str(tmp_path / "train")]) == 0
    assert "6 samples" in capsys.readouterr().out
    shard = next((tmp_path / "train").glob("*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert main(["shards", "verify", str(tmp_path / "train")]) == 1
    assert str(shard) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "COMMAND"),
        (["predict"], 2, "required"),
        (
            ["predict", "x.png", "--model", "gone.onnx", "--out", "o"],
            1,
            "error: the model file gone",
        ),
        (["predict", "x", "--model", "m", "--out", "o", "--threads", "0"], 2, "0 is less than 1"),
        (["predict", "x", "--out", "o"], 2, "error: this build has no released weights 'micro'"),
        (["predict", "x", "--out", "o", "--model", "mirco"], 2, "nor one of: micro, efficientvit"),
        (["predict", "x", "--out", "o", "--roi", "1,2,3"], 2, "error: --roi is '1,2,3', expected"),
        (["predict", "x", "--out", "o", "--mm-per-px", "0"], 2, "0 is not a finite number above 0"),
        (["predict", "x", "--out", "o", "--mm-per-px", "nan"], 2, "nan is not a finite number"),
        (["view", "gone"], 1, "error: gone/pupil.csv does not exist; pass the --out of a"),
        (["view", "gone", "--pictures", "0"], 2, "0 is less than 1"),
        (["bench"], 2, "error: this build has no released weights 'micro'"),
        (["info", "gone.onnx"], 1, "error: the model file gone.onnx does not exist; make one with"),
        (["info", "gone.pt"], 1, "error: gone.pt does not exist; train a model with"),
        (["info", "gone.zip"], 2, "error: gone.zip has the suffix '.zip'"),
        (["bench", "gone.onnx"], 1, "error: the model file gone.onnx does not exist"),
        (["shards", "info", "gone"], 1, "error: gone has no manifest.json"),
        (["upload-run", "gone"], 1, "error: gone does not exist; expected a directory"),
        (["upload-run", __file__], 1, "test_main.py is another kind of file; expected a directory"),
    ],
)
def test_mistakes(words, code, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pupilseg.weights.WEIGHTS_DIR", tmp_path)  # a build without weights
    assert main(words) == code
    output = capsys.readouterr().err
    assert message in output
    assert "Traceback" not in output
    assert not list(tmp_path.iterdir())


def test_nothing_to_upload(tmp_path, capsys):
    assert main(["upload-run", str(tmp_path)]) == 0
    assert f"{tmp_path}: nothing to send" in capsys.readouterr().out


def test_output_that_cannot_be_written(model, image, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    out = str(tmp_path / "file" / "out")
    assert main(["predict", str(image), "--model", str(model), "--out", out]) == 1
    assert capsys.readouterr().err.startswith("error: cannot write")


def test_entry_point():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, name = scripts["pupilseg"].split(":")
    assert getattr(import_module(module), name) is main
    ran = subprocess.run(
        [sys.executable, "-m", "pupilseg.cli.main", "--version"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.startswith("pupilseg 0.")
