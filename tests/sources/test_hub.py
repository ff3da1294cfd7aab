"""The real huggingface_hub client against a local Hub: downloads and faults."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pupilseg.errors import DataError
from pupilseg.files import LOCK_NAME
from pupilseg.sources import hub as hub_module
from pupilseg.sources.paths import safe_relative
from tests.helpers.hub_server import Fault, HubServer
from tests.helpers.paths import ROOT
from tests.helpers.source_data import frame, write_both
from tests.helpers.victim import Victim

pytest.importorskip("huggingface_hub")
pytestmark = pytest.mark.integration

REPOSITORY = "someone/eyes"
OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture(scope="module")
def commits(tmp_path_factory):
    """Two commits with different frames: commit -> path -> bytes."""
    root = tmp_path_factory.mktemp("repository")
    contents = {}
    for commit, numbers in ((OLD, (0, 1, 2)), (NEW, (10, 11, 12))):
        folder = write_both(root / commit, train=numbers[:2], validation=numbers[2:])
        contents[commit] = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*.parquet"))
        } | {"README.md": b"# eyes"}
    return contents


@pytest.fixture
def hub(commits):
    with HubServer(REPOSITORY, dict(commits), {"main": NEW}) as server:
        yield server


class Client:
    """Runs programs with their own home of the Hub's client and their own data directory."""

    def __init__(self, server: HubServer, folder: Path) -> None:
        self.folder, self.out = folder, folder / "raw"
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith("HF_")},
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(folder / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            # Long enough for a busy machine; tests of a stalled connection set less.
            "HF_HUB_DOWNLOAD_TIMEOUT": "60",
            "HF_HUB_ETAG_TIMEOUT": "60",
            "no_proxy": "*",
        }

    def python(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *words],
            cwd=ROOT,
            env={**self.env, **env},
            capture_output=True,
            text=True,
            check=False,
        )

    def download(self, source: str = REPOSITORY, *words: str, **env: str):
        words = ("--source", source, "--out", str(self.out), *words)
        return self.python("-m", "pipeline.download", *words, **env)

    def manifest(self) -> dict:
        return json.loads((self.out / "source.json").read_text())

    def first_image(self, **env: str) -> int:
        """Returns the sum of the first train image's pixels, read by another process."""
        code = (
            "import sys; from pathlib import Path; from pupilseg.sources import open_dataset\n"
            "data = open_dataset(Path(sys.argv[1]))\n"
            "print(int(next(data.read('train', 0, 1)).image.sum()))"
        )
        done = self.python("-c", code, str(self.out), **env)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)


def pad(hub: HubServer) -> None:
    """Makes the train file 24 MB: the client saves its progress every 10 MB."""
    path = "train/shard_00000.parquet"
    columns = pq.read_table(io.BytesIO(hub.commits[NEW][path]))
    noise = [np.random.default_rng(row).bytes(12_000_000) for row in range(len(columns))]
    sink = io.BytesIO()
    pq.write_table(columns.append_column("noise", pa.array(noise, pa.binary())), sink)
    hub.commits[NEW] = hub.commits[NEW] | {path: sink.getvalue()}


@pytest.fixture
def client(hub, tmp_path):
    return Client(hub, tmp_path)


