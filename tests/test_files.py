"""Complete or absent, whatever happens; one writer a directory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pupilseg.errors import DataError, LockedError, OutputError
from pupilseg.files import atomic_path, directory_lock, output_errors, read_json, write_json
from tests.helpers.paths import ROOT


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def start(code, *words):
    """Starts a Python program that says "ready" when it has come where it should."""
    program = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
    )
    assert program.stdout.readline() == "ready\n"
    return program


def test_success_leaves_the_file_alone_in_a_new_directory(tmp_path):
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


def test_killed_writer_leaves_nothing_that_the_next_does_not_remove(tmp_path):
    target = tmp_path / "x"
    with start(HALF, target) as program:
        program.send_signal(signal.SIGKILL)
    (leftover,) = names(tmp_path)
    assert leftover.startswith(".x.")
    with atomic_path(target) as temporary:
        temporary.write_text("whole")
    assert names(tmp_path) == ["x"]


def test_writer_at_work_is_left_alone(tmp_path):
    target = tmp_path / "x"
    with start(HALF, target) as program:
        write_json(target, {"by": "another"})
        program.communicate("go on")
    assert target.read_text() == "half"
    assert names(tmp_path) == ["x"]


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


def test_file_over_the_limit_is_an_output_error(tmp_path):
    with start(LIMITED, tmp_path / "x") as program:
        assert "larger than the file system" in program.stdout.read()
    assert names(tmp_path) == []


def test_full_disk_is_an_output_error():
    with (
        pytest.raises(OutputError, match=r"cannot write /dev/full: the disk is full; free"),
        output_errors(Path("/dev/full")),
        open("/dev/full", "wb", buffering=0) as file,
    ):
        file.write(b"x")


def test_paths_that_cannot_be(tmp_path):
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
def test_directory_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="no permission"):
        write_json(tmp_path / "x", {})
    with pytest.raises(OutputError, match="no permission"), directory_lock(tmp_path):
        pass


def test_fault_of_an_input_is_not_called_one_of_the_output(tmp_path):
    def read_inside():
        with atomic_path(tmp_path / "out" / "x"):
            (tmp_path / "input" / "missing").read_text()

    with pytest.raises(FileNotFoundError):
        read_inside()


def test_json_is_the_same_bytes_and_refuses_nan(tmp_path):
    write_json(tmp_path / "a", {"b": 1, "a": "ü"})
    assert (tmp_path / "a").read_text("utf-8") == '{\n  "b": 1,\n  "a": "ü"\n}\n'
    assert read_json(tmp_path / "a", mend="") == {"b": 1, "a": "ü"}
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a", float("nan"))
    (tmp_path / "b").write_bytes(b"\xff\xfe{")
    for name, words in [("b", "cannot read"), ("c", "does not exist")]:
        with pytest.raises(DataError, match=f"{words}.*do this"):
            read_json(tmp_path / name, mend="do this")


HOLD = """
import sys
from pupilseg.files import directory_lock
with directory_lock(sys.argv[1]):
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_lock_names_its_holder_and_waits_on_request(tmp_path, caplog):
    folder = tmp_path / "raw"
    with start(HOLD, folder) as program:
        with pytest.raises(LockedError, match=f"in use by pid {program.pid} on .* since 20"):
            directory_lock(folder).__enter__()
        began = time.monotonic()
        with pytest.raises(LockedError):
            directory_lock(folder, wait=True, timeout_s=0.3).__enter__()
        assert time.monotonic() - began >= 0.3
        assert f"held by pid {program.pid}" in caplog.text
        threading.Timer(0.3, program.stdin.close).start()
        with directory_lock(folder, wait=True, timeout_s=20):
            assert f"pid {os.getpid()} " in (folder / ".lock").read_text()
    assert names(folder) == []


def test_lock_of_a_killed_holder_is_free(tmp_path):
    with start(HOLD, tmp_path) as program:
        program.kill()
    with directory_lock(tmp_path):
        pass
    assert names(tmp_path) == []


def test_lock_lets_one_in_at_a_time(tmp_path):
    inside, worst = [], []

    def work():
        for _ in range(10):
            with directory_lock(tmp_path, wait=True, timeout_s=20):
                inside.append(1)
                worst.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert worst == [1] * 30


def test_lock_is_given_back_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), directory_lock(tmp_path):
        raise ZeroDivisionError
    with directory_lock(tmp_path):
        pass
