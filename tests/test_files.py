"""Atomic writes, locks and JSON files, with processes that are killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import filelock
import pytest

from pupilseg.errors import DataError, LockedError, OutputError
from pupilseg.files import (
    atomic_path,
    directory_lock,
    output_errors,
    read_json,
    remove_leftovers,
    write_json,
)
from tests.helpers.paths import ROOT
from tests.helpers.waiting import PATIENCE_S


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@contextlib.contextmanager
def started(code, *words):
    """Runs a Python program, from the moment it prints "ready"; kills it if the test fails."""
    with subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
    ) as program:
        try:
            assert program.stdout.readline() == "ready\n"
            yield program
        except BaseException:
            program.kill()
            raise


# Atomic writes


def test_success_leaves_only_the_file_in_a_new_directory(tmp_path):
    target = tmp_path / "a" / "b" / "model.pt"
    with atomic_path(target) as temporary:
        temporary.write_bytes(b"12")
        assert not target.exists()
        assert temporary.parent == target.parent
    assert target.read_bytes() == b"12"
    assert names(target.parent) == ["model.pt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_failure_keeps_the_old_file(tmp_path, error):
    target = tmp_path / "x"
    target.write_text("old")

    def fail():
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert target.read_text() == "old"
    assert names(tmp_path) == ["x"]


HALF = """
import sys, time
from pupilseg.files import atomic_path
with atomic_path(sys.argv[1]) as temporary:
    temporary.write_text("half")
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_the_next_writer_removes_the_temporary_file_of_a_killed_process(tmp_path):
    with started(HALF, tmp_path / "x") as program:
        program.send_signal(signal.SIGKILL)
    (leftover,) = names(tmp_path)
    assert leftover.startswith(".x.")
    with atomic_path(tmp_path / "y") as temporary:
        temporary.write_text("whole")
    assert names(tmp_path) == ["y"]


def test_remove_leftovers_keeps_the_files_of_others(tmp_path):
    with started(HALF, tmp_path / "x") as running:
        with started(HALF, tmp_path / "x") as program:
            program.kill()
        kept = [".x.another-host-1-0.part", ".part", "x"]
        for name in kept:
            (tmp_path / name).write_text("")
        assert len(names(tmp_path)) == 5
        remove_leftovers(tmp_path)
        (temporary,) = set(names(tmp_path)) - set(kept)
        assert f"-{running.pid}-" in temporary
        running.communicate("end")
    assert names(tmp_path) == sorted(kept)


def test_a_running_writer_is_left_alone(tmp_path):
    target = tmp_path / "x"
    with started(HALF, target) as program:
        write_json(target, {"by": "another"})
        program.communicate("end")
    assert target.read_text() == "half"
    assert names(tmp_path) == ["x"]


def test_a_write_does_not_list_the_directory(tmp_path, monkeypatch):
    """Listing it at each write made many writes quadratic: 46 ms with 20,000 other files."""
    listed = []

    def counting(real):
        return lambda *args: listed.append(args) or real(*args)

    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, counting(getattr(os, name)))
    for number in range(50):
        write_json(tmp_path / f"{number}.json", {})
    assert len(listed) == 1, "once, for the directory, not for each file"


def test_flush_false_makes_no_fsync(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    for flush in (False, True):
        with atomic_path(tmp_path / "x", flush=flush) as temporary:
            temporary.write_text("x")
        assert len(synced) == (2 if flush else 0)


def test_two_threads_write_one_file(tmp_path):
    def work(number):
        for _ in range(20):
            write_json(tmp_path / "x", [number] * 1000)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(json.loads((tmp_path / "x").read_text()))) == 1
    assert names(tmp_path) == ["x"]


# Errors


LIMITED = """
import resource, sys
from pathlib import Path
from pupilseg.files import atomic_path
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
from pupilseg.errors import OutputError
print("ready", flush=True)
try:
    with atomic_path(sys.argv[1]) as temporary:
        temporary.write_bytes(bytes(5000))
except OutputError as error:
    print(error)
"""


def test_a_file_over_the_size_limit_is_an_output_error(tmp_path):
    with started(LIMITED, tmp_path / "x") as program:
        assert "larger than the file system" in program.stdout.read()
    assert names(tmp_path) == []


def test_a_full_disk_is_an_output_error():
    with (
        pytest.raises(OutputError, match=r"cannot write /dev/full: the disk is full; free"),
        output_errors(Path("/dev/full")),
        open("/dev/full", "wb", buffering=0) as file,
    ):
        file.write(b"x")


