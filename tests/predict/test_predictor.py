"""Prediction: finds the pupil, in pixels of the original frame, for frames of all kinds."""

import contextlib
import itertools
import math
import subprocess
import sys
import threading

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from pupilseg.errors import CheckpointError, DataError, UsageError
from pupilseg.geometry import (
    HEIGHT,
    WIDTH,
    Ellipse,
    ellipse_from_mask,
    ellipse_mask,
    ellipse_vector,
)
from pupilseg.letterbox import Letterbox
from pupilseg.model_files.calibration import Calibration
from pupilseg.model_files.onnx import onnx_session
from pupilseg.pictures import GREEN, RED, compare, overlay, read_image
from pupilseg.predict.postprocess import draw_ellipse, find_blob
from pupilseg.predict.predictor import BATCH_SIZE, Predictor
from pupilseg.preprocess import get_preprocessing
from pupilseg.synthetic import render
from tests.helpers.frames import PUPIL, eye
from tests.helpers.onnx_files import METADATA, ellipse_onnx, threshold_onnx, write
from tests.helpers.paths import ROOT

WHOLE = Letterbox.of((HEIGHT, WIDTH))


def iou(a, b):
    return np.logical_and(a, b).sum() / np.logical_or(a, b).sum()


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    # 70 is the gray level of a pixel that is half pupil, half iris.
    return Predictor(threshold_onnx(tmp_path_factory.mktemp("model") / "t.onnx", 70))


def test_ellipse_is_found_to_a_tenth_of_a_pixel(predictor):
    frame = eye()
    mask, ellipse, confidence = predictor(frame)
    assert mask.dtype == np.uint8
    assert np.array_equal(mask, frame < 70)
    assert ellipse == pytest.approx(PUPIL, abs=0.1)
    assert 0.97 < confidence <= 1


@pytest.mark.parametrize(
    "shape", [(480, 640), (200, 320), (1200, 1920), (399, 641), (1500, 500), (37, 50)]
)
def test_results_are_in_pixels_of_frames_of_any_size(predictor, shape):
    unit = min(shape) / 400
    truth = Ellipse(0.44 * shape[1] + 0.3, 0.47 * shape[0], 110 * unit, 85 * unit, 0.4)
    frame = eye(truth, shape)
    mask, ellipse, _ = predictor(frame)
    assert mask.shape == shape
    # Size of a network pixel in the frame.
    pixel = max(1.0, 1 / min(HEIGHT / shape[0], WIDTH / shape[1]))
    # An offset of half a pixel in any step would give an error of pixel / 2 - 0.5 or more.
    assert ellipse[:4] == pytest.approx(truth[:4], abs=0.12 * pixel)
    assert ellipse.angle_rad == pytest.approx(truth.angle_rad, abs=0.02)
    assert iou(mask, draw_ellipse(truth, shape)) > 0.965


@settings(max_examples=200, deadline=None)
@given(
    st.tuples(st.integers(1, 4000), st.integers(1, 4000)),
    st.floats(20, 600),
    st.floats(20, 380),
    st.floats(1, 200),
    st.floats(0.05, 1),
    st.floats(-1.57, 1.57),
)
def test_ellipse_mapping_keeps_points_on_it(shape, x, y, a, aspect, angle):
    box = Letterbox.of(shape)
    found = box.ellipse_to_frame(Ellipse(x, y, a, a * aspect, angle))
    assert found.semi_axis_a_px >= found.semi_axis_b_px
    assert -math.pi / 2 < found.angle_rad <= math.pi / 2
    turn = np.linspace(0, 2 * np.pi, 9)
    cos, sin = math.cos(angle), math.sin(angle)
    along, across = a * np.cos(turn), a * aspect * np.sin(turn)
    network_x, network_y = x + along * cos - across * sin, y + along * sin + across * cos
    frame_x = (network_x - box.left + 0.5) / box.scale_x - 0.5 - found.center_x_px
    frame_y = (network_y - box.top + 0.5) / box.scale_y - 0.5 - found.center_y_px
    cos, sin = math.cos(found.angle_rad), math.sin(found.angle_rad)
    radius = np.hypot(
        (frame_x * cos + frame_y * sin) / found.semi_axis_a_px,
        (frame_y * cos - frame_x * sin) / found.semi_axis_b_px,
    )
    assert radius == pytest.approx(np.ones(9), abs=1e-6)


def test_batch_equals_single_calls(predictor):
    frames = [eye(PUPIL._replace(center_x_px=200 + 9 * i)) for i in range(BATCH_SIZE)]
    frames += [eye(shape=(480, 800)), np.full((HEIGHT, WIDTH), 120, np.uint8)]
    for one, frame in zip(predictor.batch(frames), frames, strict=True):
        alone = predictor(frame)
        assert np.array_equal(one.mask, alone.mask)
        assert one[1:] == alone[1:]
    assert predictor.batch([]) == []


