"""One more try, alone, for a video whose reader was killed."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from app.api.post.reader_slots import ReaderSlots
from app.api.post.second_try import SecondTryReaders, fell_back_after_kill
from app.process_table import ProcessTable
from dycoke_core.errors import (
    ReadersUnavailableError,
    UnreadableVideoError,
    VideoError,
    VideoReaderKilledError,
)
from dycoke_core.video import FrameReaders, FrameSpec, VideoFrames
from dycoke_core.video.types import FailureCode, ReaderName

OWNER = "owner"
SPEC = FrameSpec(num_frames=1, image_size=8)


def frames(fallback_cause: FailureCode | None = None) -> VideoFrames:
    reader: ReaderName = "decord" if fallback_cause is None else "pyav"
    pixels = np.zeros(SPEC.shape(8, 8), np.uint8)
    return VideoFrames(pixels, (0,), (0.0,), reader, (), fallback_cause=fallback_cause)


class Readers:
    """Reads with a video's listed outcomes, one after another."""

    def __init__(self) -> None:
        self.outcomes: dict[str, list[VideoFrames | VideoError]] = {}
        self.inside: list[str] = []
        self.beside: list[tuple[str, ...]] = []  # who was read when a read began
        self.timeouts_s: list[float] = []
        self.may_end: dict[str, asyncio.Event] = {}  # of those that wait for it

    async def read(
        self,
        path: Path,
        spec: FrameSpec,
        *,
        on_progress: Callable[[float], None] | None,
        timeout_s: float,
    ) -> VideoFrames:
        self.inside.append(path.name)
        self.beside.append(tuple(self.inside))
        self.timeouts_s.append(timeout_s)
        await asyncio.sleep(0.02)
        if path.name in self.may_end:
            await self.may_end[path.name].wait()
        self.inside.remove(path.name)
        outcome = self.outcomes[path.name].pop(0)
        if isinstance(outcome, VideoError):
            raise outcome
        return outcome


@pytest.fixture
def inner() -> Readers:
    return Readers()


@pytest.fixture
def readers(inner: Readers, process_table: ProcessTable) -> SecondTryReaders:
    slots = ReaderSlots(process_table.take_row(0), 2)
    return SecondTryReaders(cast(FrameReaders, inner), slots)


async def test_killed_reader_gets_one_more_try_alone(
    inner: Readers, readers: SecondTryReaders
) -> None:
    killed = VideoReaderKilledError("killed")
    inner.outcomes = {"a": [killed, frames()], "b": [frames()], "c": [frames()]}
    reads = [
        asyncio.create_task(readers.read(Path(name), SPEC, owner=OWNER, timeout_s=30))
        for name in "ab"
    ]
    await asyncio.sleep(0.03)
    reads.append(asyncio.create_task(readers.read(Path("c"), SPEC, owner=OWNER, timeout_s=30)))
    assert [(await read).reader for read in reads] == ["decord"] * 3
    assert inner.beside[:3] == [("a",), ("a", "b"), ("a",)]
    assert inner.timeouts_s[2] < 30


async def test_video_that_kills_twice_is_to_blame(
    inner: Readers, readers: SecondTryReaders
) -> None:
    inner.outcomes = {"a": [VideoReaderKilledError("1"), VideoReaderKilledError("2")]}
    with pytest.raises(VideoReaderKilledError, match="2"):
        await readers.read(Path("a"), SPEC, owner=OWNER, timeout_s=30)


async def test_used_up_cpu_time_is_not_spent_twice(
    inner: Readers, readers: SecondTryReaders
) -> None:
    inner.outcomes = {"a": [VideoReaderKilledError("1", "cpu")]}
    with pytest.raises(VideoReaderKilledError, match="1"):
        await readers.read(Path("a"), SPEC, owner=OWNER, timeout_s=30)
    assert len(inner.beside) == 1


