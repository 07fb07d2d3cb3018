"""decord in the child: the first reader. Imported by children only.

Frames are scaled while they are decoded: with whole frames decord's queue takes gigabytes within
seconds. It applies rotation metadata on its own.
"""

from typing import Any

import decord

from dycoke_core.video.child import Task, TaskError, Tasks

# decord puts a neighbour in the place of a frame that it cannot find, and says so to nobody unless
# more than this share of the video was replaced. One is too many: PyAV may find it.
_MAX_SUBSTITUTED_SHARE = 1e-9


def read(task: Task) -> dict[str, Any]:
    """Decodes the frames `indices`, ascending, of `total_frames` into the pixels."""
    assert task.pixels is not None
    image_size = task.pixels.shape[1]
    try:
        video = decord.VideoReader(
            task.video_path,
            ctx=decord.cpu(0),
            width=image_size,
            height=image_size,
            num_threads=1,
            fault_tol=_MAX_SUBSTITUTED_SHARE,
        )
        if len(video) != task.params["total_frames"]:
            raise TaskError("unreadable", "decord counts other frames than there are")
        _read(video, task)
    except (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError) as error:
        raise TaskError("unreadable", str(error)) from error
    return {}


def _read(video: decord.VideoReader, task: Task) -> None:
    assert task.pixels is not None
    indices = task.params["indices"]
    for row, index in enumerate(indices):
        if row and indices[row - 1] == index:
            task.pixels[row] = task.pixels[row - 1]
        else:
            task.pixels[row] = video[index].asnumpy()
        task.report_progress((row + 1) / len(indices))


TASKS: Tasks = {"read": read}
