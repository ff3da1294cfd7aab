"""Parquet files of both revisions: exact values, reading by range, and errors."""

from __future__ import annotations

import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pupilseg.errors import DataError
from pupilseg.geometry import ellipse_vector
from pupilseg.maps import distance_maps, spatial_weights
from pupilseg.sample import check_sample
from pupilseg.sources import SourceOptions, download, open_dataset
from pupilseg.sources.columns import ARRAYS, column_array
from tests.helpers.source_data import SHAPES, frame, list_array, table, write, write_both


def opened(source, out, **options):
    download(str(source), out, options=SourceOptions(**options))
    return open_dataset(out)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("layout", ["{}/part.parquet", "data/{}-00000-of-00001.parquet"])
def test_both_revisions_are_read_exactly(tmp_path, nested, layout):
    root = tmp_path / "eyes"
    write(root / layout.format("train"), table([0, 1, 2], nested=nested))
    write(root / layout.format("validation"), table([3], nested=nested))
    data = opened(root, tmp_path / "raw")
    assert data.source == "parquet:eyes"
    assert data.preprocessing == ("gamma0.8+clahe1.5" if nested else "none")
    assert data.split_rule == "splits of the source"
    assert (data.count("train"), data.count("validation")) == (3, 1)
    samples = [*data.read("train", 0, 3), *data.read("validation", 0, 1)]
    assert [s.name for s in samples] == [f"{n}.png" if nested else f"{n}" for n in range(4)]
    for number, sample in enumerate(samples):
        image, label = frame(number)
        np.testing.assert_array_equal(sample.image, image)
        np.testing.assert_array_equal(sample.label, label)
        np.testing.assert_array_equal(sample.spatial_weights, spatial_weights(label))
        np.testing.assert_array_equal(sample.dist_map, distance_maps(label))
        if nested:
            np.testing.assert_array_equal(sample.ellipse, ellipse_vector(label))
        else:
            assert sample.ellipse is None


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Three train files of 20, 3 and 19 rows in row groups of 7, without maps."""
    root = tmp_path_factory.mktemp("many")
    counts, start = (20, 3, 19), 0
    for index, count in enumerate(counts):
        columns = table(range(start, start + count), nested=False, maps=False)
        write(root / "train" / f"shard_{index}.parquet", columns, rows_per_group=7)
        start += count
    write(root / "val" / "shard_0.parquet", table([100], nested=False, maps=False))
    out = root.parent / "many-raw"
    download(str(root), out)
    return out


def sums(samples):
    return [(s.name, int(s.image.sum())) for s in samples]


def test_ranges_equal_the_whole_across_groups_and_files(many):
    data = open_dataset(many)
    whole = sums(data.read("train", 0, 42))
    assert whole == [(f"{n}", int(frame(n)[0].sum())) for n in range(42)]
    for start, stop in [(0, 0), (5, 9), (6, 7), (19, 24), (20, 23), (3, 42), (41, 42), (0, 1)]:
        assert sums(data.read("train", start, stop)) == whole[start:stop], (start, stop)
    # Forward, range by range, as a shard writer reads, with gaps for other workers.
    chunks = [sums(data.read("train", start, start + 5)) for start in range(0, 40, 10)]
    assert chunks == [whole[start : start + 5] for start in range(0, 40, 10)]


def test_two_readers_of_one_data_set_are_independent(many):
    data = open_dataset(many)
    whole = sums(data.read("train", 0, 42))
    pairs = zip(data.read("train", 2, 12), data.read("train", 25, 35), strict=True)
    assert [sums(pair) for pair in pairs] == [[whole[2 + i], whole[25 + i]] for i in range(10)]


def test_pickled_copy_reads_the_same(many):
    data = open_dataset(many)
    next(iter(data.read("train", 4, 9)))
    copy = pickle.loads(pickle.dumps(data))
    assert sums(copy.read("train", 4, 9)) == sums(data.read("train", 4, 9))
    assert copy.source == data.source


def test_ranges_out_of_bounds_are_refused(many):
    data = open_dataset(many)
    for start, stop in [(0, 43), (-1, 2), (5, 4)]:
        with pytest.raises(IndexError):
            list(data.read("train", start, stop))


def test_augmented_rows_are_optional(tmp_path):
    names = ["a", "a_flip", "a_blur.png", "a_lines", "b_flipped", "b"]
    for split in ("train", "validation"):
        columns = table(range(6), nested=False, maps=False)
        columns["filename"] = pa.array([f"{split[0]}{name}" for name in names])
        write(tmp_path / "eyes" / split / "s.parquet", columns, rows_per_group=4)
    data = opened(tmp_path / "eyes", tmp_path / "raw")
    assert data.count("train") == 6
    assert [s.name for s in data.read("validation", 0, 3)] == ["va", "vb_flipped", "vb"]
    assert [int(s.image.sum()) for s in data.read("validation", 1, 3)] == [
        int(frame(n)[0].sum()) for n in (4, 5)
    ]
    options = {"augmented_train": False, "augmented_validation": True}
    data = opened(tmp_path / "eyes", tmp_path / "raw2", **options)
    assert (data.count("train"), data.count("validation")) == (3, 6)


def test_names_that_repeat_are_made_unique(tmp_path):
    root = write_both(tmp_path / "eyes")
    columns = table([7, 8], nested=False, maps=False)
    columns["filename"] = pa.array(["0", "0"])
    write(root / "train" / "shard_00001.parquet", columns)
    names = [s.name for s in opened(root, tmp_path / "raw").read("train", 0, 4)]
    assert len(set(names)) == 4
    assert names[3] == "train/shard_00001.parquet#1:0"


def test_rows_without_names_are_numbered(tmp_path):
    root = write_both(tmp_path / "eyes")
    for path in root.rglob("*.parquet"):
        pq.write_table(pq.read_table(path).drop_columns("filename"), path)
    names = [s.name for s in opened(root, tmp_path / "raw").read("train", 0, 2)]
    assert names == ["train/shard_00000.parquet#0", "train/shard_00000.parquet#1"]


def test_sliced_arrays_keep_their_offsets():
    image = ARRAYS[0]
    for nested in (True, False):
        array = table(range(4), nested=nested, maps=False)["image"]
        got = column_array(image, array.slice(2, 1), "file", 2)
        np.testing.assert_array_equal(got[0], frame(2)[0])
        assert np.shares_memory(got, column_array(image, array, "file", 0))


def test_extension_type_is_read_like_its_storage(tmp_path):
    datasets = pytest.importorskip("datasets")
    root = write_both(tmp_path / "eyes")
    write(root / "train" / "shard_00000.parquet", table([5], nested=True))
    write(root / "validation" / "shard_00000.parquet", table([6], nested=True))
    assert datasets.Array2D  # registers the extension type with pyarrow
    schema = pq.read_schema(root / "train" / "shard_00000.parquet")
    assert isinstance(schema.field("image").type, pa.BaseExtensionType)
    (sample,) = opened(root, tmp_path / "raw").read("train", 0, 1)
    np.testing.assert_array_equal(sample.image, frame(5)[0])


def wrong(name, change):
    """Returns columns of three rows with one changed."""
    columns = table([0, 1, 2], nested=False)
    columns[name] = change(columns[name]) if name in columns else change(None)
    return {key: array for key, array in columns.items() if array is not None}


def raw(array, name):
    return np.array(array.flatten()).reshape(-1, *SHAPES[name])


def short_row(array):
    lengths = np.array([0, 256000, 256000 + 255999, 3 * 256000 - 1])
    return pa.ListArray.from_arrays(pa.array(lengths, pa.int32()), array.flatten()[:-1])


def with_null_value(array):
    values = array.flatten().to_pylist()
    values[256000 * 2 + 5] = None
    return pa.ListArray.from_arrays(array.offsets, pa.array(values, array.type.value_type))


def with_value(array, value):
    values = np.array(array.flatten())
    values[len(values) * 2 // 3 + 5] = value
    return pa.ListArray.from_arrays(array.offsets, pa.array(values))


def nested_400_by_639(array):
    return list_array(raw(array, "image")[:, :, :639].copy(), (400, 639))


ELLIPSES = pa.array([0.5, None, 0.5], pa.float32())


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("image", lambda _: None, "s.parquet: column image is missing; expected lists of uint8"),
        ("label", lambda _: None, "column label is missing"),
        (
            "image",
            short_row,
            r"s.parquet row 1: column image has a list of 255999 values, expected",
        ),
        ("image", nested_400_by_639, "row 0: column image has a list of 639 values"),
        ("image", with_null_value, "row 2: column image holds a null"),
        (
            "label",
            lambda a: pa.array([*a[:2].to_numpy(False), None], a.type),
            "row 2: .*label.*null",
        ),
        ("image", lambda a: a.cast(pa.list_(pa.int16())), "column image is list.*int16.*expected"),
        ("image", lambda _: pa.array(["x", "y", "z"]), "column image is string, expected lists"),
        ("image", lambda a: pa.array([[[b]] for b in range(3)]), "column image is list"),
        ("label", lambda a: with_value(a, 3), "row 2: column label has values 0..3"),
        ("spatial_weights", lambda a: with_value(a, np.nan), "row 2: .*spatial_weights holds NaN"),
        ("dist_map", lambda a: with_value(a, np.inf), "row 2: column dist_map holds NaN or inf"),
        ("filename", lambda _: pa.array([1, 2, 3]), "column filename is int64, expected string"),
        ("cx", lambda _: ELLIPSES, "has the columns .'cx'. but not all of"),
        ("preprocessed", lambda _: pa.array([True, False, True]), "preprocessed is true in some"),
        ("preprocessed", lambda _: pa.array([1, 0, 1]), "preprocessed is int64, expected bool"),
    ],
)
def test_wrong_columns_are_refused_by_name(tmp_path, name, change, words):
    columns = wrong(name, change)
    write(tmp_path / "eyes" / "train" / "s.parquet", columns)
    write(tmp_path / "eyes" / "validation" / "s.parquet", columns)
    with pytest.raises(DataError, match=words):
        list(map(check_sample, opened(tmp_path / "eyes", tmp_path / "raw").read("train", 0, 3)))


def test_null_ellipse_is_refused(tmp_path):
    columns = table([0, 1, 2], nested=True)
    columns["rx"] = ELLIPSES
    for split in ("train", "validation"):
        write(tmp_path / "eyes" / split / "s.parquet", columns)
    with pytest.raises(DataError, match="row 1: column rx is null"):
        list(opened(tmp_path / "eyes", tmp_path / "raw").read("train", 0, 3))


def test_files_with_other_columns_are_refused(tmp_path):
    root = write_both(tmp_path / "eyes")
    write(root / "train" / "t.parquet", table([4], nested=False))
    with pytest.raises(DataError, match=r"t.parquet has the columns .* but .*shard_00000.parquet"):
        opened(root, tmp_path / "raw")


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        (["train/a.parquet"], "has no validation split; expected .* found: train"),
        (["val/a.parquet"], "has no train split.*found: validation"),
        (["train/a.parquet", "test/b.parquet"], "no validation.*test split is never used"),
        (["a.parquet"], "a.parquet belongs to no known split"),
        (["training_data.parquet", "validated.parquet"], "belongs to no known split"),
    ],
)
def test_missing_split_is_named(tmp_path, paths, words):
    for path in paths:
        write(tmp_path / "eyes" / path, table([0], nested=False, maps=False))
    with pytest.raises(DataError, match=words):
        opened(tmp_path / "eyes", tmp_path / "raw")


@pytest.mark.parametrize("names", [("Train", "VAL"), ("training", "valid"), ("train", "dev")])
def test_spellings_of_splits(tmp_path, names):
    for number, name in enumerate((*names, "test")):
        write(tmp_path / "e" / name / "a.parquet", table([number], nested=False, maps=False))
    data = opened(tmp_path / "e", tmp_path / "raw")
    assert (data.count("train"), data.count("validation")) == (1, 1)


def test_damaged_files_are_named(tmp_path):
    root = write_both(tmp_path / "eyes")
    file = root / "train" / "shard_00000.parquet"
    good = file.read_bytes()
    file.write_bytes(good[: len(good) // 2])
    with pytest.raises(DataError, match=r"shard_00000.parquet is not a readable parquet file"):
        opened(root, tmp_path / "raw")
    file.write_bytes(good)
    data = opened(root, tmp_path / "raw")
    file.write_bytes(good[:8] + bytes(len(good) // 2) + good[8 + len(good) // 2 :])
    with pytest.raises(DataError, match=r"shard_00000.parquet"):
        list(data.read("train", 0, 2))
    file.write_bytes(good[:-1])
    with pytest.raises(DataError, match=r"changed since .* python -m pipeline.download --source"):
        open_dataset(tmp_path / "raw")
