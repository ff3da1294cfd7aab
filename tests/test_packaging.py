"""The wheel is complete, and prediction needs only the packages of its `predict` extra."""

import os
import subprocess
import sys
import tomllib

import cv2
import pytest

from pupilseg.synthetic import render
from tests.helpers.checkout import copy_checkout
from tests.helpers.paths import ROOT

REQUIRED = {"filelock", "jinja2", "numpy", "onnxruntime", "opencv-python", "tqdm"}
"""The packages that `pip install pupilseg[predict]` requires."""
PROGRAM = """
import importlib.abc, sys
class NotInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, NotInstalled())
from pupilseg.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def names_of(requirements):
    """Returns the names in requirements such as "numpy>=1.26"."""
    return {text.split(">")[0].split("[")[0] for text in requirements}


def test_prediction_requires_six_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = project["dependencies"] + project["optional-dependencies"]["predict"]
    assert names_of(requirements) == REQUIRED


@pytest.mark.integration
def test_the_wheel_predicts_without_the_other_packages(tmp_path):
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    copy_checkout(checkout)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, checkout]
    subprocess.run(wheel, check=True, capture_output=True)
    (built,) = tmp_path.glob("pupilseg-*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", site, built], check=True)
    tracked = {
        path.relative_to(checkout)
        for path in (checkout / "pupilseg").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {path for path in tracked if not (site / path).is_file()} == set()

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    others = set().union(*(names_of(extras[name]) for name in ("train", "data", "track", "export")))
    cv2.imwrite(str(tmp_path / "eye.png"), render(1).image)
    code = PROGRAM.format(absent=sorted(others - REQUIRED | {"matplotlib", "yaml"}))
    done = subprocess.run(
        [sys.executable, "-c", code, "predict", "eye.png"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 frames, 0 without a pupil, 0 failed")
    assert len((tmp_path / "found" / "pupil.csv").read_text().splitlines()) == 2
