"""PyAV in the child: headers, sampling, and the second reader. Imported by children only.

The demuxer is forced to what the file was recognised as, decoders outside the allow-list are not
opened even for a look at the headers, and no decoder takes frames above the pixel limit.
"""

import importlib
import pkgutil
from contextlib import suppress
from typing import Any

import av
from av.container import InputContainer
from av.stream import Disposition, Stream
from av.video.stream import VideoStream

from dycoke_core.video import picture_reader
from dycoke_core.video.child import Task, TaskError, Tasks
from dycoke_core.video.frame_resizers import Resize, frame_resizer
from dycoke_core.video.pyav_frames import FrameSource, list_frames, read_keyframe
from dycoke_core.video.sampling import frames_in_clip, sample_indices

# PyAV loads parts of itself on demand; confined, it could not.
for _module in pkgutil.walk_packages(av.__path__, "av."):
    if not _module.name.endswith("__main__"):
        importlib.import_module(_module.name)

# FFmpeg's own way to print, to stderr: PyAV's takes Python's lock in the decoder's threads.
av.logging.restore_default_callback()
av.logging.set_libav_level(av.logging.ERROR)

_DECODERS = "h264,hevc,vp8,vp9,libdav1d,libvpx,libvpx-vp9,mpeg4,mpeg2video,mjpeg"


def probe(task: Task) -> dict[str, Any]:
    """Reads the headers. Takes `demuxer` and `max_pixels`."""
    return _describe(*_open(task))


def plan(task: Task) -> dict[str, Any]:
    """Reads the headers, lists the frames and samples from them; decodes nothing.

    Takes what `probe` takes, and `num_frames`, `start_s`, `end_s`, `sampling`, `spread`,
    `keeps_shape`, `max_source_frames`. Where frames are to keep the video's shape, one of them is
    decoded after all: only then is it known whether they are turned. Returns no indices for a clip
    that starts beyond the end, and the file's own times of keyframes that were chosen as such.
    """
    container, stream = _open(task)
    headers = _describe(container, stream)
    params = task.params
    frames = list_frames(container, stream, params["max_source_frames"])
    clip = frames_in_clip(frames.times_s, frames.end_s, params["start_s"], params["end_s"])
    keyframes = frames.keyframes_in(clip) if params["sampling"] == "keyframe" else []
    indices = (
        sample_indices(keyframes or clip, params["num_frames"], params["spread"]) if clip else ()
    )
    return {
        "headers": headers,
        "total_frames": len(frames.times_s),
        "has_times": frames.pts is not None,
        "end_s": frames.end_s,
        "shown_s": frames.shown_s(clip),
        "indices": indices,
        "timestamps_s": [frames.times_s[index] for index in indices],
        "num_keyframes": len(keyframes),
        "key_pts": [frames.pts[index] for index in indices] if frames.pts and keyframes else [],
        "upright_size": _upright_size(task) if params["keeps_shape"] else _stored_size(stream),
    }


def read_keyframes(task: Task) -> dict[str, Any]:
    """Decodes the keyframes at `key_pts`, ascending, into the pixels, and nothing else. Takes
    `resizing`, too.

    Raises:
        TaskError: one of them does not decode by itself.
    """
    assert task.pixels is not None
    container, stream = _open(task)
    resize = _resizer(task)
    wanted = task.params["key_pts"]
    for row, key_pts in enumerate(wanted):
        if row and wanted[row - 1] == key_pts:
            task.pixels[row] = task.pixels[row - 1]
        else:
            frame = read_keyframe(container, stream, key_pts)
            if frame is None:
                raise TaskError("unreadable", "a keyframe does not decode by itself")
            task.pixels[row] = resize(frame)
        task.report_progress((row + 1) / len(wanted))
    return {}


def read(task: Task) -> dict[str, Any]:
    """Decodes the frames `indices`, ascending, into the pixels. Takes `resizing` and what `plan`
    takes, too.

    Returns the indices and times of the frames that stand in each place, which are not those asked
    for where a frame does not decode.
    """
    placed, is_damaged = _read(task, task.num_threads)
    if is_damaged and task.num_threads > 1:
        # What a decoder puts in the place of lost data depends on its number of threads.
        placed, _ = _read(task, num_threads=1)
    return placed


