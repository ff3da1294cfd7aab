"""`torch.compile` in place, tried before the run starts, given up with one warning."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn

log = logging.getLogger(__name__)

MODE = "max-autotune"


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
    # Dynamo's and Inductor's errors are RuntimeErrors, a missing C compiler is one of Triton's.
    # A fault of the network itself is raised again by the first step.
    except (RuntimeError, OSError) as error:
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