def test_invalid_paths(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path, words in [
        (tmp_path / "file" / "x", "a file is where a directory must be"),
        (tmp_path / "file" / "y" / "x", "a part of the path is a file"),
        (tmp_path / "folder", "a directory is where the file must be"),
        (tmp_path / ("n" * 300), "name is too long"),
    ]:
        with pytest.raises(OutputError, match=words):
            write_json(path, {})
    assert names(tmp_path) == ["file", "folder"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="no permission"):
        write_json(tmp_path / "x", {})
    with pytest.raises(OutputError, match="no permission"), directory_lock(tmp_path):
        pass


def test_an_input_error_is_not_reported_as_an_output_error(tmp_path):
    def read_inside():
        with atomic_path(tmp_path / "out" / "x"):
            (tmp_path / "input" / "missing").read_text()

    with pytest.raises(FileNotFoundError):
        read_inside()


# JSON


def test_json_is_reproducible_and_rejects_nan(tmp_path):
    write_json(tmp_path / "a", {"b": 1, "a": "ü"})
    assert (tmp_path / "a").read_text("utf-8") == '{\n  "b": 1,\n  "a": "ü"\n}\n'
    assert read_json(tmp_path / "a", hint="") == {"b": 1, "a": "ü"}
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a", float("nan"))
    (tmp_path / "b").write_bytes(b"\xff\xfe{")
    for name, words in [("b", "cannot read"), ("c", "does not exist")]:
        with pytest.raises(DataError, match=f"{words}.*do this"):
            read_json(tmp_path / name, hint="do this")


# Locks


HOLD = """
import sys
from pupilseg.files import directory_lock
with directory_lock(sys.argv[1]):
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_a_lock_names_its_holder_and_waits_on_request(tmp_path, caplog):
    folder = tmp_path / "raw"
    with started(HOLD, folder) as program:
        for _ in range(2):  # an attempt that fails does not overwrite the holder's name
            with pytest.raises(LockedError, match=f"in use by pid {program.pid} on .* since 20"):
                directory_lock(folder).__enter__()
        began = time.monotonic()
        with pytest.raises(LockedError, match=f"in use by pid {program.pid} on "):
            directory_lock(folder, wait=True, timeout_s=0.3).__enter__()
        assert time.monotonic() - began >= 0.3
        assert f"held by pid {program.pid}" in caplog.text
        threading.Timer(0.3, program.stdin.close).start()
        with directory_lock(folder, wait=True, timeout_s=PATIENCE_S):
            assert f"pid {os.getpid()} " in (folder / ".lock").read_text()
    assert names(folder) == []


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    with started(HOLD, tmp_path) as program:
        program.kill()
    assert names(tmp_path) == [".lock"]
    with directory_lock(tmp_path):
        pass
    assert names(tmp_path) == []


def test_a_lock_admits_one_thread_at_a_time(tmp_path):
    inside, worst = [], []

    def work():
        for _ in range(10):
            with directory_lock(tmp_path, wait=True, timeout_s=PATIENCE_S):
                inside.append(1)
                worst.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert worst == [1] * 30
    assert names(tmp_path) == []


TAKE_TURNS = """
import sys
from pathlib import Path
from pupilseg import files
files._POLL_SECONDS = 0.001
print("ready", flush=True)
counter = Path(sys.argv[1]).with_name("counter")
for _ in range(40):
    with files.directory_lock(sys.argv[1], wait=True):
        value = int(counter.read_text())
        counter.write_text(str(value + 1))
"""


def test_a_lock_admits_one_process_at_a_time_even_though_its_file_is_removed(tmp_path):
    (tmp_path / "counter").write_text("0")
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(started(TAKE_TURNS, tmp_path / "locked"))
    assert (tmp_path / "counter").read_text() == "120"
    assert names(tmp_path / "locked") == []


def test_the_lock_file_is_removed_before_the_lock_is_released(tmp_path, monkeypatch):
    """If it were removed later, another process might already have locked it."""
    existed = []
    release = filelock.UnixFileLock.release

    def spy(lock, force=False):
        existed.append((tmp_path / ".lock").exists())
        release(lock, force)

    monkeypatch.setattr(filelock.UnixFileLock, "release", spy)
    with directory_lock(tmp_path):
        pass
    assert existed[:1] == [False]


def test_a_lock_is_released_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), directory_lock(tmp_path):
        raise ZeroDivisionError
    with directory_lock(tmp_path):
        pass


def test_a_symbolic_link_as_lock_file_is_not_followed(tmp_path):
    target = tmp_path / "target"
    target.write_text("precious")
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked" / ".lock").symlink_to(target)
    with (
        pytest.raises(OutputError, match="a symbolic link is where the file must be"),
        directory_lock(tmp_path / "locked"),
    ):
        pass
    assert target.read_text() == "precious"


def test_a_file_system_without_locks_gets_a_soft_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(filelock, "FileLock", filelock.SoftFileLock)
    with (
        directory_lock(tmp_path),
        pytest.raises(LockedError, match=f"{tmp_path} is in use by "),
        directory_lock(tmp_path),
    ):
        pass
    assert names(tmp_path) == []
