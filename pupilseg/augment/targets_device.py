"""Exact targets of whole batches of labels in torch, on any device.

The results equal those of `pupilseg.maps` and `geometry.ellipse_vector` for each frame: squared
distances, distance maps and weights to the bit, ellipses within 1e-6. No value is read back to the
host, so everything compiles and nothing synchronizes. Constants are written with `masked_fill`,
because `torch.where` copies a Python number to CUDA and waits for the copy.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pupilseg.geometry import RADIUS_UNIT
from pupilseg.maps import CANNY_THRESHOLDS, DILATION_KERNEL, EDGE_WEIGHT, MAX_DISTANCE_SQUARED

FAR = 1 << 14
"""Larger than any frame height; its square exceeds every u^2 in a frame and fits into int32."""
BLOCK_VALUES = 1 << 24
"""Size of one temporary of the uncompiled row pass: 64 MiB as int32."""
CANNY_SHIFT = 15
TAN_22_5 = 13573
"""tan(22.5 degrees) with 15 fractional bits, the constant `TG22` in OpenCV's `canny.cpp`."""
WEIGHT = float(EDGE_WEIGHT)
"""Converted to a Python number here, because converting a NumPy scalar during tracing breaks the
graph."""
assert CANNY_THRESHOLDS[1] < 255, "any step of a 0/255 image must be a strong edge"
assert DILATION_KERNEL.shape == (2, 1), "the dilation below is that of a 2 x 1 column"


def squared_distance(label: Tensor) -> Tensor:
    """Returns u^2: the exact squared Euclidean distance of each pixel to the other class.

    Separable (Felzenszwalb & Huttenlocher, Distance transforms of sampled functions, 2012):
    cumulative extrema along the columns give the distance g within a column, then each row takes
    the minimum of g(x')^2 + (x - x')^2 over x'. A single pass serves both classes, because a pixel
    needs the distance to the other class only: g(x') is 0 where x' is of the other class.

    Args:
        label: (N, H, W), any dtype, non-zero is pupil; up to 400 x 640.

    Returns:
        int32 (N, H, W); `MAX_DISTANCE_SQUARED` in frames where a class is absent.
    """
    pupil = label != 0
    height = pupil.shape[1]
    row = torch.arange(height, dtype=torch.int32, device=pupil.device)[:, None]
    steps = pupil[:, 1:] != pupil[:, :-1]
    # Where the class changes between two adjacent rows, each is the nearest row of the other class
    # for its neighbor.
    above = F.pad(row[:-1].masked_fill(~steps, -FAR), (0, 0, 1, 0), value=-FAR)
    below = F.pad(row[1:].masked_fill(~steps, FAR), (0, 0, 0, 1), value=FAR)
    nearest_above = above.cummax(dim=1).values
    nearest_below = below.flip(1).cummin(dim=1).values.flip(1)
    column = torch.minimum(row - nearest_above, nearest_below - row)
    return _along_rows((column * column).flatten(0, 1), pupil.flatten(0, 1)).view(pupil.shape)


def _along_rows(column: Tensor, pupil: Tensor) -> Tensor:
    """Returns u^2 from the squared distances within columns, both (rows, W)."""
    if torch.compiler.is_compiling():  # one fused kernel without W x W temporaries
        return _least_in_row(column, pupil)
    rows = max(1, BLOCK_VALUES // column.shape[1] ** 2)
    blocks = zip(column.split(rows), pupil.split(rows), strict=True)
    return torch.cat([_least_in_row(*block) for block in blocks])


def _least_in_row(column: Tensor, pupil: Tensor) -> Tensor:
    """Returns the minimum of g(x')^2 + (x - x')^2 over x', int32 (rows, W)."""
    x = torch.arange(column.shape[1], dtype=torch.int32, device=column.device)
    across = (x[:, None] - x).square()
    same_class = pupil[:, :, None] == pupil[:, None, :]
    least = (column[:, None, :].masked_fill(~same_class, 0) + across).amin(dim=2)
    return least.clamp(max=MAX_DISTANCE_SQUARED)


def spatial_weights(label: Tensor) -> Tensor:
    """Returns the extra cross-entropy weight near the boundary, like `maps.spatial_weights`.

    In a two-valued image every step is a strong edge, so Canny's hysteresis has nothing to trace.
    The remaining steps are local: Sobel with replicated border, L1 magnitude, zero outside the
    frame, and OpenCV's non-maximum suppression across the edge (`canny.cpp`).

    Args:
        label: (N, H, W), any dtype, non-zero is pupil.

    Returns:
        float32 (N, H, W) of {0, 20}.
    """
    # Padded by indexing: torch replicates the border of floating-point tensors only.
    height, width = label.shape[1:]
    y = torch.arange(-1, height + 1, device=label.device).clamp(0, height - 1)
    x = torch.arange(-1, width + 1, device=label.device).clamp(0, width - 1)
    level = (label != 0).int()[:, y][:, :, x]
    down, right = level[:, 2:] - level[:, :-2], level[:, :, 2:] - level[:, :, :-2]
    step_x = right[:, :-2] + 2 * right[:, 1:-1] + right[:, 2:]
    step_y = down[:, :, :-2] + 2 * down[:, :, 1:-1] + down[:, :, 2:]
    size = step_x.abs() + step_y.abs()
    padded = F.pad(size, (1, 1, 1, 1))

    def neighbor(dy: int, dx: int) -> Tensor:
        return padded[:, 1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]

    rise = step_y.abs() << CANNY_SHIFT
    flat = step_x.abs() * TAN_22_5
    steep = flat + (step_x.abs() << (CANNY_SHIFT + 1))
    level_edge = (size > neighbor(0, -1)) & (size >= neighbor(0, 1))
    upright_edge = (size > neighbor(-1, 0)) & (size >= neighbor(1, 0))
    falling = (step_x ^ step_y) < 0
    before = torch.where(falling, neighbor(-1, 1), neighbor(-1, -1))
    after = torch.where(falling, neighbor(1, -1), neighbor(1, 1))
    oblique_edge = (size > before) & (size > after)
    edge = torch.where(
        rise < flat, level_edge, torch.where(rise > steep, upright_edge, oblique_edge)
    )
    weight = (edge & (size > 0)) * WEIGHT
    # Each edge pixel and the one below it. Padded as float: Inductor's C++ code for bool is broken.
    return torch.maximum(weight, F.pad(weight[:, :-1], (0, 0, 1, 0)))


def ellipse_vectors(label: Tensor) -> Tensor:
    """Returns the upright ellipses with the labels' second moments, like `geometry.ellipse_vector`.

    The moments are exact integers, so float32 suffices for the rest.

    Args:
        label: (N, H, W), any dtype, non-zero is pupil.

    Returns:
        float32 (N, 4): cx / W, cy / H, rx / R, ry / R; zeros for a blink.
    """
    pupil = label != 0
    height, width = pupil.shape[1:]
    area = pupil.sum(dim=(1, 2))
    pixels = area.clamp(min=1)
    center, axis = [], []
    for dim, length in ((1, width), (2, height)):
        counts = pupil.sum(dim=dim)
        place = torch.arange(length, device=pupil.device)
        first, second = (counts * place).sum(dim=1), (counts * place.square()).sum(dim=1)
        # At most 256,000^2 * 639^2 = 2.7e16: exact in int64.
        variance = (pixels * second - first.square()).float() / pixels.float().square()
        center.append(first.float() / pixels / length)
        axis.append(2 * variance.sqrt() / RADIUS_UNIT)
    vectors = torch.stack([*center, *axis], dim=1)
    return vectors.masked_fill(area[:, None] == 0, 0)
