"""A video's frames through PyAV: listing them without decoding, and decoding some of them.

Frames are numbered in the order of display. Where packets carry presentation times a decoded frame
is recognised by its own; elsewhere (AVI with B-frames) frames are counted from the start, without
seeking. Knows nothing of tasks or pixels.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import av
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from dycoke_core.video.child import TaskError

_FALLBACK_FPS = 25.0  # for streams that neither time their frames nor name a rate


@dataclass(frozen=True, slots=True)
class FrameList:
    """Every frame that is really in the file."""

    times_s: list[float]  # from frame 0, ascending
    end_s: float
    pts: list[int] | None  # ascending, unique; None: frames have to be counted
    key_pts: list[int]  # where decoding can start, ascending; empty without pts


def list_frames(container: InputContainer, stream: VideoStream, max_frames: int) -> FrameList:
    """Reads the whole file once, up to where it ends or breaks off."""
    pts: list[int | None] = []
    key_pts: list[int] = []
    end_pts = 0
    for packet in _packets(container, stream):
        if packet.pts is not None and packet.is_keyframe:
            key_pts.append(packet.pts)
        if packet.is_discard:  # hidden by an edit list
            continue
        pts.append(packet.pts)
        end_pts = max(end_pts, (packet.pts or 0) + (packet.duration or 0))
        if len(pts) > max_frames:
            raise TaskError("too_many_frames")
    if not pts:
        raise TaskError("unreadable", "no packets")
    rate = float(stream.average_rate or _FALLBACK_FPS)
    known = sorted({time for time in pts if time is not None})
    # AVI stores no presentation times; without B-frames those that FFmpeg makes up are right.
    is_guess = container.format.name == "avi" and stream.codec_context.has_b_frames
    if is_guess or len(known) != len(pts) or not stream.time_base:
        times_s = [number / rate for number in range(len(pts))]
        return FrameList(times_s, len(pts) / rate, pts=None, key_pts=[])
    tick = stream.time_base
    times_s = [(time - known[0]) * tick.numerator / tick.denominator for time in known]
    end_s = (end_pts - known[0]) * tick.numerator / tick.denominator
    return FrameList(times_s, max(end_s, times_s[-1] + 1 / rate), known, sorted(key_pts))


class FrameSource:
    """Decodes frames by number, asked for in ascending order.

    Args:
        open_video: returns the container and its stream, rewound.
    """

    def __init__(
        self, open_video: Callable[[], tuple[InputContainer, VideoStream]], frames: FrameList
    ) -> None:
        self._open_video = open_video
        self._frames = frames
        self._can_seek = bool(frames.key_pts)
        self._container, self._stream = open_video()
        self._decoded = self._decode()
        self._current: tuple[int, VideoFrame] | None = None  # the last one decoded

    def frame_at(self, target: int) -> tuple[int, VideoFrame]:
        """Returns frame `target`; if that does not decode the next that does, else the last one.

        Raises:
            TaskError: nothing in the video decodes.
        """
        key_pts = self._keyframe_on_the_way(target)
        if key_pts is not None:
            self._container.seek(key_pts, stream=self._stream)
            self._start_decoding()
            self._current = next(self._decoded, None)
            if self._current is None or self._current[0] > target:
                # The seek went past the frame. Not again in this file; once from its start.
                self._can_seek = False
                self._container, self._stream = self._open_video()
                self._start_decoding()
        while self._current is None or self._current[0] < target:
            following = next(self._decoded, None)
            if following is None:
                break
            self._current = following
        if self._current is None:
            raise TaskError("unreadable", "no frame decodes")
        return self._current

    def _keyframe_on_the_way(self, target: int) -> int | None:
        """The time of the last keyframe between here and `target`, None if there is none."""
        if not self._can_seek or self._frames.pts is None:
            return None
        position = bisect_right(self._frames.key_pts, self._frames.pts[target]) - 1
        if position < 0:
            return None
        key_pts = self._frames.key_pts[position]
        reached = self._frames.pts[self._current[0]] if self._current else self._frames.pts[0]
        return key_pts if key_pts > reached else None

    def _start_decoding(self) -> None:
        self._decoded = self._decode()
        self._current = None

    def _decode(self) -> Iterator[tuple[int, VideoFrame]]:
        number = -1
        for packet in _packets(self._container, self._stream, with_flush=True):
            for frame in _decode_packet(packet):
                number = self._number_of(frame, number + 1)
                yield number, frame

    def _number_of(self, frame: VideoFrame, counted: int) -> int:
        if self._frames.pts is None or frame.pts is None:
            return counted
        return max(0, bisect_right(self._frames.pts, frame.pts) - 1)


def _packets(
    container: InputContainer, stream: VideoStream, *, with_flush: bool = False
) -> Iterator["av.Packet[VideoStream]"]:
    """Packets up to where the file ends or breaks off; then, `with_flush`, the empty one that has a
    decoder give out what it holds back.
    """
    try:
        for packet in container.demux(stream):
            if packet.size or with_flush:
                yield packet
    except MemoryError:
        raise
    except av.FFmpegError:
        return


def _decode_packet(packet: "av.Packet[VideoStream]") -> list[VideoFrame]:
    """Returns no frames for a packet that does not decode; the next may."""
    try:
        return [frame for frame in packet.decode() if isinstance(frame, VideoFrame)]
    except MemoryError:
        raise
    except av.FFmpegError:
        return []