def check_failure(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Asserts that the program fails with a single error line that matches all patterns."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [part for part in done.stderr.splitlines() if part.startswith("error: ")]
    for word in words:
        assert re.search(word, line), line


def test_downloads_once_then_needs_no_network(hub, client, commits):
    assert client.download().returncode == 0
    manifest = client.manifest()
    assert manifest["commit"] == NEW
    assert manifest["source"] == f"{REPOSITORY}@{NEW}"
    assert manifest["counts"] == {"train": 2, "validation": 1}
    assert {entry["size"] for entry in manifest["files"]} == {
        len(content) for path, content in commits[NEW].items() if path.endswith(".parquet")
    }
    assert not any("README" in path for method, path, _ in hub.requests if method == "GET")
    hub.requests.clear()
    # The Hub gets a new commit; the downloaded one stays, without a request.
    hub.branches["main"] = OLD
    assert client.download().returncode == 0
    assert client.download(f"{REPOSITORY}@{NEW}").returncode == 0
    expected = int(frame(10)[0].sum())
    assert client.first_image() == expected
    assert client.manifest()["commit"] == NEW
    assert hub.requests == []
    hub.stop()
    assert client.download(HF_HUB_OFFLINE="1").returncode == 0
    assert client.first_image(HF_HUB_OFFLINE="1") == expected


def test_a_copy_of_the_data_directory_is_complete(hub, client):
    """No link leads out of the directory, and no other folder is needed."""
    assert client.download().returncode == 0
    found = {path.relative_to(client.folder) for path in client.folder.rglob("*.parquet")}
    assert {path.parts[:3] for path in found} == {("raw", "hub", NEW)}
    assert not any(path.is_symlink() for path in client.out.rglob("*"))
    hub.stop()
    copy = client.folder / "copy"
    shutil.copytree(client.out, copy)
    shutil.rmtree(client.out)
    client.out, client.env["HF_HOME"] = copy, str(client.folder / "nowhere")
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    for revision in ("", f"@{NEW}"):
        done = client.download(f"{REPOSITORY}{revision}", HF_HUB_OFFLINE="1")
        assert done.returncode == 0, done.stderr
    assert client.first_image(HF_HUB_OFFLINE="1") == int(frame(10)[0].sum())
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before
    # Other options need no network either.
    done = client.download(REPOSITORY, "--no-augmented-train", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert client.manifest()["options"]["augmented_train"] is False


def test_pinned_revision_and_refusal_of_another(hub, client):
    assert client.download(REPOSITORY, "--revision", OLD).returncode == 0
    assert client.manifest()["commit"] == OLD
    assert client.first_image() == int(frame(0)[0].sum())
    check_failure(client.download(f"{REPOSITORY}@{NEW}"), OLD[:12], NEW, "rm .*source.json")
    assert client.manifest()["commit"] == OLD


def test_other_options_use_the_same_commit(hub, client):
    assert client.download().returncode == 0
    hub.branches["main"] = OLD
    assert client.download(REPOSITORY, "--no-augmented-train").returncode == 0
    assert client.manifest()["commit"] == NEW
    assert client.manifest()["options"]["augmented_train"] is False


def test_training_starts_from_a_copy_without_network(hub, client):
    client.out = client.folder / "data" / "raw"
    assert client.download().returncode == 0
    hub.stop()
    shutil.copytree(client.folder / "data", client.folder / "copy")
    shutil.rmtree(client.folder / "data")
    shutil.rmtree(client.env["HF_HOME"], ignore_errors=True)
    words = ("--data-dir", client.folder / "copy", "--dataset", REPOSITORY, "--epochs", "1")
    words += ("--output-dir", client.folder / "out", "--device", "cpu", "--no-mlflow")
    script = "training/train_efficientvit_tiny_local.py"
    done = client.python(script, *map(str, words), HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert f"training on {REPOSITORY}@{NEW}: 2 frames" in done.stderr
    assert (client.folder / "out" / "best_efficientvit_tiny_model.pt").exists()


def test_an_incomplete_copy_is_refused_offline(hub, client):
    extra = hub.commits[NEW]["validation/shard_00000.parquet"]
    hub.commits[NEW] = hub.commits[NEW] | {"train/shard_00001.parquet": extra}
    assert client.download().returncode == 0
    (folder,) = client.out.glob("hub/*")
    (folder / "train" / "shard_00001.parquet").unlink()
    shutil.rmtree(folder / ".cache")  # the client's own list of the files
    before = (client.out / "source.json").read_bytes()
    done = client.download(HF_HUB_OFFLINE="1")
    check_failure(done, "train/shard_00001.parquet is missing", "network access")
    assert (client.out / "source.json").read_bytes() == before


@pytest.mark.parametrize("removed", ["hub", "hub/*/train/*.parquet"])
def test_a_lost_file_is_reported_and_downloaded_again(hub, client, removed):
    assert client.download().returncode == 0
    (path,) = client.out.glob(removed)
    path.unlink() if path.is_file() else shutil.rmtree(path)
    code = (
        "from pupilseg.sources import open_dataset; open_dataset(__import__('pathlib').Path({!r}))"
    )
    done = client.python("-c", code.format(str(client.out)))
    assert f"pipeline.download --source {REPOSITORY}" in done.stderr
    assert client.download().returncode == 0
    assert client.first_image() == int(frame(10)[0].sum())


def test_small_files_are_checked_by_their_git_id(hub, client):
    hub.lfs = False
    assert client.download().returncode == 0
    hub.faults = [Fault("GET .*/resolve/.*validation", "alter")]
    client.out = client.folder / "b"
    check_failure(client.download(), "altered", "run the same command again")


def test_an_altered_file_is_removed_and_downloaded_again(hub, client):
    hub.faults = [Fault("GET .*/resolve/.*train", "alter", times=1)]
    check_failure(client.download(), "shard_00000.parquet was altered", "run the same command")
    assert not client.out.joinpath("source.json").exists()
    assert client.download().returncode == 0
    assert client.first_image() == int(frame(10)[0].sum())


def test_a_lost_connection_resumes_at_its_position(hub, client):
    pad(hub)
    hub.faults = [Fault("GET .*/resolve/.*train", "cut", times=1)]
    done = client.download()
    assert done.returncode == 0, done.stderr
    ranges = [asked for _, path, asked in hub.requests if "train" in path and asked]
    assert re.fullmatch(r"bytes=[1-9]\d*-", ranges[0])
    assert client.first_image() == int(frame(10)[0].sum())


DOWNLOAD = """
from functools import partial
import huggingface_hub
import huggingface_hub.constants, huggingface_hub.file_download, huggingface_hub.hf_api
# One file after another: with two threads the number of changes to files is not deterministic.
huggingface_hub.snapshot_download = partial(huggingface_hub.snapshot_download, max_workers=1)
import pupilseg.sources.parquet
from pupilseg.sources import download

def run(folder):
    download(REPOSITORY, folder / "raw")
"""


def test_a_kill_before_each_change_to_a_file(client, tmp_path):
    """Covers every state in which a kill can leave the data directory."""
    with Victim(f"REPOSITORY = {REPOSITORY!r}" + DOWNLOAD, client.env) as victim:
        victim.run(tmp_path / "whole")
        wanted = (tmp_path / "whole" / "raw" / "source.json").read_bytes()
        placed = []
        for folder in victim.each_kill(tmp_path):
            source = folder / "raw" / "source.json"
            placed.append(source.exists())
            assert not placed[-1] or source.read_bytes() == wanted, folder.name
            victim.run(folder)
            assert source.read_bytes() == wanted, folder.name
            # A kill may leave the lock file behind, unlocked.
            left = {p.name for p in (folder / "raw").iterdir()} - {LOCK_NAME}
            assert left == {"source.json", "hub"}, folder.name
    assert list(dict.fromkeys(placed)) == [False, True]


def test_slow_responses_are_accepted_and_stalled_ones_retried(hub, client):
    pad(hub)
    client.env["HF_HUB_DOWNLOAD_TIMEOUT"] = "1"
    hub.faults = [Fault("GET .*/resolve/.*train", "stall", times=1), Fault("GET .*train", "slow")]
    done = client.download()
    assert done.returncode == 0, done.stderr
    ranges = [asked for _, path, asked in hub.requests if "train" in path and asked]
    assert re.fullmatch(r"bytes=[1-9]\d*-", ranges[0]), "the download does not start over"
    assert client.first_image() == int(frame(10)[0].sum())


def test_a_new_commit_between_two_requests_is_ignored(hub, client, commits):
    """The listing, the files and their digests belong to the first commit."""
    hub.faults = [Fault("/tree/", "move", times=1)]
    assert client.download().returncode == 0
    assert hub.branches["main"] == OLD, "the branch has changed"
    assert client.manifest()["commit"] == NEW
    digests = {entry["path"]: entry["sha256"] for entry in client.manifest()["files"]}
    assert digests == {
        path: hashlib.sha256(content).hexdigest()
        for path, content in commits[NEW].items()
        if path.endswith(".parquet")
    }
    assert client.first_image() == int(frame(10)[0].sum())


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault("/api/", "401 GatedRepo"), ["gated", "hf auth login"]),
        (Fault("/api/", "403 GatedRepo"), ["gated .403", "ask for access at http"]),
        (Fault("/api/", "401"), ["401", "private or missing", "hf auth login"]),
        (Fault("/api/", "403"), ["403", "hf auth login"]),
        (Fault("/api/", "429"), ["429", "wait"]),
        (Fault("/api/", "500"), ["500", "run again"]),
        (Fault("/api/datasets/[^/]+/[^/]+/tree", "403 GatedRepo"), ["gated", "ask for access"]),
        (Fault("/resolve/.*train", "403 GatedRepo"), ["gated", "ask for access"]),
        (Fault("/resolve/.*train", "404 EntryNotFound"), ["404"]),
        (Fault("GET .*/resolve/.*train", "503"), ["503", "run again"]),
        (Fault("GET .*/resolve/.*train", "short", times=1), ["truncated", "run again"]),
        (Fault("/api/", "drop"), ["lost", "run again"]),
        pytest.param(
            *(Fault("GET .*/resolve/.*train", "stall"), ["in time|lost", "run again"]),
            marks=pytest.mark.long,  # five attempts that each time out after a second
        ),
    ],
    ids=lambda value: value.kind + value.match[-6:] if isinstance(value, Fault) else "",
)
def test_faults_are_reported_with_a_fix(hub, client, fault, words):
    hub.faults = [fault]
    if fault.kind == "stall":
        client.env["HF_HUB_DOWNLOAD_TIMEOUT"] = "1"
    check_failure(client.download(), REPOSITORY, *words)
    assert not client.out.joinpath("source.json").exists()
    if fault.match == "GET .*/resolve/.*train":
        hub.faults = []
        assert client.download().returncode == 0


