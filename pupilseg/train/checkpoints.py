"""Writes a run's checkpoints, training state and history, and reports each epoch."""

from __future__ import annotations

import csv
import math
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pupilseg.errors import UsageError
from pupilseg.files import atomic_path, directory_lock, output_errors
from pupilseg.model_files.card import ModelCard
from pupilseg.model_files.checkpoint import save_model, save_state
from pupilseg.models import model_entry
from pupilseg.runtime.host_copy import HostCopy
from pupilseg.train.losses import alpha_schedule
from pupilseg.train.metrics import scores

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from pupilseg.runtime.device import Timestamp
    from pupilseg.train.state import TrainState

DEFERRED_EVERY = 10
"""Number of epochs between state files when metrics are deferred."""


def run_files(output_dir: Path, model: str) -> list[Path]:
    """Returns the files of a network's run in a directory, the training state first."""
    entry = model_entry(model)
    names = (entry.state_file, entry.best_file, entry.history_file)
    found = [path for name in names if (path := output_dir / name).exists()]
    return [*found, *sorted(output_dir.glob(entry.epoch_files))]


def _is_in(path: Path, directory: Path) -> bool:
    return path.resolve().parent == directory.resolve()


@contextmanager
def claim_directory(
    output_dir: Path,
    model: str,
    *,
    resume: Path | None = None,
    overwrite: bool = False,
    flag: str = "output directory",
) -> Iterator[None]:
    """Locks the output directory of a run, and refuses to mix its files with another run's.

    Networks may share a directory, because the names of their files differ, but not at the same
    time. A directory that this function creates and that stays empty is removed.

    Args:
        output_dir: created if missing.
        model: name in `pupilseg.models`.
        resume: training state that the run resumes from.
        overwrite: the run may replace another one.
        flag: how the caller names the directory, for the message.

    Raises:
        LockedError: another process is training into the directory.
        OutputError: the directory cannot be written.
        UsageError: it holds another run of the network.
    """
    existed = output_dir.exists()
    try:
        with directory_lock(output_dir):
            others = run_files(output_dir, model)
            own = resume is not None and _is_in(resume, output_dir)
            if others and not own and not overwrite:
                resumable = others[0].name == model_entry(model).state_file
                way = "" if resumable else ", which ended too early to --resume"
                raise UsageError(
                    f"{output_dir} holds another run of {model} ({others[0].name}){way}; pass "
                    f"{'--resume to continue that run, ' if resumable else ''}--overwrite to "
                    f"replace it, or another {flag}"
                )
            yield
    finally:
        if not existed:
            with suppress(OSError):  # not empty
                output_dir.rmdir()


