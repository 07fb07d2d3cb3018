"""Damaged files of every container, end to end: each is read, or refused for a reason.

No reader may end in an exception, whatever is in the file: that would be a bug. Seeded, so that a
mutant which finds one can be found again by its name.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from dycoke_core.errors import DycokeError, VideoError
from dycoke_core.video import FrameReaders, FrameSpec, ReadLimits
from tests.video_clips import make_clip

pytestmark = pytest.mark.asyncio(loop_scope="module")

NUM_MUTANTS = 10  # of each clip
SMALL: dict[str, Any] = {"width": 96, "height": 64, "num_frames": 12}
CLIPS: dict[str, dict[str, Any]] = {
    "h264.mp4": {"sound": "aac"},
    "hevc.mov": {"codec": "libx265"},
    "fragments.mp4": {
        "options": {"g": "4"},
        "container_options": {"movflags": "frag_keyframe+empty_moov"},
    },
    "h264.mkv": {"options": {"g": "4"}, "sound": "aac"},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "av1.mkv": {"codec": "libsvtav1"},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"bf": "2"}},
    "mjpeg.avi": {"codec": "mjpeg"},
    "h264.ts": {"options": {"g": "4"}},
    "mpeg2.ts": {"codec": "mpeg2video", "options": {"bf": "2"}},
}
Random = np.random.Generator


def flip_bytes(content: bytearray, random: Random) -> None:
    for at in random.integers(4, len(content), random.integers(1, 30)):
        content[at] = random.integers(0, 256)


def flip_headers(content: bytearray, random: Random) -> None:
    """Where most containers describe what is in them: at the start, and MP4 at the end."""
    for at in random.integers(4, min(1500, len(content)), random.integers(1, 12)):
        content[at if random.integers(2) else -at] = random.integers(0, 256)


def set_to_extremes(content: bytearray, random: Random) -> None:
    for at in random.integers(8, len(content) - 8, random.integers(1, 6)):
        content[at : at + 4] = random.choice([b"\x00" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff"])


def cut_off(content: bytearray, random: Random) -> None:
    del content[int(random.integers(64, len(content))) :]


def leave_out(content: bytearray, random: Random) -> None:
    at = int(random.integers(16, len(content) - 16))
    del content[at : at + int(random.integers(1, 400))]


def repeat_a_piece(content: bytearray, random: Random) -> None:
    at, to = (int(place) for place in random.integers(16, len(content) - 16, 2))
    content[to:to] = content[at : at + int(random.integers(1, 400))]


MUTATIONS: tuple[Callable[[bytearray, Random], None], ...] = (
    *(flip_bytes, flip_headers, flip_headers, set_to_extremes),
    *(cut_off, leave_out, repeat_a_piece),
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def readers() -> AsyncIterator[FrameReaders]:
    limits = ReadLimits(timeout_s=20.0, cpu_s=5)
    readers = FrameReaders(limits, max_readers=2, num_cores=2)
    yield readers
    await readers.aclose()


@pytest.mark.parametrize("name", CLIPS)
async def test_no_damaged_file_makes_a_reader_fail(
    readers: FrameReaders, tmp_path: Path, name: str
) -> None:
    whole = make_clip(tmp_path / name, **(SMALL | CLIPS[name])).read_bytes()

    async def read(number: int) -> str:
        random = np.random.default_rng([number, *name.encode()])
        content = bytearray(whole)
        if number:  # the first one is whole, and must be read
            MUTATIONS[number % len(MUTATIONS)](content, random)
        path = tmp_path / f"{number}-{name}"
        path.write_bytes(content)
        sampling = "keyframe" if number % 4 == 3 else "uniform"
        try:
            await readers.probe(path)
            frames = await readers.read(path, FrameSpec(4, 32, sampling=sampling))
        except VideoError as error:
            return error.code
        except DycokeError as error:
            return f"{number}: {error.code}"
        assert frames.pixels.shape == (4, 32, 32, 3)
        return "read"

    outcomes = await asyncio.gather(*(read(number) for number in range(NUM_MUTANTS + 1)))
    assert outcomes[0] == "read"
    assert set(outcomes) <= {
        *("read", "unreadable_video", "no_video_stream", "unsupported_container"),
        *("unsupported_codec", "video_limit_exceeded", "video_read_timeout", "video_reader_killed"),
    }
    assert readers.num_exceptions == 0
