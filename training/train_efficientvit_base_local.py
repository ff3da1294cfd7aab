"""Trains TinyEfficientViT-Base on this machine: downloads and materializes on first use.

python training/train_efficientvit_base_local.py --data-dir ~/.cache/openeds [--dataset SRC] [...]
"""

from local import main

from pupilseg.cli.program import run

if __name__ == "__main__":
    run(lambda: main("efficientvit_base"))
