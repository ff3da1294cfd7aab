"""Scores a model: python -m pipeline.evaluate --model FILE --shards DIR/validation --out DIR."""

from pupilseg.cli.evaluate import COMMAND
from pupilseg.cli.program import main_program


def main() -> int:
    """Parses the command line and evaluates; returns the exit code."""
    return COMMAND.main("python -m pipeline.evaluate")


if __name__ == "__main__":
    main_program(main)
