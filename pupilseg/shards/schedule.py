"""Which worker builds which shard."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class Runs:
    """Gives each worker a run of neighbouring shards; who is done takes half of the longest rest.

    A parquet file can only be decoded forwards, so a worker that jumps pays for what it skips. With
    shards handed out in turn, each of two workers would decode every row.

    Args:
        shards: numbers of what is to be built, in the order of the source.
        workers: at least 1.
    """

    def __init__(self, shards: Sequence[int], workers: int) -> None:
        bounds = [len(shards) * worker // workers for worker in range(workers + 1)]
        self._left = [list(shards[a:b]) for a, b in pairwise(bounds)]

    def next(self, worker: int) -> int | None:
        """Returns the shard that a worker builds now; None if none is left."""
        if not self._left[worker]:
            longest = max(self._left, key=len)
            half = len(longest) // 2
            self._left[worker], longest[half:] = longest[half:], []
        own = self._left[worker]
        return own.pop(0) if own else None
