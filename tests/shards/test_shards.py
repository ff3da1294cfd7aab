"""Shards are read back to the bit and without copies, even after interruptions."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
from dataclasses import replace
from math import hypot
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pupilseg import maps
from pupilseg.errors import DataError, LockedError, OutputError
from pupilseg.files import directory_lock
from pupilseg.geometry import ellipse_from_mask, ellipse_vector
from pupilseg.preprocess import get_preprocessing
from pupilseg.shards import codec, open_shards, verify, write_shards
from pupilseg.shards.format import COLUMNS
from pupilseg.shards.writer import default_rows_per_shard
from pupilseg.sources import Sample
from tests.helpers.fakes import FakeDataset, random_image
from tests.helpers.masks import CORNERS, EDGES, EMPTY, FULL, labels
from tests.helpers.waiting import eventually

GC = "gamma0.8+clahe1.5"


def contents(directory):
    """Returns every file below a directory with its digest."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def check_equal(dataset, directory, split="train", skip=()):
    """Compares every column of every sample with the source or the definition, to the bit."""
    kept = [i for i in range(dataset.count(split)) if i not in skip]
    with open_shards(directory) as shards:
        assert len(shards) == len(kept)
        for row, index in enumerate(kept):
            sample, found = dataset.sample(split, index), shards.sample(row)
            label, free = sample.label, ellipse_from_mask(sample.label)
            wanted = {
                "image": sample.image,
                "label": label,
                "spatial_weights": maps.spatial_weights(label)
                if sample.spatial_weights is None
                else sample.spatial_weights,
                "dist_map": maps.distance_maps(label)
                if sample.dist_map is None
                else sample.dist_map,
                "ellipse": ellipse_vector(label) if sample.ellipse is None else sample.ellipse,
                "ellipse_free": np.array(free or [0] * 5, dtype=np.float32),
            }
            assert list(found) == [*wanted, "name"] == shards.columns
            assert found["name"] == sample.name
            for column, value in wanted.items():
                assert found[column].dtype == COLUMNS[column].dtype
                assert found[column].shape == COLUMNS[column].shape
                assert found[column].tobytes() == value.tobytes(), (index, column)


def test_compact_encodings_are_exact(tmp_path):
    dataset = FakeDataset(train=5)
    manifest = write_shards(dataset, "train", tmp_path / "train", rows_per_shard=64)
    check_equal(dataset, tmp_path / "train")
    assert manifest == json.loads((tmp_path / "train" / "manifest.json").read_text())
    assert {c: e["encoding"] for c, e in manifest["files"][0]["encodings"].items()} == {
        "image": "raw",
        "label": "bits",
        "spatial_weights": "bits",
        "dist_map": "u2",
        "ellipse": "raw",
        "ellipse_free": "raw",
    }
    assert manifest["files"][0]["bytes"] / 5 < 840_000
    assert sorted(os.listdir(tmp_path / "train")) == [
        *("SHA256SUMS", "manifest.json", "shard-00000.arrow")
    ]


def test_a_column_is_raw_if_no_encoding_is_exact(tmp_path):
    dataset = FakeDataset(
        train=9,
        bring_weights={0: 3.5, 1: 3.5, 3: 20.0, 4: 7.0},
        odd_weights=frozenset({8}),
        odd_maps=frozenset({7}),
    )
    manifest = write_shards(dataset, "train", tmp_path, rows_per_shard=3)
    check_equal(dataset, tmp_path)
    weights, dist = (
        [file["encodings"][column] for file in manifest["files"]]
        for column in ("spatial_weights", "dist_map")
    )
    assert weights[0]["encoding"] == "raw", "row 2 is computed: {0, 20} after {0, 3.5}"
    assert weights[1]["encoding"] == weights[2]["encoding"] == "raw"
    assert [entry["encoding"] for entry in dist] == ["u2", "u2", "raw"]
    with open_shards(tmp_path) as shards:
        with pytest.raises(KeyError, match="several encodings"):
            shards["dist_map"]
        assert shards.encoding("dist_map") is None


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(lambda m: m * np.float32(hypot(399, 639) / hypot(400, 640)), id="diagonal"),
        pytest.param(lambda m: np.nextafter(m, np.float32(2)), id="last bit"),
        pytest.param(lambda m: np.where(m == 0, np.float32(-0.0), m), id="sign of zero"),
        pytest.param(lambda m: m[::-1], id="classes swapped"),
        pytest.param(lambda m: m * np.float32(1e25), id="out of range"),
        pytest.param(lambda m: -np.abs(m), id="never positive"),
    ],
)
def test_maps_with_another_definition_are_stored_raw(tmp_path, other):
    class Other(FakeDataset):
        def sample(self, split, index):
            sample = FakeDataset.sample(self, split, index)
            given = maps.distance_maps(sample.label)
            given = other(given) if index == 1 else given
            return replace(sample, dist_map=np.ascontiguousarray(given))

    manifest = write_shards(Other(train=3), "train", tmp_path)
    assert manifest["files"][0]["encodings"]["dist_map"] == {"encoding": "raw"}
    check_equal(Other(train=3), tmp_path)


