"""Data sets of parquet files, as written by `datasets.push_to_hub` or the upstream scripts."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from pupilseg.errors import DataError
from pupilseg.files import file_digest
from pupilseg.preprocess import NONE
from pupilseg.sample import SPLITS, Sample
from pupilseg.sources import columns
from pupilseg.sources.paths import safe_relative
from pupilseg.sources.rows import RowStream, parquet_errors
from pupilseg.sources.spec import Source, SourceType
from pupilseg.sources.splits import (
    check_range,
    check_split,
    missing_split,
    natural_key,
    split_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from pupilseg.sources.options import SourceOptions

log = logging.getLogger(__name__)

PREPROCESSED = "gamma0.8+clahe1.5"
"""The preprocessing of rows with `preprocessed` = true (revision A)."""
_AUGMENTED = re.compile(r".*_(flip|blur|lines)(\.\w+)?")
EXPECTED = "train/*.parquet and validation/*.parquet, or data/{train,validation}-*.parquet"


@dataclass(frozen=True, slots=True)
class Part:
    """One file of a split.

    Attributes:
        path: relative to the root, POSIX.
        rows: int64, the rows of the file that belong to the split.
    """

    path: str
    rows: NDArray[np.int64] = field(repr=False)


class ParquetDataset:
    """Samples in the order of file names and rows.

    A range that starts where the previous one ended continues in the open file, so reading a split
    range by range decodes each row once.
    """

    def __init__(
        self,
        source: str,
        preprocessing: str,
        split_rule: str,
        root: Path,
        parts: dict[str, tuple[Part, ...]],
        unique_names: bool,
    ) -> None:
        self.source = source
        self.preprocessing = preprocessing
        self.split_rule = split_rule
        self._root = root
        self._parts = parts
        self._unique_names = unique_names
        self._stream: RowStream | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stream": None}

    def count(self, split: str) -> int:
        """Returns the number of samples in a split."""
        return sum(len(part.rows) for part in self._parts[check_split(split)])

    def read(self, split: str, start: int, stop: int) -> Iterator[Sample]:
        """Yields samples start .. stop - 1 of a split; see `sample.Dataset`."""
        check_range(split, start, stop, self.count(split))
        # Taken out while in use, so that two readers of one data set never share a stream.
        stream, self._stream = self._stream, None
        first = 0
        try:
            for part in self._parts[split]:
                rows = part.rows[max(start - first, 0) : max(stop - first, 0)]
                first += len(part.rows)
                if len(rows) == 0:
                    continue
                if stream is None or stream.file != self._root / part.path:
                    stream = RowStream(self._root / part.path)
                for row in rows.tolist():
                    yield self._sample(stream, row, part)
        finally:
            self._stream = stream

    def _sample(self, stream: RowStream, row: int, part: Part) -> Sample:
        values = stream.row(row)
        name = values.pop("name", None)
        if name is None or not self._unique_names:
            name = f"{part.path}#{row}" + (f":{name}" if name else "")
        return Sample(name=name, **values, origin=f"{stream.file} row {row}")


def inspect_files(
    root: Path, paths: list[str], where: str, options: SourceOptions
) -> dict[str, Any]:
    """Returns the entries of `source.json`, after reading the files' schemas and row names.

    Args:
        root: folder of the files.
        paths: relative, POSIX; files of a test split are skipped.
        where: the source, for messages.
        options: which augmented rows to keep.

    Raises:
        DataError: no files, a missing split or column, or an unreadable file.
    """
    files = []
    names = {split: list[str]() for split in SPLITS}
    seen = set()
    preprocessed: set[bool] = set()
    first: tuple[str, list[str]] | None = None
    for path in sorted(paths, key=natural_key):
        split = split_of(safe_relative(path, where))
        if split is None:
            raise DataError(f"{where}: {path} belongs to no known split; expected {EXPECTED}")
        seen.add(split)
        if split not in SPLITS:
            continue
        entry, file_columns, states = _inspect_file(root, path, split, options, names[split])
        if first is None:
            first = path, file_columns
        elif first[1] != file_columns:
            raise DataError(
                f"{where}: {path} has the columns {file_columns}, but {first[0]} has {first[1]}"
            )
        preprocessed |= states
        files.append(entry)
    counts = {split: len(names[split]) for split in SPLITS}
    for split in SPLITS:
        if not counts[split]:
            raise missing_split(where, split, EXPECTED, seen - {split})
    if len(preprocessed) > 1:
        raise DataError(f"{where}: column preprocessed is true in some rows and false in others")
    return {
        "preprocessing": PREPROCESSED if True in preprocessed else NONE,
        "split_rule": "splits of the source",
        "counts": counts,
        "unique_names": all(len(set(some)) == len(some) for some in names.values()),
        "files": files,
    }


def _inspect_file(
    root: Path, path: str, split: str, options: SourceOptions, names: list[str]
) -> tuple[dict[str, Any], list[str], set[bool]]:
    """Returns a file's entry, columns and values of `preprocessed`; appends to `names`."""
    file = root / path
    with parquet_errors(file):
        parquet = pq.ParquetFile(file)
        file_columns = columns.check_schema(parquet.schema_arrow, str(file))
        small = [n for n in (columns.NAME, columns.PREPROCESSED) if n in parquet.schema_arrow.names]
        table = parquet.read(columns=small) if small else None
        rows = parquet.metadata.num_rows
    kept = np.ones(rows, dtype=bool)
    row_names: list[str | None] = [None] * rows
    if table is not None and columns.NAME in small:
        row_names = table.column(columns.NAME).to_pylist()
        if not (options.augmented_train if split == "train" else options.augmented_validation):
            kept = np.array([not _AUGMENTED.fullmatch(n or "") for n in row_names], dtype=bool)
    states: set[bool] = set()
    if table is not None and columns.PREPROCESSED in small:
        states = {bool(value) for value in table.column(columns.PREPROCESSED).unique().to_pylist()}
    names += [
        name or f"{path}#{row}"
        for row, (name, keep) in enumerate(zip(row_names, kept, strict=True))
        if keep
    ]
    entry: dict[str, Any] = {
        "path": path,
        "size": file.stat().st_size,
        "split": split,
        "rows": rows,
    }
    if not kept.all():
        entry["kept"] = "".join("01"[int(keep)] for keep in kept)
    return entry, file_columns, states


