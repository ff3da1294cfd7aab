"""What a run leaves behind: checkpoints, training state, history, and a row told for each epoch."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pupilseg.errors import UsageError
from pupilseg.model_files.checkpoint import CHECKPOINT_NAMES, save_model, save_state
from pupilseg.train.history import write_history
from pupilseg.train.losses import alpha_schedule
from pupilseg.train.metrics import scores
from pupilseg.train.optim import learning_rate

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from pupilseg.runtime.device import Moment
    from pupilseg.runtime.host_copy import Snapshot
    from pupilseg.train.state import Run


class RunFiles:
    """Turns snapshots of a run into files and rows, on the host.

    On other ranks than the first it keeps the rows and writes nothing.

    Args:
        run: whose files they are.
        output_dir: gets the files of `CHECKPOINT_NAMES`.
        on_epoch: called with each epoch's row and its seconds.
        on_file: called with each numbered checkpoint.

    Attributes:
        history: rows of the epochs written so far.
        best: the row with the highest validation mIoU.
    """

    def __init__(
        self,
        run: Run,
        output_dir: Path,
        on_epoch: Callable[[dict[str, float]], None] | None,
        on_file: Callable[[Path], None] | None,
    ) -> None:
        self._run, self._output_dir = run, output_dir
        self._on_epoch, self._on_file = on_epoch, on_file
        self._names = CHECKPOINT_NAMES[run.config.model]
        self._reported = 0
        self._saved_best = 0.0
        self.history: list[dict[str, float]] = []
        self.best: dict[str, float] = {}
        self._moments: dict[int, Sequence[Moment]] = {}
        self._waiting: Snapshot | None = None

    @property
    def empty(self) -> bool:
        """Whether there is nothing to go on from yet."""
        return not self.history and self._waiting is None

    @property
    def best_file(self) -> Path:
        """Where the best model goes."""
        return self._output_dir / self._names.best

    def take_up(self, state: Mapping[str, Any]) -> None:
        """Goes on behind a training state; brings its best model along if that is not here."""
        self._read_rows(state)
        self._reported = state["reported"]
        if self._run.ranks.first and not self.best_file.exists():
            self._save_best(state)
        self._saved_best = self.best["epoch"]

    def add(self, moments: Sequence[Moment], snapshot: Snapshot | None) -> None:
        """Takes what an epoch came to; on CUDA, what the one before came to is written now.

        Args:
            moments: start, end of training, end of validation.
            snapshot: of `Run.state`; None where the epoch is not to be written.
        """
        self._moments[self._run.epoch] = moments
        self._write_waiting()
        self._waiting = snapshot
        if self._run.device.type != "cuda":  # it is there; nobody has to be waited for
            self._write_waiting()

    def finish(self) -> None:
        """Writes and tells what is left."""
        self._write_waiting()
        self._report_rest()

    def _write_waiting(self) -> None:
        if self._waiting is not None:
            self._write(self._waiting.read())
            self._waiting = None

    def _write(self, state: Mapping[str, Any]) -> None:
        """Writes what a state asks for, and tells the rows that are new.

        Raises:
            UsageError: the training loss is not finite.
            OutputError: a file cannot be written.
        """
        self._read_rows(state)
        defer = self._run.config.defer_metrics
        if self._run.ranks.first:
            improved = self.best["epoch"] != self._saved_best
            if improved:
                self._save_best(state)
            self._save_numbered(state, improved=improved)
            write_history(self._output_dir / self._names.history, self.history)
            reported = self._reported if defer else state["epoch"]
            save_state(self._output_dir / self._names.state, {**state, "reported": reported})
            self._saved_best = self.best["epoch"]
        if not defer:
            self._report_rest()

    def _report_rest(self) -> None:
        """Tells the rows that were not told yet."""
        for row in self.history[self._reported :]:
            seconds = {"train_seconds": math.nan, "valid_seconds": math.nan}
            moments = self._moments.pop(int(row["epoch"]), None)  # None for a resumed run's past
            if moments is not None:
                start, trained, validated = moments
                seconds = {
                    "train_seconds": trained.seconds_since(start),
                    "valid_seconds": validated.seconds_since(trained),
                }
            self._reported += 1
            if self._on_epoch is not None and self._run.ranks.first:
                self._on_epoch({**row, **seconds})

    def _read_rows(self, state: Mapping[str, Any]) -> None:
        """Extends the history to the state's epoch.

        Raises:
            UsageError: the training loss is not finite.
        """
        run, config = self._run, self._run.config
        steps = run.total_steps // config.epochs
        for epoch in range(len(self.history), state["epoch"]):
            train, valid = state["rows"][epoch].tolist()
            row = {
                "epoch": epoch + 1,
                "lr": learning_rate(
                    (epoch + 1) * steps - 1, run.total_steps, config.lr, config.warmup
                ),
                "alpha": alpha_schedule(epoch, config.epochs),
                **scores(run.metrics.names, train, "train"),
                **scores(run.metrics.names, valid, "valid"),
            }
            if not math.isfinite(row["train_loss"]):
                raise UsageError(
                    f"the training loss is {row['train_loss']} after epoch {epoch + 1}; lower --lr "
                    f"({config.lr:g})"
                )
            self.history.append(row)
        self.best = self.history[int(state["best_epoch"]) - 1]

    def _best_weights(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """Returns the weights of the best epoch, which need not be the state's."""
        steps = int(self.best["epoch"]) * (self._run.total_steps // self._run.config.epochs)
        return {
            # Norms count their batches; all else in a network is averaged.
            name: value if value.is_floating_point() else value.new_full((), steps)
            for name, value in state["best"].items()
        }

    def _save_best(self, state: Mapping[str, Any]) -> None:
        """Writes the best model so far."""
        self._save(self.best_file, self._best_weights(state), self.best)

    def _save_numbered(self, state: Mapping[str, Any], *, improved: bool) -> None:
        """Writes the numbered checkpoint that an improvement, or the epoch's number, asks for."""
        row, every = self.history[-1], self._names.every
        if every == 0:
            if not improved:
                return
            row, weights = self.best, self._best_weights(state)
        else:
            if row["epoch"] % every and row["epoch"] != self._run.config.epochs:
                return
            weights = state["averaged"]
        name = self._names.epoch.format(epoch=row["epoch"], miou=row["valid_iou"])
        self._save(self._output_dir / name, weights, row)
        if self._on_file is not None:
            self._on_file(self._output_dir / name)

    def _save(self, path: Path, weights: Mapping[str, Tensor], row: Mapping[str, float]) -> None:
        """Writes a model file with its description."""
        config = self._run.config
        card = {
            "model": config.model,
            "architecture": config.architecture,
            "epoch": row["epoch"],
            # JSON has no NaN, which is what an epoch without any pupil has for its centre.
            "metrics": {
                k: v for k, v in row.items() if k.startswith("valid_") and math.isfinite(v)
            },
            "config": asdict(config),
            **self._run.card,
        }
        save_model(path, weights, card)
