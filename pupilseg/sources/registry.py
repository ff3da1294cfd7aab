"""All types of sources, and parsing of source strings."""

from __future__ import annotations

from pathlib import Path

from pupilseg.errors import DataError, UsageError
from pupilseg.sources import hub, openeds, parquet, rendered
from pupilseg.sources.spec import Source, SourceType

SOURCE_TYPES: tuple[SourceType, ...] = (
    hub.TYPE,
    parquet.TYPE,
    openeds.TYPE,
    rendered.TYPE,
)
"""To add a source type, write a module with a `TYPE` and list it here. The first type that parses a
source string, or matches a folder, is used."""

FORMS = "a source is one of:\n" + "\n".join(
    f"  {source_type.form:<23} {source_type.description}" for source_type in SOURCE_TYPES
)
"""Help text: the forms of a source string."""


def parse_source(text: str, revision: str | None = None) -> Source:
    """Parses a source string. An existing folder takes precedence over a repository.

    Args:
        text: one of `FORMS`.
        revision: revision given separately from the string.

    Raises:
        UsageError: the string has none of the forms, or there are two different revisions.
        DataError: the string is a path, but no such folder exists.
    """
    folder = Path(text).expanduser()
    if text and folder.is_dir():
        source: Source | None = Source("folder", str(folder.resolve()))
    elif text.startswith((".", "/", "~")) or folder.is_file():
        raise DataError(f"source {text!r}: no such folder; {FORMS}")
    else:
        parsers = [t.parse for t in SOURCE_TYPES if t.parse is not None]
        source = next((s for s in (parse(text) for parse in parsers) if s is not None), None)
    if source is None:
        raise UsageError(f"unknown source {text!r}; {FORMS}")
    if revision is None:
        return source
    if source.kind != "hub":
        raise UsageError(f"{source} has no revisions; remove --revision {revision}")
    if source.revision not in (None, revision):
        raise UsageError(
            f"two revisions were given, {source.revision!r} in the source and {revision!r} "
            "separately; remove one"
        )
    return Source(source.kind, source.location, revision)


def type_of_source(source: Source) -> SourceType:
    """Returns the type of a source.

    Raises:
        DataError: a folder has none of the layouts.
    """
    for source_type in SOURCE_TYPES:
        if source_type.kind == source.kind and source_type.matches(source):
            return source_type
    folder = Path(source.location)
    problem = "it has none of the layouts" if any(folder.iterdir()) else "it is empty"
    raise DataError(f"{folder}: {problem}; {FORMS}")


def type_of_record(kind: str, layout: str) -> SourceType:
    """Returns the type of a recorded source.

    Raises:
        KeyError: no such type.
    """
    return {(t.kind, t.layout): t for t in SOURCE_TYPES}[kind, layout]
