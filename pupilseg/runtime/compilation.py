"""`torch.compile` with a fallback to eager execution where no compiler works."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn

log = logging.getLogger(__name__)

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
MODE = "max-autotune"
_COMPILER_ERRORS = (RuntimeError, OSError)
"""Dynamo and Inductor raise RuntimeErrors, as does Triton without a C compiler."""


class Compiled(Generic[Parameters, Result]):
    """A function that is compiled at its first call, or stays as it is if that fails.

    Args:
        function: to compile. The errors that it raises itself are raised as without compilation.
        name: name of the function in the warning that it is slower.

    Attributes:
        compiled: whether the function is compiled; None before the first call.
    """

    def __init__(self, function: Callable[Parameters, Result], name: str) -> None:
        self.compiled: bool | None = None
        self._function = function
        self._name = name

    def __call__(self, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        """Calls the function."""
        if self.compiled is None:
            return self._first_call(*args, **kwargs)
        return self._function(*args, **kwargs)

    def _first_call(self, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        compiled: Callable[Parameters, Result] = torch.compile(self._function)
        try:
            result = compiled(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except _COMPILER_ERRORS as error:
            result = self._function(*args, **kwargs)  # raises an error that is not the compiler's
            self.compiled = False
            log.warning(
                "%s is not compiled and therefore slower: %s; install a C compiler",
                self._name,
                _reason(error),
            )
            return result
        self._function = compiled
        self.compiled = True
        return result


def compile_network(
    model: nn.Module,
    example: Tensor,
    objective: Callable[[Any], Tensor],
    autocast: Mapping[str, Any],
    mode: str = MODE,
) -> bool:
    """Compiles a network in place, forward and backward, for one batch shape.

    Compiling in place keeps the `state_dict` keys, without a prefix `_orig_mod.`. Compilation
    happens in this call, not in the first training step; weights and statistics keep their values.

    Args:
        model: network in training mode, on its device.
        example: a batch of images with the shape and dtype used in training.
        objective: maps the network's output to a scalar that has a gradient.
        autocast: arguments of `torch.autocast`.
        mode: argument of `torch.compile`.

    Returns:
        True if the network is compiled; False, after a warning, where no compiler works.
    """
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.compile(mode=mode)
    try:
        with torch.autocast(**autocast):
            output = model(example)
        objective(output).backward()
    except torch.OutOfMemoryError:
        raise
    # An error of the network itself is raised again by the first step.
    except _COMPILER_ERRORS as error:
        model._compiled_call_impl = None  # the only way to undo nn.Module.compile
        log.warning(
            "the network is not compiled and trains slower: %s; install a C compiler, or pass "
            "--no-compile",
            _reason(error),
        )
        return False
    finally:
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, value in model.state_dict().items():
                value.copy_(before[name])
    return True


def _reason(error: Exception) -> str:
    """Returns the line of a compiler's message that names the cause."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # Dynamo wraps the cause: "backend='inductor' raised:", then the error itself.
    return lines[1] if lines[0].endswith("raised:") and len(lines) > 1 else lines[0]
