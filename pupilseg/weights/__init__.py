"""The released weights, found by name inside the package."""

from __future__ import annotations

from pathlib import Path

from pupilseg.errors import UsageError

NAMES = ("micro", "efficientvit", "efficientvit_base", "ellipse")
"""What `--model` takes beside a file; the first is the default."""
PRETRAINED = "pretrained"
"""Value of `--init`: the released weights of the network that is trained."""
RELEASED = ".safetensors"
"""Suffix of released weights for torch."""
TORCH_SUFFIXES = (".pt", RELEASED)
"""Of the files that hold weights for torch."""
MICRO = "efficientvit_tiny"
"""The network that is called micro."""
WEIGHTS_DIR = Path(__file__).parent


def weights_path(name: str, suffix: str = ".onnx") -> Path:
    """Returns the file of released weights.

    Args:
        name: one of `NAMES`, or the network's own.
        suffix: ".onnx", or `RELEASED` for torch.

    Raises:
        UsageError: there are none of that name, or this build comes without.
    """
    if name not in (*NAMES, MICRO):
        raise UsageError(f"there are no weights named {name!r}; choose one of: {', '.join(NAMES)}")
    path = WEIGHTS_DIR / f"{MICRO if name == NAMES[0] else name}{suffix}"
    if not path.is_file():
        mend = (
            "pass --model FILE.onnx, made with "
            "`python -m pipeline.export --model FILE.pt --out FILE.onnx`"
            if suffix == ".onnx"
            else "train a network, and give its file (*.pt)"
        )
        raise UsageError(f"this build has no released weights {name!r}; {mend}")
    return path


def initial_path(model: str, init: str | Path) -> Path:
    """Returns the file that `--init` means, of weights for a network; it need not exist.

    Raises:
        UsageError: the released weights are meant, and this build comes without.
    """
    return weights_path(model, RELEASED) if str(init) == PRETRAINED else Path(init)


def model_path(text: str) -> Path:
    """Returns the file that a user means by a name or a path; it need not exist.

    Raises:
        UsageError: it is the name of weights that this build does not have, or no file and no name.
    """
    path = Path(text)
    if text in (*NAMES, MICRO):
        return weights_path(text)
    if not path.suffix and not path.exists():
        raise UsageError(f"the model {text!r} is neither a file nor one of: {', '.join(NAMES)}")
    return path
