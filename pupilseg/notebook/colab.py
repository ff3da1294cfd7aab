"""What is different in Google Colab: packages, GPU, secrets, Drive, downloads.

Imported before anything is installed, so by itself it needs the standard library alone. Elsewhere
each function does what comes nearest, and says so.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pupilseg.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

NEEDED = {
    "cv2": "opencv-python",
    "datasets": "datasets",
    "huggingface_hub": "huggingface_hub",
    "matplotlib": "matplotlib",
    "onnx": "onnx",
    "onnxruntime": "onnxruntime",
    "onnxscript": "onnxscript",
    "PIL": "pillow",
    "pyarrow": "pyarrow",
    "sklearn": "scikit-learn",
    "torch": "torch",
    "tqdm": "tqdm",
}
"""Module -> the package that brings it, of all that the notebooks and their readers use."""
_PLAIN_VERSION = re.compile(r"[0-9][0-9.]*((a|b|rc|\.post|\.dev)[0-9]+)*(\+[a-z0-9.]+)?")
"""Versions that pip takes in a constraint; Debian's own packages have others."""
_TOLD_LINES = 15
"""Of what pip printed when it failed: its reasons stand at the end."""
_NO_GPU = (
    "this runtime has no GPU, and training on OpenEDS would take days without one. In Colab click "
    "Runtime > Change runtime type > T4 GPU > Save, then Runtime > Run all. To train on the CPU "
    "all the same (few rendered eyes, say) set ALLOW_CPU = True in the settings"
)


def in_colab() -> bool:
    """Says whether this is a Colab runtime."""
    return find_spec("google") is not None and find_spec("google.colab") is not None


def install_missing(needed: Mapping[str, str] = NEEDED) -> list[str]:
    """Installs the packages that are not there, and moves none that is.

    Everything installed is pinned to its version meanwhile: Colab's torch fits its CUDA driver, and
    a running kernel has its NumPy loaded.

    Args:
        needed: module -> package.

    Returns:
        The packages installed.

    Raises:
        UsageError: pip cannot install them beside what is there.
    """
    missing = [package for module, package in needed.items() if find_spec(module) is None]
    if not missing:
        print("every package is there, nothing to install")
        return []
    pins: dict[str, str] = {}
    for found in distributions():
        if _PLAIN_VERSION.fullmatch(found.version or ""):
            pins.setdefault(found.name, f"{found.name}=={found.version}")  # later ones are hidden
    print("installing", *missing, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "installed.txt")
        constraints.write_text("\n".join(pins.values()), encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
        done = subprocess.run(  # noqa: S603 - our own words
            [*command, "--constraint", str(constraints), *missing],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    importlib.invalidate_caches()
    if done.returncode:
        last_lines = "\n".join(done.stdout.splitlines()[-_TOLD_LINES:])
        raise UsageError(
            f"pip cannot install {' '.join(missing)} beside what is there:\n{last_lines}\n"
            "start a fresh runtime (Runtime > Disconnect and delete runtime) and run all again"
        )
    return missing


def choose_device(*, allow_cpu: bool) -> torch.device:
    """Returns the device to train on, and prints what it and this machine are.

    Args:
        allow_cpu: go on where there is no GPU.

    Raises:
        UsageError: there is none, and the CPU is not allowed.
    """
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = shutil.disk_usage(Path.cwd()).free
    print(
        f"{os.cpu_count()} CPU cores, {memory / 2**30:.1f} GiB of memory, {free / 2**30:.0f} GiB "
        f"free on disk; Python {sys.version.split()[0]}, torch {torch.__version__}"
    )
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        print(f"GPU: {gpu.name}, {gpu.total_memory / 2**30:.1f} GiB, CUDA {torch.version.cuda}")
        return torch.device("cuda")
    if not allow_cpu:
        raise UsageError(_NO_GPU)
    print("no GPU: training goes on on the CPU, as the settings allow")
    return torch.device("cpu")


def secret(name: str) -> str | None:
    """Returns a secret of the Colab user (key symbol at the left); None where there is none."""
    if not in_colab():
        return None
    from google.colab import userdata

    try:
        value: str = userdata.get(name)
    except (
        userdata.SecretNotFoundError,
        userdata.NotebookAccessError,
        userdata.TimeoutException,
    ) as error:
        print(
            f"going on without a token ({error}). If the data set needs one: key symbol at the "
            f"left > Add new secret > {name}, switch on Notebook access, run this cell again"
        )
        return None
    return value


class DriveCopy:
    """A copy of a folder on Google Drive, where it outlives the runtime.

    Training itself reads and writes the local disk only. Made on a runtime that lacks the files, it
    brings back those that an earlier one left.

    Args:
        folder: whose files are copied, below it too; hidden ones are not.
        wanted: False makes all this do nothing.
    """

    def __init__(self, folder: Path, *, wanted: bool) -> None:
        self._folder, self._copied = folder, dict[Path, int]()
        self._target: Path | None = None
        if not wanted:
            return
        if not in_colab():
            print(f"there is no Drive here; results stay in {folder}")
            return
        from google.colab import drive

        mounted = Path.cwd() / "drive"  # /content/drive, as is usual
        drive.mount(str(mounted))
        self._target = mounted / "MyDrive" / "pupilseg" / folder.name
        self._bring_back(self._target)
        print(f"results are copied to {self._target}")

    def _bring_back(self, target: Path) -> None:
        """Copies from Drive what is not on the local disk."""
        missing = [
            path
            for path in _files_below(target)
            if not (self._folder / path.relative_to(target)).exists()
        ]
        for path in missing:
            _copy(path, self._folder / path.relative_to(target))
        if missing:
            print(f"brought back {len(missing)} files that an earlier runtime left on Drive")

    def update(self) -> None:
        """Copies what has changed since the last time; a Drive that fails costs a line of text."""
        if self._target is None:
            return
        try:
            for path in _files_below(self._folder):
                changed = path.stat().st_mtime_ns
                if self._copied.get(path) != changed:
                    _copy(path, self._target / path.relative_to(self._folder))
                    self._copied[path] = changed
        except OSError as error:
            print(f"not copied to Drive ({error}); the results are in {self._folder}")


def _files_below(folder: Path) -> list[Path]:
    """Returns the files of a folder, hidden ones left out; none where it is not there."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))


def _copy(source: Path, target: Path) -> None:
    """Copies a file, whole or not at all; without fsync, which Drive does not offer."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    shutil.copyfile(source, part)
    os.replace(part, target)


def download(paths: Sequence[Path]) -> None:
    """Sends files to the user's browser; only in Colab."""
    from google.colab import files

    for path in paths:
        files.download(str(path))
