"""Files that are complete or absent, and one writer a directory.

A file is written under a hidden temporary name in the same directory, flushed to the disk and then
renamed, so a kill at any moment leaves the old file or none. What a killed process leaves behind
(`.NAME.HOST-PID-N.part`) is removed by the next write of the same file on the same machine.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pupilseg.errors import DataError, LockedError, OutputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

log = logging.getLogger(__name__)

LOCK_NAME = ".lock"
_POLL_SECONDS = 0.2
_counter = itertools.count()

_ALWAYS_OUTPUT = {
    errno.ENOSPC: "the disk is full; free some space and run the same command again",
    errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
    errno.EFBIG: "the file is larger than the file system or `ulimit -f` allows",
    errno.EROFS: "the file system is read-only; choose another output directory",
}
"""Faults that only writing can raise, whatever file they name, and the mend."""
_IF_OURS = {
    errno.EACCES: "no permission; make the directory writable or choose another one",
    errno.EPERM: "not permitted; make the directory writable or choose another one",
    errno.ENOTDIR: "a part of the path is a file; remove it or choose another directory",
    errno.EEXIST: "a file is where a directory must be; remove it or choose another directory",
    errno.EISDIR: "a directory is where the file must be; remove it or choose another name",
    errno.ENOENT: "the directory vanished while it was written to; run the same command again",
    errno.ENAMETOOLONG: "the name is too long for the file system; choose a shorter one",
    errno.EIO: "the disk reports an I/O fault; check it, or choose another output directory",
}
"""Faults that reading can raise too: the output's only where the error names no file, or ours."""


@contextlib.contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turns an `OSError` that writing `path` can cause into an `OutputError` with its mend.

    Raises:
        OutputError: full or read-only disk, quota, no permission, a file in the way.
        OSError: anything else, as it was.
    """
    try:
        yield
    except OSError as error:
        mend = _ALWAYS_OUTPUT.get(error.errno or 0)
        if mend is None and _names(error, path):
            mend = _IF_OURS.get(error.errno or 0)
        if mend is None:
            raise
        reason = os.strerror(error.errno or 0)
        raise OutputError(f"cannot write {path}: {mend} ({reason})") from error


def _names(error: OSError, path: Path) -> bool:
    """Says whether an error is about `path`: it names none, or one in or above its directory."""
    if not isinstance(error.filename, str | os.PathLike):
        return error.filename is None
    named, directory = Path(error.filename).absolute(), path.absolute().parent
    return directory in (named.parent, named) or named in directory.parents


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str], *, flush: bool = True) -> Iterator[Path]:
    """Yields a temporary sibling to write to; it becomes `path` only if the block succeeds.

    The parent directory is made. At the end of the block the file and then the directory are
    flushed to the disk around the rename. If the block raises, nothing is left and an older
    `path` stays as it was.

    Args:
        path: what is to be written.
        flush: wait for the disk. Without, a loss of power may leave damage under `path`: for files
            whose digest is checked before they count, or that are given to `flush_files` later.

    Raises:
        OutputError: the disk is full or read-only, or `path` may not be written.
    """
    path = Path(path)
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        temporary = path.with_name(
            f".{path.name}.{socket.gethostname()}-{os.getpid()}-{next(_counter)}.part"
        )
        try:
            yield temporary
            if flush:
                _sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if flush:
            _sync(path.parent)


def flush_files(paths: Iterable[Path]) -> None:
    """Flushes files of one directory to the disk, then the directory.

    Raises:
        OutputError: as `atomic_path`.
    """
    parents = set()
    for path in paths:
        with output_errors(path):
            _sync(path)
        parents.add(path.parent)
    for parent in parents:
        with output_errors(parent):
            _sync(parent)


def _sync(path: Path) -> None:
    """Flushes a file or a directory entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_leftovers(path: Path) -> None:
    """Removes temporary files of `path` whose process on this machine is gone."""
    prefix = f".{path.name}.{socket.gethostname()}-"
    for leftover in path.parent.iterdir():
        if not (leftover.name.startswith(prefix) and leftover.name.endswith(".part")):
            continue
        pid = leftover.name[len(prefix) :].split("-")[0]
        if pid.isdigit() and not _alive(int(pid)):
            leftover.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    """Says whether a process of this machine runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text as UTF-8, atomically.

    Raises:
        OutputError: as `atomic_path`.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def json_text(value: Any) -> str:
    """Returns a value as indented JSON; the same value gives the same text.

    Raises:
        ValueError: the value holds NaN or infinity, which JSON has no name for.
    """
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a value as `json_text`, atomically.

    Raises:
        OutputError: as `atomic_path`.
        ValueError: as `json_text`.
    """
    write_text(path, json_text(value))


def read_json(path: str | os.PathLike[str], *, mend: str) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Args:
        path: the file.
        mend: what to do if it is missing or damaged, to end the error with.

    Raises:
        DataError: the file is missing, not JSON, or not an object.
    """
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; {mend}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}; {mend}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds a {type(value).__name__}, expected an object; {mend}")
    return value


@contextlib.contextmanager
def directory_lock(
    directory: str | os.PathLike[str], *, wait: bool = False, timeout_s: float | None = None
) -> Iterator[None]:
    """Holds a directory for one process (`flock` on `DIR/.lock`); the kernel frees it on any end.

    The lock file says who holds it and is removed at the end, so that tools which digest the
    directory (DVC) never see it.

    Args:
        directory: made if it is missing.
        wait: wait for another holder instead of raising; says once in the log for whom.
        timeout_s: longest wait in seconds; None waits for ever.

    Raises:
        LockedError: another process holds it, named with pid, host and time.
        OutputError: the directory cannot be written.
    """
    path = Path(directory) / LOCK_NAME
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    said = False
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        while (descriptor := _try_lock(path)) is None:
            holder = _holder(path)
            if not wait or (deadline is not None and time.monotonic() >= deadline):
                raise LockedError(
                    f"{path.parent} is in use by {holder}; wait for it to end, or end it"
                )
            if not said:
                log.warning("waiting for %s, held by %s", path.parent, holder)
                said = True
            time.sleep(_POLL_SECONDS)
    try:
        yield
    finally:
        # Removed while still held: a waiter that opened the old file sees the inode differ.
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _try_lock(path: Path) -> int | None:
    """Returns the locked descriptor of `path`, or None if another process holds it."""
    import fcntl  # absent on Windows, where everything but locking still works

    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its holder may have removed the file between our open and our lock: then once more.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                since = time.strftime("%Y-%m-%dT%H:%M:%S%z")
                text = f"pid {os.getpid()} on {socket.gethostname()} since {since}\n"
                os.ftruncate(descriptor, 0)
                os.write(descriptor, text.encode())
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _holder(path: Path) -> str:
    """Returns what the lock file says about its holder."""
    try:
        return path.read_text(encoding="utf-8").strip() or "another process"
    except OSError:
        return "another process"
