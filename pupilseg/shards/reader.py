"""Opens shards: read-only mappings of the files, NumPy views of their columns, decoded samples.

Opening checks the manifest, file sizes and schemas. Digests are checked only by `verify`, which
reads every byte.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, overload

import numpy as np

from pupilseg.shards.codec import FrameDecoder
from pupilseg.shards.format import COLUMNS, NAME, RAW
from pupilseg.shards.manifest import read_manifest
from pupilseg.shards.mapped import ColumnView, Shard, map_file, parse

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable
    from types import TracebackType

    from numpy.typing import NDArray


def new_row() -> dict[str, NDArray[Any]]:
    """Returns an uninitialized array for each column of a decoded row, without its name."""
    return {column: np.empty(spec.shape, dtype=spec.dtype) for column, spec in COLUMNS.items()}


class ShardSet:
    """The samples of one split, opened by `open_shards`.

    Views stay valid after `close`: a mapping is released with its last view. Pickling saves only
    the directory, and unpickling opens the files again. After a fork, both processes can read.

    Attributes:
        directory: the split's directory.
        manifest: contents of `manifest.json`.
        shards: the mapped files.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.manifest = read_manifest(directory)
        self.shards: list[Shard] = []
        self._mappings: list[mmap.mmap] = []
        self._starts = [0, *accumulate(entry["rows"] for entry in self.manifest["files"])]
        try:
            for entry in self.manifest["files"]:
                mapping = map_file(self.directory, entry)
                self._mappings.append(mapping)
                self.shards.append(parse(self.directory / entry["file"], mapping, entry))
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def columns(self) -> list[str]:
        """Names of the columns: those of `format.COLUMNS`, then "name"."""
        return [*COLUMNS, NAME]

    def encoding(self, column: str) -> str | None:
        """Returns the encoding of a column, or None if it differs between shards."""
        found = {shard.encodings[column]["encoding"] for shard in self.shards}
        return found.pop() if len(found) == 1 else None

    @overload
    def __getitem__(self, column: str) -> NDArray[Any]: ...
    @overload
    def __getitem__(self, column: Any) -> Any: ...
    def __getitem__(self, column: str) -> Any:
        """Returns a column as stored, without copying it.

        The result is a read-only NumPy view for a split of one file, and a `ColumnView` for several
        files. Raw columns have their decoded shape, e.g. image uint8 (n, 400, 640); encoded columns
        are (n, width). "name" is a list of strings. An encoded "dist_map" has a second column,
        "dist_map_first".

        Raises:
            KeyError: there is no such column, or the shards store it in different encodings (use
                `sample` then).
        """
        self._check_open()
        if column == NAME:
            return [name for shard in self.shards for name in shard.names]
        parts = []
        for shard in self.shards:
            field = shard.fields[column]
            raw = column in COLUMNS and shard.encodings[column]["encoding"] == RAW
            parts.append(field.reshape(-1, *COLUMNS[column].shape) if raw else field)
        if len({(part.dtype, part.shape[1:]) for part in parts}) > 1:
            raise KeyError(f"{column!r} has several encodings in {self.directory}; use sample(i)")
        return parts[0] if len(parts) == 1 else ColumnView(parts)

    def locate(self, index: int) -> tuple[Shard, int]:
        """Returns the shard that holds a sample, and the row in that shard.

        Raises:
            IndexError: out of range.
        """
        self._check_open()
        index = range(len(self))[index]
        shard = bisect_right(self._starts, index) - 1
        return self.shards[shard], index - self._starts[shard]

    def sample(self, index: int) -> dict[str, Any]:
        """Returns every column of a sample, decoded into new arrays, and its name.

        image uint8 (400, 640); label uint8 (400, 640) of {0, 1}; spatial_weights float32
        (400, 640); dist_map float32 (2, 400, 640); ellipse float32 (4,); ellipse_free float32 (5,);
        name str.

        Raises:
            IndexError: out of range.
            DataError: the stored bytes are damaged.
        """
        shard, row = self.locate(index)
        sample: dict[str, Any] = new_row()
        shard.decode(row, sample, FrameDecoder())
        return sample | {NAME: shard.names[row]}

    def _check_open(self) -> None:
        if not self.shards:
            raise ValueError(f"the shards of {self.directory} are closed")

    def close(self) -> None:
        """Releases the mappings; a mapping with views is released with the last view."""
        self.shards = []
        for mapping in self._mappings:
            try:
                mapping.close()
            except BufferError:  # it has views
                continue
        self._mappings = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Callable[[Path], ShardSet], tuple[Path]]:
        return open_shards, (self.directory.absolute(),)

    def __repr__(self) -> str:
        return f"ShardSet({str(self.directory)!r}, {len(self)} samples, {len(self.shards)} files)"


def open_shards(directory: str | Path) -> ShardSet:
    """Opens the shards of a split.

    Args:
        directory: contains `manifest.json`, e.g. DIR/train.

    Returns:
        A context manager, which closes the shards at the end of its block.

    Raises:
        DataError: the manifest is missing or has another format or version, or a file is missing
            or does not have the listed size or columns. The message names the file and a fix.
    """
    return ShardSet(Path(directory))
