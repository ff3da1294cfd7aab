"""Errors that a user can cause, and the exit code for each.

A message says what was wrong, the value, what was expected, and the command that fixes it. Programs
print it without a traceback (`pupilseg.cli.program.main_program`); library users catch the base
class, `PupilSegError`.
"""


class PupilSegError(Exception):
    """Base of every error caused by a user's data, files or network."""

    exit_code = 1

    def _render_traceback_(self) -> list[str]:
        """Returns the lines that a notebook shows instead of a traceback (an IPython hook)."""
        return [f"error: {self}"]


class UsageError(PupilSegError):
    """An invalid request, such as an unknown name or a device that does not exist."""

    exit_code = 2


class DataError(PupilSegError):
    """A source, a shard or a sample with invalid content."""


class DownloadError(PupilSegError):
    """A failed download from the Hugging Face Hub."""


class CheckpointError(PupilSegError):
    """A model file or training state that is damaged, or does not fit the network or the run."""


class OutputError(PupilSegError):
    """A file that cannot be written: disk full, quota, read-only file system, no permission."""


class LockedError(PupilSegError):
    """A directory or file that another process is writing to."""


class ParallelError(PupilSegError):
    """Another process of a parallel job ended or does not respond."""
