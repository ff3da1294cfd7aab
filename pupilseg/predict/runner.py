"""Runs a predictor over images, folders, videos and cameras: pupil.csv, overlays, masks.

A file that cannot be read is reported and counted, and the others are done. Every frame that was
read has its row, closed eyes too. Reading, the network, and drawing and writing are three steps in
three threads, in order; with or without threads the same bytes are written.
"""

from __future__ import annotations

import logging
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

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

    import numpy as np
    from numpy.typing import NDArray

    from pupilseg.predict.inputs import Source
    from pupilseg.predict.predictor import Prediction, Predictor
    from pupilseg.predict.roi import Roi

log = logging.getLogger(__name__)

OVERLAYS = "overlays"
"""Directory of the overlays, below that of a run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is written, and where pupils are looked for.

    Attributes:
        overlays: pictures, or a video, with outline and centre.
        masks: a PNG (0 and 255) a frame.
        skip_existing: go on with what an earlier run left in the same directory.
        mm_per_px: size of a pixel of the frame at the eye; adds `diameter_mm`.
        roi: the part of each frame that the network sees.
        threads: three threads, or all steps one after the other in the caller's.
    """

    overlays: bool = True
    masks: bool = False
    skip_existing: bool = False
    mm_per_px: float | None = None
    roi: Roi | None = None
    threads: bool = True


@dataclass(slots=True)
class Outcome:
    """What came of a run.

    Attributes:
        frames: predicted.
        blinks: of them without a pupil.
        skipped: sources that an earlier run had finished.
        failed: messages, one a path that could not be read whole.
        seconds: taken by all.
    """

    frames: int = 0
    blinks: int = 0
    skipped: int = 0
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0


class _Start(NamedTuple):
    """Stands before the first frame of a source that could be opened.

    Attributes:
        source: the source.
        fps: frames a second that it announces; 0 where it does not.
    """

    source: Source
    fps: float


class _End(NamedTuple):
    """Stands behind the last frame of a source, and for one that could not be opened.

    Attributes:
        source: the source.
        failed: what was wrong with it; "" where nothing was.
    """

    source: Source
    failed: str


class _Found(NamedTuple):
    """A frame with its pupil, in the frame's own pixels."""

    frame: Frame
    prediction: Prediction