@pytest.mark.parametrize("slots", [0, 1, 3])
def test_stream_equals_single_calls(predictor, slots):
    frames = [eye(PUPIL._replace(center_x_px=200 + 9 * i)) for i in range(5)]
    drawn = []

    def camera():
        for i in itertools.count():
            drawn.append(threading.current_thread() is threading.main_thread())
            yield frames[i % 5]

    with contextlib.closing(predictor.stream(camera(), slots=slots)) as stream:
        for frame, found in zip(frames, stream, strict=False):
            assert found[1:] == predictor(frame)[1:]
        assert len(drawn) <= 6 + slots + 1  # a bounded number of frames is read ahead
    assert set(drawn) == {slots == 0}
    if not slots:
        assert len(drawn) <= 6
    with pytest.raises(ValueError, match="cvtColor"):
        list(predictor.stream([frames[0], np.zeros((4, 4, 3), np.uint8)], slots=slots))


def test_calibration_of_the_file_is_applied(predictor, tmp_path):
    calibration = Calibration(1.0, 4.0, 98, "here")
    model = threshold_onnx(tmp_path / "c.onnx", 70, calibration=calibration.to_json())
    frame = draw(disc(330, 210, 40), border)
    raw, found = predictor(frame).confidence, Predictor(model)(frame).confidence
    assert found == calibration(raw)
    assert 0 < raw < found < 0.99  # the limit for a calibration on 98 frames
    assert Predictor(model)(draw()).confidence == 0


@pytest.mark.parametrize(("dx", "dy"), [(0.0, 0.0), (0.25, 0.5), (0.5, 0.75), (0.9, 0.1)])
def test_sub_pixel_border(tmp_path, dx, dy):
    """A small disk is measured more precisely than by the moments of its mask."""
    predictor = Predictor(threshold_onnx(tmp_path / "t.onnx", 70))
    errors, coarse = [], []
    for radius in (5.1, 5.35, 5.6, 5.85):
        truth = Ellipse(300 + dx, 200 + dy, radius, radius, 0.0)
        mask, ellipse, _ = predictor(eye(truth))
        for found, into in ((ellipse, errors), (ellipse_from_mask(mask), coarse)):
            into.append(np.abs(np.subtract(found[:4], truth[:4])).max())
    assert max(errors) < 0.06
    assert max(errors) < max(coarse) / 2


def test_preprocessing_of_the_file_is_applied(tmp_path):
    name = "gamma0.8+clahe1.5"
    frame = render(3).image  # pupil: 36 as captured, below 60 with preprocessing
    mask = get_preprocessing(name)(frame) < 60.5
    found = Predictor(threshold_onnx(tmp_path / "p.onnx", 60.5, preprocessing=name))
    plain = Predictor(threshold_onnx(tmp_path / "n.onnx", 60.5))
    assert np.array_equal(found(frame).mask, find_blob(mask, WHOLE).mask)
    assert not np.array_equal(found(frame).mask, plain(frame).mask)


def draw(*shapes):
    """Returns a frame of gray level 120 on which each function has drawn."""
    frame = np.full((HEIGHT, WIDTH), 120, np.uint8)
    for shape in shapes:
        shape(frame)
    return frame


def disc(x, y, r):
    return lambda frame: frame.__setitem__(ellipse_mask(Ellipse(x, y, r, r, 0)) != 0, 20)


def border(frame):
    frame[:70] = frame[:, :60] = 20


def corner(frame):
    rows, columns = np.indices(frame.shape)
    frame[rows + columns < 200] = 20


def far_corner(frame):
    corner(frame[::-1, ::-1])


def near_corners(frame):
    corner(frame[:, ::-1])
    corner(frame[::-1])


def ring(frame):
    frame[(draw(disc(320, 200, 150)) < 70) & (draw(disc(320, 200, 130)) > 70)] = 20


def slit(frame):
    frame[300:312, 100:500] = 20


@pytest.mark.parametrize(
    "distraction", [border, corner, far_corner, near_corners, ring, slit, disc(500, 300, 4)]
)
def test_only_a_plausible_blob_is_a_pupil(predictor, distraction):
    assert predictor(draw(distraction)).ellipse is None
    found = predictor(draw(distraction, disc(330, 210, 40)))
    assert found.ellipse[:4] == pytest.approx((330, 210, 40, 40), abs=0.1)
    assert np.array_equal(found.mask, draw(disc(330, 210, 40)) < 70)
    # Other pixels classified as pupil reduce the confidence.
    assert found.confidence < predictor(draw(disc(330, 210, 40))).confidence


