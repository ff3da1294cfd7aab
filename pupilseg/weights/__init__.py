"""Finds the released weights in the package by name."""

from __future__ import annotations

from pathlib import Path

from pupilseg.errors import UsageError
from pupilseg.models.registry import MODELS

__all__ = [
    "DEFAULT",
    "NAMES",
    "PRETRAINED",
    "SAFETENSORS",
    "TORCH_SUFFIXES",
    "WEIGHTS_DIR",
    "initial_path",
    "model_path",
    "weights_path",
]

_FILE_STEMS = {
    entry.nickname or entry.name: entry.name for entry in MODELS.values() if entry.released
}
DEFAULT = "micro"
"""Weights that `pupilseg predict` uses by default."""
NAMES = tuple(sorted(_FILE_STEMS, key=lambda name: name != DEFAULT))
"""Names that `--model` accepts besides a file, with the default first."""
PRETRAINED = "pretrained"
"""Value of `--init`: the released weights of the network to be trained."""
SAFETENSORS = ".safetensors"
"""Suffix of the released weights for torch."""
TORCH_SUFFIXES = (".pt", SAFETENSORS)
"""Suffixes of the files that torch can load."""
WEIGHTS_DIR = Path(__file__).parent


def weights_path(name: str, suffix: str = ".onnx") -> Path:
    """Returns the path of released weights.

    Args:
        name: one of `NAMES`, or a network's full name.
        suffix: ".onnx", or `SAFETENSORS` for torch.

    Raises:
        UsageError: no released weights have that name, or they are missing from this build.
    """
    stem = _FILE_STEMS.get(name, name)
    if stem not in _FILE_STEMS.values():
        raise UsageError(
            f"no released weights are named {name!r}; choose one of: {', '.join(NAMES)}"
        )
    path = WEIGHTS_DIR / f"{stem}{suffix}"
    if not path.is_file():
        hint = (
            "pass --model FILE.onnx, made with "
            "`python -m pipeline.export --model FILE.pt --out FILE.onnx`"
            if suffix == ".onnx"
            else "train a network and pass its file (*.pt)"
        )
        raise UsageError(f"this build has no released weights {name!r}; {hint}")
    return path


def initial_path(model: str, init: str | Path) -> Path:
    """Returns the path that `--init` refers to; the file need not exist.

    Args:
        model: name of the network to be trained.
        init: path of a model file, or `PRETRAINED`.

    Raises:
        UsageError: released weights are requested, but this build has none for the network.
    """
    return weights_path(model, SAFETENSORS) if str(init) == PRETRAINED else Path(init)


def model_path(text: str) -> Path:
    """Returns the path that a name of released weights or a path refers to.

    The file need not exist.

    Raises:
        UsageError: the named weights are missing from this build, or `text` is neither a file nor
            a known name.
    """
    path = Path(text)
    if text in _FILE_STEMS or text in _FILE_STEMS.values():
        return weights_path(text)
    if not path.suffix and not path.exists():
        raise UsageError(f"the model {text!r} is neither a file nor one of: {', '.join(NAMES)}")
    return path
