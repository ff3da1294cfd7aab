"""Other loaders for the same batches, each with its own storage format.

A peer is a function that stores samples in a folder and returns a factory of loaders over them. It
raises ImportError if its package is not installed.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pupilseg.geometry import HEIGHT, WIDTH

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    Samples = Iterable[dict[str, NDArray[Any]]]
    MakeLoader = Callable[[int, int], Iterable[tuple[Tensor, ...]]]
    """Maps (batch size, worker processes) to an iterable of batches, one pass per epoch."""

SHAPES = {
    "image": (np.uint8, (HEIGHT, WIDTH)),
    "label": (np.uint8, (HEIGHT, WIDTH)),
    "spatial_weights": (np.float32, (HEIGHT, WIDTH)),
    "dist_map": (np.float32, (2, HEIGHT, WIDTH)),
}


def ready(sample: dict[str, Any]) -> tuple[Tensor, ...]:
    """Returns a sample as training needs it: normalized image, int64 label, float32 maps."""
    image, label, weights, maps = (torch.as_tensor(sample[name]) for name in SHAPES)
    # Favors the peers: 0.13 ms per frame, while `geometry.NORMALIZED[image]` takes 0.45 ms.
    return image.float().div_(255).sub_(0.5).div_(0.5)[None], label.long(), weights, maps


def _data_loader(
    dataset: Any, batch_size: int, workers: int, kind: Any = DataLoader, **options: Any
) -> Any:
    return kind(
        dataset,
        batch_size=batch_size,
        num_workers=workers,
        persistent_workers=workers > 0,
        **options,
    )


class Rows(Dataset[tuple[Any, ...]]):
    """Dataset over any sequence of rows."""

    def __init__(self, rows: Any, read: Callable[[Any], dict[str, Any]]) -> None:
        self._rows, self._read = rows, read

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return ready(self._read(self._rows[index]))


def _from_lists(row: dict[str, Any]) -> dict[str, NDArray[Any]]:
    """Reads a row of Python lists, as the earlier project did."""
    return {n: np.array(row[n], dtype=d).reshape(shape) for n, (d, shape) in SHAPES.items()}


def _from_tensors(row: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: row[n].reshape(shape) for n, (_, shape) in SHAPES.items()}


def _parquet(samples: Samples, folder: Path) -> Any:
    """Returns a `datasets.Dataset` of parquet rows with list columns."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    datasets.disable_progress_bars()
    path = folder / "rows.parquet"
    writer = None
    for sample in samples:
        columns = [
            pa.array([sample[name].reshape(-1)], pa.list_(pa.from_numpy_dtype(dtype)))
            for name, (dtype, _) in SHAPES.items()
        ]
        table = pa.table(dict(zip(SHAPES, columns, strict=True)))
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()
    return datasets.load_dataset(
        "parquet", data_files=str(path), split="train", cache_dir=str(folder / "cache")
    )


def earlier(samples: Samples, folder: Path) -> MakeLoader:
    """The earlier project: parquet rows as lists, `np.array(...).reshape`."""
    rows = Rows(_parquet(samples, folder), _from_lists)
    return partial(_data_loader, rows, shuffle=True)


def datasets_torch(samples: Samples, folder: Path) -> MakeLoader:
    """The same rows, `with_format("torch")`."""
    rows = Rows(_parquet(samples, folder).with_format("torch"), _from_tensors)
    return partial(_data_loader, rows, shuffle=True)


def memmap(samples: Samples, folder: Path) -> MakeLoader:
    """One `np.memmap` per column."""
    samples = list(samples)
    arrays = {}
    for name, (dtype, shape) in SHAPES.items():
        path = folder / f"{name}.npy"
        array = np.lib.format.open_memmap(path, "w+", dtype, (len(samples), *shape))
        for row, sample in enumerate(samples):
            array[row] = sample[name]
        # Copy-on-write, because torch warns about read-only memory.
        arrays[name] = np.load(path, mmap_mode="c")
    rows = Rows(range(len(samples)), lambda row: {n: a[row].copy() for n, a in arrays.items()})
    return partial(_data_loader, rows, shuffle=True)


def litdata(samples: Samples, folder: Path) -> MakeLoader:
    """Chunks of litdata."""
    import litdata

    stored = list(samples)
    chunks = folder / "chunks"
    litdata.optimize(
        partial(_numbered, stored),
        list(range(len(stored))),
        str(chunks),
        chunk_bytes="64MB",
        num_workers=1,
        start_method="fork",
        verbose=False,
    )
    rows = litdata.StreamingDataset(str(chunks), shuffle=True, transform=ready)
    return partial(_data_loader, rows, kind=litdata.StreamingDataLoader)


