"""Builds shards in worker processes."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import pairwise
from multiprocessing import connection, get_context, parent_process
from typing import TYPE_CHECKING, Any

import cv2

from pupilseg.errors import DataError
from pupilseg.shards.build import Job, build_shard

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class WorkQueue:
    """Work stealing over contiguous shards.

    Each worker starts with a contiguous run of shards; an idle worker takes half of the longest
    remaining run. A parquet file can only be decoded forward, so a worker also decodes the rows
    that it skips: if two workers took shards alternately, each would decode every row.

    Args:
        shards: shard numbers in the order of the source.
        workers: at least 1.
    """

    def __init__(self, shards: Sequence[int], workers: int) -> None:
        bounds = [len(shards) * worker // workers for worker in range(workers + 1)]
        self._remaining = [list(shards[a:b]) for a, b in pairwise(bounds)]

    def take(self, worker: int) -> int | None:
        """Returns the next shard for a worker, or None if none is left."""
        if not self._remaining[worker]:
            longest = max(self._remaining, key=len)
            half = len(longest) // 2
            self._remaining[worker] = longest[half:]
            del longest[half:]
        own = self._remaining[worker]
        return own.pop(0) if own else None


def build_shards(
    job: Job, shards: Sequence[int], workers: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (shard, record) as shards are finished, built by up to `workers` processes.

    Raises:
        DataError: too many bad samples, or a worker was killed.
        OutputError: a shard cannot be written.
    """
    workers = min(workers, len(shards))
    if workers == 1:
        for index in shards:
            yield index, build_shard(job, index)
        return
    # "spawn", because a forked child would inherit locks held by threads of cv2, torch or pyarrow.
    # One pool per worker, because a single pool does not control which process gets a task.
    spawn, queue = get_context("spawn"), WorkQueue(shards, workers)
    pools = [
        ProcessPoolExecutor(1, spawn, initializer=_start_worker, initargs=(job,))
        for _ in range(workers)
    ]
    running: dict[Future[dict[str, Any]], tuple[int, int]] = {}

    def submit_next(worker: int) -> None:
        index = queue.take(worker)
        if index is not None:
            running[pools[worker].submit(_build_in_worker, index)] = worker, index

    try:
        for worker in range(workers):
            submit_next(worker)
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                worker, index = running.pop(future)
                submit_next(worker)
                yield index, future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was killed, usually for lack of memory; finished shards are kept: "
            "run the same command again, with fewer --workers or --rows-per-shard"
        ) from error
    finally:
        for pool in pools:
            pool.shutdown(wait=True, cancel_futures=True)


_job: Job | None = None


def _start_worker(job: Job) -> None:
    """Initializes a worker process: one OpenCV thread, ignores Ctrl-C, exits with its parent."""
    global _job  # noqa: PLW0603 - passed once per process; as an argument it is pickled per task
    _job = job
    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:
        # Otherwise a pool's worker waits forever if its parent is killed.
        def exit_with_parent() -> None:
            connection.wait([parent.sentinel])
            os._exit(1)

        threading.Thread(target=exit_with_parent, daemon=True).start()


def _build_in_worker(index: int) -> dict[str, Any]:
    assert _job is not None
    return build_shard(_job, index)
