"""The Hugging Face Hub: the one module that imports `huggingface_hub`.

Data stay in the Hub's cache (`HF_HOME`), shared with every other program that uses it; a manifest
records the commit and the digest of each file.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pupilseg.errors import DataError, DownloadError, PupilSegError
from pupilseg.sources.paths import safe_relative

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

log = logging.getLogger(__name__)

_COMMIT = re.compile(r"[0-9a-f]{40}")
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A commit's parquet files in the Hub's cache.

    Attributes:
        commit: 40 hex digits.
        root: folder of the snapshot.
        digests: sha256 of each file, by its path in the repository.
    """

    commit: str
    root: Path
    digests: dict[str, str]


def fetch(repository: str, revision: str | None) -> Snapshot:
    """Downloads the parquet files of a data set repository, once, and checks them.

    Args:
        repository: "owner/name".
        revision: branch, tag or commit; None for the default branch.

    Raises:
        DownloadError: the Hub or the way to it failed; cause and mend are named.
        DataError: the repository has no parquet files, or names one outside itself.
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
        root = Path(
            hub.snapshot_download(
                repository, repo_type="dataset", revision=commit, allow_patterns=["*.parquet"]
            )
        )
    paths = sorted(expected) if expected else _files_below(root)
    if not paths:
        raise DataError(f"{repository}@{commit} has no parquet files; {_WANTED}")
    log.info("checking %d files of %s@%s", len(paths), repository, commit[:12])
    digests = {path: _checked_digest(root / path, expected.get(path), repository) for path in paths}
    return Snapshot(commit, root, digests)


_WANTED = "expected a data set with the columns image and label in parquet files"


def locate(repository: str, commit: str) -> Path:
    """Returns the folder of a commit's snapshot in the cache, without the network.

    Raises:
        DataError: it is not there.
    """
    hub = _import_hub()
    try:
        return Path(
            hub.snapshot_download(
                repository,
                repo_type="dataset",
                revision=commit,
                allow_patterns=["*.parquet"],
                local_files_only=True,
            )
        )
    except hub.errors.LocalEntryNotFoundError:
        raise DataError(
            f"{repository}@{commit} is not complete in the Hub's cache {hub.constants.HF_HUB_CACHE}"
        ) from None


def _import_hub() -> ModuleType:
    """Returns `huggingface_hub` with its errors and constants loaded."""
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
    """Returns the commit's parquet files by path; empty where only the cache can be had.

    Names are checked here, before the client joins them to its cache folder.
    """
    try:
        tree = list(
            api.list_repo_tree(repository, recursive=True, revision=commit, repo_type="dataset")
        )
    except (hub.errors.OfflineModeIsEnabled, ConnectionError):
        return {}  # a commit that is in the cache needs no network; the client raises if it is not
    for entry in tree:
        safe_relative(entry.path, f"{repository}@{commit}")
    return {
        entry.path: entry
        for entry in tree
        if entry.path.endswith(".parquet") and hasattr(entry, "blob_id")
    }


def _files_below(root: Path) -> list[str]:
    """Returns the parquet files of a cached snapshot."""
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*.parquet"))


def _checked_digest(file: Path, expected: Any, repository: str) -> str:
    """Returns a file's sha256, if size and digest are what the commit says.

    The client checks sizes only. Large files carry a sha256; small ones their git blob id.

    Raises:
        DownloadError: they differ; the file is removed, so that the next run fetches it again.
    """
    if not file.is_file():
        raise DownloadError(f"{repository}: {file} did not arrive; run the same command again")
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
            file.resolve().unlink(missing_ok=True)
            file.unlink(missing_ok=True)
            raise DownloadError(
                f"{repository}: {file.name} arrived altered or cut short ({size} bytes, digest "
                f"{found[:12]}; expected {expected.size} bytes, digest {wanted[:12]}); "
                "it was removed, run the same command again"
            )
    return sha256.hexdigest()


@contextlib.contextmanager
def _hub_errors(hub: ModuleType, repository: str, revision: str | None) -> Iterator[None]:
    """Turns whatever the client raises for a fault outside the program into a `DownloadError`."""
    # The base of the client's HTTP errors is that of its transport too, and changed its package
    # with the client (requests, httpx, httpx2): taken from the class itself, none is imported here.
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
    """Returns what the client met first; it wraps that in "not found in the cache"."""
    while type(error).__name__ in _WRAPPERS and error.__cause__ is not None:
        error = error.__cause__
    return error


_WRAPPERS = ("LocalEntryNotFoundError", "IncompleteSnapshotError", "RevisionResolutionError")


def _explain(hub: ModuleType, error: BaseException, repository: str) -> str:
    """Returns cause and mend in one sentence."""
    errors, endpoint = hub.errors, hub.constants.ENDPOINT
    page = f"{endpoint}/datasets/{repository}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return (
            "it is not in the cache and offline mode is on; unset HF_HUB_OFFLINE and run the same "
            "command once with a network"
        )
    if isinstance(error, errors.GatedRepoError):
        return (
            f"the repository is gated ({status}); ask for access at {page}, then run "
            "`hf auth login` with a token that may read gated repositories, and run again"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"there is no such revision (404); see {page}/commits for those there are"
    if isinstance(error, errors.DisabledRepoError):
        return f"the Hub has disabled the repository ({status}); see {page}"
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403, 404):
        if status in (401, 403):
            return (
                f"the Hub refused access ({status}): the repository is private or missing, or the "
                "token is wrong; check the name, run `hf auth login` with a token that may read it"
            )
        return f"there is no such data set (404); check the name at {page}"
    if status is not None:
        busy = "is busy (429, too many requests)" if status == 429 else f"failed ({status})"
        return f"the Hub {busy}; wait some minutes and run again, what has arrived is kept"
    return _explain_transport(error, endpoint)


def _explain_transport(error: BaseException, endpoint: str) -> str:
    """Returns cause and mend of a fault below HTTP."""
    kind, text = type(error).__name__, (str(error).splitlines() or [""])[0]
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"the Hub's cache has no room ({text}); free space or set HF_HOME, and run again"
    if number in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR):
        return f"the Hub's cache cannot be written ({text}); set HF_HOME to a folder that can"
    if "Consistency check" in text:
        return f"a file arrived cut short ({text}); run again, complete files are kept"
    if kind in ("ConnectError", "ConnectionError", "ConnectTimeout", "ProxyError", "SSLError"):
        return (
            f"{endpoint} cannot be reached ({text}); check the network, proxy and HF_ENDPOINT, "
            "and run again"
        )
    if "Timeout" in kind:
        return f"{endpoint} does not answer in time ({kind}); run again, complete files are kept"
    if kind in ("RemoteProtocolError", "ReadError", "ChunkedEncodingError", "NetworkError"):
        return f"the connection was cut ({text}); run again, complete files are kept"
    return f"{kind}: {text}; run again, and check HF_ENDPOINT if it stays"