def test_a_wrong_encoder_is_detected_by_decoding(tmp_path, monkeypatch):
    """The maps are then stored raw."""

    def wrong(squared):
        words, first = codec.pack_squared(squared)
        words[1234] ^= 1
        return words, first

    monkeypatch.setattr("pupilseg.shards.columns.pack_squared", wrong)
    manifest = write_shards(FakeDataset(train=2), "train", tmp_path)
    assert manifest["files"][0]["encodings"]["dist_map"] == {"encoding": "raw"}
    check_equal(FakeDataset(train=2), tmp_path)


def test_two_valued_weights_of_the_source_keep_their_value(tmp_path):
    dataset = FakeDataset(train=3, bring_weights=dict.fromkeys(range(3), 3.7))
    manifest = write_shards(dataset, "train", tmp_path)
    about = manifest["files"][0]["encodings"]["spatial_weights"]
    assert about == {"encoding": "bits", "value": float(np.float32(3.7))}
    check_equal(dataset, tmp_path)


@settings(max_examples=12, deadline=None)
@given(masks=st.lists(labels, min_size=1, max_size=3), bring=st.integers(0, 7))
@example(masks=[EMPTY, FULL, *CORNERS], bring=7)
@example(masks=EDGES, bring=0)
def test_any_mask_has_compact_encodings(masks, bring):
    """For any mask, and any subset of maps that the source provides."""

    class Masks(FakeDataset):
        def sample(self, split, index):
            label, image = masks[index], random_image(np.random.default_rng(index))
            return Sample(
                f"mask {index}",
                image,
                label,
                maps.spatial_weights(label) if bring & 1 else None,
                maps.distance_maps(label) if bring & 2 else None,
                ellipse_vector(label) if bring & 4 else None,
            )

    dataset = Masks(train=len(masks))
    with tempfile.TemporaryDirectory() as folder:
        manifest = write_shards(dataset, "train", Path(folder))
        encodings = manifest["files"][0]["encodings"]
        assert encodings["dist_map"] == {"encoding": "u2"}
        assert encodings["spatial_weights"]["encoding"] == "bits"
        check_equal(dataset, Path(folder))


@pytest.mark.parametrize(
    "where",
    [
        pytest.param(np.s_[:0], id="empty"),
        pytest.param(np.s_[:], id="full"),
        pytest.param(np.s_[0, 0], id="corner pixel"),
        pytest.param(np.s_[:, -1], id="right border"),
        pytest.param(np.s_[3:9, ::7], id="blobs"),
    ],
)
def test_odd_masks_are_exact(tmp_path, where):
    label = np.zeros((400, 640), dtype=np.uint8)
    label[where] = 1

    class Odd(FakeDataset):
        def sample(self, split, index):
            return Sample("odd", random_image(np.random.default_rng(index)), label)

    manifest = write_shards(Odd(train=1), "train", tmp_path)
    assert manifest["files"][0]["encodings"]["dist_map"] == {"encoding": "u2"}
    check_equal(Odd(train=1), tmp_path)


