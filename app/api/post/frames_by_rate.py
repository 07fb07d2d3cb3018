"""How many frames `fps` makes of a clip: as the model's own processor counts them, within this
server's limits."""

import math

from app.messages import ModelCard
from dycoke_core.video import VideoProbe

DEFAULT_FRAMES = 32
_ROUNDING = 1e-6  # of a frame: 10 s at 2 fps are 20 frames, whatever the container's clock


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
        clip: start and end in seconds, where they are given.
        num_frames: what is taken where the video does not say how long it is.
    """
    if probe.duration_s is None:
        warning = f"fps {asked_fps:g}: the container does not say how long the video is"
        return min(num_frames or DEFAULT_FRAMES, most), [warning]
    fps, warnings = asked_fps, []
    if probe.fps is not None and fps > probe.fps:
        fps = probe.fps
        warnings.append(f"fps {asked_fps:g}: the video has {fps:g}")
    wanted, given = _wanted(fps, probe, clip)
    if card.frame_rate is None:
        whole = max(1, math.floor(wanted + _ROUNDING))
        taken = min(whole, most)
    else:
        rule = card.frame_rate.rule()
        whole = rule.count(wanted, given=given, most=max(given, most))
        taken = rule.count(wanted, given=given, most=most)
    if whole > most:
        warnings.append(f"fps {asked_fps:g}: {whole} frames wanted, {most} are the most")
    return taken, warnings


def _wanted(
    fps: float, probe: VideoProbe, clip: tuple[float | None, float | None]
) -> tuple[float, int]:
    """The clip's length times the rate; the frames that it has, as far as the headers say."""
    assert probe.duration_s is not None
    start_s, end_s = clip
    if clip == (None, None) and probe.num_frames and probe.fps:  # as the processors count
        return probe.num_frames / probe.fps * fps, probe.num_frames
    clip_s = max(min(end_s or probe.duration_s, probe.duration_s) - (start_s or 0.0), 0.0)
    given = round(clip_s * probe.fps) if probe.fps else math.ceil(clip_s * fps)
    return clip_s * fps + _ROUNDING, max(given, 1)
