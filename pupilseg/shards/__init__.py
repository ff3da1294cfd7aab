"""Shards: a split as memory-mapped Arrow files with compact, exact columns (docs/format.md)."""

from __future__ import annotations

from pupilseg.shards.reader import ShardSet, open_shards
from pupilseg.shards.verify import verify
from pupilseg.shards.writer import write_shards

__all__ = ["ShardSet", "open_shards", "verify", "write_shards"]
