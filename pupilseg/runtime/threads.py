"""Background threads: prefetching into reused buffers, pipeline stages, and a pool for batch rows.

NumPy and OpenCV release the GIL, so threads are enough to use several cores. This module imports
neither torch nor pyarrow: `pupilseg.predict` uses it without them.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait
from queue import SimpleQueue
from threading import Event, Semaphore, Thread
from typing import TYPE_CHECKING, Generic, Self, TypeVar

from pupilseg.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable
    from types import TracebackType

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")
Scratch = TypeVar("Scratch")

THREAD_NAME = "pupilseg-background"
_JOIN_SECONDS = 10.0


class Stopped(Exception):  # noqa: N818 - a signal rather than an error
    """Raised in a background thread whose consumer is gone."""


def in_background(
    items: Iterable[Item], ahead: int = 3, *, stop: Event | None = None
) -> Generator[Item]:
    """Yields items in order while a background thread draws the next ones.

    The thread starts at the first `next()` and stops when the generator is closed. A generator
    passed as `items` runs and is closed entirely in that thread, so stages can be chained.

    Args:
        items: an iterable, drawn from once.
        ahead: maximum number of items drawn before the consumer asks for them, at least 1.
        stop: event that is set when the consumer is gone, for long-running `items` to check.

    Raises:
        UsageError: the process was forked after the thread started; the child has no thread.
        BaseException: any error raised while drawing, with the thread's traceback.
    """
    stop = stop or Event()
    permits = Semaphore(ahead)
    results: SimpleQueue[tuple[Item] | BaseException | None] = SimpleQueue()
    thread = Thread(
        target=_produce, args=(items, permits, results, stop), name=THREAD_NAME, daemon=True
    )
    thread.start()
    process = os.getpid()
    try:
        while True:
            _refuse_fork_of(process)
            permits.release()
            result = results.get()
            if result is None:
                return
            if isinstance(result, BaseException):
                raise result
            (item,) = result
            del result
            yield item
            del item
    finally:
        if os.getpid() == process:
            stop.set()
            permits.release()
            thread.join(_JOIN_SECONDS)
            if thread.is_alive():
                log.warning("a background thread did not stop within %.0f s", _JOIN_SECONDS)


def _produce(
    items: Iterable[Item],
    permits: Semaphore,
    results: SimpleQueue[tuple[Item] | BaseException | None],
    stop: Event,
) -> None:
    """Queues each item as a tuple, then None or the error that ended the iteration."""
    end: BaseException | None = None
    try:
        permits.acquire()
        for item in items:
            results.put((item,))
            del item  # releases its memory while the next one is drawn
            permits.acquire()
            if stop.is_set():
                break
        close = getattr(items, "close", None)
        if close is not None:
            close()
    except BaseException as error:  # noqa: BLE001 - raised again in the consumer
        end = error
    results.put(end)


def _refuse_fork_of(process: int) -> None:
    if os.getpid() != process:
        raise UsageError(
            f"this iterator is filled by a thread of process {process}, which does not exist in "
            f"its fork, process {os.getpid()}; create a new iterator after forking"
        )


def prefetch(
    fill: Callable[[int, Item, Event], Result],
    items: Iterable[Item],
    slots: int,
    ahead: int = 1,
) -> Generator[Result]:
    """Yields `fill(slot, item, stop)` for each item, computed ahead in a background thread.

    Slots are used in turn: a slot is filled again only once `slots - ahead` more results have been
    drawn. Until then a result may refer to memory that belongs to its slot.

    Args:
        fill: called in the thread; may raise `Stopped` when the event `stop` is set.
        items: an iterable, drawn from once.
        slots: at least 2.
        ahead: results computed before the consumer asks for them, 1 .. slots - 1.

    Raises:
        UsageError: as `in_background`.
        BaseException: any error raised by `fill`, with the thread's traceback.
    """
    stop = Event()
    filled = (fill(number % slots, item, stop) for number, item in enumerate(items))
    return in_background(filled, ahead, stop=stop)


class _PerThread(threading.local, Generic[Scratch]):
    """A value that each thread creates for itself on first access."""

    def __init__(self, make: Callable[[], Scratch]) -> None:
        self.value = make()


class RowPool(Generic[Scratch]):
    """Runs a function for every row of a batch in several threads.

    Each thread keeps its own scratch memory, because allocating new arrays would cost more in page
    faults than the computation itself. Threads start with the first batch and end with `close` or
    at the end of a `with` block. A closed pool can be used again.

    Args:
        make_scratch: creates the scratch memory of a thread.
        threads: number of threads including the caller's, at least 1.
        name: prefix of the threads' names.
    """

    def __init__(self, make_scratch: Callable[[], Scratch], threads: int, name: str) -> None:
        self._scratch = _PerThread(make_scratch)
        self._threads = threads
        self._name = name
        self._executor: ThreadPoolExecutor | None = None
        self._process = 0

    def run(
        self, work: Callable[[int, Scratch], None], rows: int, stop: Event | None = None
    ) -> None:
        """Calls `work(row, scratch)` once for each of `range(rows)` and waits for all calls.

        Raises:
            Stopped: `stop` was set before the last row was started.
            Exception: the first error raised by `work`; the other threads have stopped by then, and
                rows not yet started are dropped.
        """
        remaining = deque(range(rows))

        def take_rows() -> None:
            try:
                while True:
                    try:
                        row = remaining.popleft()
                    except IndexError:
                        return
                    if stop is not None and stop.is_set():
                        raise Stopped
                    work(row, self._scratch.value)
            finally:
                remaining.clear()  # after an error, the other threads stop too

        helpers = min(self._threads, rows) - 1
        futures = [self._running().submit(take_rows) for _ in range(helpers)]
        try:
            take_rows()
        finally:
            wait(futures)
        for future in futures:
            future.result()

    def _running(self) -> ThreadPoolExecutor:
        # A forked child inherits the executor but none of its threads.
        if self._executor is None or self._process != os.getpid():
            self._executor = ThreadPoolExecutor(self._threads - 1, self._name)
            self._process = os.getpid()
        return self._executor

    def close(self) -> None:
        """Ends the threads, without waiting for one that hangs in a read."""
        if self._executor is not None:
            self._executor.shutdown(wait=False)
            self._executor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
