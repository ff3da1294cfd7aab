"""Progress bars are hidden in files. For notebooks see tests/notebook/test_notebooks.py."""

import io
import sys

import pytest

from pupilseg.runtime.progress import progress_bar


class Screen(io.StringIO):
    def __init__(self, *, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


@pytest.mark.parametrize(
    ("terminal", "show", "seen"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_bars_are_shown_on_terminals_only(monkeypatch, terminal, show, seen):
    screen = Screen(terminal=terminal)
    monkeypatch.setattr(sys, "stderr", screen)
    assert list(progress_bar(range(3), "working", unit="step", show=show)) == [0, 1, 2]
    with progress_bar(None, "by hand", unit="step", total=5, show=show) as bar:
        bar.update(5)
    text = screen.getvalue()
    assert ("working" in text, "by hand" in text) == (seen, seen)
    assert bool(text) == seen
