"""The training loop of all training programs.

Everything random is a function of (seed, epoch, step). Losses, metrics and the choice of the best
epoch stay on the device, so that the host never waits for it within an epoch; `CheckpointWriter`
reads them back while the next epoch runs.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import torch

from pupilseg.augment import augment
from pupilseg.errors import UsageError
from pupilseg.runtime.compilation import MODE, compile_network
from pupilseg.runtime.device import Timestamp, fast_arithmetic
from pupilseg.runtime.progress import progress_bar
from pupilseg.train.config import FitResult
from pupilseg.train.metrics import predicted_mask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch import Tensor, nn
    from tqdm import tqdm

    from pupilseg.loader.loader import Batch, Loader
    from pupilseg.train.checkpoints import CheckpointWriter
    from pupilseg.train.metrics import EpochMetrics
    from pupilseg.train.state import TrainState

log = logging.getLogger(__name__)

ESTIMATE_STEPS = 5
"""Number of steps that are timed to estimate the time of an epoch."""


def fit(
    state: TrainState,
    train_loader: Loader,
    valid_loader: Loader,
    writer: CheckpointWriter,
    stop: Callable[[], bool] = lambda: False,
) -> FitResult:
    """Trains until the configured number of epochs is reached.

    Args:
        state: new or resumed; advanced in place.
        train_loader: shuffled batches of this rank's size.
        valid_loader: batches in order.
        writer: writer of the same state.
        stop: called after each epoch; True ends the run there.

    Raises:
        KeyboardInterrupt: interrupted before the first epoch ended.
        OutputError: a file cannot be written.
        ParallelError: another rank ended.
        UsageError: there is nothing to train on, or the loss is not finite.
    """
    config = state.config
    ranks = state.ranks
    # A small validation split may have no frames for ranks other than the first.
    if len(train_loader) == 0 or (len(valid_loader) == 0 and ranks.first):
        raise UsageError(
            f"{len(train_loader)} training and {len(valid_loader)} validation batches of "
            f"{config.batch_size} frames; use more frames or a smaller --batch-size"
        )
    stopped = False
    with fast_arithmetic(state.device, tf32=config.tf32, cudnn_benchmark=config.cudnn_benchmark):
        if state.device.type == "cuda" and config.compile and state.epoch < config.epochs:
            compile_model(state, train_loader)
        try:
            while state.epoch < config.epochs and not stopped:
                train_epoch(state, train_loader)
                validate(state, valid_loader)
                state.end_epoch()
                stopped = ranks.any(stop()) and state.epoch < config.epochs
                writer.queue(last=stopped)
        except KeyboardInterrupt:
            if writer.empty:
                raise
            stopped = True
        writer.flush()
    return FitResult(writer.best_file, writer.best, writer.history, interrupted=stopped)


def train_epoch(state: TrainState, loader: Loader) -> None:
    """Makes one pass over the training split."""
    first = not state.laps
    state.laps = [Timestamp(state.device)]
    state.model.train()
    state.metrics.reset()
    loader.set_epoch(state.epoch)
    bar = _progress(loader, f"epoch {state.epoch + 1} train", state)
    warn = first and state.ranks.first and state.device.type == "cpu"
    for batch in _warn_about_cpu(bar, len(loader)) if warn else bar:
        train_step(state, batch, state.alphas[state.epoch])
    state.rows[state.epoch, 0].copy_(state.metrics.sums)
    state.laps.append(Timestamp(state.device))


def train_step(state: TrainState, batch: Batch, alpha: Tensor) -> None:
    """Makes one optimizer step and adds the batch to the metrics."""
    config = state.config
    if config.augment is not None:
        batch = augment(batch, config.augment, state.random, state.ranks, compiled=config.compile)
    for group in state.optimizer.param_groups:
        group["lr"] = state.learning_rate(state.step)
    image = batch.image.contiguous(memory_format=state.memory_format)
    with torch.autocast(**state.autocast):
        output = state.model(image)
    losses = state.loss(output, batch, alpha)
    state.optimizer.zero_grad(set_to_none=True)
    state.scaler.scale(losses["loss"]).backward()
    state.ranks.average_gradients(state.parameters)
    state.scaler.unscale_(state.optimizer)
    torch.nn.utils.clip_grad_norm_(state.parameters, config.clip)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.average.update()
    state.metrics.update(losses, predicted_mask(output), batch.label, batch.ellipse)
    state.step += 1


def _warn_about_cpu(batches: tqdm[Batch], steps: int) -> Iterator[Batch]:
    """Yields batches; after the first steps, warns with the estimated time of an epoch."""
    started = time.perf_counter()
    for done, batch in enumerate(batches, start=1):
        yield batch  # the consumer runs the training step before the next line
        if done == min(ESTIMATE_STEPS, steps):
            seconds = (time.perf_counter() - started) / done * steps
            batches.clear()
            log.warning(
                "training on a CPU: an epoch takes about %s, plus validation; a GPU is faster "
                "(--device cuda, `modal run`, or a Colab notebook)",
                f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s",
            )


def validate(state: TrainState, loader: Loader) -> None:
    """Scores the averaged weights on the validation split."""
    evaluate(
        state.average.network,
        _progress(loader, "validate", state),
        state.metrics,
        state.loss,
        state.alphas[state.epoch],
        autocast=state.autocast,
        memory_format=state.memory_format,
    )
    state.rows[state.epoch, 1].copy_(state.metrics.sums)
    state.laps.append(Timestamp(state.device))


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    metrics: EpochMetrics,
    loss: Callable[..., dict[str, Tensor]],
    alpha: float | Tensor,
    *,
    autocast: Mapping[str, Any],
    memory_format: torch.memory_format = torch.channels_last,
) -> None:
    """Runs a network over a split and leaves the sums in `metrics`, on the device."""
    model.eval()
    metrics.reset()
    for batch in batches:
        with torch.autocast(**autocast):
            output = model(batch.image.contiguous(memory_format=memory_format))
        losses = loss(output, batch, alpha)
        metrics.update(losses, predicted_mask(output), batch.label, batch.ellipse)


def compile_model(state: TrainState, loader: Loader) -> None:
    """Compiles the decoding of the loader's batches, and the network for them."""
    batch = next(iter(loader))
    loader.wait_s = 0.0  # that was the compilation of the decoding
    image = batch.image.contiguous(memory_format=state.memory_format)

    def objective(output: Any) -> Tensor:
        return state.loss(output, batch, state.alphas[0])["loss"]

    log.info(
        "compiling %s with %s, which takes several minutes on a new machine and less once "
        "Inductor's cache has its kernels; for a short run, --no-compile is faster",
        type(state.model).__name__,
        MODE,
    )
    state.model.train()
    compile_network(state.model, image, objective, state.autocast)


def _progress(loader: Loader, description: str, state: TrainState) -> tqdm[Batch]:
    return progress_bar(loader, description, unit="batch", show=state.ranks.first)
