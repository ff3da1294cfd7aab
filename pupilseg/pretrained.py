"""The released weights, found by name inside the package."""

from __future__ import annotations

from pathlib import Path

from pupilseg.errors import UsageError

NAMES = ("micro", "efficientvit", "ellipse")
"""What `--model` takes beside a file; the first is the default."""
WEIGHTS_DIR = Path(__file__).parent / "weights"


def weights_path(name: str) -> Path:
    """Returns the ONNX file of released weights.

    Raises:
        UsageError: there are none of that name, or this build comes without.
    """
    if name not in NAMES:
        raise UsageError(f"there are no weights named {name!r}; choose one of: {', '.join(NAMES)}")
    path = WEIGHTS_DIR / f"{name}.onnx"
    if not path.is_file():
        raise UsageError(
            f"this build has no released weights {name!r}; pass --model FILE.onnx, made with "
            "`python -m pipeline.export --model FILE.pt --out FILE.onnx`"
        )
    return path


def model_path(text: str) -> Path:
    """Returns the file that a user means by a name or a path; it need not exist.

    Raises:
        UsageError: it is the name of weights that this build does not have, or no file and no name.
    """
    path = Path(text)
    if text in NAMES:
        return weights_path(text)
    if not path.suffix and not path.exists():
        raise UsageError(
            f"--model is {text!r}, which is neither a file nor one of: {', '.join(NAMES)}"
        )
    return path
