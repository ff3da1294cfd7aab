"""Data sets on the Hugging Face Hub. No other module imports `huggingface_hub`.

Files are downloaded to `hub/COMMIT/` in the raw data directory instead of the shared cache
(`HF_HOME`). A copy of the data directory is therefore complete, and removing it frees all space.
`source.json` records the commit and the digest of each file.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pupilseg.errors import DataError, DownloadError, PupilSegError
from pupilseg.sources import parquet
from pupilseg.sources.paths import safe_relative
from pupilseg.sources.spec import Source, SourceType

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import ModuleType

    from pupilseg.sources.options import SourceOptions

log = logging.getLogger(__name__)

_TEXT = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[^\s@]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_BLOCK = 1 << 20
_FOLDER = "hub"
"""Folder in a raw data directory, with one folder per commit."""
_EXPECTED = "expected a data set with the columns image and label in parquet files"
_WRAPPERS = ("LocalEntryNotFoundError", "IncompleteSnapshotError", "RevisionResolutionError")
"""Errors of the client that wrap the actual cause."""


@dataclass(frozen=True, slots=True)
class LocalCommit:
    """The downloaded parquet files of a commit.

    Attributes:
        commit: 40 hex digits.
        root: folder of the files.
        digests: path in the repository -> sha256.
    """

    commit: str
    root: Path
    digests: dict[str, str]


def _parse(text: str) -> Source | None:
    match = _TEXT.fullmatch(text)
    return None if match is None else Source("hub", match["repo"], match["revision"])


def _inspect(
    source: Source, options: SourceOptions, previous: dict[str, Any] | None, raw_dir: Path
) -> dict[str, Any]:
    repository, revision = source.location, source.revision
    entries: dict[str, Any] = {}
    known = {}
    if previous is not None:
        # The same source with other options, or with removed files: use the recorded commit.
        revision = previous["commit"]
        entries["request"] = previous["request"]
        known = {entry["path"]: entry["sha256"] for entry in previous.get("files", ())}
    local = download_commit(repository, revision, raw_dir / _FOLDER)
    where = f"{repository}@{local.commit}"
    if missing := known.keys() - local.digests.keys():
        raise DataError(
            f"{where}: {min(missing)} is missing; run the same command with network access"
        )
    found = parquet.inspect_files(local.root, list(local.digests), where, options)
    for entry in found["files"]:
        entry["sha256"] = local.digests[entry["path"]]
        if known.get(entry["path"], entry["sha256"]) != entry["sha256"]:
            raise DataError(f"{where}: {entry['path']} differs from the file recorded before")
    return found | entries | {"source": where, "commit": local.commit}


def _open(record: dict[str, Any], raw_dir: Path) -> parquet.ParquetDataset:
    if not _COMMIT.fullmatch(record["commit"]):
        raise ValueError(f"commit {record['commit']!r} is not 40 hex digits")
    return parquet.open_files(record, raw_dir / _FOLDER / record["commit"])


TYPE = SourceType(
    kind="hub",
    layout="parquet",
    form="owner/name[@revision]",
    description="a Hugging Face dataset repository of parquet files",
    parse=_parse,
    matches=lambda _source: True,
    inspect=_inspect,
    open=_open,
)


def download_commit(repository: str, revision: str | None, folder: Path) -> LocalCommit:
    """Downloads the parquet files of a data set repository and checks them.

    Existing files are not downloaded again, and partial downloads are resumed.

    Args:
        repository: "owner/name".
        revision: branch, tag or commit; None for the default branch.
        folder: parent of the download folder, which is named after the commit.

    Raises:
        DownloadError: the Hub or the connection failed; the message has the cause and a fix.
        DataError: the repository has no parquet files, or one with an unsafe path.
    """
    hub = _import_hub()
    with _hub_errors(hub, repository, revision):
        api = hub.HfApi()
        if revision is not None and _COMMIT.fullmatch(revision):
            commit = revision
        else:
            info = api.dataset_info(repository, revision=revision)
            commit = str(info.sha)
        expected = _listing(hub, api, repository, commit)
        root = folder / commit
        hub.snapshot_download(
            repository,
            repo_type="dataset",
            revision=commit,
            allow_patterns=["*.parquet"],
            local_dir=root,
        )
    paths = sorted(expected) if expected else _files_below(root)
    if not paths:
        raise DataError(f"{repository}@{commit} has no parquet files; {_EXPECTED}")
    log.info("checking %d files of %s@%s", len(paths), repository, commit[:12])
    digests = {path: _checked_digest(root / path, expected.get(path), repository) for path in paths}
    return LocalCommit(commit, root, digests)


def _import_hub() -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ModuleNotFoundError as error:
        raise DownloadError(
            f"data sets from the Hub need the package {error.name}; "
            "run: pip install 'pupilseg[data]'"
        ) from None
    return huggingface_hub


def _listing(hub: ModuleType, api: Any, repository: str, commit: str) -> dict[str, Any]:
    """Returns the commit's parquet files by path; empty without network.

    Checks the paths, because the client will join them to the folder.
    """
    try:
        tree = list(
            api.list_repo_tree(repository, recursive=True, revision=commit, repo_type="dataset")
        )
    except (hub.errors.OfflineModeIsEnabled, ConnectionError):
        return {}  # a complete commit needs no network; otherwise the client raises
    for entry in tree:
        safe_relative(entry.path, f"{repository}@{commit}")
    return {
        entry.path: entry
        for entry in tree
        if entry.path.endswith(".parquet") and hasattr(entry, "blob_id")
    }


def _files_below(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*.parquet"))


def _checked_digest(file: Path, expected: Any, repository: str) -> str:
    """Returns a file's sha256, if its size and digest match the commit.

    The client checks sizes only. Large files have a sha256, small ones a git blob id.

    Raises:
        DownloadError: they differ; the file is removed, so that the next run downloads it again.
    """
    if not file.is_file():
        raise DownloadError(f"{repository}: {file} was not downloaded; run the same command again")
    size = file.stat().st_size
    sha256, git = hashlib.sha256(), hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    small = expected is not None and expected.lfs is None
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            sha256.update(block)
            if small:
                git.update(block)
    if expected is not None:
        wanted = expected.blob_id if small else expected.lfs.sha256
        found = git.hexdigest() if small else sha256.hexdigest()
        if found != wanted or size != expected.size:
            file.unlink(missing_ok=True)
            raise DownloadError(
                f"{repository}: {file.name} was altered or truncated ({size} bytes, digest "
                f"{found[:12]}; expected {expected.size} bytes, digest {wanted[:12]}); "
                "it was removed, run the same command again"
            )
    return sha256.hexdigest()


@contextlib.contextmanager
def _hub_errors(hub: ModuleType, repository: str, revision: str | None) -> Iterator[None]:
    """Converts the client's errors about the network, the Hub or the disk to a `DownloadError`."""
    # The base class of the client's HTTP errors is also that of its transport, whose package
    # differs between versions (requests, httpx, httpx2). Using the class avoids importing it.
    transport = hub.errors.HfHubHTTPError.__bases__[0]
    try:
        yield
    except PupilSegError:
        raise
    except (transport, OSError, ValueError) as error:
        raise DownloadError(
            f"{repository}@{revision or 'main'}: {_explain(hub, _root_cause(error), repository)}"
        ) from error


