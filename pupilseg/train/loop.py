"""The one training loop, readable top to bottom.

Everything random is a function of (seed, epoch, step). Everything measured stays on the device:
within an epoch the host waits for nothing, and what an epoch came to is read when the next one is
under way (on CUDA; elsewhere there is nobody to wait for, and it is read at once).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from pupilseg.augment import augment
from pupilseg.errors import UsageError
from pupilseg.runtime.compilation import compile_network
from pupilseg.runtime.device import Moment, fast_arithmetic
from pupilseg.runtime.distributed import ALONE
from pupilseg.runtime.host_copy import Snapshot
from pupilseg.runtime.progress import progress_bar
from pupilseg.train.checkpoints import RunFiles
from pupilseg.train.config import FitResult
from pupilseg.train.metrics import predicted_mask
from pupilseg.train.optim import learning_rate
from pupilseg.train.state import Run

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor, nn
    from tqdm import tqdm

    from pupilseg.loader.loader import Batch, Loader
    from pupilseg.runtime.distributed import Ranks
    from pupilseg.train.config import TrainConfig
    from pupilseg.train.metrics import EpochMetrics

log = logging.getLogger(__name__)

DEFERRED_EVERY = 10
"""Epochs between two written states when metrics are deferred."""


def train_step(run: Run, batch: Batch, alpha: Tensor) -> None:
    """Makes one step: augment, forward, loss, backward, update; counts it in the run's metrics."""
    config, ranks = run.config, run.ranks
    if config.augment is not None:
        batch = augment(batch, config.augment, run.random, ranks, compiled=config.compile)
    rate = learning_rate(run.step, run.total_steps, config.lr, config.warmup)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    image = batch.image.contiguous(memory_format=run.memory_format)
    with torch.autocast(**run.autocast):
        output = run.model(image)
    losses = run.criterion(output, batch, alpha)
    run.optimizer.zero_grad(set_to_none=True)
    run.scaler.scale(losses["loss"]).backward()
    ranks.average_gradients(run.parameters)
    run.scaler.unscale_(run.optimizer)
    torch.nn.utils.clip_grad_norm_(run.parameters, config.clip)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.averaged.update()
    run.metrics.update(losses, predicted_mask(output), batch.label, batch.ellipse)
    run.step += 1


def train_epoch(run: Run, loader: Loader) -> None:
    """Makes one pass over the training split."""
    run.model.train()
    run.metrics.reset()
    loader.set_epoch(run.epoch)
    for batch in _progress(loader, f"epoch {run.epoch + 1} train", run):
        train_step(run, batch, run.alphas[run.epoch])
    run.rows[run.epoch, 0].copy_(run.metrics.sums)


def validate(run: Run, loader: Loader) -> None:
    """Scores the averaged weights on the validation split."""
    run.evaluated.load_state_dict(run.averaged.values)
    evaluate(
        run.evaluated,
        _progress(loader, "validate", run),
        run.metrics,
        run.criterion,
        run.alphas[run.epoch],
        autocast=run.autocast,
        memory_format=run.memory_format,
    )
    run.rows[run.epoch, 1].copy_(run.metrics.sums)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Loader | tqdm[Batch],
    metrics: EpochMetrics,
    criterion: Callable[..., dict[str, Tensor]],
    alpha: float | Tensor,
    *,
    autocast: Mapping[str, Any],
    memory_format: torch.memory_format = torch.channels_last,
) -> None:
    """Runs a network over a split; leaves its counts in `metrics`, on the device."""
    model.eval()
    metrics.reset()
    for batch in batches:
        with torch.autocast(**autocast):
            output = model(batch.image.contiguous(memory_format=memory_format))
        losses = criterion(output, batch, alpha)
        metrics.update(losses, predicted_mask(output), batch.label, batch.ellipse)


