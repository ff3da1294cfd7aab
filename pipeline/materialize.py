"""Builds the shards of a downloaded source: python -m pipeline.materialize --raw DIR --out DIR."""

from pupilseg.cli.materialize import COMMAND
from pupilseg.cli.program import main_program


def main() -> int:
    """Parses the command line and builds the shards; returns the exit code."""
    return COMMAND.main("python -m pipeline.materialize")


if __name__ == "__main__":
    main_program(main)
