"""Other programs, the documented examples, and a reader written from the specification."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest

from pupilseg.cli.main import main
from pupilseg.shards import open_shards, write_shards
from tests.helpers.fakes import FakeDataset
from tests.helpers.paths import ROOT

MARK = f"<!-- executed by tests/shards/{Path(__file__).name} -->\n```python\n"
EXAMPLES = [
    part.split("```")[0]
    for part in (ROOT / "docs" / "format.md").read_text(encoding="utf-8").split(MARK)[1:]
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with `shards/train` of two files: one compact, one with raw columns."""
    root = tmp_path_factory.mktemp("open")
    dataset = FakeDataset(train=12, odd_weights=frozenset({9}), odd_maps=frozenset({10}))
    write_shards(dataset, "train", root / "shards" / "train", rows_per_shard=8)
    return root


def test_the_documentation_has_its_examples():
    assert len(EXAMPLES) == 3
    shown = [line for line in EXAMPLES[0].splitlines() if line]
    assert len(shown) == 5, "a frame in five lines"


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples_run(folder, number):
    program = EXAMPLES[number]
    if "datasets.Dataset(table)" in program:
        program += (
            "assert frames.num_rows == table.num_rows == len(names) == 8\n"
            "ellipses = split.to_table(['ellipse_free'])['ellipse_free'].to_pylist()\n"
            "assert len(ellipses) == 12\n"
            "assert len(large.fetchall()) == sum(e[2] > 40 for e in ellipses) > 0\n"
            "assert pyarrow.total_allocated_bytes() < 2_000_000, 'columns were copied'\n"
        )
    env = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def read_by_the_specification(folder):
    """Yields each sample's columns, decoded in float64 from docs/format.md alone."""
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format"] == "pupilseg-shards"
    assert manifest["version"] == 1
    diagonal = np.hypot(399, 639)
    for entry in manifest["files"]:
        batch = pa.ipc.open_file(pa.memory_map(str(folder / entry["file"]))).get_batch(0)
        fields = {
            name: batch.column(name).values.to_numpy().reshape(entry["rows"], -1)
            for name in batch.schema.names[:-1]
        }
        how = {name: about["encoding"] for name, about in entry["encodings"].items()}
        for row in range(entry["rows"]):
            stored = {name: field[row] for name, field in fields.items()}
            bits = np.unpackbits(stored["label"], bitorder="little").reshape(400, 640)
            sample = {"name": batch.column("name")[row].as_py(), "label": bits}
            sample["image"] = stored["image"].reshape(400, 640)
            weights = stored["spatial_weights"]
            if how["spatial_weights"] == "bits":
                value = entry["encodings"]["spatial_weights"]["value"]
                weights = np.unpackbits(weights, bitorder="little") * np.float64(value)
            sample["spatial_weights"] = weights.reshape(400, 640)
            maps = stored["dist_map"]
            if how["dist_map"] == "u2":
                words = maps.reshape(400, 640).astype(np.int64)
                steps = np.diff(words, axis=1)
                steps -= 65536 * np.round(steps / 65536).astype(np.int64)
                first = stored["dist_map_first"].astype(np.int64)[:, None]
                u = np.sqrt(np.concatenate([first, first + np.cumsum(steps, axis=1)], axis=1))
                maps = np.stack([np.where(bits == c, 1 - u, u) / diagonal for c in (0, 1)])
            sample["dist_map"] = maps.reshape(2, 400, 640)
            yield sample | {name: stored[name] for name in ("ellipse", "ellipse_free")}


def test_a_reader_written_from_the_specification_gives_the_same_bits(folder):
    encodings = set()
    with open_shards(folder / "shards" / "train") as shards:
        count = 0
        for index, sample in enumerate(read_by_the_specification(folder / "shards" / "train")):
            wanted, count = shards.sample(index), count + 1
            assert sample.keys() == wanted.keys()
            for column, value in wanted.items():
                if column == "name":
                    assert sample[column] == value
                else:
                    np.testing.assert_array_equal(sample[column].astype(value.dtype), value, column)
        assert count == len(shards)
        for shard in shards.shards:
            encodings |= {(name, about["encoding"]) for name, about in shard.encodings.items()}
    assert {("dist_map", "u2"), ("dist_map", "raw"), ("spatial_weights", "raw")} < encodings


def test_from_file_of_datasets_reads_streams_only(folder):
    """As documented in docs/format.md; if this test fails, update the page."""
    datasets = pytest.importorskip("datasets")
    with pytest.raises(pa.ArrowInvalid):
        datasets.Dataset.from_file(str(folder / "shards/train/shard-00000.arrow"))


def test_show_draws_the_stored_sample(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert main(["shards", "show", "shards/train", "--index", "9"]) == 0
    assert "shards/train[9] 'train/9': train-00009.png" in capsys.readouterr().out
    with open_shards("shards/train") as shards:
        sample = shards.sample(9)
    drawn = cv2.imread("train-00009.png")
    assert drawn.shape == (1200, 1280, 3)
    parts = [drawn[y : y + 400, x : x + 640] for y in (0, 400, 800) for x in (0, 640)]
    clear = np.ones((400, 640), bool)
    clear[:150, :] = False  # captions
    image, labeled, weights, background, pupil, _ = (part[clear].astype(int) for part in parts)
    np.testing.assert_array_equal(image[:, 0], sample["image"][clear])
    inside = sample["label"][clear] == 1
    assert inside.any()
    changed = (labeled != image).any(axis=1)
    assert changed[inside].mean() > 0.98
    assert changed[~inside].mean() < 0.02, "outline and cross"
    scaled = sample["spatial_weights"][clear] * (255 / sample["spatial_weights"].max())
    np.testing.assert_array_equal(weights[:, 1], scaled.astype(np.uint8))
    for part, plane in ((background, sample["dist_map"][0]), (pupil, sample["dist_map"][1])):
        blue, red = part[:, 0] > part[:, 2], part[:, 2] > part[:, 0]
        np.testing.assert_array_equal(blue, plane[clear] < 0)
        np.testing.assert_array_equal(red, plane[clear] > 0)


def test_show_draws_a_blink_and_refuses_bad_arguments(tmp_path, capsys):
    class Blink(FakeDataset):
        def sample(self, split, index):
            sample = super().sample(split, index)
            return type(sample)("blink", sample.image, np.zeros_like(sample.label))

    write_shards(Blink(train=1), "train", tmp_path / "train")
    out = tmp_path / "blink.jpg"
    assert main(["shards", "show", str(tmp_path / "train"), "--out", str(out)]) == 0
    assert cv2.imread(str(out)).shape == (1200, 1280, 3)
    for words, message in [
        (["--index", "1"], "--index is 1, expected 0..0 for .*train"),
        (["--index", "-1"], "--index is -1"),
        (["--out", "picture.gif"], "expected a file name ending in .png or .jpg"),
    ]:
        assert main(["shards", "show", str(tmp_path / "train"), *words]) == 2
        assert re.search(message, capsys.readouterr().err)
