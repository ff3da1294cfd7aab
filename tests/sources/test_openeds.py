"""OpenEDS folders: both layouts, splits by subject, frame sizes, and errors."""

from __future__ import annotations

import logging
import pickle

import cv2
import numpy as np
import pytest

from pupilseg.errors import DataError
from pupilseg.geometry import letterbox_box
from pupilseg.sources import SourceOptions, download, open_dataset
from pupilseg.sources.frames import fit_frame
from pupilseg.sources.splits import natural_key
from tests.helpers.source_data import four_classes, frame, write_openeds


def opened(source, out, **options):
    download(str(source), out, options=SourceOptions(**options))
    return open_dataset(out)


def names(data, split):
    return [s.name for s in data.read(split, 0, data.count(split))]


def test_one_subject_is_split_in_blocks_in_natural_order(tmp_path):
    write_openeds(tmp_path / "eyes" / "S_1", range(7, 12))
    data = opened(tmp_path / "eyes", tmp_path / "raw")
    assert names(data, "train") == ["S_1/7", "S_1/8", "S_1/9", "S_1/10"]
    assert names(data, "validation") == ["S_1/11"]
    assert data.split_rule.startswith("contiguous blocks of one subject: the first 4 frames of S_1")
    assert (data.source, data.preprocessing) == ("openeds:eyes", "none")
    for number, sample in zip((7, 8, 9, 10), data.read("train", 0, 4), strict=True):
        image, label = frame(number)
        np.testing.assert_array_equal(sample.image, image)
        np.testing.assert_array_equal(sample.label, label)
        assert sample.dist_map is None
    assert [s.name for s in pickle.loads(pickle.dumps(data)).read("train", 1, 2)] == ["S_1/8"]


@pytest.mark.parametrize(("fraction", "held"), [(0.2, 1), (0.5, 2), (0.99, 3)])
def test_subjects_are_never_in_both_splits(tmp_path, fraction, held):
    for subject in (1, 2, 10, 20):
        write_openeds(tmp_path / "eyes" / f"S_{subject}", range(2))
    data = opened(tmp_path / "eyes", tmp_path / "raw", validation_fraction=fraction)
    people = [{name.split("/")[0] for name in names(data, s)} for s in ("train", "validation")]
    order = ["S_1", "S_2", "S_10", "S_20"]
    assert people == [set(order[: 4 - held]), set(order[4 - held :])]
    assert data.split_rule.startswith("by subject: ")


@pytest.mark.parametrize("suffix", [".npy", ".png"])
def test_folders_of_images_and_labels(tmp_path, suffix):
    for split, number in (("train", 0), ("validation", 1)):
        image, label = frame(number)
        for kind in ("images", "labels"):
            (tmp_path / "eyes" / split / kind).mkdir(parents=True)
        cv2.imwrite(str(tmp_path / "eyes" / split / "images" / "x.png"), image)
        target = tmp_path / "eyes" / split / "labels" / f"x{suffix}"
        if suffix == ".npy":
            np.save(target, four_classes(label))
        else:
            cv2.imwrite(str(target), four_classes(label))
    data = opened(tmp_path / "eyes", tmp_path / "raw")
    assert data.split_rule == "splits of the source"
    for split, number in (("train", 0), ("validation", 1)):
        (sample,) = data.read(split, 0, 1)
        np.testing.assert_array_equal(sample.label, frame(number)[1])
        assert sample.name == f"{split}/images/x"


def test_labels_of_two_classes_are_recognized(tmp_path):
    folder = write_openeds(tmp_path / "eyes" / "S_1", range(4), classes=2)
    data = opened(tmp_path / "eyes", tmp_path / "raw")
    np.testing.assert_array_equal(next(data.read("train", 1, 2)).label, frame(1)[1])
    np.save(folder / "2.npy", four_classes(frame(2)[1]))
    with pytest.raises(DataError, match=r"2.npy has values up to 3, expected 0..1"):
        list(data.read("train", 0, 3))


def test_a_blink_at_the_start_does_not_make_the_set_binary(tmp_path):
    folder = write_openeds(tmp_path / "eyes" / "S_1", range(4))
    np.save(folder / "0.npy", np.zeros((400, 640), np.uint8))
    samples = list(opened(tmp_path / "eyes", tmp_path / "raw").read("train", 0, 3))
    assert [int(s.label.sum()) for s in samples] == [0, *(int(frame(n)[1].sum()) for n in (1, 2))]


@pytest.mark.parametrize("mode", ["letterbox", "stretch"])
def test_upright_frames_are_fitted_and_recorded(tmp_path, caplog, mode):
    write_openeds(tmp_path / "eyes" / "S_1", range(2), shape=(640, 400))
    with caplog.at_level(logging.WARNING, "pupilseg"):
        data = opened(tmp_path / "eyes", tmp_path / "raw", resize=mode)
    assert "640x400" in caplog.text
    assert mode in caplog.text
    sample = next(data.read("train", 0, 1))
    columns = np.flatnonzero(sample.image.any(axis=0))
    assert sample.image.shape == (400, 640)
    assert (columns[-1] - columns[0] + 1) == (250 if mode == "letterbox" else 640)
    # Image and label stay aligned: the pupil's center moves as expected.
    label = cv2.resize(frame(0)[1], (400, 640), interpolation=cv2.INTER_NEAREST)
    y, x = (float(v.mean()) for v in np.nonzero(label))
    got_y, got_x = (float(v.mean()) for v in np.nonzero(sample.label))
    left, scale_x = (195, 250 / 400) if mode == "letterbox" else (0, 640 / 400)
    assert got_x == pytest.approx((x + 0.5) * scale_x - 0.5 + left, abs=0.5)
    assert got_y == pytest.approx((y + 0.5) * 400 / 640 - 0.5, abs=0.5)