def test_missing_repository_and_revision(client):
    check_failure(client.download("someone/else"), "someone/else", "404", "check the name")
    check_failure(client.download(f"{REPOSITORY}@v9"), "no such revision", "v9", "commits")
    check_failure(client.download(f"{REPOSITORY}@{'c' * 40}"), "no such revision", "c" * 40)


def test_unreachable_and_offline(hub, client):
    hub.stop()
    check_failure(client.download(), "cannot be reached", "HF_ENDPOINT")
    check_failure(client.download(HF_HUB_OFFLINE="1"), "offline mode", "HF_HUB_OFFLINE")


def test_repository_without_parquet_files(hub, client):
    hub.commits[NEW] = {"README.md": b"nothing here"}
    check_failure(client.download(), "no parquet files", "image and label")


def test_an_unsafe_path_is_refused_before_the_download(hub, client):
    hub.commits[NEW] = hub.commits[NEW] | {"train/../../../../x.parquet": b"boo"}
    check_failure(client.download(), "not a path inside it")
    assert not any("/resolve/" in path for _, path, _ in hub.requests)


@pytest.mark.parametrize(
    "path", ["/etc/x", "a/../b", "..", "", "a//b", "a\\b", "C:/x", "a/\n", "."]
)
def test_unsafe_paths(path):
    with pytest.raises(DataError, match="refused"):
        safe_relative(path, "here")


def test_an_unwritable_download_folder(hub, client):
    client.out.mkdir()
    (client.out / "hub").touch()
    check_failure(client.download(), "data directory cannot be written", "choose another")


def test_a_full_disk(hub, client):
    pad(hub)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        done = client.download()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    check_failure(done, "data directory is full", "free some space")
    assert not list(client.out.rglob("*.incomplete"))
    assert client.download().returncode == 0


def test_missing_package_names_the_extra(client):
    # A module of this name that fails to import is first on the path.
    shadow = client.folder / "shadow"
    shadow.mkdir()
    (shadow / "huggingface_hub.py").write_text(
        "raise ModuleNotFoundError('no', name='huggingface_hub')"
    )
    done = client.download(PYTHONPATH=os.pathsep.join([str(shadow), str(ROOT)]))
    check_failure(done, r"pip install 'pupilseg\[data\]'")


def test_no_other_module_imports_the_client():
    holders = [
        path.name
        for path in (ROOT / "pupilseg").rglob("*.py")
        if re.search(r"^\s*(import|from) huggingface_hub", path.read_text(), re.MULTILINE)
    ]
    assert holders == [Path(hub_module.__file__).name]
