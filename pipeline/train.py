"""Trains a network: python -m pipeline.train --model NAME --shards DIR --out DIR."""

from pupilseg.cli.program import main_program
from pupilseg.cli.train import STAGE


def main() -> int:
    """Parses the command line and trains; returns the exit code."""
    return STAGE.main("python -m pipeline.train")


if __name__ == "__main__":
    main_program(main)