def test_views_are_aligned_and_read_only_parts_of_the_mapping(tmp_path):
    write_shards(FakeDataset(train=5), "train", tmp_path)
    with open_shards(tmp_path) as shards:
        size = (tmp_path / "shard-00000.arrow").stat().st_size
        path = str(tmp_path / "shard-00000.arrow")
        # The kernel lists the address of the mapping and its permissions.
        rows = [r.split() for r in Path("/proc/self/maps").read_text().splitlines() if path in r]
        assert len(rows) == 1
        assert rows[0][1].startswith("r--")
        first, last = (int(part, 16) for part in rows[0][0].split("-"))
        assert last - first >= size
        for name in [*COLUMNS, "dist_map_first"]:
            view = shards[name]
            address = view.__array_interface__["data"][0]
            assert first <= address
            assert address + view.nbytes <= last
            assert address % 64 == 0
            assert not view.flags.writeable
            assert not view.flags.owndata
        assert shards["image"].shape == (5, 400, 640)
        assert shards["label"].shape == (5, 32000)
        assert shards["name"] == [f"train/{i}" for i in range(5)]


def test_several_files_behave_as_one(tmp_path):
    dataset = FakeDataset(train=7)
    write_shards(dataset, "train", tmp_path, rows_per_shard=3)
    with open_shards(tmp_path) as shards:
        assert len(shards.shards) == 3
        images = shards["image"]
        wanted = np.stack([dataset.sample("train", i).image for i in range(7)])
        assert len(images) == 7
        assert images.shape == wanted.shape
        np.testing.assert_array_equal(images[-1], wanted[-1])
        np.testing.assert_array_equal(images[1:6], wanted[1:6])
        np.testing.assert_array_equal(images[::2], wanted[::2])
        np.testing.assert_array_equal(images[np.array([5, 0])], wanted[[5, 0]])
        np.testing.assert_array_equal(np.stack(list(images)), wanted)
        assert images[3:5].base is not None, "a slice within a file is a view"
        assert images[2].base is not None
        for bad in (7, -8):
            with pytest.raises(IndexError):
                images[bad]
            with pytest.raises(IndexError):
                shards.sample(bad)
        assert shards.sample(-1)["name"] == "train/6"


def test_bytes_do_not_depend_on_workers(tmp_path):
    dataset = FakeDataset(train=7, odd_weights=frozenset({4}))
    for workers in (1, 2):
        write_shards(dataset, "train", tmp_path / str(workers), workers=workers, rows_per_shard=3)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


_RUN = """
import sys
from pathlib import Path
from tests.helpers.fakes import FakeDataset
from pupilseg.shards import write_shards
if __name__ == "__main__":
    out, flag = Path(sys.argv[1]), Path(sys.argv[2])
    dataset = FakeDataset(train=9, kill_at=7, kill_flag=flag, kill_parent=sys.argv[4] == "parent")
    write_shards(dataset, "train", out, rows_per_shard=3, workers=int(sys.argv[3]))
"""