class CheckpointWriter:
    """Writes the files of a run and reports its epochs.

    `queue` starts a copy of the training state to the host. On CUDA it is written while the next
    epoch runs, so that nothing waits for the device; elsewhere it is written at once. On ranks
    other than the first, the history is kept and no file is written.

    Files of another run of the network are removed when this one writes its first file.

    Args:
        state: state of the run.
        output_dir: receives the files that the network's `ModelEntry` names.
        on_epoch: called with each epoch's history row and its train_seconds and valid_seconds.
        on_file: called with the path of each numbered checkpoint.

    Attributes:
        history: one row per epoch read from the device so far.
        best: the row with the highest validation mIoU.
    """

    def __init__(
        self,
        state: TrainState,
        output_dir: Path,
        on_epoch: Callable[[dict[str, float]], None] | None = None,
        on_file: Callable[[Path], None] | None = None,
    ) -> None:
        self.history: list[dict[str, float]] = []
        self.best: dict[str, float] = {}
        self._state = state
        self._output_dir = output_dir
        self._on_epoch = on_epoch
        self._on_file = on_file
        self._entry = model_entry(state.config.model)
        self._stale = run_files(output_dir, state.config.model)
        self._queued: HostCopy | None = None
        self._laps: dict[int, Sequence[Timestamp]] = {}
        self._reported = 0
        self._saved_best = 0.0

    @property
    def empty(self) -> bool:
        """True while there is no epoch to resume from."""
        return not self.history and self._queued is None

    @property
    def best_file(self) -> Path:
        """Path of the best model."""
        return self._output_dir / self._entry.best_file

    def resume(self, path: Path) -> None:
        """Restores the run from a training state; writes its best model if it is missing here.

        Raises:
            CheckpointError: as `TrainState.restore`.
        """
        stored = self._state.restore(path)
        self._extend_history(stored)
        self._reported = stored["reported"]
        if _is_in(path, self._output_dir):
            self._stale = []
        if self._state.ranks.first:
            self._remove_stale()
            if not self.best_file.exists():
                self._save_best(stored)
        self._saved_best = self.best["epoch"]

    def queue(self, *, last: bool = False) -> None:
        """Queues the results of the epoch that just ended.

        Args:
            last: whether this was the last epoch of the run.
        """
        state = self._state
        self._laps[state.epoch] = state.laps
        self._write_queued()
        due = not state.config.defer_metrics or state.epoch % DEFERRED_EVERY == 0
        if due or last or state.epoch == state.config.epochs:
            self._queued = HostCopy(state.state_dict())
        if state.device.type != "cuda":  # the copy is already complete
            self._write_queued()

    def flush(self) -> None:
        """Writes and reports everything that is still queued."""
        self._write_queued()
        self._report_new()

    def _write_queued(self) -> None:
        if self._queued is not None:
            stored = self._queued.read()
            self._queued = None
            self._write(stored)

    def _write(self, stored: Mapping[str, Any]) -> None:
        """Writes the files of a training state and reports its new epochs.

        Raises:
            UsageError: the training loss is not finite.
            OutputError: a file cannot be written.
        """
        self._extend_history(stored)
        defer = self._state.config.defer_metrics
        if self._state.ranks.first:
            self._remove_stale()
            improved = self.best["epoch"] != self._saved_best
            if improved:
                self._save_best(stored)
            self._save_numbered(stored, improved=improved)
            _write_history(self._output_dir / self._entry.history_file, self.history)
            reported = self._reported if defer else stored["epoch"]
            save_state(self._output_dir / self._entry.state_file, {**stored, "reported": reported})
            self._saved_best = self.best["epoch"]
        if not defer:
            self._report_new()

    def _report_new(self) -> None:
        """Reports the epochs that were not reported yet."""
        for row in self.history[self._reported :]:
            seconds = {"train_seconds": math.nan, "valid_seconds": math.nan}
            laps = self._laps.pop(int(row["epoch"]), None)
            if laps is not None:  # None: the epoch ran in an earlier process
                start, trained, validated = laps
                seconds = {
                    "train_seconds": trained.seconds_since(start),
                    "valid_seconds": validated.seconds_since(trained),
                }
            self._reported += 1
            if self._on_epoch is not None and self._state.ranks.first:
                self._on_epoch({**row, **seconds})

    def _extend_history(self, stored: Mapping[str, Any]) -> None:
        """Adds the rows that the history does not have yet from a training state.

        Raises:
            UsageError: the training loss is not finite.
        """
        state = self._state
        steps = state.total_steps // state.config.epochs
        for epoch in range(len(self.history), stored["epoch"]):
            train, valid = stored["rows"][epoch].tolist()
            epochs = state.schedule_of(epoch)
            row = {
                "epoch": epoch + 1,
                "lr": state.learning_rate((epoch + 1) * steps - 1, epochs * steps),
                "alpha": alpha_schedule(epoch, epochs),
                **scores(state.metrics.names, train, "train"),
                **scores(state.metrics.names, valid, "valid"),
            }
            if not math.isfinite(row["train_loss"]):
                raise UsageError(
                    f"the training loss is {row['train_loss']} after epoch {epoch + 1}; pass a "
                    f"lower --lr than {state.config.lr:g}"
                )
            self.history.append(row)
        self.best = self.history[int(stored["best_epoch"]) - 1]

    def _remove_stale(self) -> None:
        for path in self._stale:
            with output_errors(path):
                path.unlink(missing_ok=True)
        self._stale = []

    def _save_best(self, stored: Mapping[str, Any]) -> None:
        self._save_model(self.best_file, stored["best"], self.best)

    def _save_numbered(self, stored: Mapping[str, Any], *, improved: bool) -> None:
        """Writes a numbered checkpoint if one is due after this epoch or improvement."""
        row, weights = self.history[-1], stored["averaged"]
        every = self._entry.checkpoint_every
        if every == 0:
            row, weights = self.best, stored["best"]
            required = improved
        else:
            required = row["epoch"] % every == 0 or row["epoch"] == self._state.config.epochs
        if not required:
            return
        path = self._output_dir / self._entry.epoch_file(int(row["epoch"]), row["valid_iou"])
        self._save_model(path, weights, row)
        if self._on_file is not None:
            self._on_file(path)

    def _save_model(
        self, path: Path, weights: Mapping[str, Tensor], row: Mapping[str, float]
    ) -> None:
        """Writes a model file with its card."""
        config = self._state.config
        card = ModelCard(
            model=config.model,
            architecture=config.architecture,
            epoch=int(row["epoch"]),
            # JSON has no NaN, which is the center error of an epoch without any pupil.
            metrics={k: v for k, v in row.items() if k.startswith("valid_") and math.isfinite(v)},
            config=asdict(config),
            **self._state.provenance.to_dict(),
        )
        save_model(path, weights, card)


def _write_history(path: Path, history: Sequence[Mapping[str, float]]) -> None:
    """Writes one row per epoch as CSV, for plots and DVC."""
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(history[0]))
        writer.writeheader()
        writer.writerows(history)


def epoch_line(row: Mapping[str, float], epochs: int) -> str:
    """Returns an epoch's history row as one line of text with fixed columns."""
    seconds = row["train_seconds"] + row["valid_seconds"]
    return (
        f"epoch {int(row['epoch']):3d}/{epochs}  loss {row['train_loss']:7.4f} train "
        f"{row['valid_loss']:7.4f} valid  mIoU {row['valid_iou']:.4f}  pupil IoU "
        f"{row['valid_pupil_iou']:.4f}  center {row['valid_center_px']:6.2f} px  "
        f"found {row['valid_found']:.3f}  {seconds:5.1f} s"
    )