@pytest.mark.parametrize("size", [(400, 640), (800, 1280), (640, 400), (100, 100), (1, 3000)])
def test_letterbox_keeps_the_aspect_ratio_and_stays_inside(size):
    top, left, height, width = letterbox_box(*size, "letterbox")
    assert top >= 0
    assert left >= 0
    assert top + height <= 400
    assert left + width <= 640
    assert height == 400 or width == 640
    assert abs(height / width - size[0] / size[1]) <= max(size[0] / size[1], 1) / min(height, width)


def test_fitting_keeps_a_frame_of_the_right_size():
    image, label = frame(3)
    assert fit_frame(image, label, "letterbox") == (image, label)


def test_natural_order():
    got = sorted(["S_10/2", "S_2/10", "S_2/9", "x", "S_2/a"], key=natural_key)
    assert got == ["S_2/9", "S_2/10", "S_2/a", "S_10/2", "x"]


def spoil_png(folder):
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:2000])


def png_of_text(folder):
    (folder / "1.png").write_text("<html>not here</html>")


def absurd_png(folder):
    data = bytearray((folder / "1.png").read_bytes())
    data[16:24] = b"\x7f\xff\xff\xff" * 2
    (folder / "1.png").write_bytes(bytes(data))


def sixteen_bits(folder):
    cv2.imwrite(str(folder / "1.png"), np.full((400, 640), 4000, np.uint16))


def color(folder):
    cv2.imwrite(str(folder / "1.png"), np.full((400, 640, 3), (1, 2, 3), np.uint8))


def pickled_label(folder):
    np.save(folder / "1.npy", np.array([{}], dtype=object), allow_pickle=True)


def save_label(array):
    return lambda folder: np.save(folder / "1.npy", array)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_png, r"1.png is not a readable PNG"),
        (png_of_text, r"1.png is not a PNG file"),
        (absurd_png, r"1.png claims 2147483647 x 2147483647"),
        (sixteen_bits, r"1.png has uint16 pixels"),
        (color, r"1.png is a color image"),
        (lambda folder: (folder / "1.npy").unlink(), r"1.png has no label; expected .*1.npy"),
        (lambda folder: (folder / "1.npy").write_bytes(b"nope"), r"cannot read label .*1.npy"),
        (pickled_label, r"cannot read label .*1.npy"),
        (save_label(np.zeros((400, 639), np.uint8)), r"1.npy has shape \(400, 639\)"),
        (save_label(np.full((400, 640), 4, np.uint8)), r"1.npy has values 4..4, expected classes"),
        (save_label(np.full((400, 640), -1, np.int8)), r"1.npy has values -1..-1"),
        (save_label(np.zeros((400, 640), np.float32)), r"1.npy holds float32, expected uint8"),
    ],
)
def test_bad_files_are_named(tmp_path, spoil, words):
    spoil(write_openeds(tmp_path / "eyes" / "S_1", range(3)))
    with pytest.raises(DataError, match=words):
        list(opened(tmp_path / "eyes", tmp_path / "raw").read("train", 0, 2))


def test_a_gray_png_with_three_channels_is_accepted(tmp_path):
    folder = write_openeds(tmp_path / "eyes" / "S_1", range(2))
    image, _ = frame(0)
    cv2.imwrite(str(folder / "0.png"), np.stack([image] * 3, axis=2))
    sample = next(opened(tmp_path / "eyes", tmp_path / "raw").read("train", 0, 1))
    np.testing.assert_array_equal(sample.image, image)


def test_empty_and_unknown_folders(tmp_path):
    (tmp_path / "eyes" / "S_1").mkdir(parents=True)
    (tmp_path / "none").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "cat.jpg").write_bytes(b"")
    (tmp_path / "half" / "train" / "images").mkdir(parents=True)
    for name, words in [
        ("eyes", "has no frames"),
        ("none", "it is empty"),
        ("other", "it has none of the layouts"),
        ("half", "has no train split"),
    ]:
        with pytest.raises(DataError, match=words):
            download(str(tmp_path / name), tmp_path / "raw")
    assert not (tmp_path / "raw" / "source.json").exists()


def test_a_changed_frame_is_named(tmp_path):
    folder = write_openeds(tmp_path / "eyes" / "S_1", range(3))
    opened(tmp_path / "eyes", tmp_path / "raw")
    (folder / "2.png").unlink()
    with pytest.raises(DataError, match=r"2.png is missing or has changed .*pipeline.download"):
        open_dataset(tmp_path / "raw")
    (folder / "2.npy").unlink()
    assert opened(tmp_path / "eyes", tmp_path / "raw").count("validation") == 1