def processes_with(mark):
    """Returns the processes whose environment contains a string."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (entry / "environ").read_bytes():
                found.append(entry.name)
        except OSError:  # it has ended
            continue
    return found


@pytest.mark.parametrize(("workers", "victim"), [(1, "itself"), (2, "worker"), (2, "parent")])
def test_a_killed_run_can_be_resumed_with_the_same_bytes(tmp_path, workers, victim):
    out, flag = tmp_path / "out", tmp_path / "flag"
    script = tmp_path / "run.py"
    script.write_text(_RUN)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "MARK": str(tmp_path)}
    command = [sys.executable, str(script), str(out), str(flag), str(workers), victim]
    first = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert first.returncode != 0
    assert flag.exists()
    if victim == "worker":
        assert "a worker process was killed" in first.stderr
    if victim == "parent":
        eventually(lambda: not processes_with(f"MARK={tmp_path}"))  # workers end with their parent
    assert not (out / "manifest.json").exists()
    with pytest.raises(DataError, match=r"no manifest\.json; create it with: python -m pipeline"):
        open_shards(out)
    # A shard without a record is built again.
    recorded = [p.stem for p in out.glob(".building/shard-*.json")]
    finished = {p: p.stat().st_mtime_ns for p in out.glob("shard-*.arrow") if p.stem in recorded}
    if workers == 1:
        assert len(finished) == 2

    dataset = FakeDataset(train=9, kill_at=7, kill_flag=flag)
    write_shards(dataset, "train", out, rows_per_shard=3)
    assert {p: p.stat().st_mtime_ns for p in finished} == finished, "finished shards are kept"
    write_shards(FakeDataset(train=9), "train", tmp_path / "undisturbed", rows_per_shard=3)
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_an_altered_shard_of_an_unfinished_run_is_rebuilt(tmp_path):
    dataset = FakeDataset(train=4)
    write_shards(dataset, "train", tmp_path / "a", rows_per_shard=2)
    broken = FakeDataset(train=4, bad=frozenset({3}))
    with pytest.raises(DataError):
        write_shards(broken, "train", tmp_path / "b", rows_per_shard=2)
    path = tmp_path / "b" / "shard-00000.arrow"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    write_shards(dataset, "train", tmp_path / "b", rows_per_shard=2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_complete_split_is_kept_and_a_different_one_is_refused(tmp_path):
    manifest = write_shards(FakeDataset(train=2), "train", tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    gone = FakeDataset(train=2, bad=frozenset({0, 1}))  # would fail if it were read
    assert write_shards(gone, "train", tmp_path) == manifest
    assert {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before
    with pytest.raises(DataError, match=r"source = 'fake', not 'other'; .* remove"):
        write_shards(FakeDataset(train=2, source="other"), "train", tmp_path)
    with pytest.raises(DataError, match="preprocessing = 'none', not 'gamma"):
        write_shards(FakeDataset(train=2), "train", tmp_path, preprocessing=GC)
    (tmp_path / "shard-00000.arrow").unlink()
    assert write_shards(FakeDataset(train=2), "train", tmp_path) == manifest
    assert verify(tmp_path) == 2


def test_bad_samples_are_counted_and_named_up_to_a_limit(tmp_path):
    dataset = FakeDataset(train=8, bad=frozenset({1, 2, 7}))
    with pytest.raises(DataError, match=r"train\[1\]: file 1\.png cannot be decoded.*--max-bad"):
        write_shards(dataset, "train", tmp_path, rows_per_shard=4)
    with pytest.raises(DataError, match="3 bad sample"):
        write_shards(dataset, "train", tmp_path, rows_per_shard=4, max_bad=2)
    manifest = write_shards(dataset, "train", tmp_path, rows_per_shard=4, max_bad=3)
    assert [s["index"] for s in manifest["skipped"]] == [1, 2, 7]
    assert "7.png" in manifest["skipped"][2]["error"]
    assert [file["rows"] for file in manifest["files"]] == [2, 3]
    check_equal(dataset, tmp_path, skip={1, 2, 7})


def test_a_shard_may_have_only_bad_samples(tmp_path):
    dataset = FakeDataset(train=5, bad=frozenset({2, 3}))
    write_shards(dataset, "train", tmp_path / "some", rows_per_shard=2, max_bad=2)
    check_equal(dataset, tmp_path / "some", skip={2, 3})
    with pytest.raises(DataError, match="no good sample"):
        write_shards(FakeDataset(train=1, bad=frozenset({0})), "train", tmp_path / "no", max_bad=1)
    with pytest.raises(DataError, match="no samples in split"):
        write_shards(FakeDataset(train=0), "train", tmp_path / "none")


def test_a_hostile_sample_is_named(tmp_path):
    class Hostile(FakeDataset):
        def sample(self, split, index):
            image = random_image(np.random.default_rng(index))
            return Sample("x", image, np.full((400, 640), 3, np.uint8), origin="a.parquet row 7")

    words = r"train\[0\] 'x': a.parquet row 7: column label has values 3..3, expected"
    with pytest.raises(DataError, match=words):
        write_shards(Hostile(train=1), "train", tmp_path)


def test_preprocessing_is_applied_once_and_recorded(tmp_path):
    dataset = FakeDataset(train=1)
    manifest = write_shards(dataset, "train", tmp_path / "a", preprocessing=GC)
    wanted = get_preprocessing(GC)(dataset.sample("train", 0).image)
    with open_shards(tmp_path / "a") as shards:
        np.testing.assert_array_equal(shards["image"][0], wanted)
    assert manifest["preprocessing"] == GC
    applied = FakeDataset(train=1, preprocessing=GC)
    for name, asked in (("b", GC), ("c", "none")):
        assert (
            write_shards(applied, "train", tmp_path / name, preprocessing=asked)["preprocessing"]
            == GC
        )
        check_equal(applied, tmp_path / name)


@pytest.fixture
def split(tmp_path):
    write_shards(FakeDataset(train=4), "train", tmp_path / "train", rows_per_shard=2)
    return tmp_path / "train"


def edit_manifest(split, edit):
    path = split / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda m: m.update(version=2),
            "has format version 2, this program reads 1",
        ),
        (lambda m: m.update(format="mds"), "is not a shard manifest: format is 'mds'"),
        (lambda m: m.pop("files"), "is damaged .*files"),
        (lambda m: m.update(files=3), "is damaged"),
        (lambda m: m.update(rows=5), "rows is 5, its files have 4"),
        (lambda m: m["files"][0].update(file="../shard-00000.arrow"), "a file named '../shard"),
        (lambda m: m["files"][0]["encodings"]["label"].update(encoding="zip"), "encoding 'zip'"),
        (lambda m: m["files"][1].update(rows=1) or m.update(rows=3), "columns and 1 rows"),
        (lambda m: m["files"][1]["encodings"].update(dist_map={"encoding": "raw"}), "00001.arrow"),
        (
            lambda m: m["files"][1]["encodings"]["spatial_weights"].update(value=2.0),
            "00001.arrow stores spatial_weights as",
        ),
    ],
)
def test_an_invalid_manifest_is_refused(split, edit, message):
    edit_manifest(split, edit)
    with pytest.raises(DataError, match=message) as caught:
        open_shards(split)
    assert "pipeline.materialize" in str(caught.value)


def test_damaged_files_are_refused_and_detected(split):
    second = split / "shard-00001.arrow"
    data = second.read_bytes()
    second.write_bytes(data[:-1])
    with pytest.raises(DataError, match=rf"shard-00001.arrow has {len(data) - 1} bytes, expected"):
        open_shards(split)
    second.write_bytes(b"\0" * len(data))
    with pytest.raises(DataError, match=r"shard-00001.arrow cannot be read"):
        open_shards(split)
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 4
    second.write_bytes(flipped)
    with open_shards(split):
        pass
    with pytest.raises(DataError, match=r"shard-00001.arrow has SHA-256"):
        verify(split)
    second.unlink()
    with pytest.raises(
        DataError, match=r"00001.arrow is missing; remove .*00001.arrow and rebuild"
    ):
        open_shards(split)
    with pytest.raises(DataError, match="contains splits, not shards"):
        open_shards(split.parent)
    with pytest.raises(DataError, match=r"has no manifest\.json"):
        open_shards(split / "nowhere")


def test_closing_pickling_and_forking(split):
    shards = open_shards(split)
    view = shards["image"][0]
    wanted = view.copy()
    copy = pickle.loads(pickle.dumps(shards))
    assert len(pickle.dumps(shards)) < 1000
    shards.close()
    shards.close()
    np.testing.assert_array_equal(view, wanted)
    with pytest.raises(ValueError, match="are closed"):
        shards.sample(0)
    with pytest.raises(ValueError, match="are closed"):
        shards["image"]
    assert copy.sample(0)["image"].tobytes() == wanted.tobytes()
    child = os.fork()
    if child == 0:
        os._exit(0 if copy.sample(0)["image"].tobytes() == wanted.tobytes() else 1)
    assert os.waitpid(child, 0)[1] == 0
    copy.close()


def test_opening_and_closing_leaks_nothing(split):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        with open_shards(split) as shards:
            shards.sample(0)
    assert len(os.listdir("/proc/self/fd")) == before
    assert str(split) not in Path("/proc/self/maps").read_text()


def test_only_one_process_may_write_to_a_directory(tmp_path):
    with directory_lock(tmp_path), pytest.raises(LockedError, match=f"pid {os.getpid()}"):
        write_shards(FakeDataset(train=1), "train", tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_an_unwritable_directory_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        write_shards(FakeDataset(train=1), "train", tmp_path / "file" / "train")


def test_a_split_has_at_most_512_files():
    assert default_rows_per_shard(1) == default_rows_per_shard(64 * 512) == 64
    assert default_rows_per_shard(64 * 512 + 1) == 128
    assert default_rows_per_shard(110_000) == 256


def test_cv2_threads_do_not_change_a_byte(tmp_path):
    threads = cv2.getNumThreads()
    try:
        for count in (1, 4):
            cv2.setNumThreads(count)
            dataset = FakeDataset(train=2)
            write_shards(dataset, "train", tmp_path / str(count), preprocessing=GC)
    finally:
        cv2.setNumThreads(threads)
    assert contents(tmp_path / "1") == contents(tmp_path / "4")