def test_largest_plausible_blob_wins(predictor):
    found = predictor(draw(disc(200, 200, 30), disc(420, 220, 45)))
    assert found.ellipse[:2] == pytest.approx((420, 220), abs=0.1)


def test_letterbox_padding_is_ignored(tmp_path):
    # This network classifies the black padding above and below a wide frame as pupil.
    predictor = Predictor(threshold_onnx(tmp_path / "t.onnx", 70))
    found = predictor(eye(Ellipse(300, 60, 30, 30, 0), (120, 640)))
    assert found.ellipse[:4] == pytest.approx((300, 60, 30, 30), abs=0.2)
    assert found.confidence > 0.9


def test_closed_eyes_are_not_an_error(predictor):
    for shape in ((HEIGHT, WIDTH), (480, 640), (1, 1), (1, 5000)):
        mask, ellipse, confidence = predictor(np.full(shape, 120, np.uint8))
        assert (mask.shape, int(mask.sum()), ellipse, confidence) == (shape, 0, None, 0.0)


def test_labels_of_rendered_eyes_are_plausible():
    """`find_blob` rejects no real pupil, even if lids cover part of it."""
    for index in range(30):
        label = render(index, 11).classes == 3
        blob = find_blob(label, WHOLE)
        assert (blob is None) == (not label.any()), index
        if blob is not None:
            assert blob.fill > 0.9


def test_ellipse_network(tmp_path):
    truth = Ellipse(300.0, 180.0, 60.0, 40.0, math.pi / 2)
    predictor = Predictor(ellipse_onnx(tmp_path / "e.onnx", ellipse_vector(ellipse_mask(truth))))
    frame = eye(truth)
    mask, ellipse, confidence = predictor(frame)
    assert ellipse == pytest.approx(truth, abs=0.1)
    assert iou(mask, ellipse_mask(truth)) > 0.99
    assert confidence > 0.99
    rng = np.random.default_rng(0)
    assert predictor(rng.integers(0, 255, (HEIGHT, WIDTH), np.uint8)).confidence < 0.1
    large = predictor(np.repeat(np.repeat(frame, 3, 0), 3, 1))
    assert large.ellipse[:4] == pytest.approx((901, 541, 180, 120), abs=0.3)
    assert large.mask.shape == (1200, 1920)
    blink = Predictor(ellipse_onnx(tmp_path / "b.onnx", [0.5, 0.5, 0, 0]))(frame)
    assert (blink.ellipse, int(blink.mask.sum()), blink.confidence) == (None, 0, 0.0)


@settings(max_examples=50, deadline=None)
@given(
    st.floats(-50, 700),
    st.floats(-50, 450),
    st.floats(0.5, 300),
    st.floats(0.5, 300),
    st.floats(-1.5, 1.5),
)
def test_drawing_in_a_window(x, y, a, b, angle):
    # Rounding may differ at the border, because coordinates are relative to the window.
    ellipse = Ellipse(x, y, max(a, b), min(a, b), angle)
    shape = (HEIGHT, WIDTH)
    assert np.count_nonzero(draw_ellipse(ellipse, shape) != ellipse_mask(ellipse, shape)) <= 1


@pytest.mark.parametrize(
    ("frame", "hint"),
    [
        (np.zeros((HEIGHT, WIDTH), np.float32), "astype"),
        (np.zeros((HEIGHT, WIDTH), np.uint16), ">> 8"),
        (np.zeros((HEIGHT, WIDTH, 3), np.uint8), "cvtColor"),
        (np.zeros((0, 640), np.uint8), "at least one pixel"),
        (np.zeros((2, 2, 2, 2), np.uint8), "at least one pixel"),
    ],
)
def test_other_arrays_are_rejected(predictor, frame, hint):
    with pytest.raises(ValueError, match=r"expected uint8 \(H, W\); .*" + hint):
        predictor(frame)


def bad_files(directory):
    """Yields files that are not valid models, each with part of its error message."""
    good = threshold_onnx(directory / "good.onnx").read_bytes()

    def put(name, content):
        (directory / name).write_bytes(content)
        return directory / name

    (directory / "folder.onnx").mkdir()
    image = helper.make_node("Cast", ["image"], ["logits"], to=TensorProto.FLOAT)
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", 1, "h", "w"])
    yield directory / "missing.onnx", "does not exist"
    yield directory / "folder.onnx", "Is a directory"
    yield put("empty.onnx", b""), "is empty"
    yield put("text.onnx", b"not a network at all"), "not an ONNX model"
    for share in (0.2, 0.5, 0.9):
        yield put(f"cut{share}.onnx", good[: int(share * len(good))]), "export"
    yield put("model.pt", b"PK"), "is a checkpoint, expected ONNX"
    yield threshold_onnx(directory / "foreign.onnx", drop=METADATA), "metadata lack model, task"
    yield threshold_onnx(directory / "lacks.onnx", drop=["license"]), "metadata lack license"
    yield threshold_onnx(directory / "task.onnx", task="depth"), "task is 'depth'"
    yield threshold_onnx(directory / "pre.onnx", preprocessing="x"), "preprocessing is 'x'"
    yield threshold_onnx(directory / "json.onnx", metrics="{"), "cannot be read"
    for text in ("{}", "7", '{"slope": -1, "intercept": 0, "frames": 1, "data": ""}'):
        yield threshold_onnx(directory / f"cal{len(text)}.onnx", calibration=text), "calibration"
    yield (
        write(directory / "f.onnx", [image], output, {}, METADATA, TensorProto.FLOAT),
        r"tensor\(float\)",
    )