def predict_paths(
    predictor: Predictor,
    paths: Sequence[str],
    out: Path,
    options: Options | None = None,
    *,
    stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Predicts what paths mean, and writes what was found.

    Args:
        predictor: with its model.
        paths: as a user gives them; see `inputs.find_sources`.
        out: gets pupil.csv, overlays/NAME.jpg (of a video NAME.mp4) and, if asked for,
            masks/NAME.png (of a video NAME/000000.png and so on).
        options: the usual ones by default.
        stop: asked before each frame of a camera, which has no end of its own.

    Raises:
        OutputError: `out` cannot be written.
        UsageError: `out` holds results of other options that were to be kept.
        LockedError: another process writes there.
        CheckpointError: the model gives what no model of ours gives.
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
    done = Outcome()
    with (
        directory_lock(out),
        Journal(out, settings, keep=options.skip_existing) as journal,
        logging_redirect_tqdm([logging.getLogger("pupilseg")]),
    ):
        names = {key: record.name for key, record in journal.done.items()}
        sources, done.failed = find_sources(paths, names, without=out)
        for message in done.failed:
            log.error("%s", message)
        todo = [source for source in sources if not journal.is_done(source)]
        done.skipped = len(sources) - len(todo)
        writer = _Writer(out, options, journal, done)
        step = in_background if options.threads else iter
        found = step(_predict(predictor, step(_read(todo, stop)), options.roi))
        bar = progress_bar(None, "predict", unit="frame")
        if not bar.disable:
            bar.total = _announced(todo)
        with bar, closing(writer), closing(found):
            for item in found:
                bar.update(writer.take(item))
        journal.write_csv(COLUMNS if options.mm_per_px is None else (*COLUMNS, MM_COLUMN))
    done.seconds = time.perf_counter() - started
    return done


def _announced(sources: Iterable[Source]) -> int | None:
    """Returns how many frames there will be, as far as the containers say; None for a camera."""
    total = 0
    for source in sources:
        if source.camera is not None:
            return None
        total += max(1, announced_frames(source.path)) if source.is_video else 1
    return total


def _read(sources: Iterable[Source], stop: Callable[[], bool]) -> Generator[_Start | Frame | _End]:
    """Yields the frames of all sources, each between its start and its end."""
    for source in sources:
        failed = ""
        try:
            if source.is_video:
                failed = yield from _read_video(source, stop)
            else:
                image = read_image(source.path)
                yield _Start(source, 0.0)
                yield Frame(0, None, image)
        except DataError as error:
            failed = str(error)
        except MemoryError:
            failed = f"{source.text} does not fit into memory; give a smaller picture"
        yield _End(source, failed)


def _read_video(
    source: Source, stop: Callable[[], bool]
) -> Generator[_Start | Frame | _End, None, str]:
    """Yields the start and the frames of a video or camera; returns what was wrong with it."""
    with closing(Video(source.path if source.camera is None else source.camera)) as video:
        if not video.has_stamps:
            log.warning("%s has no timestamps; time_s is %s", source.text, video.clock)
        yield _Start(source, video.fps)
        count = 0
        for frame in video:
            yield frame
            count += 1
            if source.camera is not None and stop():
                break
        return "" if source.camera is not None else video.shortfall(count)


def _predict(
    predictor: Predictor, read: Generator[_Start | Frame | _End], roi: Roi | None
) -> Generator[_Start | _Found | _End]:
    """Finds the pupil in each frame; a fault goes into the source's end."""
    failed = ""
    with closing(read):
        for item in read:
            if isinstance(item, Frame):
                try:
                    yield _Found(item, _pupil(predictor, item.image, roi))
                except DataError as error:
                    failed = str(error)
                except MemoryError:
                    failed = f"a frame of {item.image.shape} does not fit into memory"
            elif isinstance(item, _End):
                wrong = f"{item.source.text}: {failed}" if failed else item.failed
                failed = ""
                yield _End(item.source, wrong)
            else:
                yield item


def _pupil(predictor: Predictor, image: NDArray[np.uint8], roi: Roi | None) -> Prediction:
    """Returns the pupil in a frame or its region, in the frame's pixels."""
    if roi is None:
        return predictor(image)
    return roi.to_frame(predictor(roi.cut(image)), image.shape)


class _Writer:
    """The last step: rows, overlays and masks, one source after the other."""

    def __init__(self, out: Path, options: Options, journal: Journal, done: Outcome) -> None:
        self._out, self._options, self._journal, self._done = out, options, journal, done
        self._start: _Start | None = None
        self._video: VideoFile | None = None

    def take(self, item: _Start | _Found | _End) -> int:
        """Writes what came; returns the number of frames that it was."""
        if isinstance(item, _Start):
            self._start = item
            return 0
        if isinstance(item, _End):
            self._end(item)
            return 0
        assert self._start is not None  # each frame follows its source's start
        source, (number, time_s, image), prediction = self._start.source, *item
        self._done.frames += 1
        self._done.blinks += prediction.ellipse is None
        self._journal.append(row(source, number, time_s, prediction, self._options.mm_per_px))
        if self._options.overlays:
            self._draw(overlay(image, prediction))
        if self._options.masks:
            name = f"{source.name}/{number:06d}" if source.is_video else source.name
            write_image(self._out / "masks" / f"{name}.png", prediction.mask * 255, flush=False)
        return 1

    def _draw(self, picture: NDArray[np.uint8]) -> None:
        """Writes the overlay of a frame."""
        assert self._start is not None
        source = self._start.source
        below = self._out / OVERLAYS
        if not source.is_video:
            write_image(below / f"{source.name}.jpg", picture, flush=False)
            return
        if self._video is None:
            self._video = VideoFile(below / f"{source.name}.mp4", self._start.fps)
        self._video.write(picture)

    def _end(self, end: _End) -> None:
        """Ends a source: its files have their names before its rows count."""
        if self._video is not None:
            self._video.finish()
            self._video = None
        if end.failed:
            self._done.failed.append(end.failed)
            log.error("%s", end.failed)
        self._journal.finish(end.source, end.failed)
        self._start = None

    def close(self) -> None:
        """Leaves no half-written video."""
        if self._video is not None:
            self._video.discard()
