"""`predict_paths`: one row per frame for all kinds of input, also after interruptions."""

import csv
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import cv2
import numpy as np
import pytest

from pupilseg.errors import DataError, LockedError, OutputError, PupilSegError, UsageError
from pupilseg.files import directory_lock
from pupilseg.geometry import HEIGHT, WIDTH
from pupilseg.pictures import read_image
from pupilseg.predict.inputs import find_sources
from pupilseg.predict.journal import COLUMNS, DATABASE_NAME, Journal, overlay_names
from pupilseg.predict.predictor import Predictor
from pupilseg.predict.roi import Roi
from pupilseg.predict.runner import Options, predict_paths
from pupilseg.predict.video import Video, VideoFile, pictures_at
from pupilseg.predict.view import write_view
from pupilseg.runtime.threads import THREAD_NAME
from tests.helpers.frames import PUPIL, eye, write_video
from tests.helpers.onnx_files import threshold_onnx
from tests.helpers.paths import ROOT
from tests.helpers.victim import Victim
from tests.helpers.waiting import eventually

BLINK = np.full((HEIGHT, WIDTH), 120, np.uint8)
RESUME = Options(skip_existing=True)


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    return Predictor(threshold_onnx(tmp_path_factory.mktemp("model") / "t.onnx", 70))


@pytest.fixture(scope="module")
def eyes():
    """Ten eyes, each further to the right, and a blink."""
    return [*(eye(PUPIL._replace(center_x_px=200 + 10 * i)) for i in range(10)), BLINK]


def read_rows(out):
    with (out / "pupil.csv").open(newline="") as handle:
        return list(csv.DictReader(handle))


def files_below(folder):
    """Returns name -> content of each file."""
    every = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in every.items()}


@pytest.fixture
def folder(tmp_path, eyes):
    """Ten eyes, a blink, an eye of another size, a damaged image and a text file."""
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for i, image in enumerate(eyes, start=1):
        cv2.imwrite(str(tmp_path / "in" / f"{i}.png"), image)
    cv2.imwrite(str(tmp_path / "in" / "deep" / "2.png"), eye(shape=(480, 640)))
    cv2.imwrite(str(tmp_path / "in" / "deep" / "2.bmp"), eye(shape=(480, 640)))
    (tmp_path / "in" / "12.png").write_bytes((tmp_path / "in" / "1.png").read_bytes()[:100])
    (tmp_path / "in" / "notes.txt").write_text("no image")
    return tmp_path


def test_folder_to_csv_overlays_and_masks(folder, predictor):
    out = folder / "out"
    paths = [str(folder / "in"), str(folder / "gone")]
    done = predict_paths(predictor, paths, out, Options(masks=True))
    assert (done.frames, done.blinks, len(done.failed)) == (13, 1, 2)
    assert any("12.png" in m for m in done.failed)
    assert any("gone does not exist" in m for m in done.failed)
    rows = read_rows(out)
    assert tuple(rows[0]) == COLUMNS
    names = [Path(row["file"]).relative_to(folder / "in").as_posix() for row in rows]
    assert names == [f"{i}.png" for i in range(1, 12)] + ["deep/2.bmp", "deep/2.png"]
    for i, row in enumerate(rows[:10]):
        assert (row["frame"], row["time_s"], row["is_blink"]) == ("0", "", "0")
        found = [float(row[c]) for c in COLUMNS[3:8]]
        assert found == pytest.approx(PUPIL._replace(center_x_px=200 + 10 * i), abs=0.1)
        assert float(row["diameter_px"]) == pytest.approx(2 * PUPIL.semi_axis_a_px, abs=0.2)
        area = math.pi * PUPIL.semi_axis_a_px * PUPIL.semi_axis_b_px
        assert float(row["area_px"]) == pytest.approx(area, rel=0.01)
        assert float(row["confidence"]) > 0.9
    assert [rows[10][c] for c in COLUMNS[3:]] == [*[""] * 6, "0", "0", "1"]
    stems = [*(str(i) for i in range(1, 12)), "deep/2", "deep/2_png"]
    assert set(files_below(out)) == {
        "pupil.csv",
        DATABASE_NAME,
        *(f"overlays/{s}.jpg" for s in stems),
        *(f"masks/{s}.png" for s in stems),
    }
    mask = read_image(out / "masks" / "3.png")
    assert np.array_equal(mask, predictor(read_image(folder / "in" / "3.png")).mask * 255)


