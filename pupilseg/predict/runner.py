"""Runs a predictor over images, folders, videos and cameras; writes pupil.csv, overlays and masks.

Frames pass through three stages, each in its own thread: `_read` decodes, `_find` runs the network,
and `predict_paths` draws and writes. The order of the frames never changes, so the files are the
same with one thread or three. A file that cannot be read is reported and the run continues.
"""

from __future__ import annotations

import itertools
import logging
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from tqdm.contrib.logging import logging_redirect_tqdm

from pupilseg.errors import DataError
from pupilseg.files import directory_lock, file_digest
from pupilseg.pictures import overlay, read_image, write_image
from pupilseg.predict.inputs import find_sources
from pupilseg.predict.journal import COLUMNS, MM_COLUMN, Journal, row
from pupilseg.predict.video import Frame, Video, VideoFile, announced_frames
from pupilseg.runtime.progress import progress_bar
from pupilseg.runtime.threads import in_background

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence
    from types import TracebackType

    import numpy as np
    from numpy.typing import NDArray

    from pupilseg.predict.inputs import Source
    from pupilseg.predict.predictor import Prediction, Predictor
    from pupilseg.predict.roi import Roi

log = logging.getLogger(__name__)

OVERLAYS = "overlays"
"""Name of the overlays' folder in the output directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of `predict_paths`.

    Attributes:
        overlays: draw the pupil's outline and center on each frame, and write the result as an
            image, or as one video per video.
        masks: write a PNG with values 0 and 255 for each frame.
        skip_existing: resume an earlier run in the same directory.
        mm_per_px: size of a pixel at the eye, in millimeters; adds the column `diameter_mm`.
        roi: part of each frame to use; None uses the whole frame.
        threads: run the reading and the network in threads of their own; False runs all stages in
            the caller's thread.
    """

    overlays: bool = True
    masks: bool = False
    skip_existing: bool = False
    mm_per_px: float | None = None
    roi: Roi | None = None
    threads: bool = True


@dataclass(slots=True)
class Outcome:
    """Summary of a run.

    Attributes:
        frames: number of frames predicted.
        blinks: number of frames without a pupil.
        skipped: number of sources skipped because an earlier run had finished them.
        failed: one message for each path that could not be read completely.
        seconds: duration of the run.
    """

    frames: int = 0
    blinks: int = 0
    skipped: int = 0
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0


class _Item(NamedTuple):
    """An item passed between the stages: a frame of a source, or the end of the source.

    Attributes:
        source: where the frame comes from.
        frame: None at the end of the source.
        prediction: set by `_find`.
        fps: frame rate stored in a video; 0 if unknown.
        error: message about the source; empty if there was no error.
    """

    source: Source
    frame: Frame | None = None
    prediction: Prediction | None = None
    fps: float = 0.0
    error: str = ""


