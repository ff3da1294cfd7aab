"""Atomic file writes, locks between processes, and JSON files.

A file is written under a hidden temporary name in its own directory (`.NAME.HOST-PID-N.part`),
flushed to disk and renamed, so that `NAME` is never partially written, even if the process is
killed. A killed process can leave its temporary file behind; the next process on the same machine
that writes into the directory removes it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import logging
import os
import re
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
_cleaned: set[str] = set()
"""Directories in which this process has already removed leftover temporary files."""

_ALWAYS_OUTPUT = {
    errno.ENOSPC: "the disk is full; free some space and run the same command again",
    errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
    errno.EFBIG: "the file is larger than the file system or `ulimit -f` allows",
    errno.EROFS: "the file system is read-only; choose another output directory",
}
"""Hints for errors that only writing can raise."""
_OUTPUT_IF_NAMED = {
    errno.EACCES: "no permission; make the directory writable or choose another one",
    errno.EPERM: "not permitted; make the directory writable or choose another one",
    errno.ENOTDIR: "a part of the path is a file; remove it or choose another directory",
    errno.EEXIST: "a file is where a directory must be; remove it or choose another directory",
    errno.EISDIR: "a directory is where the file must be; remove it or choose another name",
    errno.ELOOP: "a symbolic link is where the file must be; remove it or choose another directory",
    errno.ENOENT: "the directory disappeared during the write; run the same command again",
    errno.ENAMETOOLONG: "the name is too long for the file system; choose a shorter one",
    errno.EIO: "the disk reports an I/O error; check it, or choose another output directory",
}
"""Hints for errors that reading can also raise; used only if the error concerns the output path."""


@contextlib.contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Converts an `OSError` caused by writing `path` into an `OutputError` with a hint.

    Raises:
        OutputError: the disk is full or read-only, a quota is used up, permission is missing, or a
            file is in the way.
        OSError: any other error, unchanged.
    """
    try:
        yield
    except OSError as error:
        hint = _ALWAYS_OUTPUT.get(error.errno or 0)
        if hint is None and _concerns(error, path):
            hint = _OUTPUT_IF_NAMED.get(error.errno or 0)
        if hint is None:
            raise
        reason = os.strerror(error.errno or 0)
        raise OutputError(f"cannot write {path}: {hint} ({reason})") from error


def _concerns(error: OSError, path: Path) -> bool:
    """Returns True if the error names no file, or one in or above the directory of `path`."""
    if not isinstance(error.filename, str | os.PathLike):
        return error.filename is None
    named, directory = Path(error.filename).absolute(), path.absolute().parent
    return directory in (named.parent, named) or named in directory.parents


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str], *, flush: bool = True) -> Iterator[Path]:
    """Yields a temporary path in the same directory, and renames it to `path` on success.

    Creates the parent directory. If the block raises, the temporary file is removed and an existing
    `path` stays unchanged.

    Args:
        path: the file to write.
        flush: call fsync on the file before the rename and on the directory after it. Without it a
            power failure may leave a damaged `path`, so use False only for files that are cheap to
            lose, checked by digest, or passed to `flush_files` later.

    Raises:
        OutputError: the disk is full or read-only, or `path` cannot be written.
    """
    path = Path(path)
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Once per process, not per write: listing 20,000 files takes 13 ms, on a slow disk 46 ms.
        directory = os.path.abspath(path.parent)
        if directory not in _cleaned:
            _cleaned.add(directory)
            remove_leftovers(path.parent)
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
    """Calls fsync on files, then on their directories.

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
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(directory: Path) -> None:
    """Removes temporary files of processes on this machine that no longer run.

    Raises:
        OSError: the directory cannot be listed or written.
    """
    pattern = re.compile(rf"\..+\.{re.escape(socket.gethostname())}-(\d+)-\d+\.part")
    with os.scandir(directory) as entries:
        for entry in entries:
            match = pattern.fullmatch(entry.name)
            if match and not _is_running(int(match[1])):
                Path(entry.path).unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
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
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes text as UTF-8, atomically.

    Raises:
        OutputError: as `atomic_path`.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def json_text(value: Any) -> str:
    """Returns a value as indented JSON; equal values give equal text.

    Raises:
        ValueError: the value contains NaN or infinity, which JSON cannot represent.
    """
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a value as `json_text`, atomically.

    Raises:
        OutputError: as `atomic_path`.
        ValueError: as `json_text`.
    """
    write_text(path, json_text(value))


def read_json(path: str | os.PathLike[str], *, hint: str) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Args:
        path: the file.
        hint: how to fix a missing or damaged file; ends the error message.

    Raises:
        DataError: the file is missing, not JSON, or not an object.
    """
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; {hint}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}; {hint}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds a {type(value).__name__}, expected an object; {hint}")
    return value


@contextlib.contextmanager
def directory_lock(
    directory: str | os.PathLike[str], *, wait: bool = False, timeout_s: float | None = None
) -> Iterator[None]:
    """Locks a directory for one process with `DIR/.lock`; see `file_lock`.

    Args:
        directory: created if missing.
        wait: wait for another holder instead of raising; logs the holder once.
        timeout_s: longest wait in seconds; None waits without limit.

    Raises:
        LockedError: another process holds the lock; the message names its pid, host and start time.
        OutputError: the directory cannot be written.
    """
    directory = Path(directory)
    with file_lock(directory / LOCK_NAME, subject=directory, wait=wait, timeout_s=timeout_s):
        yield


@contextlib.contextmanager
def file_lock(
    path: Path, *, subject: Path, wait: bool = False, timeout_s: float | None = None
) -> Iterator[None]:
    """Holds a lock file, which the operating system releases when the process ends.

    The lock file names its holder. It is removed on release, so that tools that compute digests of
    the directory (DVC) do not see it. On file systems without locks, `SoftFileLock` is used.

    Args:
        path: the lock file.
        subject: the locked directory or file, for messages.
        wait: as `directory_lock`.
        timeout_s: as `directory_lock`.

    Raises:
        LockedError: as `directory_lock`.
        OutputError: the lock file cannot be written.
    """
    # Imported here because it takes 25 ms, and most programs that write files take no lock.
    from filelock import FileLock, Timeout, UnixFileLock

    # A new object per call has its own file descriptor, so that the lock also excludes threads.
    lock = FileLock(path, thread_local=False, poll_interval=_POLL_SECONDS)
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                raise _locked(path, subject) from None
            log.warning("waiting for %s, held by %s", subject, _holder(path))
            try:
                lock.acquire(timeout=-1 if timeout_s is None else timeout_s)
            except Timeout:
                raise _locked(path, subject) from None
    # Windows cannot write or remove a locked file, and soft locks have their own file format.
    named = isinstance(lock, UnixFileLock)
    try:
        if named:
            with output_errors(path):
                since = time.strftime("%Y-%m-%dT%H:%M:%S%z")
                holder = f"pid {os.getpid()} on {socket.gethostname()} since {since}\n"
                path.write_text(holder, encoding="utf-8")
        yield
    finally:
        if named:
            # Removed while the lock is held: filelock retries if its locked file has been removed.
            path.unlink(missing_ok=True)
        lock.release()


def _locked(path: Path, subject: Path) -> LockedError:
    return LockedError(f"{subject} is in use by {_holder(path)}; wait for it to end, or end it")


def _holder(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip() or "another process"
    except OSError:
        return "another process"
