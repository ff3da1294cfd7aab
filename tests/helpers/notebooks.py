"""The notebooks, run in a new kernel, locally or with a stand-in for Colab's runtime."""

import asyncio
import base64
import os
import re

import cv2
import nbformat
import numpy as np
from nbclient import NotebookClient

from tests.helpers.hub_server import HubServer
from tests.helpers.paths import ROOT
from tests.helpers.source_data import hub_files

COLAB = ROOT / "tests" / "helpers" / "colab_runtime"
TOKEN = "hf_for_tests"
COMMIT = "a" * 40
DATASETS = {"efficientvit": "Conner/openeds-precomputed", "ellipse": "Conner/sddec25-01"}
"""Default data set of each notebook."""


def read(model, folder="notebooks"):
    return nbformat.read(ROOT / folder / f"train_{model}.ipynb", nbformat.NO_CONVERT)


def code_cells(notebook):
    """Returns title -> cell."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    titles = [re.match(r"# @title (.+)", cell.source).group(1) for cell in cells]
    return dict(zip(titles, cells, strict=True))


def execute(notebook, cwd, *titles, **env):
    """Runs a notebook, or its cells with the given titles, in a new kernel; pip finds nothing."""
    if titles:
        cells = code_cells(notebook)
        notebook.cells = [cells[title] for title in titles]
    cwd.mkdir(exist_ok=True)
    client = NotebookClient(
        notebook, kernel_name="python3", timeout=300, resources={"metadata": {"path": str(cwd)}}
    )
    inherited = {k: v for k, v in os.environ.items() if k != "PUPILSEG_SMOKE"}
    fixed = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PIP_NO_INDEX": "1"}
    # `client.execute` would leave an event loop open in a thread.
    asyncio.run(client.async_execute(env={**inherited, **fixed, **env}))
    return notebook


def text(cell):
    """Returns a cell's printed text; after a carriage return, a line starts again."""
    printed = "".join(out.text for out in cell.outputs if out.output_type == "stream")
    return re.sub(r"[^\n]*\r", "", printed)


def pictures(cell):
    """Returns the pictures in a cell's output."""
    found = [out.data[kind] for out in cell.outputs for kind in ("image/png", "image/jpeg")
             if kind in out.get("data", {})]  # fmt: skip
    return [cv2.imdecode(np.frombuffer(base64.b64decode(p), np.uint8), 1) for p in found]


def run_in_colab(model, folder, *titles):
    """Runs a notebook, or some of its cells, as in Colab: with secrets, Drive and downloads.

    The data set is a small one with the notebook's default name, on a local Hub.

    Args:
        model: name of the network.
        folder: receives `content` (the working directory), `drive`, `downloads` and
            `executed.ipynb`.
        *titles: of the cells; without any, all of them.
    """
    for name in ("drive", "downloads"):
        (folder / name).mkdir(exist_ok=True)
    repository = DATASETS[model]
    # The earlier data set has nested columns (revision A).
    files = hub_files(folder / "repository", nested=model == "ellipse")
    with HubServer(repository, {COMMIT: files}, {"main": COMMIT}, token=TOKEN) as hub:
        notebook = execute(
            read(model, "training"),
            folder / "content",
            *titles,
            PUPILSEG_SMOKE=repository,
            PYTHONPATH=f"{ROOT}:{COLAB}",
            COLAB_SECRET_HF_TOKEN=TOKEN,
            COLAB_DRIVE=str(folder / "drive"),
            COLAB_DOWNLOADS=str(folder / "downloads"),
            HF_ENDPOINT=hub.url,
            HF_HOME=str(folder / "hf"),
            HF_HUB_DISABLE_XET="1",
            no_proxy="*",
        )
    nbformat.write(notebook, folder / "executed.ipynb")


def executed(folder):
    """Returns the notebook that `run_in_colab` ran."""
    return nbformat.read(folder / "executed.ipynb", nbformat.NO_CONVERT)


def results_of(folder, model):
    """Returns the folder of a notebook's results."""
    return folder / "content" / "pupilseg_run" / f"{model}-1"