def predict_paths(
    predictor: Predictor,
    paths: Sequence[str],
    out: Path,
    options: Options | None = None,
    *,
    stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Predicts images, videos, folders and cameras, and writes the results.

    After a KeyboardInterrupt, pupil.csv contains the sources that were finished.

    Args:
        predictor: runs the model.
        paths: files, folders, patterns or camera numbers; see `inputs.find_sources`.
        out: receives pupil.csv, overlays/NAME.jpg (NAME.mp4 for a video) and, if requested,
            masks/NAME.png (NAME/000000.png and so on for a video).
        options: None uses the defaults.
        stop: called between the frames of a camera; the camera is closed when it returns True.

    Raises:
        OutputError: `out` cannot be written.
        UsageError: `out` holds results of a run with other options, and `skip_existing` is set.
        DataError: the database of that run is damaged.
        LockedError: another process writes to `out`.
        CheckpointError: the model's output has an unexpected shape.
    """
    started = time.perf_counter()
    options = options or Options()
    out = Path(out)
    settings = {
        "model": file_digest(predictor.network.path)[:16],
        "roi": None if options.roi is None else list(options.roi),
        "mm_per_px": options.mm_per_px,
        "overlays": options.overlays,
        "masks": options.masks,
    }
    outcome = Outcome()
    with (
        directory_lock(out),
        closing(Journal(out, settings, resume=options.skip_existing)) as journal,
        logging_redirect_tqdm([logging.getLogger("pupilseg")]),
    ):
        sources, outcome.failed = find_sources(paths, journal.names, without=out)
        for message in outcome.failed:
            log.error("%s", message)
        remaining = [source for source in sources if not journal.is_finished(source)]
        outcome.skipped = len(sources) - len(remaining)
        columns = COLUMNS if options.mm_per_px is None else (*COLUMNS, MM_COLUMN)
        stage = in_background if options.threads else iter
        items = stage(_find(predictor, options.roi, stage(_read(remaining, stop))))
        bar = progress_bar(None, "predict", unit="frame")
        if not bar.disable:
            bar.total = _announced_frames(remaining)
        try:
            with bar, closing(items):
                for source, group in itertools.groupby(items, key=lambda item: item.source):
                    error = ""
                    with _Pictures(out, source, options) as pictures:
                        for item in group:
                            error = error or item.error
                            if item.frame is None or item.prediction is None:
                                continue
                            journal.append(
                                row(source, item.frame, item.prediction, options.mm_per_px)
                            )
                            pictures.write(item.frame, item.prediction, item.fps)
                            outcome.frames += 1
                            outcome.blinks += item.prediction.ellipse is None
                            bar.update()
                    if error:
                        outcome.failed.append(error)
                        log.error("%s", error)
                    journal.finish(source, failed=bool(error))
        except KeyboardInterrupt:
            journal.write_csv(columns)
            raise
        journal.write_csv(columns)
    outcome.seconds = time.perf_counter() - started
    return outcome


def _announced_frames(sources: Iterable[Source]) -> int | None:
    """Returns the total frame count according to the containers; None with a camera."""
    total = 0
    for source in sources:
        if source.camera is not None:
            return None
        total += max(1, announced_frames(source.path)) if source.is_video else 1
    return total


def _read(sources: Iterable[Source], stop: Callable[[], bool]) -> Generator[_Item]:
    """Yields the frames of each source, followed by an item for its end."""
    for source in sources:
        error = ""
        try:
            if source.is_video:
                yield from _read_video(source, stop)
            else:
                yield _Item(source, Frame(0, None, read_image(source.path)))
        except DataError as fault:
            error = str(fault)
        except MemoryError:
            error = f"{source.text} does not fit into memory; use a smaller image"
        yield _Item(source, error=error)


def _read_video(source: Source, stop: Callable[[], bool]) -> Generator[_Item]:
    """Yields the frames of a video or camera; raises DataError if a file is cut off."""
    with closing(Video(source.path if source.camera is None else source.camera)) as video:
        if not video.has_stamps:
            log.warning("%s has no timestamps; time_s is %s", source.text, video.clock)
        for frame in video:
            yield _Item(source, frame, fps=video.fps)
            if source.camera is not None and stop():
                return
        video.check_complete()


def _find(predictor: Predictor, roi: Roi | None, items: Generator[_Item]) -> Generator[_Item]:
    """Adds predictions to the frames; an error in a frame is reported as one of its source."""
    with closing(items):
        for item in items:
            if item.frame is None:
                yield item
                continue
            image = item.frame.image
            try:
                yield item._replace(prediction=_predict(predictor, roi, image))
            except DataError as error:
                yield _Item(item.source, error=f"{item.source.text}: {error}")
            except MemoryError:
                yield _Item(
                    item.source,
                    error=f"{item.source.text}: a frame of {image.shape} does not fit into memory",
                )


def _predict(predictor: Predictor, roi: Roi | None, image: NDArray[np.uint8]) -> Prediction:
    """Returns the pupil in a frame or its region, in pixels of the frame."""
    if roi is None:
        return predictor(image)
    return roi.to_frame(predictor(roi.cut(image)), image.shape)


class _Pictures:
    """Overlays and masks of one source, as a context manager.

    The overlays of a video are one file, which appears only if the `with` block succeeds.
    """

    def __init__(self, out: Path, source: Source, options: Options) -> None:
        self._out = out
        self._source = source
        self._options = options
        self._video: VideoFile | None = None

    def write(self, frame: Frame, prediction: Prediction, fps: float) -> None:
        """Writes the overlay and the mask of a frame if the options request them."""
        name = self._source.name
        if self._options.overlays:
            picture = overlay(frame.image, prediction)
            if not self._source.is_video:
                write_image(self._out / OVERLAYS / f"{name}.jpg", picture, flush=False)
            else:
                if self._video is None:
                    self._video = VideoFile(self._out / OVERLAYS / f"{name}.mp4", fps)
                self._video.write(picture)
        if self._options.masks:
            part = f"{name}/{frame.number:06d}" if self._source.is_video else name
            write_image(self._out / "masks" / f"{part}.png", prediction.mask * 255, flush=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._video is None:
            return
        if kind is None:
            self._video.finish()
        else:
            self._video.discard()
