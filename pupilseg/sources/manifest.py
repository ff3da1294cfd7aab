"""`source.json`: what a raw data directory holds, and how it is put there once.

    format            1
    request           what was asked for: kind, location (repository, absolute folder, number of
                      frames), revision, seed
    options           `SourceOptions`
    source            identity, also of the shards made from it
    commit            of the Hub, or null
    layout            "parquet", "openeds" or "rendered"; the keys below it are the layout's own
    counts, split_rule, preprocessing
    files             parquet: path, size, sha256, split, rows, and `kept`, a 0 or 1 a row, where
                      some rows are left out
    frames            openeds: image, label, and their sizes, by split

Nothing is copied: Hub files stay in the Hub's cache, folders where they are.
"""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pupilseg.errors import DataError
from pupilseg.files import directory_lock, file_digest, read_json, write_json
from pupilseg.sources import openeds, parquet, rendered
from pupilseg.sources.options import SourceOptions
from pupilseg.sources.spec import FORMS, Source, parse_source

if TYPE_CHECKING:
    from pupilseg.sample import Dataset

log = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "source.json"


def download(
    text: str,
    out: Path,
    *,
    revision: str | None = None,
    options: SourceOptions | None = None,
) -> Path:
    """Puts a source in place once, and records it in `out/source.json`.

    A second call with the same source and options finds it there and uses no network; so does an
    unpinned source, which stays at the commit first recorded. With other options the record is
    made anew from the same data.

    Args:
        text: see `spec.FORMS`.
        out: the data directory; it holds one source.
        revision: of a Hub source, if not in `text`.
        options: how the source is read; None for the defaults.

    Returns:
        The path of `source.json`.

    Raises:
        UsageError: an unknown source.
        DataError: another source is recorded there, or this one is not what it must be.
        DownloadError: the Hub failed.
        OutputError: `out` cannot be written.
    """
    options = options or SourceOptions()
    source = parse_source(text, revision)
    path = Path(out) / MANIFEST
    if _in_place(path, source, options):
        return path
    with directory_lock(out, wait=True):
        # Another process may have finished it while this one waited.
        if not _in_place(path, source, options):
            recorded = _read(path) if path.exists() else None
            write_json(path, _place(source, options, recorded))
    return path


def open_dataset(raw_dir: Path) -> Dataset:
    """Returns the data set that `raw_dir/source.json` records; uses no network.

    Raises:
        DataError: nothing is recorded, the data are gone or changed, or the renderer is another.
    """
    path = Path(raw_dir) / MANIFEST
    manifest = _read(path)
    try:
        return _open(manifest)
    except DataError as error:
        raise DataError(f"{error}; put it in place again: {_command(manifest, path)}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} is damaged ({type(error).__name__}: {error}); remove it, then run "
            f"python -m pipeline.download --source SOURCE --out {path.parent}"
        ) from error


def _read(path: Path) -> dict[str, Any]:
    """Returns the manifest if it is of this format."""
    parent = path.parent
    mend = f"put a source in place: python -m pipeline.download --source SOURCE --out {parent}"
    manifest = read_json(path, hint=f"remove it if it is there, and {mend}")
    if manifest.get("format") != FORMAT:
        raise DataError(
            f"{path} has format {manifest.get('format')!r}, this version reads {FORMAT}; "
            f"remove it, and {mend}"
        )
    return manifest


def _command(manifest: dict[str, Any], path: Path) -> str:
    """Returns the command that makes a manifest."""
    source = manifest.get("request", {})
    words = ["--source", str(Source(**source)) if source else "SOURCE", "--out", str(path.parent)]
    words += SourceOptions(**manifest.get("options", {})).flags()
    return "python -m pipeline.download " + shlex.join(words)


def _in_place(path: Path, source: Source, options: SourceOptions) -> bool:
    """Says whether the source is recorded with these options and its data are there.

    Raises:
        DataError: another source is recorded.
    """
    if not path.exists():
        return False
    manifest = _read(path)
    request = _request(source)
    recorded = manifest.get("request", {})
    same = all(recorded.get(key) == request[key] for key in ("kind", "location", "seed"))
    revisions = (None, recorded.get("revision"), manifest.get("commit"))
    if not same or source.revision not in revisions:
        raise DataError(
            f"{path.parent} holds {manifest.get('source')}, not {source}; use another --out, or "
            f"remove the record of what it holds: rm {path}"
        )
    if manifest.get("options") != options.as_dict():
        return False
    try:
        _open(manifest)
    except (DataError, KeyError, TypeError, ValueError) as error:
        log.warning("%s; putting it in place again", error)
        return False
    return True


def _request(source: Source) -> dict[str, Any]:
    """Returns what was asked for, as recorded."""
    return {
        "kind": source.kind,
        "location": source.location,
        "revision": source.revision,
        "seed": source.seed,
    }


def _place(
    source: Source, options: SourceOptions, recorded: dict[str, Any] | None
) -> dict[str, Any]:
    """Puts the data in place and returns the manifest."""
    commit = None
    request = _request(source)
    if source.kind == "synthetic":
        found = rendered.scan(source, options)
    elif source.kind == "hub":
        from pupilseg.sources import hub

        known = {}
        revision = source.revision
        if recorded is not None:
            # The same source with other options, or gone from the cache: the same commit again.
            request, revision = recorded["request"], recorded["commit"]
            known = {entry["path"]: entry for entry in recorded.get("files", ())}
        snapshot = hub.fetch(source.location, revision)
        commit = snapshot.commit
        where = f"{source.location}@{commit}"
        found = parquet.scan(snapshot.root, list(snapshot.digests), where, options)
        for entry in found["files"]:
            entry["sha256"] = snapshot.digests[entry["path"]]
            before = known.get(entry["path"], entry)
            if before.get("sha256") != entry["sha256"]:
                raise DataError(f"{where}: {entry['path']} is not the file recorded before")
        found["source"] = where
    else:
        found = _scan_folder(Path(source.location), options)
    return {
        "format": FORMAT,
        "source": found.pop("source"),
        "request": request,
        "commit": commit,
        "options": options.as_dict(),
        **found,
    }


def _scan_folder(root: Path, options: SourceOptions) -> dict[str, Any]:
    """Returns what a local folder holds."""
    if paths := parquet.find_parquet(root):
        found = parquet.scan(root, paths, str(root), options)
        for entry in found["files"]:
            entry["sha256"] = file_digest(root / entry["path"])
        found["source"] = f"parquet:{root.name}"
        return found
    if openeds.is_openeds(root):
        return openeds.scan(root, options)
    held = "it is empty" if not any(root.iterdir()) else "it holds neither layout"
    raise DataError(f"{root}: {held}; {FORMS}")


def _open(manifest: dict[str, Any]) -> Dataset:
    """Returns the data set of a manifest, its files checked for presence and size."""
    layout, request = manifest["layout"], manifest["request"]
    if layout == "rendered":
        return rendered.open_rendered(manifest)
    if request["kind"] == "hub":
        from pupilseg.sources import hub

        return parquet.open_parquet(manifest, hub.locate(request["location"], manifest["commit"]))
    root = Path(request["location"])
    if layout == "openeds":
        return openeds.open_openeds(manifest, root)
    return parquet.open_parquet(manifest, root)
