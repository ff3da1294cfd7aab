"""Trains TinyEfficientViT on a rented GPU and downloads the resulting files.

modal run training/train_efficientvit.py [--epochs N] [--gpu A100,H100] [--output-dir DIR] [...]
"""

import sys

from pupilseg.cloud.app import training_app

app, prepare, train, main = training_app("efficientvit", sys.argv[1:])
