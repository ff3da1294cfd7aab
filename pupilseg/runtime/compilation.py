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
"""Dynamo and Inductor raise RuntimeErrors; so does Triton when there is no C compiler."""


class Compiled(Generic[Parameters, Result]):
    """A function that is compiled at its first call, or called as it is if compiling fails.

    Args:
        function: to compile. An error of its own is raised again by the eager call.
        name: what runs slower without a compiler, for the warning.
    """

    def __init__(self, function: Callable[Parameters, Result], name: str) -> None:
        self._eager = function
        self._name = name
        self._compiled: Callable[Parameters, Result] | None = None
        self._failed = False

    def __call__(self, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        """Calls the function."""
        if not self._failed:
            try:
                if self._compiled is None:
                    self._compiled = torch.compile(self._eager)
                return self._compiled(*args, **kwargs)
            except torch.OutOfMemoryError:
                raise
            except _COMPILER_ERRORS as error:
                self._failed = True
                log.warning(
                    "%s is not compiled and therefore slower: %s; install a C compiler",
                    self._name,
                    _first_line(error),
                )
        return self._eager(*args, **kwargs)


def compile_network(
    model: nn.Module,
    example: Tensor,
    objective: Callable[[Any], Tensor],
    autocast: Mapping[str, Any],
    mode: str = MODE,
) -> bool:
    """Compiles a network in place, forward and backward, for one batch shape.

    In place, so that `state_dict` keys get no `_orig_mod.` prefix. Compilation happens in this
    call, not in the first training step; weights and statistics keep their values.

    Args:
        model: on its device, in training mode.
        example: a batch of images like those to come.
        objective: maps the network's output to a scalar that has a gradient.
        autocast: arguments of `torch.autocast`.
        mode: of `torch.compile`.

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
            _first_line(error),
        )
        return False
    finally:
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, value in model.state_dict().items():
                value.copy_(before[name])
    return True


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
