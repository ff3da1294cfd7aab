"""Frames out of videos and cameras, with their times, and a video in, with OpenCV alone."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np

from pupilseg.errors import DataError, OutputError
from pupilseg.files import output_errors
from pupilseg.pictures import to_grey

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

MISSING_SHARE = 0.02
"""Frames that a container may announce in excess: some only estimate their number."""
DEFAULT_FPS = 30.0
"""Of the drawn video of a source that does not say its own."""


class Frame(NamedTuple):
    """One frame of a video.

    Attributes:
        number: from 0, counting what could be decoded.
        time_s: since the video's start; None where nothing tells.
        image: uint8 (H, W).
    """

    number: int
    time_s: float | None
    image: NDArray[np.uint8]


class Video:
    """An open video file or camera.

    Args:
        source: a file, or a camera's number.

    Attributes:
        frames: number that the container announces; 0 where it does not, as a camera.
        fps: frames a second that it announces; 0 where it does not.
        has_stamps: `Frame.time_s` is the container's; else it is counted.
        clock: where `Frame.time_s` comes from, in words.

    Raises:
        DataError: OpenCV cannot open it, or it holds no frame.
    """

    def __init__(self, source: Path | int) -> None:
        self._camera = isinstance(source, int)
        self._name = f"camera {source}" if self._camera else str(source)
        self._opened_ms: float | None = None
        self._count = 0
        self._capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
        # FFmpeg draws text files (.txt, .nfo) as pictures of letters.
        is_text = self._capture.get(cv2.CAP_PROP_FOURCC) == cv2.VideoWriter.fourcc(*"ansi")
        if is_text or not self._capture.isOpened():
            self.close()
            raise DataError(self._why_not(source))
        self.frames = max(0, round(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = rate if 0 < rate < 1e5 else 0.0
        self._first = [pair for _ in range(2) if (pair := self._read()) is not None]
        if not self._first:
            self.close()
            raise DataError(f"{self._name} holds no frame that can be decoded; check the file")
        # A container without timestamps gives the same for every frame.
        self.has_stamps = len(self._first) < 2 or self._first[1][0] > self._first[0][0]
        self.clock = "this machine's" if self._camera else "the container's timestamps"
        if not self.has_stamps:
            self.clock = f"frame / {self.fps:g} fps" if self.fps else "nothing: time_s stays empty"

    def _why_not(self, source: Path | int) -> str:
        """Says why a source could not be opened."""
        if isinstance(source, int):
            return f"there is no camera {source}, or another program uses it"
        try:
            size = source.stat().st_size
            with source.open("rb"):
                pass
        except OSError as error:
            return f"cannot read {source}: {error.strerror}"
        if not size:
            return f"{source} is empty"
        return f"{source} is neither an image nor a video that OpenCV reads, or is damaged"

    def _read(self) -> tuple[float, NDArray[np.uint8]] | None:
        """Returns the next frame's stamp in ms and its picture, None at the end.

        A camera's stamps are of this machine's clock, from the first frame on: drivers differ in
        what they count from, and some do not count.
        """
        there, picture = self._capture.read()
        if not there:
            return None
        if self._camera:
            stamp = 1e3 * time.monotonic()
            self._opened_ms = stamp if self._opened_ms is None else self._opened_ms
            return stamp - self._opened_ms, to_grey(picture)
        return self._capture.get(cv2.CAP_PROP_POS_MSEC), to_grey(picture)

    def __iter__(self) -> Iterator[Frame]:
        """Yields the frames, once."""
        while (pair := self._first.pop(0) if self._first else self._read()) is not None:
            stamp_ms, image = pair
            counted = self._count / self.fps if self.fps else None
            yield Frame(self._count, stamp_ms / 1e3 if self.has_stamps else counted, image)
            self._count += 1

    def check_complete(self) -> None:
        """Compares the number of frames read so far with the number that a file announces.

        Raises:
            DataError: too many frames are missing.
        """
        missing = self.frames - self._count
        if not self._camera and missing > max(1, MISSING_SHARE * self.frames):
            raise DataError(
                f"{self._name} is cut off or damaged: it announces {self.frames} frames, of which "
                f"{self._count} could be decoded; their rows are kept"
            )

    def close(self) -> None:
        """Lets the file or the camera go."""
        self._capture.release()


def announced_frames(path: Path) -> int:
    """Returns the number of frames that a video's container announces; 0 where it does not."""
    capture = cv2.VideoCapture(str(path))
    count = round(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
    capture.release()
    return max(0, count)


def pictures_at(path: Path, numbers: set[int]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yields some frames of a video in colour, uint8 (H, W, 3), with their numbers, in order."""
    capture = cv2.VideoCapture(str(path))
    try:
        for number in range(max(numbers, default=-1) + 1):
            if not capture.grab():
                return
            if number in numbers:
                yield number, np.asarray(capture.retrieve()[1], dtype=np.uint8)
    finally:
        capture.release()


class VideoFile:
    """A video being written: MPEG-4 in .mp4, which appears only when it is whole.

    Args:
        path: the *.mp4.
        fps: frames a second; 0 for `DEFAULT_FPS`.

    Raises:
        OutputError: it cannot be written.
    """

    def __init__(self, path: Path, fps: float) -> None:
        # MPEG-4 counts time in at most 65535 parts of a second; OpenCV takes 10^n of them a frame.
        self._path, self._fps = path, round(fps or DEFAULT_FPS, 2 if fps < 600 else 0)
        # OpenCV chooses the container by the last suffix, so this is no `atomic_path`.
        self._temporary = path.with_name(f".{path.stem}.part{path.suffix}")
        self._writer: cv2.VideoWriter | None = None
        self._size = (0, 0)
        self._frames = 0
        with output_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, picture: NDArray[np.uint8]) -> None:
        """Appends a picture, uint8 (H, W, 3); one of another size than the first is resized."""
        if self._writer is None:
            # MPEG-4 halves the colours' resolution, so both sides must be even.
            height, width = (side + side % 2 for side in picture.shape[:2])
            self._size = (width, height)
            self._writer = cv2.VideoWriter(
                str(self._temporary), cv2.VideoWriter.fourcc(*"mp4v"), self._fps, self._size
            )
            if not self._writer.isOpened():
                self.discard()
                raise OutputError(
                    f"cannot write {self._path}: OpenCV makes no MPEG-4 of {width} x {height} px "
                    f"at {self._fps:g} fps there; choose another --out, or --no-overlays"
                )
        height, width = picture.shape[:2]
        if (width, height) != self._size:
            right, below = self._size[0] - width, self._size[1] - height
            if {right, below} <= {0, 1}:
                picture = cv2.copyMakeBorder(picture, 0, below, 0, right, cv2.BORDER_REPLICATE)  # type: ignore[assignment]
            else:
                picture = cv2.resize(picture, self._size)  # type: ignore[assignment]
        self._writer.write(picture)
        self._frames += 1

    def finish(self) -> None:
        """Ends the video and gives it its name; nothing is written if it has no frame.

        Raises:
            OutputError: the file lacks frames (OpenCV reports no write fault), or cannot be named.
        """
        if self._writer is None:
            return
        self._writer.release()
        self._writer = None
        written = announced_frames(self._temporary)
        if written != self._frames:
            self.discard()
            raise OutputError(
                f"cannot write {self._path}: {written} of {self._frames} frames arrived on the "
                "disk; free some space, or choose another --out"
            )
        with output_errors(self._path):
            os.replace(self._temporary, self._path)

    def discard(self) -> None:
        """Leaves nothing behind."""
        if self._writer is not None:
            self._writer.release()
            self._writer = None
        self._temporary.unlink(missing_ok=True)
