"""One step of a line of work in a thread of its own, a few items ahead of the next step."""

from __future__ import annotations

import logging
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

log = logging.getLogger(__name__)

Item = TypeVar("Item")
_JOIN_SECONDS = 10.0
_POLL_SECONDS = 0.1
"""How soon a waiting thread notices that nobody wants its items any more."""


def ahead(items: Iterable[Item], slots: int = 3) -> Generator[Item]:
    """Yields the items in order, drawn by a thread at most `slots` ahead.

    A generator that is given here runs wholly in the thread, which is also where it is closed when
    the consumer goes away.

    Args:
        items: drawn from once.
        slots: at least 1.

    Raises:
        BaseException: what drawing raised, with the thread's traceback; nothing follows it.
    """
    ready: Queue[tuple[Item] | BaseException | None] = Queue(slots)
    stop = Event()
    thread = Thread(target=_produce, args=(items, ready, stop), name="pupilseg-step", daemon=True)
    thread.start()
    try:
        while (parcel := ready.get()) is not None:
            if isinstance(parcel, BaseException):
                raise parcel
            (item,) = parcel
            del parcel
            yield item
            del item
    finally:
        stop.set()
        _drain(ready)
        thread.join(_JOIN_SECONDS)
        if thread.is_alive():
            log.warning("a step still works after %.0f s; it is left alone", _JOIN_SECONDS)


def _produce(
    items: Iterable[Item], ready: Queue[tuple[Item] | BaseException | None], stop: Event
) -> None:
    """Hands over the items, then None or what went wrong."""

    def hand_over(parcel: tuple[Item] | BaseException | None) -> bool:
        while not stop.is_set():
            try:
                ready.put(parcel, timeout=_POLL_SECONDS)
            except Full:
                continue
            return True
        return False

    end: BaseException | None = None
    try:
        for item in items:
            if not hand_over((item,)):
                break
    except BaseException as error:  # noqa: BLE001 - raised again in the consumer
        end = error
    finally:
        close = getattr(items, "close", None)
        if close is not None:
            close()
    hand_over(end)


def _drain(queue: Queue[tuple[Item] | BaseException | None]) -> None:
    """Forgets what waits, so that its memory goes before the thread is waited for."""
    while True:
        try:
            queue.get_nowait()
        except Empty:
            return
