"""After kills and full disks, shards are complete or absent; flipped bits are detected."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pupilseg.errors import DataError, OutputError
from pupilseg.shards import open_shards, verify, write_shards
from tests.helpers.fakes import FakeDataset
from tests.helpers.victim import Victim
from tests.shards.test_shards import contents

KILLS = 30
BUILD = """
from tests.helpers.fakes import FakeDataset
from pupilseg.shards import write_shards

def run(folder):
    write_shards(FakeDataset(train=ROWS), "train", folder, rows_per_shard=PER_SHARD)
"""


def finished_shards(folder):
    """Returns inode and time of each shard that has a record."""
    records = folder.glob(".building/shard-*.json")
    return {record.stem: identity(folder, record.stem) for record in records}


def identity(folder, stem):
    stat = (folder / f"{stem}.arrow").stat()
    return stat.st_ino, stat.st_mtime_ns


def check_resumes(victim, folder, wanted):
    """Resumes an interrupted run and checks its result.

    The files have the expected bytes, and shards that were finished are not written again.

    Returns:
        The number of shards that were finished.
    """
    finished = finished_shards(folder)
    victim.run(folder)
    assert contents(folder) == wanted, folder.name
    assert {stem: identity(folder, stem) for stem in finished} == finished
    shutil.rmtree(folder)
    return len(finished)


@pytest.mark.long
@pytest.mark.integration
def test_thirty_kills_at_random_moments(tmp_path):
    """Each resumed run writes the same bytes as an uninterrupted one and keeps finished shards.

    `test_a_kill_before_each_change_to_a_file` covers every state on disk; this test adds kills
    during computations.
    """
    rng, unfinished, kept = random.Random(0), 0, 0
    with Victim(BUILD + "ROWS, PER_SHARD = 10, 2") as victim:
        victim.run(tmp_path / "warm-up")
        begin = time.monotonic()
        victim.run(tmp_path / "undisturbed")
        undisturbed_s = time.monotonic() - begin
        wanted = contents(tmp_path / "undisturbed")
        for number in range(KILLS):
            out = tmp_path / str(number)
            victim.run(out, after_s=rng.uniform(0, undisturbed_s))
            early = not (out / "manifest.json").exists()
            unfinished += early
            # The speed of a shared machine varies: adapt the range of moments to it.
            undisturbed_s *= 1.1 if early else 0.7
            kept += check_resumes(victim, out, wanted)
    assert unfinished >= KILLS // 2, "too many kills were after the end"
    assert kept >= KILLS // 2, "too few kills were after the first shard"


@pytest.mark.integration
def test_a_kill_before_each_change_to_a_file(tmp_path):
    """Covers every state on disk that a kill can leave."""
    with Victim(BUILD + "ROWS, PER_SHARD = 2, 1") as victim:
        victim.run(tmp_path / "undisturbed")
        wanted, kept = contents(tmp_path / "undisturbed"), {False: [], True: []}
        for folder in victim.each_kill(tmp_path):
            complete = (folder / "manifest.json").exists()
            kept[complete].append(check_resumes(victim, folder, wanted))
    assert list(dict.fromkeys(kept[False])) == [0, 1, 2], "shards are finished one after another"
    assert list(dict.fromkeys(kept[True])) == [2, 1, 0], "then their records are removed"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_leaves_no_partial_files(tmp_path, workers):
    """Uses a real small file system, if the user may mount one."""
    disk, dataset = tmp_path / "disk", FakeDataset(train=8)
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        with pytest.raises(OutputError, match=r"cannot write .*the disk is full; free some space"):
            write_shards(dataset, "train", disk / "out", rows_per_shard=2, workers=workers)
        left = [path.name for path in disk.rglob("*") if path.is_file()]
        assert sum(name.endswith(".arrow") for name in left) == 2, "shards that fit are kept"
        for name in left:
            assert re.fullmatch(r"shard-0000\d\.(arrow|json)", name), name
        with pytest.raises(DataError, match=r"is unfinished: it has no manifest\.json"):
            open_shards(disk / "out")
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        write_shards(dataset, "train", disk / "out", rows_per_shard=2, workers=workers)
        write_shards(dataset, "train", tmp_path / "wide", rows_per_shard=2)
        assert contents(disk / "out") == contents(tmp_path / "wide")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    out = tmp_path_factory.mktemp("split") / "train"
    write_shards(FakeDataset(train=4), "train", out, rows_per_shard=2)
    return out


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_is_detected_and_its_file_named(pristine, data):
    path = data.draw(st.sampled_from(sorted(pristine.iterdir())))
    whole = path.read_bytes()
    at, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    flipped = bytearray(whole)
    flipped[at] ^= 1 << bit
    try:
        path.write_bytes(flipped)
        with pytest.raises(DataError, match=re.escape(path.name)):
            verify(pristine)
    finally:
        path.write_bytes(whole)
    assert verify(pristine) == 4


def test_each_damaged_file_is_named_and_rebuilt_alone(tmp_path):
    dataset = FakeDataset(train=8)
    write_shards(dataset, "train", tmp_path, rows_per_shard=2)
    wanted = contents(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    for name in ("shard-00001.arrow", "shard-00003.arrow"):
        data = bytearray((tmp_path / name).read_bytes())
        data[-2000] ^= 16
        (tmp_path / name).write_bytes(data)
    (tmp_path / "shard-00002.arrow").write_bytes(b"short")
    with pytest.raises(DataError) as caught:
        verify(tmp_path)
    lines = str(caught.value).splitlines()
    assert [re.search(r"shard-\d+", line)[0] for line in lines] == [
        *("shard-00001", "shard-00002", "shard-00003")
    ]
    for line in lines:
        (tmp_path / re.search(r"remove (\S+) and rebuild it", line)[1]).unlink()
    write_shards(dataset, "train", tmp_path, rows_per_shard=2)
    assert contents(tmp_path) == wanted
    untouched = tmp_path / "shard-00000.arrow"
    assert untouched.stat().st_mtime_ns == before[untouched.name]


def test_digests_can_be_checked_with_sha256sum(pristine):
    sums = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"],
        cwd=pristine,
        capture_output=True,
        text=True,
        check=True,
    )
    assert sums.stdout.splitlines() == [
        *("shard-00000.arrow: OK", "shard-00001.arrow: OK", "manifest.json: OK")
    ]


def test_a_missing_list_and_an_unlisted_shard_are_named(tmp_path):
    write_shards(FakeDataset(train=2), "train", tmp_path)
    shutil.copy(tmp_path / "shard-00000.arrow", tmp_path / "shard-00007.arrow")
    (tmp_path / "SHA256SUMS").unlink()
    with pytest.raises(DataError) as caught:
        verify(tmp_path)
    lost, stray = str(caught.value).splitlines()
    assert "SHA256SUMS cannot be read" in lost
    assert "shard-00007.arrow is not in manifest.json" in stray


def test_rebuilding_a_shard_keeps_its_skipped_samples(tmp_path):
    dataset = FakeDataset(train=6, bad=frozenset({1, 4}))
    manifest = write_shards(dataset, "train", tmp_path, rows_per_shard=2, max_bad=2)
    (tmp_path / "shard-00001.arrow").unlink()
    assert write_shards(dataset, "train", tmp_path, rows_per_shard=2, max_bad=2) == manifest
    assert Path(tmp_path / "SHA256SUMS").exists()
