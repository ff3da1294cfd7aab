"""`torch.compile`, given up with one warning where no compiler works."""

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


# Dynamo's and Inductor's errors are RuntimeErrors, a missing C compiler is one of Triton's.
_NO_COMPILER = (RuntimeError, OSError)


class Compiled(Generic[Parameters, Result]):
    """A function compiled at its first call; called as it is where no compiler works.

    Args:
        function: to compile. A fault of its own is raised by the call of the plain form.
        name: what the one warning says is slower without a compiler.
    """

    def __init__(self, function: Callable[Parameters, Result], name: str) -> None:
        self._plain, self._name = function, name
        self._compiled: Callable[Parameters, Result] | None = None
        self._given_up = False

    def __call__(self, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        """Calls the function."""
        if not self._given_up:
            try:
                if self._compiled is None:
                    self._compiled = torch.compile(self._plain)
                return self._compiled(*args, **kwargs)
            except torch.OutOfMemoryError:
                raise
            except _NO_COMPILER as error:
                self._given_up = True
                log.warning(
                    "%s is not compiled, which makes it slower: %s; install a C compiler",
                    self._name,
                    str(error).strip().splitlines()[0],
                )
        return self._plain(*args, **kwargs)


def compile_network(
    model: nn.Module,
    example: Tensor,
    objective: Callable[[Any], Tensor],
    autocast: Mapping[str, Any],
    mode: str = MODE,
) -> bool:
    """Compiles a network in place, forward and backward, for one shape of batch.

    In place, so that names in its `state_dict` keep no `_orig_mod.` prefix. Compiling happens here,
    not in the first step; weights and statistics are afterwards what they were.

    Args:
        model: on its device, in training mode.
        example: a batch of images like those to come.
        objective: maps the network's output to a scalar with a gradient.
        autocast: arguments of `torch.autocast`.
        mode: of `torch.compile`.

    Returns:
        Whether the network is compiled; False, with a warning, where no compiler works.
    """
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.compile(mode=mode)
    try:
        with torch.autocast(**autocast):
            output = model(example)
        objective(output).backward()
    except torch.OutOfMemoryError:
        raise
    # A fault of the network itself is raised again by the first step.
    except _NO_COMPILER as error:
        model._compiled_call_impl = None  # the only way back from nn.Module.compile
        log.warning(
            "not compiled, which trains slower: %s; install a C compiler, or give --no-compile",
            str(error).strip().splitlines()[0],
        )
        return False
    finally:
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, value in model.state_dict().items():
                value.copy_(before[name])
    return True
