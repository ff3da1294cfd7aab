"""`Source`, a parsed source string, and `SourceType`, the interface of a type of source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pupilseg.sample import Dataset
    from pupilseg.sources.options import SourceOptions


@dataclass(frozen=True, slots=True)
class Source:
    """A parsed source string.

    Attributes:
        kind: "hub", "folder", or the prefix of the string, such as "synthetic".
        location: repository, absolute path of the folder, or the part after the prefix.
        revision: requested branch, tag or commit (hub only).
        seed: series of rendered eyes; None if the string has no seed.
    """

    kind: str
    location: str
    revision: str | None = None
    seed: int | None = None

    def __str__(self) -> str:
        text = self.location if self.kind in ("hub", "folder") else f"{self.kind}:{self.location}"
        for suffix in (self.revision, self.seed):
            if suffix is not None:
                text += f"@{suffix}"
        return text


@dataclass(frozen=True, slots=True)
class SourceType:
    """One type of source; `registry.SOURCE_TYPES` lists all of them.

    Attributes:
        kind: `Source.kind` of such sources.
        layout: layout of the data, as recorded in source.json. Kind and layout identify the type.
        form: syntax of the source string, for help texts.
        description: one line of help.
        parse: source string -> Source, or None if the string has another form. None for folders.
        matches: True if a source of this kind has this layout.
        inspect: (source, options, previous record or None, raw data directory) -> entries of
            source.json: "source", "preprocessing", "split_rule", "counts" and keys of this type;
            "commit" and "request" override the defaults. Downloads missing files into the
            directory. Raises DataError or DownloadError.
        open: (source.json, raw data directory) -> Dataset, without network. Raises DataError if
            files are missing or have changed.
    """

    kind: str
    layout: str
    form: str
    description: str
    parse: Callable[[str], Source | None] | None
    matches: Callable[[Source], bool]
    inspect: Callable[[Source, SourceOptions, dict[str, Any] | None, Path], dict[str, Any]]
    open: Callable[[dict[str, Any], Path], Dataset]
