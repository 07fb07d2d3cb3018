"""How many frames `fps` takes from a clip: counted as the model's own processor does, within this
server's limits.
"""

import math

from app.messages import ModelCard
from dycoke_core.video import VideoProbe

DEFAULT_FRAMES = 32
_ROUNDING = 1e-6  # in frames: 10 s at 2 fps are 20 frames, whatever the container's clock says


def count_by_rate(
    asked_fps: float,
    probe: VideoProbe,
    card: ModelCard,
    *,
    clip: tuple[float | None, float | None],
    num_frames: int | None,
    most: int,
) -> tuple[int, list[str]]:
    """How many frames to take, at most `most`, and warnings.

    Args:
        clip: start and end in seconds, if given.
        num_frames: the number taken if the video does not say how long it is.
    """
    if probe.duration_s is None:
        warning = f"fps {asked_fps:g}: the container does not say how long the video is"
        return min(num_frames or DEFAULT_FRAMES, most), [warning]
    warnings = []
    if probe.fps is not None and asked_fps > probe.fps:
        warnings.append(f"fps {asked_fps:g}: the video has {probe.fps:g}")
    if card.frame_rate is None:
        fps = min(asked_fps, probe.fps or asked_fps)
        whole = max(1, math.floor(_length_s(probe.duration_s, clip) * fps + _ROUNDING))
        taken = min(whole, most)
    else:
        rule = card.frame_rate.rule()
        wanted, given = _wanted(asked_fps, probe, probe.duration_s, clip)
        whole = rule.count(wanted, given=given, most=max(given, most))
        taken = rule.count(wanted, given=given, most=most)
    if whole > most:
        warnings.append(f"fps {asked_fps:g}: {whole} frames wanted, {most} are the most")
    return taken, warnings


def _length_s(duration_s: float, clip: tuple[float | None, float | None]) -> float:
    start_s, end_s = clip
    return max(min(end_s or duration_s, duration_s) - (start_s or 0.0), 0.0)


def _wanted(
    fps: float, probe: VideoProbe, duration_s: float, clip: tuple[float | None, float | None]
) -> tuple[float, float]:
    """What a model's rule takes: the clip's length times the rate, which may be above the video's
    own, and the frames that the clip has, as far as the headers say; infinite where they do not."""
    clip_s = _length_s(duration_s, clip)
    if not probe.fps:
        return clip_s * fps + _ROUNDING, math.inf
    given = max(round(clip_s * probe.fps), 1)
    if clip_s != duration_s:
        return clip_s * fps + _ROUNDING, given
    # As the processors count, but without frames that an MP4 hides although its headers count them.
    if probe.num_frames and abs(probe.num_frames / probe.fps - duration_s) < 1 / probe.fps:
        given = probe.num_frames
    return given / probe.fps * fps, given
