"""ensure_shards and the materialize stage on rendered eyes."""

import os
import shutil
import subprocess
import sys

import pytest

from pupilseg.errors import DataError
from pupilseg.prepare import ensure_shards
from pupilseg.shards import open_shards, verify
from pupilseg.sources import SourceOptions


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    ensure_shards(path, "synthetic:6", workers=1)
    return path


def stamps(path):
    return {p: p.stat().st_mtime_ns for p in path.rglob("*") if p.is_file()}


def test_both_splits_are_built(data_dir):
    assert {s: verify(data_dir / "shards" / s) for s in ("train", "validation")} in (
        {"train": 5, "validation": 1},
        {"train": 4, "validation": 2},
    )
    with open_shards(data_dir / "shards" / "train") as shards:
        assert shards.manifest["source"] == "synthetic:6@0"
        assert shards.manifest["source_options"] == SourceOptions().as_dict()


def test_a_second_call_reads_no_raw_data_and_writes_nothing(data_dir, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(data_dir, copy)
    shutil.rmtree(copy / "raw")
    before = stamps(copy)
    assert ensure_shards(copy, "synthetic:6") == copy / "shards"
    assert ensure_shards(copy, "synthetic:6@0") == copy / "shards"
    assert stamps(copy) == before


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("synthetic:7", {}, "contains synthetic:6@0, not synthetic:7; use another --data-dir"),
        ("owner/name", {}, "contains synthetic:6@0, not owner/name"),
        ("synthetic:6", {"preprocessing": "gamma0.8+clahe1.5"}, "preprocessing none, not gamma"),
        ("synthetic:6", {"options": SourceOptions(validation_fraction=0.5)}, "0.5"),
    ],
)
def test_another_source_or_option_is_refused(data_dir, source, options, message):
    before = stamps(data_dir)
    with pytest.raises(DataError, match=message) as caught:
        ensure_shards(data_dir, source, **options)
    assert f"rm -r {data_dir / 'shards'}" in str(caught.value)
    assert stamps(data_dir) == before


def test_a_missing_split_is_rebuilt(data_dir, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(data_dir, copy)
    wanted = (copy / "shards" / "train" / "shard-00000.arrow").read_bytes()
    shutil.rmtree(copy / "shards" / "train")
    ensure_shards(copy, "synthetic:6", workers=1)
    assert (copy / "shards" / "train" / "shard-00000.arrow").read_bytes() == wanted


def run(*words, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", *words], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=cwd,
    )  # fmt: skip


def test_the_stage_reports_its_result_and_errors(data_dir, tmp_path, pytestconfig):
    root = pytestconfig.rootpath
    out = tmp_path / "out"
    done = run("pipeline.materialize", "--raw", str(data_dir / "raw"), "--out", str(out), cwd=root)
    assert done.returncode == 0, done.stderr
    assert "samples, 0.8" in done.stdout
    for split in ("train", "validation"):
        with open_shards(out / split) as made, open_shards(data_dir / "shards" / split) as wanted:
            assert made.manifest == wanted.manifest, "two workers, same bytes"
    for words, code in (
        (["--raw", str(tmp_path / "nowhere"), "--out", str(out)], 1),
        (["--raw", str(data_dir / "raw"), "--out", str(out), "--workers", "0"], 2),
    ):
        failed = run("pipeline.materialize", *words, cwd=root)
        assert failed.returncode == code
        assert failed.stderr.splitlines()[-1].startswith("error: ")
        assert "Traceback" not in failed.stderr
