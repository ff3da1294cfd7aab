"""README and docs: runs the marked blocks, and checks other commands, links and facts."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pupilseg import __version__
from pupilseg.models import create_model, list_models
from tests.helpers.checkout import project_files
from tests.helpers.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDES = ("README.md", "docs/data.md", "docs/training.md", "docs/modal.md")
"""Pages with commands, in the order in which a reader would run them."""
PAGES = sorted(n for n in project_files() if n.endswith(".md") and "template" not in n)
TESTS = ("tests/test_readme.py", "tests/cloud/test_modal.py")
ENV = os.environ | {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
}


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def commands(text):
    """Returns the lines of all bash blocks of a text, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = (line.split(" #")[0].strip() for block in blocks for line in block.splitlines())
    return [line for line in lines if line]


def marked_blocks(test):
    """Yields the language and text of each block marked as executed by a test file."""
    for page in GUIDES:
        for block in read(page).split(f"<!-- executed by {test} -->\n")[1:]:
            yield re.match(r"```(\w+)\n(.*?)```", block, flags=re.DOTALL).groups()


def run(words, cwd):
    """Runs a command as a shell user in `cwd` would."""
    words = [str(ROOT / word) if word.startswith("training/") else word for word in words]
    done = subprocess.run(words, cwd=cwd, env=ENV, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.mark.integration
def test_marked_blocks_run_in_order(tmp_path):
    blocks = list(marked_blocks("tests/test_readme.py"))
    assert [language for language, _ in blocks] == [
        "bash",
        "python",
        "bash",
        "python",
        "bash",
        "bash",
    ]
    for language, text in blocks:
        if language == "python":
            output = run([sys.executable, "-c", text], tmp_path)
            assert output.startswith(("Ellipse(", "None"))
            continue
        for line in commands(f"```bash\n{text}```"):
            run(shlex.split(line), tmp_path)
    assert (tmp_path / "pupil.onnx").stat().st_size < 300_000
    assert len((tmp_path / "found" / "pupil.csv").read_text().splitlines()) == 2
    assert (tmp_path / "found" / "view.html").exists()
    assert (tmp_path / "checkpoints" / "best_efficientvit_model.pt").exists()


@pytest.mark.parametrize("line", [line for page in GUIDES for line in commands(read(page))])
def test_every_command_exists(line):
    """Each command is a make target, `dvc repro`, or in a block that a test runs."""
    words = shlex.split(line)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", read("Makefile"), flags=re.MULTILINE)
    elif words[0] == "dvc":
        assert words == ["dvc", "repro"]
        assert (ROOT / "dvc.yaml").exists()
    else:
        run_by_tests = [block for test in TESTS for _, block in marked_blocks(test)]
        assert any(line in commands(f"```bash\n{block}```") for block in run_by_tests)


@pytest.mark.parametrize("page", PAGES)
def test_links_between_files(page):
    """Each relative link points to a file, and its fragment to a heading."""
    for target in re.findall(r"\]\(([^):]+)\)", read(page)):
        name, _, fragment = target.partition("#")
        linked = (ROOT / page).parent / name if name else ROOT / page
        assert linked.exists(), target
        if fragment:
            text = linked.read_text(encoding="utf-8")
            headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
            anchors = [re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in headings]
            assert fragment in anchors, target


@pytest.mark.parametrize("name", list_models())
def test_parameter_counts_in_the_readme(name):
    count = sum(p.numel() for p in create_model(name).parameters())
    assert re.search(rf"\| `{name}`[^|]* \| {count:,} \|", README)


@pytest.mark.parametrize("name", list_models())
def test_scores_in_the_readme_are_those_of_the_cards(name):
    weights = ROOT / "pupilseg" / "weights" / name
    card = weights.with_suffix(".md").read_text(encoding="utf-8")
    row = (
        re.search(rf"\| `{name}`[^|]* \| (.*) \|", README)[1].replace(" px", "").replace(" KB", "")
    )
    _, real, center_px, rendered, kilobytes, _ = (float(c.replace(",", "")) for c in row.split("|"))
    captured = re.search(r"\| as captured \| ([\d.]+) \| [\d.]+ \| ([\d.]+) \|", card)
    assert (real, center_px) == pytest.approx([float(c) for c in captured.groups()], abs=0.00051)
    mean = re.search(r"mean pupil IoU\s+([\d.]+)", card)[1]
    assert rendered == pytest.approx(float(mean), abs=0.00051)
    assert kilobytes == round(weights.with_suffix(".onnx").stat().st_size / 1000)


def test_version_is_the_same_everywhere():
    assert f"version: {__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_no_path_of_a_machine_and_no_registry_host():
    parts = ("/" + "work/", "/" + "root/", "pypi" + ".org", "files.python" + "hosted")
    forbidden = re.compile("|".join(map(re.escape, parts)).encode())
    for (
        name
    ) in project_files():  # ONNX files may also contain paths, those of the exporter's modules
        assert not forbidden.search((ROOT / name).read_bytes()), name
