"""Videos and cameras, decoded by PyAV: frames as pictures, upright, called by their numbers.

Files are opened as three kinds alone, and by their own names: FFmpeg knows kinds that name other files and addresses.
"""

import sys
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
from jaxtyping import UInt8

from maskfirst.data import images
from maskfirst.data.images import ImageError, TooLargeError
from maskfirst.errors import UserError, listed
from maskfirst.sources import Item, Part, Source, check_file, runs

ENDINGS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v")
CAMERA = "camera:"
SAFE = {"format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi", "protocol_whitelist": "file"}
"""What FFmpeg may take a file for, and from where."""
DEVICES = {"linux": ("v4l2", "/dev/video{}"), "darwin": ("avfoundation", "{}"), "win32": ("dshow", "video={}")}
"""By system: what FFmpeg calls its cameras in all, and each of them."""


class Video(Source):
    """The frames of a video, by their number in it from `000000` on, in the order of showing. Needs the extra `video`."""

    def __init__(self, path: Path | str) -> None:
        """Raises UserError where PyAV is missing."""
        _require_av(str(path))
        self.path = Path(path)

    def parts(self, size: int) -> list[Part]:
        """Runs of `size` frames, which are counted without decoding any."""
        return runs(str(self.path), self._index.count, size)

    def read(self, part: Part) -> Iterator[Item]:
        """Frames (H, W, 3), RGB 0..255. Decoding begins at the last key frame before the part. Raises UserError."""
        expected, stop = part.first, self._index.count if part.count is None else part.first + part.count
        for number, frame in self._frames(part.first):
            if number >= stop:
                break
            if number >= expected:
                yield from (self._lost(each) for each in range(expected, number))
                yield Item(_name(number), _picture(frame, f"{self.path}: frame {number}"))
                expected = number + 1
            if expected == stop:
                return
        yield from (self._lost(each) for each in range(expected, stop))

    def _lost(self, number: int) -> Item:
        damaged = "cannot be decoded; it, or one that it is made of, is damaged or cut off"
        return Item(_name(number), ImageError(f"{self.path}: frame {number}: {damaged}"))

    @cached_property
    def _index(self) -> "_Index":
        with self._opened() as (container, stream):
            found = _Index.of(container, stream)
        if not found.count:
            raise UserError(f"{self.path}: a video without frames, or cut short before the first")
        return found

    def _frames(self, first: int) -> Iterator[tuple[int, Any]]:
        """Frames with their numbers, from some frame on that is not behind `first`."""
        index = self._index
        if first >= index.count:
            return
        with self._opened() as (container, stream):
            key = None if index.times is None else index.key_before(index.times[first])
            if key is not None and key > index.keys[0]:
                packets = _packets_from(container, stream, key)
                if packets is not None:
                    yield from index.numbered(_decoded(packets, stream))
                    return
        # Opened anew, as where a search has failed is anywhere.
        with self._opened() as (container, stream):
            yield from index.numbered(_decoded(_packets(container, stream), stream))

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        check_file(self.path)
        with _opened(f"file:{self.path}", None, str(self.path), "no video, or one cut short") as found:
            yield found


class Camera(Source):
    """A camera of this machine, `camera:0`; on Windows by its name, `camera:NAME`. Needs the extra `video`.

    `count`: frames to take; None: as long as it gives some.
    """

    def __init__(self, address: str, count: int | None = None) -> None:
        """Raises UserError where PyAV is missing, and for an address that is none."""
        _require_av(address)
        self.address, self.count = address, count
        self.file, self.format = _device(address)

    def parts(self, size: int) -> list[Part]:
        """Raises UserError."""
        raise UserError(f"{self.address}: a camera has no end and no parts; predict it without --shards")

    def read(self, part: Part) -> Iterator[Item]:
        """Raises UserError."""
        raise UserError(f"{self.address}: a camera shows nothing twice; predict it without --shards")

    def frames(self) -> Iterator[Item]:
        """Frames as they come, called by their numbers. Raises UserError where there is no such camera."""
        return watched(self.file, self.format, self.address, self.count)


def watched(file: str, format: str | None, address: str, count: int | None = None) -> Iterator[Item]:
    """The first `count` frames, or all, of what FFmpeg opens by the name `file` as `format`; `address`: for messages."""
    others = [str(path) for path in sorted(Path("/dev").glob("video*"))] if format == "v4l2" else []
    there = f" (there is {listed(others)})" if others else ""
    with _opened(file, format, address, f"no camera at {file}{there}") as (container, stream):
        for number, frame in enumerate(islice(_decoded(_packets(container, stream), stream), count)):
            yield Item(_name(number), _picture(frame, f"{address}: frame {number}"))


