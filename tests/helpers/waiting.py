"""Waiting for a condition, however slow the machine is."""

import time

PATIENCE_S = 600
"""Limit of every wait, for a busy machine; a test that passes never waits this long."""


def eventually(condition):
    """Waits until a condition holds."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {PATIENCE_S} s: {condition}"
        time.sleep(0.01)