@pytest.mark.parametrize("cause", ["memory", "crash"])
async def test_own_limits_and_crashes_hold_nobody_up(
    inner: Readers, readers: SecondTryReaders, cause: str
) -> None:
    """The second try begins while another read is under way and outlasts it."""
    lost = VideoReaderKilledError("1", cause)
    inner.outcomes = {"a": [lost, frames()], "b": [frames()]}
    inner.may_end["b"] = asyncio.Event()
    other = asyncio.create_task(readers.read(Path("b"), SPEC, owner="other", timeout_s=30))
    async with asyncio.timeout(20):
        read = await readers.read(Path("a"), SPEC, owner=OWNER, timeout_s=30)
    assert read.reader == "decord"
    inner.may_end["b"].set()
    await other


async def test_one_video_of_a_key_is_tried_alone_at_a_time(
    inner: Readers, readers: SecondTryReaders
) -> None:
    """What killed another video's reader twice meanwhile is unknown, so it may be sent again."""
    killed = VideoReaderKilledError("killed")
    inner.outcomes = {"a": [killed, killed], "b": [killed, killed]}
    reads = [readers.read(Path(name), SPEC, owner=OWNER, timeout_s=30) for name in "ab"]
    ends = await asyncio.gather(*reads, return_exceptions=True)
    assert {type(end) for end in ends} == {ReadersUnavailableError, VideoReaderKilledError}


async def test_other_errors_are_final(inner: Readers, readers: SecondTryReaders) -> None:
    inner.outcomes = {"a": [UnreadableVideoError("x")]}
    with pytest.raises(UnreadableVideoError):
        await readers.read(Path("a"), SPEC, owner=OWNER, timeout_s=30)


async def test_fallback_after_a_kill_is_tried_again(
    inner: Readers, readers: SecondTryReaders
) -> None:
    inner.outcomes = {"a": [frames("killed"), frames()], "b": [frames("killed"), frames("killed")]}
    assert (await readers.read(Path("a"), SPEC, owner=OWNER, timeout_s=30)).reader == "decord"
    assert fell_back_after_kill(await readers.read(Path("b"), SPEC, owner=OWNER, timeout_s=30))


async def test_fallback_for_want_of_time_is_not(inner: Readers, readers: SecondTryReaders) -> None:
    inner.outcomes = {"a": [frames("timeout")]}
    assert not fell_back_after_kill(await readers.read(Path("a"), SPEC, owner=OWNER, timeout_s=30))


async def test_crash_that_comes_twice_is_the_videos(
    inner: Readers, readers: SecondTryReaders
) -> None:
    crashed = frames("crash")
    inner.outcomes = {"a": [crashed, crashed], "b": [crashed, frames()]}
    assert not fell_back_after_kill(await readers.read(Path("a"), SPEC, owner=OWNER, timeout_s=30))
    assert (await readers.read(Path("b"), SPEC, owner=OWNER, timeout_s=30)).reader == "decord"


async def test_second_try_that_fails_takes_nothing_away(
    inner: Readers, readers: SecondTryReaders
) -> None:
    """decord crashes each time, and the second reader is killed from outside."""
    crashed = frames("crash")
    inner.outcomes = {"a": [crashed, VideoReaderKilledError("killed")]}
    read = await readers.read(Path("a"), SPEC, owner=OWNER, timeout_s=30)
    assert read.pixels is crashed.pixels
    assert fell_back_after_kill(read), "it is unknown whether the crash comes twice"


async def test_cancelled_second_try_lets_the_others_in(
    inner: Readers, readers: SecondTryReaders
) -> None:
    killed = VideoReaderKilledError("killed")
    inner.outcomes = {"a": [killed, frames()], "b": [frames()]}
    first = asyncio.create_task(readers.read(Path("a"), SPEC, owner=OWNER, timeout_s=30))
    await asyncio.sleep(0.03)
    second = asyncio.create_task(readers.read(Path("b"), SPEC, owner=OWNER, timeout_s=30))
    await asyncio.sleep(0)
    first.cancel()
    async with asyncio.timeout(5):
        assert (await second).reader == "decord"
