"""Chooses the frames that represent a video. Pure; frames are counted in display order."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import numpy as np

from dycoke_core.model_frames import DEFAULT_SPREAD, Spread

_ROUNDED_TICKS = 2  # by which rounded times may be off: one at either end


def frames_in_clip(
    timestamps_s: Sequence[float], end_of_video_s: float, start_s: float | None, end_s: float | None
) -> range:
    """The frames of a clip: from the one on screen at `start_s` to the last before `end_s`.

    Args:
        timestamps_s: when each frame appears, ascending; not empty.
        end_of_video_s: when the last frame disappears.

    Returns:
        A range of indices; empty only if `start_s` is at or beyond the end of the video.
    """
    if start_s is not None and start_s >= end_of_video_s:
        return range(0)
    first = 0 if start_s is None else max(0, bisect_right(timestamps_s, start_s) - 1)
    stop = len(timestamps_s) if end_s is None else bisect_left(timestamps_s, end_s)
    return range(first, max(stop, first + 1))


def shown_s(
    timestamps_s: Sequence[float],
    end_of_video_s: float,
    clip: range,
    *,
    fps: float | None = None,
    tick_s: float = 0.0,
) -> float:
    """For how long a clip's frames are shown: from its first one's time to where its last ends.

    Args:
        fps: that the headers name. Frames divided by it, as models' processors have it, where the
            times say the same but for their rounding.
        tick_s: to which the container rounds times.
    """
    if not clip:
        return 0.0
    end_s = timestamps_s[clip.stop] if clip.stop < len(timestamps_s) else end_of_video_s
    by_times = max(end_s - timestamps_s[clip.start], 0.0)
    if fps and abs(len(clip) / fps - by_times) <= _ROUNDED_TICKS * tick_s:
        return len(clip) / fps
    return by_times


def sample_indices(
    frames: Sequence[int], num_frames: int, spread: Spread = DEFAULT_SPREAD
) -> tuple[int, ...]:
    """Chooses `num_frames` of `frames`, spread evenly; repeats some if there are fewer.

    Source: LLaVA-OneVision, `np.linspace(0, total - 1, num_frames, dtype=int)`, which rounds down;
        `sample_frames` of Qwen2-VL's and of Qwen3-VL's video processor in transformers.
    Deviation: those round `num_frames` to whole units, or refuse more than there are.
    """
    total = len(frames)
    if spread == "starts":
        return tuple(frames[number * total // num_frames] for number in range(num_frames))
    offsets = np.linspace(0, total - 1, num_frames)
    if spread == "nearest":
        offsets = offsets.round()
    return tuple(frames[int(offset)] for offset in offsets)
