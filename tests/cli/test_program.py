"""Exit of programs: a message and an exit code for user errors, a traceback for bugs."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from pupilseg.cli.program import finishing
from tests.helpers.paths import ROOT

SCRIPT = """
import sys, os, errno
from pupilseg.cli.program import main_program
from pupilseg.errors import *
def main():
    {}
main_program(main)
"""


def program(body):
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(body)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("body", "code", "stderr"),
    [
        ("pass", 0, ""),
        ("return 3", 3, ""),
        ("raise DataError('bad frame')", 1, "error: bad frame\n"),
        ("raise UsageError('no such model')", 2, "error: no such model\n"),
        ("raise OutputError('disk')", 1, "error: disk\n"),
        ("raise KeyboardInterrupt", 130, "error: interrupted\n"),
        ("sys.exit(2)", 2, ""),
        (
            "sys.modules['pyarrow'] = None; import pupilseg.shards",
            2,
            "error: this command needs pyarrow; run: pip install 'pupilseg[data]'\n",
        ),
        ("import logging; logging.getLogger('pupilseg.x').info('hello')", 0, "hello\n"),
    ],
)
def test_exit_codes_and_messages(body, code, stderr):
    done = program(body)
    assert (done.returncode, done.stderr) == (code, stderr)


def test_a_full_disk_has_no_traceback():
    done = program("open('/dev/full', 'w').write('x' * 100000)")
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot write: [Errno 28]")


def test_a_bug_keeps_its_traceback():
    for body in ("1 / 0", "open('/nowhere')", "import nowhere"):
        done = program(body)
        assert done.returncode == 1
        assert "Traceback" in done.stderr


def test_a_broken_pipe_is_not_an_error():
    command = [sys.executable, "-c", SCRIPT.format("[print('x' * 1000) for _ in range(10000)]")]
    with subprocess.Popen(command, cwd=ROOT, stdout=-1, stderr=-1, text=True) as running:
        running.stdout.readline()
        running.stdout.close()
        assert running.stderr.read() == ""
        assert running.wait() == 141


def test_ctrl_c_has_no_traceback():
    body = "print('ready', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", SCRIPT.format(body)]
    with subprocess.Popen(command, cwd=ROOT, stdin=-1, stdout=-1, stderr=-1, text=True) as running:
        running.stdout.readline()
        running.send_signal(signal.SIGINT)
        assert running.wait() == 130
        assert running.stderr.read() == "error: interrupted\n"


def test_the_first_ctrl_c_is_a_request_and_the_second_interrupts():
    body = (
        "import time\n"
        "    from pupilseg.cli.program import finishing\n"
        "    with finishing('this epoch') as stop:\n"
        "        print('ready', flush=True)\n"
        "        while not stop():\n"
        "            time.sleep(0.01)\n"
        "        print('asked', flush=True)\n"
        "        sys.stdin.read()"
    )
    command = [sys.executable, "-c", SCRIPT.format(body)]
    with subprocess.Popen(command, cwd=ROOT, stdin=-1, stdout=-1, stderr=-1, text=True) as running:
        assert running.stdout.readline() == "ready\n"
        running.send_signal(signal.SIGINT)
        assert running.stdout.readline() == "asked\n"
        running.send_signal(signal.SIGINT)
        assert running.wait() == 130
        messages = running.stderr.read()
    assert "finishing this epoch, then stopping; Ctrl-C again stops at once" in messages
    assert messages.endswith("error: interrupted\n")


def test_the_ctrl_c_handler_is_restored():
    before = signal.getsignal(signal.SIGINT)
    with finishing("it") as stop:
        assert signal.getsignal(signal.SIGINT) is not before
        assert not stop()
    assert signal.getsignal(signal.SIGINT) is before
