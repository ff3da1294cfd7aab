"""Trains TinyEfficientViT on this machine; downloads and materializes the data on first use.

python training/train_efficientvit_local.py --data-dir ~/.cache/openeds [--dataset SRC] [...]
"""

from local import main

from pupilseg.cli.program import main_program

if __name__ == "__main__":
    main_program(lambda: main("efficientvit"))
