"""One thread that fills a ring of slots ahead of its consumer."""

from __future__ import annotations

import logging
import os
from collections import deque
from queue import SimpleQueue
from threading import Event, Thread
from typing import TYPE_CHECKING, TypeVar

from pupilseg.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

log = logging.getLogger(__name__)

Work = TypeVar("Work")
Result = TypeVar("Result")
THREAD_NAME = "pupilseg-loader"
_JOIN_SECONDS = 10.0


class Stopped(Exception):  # noqa: N818 - not an error: the consumer went away
    """Raised by a fill that saw `stop` set."""


def prefetch(
    fill: Callable[[int, Work, Event], Result], work: Sequence[Work], slots: int
) -> Generator[Result]:
    """Yields `fill(slot, item, stop)` for each item in order, computed in a thread.

    A slot is filled again only after `slots - 1` more results have been drawn, so what a result
    keeps in its slot is valid until then.

    Args:
        fill: called in the thread; may look at `stop` and raise `Stopped` when it is set.
        work: the items.
        slots: at least 2.

    Yields:
        The results.

    Raises:
        UsageError: drawn from in a process that was forked off meanwhile, which has no thread.
        BaseException: what `fill` raised, with the thread's traceback; nothing follows it.
    """
    free: SimpleQueue[int | None] = SimpleQueue()
    ready: SimpleQueue[tuple[int, Result] | BaseException] = SimpleQueue()
    stop = Event()
    for slot in range(slots):
        free.put(slot)

    def produce() -> None:
        try:
            for item in work:
                slot = free.get()
                if slot is None or stop.is_set():
                    return
                ready.put((slot, fill(slot, item, stop)))
        except BaseException as error:  # noqa: BLE001 - raised again in the consumer
            ready.put(error)

    thread = Thread(target=produce, name=THREAD_NAME, daemon=True)
    thread.start()
    held: deque[int] = deque()
    process = os.getpid()
    try:
        for _ in work:
            _check_process(process)
            if len(held) == slots - 1:
                free.put(held.popleft())
            outcome = ready.get()
            if isinstance(outcome, BaseException):
                raise outcome
            slot, result = outcome
            del outcome
            held.append(slot)
            yield result
    finally:
        stop.set()
        free.put(None)
        thread.join(_JOIN_SECONDS)
        if thread.is_alive():
            log.warning("the loader's thread still reads after %.0f s; it is left", _JOIN_SECONDS)


def _check_process(process: int) -> None:
    """Raises UsageError in another process than the one given: it would wait for ever."""
    if os.getpid() != process:
        raise UsageError(
            f"these batches are prepared by a thread of process {process}, which process "
            f"{os.getpid()} was forked from; start a new iteration after the fork"
        )
