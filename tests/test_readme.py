"""README commands: every one is parsed, the marked blocks are run, the facts are compared."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pupilseg import __version__
from pupilseg.models import create_model, list_models
from tests.helpers.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
ENV = os.environ | {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
}


def commands(text):
    """Returns the lines of all bash blocks of a text, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = (line.split(" #")[0].strip() for block in blocks for line in block.splitlines())
    return [line for line in lines if line]


def marked_commands(test="tests/test_readme.py"):
    """Returns the commands of each block that is marked as executed by a test file."""
    parts = README.split(f"<!-- executed by {test} -->")[1:]
    return [commands(part.split("```\n")[0] + "```\n") for part in parts]


def run(line, cwd):
    """Runs a command line as a shell user in `cwd` would."""
    words = [str(ROOT / w) if w.startswith("training/") else w for w in shlex.split(line)]
    return subprocess.run(words, cwd=cwd, env=ENV, capture_output=True, text=True, check=False)


@pytest.mark.integration
def test_marked_blocks_run_in_order(tmp_path):
    blocks = marked_commands()
    assert len(blocks) == 4
    for block in blocks:
        for line in block:
            done = run(line, tmp_path)
            assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
            assert "Traceback" not in done.stderr
    assert (tmp_path / "pupil.onnx").stat().st_size < 300_000
    assert len((tmp_path / "found" / "pupil.csv").read_text().splitlines()) == 2
    assert (tmp_path / "found" / "view.html").exists()
    assert (tmp_path / "checkpoints" / "best_efficientvit_model.pt").exists()
    python = re.search(r"```python\n(.*?)```", README, flags=re.DOTALL).group(1)
    done = subprocess.run(
        [sys.executable, "-c", python],
        cwd=tmp_path, env=ENV, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(("Ellipse(", "None"))


@pytest.mark.parametrize("line", commands(README))
def test_every_command_exists(line):
    """A make target, a DVC file, or a program that takes the flags shown."""
    words = shlex.split(line)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    elif words[0] == "dvc":
        assert (ROOT / "dvc.yaml").exists()
    else:
        test = "tests/cloud/test_modal.py" if words[0] == "modal" else "tests/test_readme.py"
        assert line in [command for block in marked_commands(test) for command in block]


def test_files_that_the_readme_links_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("name", list_models())
def test_parameter_counts_in_the_readme(name):
    count = sum(p.numel() for p in create_model(name).parameters())
    assert re.search(rf"\| `{name}` \| {count:,} \|", README)


@pytest.mark.parametrize("name", list_models())
def test_scores_in_the_readme_are_those_of_the_cards(name):
    weights = ROOT / "pupilseg" / "weights" / name
    card = weights.with_suffix(".md").read_text(encoding="utf-8")
    row = re.search(rf"\| `{name}` \| (.*) \|", README)[1].replace(" px", "").replace(" KB", "")
    _, real, center_px, rendered, kilobytes, _ = (float(c.replace(",", "")) for c in row.split("|"))
    captured = re.search(r"\| as captured \| ([\d.]+) \| [\d.]+ \| ([\d.]+) \|", card)
    assert (real, center_px) == pytest.approx([float(c) for c in captured.groups()], abs=0.00051)
    mean = re.search(r"pupil IoU ([\d.]+) in the mean", card)[1]
    assert rendered == pytest.approx(float(mean), abs=0.00051)
    assert kilobytes == round(weights.with_suffix(".onnx").stat().st_size / 1000)


def test_version_is_the_same_everywhere():
    assert f"version: {__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_no_path_of_a_machine_and_no_registry_host():
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    parts = ("/" + "work/", "/" + "root/", "pypi" + ".org", "files.python" + "hosted")
    forbidden = re.compile("|".join(map(re.escape, parts)).encode())
    for name in listed.splitlines():  # an ONNX file may hold paths too: the exporter notes where
        path = ROOT / name
        if path.is_file():
            assert not forbidden.search(path.read_bytes()), name
