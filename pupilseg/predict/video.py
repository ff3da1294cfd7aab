"""Reads videos and cameras, with timestamps, and writes videos, using OpenCV only."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np

from pupilseg.errors import DataError, OutputError
from pupilseg.files import output_errors
from pupilseg.pictures import opencv_path, to_gray

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

MISSING_SHARE = 0.02
"""Fraction of frames that may be missing, since some containers only estimate their number."""
DEFAULT_FPS = 30.0
"""Frame rate of the overlay video if that of the source is unknown."""


class Frame(NamedTuple):
    """One frame of a video.

    Attributes:
        number: index among the frames that could be decoded, from 0.
        time_s: time since the start of the video; None if unknown.
        image: uint8 (H, W).
    """

    number: int
    time_s: float | None
    image: NDArray[np.uint8]


class Video:
    """An open video file or camera.

    Args:
        source: a file, or the number of a camera.

    Attributes:
        frames: number of frames according to the container; 0 if unknown, as for a camera.
        fps: frame rate according to the container; 0 if unknown.
        has_stamps: True if `Frame.time_s` comes from timestamps; False if it is computed from the
            frame's number.
        clock: source of `Frame.time_s`, for messages.

    Raises:
        DataError: OpenCV cannot open the source, or it contains no frame.
    """

    def __init__(self, source: Path | int) -> None:
        self._camera = isinstance(source, int)
        self._name = f"camera {source}" if self._camera else str(source)
        self._opened_ms: float | None = None
        self._count = 0
        self._capture = cv2.VideoCapture(source if isinstance(source, int) else opencv_path(source))
        # FFmpeg renders text files (.txt, .nfo) as images.
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
            raise DataError(f"{self._name} contains no frame that can be decoded; check the file")
        # Without timestamps, a container reports the same time for every frame.
        self.has_stamps = len(self._first) < 2 or self._first[1][0] > self._first[0][0]
        self.clock = "this machine's clock" if self._camera else "the container's timestamp"
        if not self.has_stamps:
            self.clock = f"frame / {self.fps:g} fps" if self.fps else "empty"

    def _why_not(self, source: Path | int) -> str:
        """Returns the reason why a source could not be opened."""
        if isinstance(source, int):
            return f"camera {source} does not exist, or another program is using it"
        try:
            size = source.stat().st_size
            with source.open("rb"):
                pass
        except OSError as error:
            return f"cannot read {source}: {error.strerror}"
        if not size:
            return f"{source} is empty"
        return f"{source} is damaged, or neither an image nor a video that OpenCV can read"

    def _read(self) -> tuple[float, NDArray[np.uint8]] | None:
        """Returns the time in ms and the image of the next frame; None at the end.

        For a camera, the time since the first frame is measured with this machine's clock, because
        the timestamps of camera drivers have different origins, and some drivers have none.
        """
        success, picture = self._capture.read()
        if not success:
            return None
        if self._camera:
            stamp = 1e3 * time.monotonic()
            self._opened_ms = stamp if self._opened_ms is None else self._opened_ms
            return stamp - self._opened_ms, to_gray(picture)
        return self._capture.get(cv2.CAP_PROP_POS_MSEC), to_gray(picture)

    def __iter__(self) -> Iterator[Frame]:
        """Yields the frames; they can be iterated over only once."""
        while (pair := self._first.pop(0) if self._first else self._read()) is not None:
            stamp_ms, image = pair
            counted = self._count / self.fps if self.fps else None
            yield Frame(self._count, stamp_ms / 1e3 if self.has_stamps else counted, image)
            self._count += 1

    def check_complete(self) -> None:
        """Compares the number of frames read so far with the number in the file's header.

        Raises:
            DataError: too many frames are missing.
        """
        missing = self.frames - self._count
        if not self._camera and missing > max(1, MISSING_SHARE * self.frames):
            raise DataError(
                f"{self._name} is cut off or damaged: only {self._count} of the {self.frames} "
                "frames in its header could be decoded; their rows are kept"
            )

    def close(self) -> None:
        """Closes the file or the camera."""
        self._capture.release()


def announced_frames(path: Path) -> int:
    """Returns the number of frames in a video according to its container; 0 if unknown."""
    try:
        capture = cv2.VideoCapture(opencv_path(path))
    except DataError:
        return 0
    count = round(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
    capture.release()
    return max(0, count)


def pictures_at(path: Path, numbers: set[int]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yields (number, uint8 (H, W, 3) in BGR order) for some frames of a video, in order."""
    capture = cv2.VideoCapture(opencv_path(path))
    try:
        for number in range(max(numbers, default=-1) + 1):
            if not capture.grab():
                return
            if number in numbers:
                yield number, np.asarray(capture.retrieve()[1], dtype=np.uint8)
    finally:
        capture.release()


class VideoFile:
    """An MPEG-4 video that is being written; the file appears once it is complete.

    Args:
        path: a name that ends in ".mp4".
        fps: frame rate; 0 for `DEFAULT_FPS`.

    Raises:
        OutputError: the directory cannot be written.
    """

    def __init__(self, path: Path, fps: float) -> None:
        # MPEG-4 divides a second into at most 65535 parts; OpenCV uses 10^n * fps of them.
        self._path, self._fps = path, round(fps or DEFAULT_FPS, 2 if fps < 600 else 0)
        # OpenCV chooses the container by the last suffix, so `atomic_path` cannot be used.
        self._temporary = path.with_name(f".{path.stem}.part{path.suffix}")
        self._writer: cv2.VideoWriter | None = None
        self._size = (0, 0)
        self._frames = 0
        with output_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, picture: NDArray[np.uint8]) -> None:
        """Appends an image, uint8 (H, W, 3), resized to the size of the first one.

        Raises:
            OutputError: OpenCV cannot create the file.
            DataError: its name is not valid UTF-8.
        """
        if self._writer is None:
            # MPEG-4 stores color at half the resolution, so both sides have to be even.
            height, width = (side + side % 2 for side in picture.shape[:2])
            self._size = (width, height)
            self._writer = cv2.VideoWriter(
                opencv_path(self._temporary), cv2.VideoWriter.fourcc(*"mp4v"), self._fps, self._size
            )
            if not self._writer.isOpened():
                self.discard()
                raise OutputError(
                    f"cannot write {self._path}: OpenCV cannot create an MPEG-4 file of {width} x "
                    f"{height} px at {self._fps:g} fps; choose another --out, or --no-overlays"
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
        """Completes the video and moves it into place; writes no file if there was no frame.

        Raises:
            OutputError: the file cannot be renamed, or lacks frames. (OpenCV does not
                report write errors.)
        """
        if self._writer is None:
            return
        self._writer.release()
        self._writer = None
        written = announced_frames(self._temporary)
        if written != self._frames:
            self.discard()
            raise OutputError(
                f"cannot write {self._path}: only {written} of {self._frames} frames are on "
                "the disk; free some space, or choose another --out"
            )
        with output_errors(self._path):
            os.replace(self._temporary, self._path)

    def discard(self) -> None:
        """Removes the unfinished video."""
        if self._writer is not None:
            self._writer.release()
            self._writer = None
        self._temporary.unlink(missing_ok=True)