@dataclass(frozen=True)
class _Index:
    """When frames are shown, as their packets tell, in units of the stream.

    `times`: of all, sorted; None where a file does not tell. `keys`: of those at which decoding can begin.
    """

    count: int
    times: list[int] | None
    keys: list[int]

    @classmethod
    def of(cls, container: Any, stream: Any) -> "_Index":
        packets = [(each.pts, each.is_keyframe) for each in _packets(container, stream) if _is_shown(each, stream)]
        times = [time for time, _ in packets if time is not None]
        ordered = sorted(times)
        # AVI has no times of showing. Where FFmpeg's parser finds none either, it makes them up in the order of decoding.
        made_up = container.format.name == "avi" and stream.codec_context.has_b_frames and times == ordered
        if made_up or len(set(times)) < len(packets):
            return cls(len(packets), None, [])
        return cls(len(packets), ordered, sorted(time for time, is_key in packets if is_key))

    def key_before(self, time: int) -> int | None:
        place = bisect_right(self.keys, time)
        return self.keys[place - 1] if place else None

    def numbered(self, frames: Iterator[Any]) -> Iterator[tuple[int, Any]]:
        """Frames by their times; without any, in the order in which they come from the first one on."""
        if self.times is None:
            yield from enumerate(frames)
            return
        numbers = {time: number for number, time in enumerate(self.times)}
        for frame in frames:
            if frame.pts in numbers:
                yield numbers[frame.pts], frame


def _require_av(place: str) -> None:
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise UserError(f"{place}: videos need PyAV: pip install 'maskfirst[video]'") from error


@contextmanager
def _opened(file: str, format: str | None, shown: str, otherwise: str) -> Iterator[tuple[Any, Any]]:
    """Container and video stream, untyped as PyAV is an extra. Raises UserError that begins with `shown`, and TooLargeError."""
    import av.error

    # FFmpeg's own check, too: a stream can change its size on the way.
    options = {"max_pixels": str(images.PIXELS)}
    try:
        container = av.open(
            file, format=format, options=options, container_options={} if format else SAFE, metadata_errors="replace"
        )
    # PyAV raises its own errors and, for damaged headers, plain ones.
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise UserError(f"{shown}: {otherwise}: {_reason(error)}") from error
    with container:
        stream = container.streams.best("video")
        if stream is None:
            raise UserError(f"{shown}: no pictures in it, only {', '.join(each.type for each in container.streams)}")
        context: Any = stream.codec_context
        if context is None:
            raise UserError(f"{shown}: its pictures are packed in a way that FFmpeg has no decoder for")
        width, height = context.width, context.height
        if width * height > images.PIXELS:
            limit = f"more than the limit of {images.PIXELS / 1e6:.4g} million; not decoded"
            raise TooLargeError(f"{shown}: frames of {width} x {height} px, {limit}")
        context.options = options
        yield container, stream


def _packets(container: Any, stream: Any) -> Iterator[Any]:
    """What the frames are packed in, up to where the file ends or breaks off."""
    import av.error

    while True:
        try:
            # An empty one, which the end has, would tell the decoder to stop.
            yield from (packet for packet in container.demux(stream) if packet.size)
            return
        except av.error.BlockingIOError:
            # Of cameras that have no frame yet.
            sleep(0.005)
        except av.error.FFmpegError:
            return


def _packets_from(container: Any, stream: Any, key: int) -> Iterator[Any] | None:
    """Those from a key frame on, or an earlier one; None where the file cannot be searched."""
    import av.error

    try:
        container.seek(key, stream=stream)
    except av.error.FFmpegError:
        return None
    packets = _packets(container, stream)
    first = next(packets, None)
    if first is None or not first.is_keyframe or first.pts is None or first.pts > key:
        return None
    return _chained(first, packets)


def _chained(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _decoded(packets: Iterator[Any], stream: Any) -> Iterator[Any]:
    """Frames in the order of showing, without those that cannot be decoded."""
    import av.error

    for packet in packets:
        try:
            yield from stream.decode(packet)
        except av.error.FFmpegError:
            continue
    try:
        yield from stream.decode(None)
    except av.error.FFmpegError:
        return


def _is_shown(packet: Any, stream: Any) -> bool:
    """Not so what an edit list leaves out, nor a frame of VP8 that others are made of: RFC 6386, section 9.1."""
    hidden = stream.codec_context.name.startswith("vp8") and not bytes(packet)[0] & 0x10
    return not packet.is_discard and not hidden


def _picture(frame: Any, place: str) -> UInt8[np.ndarray, "H W 3"] | ImageError:
    if frame.is_corrupt:
        return ImageError(f"{place}: damaged")
    if frame.width * frame.height > images.PIXELS:
        return TooLargeError(f"{place}: {frame.width} x {frame.height} px, more than the limit")
    try:
        array = frame.to_ndarray(format="rgb24")
    # Whatever it raises speaks of the frame: formats that have no RGB, and what FFmpeg raises.
    except (ValueError, OSError, MemoryError) as error:
        return ImageError(f"{place}: cannot be made RGB: {_reason(error)}")
    # Degrees, against the clock, by which it is to be turned.
    return np.ascontiguousarray(np.rot90(array, round(frame.rotation / 90)))


def _name(number: int) -> str:
    return f"{number:06d}"


def _device(address: str) -> tuple[str, str]:
    """Name and format of a camera, for FFmpeg. Raises UserError."""
    which = address.removeprefix(CAMERA)
    if sys.platform not in DEVICES:
        raise UserError(f"{address}: cameras are known on {', '.join(DEVICES)}, not on {sys.platform}")
    format, file = DEVICES[sys.platform]
    if sys.platform != "win32" and not (which.isascii() and which.isdecimal()):
        raise UserError(f"{address}: should be a number, as {CAMERA}0")
    return file.format(which), format


def _reason(error: BaseException) -> str:
    told = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(told.split()) or type(error).__name__