def _root_cause(error: BaseException) -> BaseException:
    """Returns the first error; the client wraps it in "not found in the cache"."""
    while type(error).__name__ in _WRAPPERS and error.__cause__ is not None:
        error = error.__cause__
    return error


def _explain(hub: ModuleType, error: BaseException, repository: str) -> str:
    """Returns the cause and a fix in one sentence."""
    errors = hub.errors
    endpoint = hub.constants.ENDPOINT
    page = f"{endpoint}/datasets/{repository}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return (
            "it is not in the data directory and offline mode is on; unset HF_HUB_OFFLINE and run "
            "the same command once with network access"
        )
    if isinstance(error, errors.GatedRepoError):
        return (
            f"the repository is gated ({status}); ask for access at {page}, then run "
            "`hf auth login` with a token that may read gated repositories, and run again"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"there is no such revision (404); see {page}/commits for a list"
    if isinstance(error, errors.DisabledRepoError):
        return f"the Hub has disabled the repository ({status}); see {page}"
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403, 404):
        if status in (401, 403):
            return (
                f"the Hub refused access ({status}): the repository is private or missing, or the "
                "token is wrong; check the name, or run `hf auth login` with another token"
            )
        return f"there is no such data set (404); check the name at {page}"
    if status is not None:
        busy = "is busy (429, too many requests)" if status == 429 else f"failed ({status})"
        return f"the Hub {busy}; wait a few minutes and run again, complete files are kept"
    return _explain_transport(error, endpoint)


def _explain_transport(error: BaseException, endpoint: str) -> str:
    """Returns the cause and a fix of a failure below HTTP."""
    kind = type(error).__name__
    text = (str(error).splitlines() or [""])[0]
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"the data directory is full ({text}); free some space or choose another directory, "
            "and run again, complete files are kept"
        )
    if number in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR):
        return f"the data directory cannot be written ({text}); choose another directory"
    if "Consistency check" in text:
        return f"a file was truncated ({text}); run again, complete files are kept"
    if kind in ("ConnectError", "ConnectionError", "ConnectTimeout", "ProxyError", "SSLError"):
        return (
            f"{endpoint} cannot be reached ({text}); check the network, proxy and HF_ENDPOINT, "
            "and run again"
        )
    if "Timeout" in kind:
        return f"{endpoint} did not answer in time ({kind}); run again, complete files are kept"
    if kind in ("RemoteProtocolError", "ReadError", "ChunkedEncodingError", "NetworkError"):
        return f"the connection was lost ({text}); run again, complete files are kept"
    return f"{kind}: {text}; run again, and check HF_ENDPOINT if it persists"