def _numbered(stored: list[dict[str, NDArray[Any]]], index: int) -> dict[str, NDArray[Any]]:
    return stored[index]


def mosaic(samples: Samples, folder: Path) -> MakeLoader:
    """Shards of mosaicml-streaming."""
    import streaming

    shards = str(folder / "mds")
    columns = {
        name: f"ndarray:{np.dtype(dtype).name}:{','.join(map(str, shape))}"
        for name, (dtype, shape) in SHAPES.items()
    }
    with streaming.MDSWriter(out=shards, columns=columns) as writer:
        for sample in samples:
            writer.write(sample)

    class Local(streaming.StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            return ready({name: array.copy() for name, array in super().__getitem__(at).items()})

    streaming.base.util.clean_stale_shared_memory()

    def make(batch_size: int, workers: int) -> Any:
        rows = Local(local=shards, shuffle=True, batch_size=batch_size)
        return _data_loader(rows, batch_size, workers)

    return make


def webdataset(samples: Samples, folder: Path) -> MakeLoader:
    """One tar file per 64 samples, with a shuffle buffer, as WebDataset recommends."""
    import webdataset as wds

    with wds.ShardWriter(str(folder / "eyes-%05d.tar"), maxcount=64, verbose=0) as writer:
        for row, sample in enumerate(samples):
            writer.write({"__key__": f"{row:06}", **{f"{n}.npy": sample[n] for n in SHAPES}})
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]

    def make(batch_size: int, workers: int) -> Any:
        rows = wds.WebDataset(urls, shardshuffle=len(urls), empty_check=False).shuffle(64)
        return _data_loader(rows.decode().map(_unnamed), batch_size, workers)

    return make


def _unnamed(row: dict[str, Any]) -> tuple[Tensor, ...]:
    return ready({name: row[f"{name}.npy"] for name in SHAPES})


def ffcv(samples: Samples, folder: Path) -> MakeLoader:
    """One FFCV file; its threads run Numba-compiled code and write into reused batches.

    FFCV is the only peer without a wheel. To compile its extension, install OpenCV and
    libjpeg-turbo (Debian: libopencv-dev, libturbojpeg0-dev, pkg-config), then run
    `pip install --no-build-isolation ffcv`.
    """
    from ffcv.fields import NDArrayField
    from ffcv.fields.decoders import NDArrayDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler
    from ffcv.pipeline.operation import Operation
    from ffcv.transforms import ToTensor
    from ffcv.writer import DatasetWriter

    class Affine(Operation):  # type: ignore[misc]
        """Writes value * scale + offset in another dtype."""

        def __init__(self, dtype: Any, shape: tuple[int, ...], scale: Any, offset: Any) -> None:
            super().__init__()
            self._dtype, self._shape = np.dtype(dtype), shape
            self._scale, self._offset = dtype(scale), dtype(offset)

        def generate_code(self) -> Callable[..., Any]:
            scale, offset, rows_of_threads = self._scale, self._offset, Compiler.get_iterator()

            def convert(batch: Any, out: Any) -> Any:
                out = out[: len(batch)]
                flat = out.reshape(batch.shape)
                for row in rows_of_threads(len(batch)):
                    flat[row] = batch[row] * scale + offset
                return out

            convert.is_parallel = True  # type: ignore[attr-defined]  # an attribute that FFCV reads
            return convert

        def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, Any]:
            state = replace(previous_state, jit_mode=True, shape=self._shape, dtype=self._dtype)
            return state, AllocationQuery(self._shape, self._dtype)

    path = str(folder / "eyes.beton")
    fields = {n: NDArrayField(np.dtype(dtype), shape) for n, (dtype, shape) in SHAPES.items()}
    rows = [tuple(sample[name] for name in SHAPES) for sample in samples]
    DatasetWriter(path, fields, num_workers=1).from_indexed_dataset(rows)
    convert = {
        "image": [Affine(np.float32, (1, HEIGHT, WIDTH), 2 / 255, -1)],
        "label": [Affine(np.int64, (HEIGHT, WIDTH), 1, 0)],
    }

    def make(batch_size: int, workers: int) -> Any:
        return Loader(
            path,
            batch_size=batch_size,
            num_workers=max(workers, 1),  # threads
            os_cache=True,
            order=OrderOption.RANDOM,
            pipelines={n: [NDArrayDecoder(), *convert.get(n, []), ToTensor()] for n in SHAPES},
        )

    return make


PEERS: dict[str, Callable[[Samples, Path], MakeLoader]] = {
    "earlier project (`datasets` rows as lists)": earlier,
    '`datasets`, `with_format("torch")`': datasets_torch,
    "`np.memmap`": memmap,
    "litdata": litdata,
    "mosaicml-streaming": mosaic,
    "webdataset": webdataset,
    "FFCV": ffcv,
}
