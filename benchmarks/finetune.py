"""Fine-tunes weights from rendered eyes on a few frames of another source.

python -m benchmarks.finetune --source FOLDER [--init pretrained] [--epochs 20] [--lr 0.003 0.01]

Half of the source's frames are for training and the other half for scoring; without splits in the
source, these are two blocks of neighboring frames. The last epoch is scored, not the epoch that was
best on the scored frames. Rows of the table: the initial weights, the same network trained on these
frames alone, and the network fine-tuned at each learning rate.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from benchmarks.machine import machine_line
from benchmarks.score_table import print_head, print_row
from pupilseg.cli.program import main_program, positive_int
from pupilseg.evaluate.evaluation import evaluate_model
from pupilseg.model_files.checkpoint import load_tensors, read_card, save_model
from pupilseg.models import list_models, model_entry
from pupilseg.prepare import ensure_shards
from pupilseg.runtime.device import find_device
from pupilseg.runtime.host import keep_freed_memory
from pupilseg.sources import SourceOptions
from pupilseg.train.config import SMALL_BATCH, TrainConfig
from pupilseg.train.session import train
from pupilseg.weights import PRETRAINED, initial_path


def last_weights(folder: Path, model: str) -> Path:
    """Writes the averaged weights of a run's last epoch to a model file; returns its path."""
    entry, path = model_entry(model), folder / "last.pt"
    weights = load_tensors(folder / entry.state_file)["averaged"]
    save_model(path, weights, read_card(folder / entry.best_file))
    return path


def measure(shards: Path, initial: Path, args: argparse.Namespace) -> None:
    """Prints the table."""
    device = find_device(args.device)
    print_head("weights")
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        validation = shards / "validation"
        print_row("initial weights", evaluate_model(initial, validation, out / "before"))
        runs = [("these frames alone", None, None)]
        runs += [(f"fine-tuned, rate {rate:g}", initial, rate) for rate in args.lr]
        for name, start, rate in runs:
            for seed in range(args.seeds):
                folder = out / f"{name} {seed}"
                config = TrainConfig(
                    model=args.model,
                    epochs=args.epochs,
                    batch_size=SMALL_BATCH,
                    lr=rate,
                    seed=seed,
                )
                train(config, shards, folder, device=device, initial=start, limit=args.frames)
                last = last_weights(folder, args.model)
                scores = evaluate_model(last, validation, folder / "score")
                print_row(f"{name}, seed {seed}", scores)


def main() -> None:
    """Parses the command line and measures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.finetune", description=__doc__)
    parser.add_argument("--source", required=True, help="a data set, as --dataset")
    parser.add_argument("--model", choices=list_models(), default="efficientvit")
    parser.add_argument("--init", default=PRETRAINED, help="a model file (default: %(default)s)")
    parser.add_argument("--frames", type=positive_int, help="train on the first N frames only")
    parser.add_argument("--epochs", type=positive_int, default=20, help="default: %(default)s")
    parser.add_argument("--lr", type=float, nargs="+", default=[0.001, 0.003, 0.01])
    parser.add_argument("--seeds", type=positive_int, default=2, help="runs per row (default: 2)")
    parser.add_argument("--device")
    args = parser.parse_args()
    initial = initial_path(args.model, args.init)
    if find_device(args.device).type == "cpu":
        keep_freed_memory()  # as the training programs do
    print(machine_line("torch", "numpy"))
    print(f"device {find_device(args.device)}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as temporary:
        options = SourceOptions(validation_fraction=0.5)
        shards = ensure_shards(temporary, args.source, options=options, progress=False)
        measure(shards, initial, args)


if __name__ == "__main__":
    main_program(main)
