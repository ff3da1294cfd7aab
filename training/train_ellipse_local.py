"""Trains the ellipse regressor on this machine; downloads and materializes the data on first use.

python training/train_ellipse_local.py --data-dir ~/.cache/openeds [--dataset SRC] [...]
"""

from local import main

from pupilseg.cli.program import main_program

if __name__ == "__main__":
    main_program(lambda: main("ellipse"))
