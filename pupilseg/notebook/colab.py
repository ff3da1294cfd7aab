"""Google Colab: packages, GPU, secrets, Drive and downloads.

The module is imported before any package is installed, so its own imports are limited to the
standard library. Outside of Colab, each function does the nearest equivalent and reports it.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pupilseg.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

REQUIRED = {
    "cv2": "opencv-python",
    "datasets": "datasets",
    "filelock": "filelock",
    "huggingface_hub": "huggingface_hub",
    "jinja2": "jinja2",
    "matplotlib": "matplotlib",
    "numpy": "numpy",
    "onnx": "onnx",
    "onnxruntime": "onnxruntime",
    "onnxscript": "onnxscript",
    "PIL": "pillow",
    "pyarrow": "pyarrow",
    "safetensors": "safetensors",
    "sklearn": "scikit-learn",
    "torch": "torch",
    "tqdm": "tqdm",
}
"""Module -> package that contains it."""
OPTIONAL = {"torchvision": "torchvision"}
"""Likewise, of packages that pupilseg does not use and that some builds of torch lack."""
_PLAIN_VERSION = re.compile(r"[0-9][0-9.]*((a|b|rc|\.post|\.dev)[0-9]+)*(\+[a-z0-9.]+)?")
"""Versions that pip accepts in constraints; packages of Debian may have others."""
_SHOWN_LINES = 15
"""Lines of pip's output shown when it fails: the cause is at the end."""
_NO_GPU = (
    "this runtime has no GPU, and without one, training on OpenEDS takes days. In Colab, choose "
    "Runtime > Change runtime type > T4 GPU > Save, then Runtime > Run all. To train on the CPU "
    "anyway (on a few rendered eyes, for example), set ALLOW_CPU = True in the settings"
)


def in_colab() -> bool:
    """Returns True in a Colab runtime."""
    return find_spec("google") is not None and find_spec("google.colab") is not None


def install_missing(
    required: Mapping[str, str] = REQUIRED, optional: Mapping[str, str] = OPTIONAL
) -> list[str]:
    """Installs missing packages without changing any installed one.

    Args:
        required: module -> package.
        optional: likewise; a package that cannot be installed is reported and left out.

    Returns:
        The packages installed.

    Raises:
        UsageError: pip cannot install a required package beside the installed ones.
    """
    missing = [package for module, package in required.items() if find_spec(module) is None]
    missing_optional = [p for module, p in optional.items() if find_spec(module) is None]
    if not missing and not missing_optional:
        print("all packages are installed")
        return []
    installed = []
    if missing:
        problem = _install(missing)
        if problem is not None:
            raise UsageError(
                f"pip cannot install {' '.join(missing)} beside the installed packages:\n"
                f"{problem}\n"
                "start a new runtime (Runtime > Disconnect and delete runtime) and run all cells"
            )
        installed += missing
    for package in missing_optional:
        if _install([package]) is None:
            installed.append(package)
        else:
            print(
                f"{package} is not available for torch {version('torch')}: continuing without it, "
                "pupilseg does not need it"
            )
    return installed


def _install(packages: Sequence[str]) -> str | None:
    """Runs pip; returns the end of its output if it failed.

    Installed packages are pinned to their versions: Colab's torch matches its CUDA driver, and a
    running kernel has loaded its NumPy.
    """
    pins: dict[str, str] = {}
    for found in distributions():
        if _PLAIN_VERSION.fullmatch(found.version or ""):
            pins.setdefault(found.name, f"{found.name}=={found.version}")  # the first one is in use
    print("installing", *packages, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "installed.txt")
        constraints.write_text("\n".join(pins.values()), encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
        done = subprocess.run(  # noqa: S603 - the arguments are constants
            [*command, "--constraint", str(constraints), *packages],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    importlib.invalidate_caches()
    if done.returncode == 0:
        return None
    return "\n".join(done.stdout.splitlines()[-_SHOWN_LINES:])


def choose_device(*, allow_cpu: bool) -> torch.device:
    """Returns the device to train on, and prints a description of it and of the machine.

    Args:
        allow_cpu: return the CPU if there is no GPU.

    Raises:
        UsageError: there is no GPU, and the CPU is not allowed.
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
    print("no GPU: training on the CPU, as the settings allow")
    return torch.device("cpu")


def secret(name: str) -> str | None:
    """Returns a secret of the Colab user (key symbol on the left); None if not available."""
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
            f"continuing without a token ({error}). If the data set needs one: key symbol on the "
            f"left > Add new secret > {name}, enable Notebook access, and run this cell again"
        )
        return None
    return value


class DriveCopy:
    """A copy of a folder on Google Drive, which survives the runtime.

    Training reads and writes the local disk only. Creating a copy first restores the files of an
    earlier runtime that are missing on the local disk.

    Args:
        folder: copied with its subfolders, except hidden files.
        enabled: False disables all methods.
    """

    def __init__(self, folder: Path, *, enabled: bool) -> None:
        self._folder = folder
        self._copied: dict[Path, int] = {}
        self._target: Path | None = None
        if not enabled:
            return
        if not in_colab():
            print(f"no Google Drive outside of Colab; the results are in {folder}")
            return
        from google.colab import drive

        mounted = Path.cwd() / "drive"  # usually /content/drive
        drive.mount(str(mounted))
        self._target = mounted / "MyDrive" / "pupilseg" / folder.name
        self._restore(self._target)
        print(f"results are copied to {self._target}")

    def _restore(self, target: Path) -> None:
        """Copies files from Drive that are missing on the local disk."""
        missing = [
            path
            for path in _files_below(target)
            if not (self._folder / path.relative_to(target)).exists()
        ]
        for path in missing:
            _copy(path, self._folder / path.relative_to(target))
        if missing:
            print(f"restored {len(missing)} files of an earlier runtime from Drive")

    def update(self) -> None:
        """Copies files that changed since the last call; an error is printed and not raised."""
        if self._target is None:
            return
        try:
            for path in _files_below(self._folder):
                changed = path.stat().st_mtime_ns
                if self._copied.get(path) != changed:
                    _copy(path, self._target / path.relative_to(self._folder))
                    self._copied[path] = changed
        except OSError as error:
            print(f"could not copy to Drive ({error}); the results are in {self._folder}")


def _files_below(folder: Path) -> list[Path]:
    """Returns the files below a folder, except hidden ones; none if it does not exist."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))


def _copy(source: Path, target: Path) -> None:
    """Copies a file atomically, without fsync, which Drive does not support."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    shutil.copyfile(source, part)
    os.replace(part, target)


def download(paths: Sequence[Path]) -> None:
    """Downloads files through the user's browser; works only in Colab."""
    from google.colab import files

    for path in paths:
        files.download(str(path))
