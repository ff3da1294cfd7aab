"""Exports a trained network: python -m pipeline.export --model FILE.pt --out FILE.onnx."""

from pupilseg.cli.export import COMMAND
from pupilseg.cli.program import main_program


def main() -> int:
    """Parses the command line and exports; returns the exit code."""
    return COMMAND.main("python -m pipeline.export")


if __name__ == "__main__":
    main_program(main)
