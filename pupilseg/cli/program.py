"""Common code of all programs: logging, errors, exit codes, Ctrl-C.

Exit codes: 0 success; 1 a problem with data, network or disk; 2 invalid arguments (like argparse);
130 interrupted; 141 broken pipe. Bugs are shown with their traceback.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import signal
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from pupilseg.errors import PupilSegError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
EXTRA_OF = {
    "datasets": "data",
    "huggingface_hub": "data",
    "jinja2": "predict",
    "matplotlib": "pipeline",
    "mlflow": "track",
    "modal": "cloud",
    "onnx": "export",
    "onnxruntime": "predict",
    "onnxscript": "export",
    "pyarrow": "data",
    "safetensors": "train",
    "torch": "train",
    "yaml": "pipeline",
}
"""Optional module -> extra of pupilseg that installs it."""


def main_program(main: Callable[[], int | None]) -> NoReturn:
    """Runs a program's main function and exits with its exit code.

    The log of the library is written to stderr as plain lines. Errors that the user can fix are
    printed as `error: ...` without a traceback.

    Args:
        main: parses `sys.argv`; returns the exit code, or None for 0.
    """
    log_to_stderr()
    try:
        code = main()
        sys.stdout.flush()
    except PupilSegError as error:
        code = _fail(str(error), error.exit_code)
    except ModuleNotFoundError as error:
        package = missing_package(error)
        if package is None:
            raise
        code = _fail(
            f"this command needs {package}; run: pip install 'pupilseg[{EXTRA_OF[package]}]'", 2
        )
    except KeyboardInterrupt:
        code = _fail("interrupted", 130)
    except BrokenPipeError:
        # Python flushes stdout again at exit, where a second error would be printed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except OSError as error:
        if error.errno not in _DISK:
            raise
        code = _fail(f"cannot write: {error}; free some space, or use another directory", 1)
    sys.exit(code or 0)


def missing_package(error: ModuleNotFoundError) -> str | None:
    """Returns the optional package that is not installed; None if the error is a bug."""
    package = (error.name or "").partition(".")[0]
    return package if package in EXTRA_OF else None


def _fail(message: str, code: int) -> int:
    """Prints an error and returns the exit code."""
    sys.stderr.write(f"error: {message}\n")
    return code


def log_to_stderr() -> None:
    """Writes this library's log messages, from level INFO, to stderr."""
    logger = logging.getLogger("pupilseg")
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())
        logger.propagate = False
    logger.setLevel(logging.INFO)


def positive_int(text: str) -> int:
    """Parses a whole number of at least 1; an argparse type."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def whole_number(text: str) -> int:
    """Parses a whole number of at least 0; an argparse type."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


@contextmanager
def finishing(what: str) -> Generator[Callable[[], bool]]:
    """Turns the first Ctrl-C into a request to stop; a second one interrupts as usual.

    Args:
        what: work to finish before the program stops, such as "this epoch".

    Yields:
        A function that returns True if Ctrl-C was pressed.
    """
    pressed = False

    def handle(_signal: int, _frame: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        # Not sys.stderr, which may be in the middle of a write.
        os.write(2, f"\nfinishing {what}, then stopping; Ctrl-C again stops at once\n".encode())

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
