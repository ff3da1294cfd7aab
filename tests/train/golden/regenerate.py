"""Records the first training losses of networks again, after an intended change.

python -m tests.train.golden.regenerate [NAME ...]      # all networks without names
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

from pupilseg.models import list_models
from pupilseg.train.config import TrainConfig
from tests.helpers.training import BATCH, Loaders, train_with

FILE = Path(__file__).with_name("train_loss.json")
STEPS = 20
LR = 1e-3
"""A tenth of the default: at 1e-2, rounding differences grow to 1 % of the loss in 20 steps."""


def golden_run(loaders, out, name, **options):
    """Trains a network for `STEPS` epochs of one step each."""
    config = TrainConfig(model=name, epochs=STEPS, batch_size=BATCH, lr=LR)
    return train_with(config, loaders(), out, **options)


def main(names):
    """Trains networks and updates their losses in `FILE`."""
    torch.set_num_threads(1)
    losses = json.loads(FILE.read_text())
    with tempfile.TemporaryDirectory() as folder:
        loaders = Loaders(Path(folder), train=BATCH, validation=1)
        for name in names:
            history = golden_run(loaders, Path(folder) / name, name).history
            losses[name] = [float(f"{row['train_loss']:.6g}") for row in history]
        loaders.close()
    lines = [f'  "{name}": {json.dumps(losses[name])}' for name in list_models()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(sys.argv[1:] or list_models())
