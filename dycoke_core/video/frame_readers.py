"""Reads frames out of files of unknown origin: the parent's side, and all of the policy.

An upload goes sniff → plan → decord → PyAV, each step but the first in a sandboxed child of its
own, all of them together within one time limit. decord is the first reader, as in the models' own
code. PyAV reads what decord cannot, or cannot in time, and all of MPEG-TS and AVI: without an index
or presentation times decord returns other frames than those asked for, or hangs. decord takes no
list of codecs, so PyAV also reads files with a stream of any codec that is not on ours; and it
reads all frames that are resized once they are decoded, for decord's queue of whole frames takes
gigabytes.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from dycoke_core.cores import num_usable_cores
from dycoke_core.errors import InvalidRequestError, SandboxUnavailableError
from dycoke_core.model_frames import DEFAULT_RESIZING
from dycoke_core.video.containers import Container
from dycoke_core.video.fork_client import ForkServer
from dycoke_core.video.forked_child import Confinement, TaskFailure
from dycoke_core.video.frame_buffer import map_pixels, open_frame_buffer
from dycoke_core.video.landlock import landlock_abi
from dycoke_core.video.refusals import (
    DECORD_CODECS,
    KILL_REASONS,
    as_dycoke_error,
    refuse_beyond_limits,
    unreadable_frame,
)
from dycoke_core.video.replies import (
    Headers,
    MalformedReplyError,
    Plan,
    parse_bad_picture,
    parse_headers,
    parse_placement,
    parse_plan,
)
from dycoke_core.video.sandbox import SandboxState
from dycoke_core.video.types import FrameSpec, ReadLimits, VideoFrames, VideoProbe
from dycoke_core.video.video_file import VideoFile, open_video

logger = logging.getLogger(__name__)

# More gain little at the sizes of most videos, and every thread holds its own frames.
_MAX_THREADS = 8

FOR_DECORD = frozenset({Container.MP4, Container.MATROSKA})

OnProgress = Callable[[float], None]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Reading:
    """One upload that is being read."""

    video: VideoFile
    plan: Plan
    spec: FrameSpec
    shape: tuple[int, int, int, int]  # of the pixels
    pixels_fd: int
    ends_at: float  # time.monotonic
    num_threads: int
    on_progress: OnProgress

    @property
    def pixels(self) -> tuple[int, tuple[int, ...]]:
        return self.pixels_fd, self.shape


class FrameReaders:
    """Probes and reads videos, at most `max_readers` of each at a time; others wait their turn.

    Those that read share `num_cores`: each decodes with as many threads as there are cores for it
    when it starts.

    Cancelling a call kills its child at once. `kills` counts, by reason (timeout, memory, cpu,
    crash, killed), the children that did not end by themselves, `num_exceptions` those that ended
    in an error of Python. `sandbox` says what they are denied.

    Raises:
        SandboxUnavailableError: children cannot be started, or, without `allow_unsandboxed`, this
            system cannot confine them. The constructor blocks until that is known (half a second).
    """

    def __init__(
        self,
        limits: ReadLimits,
        *,
        max_readers: int,
        allow_unsandboxed: bool = False,
        num_cores: int | None = None,
    ) -> None:
        self._limits = limits
        self._num_cores = num_usable_cores() if num_cores is None else num_cores
        self._num_reading = 0
        confinement = Confinement(
            memory_bytes=limits.memory_bytes, cpu_s=limits.cpu_s, is_strict=not allow_unsandboxed
        )
        self._pyav = ForkServer("dycoke_core.video.pyav_reader", confinement)
        self._decord = ForkServer("dycoke_core.video.decord_reader", confinement)
        self._probe_places = asyncio.Semaphore(max_readers)
        self._read_places = asyncio.Semaphore(max_readers)
        self._kills: Counter[str] = Counter(dict.fromkeys(KILL_REASONS, 0))
        self._num_exceptions = 0
        try:
            self.sandbox = self._start()
            if not (self.sandbox.is_complete or allow_unsandboxed):
                raise SandboxUnavailableError(self.sandbox.describe())
        except BaseException:
            self._pyav.close()
            self._decord.close()
            raise

    @property
    def kills(self) -> Mapping[str, int]:
        return self._kills

    @property
    def num_exceptions(self) -> int:
        return self._num_exceptions

    async def probe(self, path: Path) -> VideoProbe:
        """Reads the headers of a video and refuses what they already show to be unreadable.

        Raises:
            VideoError: not a video we take, or none at all.
            ReadersUnavailableError
        """
        async with self._probe_places, open_video(path) as video:
            timeout_s = min(self._limits.probe_timeout_s, self._limits.timeout_s)
            try:
                headers = await self._run(
                    self._pyav,
                    "probe",
                    video,
                    {},
                    lambda reply: _parse_probe(reply, video.container),
                    timeout_s=timeout_s,
                )
            except TaskFailure as failure:
                raise as_dycoke_error(failure, self._limits, timeout_s) from failure
            refuse_beyond_limits(headers, self._limits)
            return headers.probe

    async def read(
        self,
        path: Path,
        spec: FrameSpec,
        *,
        on_progress: OnProgress | None = None,
        timeout_s: float | None = None,
    ) -> VideoFrames:
        """Reads the frames that `spec` asks for.

        Args:
            on_progress: called with a rising share, 0 to 1, on the event loop.
            timeout_s: for all attempts together, if less than the limits'; counted from the
                moment a reader is free.

        Raises:
            VideoError: the video is refused or cannot be read within the limits.
            InvalidRequestError: the clip starts beyond the video's end.
            ReadersUnavailableError
        """
        limit_s = self._limits.timeout_s
        budget_s = limit_s if timeout_s is None else min(limit_s, timeout_s)
        progress = _Rising(on_progress)
        async with self._read_places, open_video(path) as video:
            ends_at = time.monotonic() + budget_s
            try:
                plan = await self._plan(video, spec, budget_s)
                shape = spec.shape(*plan.upright_size)
                with open_frame_buffer(shape) as fd, self.decoding_threads() as num_threads:
                    return await self._read(
                        _Reading(video, plan, spec, shape, fd, ends_at, num_threads, progress)
                    )
            except TaskFailure as failure:
                raise as_dycoke_error(failure, self._limits, budget_s) from failure

    async def aclose(self) -> None:
        """Ends all readers. Calls that are still under way fail."""
        await asyncio.gather(self._pyav.aclose(), self._decord.aclose())

    @contextmanager
    def decoding_threads(self) -> Iterator[int]:
        """How many threads may decode, with an equal share of the cores for every reading."""
        self._num_reading += 1
        try:
            yield max(1, min(_MAX_THREADS, self._num_cores // self._num_reading))
        finally:
            self._num_reading -= 1

    def _start(self) -> SandboxState:
        servers = (self._pyav, self._decord)
        for server in servers:
            server.start()
        observed = [server.observe_refusals() for server in servers]
        refusals = {name: all(each[name] for each in observed) for name in observed[0]}
        return SandboxState(landlock_abi=landlock_abi(), **refusals)

    async def _plan(self, video: VideoFile, spec: FrameSpec, timeout_s: float) -> Plan:
        plan = await self._run(
            self._pyav,
            "plan",
            video,
            {
                "num_frames": spec.num_frames,
                "start_s": spec.start_s,
                "end_s": spec.end_s,
                "sampling": spec.sampling,
                "spread": spec.spread,
                "keeps_shape": spec.keeps_shape,
            },
            lambda reply: parse_plan(
                reply, video.container, spec.num_frames, keeps_shape=spec.keeps_shape
            ),
            timeout_s=timeout_s,
        )
        refuse_beyond_limits(plan.headers, self._limits)
        if not plan.indices:
            raise InvalidRequestError(f"start_s is beyond the video's end at {plan.end_s:.2f} s")
        return plan

    async def _read(self, reading: _Reading) -> VideoFrames:
        warnings = reading.plan.warnings(reading.spec)
        if reading.plan.key_pts:
            with suppress(_OtherwiseReadableError):
                return await self._read_keyframes(reading, warnings)
        if _is_for_decord(reading):
            try:
                return await self._read_with_decord(reading, warnings)
            except TaskFailure as failure:
                warnings.append(f"decord could not read this video ({failure.code}); PyAV did")
                frames = await self._read_with_pyav(reading, warnings)
                return replace(frames, fallback_cause=failure.code)
        return await self._read_with_pyav(reading, warnings)

    async def _read_keyframes(self, reading: _Reading, warnings: list[str]) -> VideoFrames:
        """Raises: _OtherwiseReadableError."""
        plan = reading.plan
        try:
            await self._run(
                self._pyav,
                "read_keyframes",
                reading.video,
                {"key_pts": plan.key_pts, "resizing": reading.spec.resizing},
                lambda reply: None,
                timeout_s=reading.ends_at - time.monotonic(),
                pixels=reading.pixels,
                on_progress=reading.on_progress,
            )
        except TaskFailure as failure:
            if failure.code == "unreadable":  # where decoding can start, it seems, it cannot
                raise _OtherwiseReadableError from failure
            raise
        pixels = map_pixels(*reading.pixels)
        return VideoFrames(
            pixels,
            plan.indices,
            plan.timestamps_s,
            "pyav",
            tuple(warnings),
            shown_s=plan.shown_s or None,
        )

    async def _read_with_decord(self, reading: _Reading, warnings: list[str]) -> VideoFrames:
        plan = reading.plan
        left_s = reading.ends_at - time.monotonic()
        await self._run(
            self._decord,
            "read",
            reading.video,
            {"indices": plan.indices, "total_frames": plan.total_frames},
            lambda reply: None,
            timeout_s=left_s * self._limits.decord_share,
            num_threads=reading.num_threads,
            pixels=reading.pixels,
            on_progress=reading.on_progress,
        )
        pixels = map_pixels(*reading.pixels)
        return VideoFrames(
            pixels,
            plan.indices,
            plan.timestamps_s,
            "decord",
            tuple(warnings),
            shown_s=plan.shown_s or None,
        )

    async def _read_with_pyav(self, reading: _Reading, warnings: list[str]) -> VideoFrames:
        plan = reading.plan
        placed = await self._run(
            self._pyav,
            "read",
            reading.video,
            {"indices": plan.indices, "resizing": reading.spec.resizing},
            lambda reply: parse_placement(reply, plan),
            timeout_s=reading.ends_at - time.monotonic(),
            num_threads=reading.num_threads,
            pixels=reading.pixels,
            on_progress=reading.on_progress,
        )
        pixels = map_pixels(*reading.pixels)
        warnings = warnings + placed.warnings(plan)
        return VideoFrames(
            pixels,
            placed.indices,
            placed.timestamps_s,
            "pyav",
            tuple(warnings),
            shown_s=plan.shown_s or None,
        )

    async def _run(
        self,
        server: ForkServer,
        name: str,
        video: VideoFile,
        params: Mapping[str, Any],
        parse: Callable[[Any], T],
        *,
        timeout_s: float,
        num_threads: int = 1,
        pixels: tuple[int, tuple[int, ...]] | None = None,
        on_progress: OnProgress = lambda share: None,
    ) -> T:
        """Runs one task and checks its result; counts the child if it was lost."""
        common = {
            "demuxer": video.container.demuxer,
            "max_pixels": self._limits.max_pixels,
            "max_source_frames": self._limits.max_source_frames,
        }
        try:
            is_list = video.container is Container.FRAMES
            reply = await server.run(
                f"{name}_pictures" if is_list else name,
                {**common, **params},
                video.fd,
                timeout_s=timeout_s,
                num_threads=num_threads,
                pixels=pixels,
                on_progress=on_progress,
            )
            return parse(reply)
        except MalformedReplyError as error:
            failure = TaskFailure("exception", f"malformed reply: {error}")
        except TaskFailure as error:
            failure = error
        if failure.code in KILL_REASONS:
            self._kills[failure.code] += 1
            logger.warning("a frame reader was lost: %s (%s)", failure.code, failure.detail)
        elif failure.code == "exception":
            self._num_exceptions += 1
            logger.warning("a frame reader failed: %s", failure.detail)
        else:
            logger.debug("a video was not read: %s (%s)", failure.code, failure.detail)
        raise failure


def _parse_probe(reply: Any, container: Container) -> Headers:
    """Raises: MalformedReplyError, UnreadableFrameError."""
    number = parse_bad_picture(reply) if container is Container.FRAMES else None
    if number is not None:
        raise unreadable_frame(number)
    return parse_headers(reply, container)


def _is_for_decord(reading: _Reading) -> bool:
    plan = reading.plan
    has_only_known_codecs = plan.headers.codecs <= DECORD_CODECS
    return (
        reading.spec.resizing == DEFAULT_RESIZING
        and reading.video.container in FOR_DECORD
        and plan.has_times
        and has_only_known_codecs
    )


class _OtherwiseReadableError(Exception):
    """The quick way does not work with this video; the others may."""


class _Rising:
    """Passes on shares that are new highs: the second reader starts from the beginning."""

    def __init__(self, listener: OnProgress | None) -> None:
        self._listener = listener
        self._highest = 0.0

    def __call__(self, share: float) -> None:
        if self._listener is not None and share > self._highest:
            self._highest = share
            self._listener(share)
