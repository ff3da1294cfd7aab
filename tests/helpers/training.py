"""Short training runs on a few drawn eyes."""

from __future__ import annotations

import numpy as np
import torch

from pupilseg.loader.loader import make_loader
from pupilseg.model_files.card import Provenance
from pupilseg.shards import open_shards, write_shards
from pupilseg.sources import Sample
from pupilseg.train.checkpoints import CheckpointWriter
from pupilseg.train.loop import fit
from pupilseg.train.state import TrainState
from tests.helpers.fakes import FakeDataset, random_image, random_label

CPU = torch.device("cpu")
PROVENANCE = Provenance(preprocessing="none", data="fake", license="MIT")
BATCH = 2


class Eyes(FakeDataset):
    """Ellipses that are darker than their surroundings, which a network can learn."""

    def sample(self, split, index):
        rng = np.random.default_rng([split == "train", index, 7])
        label = random_label(rng, blink_share=0)
        image = random_image(rng) // 2 + 100
        image[label == 1] -= 90
        return Sample(f"{split}/{index}", image, label)


def write_eyes(folder, train, validation):
    """Writes shards of `Eyes` for both splits; returns the folder."""
    eyes = Eyes(train=train, validation=validation)
    for split in ("train", "validation"):
        write_shards(eyes, split, folder / split)
    return folder


class Loaders:
    """Shards of a few frames; each call returns new loaders like those of `train.session`."""

    def __init__(self, folder, train, validation):
        write_eyes(folder, train, validation)
        self.shards = {split: open_shards(folder / split) for split in ("train", "validation")}

    def __call__(self, seed=0, *, device=CPU, **options):
        options = {"batch_size": BATCH, "drop_last": True, "device": device, **options}
        return (
            make_loader(self.shards["train"], shuffle=True, seed=seed, **options),
            make_loader(self.shards["validation"], batch_size=BATCH, device=device),
        )

    def close(self):
        for shards in self.shards.values():
            shards.close()


def train_with(
    config,
    loaders,
    out,
    *,
    device=CPU,
    resume=None,
    notes=None,
    provenance=PROVENANCE,
    on_epoch=None,
    on_file=None,
    stop=lambda: False,
):
    """Trains as `train.session.train` does, with given loaders and without tracking."""
    training, validation = loaders
    steps = len(training) * config.epochs
    state = TrainState(config, device, steps, provenance, notes=notes)
    writer = CheckpointWriter(state, out, on_epoch, on_file)
    if resume is not None:
        writer.resume(resume)
    return fit(state, training, validation, writer, stop)
