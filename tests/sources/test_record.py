"""Source strings, `download` and the record of a source."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import numpy as np
import pytest

from pupilseg.errors import DataError, OutputError, UsageError
from pupilseg.files import directory_lock
from pupilseg.sources import SourceOptions, download, open_dataset, parse_source
from tests.helpers.paths import ROOT
from tests.helpers.source_data import write_both, write_openeds
from tests.helpers.waiting import PATIENCE_S

REAL = ROOT.parent / "shared" / "openeds-sample"


@pytest.mark.parametrize(
    ("text", "revision", "kind", "shown"),
    [
        ("someone/eyes", None, "hub", "someone/eyes"),
        ("someone/eyes@v1.0", None, "hub", "someone/eyes@v1.0"),
        ("someone/eyes@refs/pr/1", None, "hub", "someone/eyes@refs/pr/1"),
        ("someone/eyes", "v1", "hub", "someone/eyes@v1"),
        ("someone/eyes@v1", "v1", "hub", "someone/eyes@v1"),
        ("synthetic:800", None, "synthetic", "synthetic:800"),
        ("synthetic:0800@07", None, "synthetic", "synthetic:800@7"),
    ],
)
def test_forms(text, revision, kind, shown):
    source = parse_source(text, revision)
    assert (source.kind, str(source)) == (kind, shown)


def test_an_existing_folder_takes_precedence_over_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_source("someone/eyes").kind == "hub"
    (tmp_path / "someone" / "eyes").mkdir(parents=True)
    source = parse_source("someone/eyes")
    assert (source.kind, source.location) == ("folder", str(tmp_path / "someone" / "eyes"))
    with pytest.raises(UsageError, match="has no revisions"):
        parse_source("someone/eyes", "main")


@pytest.mark.parametrize(
    ("text", "revision", "error", "words"),
    [
        ("nonsense", None, UsageError, "unknown source 'nonsense'; a source is one of"),
        ("", None, UsageError, "unknown source ''"),
        ("a/b/c", None, UsageError, "unknown source"),
        ("synthetic:x", None, UsageError, "unknown source"),
        ("synthetic:1", None, UsageError, "synthetic:2 or more"),
        ("synthetic:5", "main", UsageError, "no revisions"),
        ("./nowhere", None, DataError, "no such folder"),
        ("/nowhere/at/all", None, DataError, "no such folder"),
        ("a/b@v1", "v2", UsageError, "two revisions"),
    ],
)
def test_invalid_source_strings(text, revision, error, words):
    with pytest.raises(error, match=words):
        parse_source(text, revision)


@pytest.mark.parametrize(
    "options", [{"resize": "crop"}, {"validation_fraction": 0.0}, {"seed": -1}]
)
def test_options_are_checked(options):
    with pytest.raises(UsageError):
        SourceOptions(**options)


def test_second_source_is_refused_with_both_names(tmp_path):
    first, second = tmp_path / "one", tmp_path / "two"
    write_both(first)
    write_openeds(second / "S_1", range(2))
    path = download(str(first), tmp_path / "raw")
    before = path.read_bytes()
    with pytest.raises(DataError, match=rf"contains parquet:one, not .*two; .*rm {path}"):
        download(str(second), tmp_path / "raw")
    assert path.read_bytes() == before
    path.unlink()
    download(str(second), tmp_path / "raw")
    assert open_dataset(tmp_path / "raw").source == "openeds:two"


def test_second_call_writes_nothing_and_needs_no_lock(tmp_path):
    write_both(tmp_path / "one")
    path = download(str(tmp_path / "one"), tmp_path / "raw")
    before = path.stat().st_mtime_ns
    with directory_lock(tmp_path / "raw"):
        assert download(str(tmp_path / "one"), tmp_path / "raw") == path
    assert path.stat().st_mtime_ns == before
    assert sorted(p.name for p in (tmp_path / "raw").iterdir()) == ["source.json"]


def test_other_options_are_recorded(tmp_path):
    write_openeds(tmp_path / "eyes" / "S_1", range(4))
    download(str(tmp_path / "eyes"), tmp_path / "raw")
    options = SourceOptions(validation_fraction=0.5)
    download(str(tmp_path / "eyes"), tmp_path / "raw", options=options)
    assert open_dataset(tmp_path / "raw").count("validation") == 2


def test_a_damaged_or_missing_record(tmp_path):
    with pytest.raises(DataError, match=r"does not exist; .*pipeline.download --source SOURCE"):
        open_dataset(tmp_path)
    for text, words in [
        ("{", "cannot read"),
        ("[]", "holds a list"),
        ('{"format": 99}', "format 99, this version reads 1"),
        ('{"format": 1}', "is damaged .*remove it"),
    ]:
        (tmp_path / "source.json").write_text(text)
        with pytest.raises(DataError, match=words):
            open_dataset(tmp_path)


def test_an_unwritable_output(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        download("synthetic:4", tmp_path / "file" / "raw")


def test_rendered_source(tmp_path):
    synthetic = pytest.importorskip("pupilseg.synthetic")
    path = download("synthetic:5@3", tmp_path)
    data = open_dataset(tmp_path)
    assert (data.source, data.preprocessing) == ("synthetic:5@3", "none")
    assert (data.count("train"), data.count("validation")) == (4, 1)
    (sample,) = data.read("validation", 0, 1)
    rendered = synthetic.render(4, 3)
    np.testing.assert_array_equal(sample.image, rendered.image)
    np.testing.assert_array_equal(sample.label, rendered.classes == 3)
    assert sample.name not in [s.name for s in data.read("train", 3, 4)]
    manifest = json.loads(path.read_text())
    assert manifest["renderer_version"] == synthetic.RENDERER_VERSION
    path.write_text(json.dumps({**manifest, "renderer_version": -1}))
    with pytest.raises(DataError, match=r"version -1 of the renderer.*--source synthetic:5@3"):
        open_dataset(tmp_path)
    download("synthetic:5@3", tmp_path)
    assert open_dataset(tmp_path).count("train") == 4


def test_the_suggested_command_repeats_the_options(tmp_path):
    options = SourceOptions(augmented_validation=True, validation_fraction=0.4, seed=1)
    path = download("synthetic:5", tmp_path, options=options)
    manifest = json.loads(path.read_text())
    assert manifest["source"] == "synthetic:5@1"
    path.write_text(json.dumps({**manifest, "renderer_version": -1}))
    words = "--augmented-validation --validation-fraction 0.4 --seed 1$"
    with pytest.raises(DataError, match=words):
        open_dataset(tmp_path)


def run_download(*words, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "pipeline.download", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        **kwargs,
    )


def test_the_program_reports_the_source_and_plain_errors(tmp_path):
    write_both(tmp_path / "one")
    raw = str(tmp_path / "raw")
    done = run_download("--source", str(tmp_path / "one"), "--out", raw)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("parquet:one: 2 train, 1 validation (splits of the source)")
    for words, code in [
        (("--source", "nonsense", "--out", raw), 2),
        (("--source", "/nowhere", "--out", raw), 1),
        (("--source", "synthetic:4", "--out", raw), 1),
        (
            (
                "--source",
                "synthetic:4",
                "--out",
                str(tmp_path / "one" / "train" / "x" / ".." / "r"),
            ),
            0,
        ),
        (("--out", raw), 2),
    ]:
        done = run_download(*words)
        assert done.returncode == code, (words, done.stderr)
        assert "Traceback" not in done.stderr
        assert ("error: " in done.stderr) == (code != 0)


def test_a_second_program_waits_for_the_first(tmp_path):
    write_both(tmp_path / "one")
    with directory_lock(tmp_path / "raw"):
        program = subprocess.Popen(
            [
                *(sys.executable, "-m", "pipeline.download"),
                *("--source", tmp_path / "one", "--out", tmp_path / "raw"),
            ],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        assert "held by pid" in program.stderr.readline()
        time.sleep(0.3)
        assert program.poll() is None
    with program:
        assert program.wait(PATIENCE_S) == 0
    assert open_dataset(tmp_path / "raw").count("train") == 2


@pytest.mark.skipif(not REAL.is_dir(), reason="needs real OpenEDS frames beside the checkout")
def test_real_frames_in_three_layouts(tmp_path):
    from pupilseg.maps import distance_maps, spatial_weights

    counts = {"raw": (80, 20), "hub-preprocessed": (16, 8), "hub-augmented": (16, 2)}
    frames = {}
    for name, (train, validation) in counts.items():
        download(str(REAL / name), tmp_path / name)
        data = open_dataset(tmp_path / name)
        assert (data.count("train"), data.count("validation")) == (train, validation)
        assert data.preprocessing == ("gamma0.8+clahe1.5" if "pre" in name else "none")
        frames[name] = next(data.read("train", 0, 1))
    raw, augmented = frames["raw"], frames["hub-augmented"]
    # The first frame is the same in all three; revision B adds maps with the same definition.
    np.testing.assert_array_equal(augmented.image, raw.image)
    for other in (augmented, frames["hub-preprocessed"]):
        np.testing.assert_array_equal(other.label, raw.label)
    np.testing.assert_array_equal(augmented.dist_map, distance_maps(raw.label))
    np.testing.assert_array_equal(augmented.spatial_weights, spatial_weights(raw.label))
    assert frames["hub-preprocessed"].ellipse is not None
