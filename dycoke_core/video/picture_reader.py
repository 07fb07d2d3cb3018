"""Lists of pictures in the child, through PyAV's decoders. Imported by children only.

A picture is decoded by the decoder of what it was recognised as, whole, from memory: no demuxer
sees it, and no decoder takes more pixels than the limit. Pictures of several sizes are resized
like the frames of a video, each to the whole of the model's frame; where frames keep a video's
shape, it is that of the first picture.
"""

import os
from typing import Any

import av
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame

from dycoke_core.video.child import Task, TaskError
from dycoke_core.video.frame_list import FrameListIndex, read_index, sniff_picture
from dycoke_core.video.frame_resizers import Resize
from dycoke_core.video.sampling import frames_in_clip, sample_indices, shown_s


def probe(task: Task) -> dict[str, Any]:
    """Decodes every picture. Takes `max_pixels`.

    Returns what the headers of a video say, or, for the first that does not decode, its number as
    `bad_picture`.
    """
    fd, index = _open(task)
    headers: dict[str, Any] = {}
    for number, place in enumerate(index.places):
        try:
            codec, frame = _decode(task, fd, place)
        except TaskError:
            return {"bad_picture": number}
        headers = headers or _describe(index, codec, frame)
    return headers


def plan(task: Task) -> dict[str, Any]:
    """Samples from the list; decodes its first picture alone. Takes what the plan of a video
    takes, and returns the same; every picture counts as a keyframe."""
    fd, index = _open(task)
    codec, first = _decode(task, fd, index.places[0])
    params = task.params
    clip = frames_in_clip(index.times_s, index.end_s, params["start_s"], params["end_s"])
    indices = sample_indices(clip, params["num_frames"], params["spread"]) if clip else ()
    return {
        "headers": _describe(index, codec, first),
        "total_frames": len(index.places),
        "has_times": True,
        "end_s": index.end_s,
        "shown_s": shown_s(index.times_s, index.end_s, clip),
        "indices": indices,
        "timestamps_s": [index.times_s[number] for number in indices],
        "num_keyframes": len(clip),
        "key_pts": [],
        "upright_size": _upright_size(first),
    }


def read(task: Task, resize: Resize) -> dict[str, Any]:
    """Decodes the pictures `indices`, ascending, into the pixels; returns what a video's read
    does."""
    assert task.pixels is not None
    fd, index = _open(task)
    wanted = task.params["indices"]
    for row, number in enumerate(wanted):
        if row and wanted[row - 1] == number:
            task.pixels[row] = task.pixels[row - 1]
        else:
            task.pixels[row] = resize(_decode(task, fd, index.places[number])[1])
        task.report_progress((row + 1) / len(wanted))
    times_s = index.times_s
    return {
        "indices": wanted,
        "timestamps_s": [times_s[number] for number in wanted],
        "num_damaged": 0,
    }


def _open(task: Task) -> tuple[int, FrameListIndex]:
    fd = os.open(task.video_path, os.O_RDONLY)
    try:
        return fd, read_index(fd)
    except ValueError as error:
        raise TaskError("unreadable", str(error)) from error


def _decode(task: Task, fd: int, place: tuple[int, int]) -> tuple[str, VideoFrame]:
    """Returns the name of the decoder, and what it made of the picture."""
    offset, size = place
    data = os.pread(fd, size, offset)
    codec = sniff_picture(data)
    if codec is None or len(data) != size:
        raise TaskError("unreadable", "no picture")
    context = av.CodecContext.create(codec, "r")
    assert isinstance(context, VideoCodecContext)
    context.thread_count = 1
    context.options = {"max_pixels": str(task.params["max_pixels"])}
    try:
        frames = [*context.decode(av.Packet(data)), *context.decode(None)]
    except MemoryError:
        raise
    except (av.FFmpegError, ValueError) as error:
        raise TaskError("unreadable", str(error)) from error
    if not frames or frames[0].is_corrupt:
        raise TaskError("unreadable", "the picture does not decode")
    return codec, frames[0]


def _upright_size(picture: VideoFrame) -> tuple[int, int]:
    """Height and width, as it is shown."""
    is_turned = picture.rotation % 180 == 90
    return (picture.width, picture.height) if is_turned else (picture.height, picture.width)


def _describe(index: FrameListIndex, codec: str, first: VideoFrame) -> dict[str, Any]:
    """A list is as large as its first picture."""
    return {
        "codec": codec,
        "width": first.width,
        "height": first.height,
        "duration_s": index.end_s,
        "num_frames": len(index.places),
        "fps": index.fps,
        "extradata_bytes": 0,
        "codecs": [codec],
    }
