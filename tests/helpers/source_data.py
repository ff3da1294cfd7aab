"""Small data sets in every layout, made of blobs and ellipses, without recorded eyes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pupilseg.geometry import HEIGHT, WIDTH, Ellipse, ellipse_mask, ellipse_vector
from pupilseg.maps import distance_maps, spatial_weights

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

SHAPES = {
    "image": (HEIGHT, WIDTH),
    "label": (HEIGHT, WIDTH),
    "spatial_weights": (HEIGHT, WIDTH),
    "dist_map": (2, HEIGHT, WIDTH),
}


def frame(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns an image and a binary label that depend only on `number`."""
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 256, (10, 16), dtype=np.uint8)
    image = cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_NEAREST)
    x, y, a, b = rng.uniform((150, 100, 30, 20), (490, 300, 60, 30))
    return image, ellipse_mask(Ellipse(x, y, a, b, float(rng.uniform(-1.5, 1.5))))


def four_classes(label: np.ndarray) -> np.ndarray:
    """Returns a label of four classes, with the pupil as class 3."""
    classes = np.zeros_like(label)
    classes[50:350, 60:600] = 1
    classes[cv2.dilate(label, np.ones((41, 41), np.uint8)) == 1] = 2
    classes[label == 1] = 3
    return classes


def list_array(values: np.ndarray, lengths: Sequence[int]) -> pa.Array:
    """Returns an array (rows, ...) as nested lists of the given lengths."""
    array = pa.array(values.reshape(-1))
    for length in reversed(lengths):
        offsets = np.arange(0, len(array) + 1, length, dtype=np.int32)
        array = pa.ListArray.from_arrays(pa.array(offsets), array)
    return array


def table(numbers: Sequence[int], *, nested: bool, maps: bool = True) -> dict[str, pa.Array]:
    """Returns the columns of revision A (nested, with ellipse) or B (flat)."""
    frames = [frame(number) for number in numbers]
    columns = {
        "image": np.stack([image for image, _ in frames]),
        "label": np.stack([label for _, label in frames]),
    }
    if maps:
        columns["spatial_weights"] = np.stack([spatial_weights(label) for _, label in frames])
        columns["dist_map"] = np.stack([distance_maps(label) for _, label in frames])
    arrays = {
        name: list_array(values, values.shape[1:] if nested else (values[0].size,))
        for name, values in columns.items()
    }
    if nested:
        vectors = np.stack([ellipse_vector(label) for _, label in frames])
        for index, name in enumerate(("cx", "cy", "rx", "ry")):
            arrays[name] = pa.array(vectors[:, index])
        arrays["preprocessed"] = pa.array([True] * len(frames))
        arrays["filename"] = pa.array([f"{number}.png" for number in numbers])
    else:
        arrays["filename"] = pa.array([f"{number}" for number in numbers])
    return arrays


def write(path: Path, columns: dict[str, pa.Array], *, rows_per_group: int = 1000) -> Path:
    """Writes columns; nested ones get the field metadata of array types of `datasets`."""
    fields = []
    for name, array in columns.items():
        metadata = None
        if name in SHAPES and pa.types.is_nested(getattr(array.type, "value_type", pa.null())):
            shape, dtype = SHAPES[name], "uint8" if name in ("image", "label") else "float32"
            metadata = {
                "ARROW:extension:name": (
                    f"datasets.features.features.Array{len(shape)}DExtensionType"
                ),
                "ARROW:extension:metadata": json.dumps([list(shape), dtype]),
            }
        fields.append(pa.field(name, array.type, metadata=metadata))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table(list(columns.values()), schema=pa.schema(fields)),
        path,
        row_group_size=rows_per_group,
        compression="zstd",
    )
    return path


def write_both(root: Path, *, train: Sequence[int] = (0, 1), validation: Sequence[int] = (2,)):
    """Writes a flat data set without maps, one file per split."""
    write(root / "train" / "shard_00000.parquet", table(train, nested=False, maps=False))
    write(root / "validation" / "shard_00000.parquet", table(validation, nested=False, maps=False))
    return root


def write_openeds(
    folder: Path, numbers: Sequence[int], *, classes: int = 4, shape: tuple[int, int] | None = None
) -> Path:
    """Writes N.png and N.npy for each number."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        image, label = frame(number)
        label = four_classes(label) if classes == 4 else label
        if shape is not None:
            size = (shape[1], shape[0])
            image = cv2.resize(image, size, interpolation=cv2.INTER_NEAREST)
            label = cv2.resize(label, size, interpolation=cv2.INTER_NEAREST)
        cv2.imwrite(str(folder / f"{number}.png"), image)
        np.save(folder / f"{number}.npy", label)
    return folder


def hub_files(folder: Path, *, nested: bool, own_targets: bool = False) -> dict[str, bytes]:
    """Returns the files of a data set repository with two frames to train and one to validate.

    Args:
        folder: receives the files.
        nested: revision A, or else revision B.
        own_targets: with targets that differ from those computed from the labels, so that a test
            can see that they are used.
    """
    name = "data/{}-0.parquet" if nested else "{}/shard_00000.parquet"
    frames = {"train": range(2), "validation": range(2, 3)}
    files = {}
    for split, numbers in frames.items():
        columns = table(numbers, nested=nested)
        if own_targets:
            for column in ("spatial_weights", "dist_map"):
                columns[column] = _halved(columns[column])
            for column in {"cx", "cy", "rx", "ry"} & columns.keys():
                columns[column] = pc.multiply(columns[column], 0.875).cast(columns[column].type)
        path = name.format(split)
        files[path] = write(folder / path, columns).read_bytes()
    return files


def _halved(array: pa.Array) -> pa.Array:
    """Returns nested lists with half of each number."""
    if pa.types.is_list(array.type):
        return pa.ListArray.from_arrays(array.offsets, _halved(array.values))
    return pc.multiply(array, pa.scalar(0.5, array.type))
