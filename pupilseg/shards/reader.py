"""Opens shards: read-only mappings of the files, NumPy views of their columns, decoded samples.

Opening checks the manifest, file sizes and schemas; digests are checked by `verify` alone, which
reads every byte.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, overload

from pupilseg.shards.codec import FrameDecoder
from pupilseg.shards.format import COLUMNS, NAME, RAW
from pupilseg.shards.manifest import read_manifest
from pupilseg.shards.mapped import ColumnView, Shard, map_file, parse

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable
    from types import TracebackType

    from numpy.typing import NDArray


class ShardSet:
    """The samples of one split; made by `open_shards`.

    Views stay valid after `close`: the mapping goes when the last view does. Pickling carries the
    directory only, and the copy opens the files anew; after a fork both processes may read.

    Attributes:
        directory: where the manifest lies.
        manifest: as in the file.
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
        """Names of the columns, as in `format.COLUMNS`, then "name"."""
        return [*COLUMNS, NAME]

    def encoding(self, column: str) -> str | None:
        """Returns the encoding of a column where all shards agree, else None."""
        found = {shard.encodings[column]["encoding"] for shard in self.shards}
        return found.pop() if len(found) == 1 else None

    @overload
    def __getitem__(self, column: str) -> NDArray[Any]: ...
    @overload
    def __getitem__(self, column: Any) -> Any: ...
    def __getitem__(self, column: str) -> Any:
        """Returns a column as it is stored, without a copy.

        Raw columns have their decoded shape, e.g. image uint8 (n, 400, 640); encoded ones are
        (n, width). A read-only NumPy view where the split is one file, a `ColumnView` where it is
        several. "name" is a list of texts. Also found: "dist_map_first", beside an encoded
        "dist_map".

        Raises:
            KeyError: no such column, or shards store it in different encodings (`sample` decodes).
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
        """Returns the shard and the row in it of a sample.

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
        return shard.decode(row, FrameDecoder()) | {NAME: shard.names[row]}

    def _check_open(self) -> None:
        if not self.shards:
            raise ValueError(f"the shards of {self.directory} are closed")

    def close(self) -> None:
        """Gives up the mappings; those with living views go with the last of them."""
        self.shards = []
        for mapping in self._mappings:
            try:
                mapping.close()
            except BufferError:  # views are alive: the mapping goes with the last of them
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
        directory: holds `manifest.json`, e.g. DIR/train.

    Returns:
        A `ShardSet`; a context manager, closed at the end of its block.

    Raises:
        DataError: no manifest there, another format or version, a file missing, of another size
            or with other columns than the manifest says. The message names the file and the mend.
    """
    return ShardSet(Path(directory))
