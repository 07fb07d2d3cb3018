"""A video's frames through PyAV: listing them without decoding, and decoding some of them.

Frames are numbered in the order of display. Where packets carry presentation times a decoded frame
is recognised by its own; elsewhere (AVI with B-frames) frames are counted from the start, without
seeking. Knows nothing of tasks or pixels.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import av
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from dycoke_core.video.child import TaskError
from dycoke_core.video.sampling import shown_s

_FALLBACK_FPS = 25.0  # for streams that neither time their frames nor name a rate


@dataclass(frozen=True, slots=True)
class FrameList:
    """Every frame that is really in the file."""

    times_s: list[float]  # from frame 0, ascending
    end_s: float
    pts: list[int] | None  # ascending, unique; None: frames have to be counted
    key_pts: list[int]  # where decoding can start, ascending; empty without pts
    fps: float | None = None  # that the headers name
    tick_s: float = 0.0  # to which times are rounded

    def shown_s(self, clip: range) -> float:
        return shown_s(self.times_s, self.end_s, clip, fps=self.fps, tick_s=self.tick_s)

    def keyframes_in(self, clip: range) -> list[int]:
        """Returns the numbers of those frames of a clip that decode without any other."""
        if self.pts is None:
            return []
        keys = set(self.key_pts)
        return [number for number in clip if self.pts[number] in keys]


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
    return FrameList(
        times_s,
        max(end_s, times_s[-1] + 1 / rate),
        known,
        sorted(key_pts),
        fps=float(stream.average_rate) if stream.average_rate else None,
        tick_s=float(tick),
    )


class FrameSource:
    """Decodes frames by number, asked for in ascending order.

    Frames that no other is predicted from are decoded only if they are wanted, or if a wanted one
    turns out not to decode (then its neighbours are wanted) or to be made of two fields (which may
    come in two packets).

    `has_failed`: whether a packet did not decode.

    Args:
        open_video: returns the container and its stream, rewound.
        wanted: the frames that will be asked for.
    """

    def __init__(
        self,
        open_video: Callable[[], tuple[InputContainer, VideoStream]],
        frames: FrameList,
        wanted: Iterable[int],
    ) -> None:
        self.has_failed = False
        self._open_video = open_video
        self._frames = frames
        self._can_seek = bool(frames.key_pts)
        self._wanted_pts = None if frames.pts is None else {frames.pts[n] for n in wanted}
        self._container, self._stream = open_video()
        self._decoded = self._decode()
        self._current: tuple[int, VideoFrame] | None = None  # the last one decoded

    def frame_at(self, target: int) -> tuple[int, VideoFrame]:
        """Returns frame `target`; if that does not decode the next that does, else the last one.

        Raises:
            TaskError: nothing in the video decodes.
        """
        self._advance(target)
        if self._wanted_pts is not None and not self._is_whole(target):
            self._wanted_pts = None
            self._rewind()
            self._advance(target)
        if self._current is None:
            raise TaskError("unreadable", "no frame decodes")
        return self._current

    def close(self) -> None:
        """Waits for what is being decoded, so that all its errors have been reported."""
        self._stream.codec_context.flush_buffers()

    def _is_whole(self, target: int) -> bool:
        if self._current is None:
            return False
        number, frame = self._current
        return number == target and not frame.interlaced_frame

    def _advance(self, target: int) -> None:
        """Decodes up to frame `target`, or the first one beyond that decodes."""
        key_pts = self._keyframe_on_the_way(target)
        if key_pts is not None:
            self._container.seek(key_pts, stream=self._stream)
            self._start_decoding()
            self._current = next(self._decoded, None)
            if self._current is None or self._current[0] > target:
                # The seek went past the frame. Not again in this file; once from its start.
                self._can_seek = False
                self._rewind()
        while self._current is None or self._current[0] < target:
            following = next(self._decoded, None)
            if following is None:
                break
            self._current = following

    def _rewind(self) -> None:
        self._container, self._stream = self._open_video()
        self._start_decoding()

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
        context = self._stream.codec_context
        for packet in _packets(self._container, self._stream, with_flush=True):
            is_wanted = self._wanted_pts is None or packet.pts in self._wanted_pts
            context.skip_frame = "DEFAULT" if is_wanted else "NONREF"
            for frame in self._decode_packet(packet):
                number = self._number_of(frame, number + 1)
                yield number, frame

    def _decode_packet(self, packet: "av.Packet[VideoStream]") -> list[VideoFrame]:
        """Returns no frames for a packet that does not decode; the next may."""
        try:
            return [frame for frame in packet.decode() if isinstance(frame, VideoFrame)]
        except MemoryError:
            raise
        except av.FFmpegError:
            self.has_failed = True
            return []

    def _number_of(self, frame: VideoFrame, counted: int) -> int:
        if self._frames.pts is None or frame.pts is None:
            return counted
        return max(0, bisect_right(self._frames.pts, frame.pts) - 1)


def read_keyframe(
    container: InputContainer, stream: VideoStream, key_pts: int
) -> VideoFrame | None:
    """Decodes the keyframe at `key_pts` and no other frame. None if that is not possible."""
    context = stream.codec_context
    try:
        container.seek(key_pts, stream=stream)
        for packet in container.demux(stream):
            if packet.pts == key_pts and packet.is_keyframe:
                # A decoder holds frames back for those that might be displayed earlier.
                found = [*packet.decode(), *context.decode(None)]
                context.flush_buffers()
                whole = [f for f in found if f.pts == key_pts and not f.is_corrupt]
                return whole[0] if len(found) == len(whole) == 1 else None
            if packet.pts is not None and packet.is_keyframe and packet.pts > key_pts:
                return None
    except MemoryError:
        raise
    except av.FFmpegError:
        return None
    return None


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
