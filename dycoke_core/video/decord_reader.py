"""decord in the child: the first reader. Imported by children only.

Frames are resized while they are decoded: with whole frames decord's queue takes gigabytes within
seconds. It applies rotation metadata by itself.

What a decoder substitutes for lost data depends on its number of threads. So that frames never
depend on how busy a machine is, a video that FFmpeg has complained of is read once more with one.
"""

from typing import Any

import decord
import numpy as np
import numpy.typing as npt

from dycoke_core.video.child import Task, TaskError, Tasks
from dycoke_core.video.demuxers import DemuxerGuess

# A line of its own log, not FFmpeg's: where threads come late (a busy machine) it gives up skipping
# frames, and returns others than those that were asked for.
_SAID_BY_DECORD = b"/src/video/"

_DEMUXER_GUESS = DemuxerGuess.of_loaded_library()
decord.logging.set_level(decord.logging.ERROR)

# decord puts a neighbour in the place of a frame that it cannot find, and says so to nobody unless
# more than this share of the video was replaced. One is too many: PyAV may find it.
_MAX_SUBSTITUTED_SHARE = 1e-9


def read(task: Task) -> dict[str, Any]:
    """Decodes the frames `indices`, ascending, of `total_frames` into the pixels.

    Takes `demuxer`, too: what the file was recognised as.
    """
    if task.params["demuxer"] not in _DEMUXER_GUESS.names(task.video_path):
        raise TaskError("unreadable", "decord would demux it as something else")
    try:
        _read(task, task.num_threads)
        said = task.complaints()
        if said and _SAID_BY_DECORD not in said and task.num_threads > 1:
            _read(task, num_threads=1)
            said = task.complaints()
    except (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError) as error:
        raise TaskError("unreadable", str(error)) from error
    if _SAID_BY_DECORD in said:
        raise TaskError("unreadable", "decord lost its place")
    return {}


def _read(task: Task, num_threads: int) -> None:
    assert task.pixels is not None
    height, width = task.pixels.shape[1:3]
    video = decord.VideoReader(
        task.video_path,
        ctx=decord.cpu(0),
        width=width,
        height=height,
        num_threads=num_threads,
        fault_tol=_MAX_SUBSTITUTED_SHARE,
    )
    if len(video) != task.params["total_frames"]:
        raise TaskError("unreadable", "decord counts other frames than there are")
    indices = task.params["indices"]
    for row, index in enumerate(indices):
        if row and indices[row - 1] == index:
            task.pixels[row] = task.pixels[row - 1]
        else:
            task.pixels[row] = _without_padding(video[index].asnumpy(), height, width)
        task.report_progress((row + 1) / len(indices))


def _without_padding(
    frame: npt.NDArray[np.uint8], height: int, width: int
) -> npt.NDArray[np.uint8]:
    """Takes the pixels out of the rows that FFmpeg has padded in memory.

    Where the padded row is a multiple of the width (of 16, 32, 48, 96 pixels and others), decord
    calls that the number of channels: [height, width, 4], [height, width, 6].
    """
    rows = frame.reshape(height, -1)
    return rows[:, : 3 * width].reshape(height, width, 3)


TASKS: Tasks = {"read": read}
