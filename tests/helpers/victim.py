"""Kills a function after some time, or just before each change it makes to a file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

_SERVER = """
import os, signal, sqlite3, sys, traceback
from pathlib import Path

# Python reports these events just before they happen (PEP 578). The number is the position of the
# argument that holds the descriptor of a directory; the path is relative to it in `shutil.rmtree`.
CHANGES = {"open": None, "os.mkdir": 2, "os.remove": 1, "os.rename": 2, "os.rmdir": 1}


def kill_before(nth, folder):
    made = 0

    def count():
        nonlocal made
        made += 1
        if made == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    def statement(text):
        if not text.startswith("SELECT"):
            count()

    # SQLite opens and writes files without Python, so each of its statements counts as a change.
    connect = sqlite3.connect

    def connect_and_trace(*args, **options):
        connection = connect(*args, **options)
        connection.set_trace_callback(statement)
        return connection

    sqlite3.connect = connect_and_trace

    def hook(event, args):
        if event not in CHANGES or isinstance(args[0], int):
            return
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        path, at = os.fsdecode(args[0]), CHANGES[event]
        if at is not None and args[at] >= 0:
            path = os.path.join(os.readlink(f"/proc/self/fd/{args[at]}"), path)
        if path.startswith(folder):
            count()

    sys.addaudithook(hook)


# Each run is a fork, so that the interpreter starts and imports only once. This process does no
# other work, so libraries have started no threads that a fork would lose.
for line in iter(sys.stdin.readline, ""):
    nth, _, folder = line.strip().partition(" ")
    child = os.fork()
    if child == 0:
        status = 1
        os.dup2(2, 1)  # stdout is for answers to the parent
        try:
            if int(nth):
                kill_before(int(nth), folder)
            run(Path(folder))
            status = 0
        except BaseException:
            traceback.print_exc()  # os._exit prints none
        finally:
            sys.stderr.flush()
            os._exit(status)
    print(child, flush=True)
    sys.stdin.readline()  # the pid of an ended child must not be reused before
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


class Victim:
    """Runs `run(folder: Path)` repeatedly, each time in a new fork of one process.

    Args:
        source: Python code that defines `run`; its imports are done once.
        env: environment of the process; None for this process's.
    """

    def __init__(self, source, env=None):
        environment = {**(env or os.environ), "PYTHONPATH": os.pathsep.join(sys.path)}
        self._server = subprocess.Popen(
            [sys.executable, "-c", source + _SERVER],
            env={**environment, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, folder, *, before_change=0, after_s=None):
        """Runs the function once.

        Args:
            folder: its argument.
            before_change: kill it just before its n-th change below the folder; 0 for never.
            after_s: kill it after this many seconds; None for never.

        Returns:
            True if it ended by itself, False if it was killed.
        """
        print(before_change, folder, file=self._server.stdin, flush=True)
        child = int(self._server.stdout.readline())
        if after_s is not None:
            time.sleep(after_s)
            os.kill(child, signal.SIGKILL)
        print(file=self._server.stdin, flush=True)
        code = int(self._server.stdout.readline())
        assert code == 0 or (code == -signal.SIGKILL and (before_change or after_s is not None))
        return code == 0

    def each_kill(self, parent):
        """Kills one run before its first change to files, the next before its second, and so on.

        Yields:
            The folder of each killed run, until a run makes fewer changes and ends by itself.
        """
        for number in count(1):
            folder = Path(parent) / f"kill-{number}"
            if self.run(folder, before_change=number):
                return
            yield folder

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()