@pytest.mark.parametrize(("name", "fourcc"), [("v.avi", "MJPG"), ("v.mp4", "mp4v")])
def test_video(name, fourcc, predictor, eyes, tmp_path):
    """Each frame has a row with its time, a frame in the overlay video, and a mask."""
    video = write_video(tmp_path / name, eyes, fps=12.5, fourcc=fourcc)
    out = tmp_path / "out"
    done = predict_paths(predictor, [str(video)], out, Options(masks=True))
    assert (done.frames, done.blinks, done.failed) == (11, 1, [])
    rows = read_rows(out)
    assert [row["frame"] for row in rows] == [str(i) for i in range(11)]
    assert [float(row["time_s"]) for row in rows] == pytest.approx(np.arange(11) / 12.5)
    for i, row in enumerate(rows[:10]):
        assert float(row["center_x_px"]) == pytest.approx(200 + 10 * i, abs=0.3)
        assert float(row["semi_axis_a_px"]) == pytest.approx(PUPIL.semi_axis_a_px, abs=0.5)
    assert rows[10]["is_blink"] == "1"
    drawn = dict(pictures_at(out / "overlays" / "v.mp4", set(range(99))))
    assert len(drawn) == 11
    for i in range(10):
        red = drawn[i][:, :, 2].astype(int) - drawn[i][:, :, 1]
        columns = np.nonzero(red > 60)[1]
        assert (columns.min() + columns.max()) / 2 == pytest.approx(200 + 10 * i, abs=3)
    masks = sorted((out / "masks" / "v").iterdir())
    assert [m.name for m in masks] == [f"{i:06d}.png" for i in range(11)]
    assert int((read_image(masks[4]) > 0).sum()) == int(rows[4]["area_px"])


def test_output_is_the_same_with_and_without_threads(folder, predictor, eyes):
    for name in ("a.avi", "b.avi"):
        write_video(folder / "in" / name, eyes)
    content = {}
    for threads in (True, False):
        out = folder / f"out{threads}"
        options = Options(threads=threads, masks=True)
        done = predict_paths(predictor, [str(folder / "in")], out, options)
        assert (done.frames, len(done.failed)) == (13 + 22, 1)
        content[threads] = files_below(out)
    assert content[True] == content[False]
    assert len(content[True]) == 2 + 2 * 13 + 2 + 22


def test_video_with_images_of_odd_and_different_sizes(tmp_path):
    """OpenCV alone drops the last row and column of odd sizes, and frames of another size."""
    video = VideoFile(tmp_path / "v.mp4", 25)
    for shape in ((241, 321), (241, 321), (100, 50), (242, 322)):
        video.write(np.full((*shape, 3), 200, np.uint8))
    video.finish()
    drawn = dict(pictures_at(tmp_path / "v.mp4", {0, 2, 3}))
    assert [drawn[i].shape for i in drawn] == [(242, 322, 3)] * 3
    assert min(picture.min() for picture in drawn.values()) > 190


def test_no_overlays(predictor, eyes, tmp_path):
    write_video(tmp_path / "v.avi", eyes[:3])
    predict_paths(predictor, [str(tmp_path / "v.avi")], tmp_path / "o", Options(overlays=False))
    assert not (tmp_path / "o" / "overlays").exists()
    assert len(read_rows(tmp_path / "o")) == 3


def test_region_and_millimeters(predictor, tmp_path):
    """Results are in pixels of the frame, and everything outside the region is ignored."""
    frame = eye(PUPIL)
    cv2.circle(frame, (560, 90), 70, 20, -1)  # a larger dark disk outside the region
    cv2.imwrite(str(tmp_path / "a.png"), frame)
    cv2.imwrite(str(tmp_path / "b.png"), frame[:300])
    cv2.imwrite(str(tmp_path / "c.png"), BLINK)
    paths = [str(tmp_path / f"{n}.png") for n in "abc"]
    options = Options(roi=Roi.parse("150,30,300,310"), mm_per_px=0.05, masks=True)
    done = predict_paths(predictor, paths, tmp_path / "out", options)
    (message,) = done.failed
    assert "b.png: --roi 150,30,300,310 extends beyond the frame, which is 640 wide" in message
    assert "300 high" in message
    found, blink = read_rows(tmp_path / "out")
    assert list(found) == [*COLUMNS, "diameter_mm"]
    assert [float(found[c]) for c in COLUMNS[3:8]] == pytest.approx(PUPIL, abs=0.1)
    assert float(found["diameter_mm"]) == pytest.approx(
        0.05 * float(found["diameter_px"]), abs=1e-4
    )
    assert blink["diameter_mm"] == ""
    mask = read_image(tmp_path / "out" / "masks" / "a.png") > 0
    assert mask.shape == (HEIGHT, WIDTH)
    wanted = eye(PUPIL) < 70
    assert (mask & wanted).sum() / (mask | wanted).sum() > 0.98


