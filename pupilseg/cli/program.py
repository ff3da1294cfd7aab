"""How every command of the project starts and ends.

Exit codes: 0 done; 1 data, network or disk; 2 a request that cannot be met (also argparse's own);
130 interrupted; 141 the reader of our output went away. A fault of the code itself keeps its
traceback.
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
_EXTRA_OF = {"jinja2": "predict", "pyarrow": "data", "torch": "train"}
"""What brings the packages that large parts of the library cannot do without."""


def main_program(main: Callable[[], int | None]) -> NoReturn:
    """Runs a program's main function and ends the process with its exit code.

    What the library logs goes to stderr, one plain line each. An error that the user can mend is
    printed as `error: ...` without a traceback.

    Args:
        main: parses `sys.argv` itself; returns the exit code, or None for 0.
    """
    log_to_stderr()
    try:
        code = main()
        sys.stdout.flush()
    except PupilSegError as error:
        code = _fail(str(error), error.exit_code)
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA_OF:
            raise
        extra = _EXTRA_OF[error.name]
        code = _fail(f"this needs {error.name}; run: pip install 'pupilseg[{extra}]'", 2)
    except KeyboardInterrupt:
        code = _fail("interrupted", 130)
    except BrokenPipeError:
        # Python flushes stdout once more at exit; give it a place where that cannot fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except OSError as error:
        if error.errno not in _DISK:
            raise
        code = _fail(f"cannot write: {error}; free some space or choose another directory", 1)
    sys.exit(code or 0)


def _fail(message: str, code: int) -> int:
    """Prints an error after the last line of a progress bar, and returns the exit code."""
    sys.stderr.write(f"error: {message}\n")
    return code


def log_to_stderr() -> None:
    """Shows the library's log (not that of other packages) from INFO on."""
    logger = logging.getLogger("pupilseg")
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())
        logger.propagate = False
    logger.setLevel(logging.INFO)


def positive_int(text: str) -> int:
    """Parses a whole number of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def whole_number(text: str) -> int:
    """Parses a whole number of at least 0, for argparse."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


@contextmanager
def finishing(what: str) -> Generator[Callable[[], bool]]:
    """Makes the first Ctrl-C a request, and leaves the second what it always was.

    Args:
        what: is finished before the program ends, such as "this epoch".

    Yields:
        A function that says whether Ctrl-C was pressed.
    """
    pressed = False

    def handle(_signal: int, _frame: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        # Not sys.stderr: a handler may run while that is in the middle of a write.
        os.write(2, f"\nfinishing {what}, then stopping; Ctrl-C again stops at once\n".encode())

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