def test_bad_model_files(tmp_path):
    for path, message in bad_files(tmp_path):
        with pytest.raises(CheckpointError, match=message) as caught:
            Predictor(path)
        assert str(path) in str(caught.value)


def test_output_of_another_shape(tmp_path):
    node = helper.make_node("Cast", ["image"], ["logits"], to=TensorProto.FLOAT)
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", 1, "h", "w"])
    path = write(tmp_path / "m.onnx", [node], output, {}, METADATA)
    with pytest.raises(CheckpointError, match=r"shape \(1, 1, 400, 640\).*expected \(1, 2, 400"):
        Predictor(path)(eye())


def test_session_from_bytes_and_threads(tmp_path):
    encoded = threshold_onnx(tmp_path / "t.onnx").read_bytes()
    assert onnx_session(encoded, threads=2).get_inputs()[0].name == "image"
    with pytest.raises(CheckpointError, match="ONNX bytes is damaged"):
        onnx_session(encoded[:300])
    with pytest.raises(UsageError, match="threads is 0"):
        onnx_session(encoded, threads=0)


def test_info(tmp_path):
    info = Predictor(threshold_onnx(tmp_path / "t.onnx", parameters="1234")).info
    assert (info.model, info.parameters, info.metrics) == (
        "efficientvit_tiny",
        1234,
        {"valid_iou": 0.5},
    )


def test_runs_without_torch_and_imports_onnxruntime_lazily(tmp_path):
    model = threshold_onnx(tmp_path / "t.onnx")
    code = f"""
import sys
sys.modules["torch"] = None
import pupilseg.predict.predictor
assert "onnxruntime" not in sys.modules and "pyarrow" not in sys.modules
import numpy as np
print(pupilseg.predict.predictor.Predictor({str(model)!r})(np.zeros((40, 64), np.uint8)).confidence)
sys.modules["onnxruntime"] = None
try:
    pupilseg.predict.predictor.Predictor({str(model)!r})
except pupilseg.model_files.onnx.UsageError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("0.0\n")
    assert "pip install 'pupilseg[predict]'" in done.stdout


# --- images --------------------------------------------------------------------------------------


def test_images_of_every_kind_become_gray(tmp_path):
    gray = eye()
    color = cv2.cvtColor(gray, cv2.COLOR_GRAY2BGR)
    kinds = {
        "gray.png": gray,
        "color.png": color,
        "alpha.png": np.dstack([color, np.full_like(gray, 9)]),
        "deep.png": gray.astype(np.uint16) * 257,
        "gray.tif": gray,
    }
    for name, image in kinds.items():
        assert cv2.imwrite(str(tmp_path / name), image)
        found = read_image(tmp_path / name)
        assert found.dtype == np.uint8
        assert np.abs(found.astype(int) - gray).max() <= 1, name
    for name, content in {"empty.png": b"", "text.png": b"hello"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="not an image"):
            read_image(tmp_path / name)
    with pytest.raises(DataError, match="No such file"):
        read_image(tmp_path / "missing.png")


def test_pictures(predictor):
    frame = eye()
    found = predictor(frame)
    shown = overlay(frame, found)
    on_rim = shown[round(PUPIL.center_y_px), round(PUPIL.center_x_px)]
    assert on_rim[2] > 200 > on_rim[1]  # the cross at the center is red
    assert overlay(np.zeros((3000, 200), np.uint8), predictor(frame * 0 + 120)).shape == (
        1280,
        85,
        3,
    )
    truth = ellipse_mask(PUPIL._replace(center_x_px=400))
    picture = compare(frame, truth, found.mask)
    for color, mask in ((GREEN, truth), (RED, found.mask)):
        rows, columns = np.nonzero((picture == color).all(axis=2))
        assert (
            np.abs([columns.mean() / 2, rows.mean() / 2] - np.argwhere(mask).mean(0)[::-1]).max()
            < 3
        )
