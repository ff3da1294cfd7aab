"""Asynchronous copies of tensors to the host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from pupilseg.runtime.device import pinned

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class HostCopy:
    """A copy on the host of the current values of a tree of tensors, made without waiting for them.

    CUDA tensors are concatenated into one vector per dtype and copied to pinned memory without
    blocking, so the 600 small tensors of a training state need three copies. CPU tensors are copied
    immediately.

    Args:
        tree: nested dicts and lists of tensors and plain values; not modified. CUDA tensors of one
            dtype are on one device.

    Raises:
        UsageError: the host's memory cannot be pinned.
    """

    def __init__(self, tree: Any) -> None:
        on_cuda: dict[torch.dtype, list[Tensor]] = {}

        def take(tensor: Tensor) -> Tensor | _Position:
            tensor = tensor.detach()
            if not tensor.is_cuda:
                return tensor.cpu().clone(memory_format=torch.contiguous_format)
            tensors = on_cuda.setdefault(tensor.dtype, [])
            tensors.append(tensor)
            return _Position(tensor.dtype, len(tensors) - 1)

        self._tree = _map_leaves(tree, torch.Tensor, take)
        self._shapes = {
            dtype: [tensor.shape for tensor in tensors] for dtype, tensors in on_cuda.items()
        }
        self._copies: dict[torch.dtype, Tensor] = {}
        self._copied: list[torch.cuda.Event] = []
        for dtype, tensors in on_cuda.items():
            joined = torch.cat([tensor.reshape(-1) for tensor in tensors])
            self._copies[dtype] = pinned(joined.shape, dtype)
            self._copies[dtype].copy_(joined, non_blocking=True)
            # Recorded in the stream that copies: the tensors may be on another than the current
            # device.
            copied = torch.cuda.Event(blocking=True)  # sleeps instead of keeping a core busy
            copied.record(torch.cuda.current_stream(joined.device))
            self._copied.append(copied)

    def read(self) -> Any:
        """Returns the tree with contiguous CPU tensors; waits for the copies to finish."""
        for copied in self._copied:
            copied.synchronize()
        tensors = {dtype: self._split(dtype) for dtype in self._copies}
        return _map_leaves(
            self._tree, _Position, lambda position: tensors[position.dtype][position.place]
        )

    def _split(self, dtype: torch.dtype) -> list[Tensor]:
        shapes = self._shapes[dtype]
        parts = self._copies[dtype].split([shape.numel() for shape in shapes])
        # Cloned: torch.save would write a view's whole storage into every file.
        return [part.view(shape).clone() for part, shape in zip(parts, shapes, strict=True)]


class _Position(NamedTuple):
    """Placeholder in the tree: a tensor's dtype and its index in the vector of that dtype."""

    dtype: torch.dtype
    place: int


def _map_leaves(tree: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """Returns a tree with `change` applied to the leaves of a type; tuples become lists."""
    if isinstance(tree, kind):
        return change(tree)
    if isinstance(tree, dict):
        return {key: _map_leaves(value, kind, change) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_map_leaves(value, kind, change) for value in tree]
    return tree
