"""Programs that run during a test, in this process or in one that is watched and killed."""

from __future__ import annotations

import io
import logging
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

from tests.helpers.paths import ROOT
from tests.helpers.waiting import PATIENCE_S


def run_here(*command, env=None):
    """Runs a Python program in this process, which saves 3 to 5 s of importing torch again.

    An exception other than `SystemExit`, which would be a traceback of the program, is raised.

    Args:
        command: words after `python`, such as `-m`, `pipeline.train`, `--epochs`, `1`.
        env: variables to add to the environment.
    """
    is_module = command[0] == "-m"
    name, *args = map(str, command[1:] if is_module else command)
    out, err = io.StringIO(), io.StringIO()
    folder = [] if is_module else [str((ROOT / name).parent)]
    with (
        patch.dict(os.environ, env or {}),
        patch.object(sys, "argv", [name, *args]),
        patch.object(sys, "path", [*folder, *sys.path]),
        patch.object(logging.getLogger("pupilseg"), "handlers", []),
        patch.object(logging.getLogger("pupilseg"), "propagate", True),  # restored at the end
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            if is_module:
                runpy.run_module(name, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(ROOT / name), run_name="__main__")
            code = 0
        except SystemExit as ended:
            code = ended.code
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


class Program:
    """A running program, in its own session, whose output is collected line by line.

    Args:
        line: command line.
        cwd: working directory.
        env: environment; None for this process's.
    """

    def __init__(self, line, cwd, env=None):
        self._process = subprocess.Popen(
            line,
            cwd=cwd,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self._lines = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        for line in self._process.stdout:
            self._lines.append(line)

    @property
    def text(self):
        """Its output so far, stdout and stderr."""
        return "".join(self._lines)

    def wait_for(self, words):
        """Waits until the program has printed some words."""
        deadline = time.monotonic() + PATIENCE_S
        while words not in self.text:
            assert self._process.poll() is None, f"ended before {words!r}:\n{self.text}"
            assert time.monotonic() < deadline, f"no {words!r} in {PATIENCE_S} s:\n{self.text}"
            time.sleep(0.01)

    def children(self):
        """Returns its process ids, its own first: torchrun gives each rank its own session."""
        parents = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                # "pid (name) state ppid ..."; the name may contain spaces and parentheses
                parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
        found = [self.pid]
        for pid in found:
            found += sorted(child for child, parent in parents.items() if parent == pid)
        return found

    def send(self, number):
        """Sends a signal to all processes of its session, as a terminal does."""
        os.killpg(self.pid, number)

    def kill_all(self):
        """Kills all its processes and waits for it to end."""
        for pid in self.children():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._process.wait()

    def end(self, timeout_s=120):
        """Waits for its end; returns its exit code and its whole output."""
        code = self._process.wait(timeout_s)
        self._reader.join(timeout_s)
        return code, self.text

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._process.poll() is None:
            self.kill_all()
        self._reader.join()
        self._process.stdout.close()
