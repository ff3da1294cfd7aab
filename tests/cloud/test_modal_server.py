"""The stand-in for Modal's servers: isolation and lifetime of its containers."""

import json
import signal

import pytest

from tests.helpers.modal_server.containers import namespaces_work
from tests.helpers.modal_server.server import ModalServer
from tests.helpers.paths import ROOT
from tests.helpers.processes import Program

SCRIPT = """
import json, os, sys, time
from pathlib import Path
import modal

image = modal.Image.debian_slim().pip_install("tqdm==4").env({"IN_VOLUME": "/store/x"})
volume = modal.Volume.from_name("files", create_if_missing=True)
secret = modal.Secret.from_name("token")
app = modal.App("probe", image=image)
MOUNT = "/store"


def importable(name):
    try:
        __import__(name)
    except ModuleNotFoundError as error:
        return str(error)
    return "found"


@app.function(volumes={MOUNT: volume}, secrets=[secret])
def look(project):
    print("output of the container", flush=True)
    Path(os.environ["IN_VOLUME"]).write_text("x")
    return {
        "files": sorted(path.name for path in Path.cwd().glob("*.py")),
        "volume": os.listdir(MOUNT),
        "project": os.path.exists(project),
        "imports": {name: importable(name) for name in ("tqdm", "hypothesis", "pupilseg")},
        "variables": [name for name in ("TOKEN", "IN_VOLUME", "ONLY_HERE") if name in os.environ],
    }


@app.function(volumes={MOUNT: volume})
def wait():
    print("waiting", flush=True)
    while not Path(MOUNT, "go").exists():
        time.sleep(0.01)
    Path(MOUNT, "done").touch()


@app.local_entrypoint()
def main(task: str, project: str = ""):
    print(json.dumps(look.remote(project)) if task == "look" else wait.remote())
"""


@pytest.fixture
def project(tmp_path):
    """A directory with the script `probe.py`."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "probe.py").write_text(SCRIPT)
    return folder


SECRETS = {"token": {"TOKEN": "1"}}


@pytest.mark.parametrize("isolated", [True, False])
def test_a_container_sees_its_image_and_its_files_only(tmp_path, project, monkeypatch, isolated):
    if isolated and not namespaces_work(tmp_path / "trial"):
        pytest.skip("this machine allows no mount namespaces")
    monkeypatch.setenv("ONLY_HERE", "1")
    with ModalServer(tmp_path / "modal", secrets=SECRETS, isolated=isolated) as server:
        line = ("modal", "run", "probe.py", "--task", "look", "--project", str(ROOT / "tests"))
        done = server.run(*line, cwd=project)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "output of the container" in done.stdout
        (seen,) = (json.loads(text) for text in done.stdout.splitlines() if text.startswith("{"))
        assert (server.volume("files") / "x").read_text() == "x"
    assert seen == {
        "files": ["probe.py"],
        "volume": ["x"],
        "project": not isolated,
        "imports": {
            "tqdm": "found",
            "hypothesis": "No module named 'hypothesis'",
            "pupilseg": "No module named 'pupilseg'",
        },
        "variables": ["TOKEN", "IN_VOLUME"],
    }


@pytest.mark.parametrize("detached", [True, False])
def test_only_a_detached_call_survives_its_client(tmp_path, project, detached):
    line = ["modal", "run", *["--detach"] * detached, "probe.py", "--task", "wait"]
    with ModalServer(tmp_path / "modal", secrets=SECRETS) as server:
        with Program(line, project, server.env) as program:
            program.wait_for("waiting")
            program.send(signal.SIGINT)
            program.end()
        if detached:
            (server.volume("files") / "go").touch()
        server.wait_for_containers()
        assert (server.volume("files") / "done").exists() == detached
