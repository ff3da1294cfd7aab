"""Copies of tensors on their way to the host, which nothing waits for until they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class Snapshot:
    """What a tree of tensors holds at this moment.

    Tensors on CUDA are joined, a vector a dtype, and copied into pinned memory without blocking:
    600 small tensors of a training state make three copies. Those on the CPU are copied at once.

    Args:
        tree: nested dicts and lists of tensors and plain values; only read.
    """

    def __init__(self, tree: Any) -> None:
        self._waiting: dict[torch.dtype, list[Tensor]] = {}
        self._tree = _map(tree, self._take)
        self._copies: dict[torch.dtype, Tensor] = {}
        self._copied: torch.cuda.Event | None = None
        for dtype, tensors in self._waiting.items():
            joined = torch.cat([tensor.reshape(-1) for tensor in tensors])
            self._copies[dtype] = torch.empty(joined.shape, dtype=dtype, pin_memory=True)
            self._copies[dtype].copy_(joined, non_blocking=True)
        if self._waiting:
            self._copied = torch.cuda.Event()
            self._copied.record()
        self._shapes = {
            dtype: [tensor.shape for tensor in tensors] for dtype, tensors in self._waiting.items()
        }
        self._waiting = {}

    def _take(self, tensor: Tensor) -> Any:
        tensor = tensor.detach()
        if not tensor.is_cuda:
            return tensor.cpu().clone(memory_format=torch.contiguous_format)
        waiting = self._waiting.setdefault(tensor.dtype, [])
        waiting.append(tensor)
        return _Place(tensor.dtype, len(waiting) - 1)

    def read(self) -> Any:
        """Returns the tree with contiguous CPU tensors; waits for the copy if it is under way."""
        if self._copied is not None:
            self._copied.synchronize()
        parts = {
            dtype: [
                # A view would bring its whole storage along into every file.
                part.view(shape).clone()
                for part, shape in zip(
                    copy.split([shape.numel() for shape in self._shapes[dtype]]),
                    self._shapes[dtype],
                    strict=True,
                )
            ]
            for dtype, copy in self._copies.items()
        }
        return _map(self._tree, lambda place: parts[place.dtype][place.number], _Place)


class _Place:
    """Where a tensor's copy is to be found."""

    def __init__(self, dtype: torch.dtype, number: int) -> None:
        self.dtype, self.number = dtype, number


def _map(tree: Any, change: Callable[[Any], Any], kind: type = torch.Tensor) -> Any:
    """Returns a tree with its leaves of a type replaced."""
    if isinstance(tree, kind):
        return change(tree)
    if isinstance(tree, dict):
        return {key: _map(value, change, kind) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_map(value, change, kind) for value in tree]
    return tree