@pytest.mark.parametrize("text", ["", "1,2,3", "1,2,3,x", "0,0,0,5", "-1,0,5,5", "1,2,3,4,5"])
def test_invalid_regions(text):
    with pytest.raises(UsageError, match="expected x,y,w,h"):
        Roi.parse(text)


# --- resuming ------------------------------------------------------------------------------------


def test_finished_files_are_skipped_and_keep_their_rows(folder, predictor, eyes):
    source, out = folder / "in", folder / "out"
    write_video(source / "v.avi", eyes)
    whole = write_video(folder / "w.avi", eyes).read_bytes()
    (source / "w.avi").write_bytes(whole[: len(whole) // 2])
    first = predict_paths(predictor, [str(source)], out, RESUME)
    assert (first.skipped, len(first.failed)) == (0, 2)
    cut = first.frames - 13 - 11
    assert 3 <= cut <= 8
    before = read_rows(out)
    marks = {p: p.stat().st_mtime_ns for p in out.rglob("*.jpg")}
    again = predict_paths(predictor, [str(source)], out, RESUME)
    # The failed files are tried again, and their rows replaced.
    assert (again.frames, again.skipped, len(again.failed)) == (cut, 14, 2)
    assert read_rows(out) == before
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.jpg")} == marks
    # A changed file is predicted again, a new one added, and rows of others are kept.
    cv2.imwrite(str(source / "3.png"), BLINK)
    (source / "w.avi").write_bytes(whole)
    cv2.imwrite(str(folder / "3.png"), eyes[0])
    paths = [str(source / "3.png"), str(source / "w.avi"), str(folder / "3.png")]
    third = predict_paths(predictor, paths, out, RESUME)
    assert (third.frames, third.skipped, third.failed) == (13, 0, [])
    rows = read_rows(out)
    assert len(rows) == len(before) - cut + 11 + 1
    assert len({(row["file"], row["frame"]) for row in rows}) == len(rows)
    changed = [row for row in rows if row["file"] == str(source / "3.png")]
    assert [row["is_blink"] for row in changed] == ["1"]
    assert (out / "overlays" / "3_png.jpg").is_file()  # no overlay overwrites another


def test_resuming_with_other_settings_is_refused(folder, predictor, tmp_path):
    out = folder / "out"
    predict_paths(predictor, [str(folder / "in" / "1.png")], out, RESUME)
    before = files_below(out)
    other = Predictor(threshold_onnx(tmp_path / "other.onnx", 71))
    for model, options in (
        (other, RESUME),
        (predictor, Options(skip_existing=True, mm_per_px=0.1)),
        (predictor, Options(skip_existing=True, roi=Roi(0, 0, 9, 9))),
        (predictor, Options(skip_existing=True, masks=True)),
    ):
        with pytest.raises(UsageError, match="holds results made with other settings"):
            predict_paths(model, [str(folder / "in")], out, options)
    assert files_below(out) == before
    predict_paths(other, [str(folder / "in" / "2.png")], out)  # starts over
    assert [Path(row["file"]).name for row in read_rows(out)] == ["2.png"]


def test_damaged_databases_and_those_of_other_versions(folder, predictor):
    """Resuming is refused with a hint, and nothing is overwritten."""
    out = folder / "out"
    database = out / DATABASE_NAME
    predict_paths(predictor, [str(folder / "in" / "1.png")], out)
    whole = database.read_bytes()
    before = (out / "pupil.csv").read_bytes()

    def refused(kind, message):
        with pytest.raises(kind, match=message + ".*choose another --out, or run without --skip"):
            predict_paths(predictor, [str(folder / "in")], out, RESUME)
        assert (out / "pupil.csv").read_bytes() == before

    database.write_bytes(b"not a database at all" * 300)
    refused(DataError, r"sqlite3 is damaged \(file is not a database\)")
    database.write_bytes(whole[: len(whole) // 2])
    refused(DataError, "sqlite3 is damaged")
    database.write_bytes(whole.replace(b'"format": 1', b'"format": 2'))
    refused(UsageError, "other settings \\(format was 2, is 1\\)")
    database.unlink()
    (out / ".pupil.journal").write_text('#pupilseg {"model": "x"}\n')
    refused(UsageError, "pupil.journal was written by an earlier version")
    # Without --skip-existing the run starts over.
    predict_paths(predictor, [str(folder / "in" / "1.png")], out)
    assert (out / "pupil.csv").read_bytes() == before
    assert not (out / ".pupil.journal").exists()


def test_a_changed_byte_never_changes_the_result(folder, predictor):
    """Wherever the byte is, the source is predicted again or the damage is reported."""
    out = folder / "out"
    paths = [str(folder / "in" / f"{i}.png") for i in (1, 2, 11)]
    predict_paths(predictor, paths, out, Options(overlays=False))
    database = out / DATABASE_NAME
    whole = database.read_bytes()
    wanted = sorted((out / "pupil.csv").read_bytes().splitlines())
    used = [i for i, value in enumerate(whole) if value]
    header, inside = [i for i in used if i < 100], [i for i in used if i >= 100]
    options = Options(overlays=False, skip_existing=True)
    redone = 0
    refused = []
    for place in header + inside[:: len(inside) // 100]:
        content = bytearray(whole)
        content[place] ^= 1 << place % 8
        for path in out.iterdir():
            path.unlink()
        database.write_bytes(content)
        try:
            redone += predict_paths(predictor, paths, out, options).frames
        except PupilSegError as error:
            refused.append(str(error))
        else:
            found = (out / "pupil.csv").read_bytes().splitlines()
            assert sorted(found) == wanted, place
    assert redone > 10
    assert len(refused) > 10
    hint = "choose another --out, or run without --skip-existing"
    assert all(hint in message or "cannot write" in message for message in refused)


def test_damaged_rows_are_predicted_again(folder, predictor):
    out = folder / "out"
    predict_paths(predictor, [str(folder / "in")], out, RESUME)
    whole = (out / "pupil.csv").read_bytes()
    database = out / DATABASE_NAME
    database.write_bytes(database.read_bytes().replace(b"52.4", b"99.9", 1))
    done = predict_paths(predictor, [str(folder / "in")], out, RESUME)
    assert (done.frames, done.skipped) == (1, 12)
    assert sorted((out / "pupil.csv").read_bytes().splitlines()) == sorted(whole.splitlines())


def test_unusual_file_names(predictor, eyes, tmp_path, monkeypatch):
    """Commas, quotes, line breaks, and bytes that are not UTF-8."""
    monkeypatch.chdir(tmp_path)
    names = ["#1.png", 'quo"te,.png', "two\nlines.png", os.fsdecode(b"\xff.png")]
    for name in names:
        Path(name).write_bytes(cv2.imencode(".png", eyes[0])[1].tobytes())
    for expected in (4, 0):
        done = predict_paths(predictor, ["*.png"], tmp_path / "o", RESUME)
        assert done.frames == expected
        with (tmp_path / "o" / "pupil.csv").open(newline="", errors="surrogateescape") as handle:
            assert sorted(row["file"] for row in csv.DictReader(handle)) == names
    assert sorted(overlay_names(tmp_path / "o")) == names
    assert write_view(tmp_path / "o").read_text().count("data:image/jpeg") == 4


def test_other_programs_can_read_the_database(folder, predictor):
    """They need no write access and leave no files next to it."""
    out = folder / "out"
    predict_paths(predictor, [str(folder / "in")], out)
    assert {path.name for path in out.iterdir()} == {"pupil.csv", "overlays", DATABASE_NAME}
    address = f"{(out / DATABASE_NAME).as_uri()}?mode=ro&immutable=1"
    with closing(sqlite3.connect(address, uri=True)) as connection:
        assert connection.execute("SELECT count(*) FROM rows").fetchone() == (13,)
    # During a run, reading fails with a message.
    with (
        closing(Journal(out, {}, resume=False)),
        pytest.raises(OutputError, match="another process is using it"),
    ):
        overlay_names(out)


@pytest.mark.integration
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_resuming_after_a_kill(number, folder, predictor, eyes):
    """Finished files keep their rows, and the result is that of an uninterrupted run."""
    for i in range(8):
        write_video(folder / "in" / f"v{i}.avi", eyes * 4)
    command = [sys.executable, "-m", "pupilseg.cli.main", "predict", str(folder / "in")]
    command += ["--model", str(predictor.network.path), "--out", str(folder / "out")]
    command += ["--skip-existing"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    overlays = folder / "out" / "overlays"
    eventually(lambda: len(list(overlays.glob("[!.]*"))) >= 16)
    process.send_signal(number)
    message = process.communicate()[1]
    assert process.returncode == (-9 if number == signal.SIGKILL else 130)
    assert "Traceback" not in message
    assert ("--skip-existing" in message) == (number == signal.SIGINT)
    # Ctrl-C leaves the rows of the finished files; a kill leaves no incomplete file.
    assert (folder / "out" / "pupil.csv").exists() == (number == signal.SIGINT)
    done = predict_paths(
        predictor, [str(folder / "in")], folder / "out", Options(skip_existing=True)
    )
    assert 0 < done.skipped < 13 + 8
    predict_paths(predictor, [str(folder / "in")], folder / "unbroken")
    assert (folder / "out" / "pupil.csv").read_bytes() == (
        folder / "unbroken" / "pupil.csv"
    ).read_bytes()
    names = {p.name for p in (folder / "out" / "overlays").iterdir()}
    assert names == {p.name for p in (folder / "unbroken" / "overlays").iterdir()}


def finished_in(out):
    """Returns the number of finished sources in a directory."""
    if not (out / DATABASE_NAME).exists():
        return 0
    with closing(sqlite3.connect(out / DATABASE_NAME)) as connection:
        if not connection.execute("SELECT * FROM sqlite_schema").fetchall():
            return 0
        return connection.execute("SELECT count(*) FROM sources").fetchone()[0]


PREDICT = """
from pupilseg.predict.predictor import Predictor
from pupilseg.predict.runner import Options, predict_paths

def run(folder):
    options = Options(masks=True, skip_existing=True)
    predict_paths(Predictor(MODEL), [FILES], folder / "out", options)
"""


@pytest.mark.integration
def test_a_kill_before_each_change_to_a_file(predictor, eyes, tmp_path):
    """Covers each state that a kill can leave, with an image and a video."""
    (tmp_path / "in").mkdir()
    cv2.imwrite(str(tmp_path / "in" / "0.png"), eyes[0])
    write_video(tmp_path / "in" / "v.avi", eyes[:2])
    names = f"MODEL, FILES = {str(predictor.network.path)!r}, {str(tmp_path / 'in')!r}"
    skipped = []
    with Victim(names + PREDICT) as victim:
        victim.run(tmp_path / "whole")
        wanted = files_below(tmp_path / "whole")
        for folder in victim.each_kill(tmp_path):
            if (folder / "out").exists():
                shutil.copytree(folder / "out", folder / "copy")  # because reading applies the log
                skipped.append(finished_in(folder / "copy"))
                shutil.rmtree(folder / "copy")
            victim.run(folder)
            found = files_below(folder)
            assert sorted(found) == sorted(wanted), folder.name
            for name, content in found.items():
                assert content == wanted[name] or name.endswith(DATABASE_NAME), (folder.name, name)
    assert set(skipped) == {0, 1, 2}


def test_one_writer_per_directory(folder, predictor):
    with directory_lock(folder / "out"), pytest.raises(LockedError, match="in use by"):
        predict_paths(predictor, [str(folder / "in")], folder / "out")


# --- input that cannot be read -------------------------------------------------------------------


def bad_files(folder, frames):
    """Yields unreadable files, each with part of its error message."""
    video = write_video(folder / "whole.avi", frames).read_bytes()
    film = write_video(folder / "whole.mp4", frames, fourcc="mp4v").read_bytes()
    for name, content, message in (
        ("text.png", b"hello", "not an image"),
        ("empty.png", b"", "not an image"),
        ("empty.avi", b"", "empty.avi is empty"),
        ("text.mp4", b"hello" * 99, "neither an image nor a video"),
        ("notes.txt", b"hello" * 99, "neither an image nor a video"),
        ("cut.mp4", film[: len(film) // 2], "neither an image nor a video"),
        ("head.avi", video[:2000], "head.avi"),
        ("cut.avi", video[: len(video) // 2], " of the 11 frames in its header could be decoded"),
    ):
        (folder / name).write_bytes(content)
        yield str(folder / name), message


def test_bad_files_are_reported_and_the_others_predicted(predictor, eyes, tmp_path):
    cases = dict(bad_files(tmp_path, eyes))
    unreadable = os.fsdecode(bytes(tmp_path) + b"/\xff.")
    for suffix in ("avi", "bin"):  # OpenCV crashes on such names
        write_video(tmp_path / "v.avi", eyes).rename(unreadable + suffix)
    cv2.imwrite(str(tmp_path / "good.png"), eyes[0])
    paths = [*cases, str(tmp_path / "gone*.png"), "4711", str(tmp_path / "good.png")]
    paths += [unreadable + "avi", unreadable + "bin"]
    done = predict_paths(predictor, paths, tmp_path / "out")
    assert len(done.failed) == len(cases) + 4
    assert sum("not valid UTF-8; rename" in message for message in done.failed) == 2
    for path, text in cases.items():
        assert any(path in message and text in message for message in done.failed), path
    assert any("camera 4711 does not exist" in message for message in done.failed)
    rows = read_rows(tmp_path / "out")
    assert Path(rows[-1]["file"]).name == "good.png"
    cut = [row for row in rows if row["file"].endswith("cut.avi")]
    assert 3 <= len(cut) <= 8
    assert len(
        dict(pictures_at(tmp_path / "out" / "overlays" / "cut_avi.mp4", {*range(99)}))
    ) == len(cut)


def test_images_of_every_kind(predictor, tmp_path):
    gray = eye()
    color = cv2.cvtColor(gray, cv2.COLOR_GRAY2BGR)
    kinds = {
        "color.png": color,
        "alpha.png": np.dstack([color, np.full_like(gray, 9)]),
        "deep.png": gray.astype(np.uint16) * 257,
        "deep_color.tif": color.astype(np.uint16) * 257,
    }
    for name, image in kinds.items():
        assert cv2.imwrite(str(tmp_path / name), image)
    cv2.imwrite(str(tmp_path / "one.png"), gray[:1, :1])
    cv2.imwrite(str(tmp_path / "row.png"), gray[:1])
    paths = [str(tmp_path / name) for name in (*kinds, "one.png", "row.png")]
    done = predict_paths(predictor, paths, tmp_path / "out")
    assert done.failed == []
    rows = read_rows(tmp_path / "out")
    for row in rows[:4]:
        assert [float(row[c]) for c in COLUMNS[3:8]] == pytest.approx(PUPIL, abs=0.1)
    assert [row["is_blink"] for row in rows[4:]] == ["1", "1"]
    assert (tmp_path / "out" / "overlays" / "one.jpg").is_file()


def test_image_of_20000_by_20000_pixels(predictor, tmp_path):
    image = np.full((20_000, 20_000), 120, np.uint8)
    cv2.ellipse(image, (9000, 11000), (2000, 1500), 0, 0, 360, 20, -1)
    cv2.imwrite(str(tmp_path / "huge.bmp"), image)
    del image
    done = predict_paths(predictor, [str(tmp_path / "huge.bmp")], tmp_path / "out")
    (tmp_path / "huge.bmp").unlink()  # pytest keeps its folders, and this is 400 MB
    (row,) = read_rows(tmp_path / "out")
    assert done.failed == []
    found = [float(row[c]) for c in COLUMNS[3:7]]
    assert found == pytest.approx([9000, 11000, 2000, 1500], abs=30)
    assert float(row["area_px"]) == pytest.approx(math.pi * 2000 * 1500, rel=0.01)


def test_more_pixels_than_opencv_allows(predictor, eyes, tmp_path):
    header = b"P5 70000 70000 255\n"  # 4.9 billion
    (tmp_path / "vast.pgm").write_bytes(header)
    cv2.imwrite(str(tmp_path / "eye.png"), eyes[0])
    paths = [str(tmp_path / name) for name in ("vast.pgm", "eye.png")]
    done = predict_paths(predictor, paths, tmp_path / "out")
    assert "vast.pgm" in done.failed[0]
    assert len(read_rows(tmp_path / "out")) == 1


def test_output_that_cannot_be_written(predictor, folder):
    (folder / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot write"):
        predict_paths(predictor, [str(folder / "in")], folder / "file" / "out")
    out = folder / "out"
    out.mkdir()
    (out / "overlays").write_text("in the way")
    with pytest.raises(OutputError, match="cannot write"):
        predict_paths(predictor, [str(folder / "in")], out)
    assert not (out / "pupil.csv").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write anywhere; see the next test")
def test_no_permission(predictor, folder):
    (folder / "out").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="no permission"):
        predict_paths(predictor, [str(folder / "in")], folder / "out")


@pytest.mark.integration
def test_a_disk_that_fills_up_with_rows(predictor, folder):
    """The error is one line, and the run can be resumed once there is space."""
    disk = folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    options = Options(overlays=False, skip_existing=True)
    try:
        with pytest.raises(OutputError, match=r"cannot write .*sqlite3: the disk is full; free"):
            predict_paths(predictor, [str(folder / "in")], disk, options)
        assert not (disk / "pupil.csv").exists()
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        done = predict_paths(predictor, [str(folder / "in")], disk, options)
        assert done.skipped > 0
        assert done.frames + done.skipped == 13
        assert len(read_rows(disk)) == 13
        assert {path.name for path in disk.iterdir()} == {"pupil.csv", DATABASE_NAME}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("ro", "images", "the file system is read-only"),
        ("size=64k", "images", "the disk is full"),
        ("size=400k", "video", "cannot write .*v.mp4"),
    ],
)
def test_disk(kind, content, message, predictor, folder, eyes):
    """Uses a real small file system if the user is allowed to mount one."""
    disk = folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", kind, "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    noise = np.random.default_rng(0).integers(0, 255, (12, HEIGHT, WIDTH), np.uint8)
    path = folder / "in" if content == "images" else write_video(folder / "v.avi", list(noise))
    try:
        with pytest.raises(OutputError, match=message):
            predict_paths(predictor, [str(path)], disk / "out")
        assert not list(disk.rglob("pupil.csv"))
        assert not list(disk.rglob("*.mp4"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# --- resolving paths -----------------------------------------------------------------------------


def test_patterns_and_duplicates(folder):
    pattern, file = str(folder / "in" / "1*.png"), str(folder / "in" / "1.png")
    given = [pattern, file, str(folder / "in" / "x*"), str(folder / "in"), "3"]
    sources, failed = find_sources(given)
    assert [s.path.name for s in sources[:4]] == ["1.png", "10.png", "11.png", "12.png"]
    assert len({s.key for s in sources}) == len(sources) == 15
    assert (sources[-1].camera, sources[-1].text, sources[-1].name) == (3, "camera:3", "camera3")
    assert len(failed) == 1
    (folder / "bare").mkdir()
    assert "contains no images or videos" in find_sources([str(folder / "bare")])[1][0]


def test_results_and_hidden_files_are_not_searched(folder, predictor):
    """A second `pupilseg predict . --out found` must not read the overlays of the first."""
    (folder / "in" / "._1.png").write_bytes(b"macOS writes such files on foreign disks")
    out = folder / "in" / "found"
    for path in (str(folder / "in"), str(folder / "in" / "**" / "*.*g")):
        for _ in range(2):
            done = predict_paths(predictor, [path], out, Options(masks=True))
            assert (done.frames, len(done.failed)) == (13 if path.endswith("in") else 12, 1)
    named = str(out / "overlays" / "1.jpg")
    assert predict_paths(predictor, [named], folder / "in" / "found").frames == 1


def test_unknown_suffixes_are_distinguished_by_content(folder, eyes):
    write_video(folder / "in" / "v.avi", eyes)
    (folder / "in" / "v.avi").rename(folder / "in" / "v.bin")
    cv2.imwrite(str(folder / "in" / "i.png"), eyes[0])
    (folder / "in" / "i.png").rename(folder / "in" / "i.bin")
    sources, _ = find_sources([str(folder / "in" / f"{n}.bin") for n in "vi"])
    assert [s.is_video for s in sources] == [True, False]


def test_names_never_collide(tmp_path):
    paths = [f"{d}/{n}" for d in "abc" for n in ("x.png", "X.png", "x.jpg", "x_png.png", "x")]
    for path in paths:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    given = [str(tmp_path / path) for path in paths]
    sources, _ = find_sources(given)
    assert [s.text for s in sources] == given
    assert len({s.name.lower() for s in sources}) == len(paths)
    before = {sources[3].key: "kept", "other": "x"}
    again, _ = find_sources(given, before)
    assert again[3].name == "kept"
    assert len({s.name.lower() for s in again} | {"x"}) == len(paths) + 1


# --- videos -------------------------------------------------------------------------------------


def test_unfinished_videos_are_removed(eyes, tmp_path):
    video = VideoFile(tmp_path / "a.mp4", 25)
    video.write(cv2.cvtColor(eyes[0], cv2.COLOR_GRAY2BGR))
    video.discard()
    assert not list(tmp_path.iterdir())
    VideoFile(tmp_path / "a.mp4", 25).finish()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fps", [0.0, 23.976, 29.97002997, 119.88, 240.123456, 1000.5])
def test_any_frame_rate_can_be_written(fps, eyes, tmp_path):
    video = VideoFile(tmp_path / "a.mp4", fps)
    for frame in eyes[:3]:
        video.write(cv2.cvtColor(frame, cv2.COLOR_GRAY2BGR))
    video.finish()
    with_frames = list(Video(tmp_path / "a.mp4"))
    assert len(with_frames) == 3
    assert with_frames[2].time_s == pytest.approx(2 / (fps or 30), rel=0.01, abs=1e-3)


def test_times_without_timestamps(eyes, tmp_path, caplog, predictor):
    """Raw MJPEG is a sequence of images without a container or timestamps."""
    pictures = [cv2.imencode(".jpg", frame)[1].tobytes() for frame in eyes[:4]]
    (tmp_path / "v.mjpeg").write_bytes(b"".join(pictures))
    video = Video(tmp_path / "v.mjpeg")
    times = [frame.time_s for frame in video]
    video.close()
    assert len(times) == 4
    if video.has_stamps:
        assert times == sorted(times)
    else:
        assert times == ([i / video.fps for i in range(4)] if video.fps else [None] * 4)
        with caplog.at_level("WARNING"):
            predict_paths(predictor, [str(tmp_path / "v.mjpeg")], tmp_path / "out")
        assert "has no timestamps; time_s is" in caplog.text


@pytest.fixture
def camera_7(eyes, tmp_path, monkeypatch):
    """Replaces camera 7 with a file."""
    video = write_video(tmp_path / "v.avi", eyes, fps=5)
    capture = cv2.VideoCapture
    monkeypatch.setattr(
        "cv2.VideoCapture", lambda source: capture(str(video) if source == 7 else source)
    )


@pytest.mark.usefixtures("camera_7")
def test_an_interrupted_video_leaves_no_file_and_no_thread(predictor, tmp_path):
    asked = iter([False, False])

    def stop():
        if next(asked, None) is None:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        predict_paths(predictor, ["7"], tmp_path / "out", stop=stop)
    left = {p.name for p in (tmp_path / "out").rglob("*")}
    assert left == {"overlays", "pupil.csv", DATABASE_NAME}
    assert read_rows(tmp_path / "out") == []
    assert not [t for t in threading.enumerate() if t.name == THREAD_NAME]


@pytest.mark.usefixtures("camera_7")
def test_a_camera_is_read_until_it_is_stopped(predictor, tmp_path):
    asked = iter([False, False, False, True])
    done = predict_paths(predictor, ["7"], tmp_path / "out", stop=lambda: next(asked))
    assert (done.frames, done.failed) == (4, [])
    rows = read_rows(tmp_path / "out")
    assert {row["file"] for row in rows} == {"camera:7"}
    times = [float(row["time_s"]) for row in rows]
    assert times[0] == 0
    assert times == sorted(times)
    assert times[3] < 0.5  # the time of arrival, not frame / 5 fps
    assert (tmp_path / "out" / "overlays" / "camera7.mp4").is_file()
    # A new recording is never skipped.
    options = Options(skip_existing=True)
    again = predict_paths(predictor, ["7"], tmp_path / "out", options, stop=lambda: True)
    assert (again.frames, again.skipped) == (1, 0)


def test_missing_camera():
    with pytest.raises(DataError, match="camera 4711 does not exist"):
        Video(4711)
