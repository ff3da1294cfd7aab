"""The documentation site builds without warnings and loads nothing from other hosts."""

import os
import re
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT


@pytest.mark.integration
def test_the_site_builds_and_is_self_contained(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert 'id="pupilseg.predict.Predictor"' in (tmp_path / "api" / "predict.html").read_text()
    loads = re.compile(r"<(?:script|img|link|iframe)[^>]*(?:src|href)=[\"']?(?:https?:)?//[^>]*>")
    assert {page.name: found for page in pages if (found := loads.findall(page.read_text()))} == {}
    styles = [path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.css")]
    assert styles
    assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", "".join(styles))
