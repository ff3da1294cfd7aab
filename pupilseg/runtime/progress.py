"""Progress bars, shown in terminals and notebooks only."""

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
    """Returns a progress bar that is hidden when the output goes to a file.

    Args:
        iterable: items to iterate over; None for a bar that is updated with `update`.
        description: shown in front of the bar.
        unit: name of one item.
        total: number of items, if `iterable` has no length.
        show: False hides the bar everywhere.
    """
    # A notebook's streams are not terminals, but the notebook page handles carriage returns.
    notebook = type(sys.stderr).__module__.startswith("ipykernel.")
    return tqdm(
        iterable,
        description,
        total,
        leave=False,
        file=sys.stdout if notebook else sys.stderr,  # notebooks show stderr as an error
        mininterval=0.5 if notebook else 0.1,  # each update is a message to the browser
        dynamic_ncols=True,
        disable=not show or (None if not notebook else False),
        unit=unit,
    )
