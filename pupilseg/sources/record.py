"""`source.json`, the record of the source in a raw data directory.

    format            1
    request           the requested source: kind, location (repository, absolute folder, number of
                      frames), revision, seed
    options           `SourceOptions`
    source            identity, also written to the shards made from it
    commit            commit of a Hub source, or null
    layout            "parquet", "openeds" or "rendered"; the keys below it depend on the layout
    counts, split_rule, preprocessing
    files             parquet: path, size, sha256, split, rows, and `kept`, one 0 or 1 per row, if
                      some rows are left out
    frames            openeds: image, label, and their sizes, by split

The files of a Hub source are in `hub/COMMIT` beside the record. Local folders are read in place.
"""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pupilseg.errors import DataError
from pupilseg.files import directory_lock, read_json, write_json
from pupilseg.sources.options import SourceOptions
from pupilseg.sources.registry import parse_source, type_of_record, type_of_source
from pupilseg.sources.spec import Source

if TYPE_CHECKING:
    from pupilseg.sample import Dataset

log = logging.getLogger(__name__)

FORMAT = 1
RECORD = "source.json"


def download(
    text: str,
    out: Path,
    *,
    revision: str | None = None,
    options: SourceOptions | None = None,
    flag: str = "--out",
) -> Path:
    """Downloads a source if needed, and records it in `out/source.json`.

    A second call with the same source and options uses no network. Without an explicit revision,
    later calls use the commit that was recorded first. If the options change, the record is
    rewritten from the same data.

    Args:
        text: one of `registry.FORMS`.
        out: the data directory, which holds one source.
        revision: revision of a Hub source, if not in `text`.
        options: how the source is read; the defaults if None.
        flag: the flag of the program that sets the data directory, for messages.

    Returns:
        The path of `source.json`.

    Raises:
        UsageError: an unknown source.
        DataError: `out` holds another source, or the data of this one are invalid.
        DownloadError: the download failed.
        OutputError: `out` cannot be written.
    """
    options = options or SourceOptions()
    source = parse_source(text, revision)
    path = Path(out) / RECORD
    if _is_recorded(path, source, options, flag):
        return path
    with directory_lock(out, wait=True):
        # Another process may have finished it in the meantime.
        if not _is_recorded(path, source, options, flag):
            previous = _read_record(path) if path.exists() else None
            write_json(path, _make_record(source, options, previous, path.parent))
    return path


def open_dataset(raw_dir: Path) -> Dataset:
    """Returns the data set recorded in `raw_dir/source.json`, without network.

    Raises:
        DataError: there is no record, the data are missing or have changed, or they were rendered
            by another version of the renderer.
    """
    path = Path(raw_dir) / RECORD
    record = _read_record(path)
    try:
        return _open(record, path.parent)
    except DataError as error:
        raise DataError(f"{error}; download it again: {_command(record, path)}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} is damaged ({type(error).__name__}: {error}); remove it, then run "
            f"python -m pipeline.download --source SOURCE --out {shlex.quote(str(path.parent))}"
        ) from error


def _open(record: dict[str, Any], raw_dir: Path) -> Dataset:
    return type_of_record(record["request"]["kind"], record["layout"]).open(record, raw_dir)


def _read_record(path: Path) -> dict[str, Any]:
    words = ["--source", "SOURCE", "--out", str(path.parent)]
    hint = f"download a source: python -m pipeline.download {shlex.join(words)}"
    record = read_json(path, hint=f"remove it if it exists, and {hint}")
    if record.get("format") != FORMAT:
        raise DataError(
            f"{path} has format {record.get('format')!r}, this version reads {FORMAT}; "
            f"remove it, and {hint}"
        )
    return record


def _command(record: dict[str, Any], path: Path) -> str:
    """Returns the command that rewrites a record."""
    source = record.get("request", {})
    words = ["--source", str(Source(**source)) if source else "SOURCE", "--out", str(path.parent)]
    words += SourceOptions(**record.get("options", {})).flags()
    return "python -m pipeline.download " + shlex.join(words)


def _is_recorded(path: Path, source: Source, options: SourceOptions, flag: str) -> bool:
    """Returns True if the source is recorded with these options and its data are complete.

    Raises:
        DataError: another source is recorded.
    """
    if not path.exists():
        return False
    record = _read_record(path)
    request = _request(source)
    recorded = record.get("request", {})
    same = all(recorded.get(key) == request[key] for key in ("kind", "location", "seed"))
    revisions = (None, recorded.get("revision"), record.get("commit"))
    if not same or source.revision not in revisions:
        raise DataError(
            f"{path.parent} contains {record.get('source')}, not {source}; use another {flag}, or "
            f"remove the record of its contents: rm {shlex.quote(str(path))}"
        )
    if record.get("options") != options.as_dict():
        return False
    try:
        _open(record, path.parent)
    except (DataError, KeyError, TypeError, ValueError) as error:
        log.warning("%s; downloading it again", error)
        return False
    return True


def _request(source: Source) -> dict[str, Any]:
    return {
        "kind": source.kind,
        "location": source.location,
        "revision": source.revision,
        "seed": source.seed,
    }


def _make_record(
    source: Source, options: SourceOptions, previous: dict[str, Any] | None, raw_dir: Path
) -> dict[str, Any]:
    source_type = type_of_source(source)
    found = source_type.inspect(source, options, previous, raw_dir)
    return {
        "format": FORMAT,
        "source": found.pop("source"),
        "request": found.pop("request", _request(source)),
        "commit": found.pop("commit", None),
        "options": options.as_dict(),
        "layout": source_type.layout,
        **found,
    }
