"""view.html: its content, and its behavior in a real browser."""

import base64
import json
import re

import cv2
import numpy as np
import pytest

from pupilseg.errors import DataError
from pupilseg.predict.predictor import Predictor
from pupilseg.predict.runner import Options, predict_paths
from pupilseg.predict.view import choose_rows, write_view
from tests.helpers.browser import PATH, Browser
from tests.helpers.frames import PUPIL, eye, write_video
from tests.helpers.onnx_files import threshold_onnx


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Results for two images and a 12-frame video; frame 4 has low confidence, 11 is a blink."""
    folder = tmp_path_factory.mktemp("view")
    frames = [eye(PUPIL._replace(center_x_px=200 + 10 * i)) for i in range(12)]
    frames[4][:80, 300:500] = 20  # a dark bar next to the pupil
    frames[11][:] = 120
    write_video(folder / "v.avi", frames, fps=10)
    (folder / "in" / "x<").mkdir(parents=True)
    # Unescaped, this path would end the page's data block.
    for name, frame in (("x</script><b>.png", frames[0]), ("y.png", eye(shape=(900, 1440)))):
        (folder / "in" / name).write_bytes(cv2.imencode(".png", frame)[1].tobytes())
    predictor = Predictor(threshold_onnx(folder / "t.onnx", 70))
    done = predict_paths(
        predictor,
        [str(folder / "v.avi"), str(folder / "in")],
        folder / "out",
        Options(mm_per_px=0.1),
    )
    assert (done.frames, done.blinks, done.failed) == (14, 1, [])
    return folder / "out"


def data_of(page):
    text = page.read_text(encoding="utf-8")
    (inside,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', text)
    return json.loads(inside), text


def test_page_is_self_contained(out):
    data, text = data_of(write_view(out))
    assert len(data["rows"]) == len(data["pictures"]) == 14
    assert data["columns"][-1] == "diameter_mm"
    assert data["title"] == "14 frames, 1 without a pupil"
    assert sorted(data["sources"].values()) == [1, 1, 12]
    assert not re.search(r'https?://|src="(?!data:)|<link|@import|url\(', text)
    assert len(text) < 2_000_000
    # Each row has the image of its frame: the red cross is at the center stored in the row.
    for number in (0, 4, 9):
        encoded = base64.b64decode(data["pictures"][str(number)].split(",")[1])
        picture = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR).astype(int)
        columns = np.nonzero(picture[:, :, 2] - picture[:, :, 1] > 60)[1]
        row = dict(zip(data["columns"], data["rows"][number], strict=True))
        assert (columns.min() + columns.max()) / 2 == pytest.approx(row["center_x_px"], abs=3)


def test_number_of_pictures_is_limited(out):
    data, _ = data_of(write_view(out, pictures=3))
    assert len(data["pictures"]) == 3
    assert "4" in data["pictures"]  # the one with the low confidence
    assert "contains the images of 3 frames: low-confidence and" in data["about"]
    assert len(data["rows"]) == 14


def test_size_of_pictures_is_limited(out, monkeypatch):
    whole, _ = data_of(write_view(out))
    sizes = {n: len(p) for n, p in whole["pictures"].items()}
    monkeypatch.setattr("pupilseg.predict.view.MAX_BYTES", sum(sizes.values()) // 3)
    data, _ = data_of(write_view(out))
    assert "4" in data["pictures"]
    assert 2 <= len(data["pictures"]) <= 7


def test_choice_of_rows():
    doubt = [0.9] * 1000
    doubt[123], doubt[456] = 0.1, 0.2
    chosen = choose_rows(doubt, 40)
    assert chosen[0] == 123
    assert len(chosen) == len(set(chosen)) == 40
    assert 456 in chosen
    others = sorted(set(chosen) - {123, 456})
    assert others[-1] > 900
    assert sorted(choose_rows(doubt[:3], 40)) == [0, 1, 2]
    assert choose_rows([], 5) == []
    assert choose_rows([1.0], 5) == [0]


def test_a_run_without_overlays_or_frames(tmp_path, out):
    predictor = Predictor(threshold_onnx(tmp_path / "t.onnx", 70))
    cv2.imwrite(str(tmp_path / "a.png"), eye())
    predict_paths(predictor, [str(tmp_path / "a.png")], tmp_path / "o", Options(overlays=False))
    data, _ = data_of(write_view(tmp_path / "o"))
    assert not data["pictures"]
    assert "without --no-overlays" in data["why_none"]
    predict_paths(predictor, [str(tmp_path / "gone.png")], tmp_path / "p")
    data, _ = data_of(write_view(tmp_path / "p"))
    assert data["rows"] == []


def test_directories_without_results(tmp_path):
    with pytest.raises(DataError, match=r"pupil.csv does not exist; pass the --out"):
        write_view(tmp_path)
    for text in ("", "a,b\n", "\x00"):
        (tmp_path / "pupil.csv").write_text(text)
        with pytest.raises(DataError, match=r"pupil\.csv"):
            write_view(tmp_path)
    header = "file,frame,time_s,center_x_px,center_y_px,semi_axis_a_px,semi_axis_b_px,angle_rad,"
    header += "diameter_px,area_px,confidence,is_blink\n"
    for row in ("a.png,0\n", "a.png,x,,,,,,,,0,0,1\n", "\n"):
        (tmp_path / "pupil.csv").write_text(header + row)
        with pytest.raises(DataError, match="cannot be read"):
            write_view(tmp_path)
    assert not (tmp_path / "view.html").exists()


@pytest.mark.integration
@pytest.mark.skipif(PATH is None, reason="no chromium or chrome on this machine")
def test_in_a_browser(out, tmp_path):
    """Keys, buttons, slider, list, curves and source menu work, and no request is made."""
    page = write_view(out)
    data, _ = data_of(page)
    with Browser(tmp_path / "profile") as browser:
        browser.open(page.resolve().as_uri())

        def shown():
            facts = browser.value(
                "Object.fromEntries([...document.querySelectorAll('#facts div')]"
                ".map(d => [d.children[0].textContent, d.children[1].textContent]))"
            )
            picture = browser.value("document.querySelector('#frame img')?.src ?? null")
            return int(facts["frame"]), facts, picture

        # The page starts at the frame with the lowest confidence.
        number, facts, picture = shown()
        assert number == 4
        assert facts["file"].endswith("v.avi")
        assert picture == data["pictures"]["4"]
        browser.wait_for("document.querySelector('#frame img').naturalWidth === 640")
        browser.press("ArrowRight")
        assert shown()[0] == 5
        assert shown()[2] == data["pictures"]["5"]
        browser.press("ArrowLeft")
        browser.press("ArrowLeft")
        assert shown()[0] == 3
        browser.press("End")
        assert shown()[1]["file"].endswith("/y.png")
        browser.press("Home")
        assert shown()[0] == 0
        browser.press("ArrowRight", modifiers=8)  # shift
        assert shown()[0] == 10
        browser.click("#on")
        assert shown()[0] == 11
        assert shown()[1]["is_blink"] == "1"
        assert shown()[1]["diameter_px"] == "-"
        browser.click("#back")
        assert shown()[0] == 10
        # The list is sorted by confidence; n, p and clicks select from it.
        listed = browser.value(
            "[...document.querySelectorAll('#doubtful b')].map(b => Number(b.textContent))"
        )
        assert len(listed) == 13
        assert listed == sorted(listed)
        browser.press("n")
        browser.press("p")
        browser.click("#doubtful li:nth-child(1) button")
        assert shown()[0] == 4
        browser.press("n")
        second = browser.value("Number(document.querySelector('#doubtful .now').dataset.row)")
        assert second == browser.value(
            "Number(document.querySelector('#doubtful li:nth-child(2)').dataset.row)"
        )
        browser.press("p")
        assert shown()[0] == 4
        # The curves of one source have a time axis; a click selects the frame at that time.
        assert browser.value("document.querySelectorAll('#source option').length") == 2
        browser.value(
            "(s => (s.selectedIndex = 1, s.dispatchEvent(new Event('change'))))"
            "(document.querySelector('#source'))"
        )
        assert browser.value("document.querySelector('#slider').max") == "11"
        browser.click("#curves canvas:nth-child(2)", share=0.995)
        assert shown()[0] == 11
        browser.click("#curves canvas:nth-child(1)", share=0.01)
        assert shown()[0] == 0
        blue = browser.value(
            "[...document.querySelectorAll('#curves canvas')].map(c => { const d = "
            "c.getContext('2d').getImageData(0, 0, c.width, c.height).data; let n = 0; "
            "for (let i = 0; i < d.length; i += 4) n += d[i + 2] > d[i] + 60; return n; })"
        )
        assert len(blue) == 4
        assert min(blue) > 100  # each curve is drawn
        browser.value(
            "(s => (s.value = 7, s.dispatchEvent(new Event('input'))))"
            "(document.querySelector('#slider'))"
        )
        assert shown()[0] == 7
        assert [u for u in browser.requests if not u.startswith(("file:", "data:", "about:"))] == []
        assert browser.complaints == []