def open_files(record: dict[str, Any], root: Path) -> ParquetDataset:
    """Returns the data set of a record whose files are in `root`.

    Raises:
        DataError: a file is missing or has changed.
    """
    parts: dict[str, list[Part]] = {split: [] for split in SPLITS}
    for entry in record["files"]:
        file = root / safe_relative(entry["path"], "source.json")
        if not file.is_file() or file.stat().st_size != entry["size"]:
            raise DataError(f"{file} is missing or has changed since it was recorded")
        kept = entry.get("kept")
        rows = (
            np.arange(entry["rows"])
            if kept is None
            else np.flatnonzero(np.frombuffer(kept.encode(), dtype=np.uint8) == ord("1"))
        )
        parts[entry["split"]].append(Part(entry["path"], rows))
    return ParquetDataset(
        source=record["source"],
        preprocessing=record["preprocessing"],
        split_rule=record["split_rule"],
        root=root,
        parts={split: tuple(parts[split]) for split in SPLITS},
        unique_names=record["unique_names"],
    )


def _find_files(root: Path) -> list[str]:
    """Returns the parquet files below a folder, relative and POSIX, without hidden ones."""
    paths = (path.relative_to(root) for path in root.rglob("*.parquet") if path.is_file())
    return sorted(
        PurePosixPath(path).as_posix()
        for path in paths
        if not any(part.startswith(".") for part in path.parts)
    )


def _inspect(
    source: Source, options: SourceOptions, _previous: dict[str, Any] | None, _raw_dir: Path
) -> dict[str, Any]:
    root = Path(source.location)
    found = inspect_files(root, _find_files(root), str(root), options)
    for entry in found["files"]:
        entry["sha256"] = file_digest(root / entry["path"])
    return found | {"source": f"parquet:{root.name}"}


TYPE = SourceType(
    kind="folder",
    layout="parquet",
    form="FOLDER",
    description="a folder of parquet files: {train,validation}/*.parquet or data/*.parquet",
    parse=None,
    matches=lambda source: bool(_find_files(Path(source.location))),
    inspect=_inspect,
    open=lambda record, _raw_dir: open_files(record, Path(record["request"]["location"])),
)
