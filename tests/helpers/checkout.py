"""A copy of the project as a clean clone would have it."""

import shutil
import subprocess

from tests.helpers.paths import ROOT


def copy_checkout(to):
    """Copies the files that git knows or would add, and makes a repository of the copy."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, check=True,
    ).stdout.decode()  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)
    subprocess.run(["git", "init", "-q", "."], cwd=to, check=True)
    return to
