"""What the engine has to know of a sequence's pixels before its video is encoded.

This takes a pass over all of them, so it is done once per sequence, by the first caller: preferably
on another thread than the engine's.
"""

import hashlib

import numpy as np
import numpy.typing as npt

from dycoke_core.sequence import FrameContent, Sequence


def content_of(sequence: Sequence, frames_per_unit: int) -> FrameContent:
    """Of a sequence with frames: as noted on it, or found and noted there."""
    if sequence.frame_content is None:
        assert sequence.frames is not None, "there is nothing to look at"
        distinct, sources = distinct_units(sequence.frames, frames_per_unit)
        key = sequence.video_key or frames_digest(sequence.frames)
        sequence.frame_content = FrameContent(key, distinct, sources)
    return sequence.frame_content


def frames_of_unit(unit: int, frames_per_unit: int, num_frames: int) -> tuple[int, ...]:
    """Indices of a unit's frames; the last unit repeats the last frame where frames are missing."""
    first = unit * frames_per_unit
    return tuple(min(first + place, num_frames - 1) for place in range(frames_per_unit))


def distinct_units(
    frames: npt.NDArray[np.uint8], frames_per_unit: int = 1
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Units that are not byte for byte the one before, and which of them each unit repeats."""
    num_frames = len(frames)
    distinct, sources = [0], [0]
    for unit in range(1, -(-num_frames // frames_per_unit)):
        mine = frames_of_unit(unit, frames_per_unit, num_frames)
        before = frames_of_unit(unit - 1, frames_per_unit, num_frames)
        pairs = zip(mine, before, strict=True)
        if not all(np.array_equal(frames[a], frames[b]) for a, b in pairs):
            distinct.append(unit)
        sources.append(len(distinct) - 1)
    return tuple(distinct), tuple(sources)


def frames_digest(frames: npt.NDArray[np.uint8]) -> str:
    digest = hashlib.blake2b(str(frames.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(frames).data)
    return digest.hexdigest()
