"""Progress bars: on a terminal and in a notebook, nowhere else."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    from collections.abc import Iterable


def progress_bar(
    iterable: Iterable[Any] | None,
    description: str,
    *,
    unit: str,
    total: int | None = None,
    show: bool = True,
) -> tqdm[Any]:
    """Returns a bar that shows only where somebody may watch it: not in a log file.

    Args:
        iterable: what is worked through; None for a bar that is updated by hand.
        description: stands in front.
        unit: of what is counted.
        total: how many there are, where `iterable` does not say.
        show: False for none at all.
    """
    # A notebook's streams are no terminals, but its page follows carriage returns as one does.
    notebook = type(sys.stderr).__module__.startswith("ipykernel.")
    return tqdm(
        iterable,
        description,
        total,
        leave=False,
        file=sys.stdout if notebook else sys.stderr,  # stderr is shown as a fault there
        mininterval=0.5 if notebook else 0.1,  # each update is a message to the browser
        dynamic_ncols=True,
        disable=not show or (None if not notebook else False),
        unit=unit,
    )
