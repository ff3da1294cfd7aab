"""Pipeline commands, which run as `pupilseg NAME` and as `python -m pipeline.NAME`."""

from __future__ import annotations

import argparse
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pupilseg.cli.program import missing_package
from pupilseg.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command with its flags.

    The modules that define commands import heavy packages inside functions, so that a missing
    package is reported without a traceback.

    Attributes:
        description: text for `--help`.
        extras: extras of pupilseg that the command needs, separated by commas.
        add_flags: adds its flags to a parser, and may change the parser's format.
        run: runs the command and returns the exit code.
    """

    description: str
    extras: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]

    def set_up(self, parser: argparse.ArgumentParser) -> None:
        """Adds the flags to a parser; parsed arguments get `command`, a function that runs them.

        Raises:
            UsageError: a required package is not installed.
        """
        parser.description = self.description
        with self._packages():
            self.add_flags(parser)
        parser.set_defaults(command=self._run)

    def main(self, prog: str | None = None) -> int:
        """Parses `sys.argv`, runs the command, and returns the exit code.

        Args:
            prog: program name for the usage line.

        Raises:
            PupilSegError: `run` failed, or a required package is not installed.
        """
        parser = argparse.ArgumentParser(prog=prog)
        self.set_up(parser)
        return self._run(parser.parse_args())

    def _run(self, args: argparse.Namespace) -> int:
        with self._packages():
            return self.run(args)

    @contextmanager
    def _packages(self) -> Iterator[None]:
        try:
            yield
        except ModuleNotFoundError as error:
            package = missing_package(error)
            if package is None:
                raise
            raise UsageError(
                f"this command needs {package}; run: pip install 'pupilseg[{self.extras}]'"
            ) from error
