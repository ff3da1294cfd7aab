"""Trains TinyEfficientViT-Micro on this machine; downloads and materializes the data on first use.

python training/train_efficientvit_tiny_local.py --data-dir ~/.cache/openeds [--dataset SRC] [...]
"""

from pupilseg.cli.program import main_program
from pupilseg.cli.train import local_command

if __name__ == "__main__":
    main_program(local_command("efficientvit_tiny").main)
