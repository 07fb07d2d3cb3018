"""Checks what children send, which is untrusted: types, ranges, counts; and what a receipt warns of
where it shows a video that is not as it should be.

Knows no limits and no codecs; those are `refusals`'.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from dycoke_core.video.containers import Container
from dycoke_core.video.frame_list import MAX_PICTURES
from dycoke_core.video.types import FrameSpec, VideoProbe

_CODEC_NAME = re.compile(r"[a-z0-9_.-]{1,32}")
_MAX_INT = 2**53
_MAX_PTS = 2**62  # in ticks of any length, from any start

# How much sooner than the headers say frames may end without a warning: sound often lasts longer.
_TOLERATED_GAP_S = 1.0
_TOLERATED_GAP_SHARE = 0.05


class MalformedReplyError(Exception):
    """No honest child sends this."""


@dataclass(frozen=True, slots=True)
class Headers:
    probe: VideoProbe
    extradata_bytes: int
    codecs: frozenset[str]  # of all streams that can be decoded, sound and subtitles too


@dataclass(frozen=True, slots=True)
class Plan:
    """Which frames to read. `indices` are empty for a clip that starts beyond `end_s`."""

    headers: Headers
    total_frames: int
    has_times: bool  # by which a reader can tell frames apart
    end_s: float
    shown_s: float  # for how long the clip's frames are, all of them
    indices: tuple[int, ...]
    timestamps_s: tuple[float, ...]
    num_keyframes: int  # of the clip, where it was sampled by keyframe
    key_pts: tuple[int, ...]  # the file's own times of the indices; empty if not so sampled
    upright_size: tuple[int, int]  # height, width as shown; as stored if not asked for

    def warnings(self, spec: FrameSpec) -> list[str]:
        """What the list of frames shows, before any is decoded."""
        warnings = []
        duration_s = self.headers.probe.duration_s or 0.0
        if duration_s - self.end_s > max(_TOLERATED_GAP_S, _TOLERATED_GAP_SHARE * duration_s):
            warnings.append(f"the frames end at {self.end_s:.2f} s, the file at {duration_s:.2f} s")
        if spec.sampling == "keyframe" and not self.num_keyframes:
            warnings.append("no keyframes are known of the clip; all its frames were sampled")
        elif spec.sampling == "keyframe" and self.num_keyframes < spec.num_frames:
            warnings.append(f"the clip has {self.num_keyframes} keyframes, which are repeated")
        return warnings


@dataclass(frozen=True, slots=True)
class Placement:
    """Which frames were read."""

    indices: tuple[int, ...]
    timestamps_s: tuple[float, ...]
    num_damaged: int

    def warnings(self, plan: Plan) -> list[str]:
        num_frames = len(plan.indices)
        num_moved = sum(a != b for a, b in zip(plan.indices, self.indices, strict=True))
        warnings = []
        if num_moved:
            warnings.append(
                f"{num_moved} of {num_frames} frames do not decode; neighbours stand in"
            )
        if self.num_damaged:
            warnings.append(f"{self.num_damaged} of {num_frames} frames are damaged")
        return warnings


def parse_bad_picture(reply: Any) -> int | None:
    """The number of the first picture of a list that does not decode; None where all do."""
    if not isinstance(reply, dict) or "bad_picture" not in reply:
        return None
    number = _int(reply, "bad_picture")
    if number >= MAX_PICTURES:
        raise MalformedReplyError("bad_picture")
    return number


def parse_headers(reply: Any, container: Container) -> Headers:
    reply = _object(reply)
    codec = _codec(reply.get("codec"))
    codecs = reply.get("codecs")
    if not isinstance(codecs, list):
        raise MalformedReplyError("codecs")
    probe = VideoProbe(
        container=container.value,
        codec=codec,
        width=_int(reply, "width"),
        height=_int(reply, "height"),
        duration_s=_seconds(reply.get("duration_s")) or None,
        num_frames=_int(reply, "num_frames") or None,
        fps=_seconds(reply.get("fps")) or None,
    )
    return Headers(
        probe, _int(reply, "extradata_bytes"), frozenset(_codec(each) for each in codecs)
    )


def parse_plan(
    reply: Any, container: Container, num_frames: int, *, keeps_shape: bool = False
) -> Plan:
    reply = _object(reply)
    upright_size = _size(reply.get("upright_size"))
    if keeps_shape and not all(upright_size):
        raise MalformedReplyError("size")
    total_frames = _int(reply, "total_frames")
    num_indices = num_frames if reply.get("indices") else 0
    return Plan(
        headers=parse_headers(reply.get("headers"), container),
        total_frames=total_frames,
        has_times=reply.get("has_times") is True,
        end_s=_seconds(reply.get("end_s")),
        shown_s=_seconds(reply.get("shown_s")),
        indices=_indices(reply, num_indices, total_frames),
        timestamps_s=_timestamps(reply, num_indices),
        num_keyframes=_int(reply, "num_keyframes"),
        key_pts=_key_pts(reply, num_indices),
        upright_size=upright_size,
    )


def parse_placement(reply: Any, plan: Plan) -> Placement:
    reply = _object(reply)
    num_frames = len(plan.indices)
    return Placement(
        indices=_indices(reply, num_frames, plan.total_frames),
        timestamps_s=_timestamps(reply, num_frames),
        num_damaged=_int(reply, "num_damaged"),
    )


def _codec(value: Any) -> str:
    if not isinstance(value, str) or not _CODEC_NAME.fullmatch(value):
        raise MalformedReplyError("codec")
    return value


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise MalformedReplyError("object")
    return value


def _int(reply: dict[str, Any], name: str) -> int:
    value = reply.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MAX_INT:
        raise MalformedReplyError(name)
    return value


def _seconds(value: Any) -> float:
    # The range also keeps out NaN and integers that no float holds.
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= _MAX_INT:
        raise MalformedReplyError("seconds")
    return float(value)


def _size(value: Any) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2:
        raise MalformedReplyError("size")
    for side in value:
        if not isinstance(side, int) or isinstance(side, bool) or not 0 <= side <= _MAX_INT:
            raise MalformedReplyError("size")
    return value[0], value[1]


def _list(reply: dict[str, Any], name: str, length: int) -> Sequence[Any]:
    value = reply.get(name)
    if not isinstance(value, list) or len(value) != length:
        raise MalformedReplyError(name)
    return value


def _indices(reply: dict[str, Any], length: int, total: int) -> tuple[int, ...]:
    values = _list(reply, "indices", length)
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < total:
            raise MalformedReplyError("indices")
    if any(later < earlier for earlier, later in pairwise(values)):
        raise MalformedReplyError("indices")
    return tuple(values)


def _key_pts(reply: dict[str, Any], length: int) -> tuple[int, ...]:
    values = _list(reply, "key_pts", length if reply.get("key_pts") else 0)
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or abs(value) > _MAX_PTS:
            raise MalformedReplyError("key_pts")
    return tuple(values)


def _timestamps(reply: dict[str, Any], length: int) -> tuple[float, ...]:
    return tuple(_seconds(value) for value in _list(reply, "timestamps_s", length))
