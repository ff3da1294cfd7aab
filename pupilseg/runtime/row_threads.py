"""The rows of a batch over several threads, which NumPy and OpenCV let run at the same time."""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Self

from pupilseg.runtime.prefetch import THREAD_NAME, Stopped
from pupilseg.shards.codec import FrameDecoder

if TYPE_CHECKING:
    from collections.abc import Callable
    from threading import Event
    from types import TracebackType


class RowThreads:
    """Does rows in several threads, each with a decoder of its own; threads run within its block.

    Args:
        count: of the threads, the caller's among them.
    """

    def __init__(self, count: int) -> None:
        self._decoders = [FrameDecoder() for _ in range(count)]
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        # Anew for each epoch, so that between two of them a fork finds no thread.
        if len(self._decoders) > 1:
            self._pool = ThreadPoolExecutor(len(self._decoders) - 1, THREAD_NAME)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            # Idle threads end at once; one that hangs on a dead disk is not waited for.
            self._pool.shutdown(wait=False)
            self._pool = None

    def run(
        self, work: Callable[[int, FrameDecoder], None], rows: int, stop: Event | None = None
    ) -> None:
        """Calls `work(row, decoder)` for each row; returns when all are done.

        Raises:
            Stopped: `stop` was set; rows are left.
            Exception: what `work` raised, once no thread works any more; rows are left.
        """
        todo = deque(range(rows))

        def share(decoder: FrameDecoder) -> None:
            try:
                while todo:
                    try:
                        row = todo.popleft()
                    except IndexError:  # another thread took the last one
                        return
                    if stop is not None and stop.is_set():
                        raise Stopped
                    work(row, decoder)
            finally:
                todo.clear()  # after an error nobody need go on

        own, *others = self._decoders[: max(1, rows)]
        pending = [] if self._pool is None else [self._pool.submit(share, d) for d in others]
        try:
            share(own)
        finally:
            wait(pending)
        for done in pending:
            done.result()