def _read(task: Task, num_threads: int) -> tuple[dict[str, Any], bool]:
    """Returns what `read` does, and whether a decoder had to make do."""
    assert task.pixels is not None
    frames = list_frames(*_open(task), task.params["max_source_frames"])
    wanted = task.params["indices"]
    source = FrameSource(lambda: _open(task, num_threads), frames, wanted)
    resize = _resizer(task)
    numbers: list[int] = []
    num_damaged = 0
    for row, target in enumerate(wanted):
        number, frame = source.frame_at(target)
        num_damaged += frame.is_corrupt
        if numbers and numbers[-1] == number:
            task.pixels[row] = task.pixels[row - 1]
        else:
            task.pixels[row] = resize(frame)
        numbers.append(number)
        task.report_progress((row + 1) / len(wanted))
    source.close()
    placed = {
        "indices": numbers,
        "timestamps_s": [frames.times_s[number] for number in numbers],
        "num_damaged": num_damaged,
    }
    return placed, source.has_failed or bool(task.complaints())


def read_pictures(task: Task) -> dict[str, Any]:
    """As `read`, of a list of pictures."""
    return picture_reader.read(task, _resizer(task, of_pictures=True))


TASKS: Tasks = {
    "probe": probe,
    "plan": plan,
    "read_keyframes": read_keyframes,
    "read": read,
    "probe_pictures": picture_reader.probe,
    "plan_pictures": picture_reader.plan,
    "read_pictures": read_pictures,
}


def _resizer(task: Task, *, of_pictures: bool = False) -> Resize:
    assert task.pixels is not None
    height, width = task.pixels.shape[1:3]
    return frame_resizer(task.params["resizing"], height, width, of_pictures=of_pictures)


def _open(task: Task, num_threads: int = 1) -> tuple[InputContainer, VideoStream]:
    """Opens the video and the stream in it that decord would take."""
    decoding = {"codec_whitelist": _DECODERS, "max_pixels": str(task.params["max_pixels"])}
    options = {"protocol_whitelist": "file", **decoding}
    try:
        container = av.open(task.video_path, format=task.params["demuxer"], options=options)
        stream = container.streams.best("video")
    except MemoryError:
        raise
    except (av.FFmpegError, ValueError) as error:
        raise TaskError("unreadable", str(error)) from error
    if isinstance(stream, VideoStream) and stream.codec_context is None:  # no decoder is known
        raise TaskError("unknown_codec")
    if not isinstance(stream, VideoStream) or Disposition.attached_pic in stream.disposition:
        raise TaskError("no_video")
    stream.codec_context.thread_count = num_threads
    stream.codec_context.thread_type = "AUTO"
    stream.codec_context.options = decoding
    return container, stream


def _describe(container: InputContainer, stream: VideoStream) -> dict[str, Any]:
    """Zeros where the file says nothing, or nonsense."""
    context = stream.codec_context
    return {
        "codec": context.codec.canonical_name,
        "width": stream.width,
        "height": stream.height,
        "duration_s": max(0.0, _duration_s(container, stream)),
        "num_frames": max(0, stream.frames),
        "fps": max(0.0, float(stream.average_rate or 0)),
        "extradata_bytes": context.extradata_size,
        "codecs": sorted({_codec_of(stream) for stream in container.streams} - {""}),
    }


def _codec_of(stream: Stream) -> str:
    """The codec that a demuxer's user might open for a stream; "" where none can be."""
    if stream.type in ("data", "attachment"):
        return ""
    return stream.codec_context.codec.canonical_name if stream.codec_context else "unknown"


def _duration_s(container: InputContainer, stream: VideoStream) -> float:
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return (container.duration or 0) / av.time_base


def _stored_size(stream: VideoStream) -> tuple[int, int]:
    """Height and width by the headers; 0 where they say nothing."""
    return stream.height, stream.width


def _upright_size(task: Task) -> tuple[int, int]:
    """Height and width of the first frame that decodes, as it is shown.

    Raises:
        TaskError: none does, and the headers say nothing.
    """
    container, stream = _open(task)
    with suppress(av.FFmpegError):
        for frame in container.decode(stream):
            is_turned = frame.rotation % 180 == 90
            return (frame.width, frame.height) if is_turned else (frame.height, frame.width)
    if not all(_stored_size(stream)):
        raise TaskError("unreadable", "no frame says how large it is")
    return _stored_size(stream)
