"""Tiny networks that find the pupil in near-infrared eye images.

`import pupilseg` needs only NumPy; names that need torch are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pupilseg.model_files.checkpoint import load_model
    from pupilseg.models import create_model, list_models

_LAZY = {
    "create_model": "pupilseg.models",
    "list_models": "pupilseg.models",
    "load_model": "pupilseg.model_files.checkpoint",
}
__all__ = ["__version__", "create_model", "list_models", "load_model"]


def __getattr__(name: str) -> Any:
    """Imports a public name on first use (PEP 562), so that torch is loaded only when needed."""
    if name not in _LAZY:
        raise AttributeError(f"module 'pupilseg' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
