"""Errors that a user can cause, and the exit code each ends a program with.

A message says what was wrong, the value, what was expected, and the command that mends it.
Programs print it without a traceback (`pupilseg.cli.program.main_program`); library users catch
one base class.
"""


class PupilSegError(Exception):
    """Base of every error that a user's data, files or network can cause."""

    exit_code = 1

    def _render_traceback_(self) -> list[str]:
        """Returns what a notebook shows instead of a traceback (IPython asks for this name)."""
        return [f"error: {self}"]


class UsageError(PupilSegError):
    """A request that cannot be met as it stands: an unknown name, a device that is not there."""

    exit_code = 2


class DataError(PupilSegError):
    """A source, a shard or a sample that does not hold what it must."""


class DownloadError(PupilSegError):
    """The Hub, or the network on the way to it, did not deliver."""


class CheckpointError(PupilSegError):
    """A checkpoint or model file that is damaged, foreign, or of another network."""


class OutputError(PupilSegError):
    """A file that cannot be written: disk full, quota, read-only file system, no permission."""


class LockedError(PupilSegError):
    """A directory that another process of this library is writing to."""


class ParallelError(PupilSegError):
    """Another process of a parallel job ended, or does not answer."""
