"""Copies of the project, as in a clean clone."""

import shutil
import subprocess

from tests.helpers.paths import ROOT


def project_files():
    """Returns the paths, relative to the root, of files that git tracks or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, check=True,
    ).stdout.decode()  # fmt: skip
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def copy_checkout(to):
    """Copies the project's files into a folder and makes it a git repository."""
    for name in project_files():
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, to / name)
    subprocess.run(["git", "init", "-q", "."], cwd=to, check=True)
    return to
