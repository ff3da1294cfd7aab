"""Downloads a data source once: python -m pipeline.download --source SRC --out DIR."""

from pupilseg.cli.download import COMMAND
from pupilseg.cli.program import main_program


def main() -> int:
    """Parses the command line and downloads; returns the exit code."""
    return COMMAND.main("python -m pipeline.download")


if __name__ == "__main__":
    main_program(main)
