"""The one string that names a source."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pupilseg.errors import DataError, UsageError

FORMS = """a source is one of:
  owner/name[@revision]   a Hugging Face dataset repository of parquet files
  FOLDER                  the same on disk: {train,validation}/*.parquet or data/*.parquet
  FOLDER                  OpenEDS: S_*/N.png + N.npy, or {train,validation}/{images,labels}/
  synthetic:N[@seed]      N rendered eyes"""
_HUB = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[^\s@]+))?")
_SYNTHETIC = re.compile(r"synthetic:(?P<count>\d+)(?:@(?P<seed>\d+))?")


@dataclass(frozen=True, slots=True)
class Source:
    """A parsed source.

    Attributes:
        kind: "hub", "folder" or "synthetic".
        location: repository, absolute path of the folder, or number of frames.
        revision: branch, tag or commit that was asked for (hub), else None.
        seed: series of rendered eyes, None where the source names none.
    """

    kind: str
    location: str
    revision: str | None = None
    seed: int | None = None

    def __str__(self) -> str:
        if self.kind == "synthetic":
            return f"synthetic:{self.location}" + ("" if self.seed is None else f"@{self.seed}")
        return self.location if self.revision is None else f"{self.location}@{self.revision}"


def parse_source(text: str, revision: str | None = None) -> Source:
    """Returns what a source string names; a folder that exists wins over a repository.

    Args:
        text: one of `FORMS`.
        revision: revision given apart from the string.

    Raises:
        UsageError: the string has none of the forms, or two revisions differ.
        DataError: it names a path where no folder is.
    """
    folder = Path(text).expanduser()
    if text and folder.is_dir():
        source = Source("folder", str(folder.resolve()))
    elif match := _SYNTHETIC.fullmatch(text):
        seed = match["seed"]
        source = Source("synthetic", str(int(match["count"])), seed=int(seed) if seed else None)
        if int(match["count"]) < 2:
            raise UsageError(f"{text} has no frame for each split; ask for synthetic:2 or more")
    elif text.startswith((".", "/", "~")) or folder.is_file():
        raise DataError(f"source {text!r}: there is no such folder; {FORMS}")
    elif match := _HUB.fullmatch(text):
        source = Source("hub", match["repo"], match["revision"])
    else:
        raise UsageError(f"unknown source {text!r}; {FORMS}")
    return source if revision is None else _with_revision(source, revision)


def _with_revision(source: Source, revision: str) -> Source:
    """Returns the source at a revision given apart from it."""
    if source.kind != "hub":
        raise UsageError(
            f"{source} has no revisions, so {revision!r} cannot be had; leave out --revision"
        )
    if source.revision not in (None, revision):
        raise UsageError(
            f"two revisions asked for, {source.revision!r} in the source and {revision!r} beside "
            "it; leave one out"
        )
    return Source(source.kind, source.location, revision)