def fit(
    config: TrainConfig,
    train_loader: Loader,
    valid_loader: Loader,
    output_dir: Path,
    *,
    device: torch.device,
    card: Mapping[str, Any],
    ranks: Ranks = ALONE,
    initial: Path | None = None,
    resume: Path | None = None,
    notes: Mapping[str, str] | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
    on_file: Callable[[Path], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> FitResult:
    """Trains a network and leaves its checkpoints in `output_dir`.

    Args:
        config: what to train and how.
        train_loader: shuffled batches, of this rank's size; its epoch is set from here.
        valid_loader: batches in order.
        output_dir: where the files of `CHECKPOINT_NAMES` go.
        device: from `pupilseg.runtime.device.find_device`.
        card: what the model files say of the data: preprocessing, source, licence.
        ranks: the processes of the job; the first one writes.
        initial: a model file whose weights the run starts from.
        resume: a `*_training_state.pt` to go on from.
        notes: kept in the training state as they are.
        on_epoch: called with each epoch's row, and train_seconds and valid_seconds.
        on_file: called with each numbered checkpoint that was written.
        stop: asked after each epoch; true ends the run there, with everything written.

    Raises:
        CheckpointError: `initial` or `resume` does not fit this run.
        KeyboardInterrupt: interrupted before there was anything to go on from.
        OutputError: the output cannot be written.
        ParallelError: another rank ended.
        UsageError: unknown model, nothing to train on, or a loss that is not finite.
    """
    # Another rank than the first may have no frame of a small validation split.
    if len(train_loader) == 0 or (len(valid_loader) == 0 and ranks.first):
        raise UsageError(
            f"{len(train_loader)} training and {len(valid_loader)} validation batches of "
            f"{config.batch_size}: give more frames or a smaller --batch-size"
        )
    run = Run(config, device, len(train_loader) * config.epochs, card, ranks, notes, initial)
    files = RunFiles(run, output_dir, on_epoch, on_file)
    if resume is not None:
        files.take_up(run.restore(resume))
    with fast_arithmetic(device, tf32=config.tf32, cudnn_benchmark=config.cudnn_benchmark):
        if device.type == "cuda" and config.compile and run.epoch < config.epochs:
            _compile(run, train_loader)
        stopped = _run_epochs(run, files, train_loader, valid_loader, stop)
    return FitResult(files.best_file, files.best, files.history, stopped)


def _run_epochs(
    run: Run,
    files: RunFiles,
    train_loader: Loader,
    valid_loader: Loader,
    stop: Callable[[], bool],
) -> bool:
    """Runs the epochs that are left, writing each while the next is under way.

    Returns:
        Whether it was stopped before the last.
    """
    stopped = False
    try:
        while run.epoch < run.config.epochs and not stopped:
            moments = [Moment(run.device)]
            train_epoch(run, train_loader)
            moments.append(Moment(run.device))
            validate(run, valid_loader)
            moments.append(Moment(run.device))
            run.end_epoch()
            stopped = run.ranks.any(stop()) and run.epoch < run.config.epochs
            files.add(moments, Snapshot(run.state()) if stopped or _due(run) else None)
    except KeyboardInterrupt:
        if files.empty:
            raise
        stopped = True
    files.finish()
    return stopped


def _due(run: Run) -> bool:
    """Returns whether this epoch's state and numbers are to be copied to the host."""
    last = run.epoch == run.config.epochs
    return not run.config.defer_metrics or run.epoch % DEFERRED_EVERY == 0 or last


def _compile(run: Run, loader: Loader) -> None:
    """Compiles the network for the loader's batches."""
    batch = next(iter(loader))
    image = batch.image.contiguous(memory_format=run.memory_format)

    def objective(output: Any) -> Tensor:
        loss: Tensor = run.criterion(output, batch, run.alphas[0])["loss"]
        return loss

    log.info("compiling %s, which takes a minute or more", type(run.model).__name__)
    run.model.train()
    compile_network(run.model, image, objective, run.autocast)


def _progress(loader: Loader, description: str, run: Run) -> tqdm[Batch]:
    """Wraps a loader in a bar, of the first rank."""
    return progress_bar(loader, description, unit="batch", show=run.ranks.first)
