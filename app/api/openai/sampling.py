"""How many frames a video part asks for, and how large: by number, by rate, by pixels, or in the
way of other servers' clients.

Our own fields on a part are honoured or refused. Other servers' aliases are clamped to our limits,
and warnings say what was not honoured.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from app.api.openai.fields import unknown, wrong
from app.api.openai.messages import VideoPart, is_count, is_number
from app.api.post.frames_by_rate import DEFAULT_FRAMES, count_by_rate
from app.messages import ModelCard
from dycoke_core.video import Container, VideoProbe
from dycoke_core.video.sampling import frames_in_clip

ALIASES = ("fps", "num_frames", "max_pixels")


@dataclass(frozen=True, slots=True)
class Aliases:
    """What `media_io_kwargs.video` and `mm_processor_kwargs` say."""

    fps: float | None = None
    num_frames: int | None = None
    max_pixels: int | None = None  # of each frame

    def unused(self, names: Iterable[str], why: str) -> list[str]:
        """Warnings of those among `names` that were given."""
        given = ((name, getattr(self, name)) for name in names)
        return [f"{name} {value:g}: {why}" for name, value in given if value is not None]


def parse_aliases(
    media_io: dict[str, Any] | None, processor: dict[str, Any] | None
) -> tuple[Aliases, list[str]]:
    """Returns what they say, and warnings of what is not honoured."""
    said: dict[str, Any] = {}
    warnings: list[str] = []
    video = (media_io or {}).get("video") or {}
    if not isinstance(video, dict):
        raise wrong("media_io_kwargs.video", "must be an object")
    warnings += [unknown(f"media_io_kwargs.{name}") for name in media_io or {} if name != "video"]
    for where, options in (
        ("mm_processor_kwargs", processor or {}),
        ("media_io_kwargs.video", video),
    ):
        for name, value in options.items():
            at = f"{where}.{name}"
            if value is None:
                continue
            if name in ALIASES and _is_honoured(name, value):
                if said.get(name, value) != value:
                    warnings.append(f"mm_processor_kwargs.{name}: {at} is taken")
                said[name] = float(value) if name == "fps" else int(value)
            elif name == "do_sample_frames":
                if value is False:
                    warnings.append(f"{at}: frames are always sampled")
            elif name in ALIASES:
                warnings.append(f"{at}: not honoured")
            else:
                warnings.append(unknown(at))
    return Aliases(**said), warnings


def _is_honoured(name: str, value: Any) -> bool:
    return is_number(value) and value > 0 if name == "fps" else is_count(value)


def with_aliases(part: VideoPart, aliases: Aliases, max_frames: int) -> tuple[VideoPart, list[str]]:
    """The part with what only the aliases say.

    Raises:
        InvalidFieldsError: the part itself asks for more frames than are allowed.
    """
    if part.num_frames is not None and part.num_frames > max_frames:
        message = f"Input should be less than or equal to {max_frames}"
        raise wrong(f"{part.param}.num_frames", message)
    warnings: list[str] = []
    if part.fps is None and part.num_frames is None:
        num_frames = aliases.num_frames
        if num_frames is not None and num_frames > max_frames:
            warnings.append(f"num_frames {num_frames}: {max_frames} are the most")
            num_frames = max_frames
        part = replace(part, fps=aliases.fps, num_frames=num_frames)
    else:
        warnings += aliases.unused(("fps", "num_frames"), "the video's part says how many frames")
    if part.max_pixels is None:
        part = replace(part, max_pixels=aliases.max_pixels)
    else:
        warnings += aliases.unused(("max_pixels",), "the video's part says how many")
    return part, warnings


def limit_pixels(
    part: VideoPart, card: ModelCard, max_frame_pixels: int
) -> tuple[int | None, list[str]]:
    """How many pixels each frame may have, None: as many as suit the model, and warnings."""
    wanted = part.max_pixels
    if wanted is None:
        return None, []
    if card.frame_limits is None:
        return None, [f"max_pixels {wanted}: all of the model's frames have one size"]
    if wanted > max_frame_pixels:
        return max_frame_pixels, [f"max_pixels {wanted}: {max_frame_pixels} are the most"]
    return wanted, []


def count_frames(
    part: VideoPart, probe: VideoProbe, card: ModelCard, max_frames: int
) -> tuple[int, list[str]]:
    """How many frames to take, at most `max_frames`, and warnings.

    With both a rate and a number, the number is the most.
    """
    most = min(part.num_frames or max_frames, part.max_frames or max_frames, max_frames)
    if part.fps is not None:
        clip = (part.start_s, part.end_s)
        return count_by_rate(
            part.fps, probe, card, clip=clip, num_frames=part.num_frames, most=most
        )
    if probe.container == Container.FRAMES:
        return _count_listed(part, probe, most)
    return min(part.num_frames or DEFAULT_FRAMES, most), []


def _count_listed(part: VideoPart, probe: VideoProbe, most: int) -> tuple[int, list[str]]:
    """Of a list of frames: those that are there, none of them twice."""
    assert probe.num_frames and probe.duration_s and probe.fps
    times_s = [number / probe.fps for number in range(probe.num_frames)]
    given = len(frames_in_clip(times_s, probe.duration_s, part.start_s, part.end_s))
    wanted = min(part.num_frames or DEFAULT_FRAMES, most)
    if given < wanted:
        return given, [f"num_frames {wanted}: {given} frames were given, and all are used"]
    if given > wanted:
        return wanted, [f"{given} frames were given: {wanted} of them are used"]
    return given, []
