"""The life of a job, as the API and its clients see it: admission, queueing, cancel, deadlines.

    reserve ── create ──> reading ── enqueue ──> queued ── (a worker takes it) ──> running
                             │                      │                                 │
                             └──────────────────────┴─────────────────────────────────┴──> done,
                                                                             error or cancelled

Each transition is one Lua script that refuses what the diagram does not show, so any number of APIs
and workers may call them at once, and each may be sent twice. `app.store.job_leases` has what
workers do to a job, and `lua/order.lua` decides whose turn it is. `reserve` bounds the queue, as
`lua/places.lua` says; `sweep` ends a job that nothing else ends.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from redis.asyncio import Redis

from app.errors import (
    DeadlineExceededError,
    DeadlineUnreachableError,
    FrameStoreFullError,
    IdempotencyConflictError,
    JobNotFoundError,
    QueueFullError,
    ReaderLostError,
    StoreUnavailableError,
)
from app.keys.entries import ANONYMOUS
from app.keys.limits import NO_LIMITS, KeyLimits, LimitState
from app.messages import ErrorEvent, JobEvent, JobRequest, JobState, ModelCard, StatusEvent
from app.store.client import Scripts, milliseconds, seconds, store_call
from app.store.event_log import OPENING_EVENT, LoggedEvent
from app.store.keys import RedisKeys
from app.store.owner_limits import Allowance, parse_limit_states, refuse_over_limits
from dycoke_core.errors import DycokeError

MAX_RETRY_AFTER_S = 60
MAX_ADOPTIONS = 3  # for a job whose frames are being read
MAX_SWEPT_JOBS = 100  # at a time; the rest comes with the next sweep


@dataclass(frozen=True, slots=True)
class Idempotency:
    """A client's key, and a fingerprint of the request that it came with."""

    key_hash: str
    fingerprint: str
    ttl_s: float


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job as it is now. Times are Unix seconds."""

    job_id: str
    model: str
    state: JobState
    attempts: int  # how often a worker took it
    accepted_at_s: float
    queued_at_s: float | None
    started_at_s: float | None  # by the last worker that took it
    ended_at_s: float | None
    request: JobRequest
    position: int | None  # while queued; 0 = next


@dataclass(frozen=True, slots=True)
class QueueDepth:
    waiting: int  # reserved, reading or queued
    places: int  # the places that they take, as `reserve` counts them
    queued: int
    running: int
    oldest_age_s: float | None  # of the oldest queued job, since its acceptance


@dataclass(frozen=True, slots=True)
class Orphan:
    """A job whose reader is gone."""

    model: str
    job_id: str


@dataclass(frozen=True, slots=True)
class Sweep:
    """Args:
    overdue: ids of the jobs that the sweep ended.
    orphans: jobs to adopt.
    """

    overdue: tuple[str, ...]
    orphans: tuple[Orphan, ...]


@dataclass(frozen=True, slots=True)
class NeededFrames:
    """The frames that a job is about.

    Args:
        digest: of their blob, which is pinned where it is stored.
        num_bytes: that the blob takes at most, reserved where it is not; 0: nothing is.
        max_bytes: budget of all blobs together.
    """

    digest: str
    num_bytes: int = 0
    max_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ExpectedFrames:
    """Args:
    header: what a blob says of the frames, as `Created.found`.
    request: the job's request with such frames.
    """

    header: bytes
    request: JobRequest


@dataclass(frozen=True, slots=True)
class Created:
    """Args:
    job_id: of the job that answers the request: its own, or that of an earlier one with the
        same idempotency key and fingerprint. Then nothing was created, the place is given up,
        and that job is adopted (see `JobQueue.end`).
    is_queued: nothing is left to do; else its frames are to be read, or are `found`.
    found: what the stored blob says of the frames, which are pinned; empty where there is none.
    opening: the first of its events, as the log has it; None of an earlier job.
    limit_states: what its owner has left of its limits.
    """

    job_id: str
    is_queued: bool
    found: bytes
    opening: LoggedEvent | None
    limit_states: tuple[LimitState, ...] = ()


class JobQueue:
    """Every method raises `StoreUnavailableError` when Redis does not answer.

    Args:
        result_ttl_s: how long a job's record and events outlive its end, unless those of later
            jobs need the room.
    """

    def __init__(self, redis: Redis, keys: RedisKeys, *, result_ttl_s: float) -> None:
        self._redis = redis
        self._keys = keys
        self._scripts = Scripts(redis, keys.prefix)
        self._result_ttl_ms = milliseconds(result_ttl_s)

    async def reserve(
        self,
        model: str,
        job_id: str,
        *,
        max_jobs: int,
        lease_s: float,
        owner: str = ANONYMOUS,
        num_places: int = 1,
    ) -> None:
        """Takes a complete request's places in the queue.

        They are lost unless they are renewed within `lease_s`.

        Args:
            num_places: see `owner_limits.num_places`.

        Raises:
            QueueFullError: all of `max_jobs` places are taken, and the owner has its share of
                those beyond (`lua/places.lua`).
        """
        is_taken, retry_after_ms = await self._scripts.run(
            "reserve", model, job_id, max_jobs, milliseconds(lease_s), owner, num_places
        )
        if not is_taken:
            raise _queue_full(retry_after_ms)

    async def admit(
        self,
        *,
        max_jobs: int,
        owner: str = ANONYMOUS,
        limits: KeyLimits = NO_LIMITS,
        key_hash: str = "",
    ) -> list[ModelCard]:
        """Checks which workers there are, and whether there is room in the queue of any of their
        models and within the owner's limits, before anything is known of the request.

        Args:
            key_hash: of its idempotency key; where a job is known by it the limits do not matter.

        Raises:
            QueueFullError
            KeyLimitError
        """
        allowance = Allowance(owner, limits)
        cards, has_room, retry_after_ms, states = await self._scripts.run(
            "admit", max_jobs, owner, allowance.limit_words, key_hash
        )
        refuse_over_limits(parse_limit_states(limits, states))
        if not has_room:
            raise _queue_full(retry_after_ms)
        return [_parse_card(card) for card in cards]

    async def renew_place(self, model: str, job_id: str, *, lease_s: float) -> bool:
        """Renews a place while the frames are being read.

        Returns False when there is nothing to renew any more: the place was lost, or the job is
        queued or ended.
        """
        reply = await self._scripts.run("renew_place", model, job_id, milliseconds(lease_s))
        return bool(reply)

    async def release(self, model: str, job_id: str) -> None:
        """Gives up a place; one whose job was created, unknown to who posted it, is abandoned."""
        await self._scripts.run("release", model, job_id)

    async def create(
        self,
        request: JobRequest,
        *,
        idempotency: Idempotency | None = None,
        frames: NeededFrames | None = None,
        expected: ExpectedFrames | None = None,
        allowance: Allowance | None = None,
    ) -> Created:
        """Creates the job on its reserved place, with its first event: in state `reading`, or
        `queued` if its frames are stored and are those that are expected.

        Args:
            allowance: what it may take of its owner's limits; None: there are none.

        Raises:
            IdempotencyConflictError: the key belongs to another request. The place is given up.
            KeyLimitError
            DeadlineUnreachableError: the deadline that the client has set passes while others wait.
            FrameStoreFullError: the frames of live jobs leave no room for this one's.
            StoreUnavailableError: also when the place was lost meanwhile.
        """
        opening = JobEvent(
            job_id=request.job_id,
            video_id=request.video_id,
            model=request.model,
            compression=request.compression,
        ).model_dump_json()
        allowance = allowance or Allowance(request.owner)
        outcome, job_id, found, states = await self._scripts.run(
            "create",
            request.model,
            request.job_id,
            request.model_dump_json(),
            opening,
            milliseconds(request.accepted_at_s),
            milliseconds(request.deadline_at_s),
            idempotency.key_hash if idempotency else "",
            idempotency.fingerprint if idempotency else "",
            milliseconds(idempotency.ttl_s) if idempotency else 0,
            request.owner,
            request.cached_video or "",
            frames.digest if frames else "",
            expected.header if expected else "",
            expected.request.model_dump_json() if expected else "",
            frames.num_bytes if frames else 0,
            frames.max_bytes if frames else 0,
            allowance.limit_words,
            allowance.taken_words,
            allowance.length,
            request.priority,
            _left_ms(request),
        )
        limit_states = parse_limit_states(allowance.limits, states)
        if outcome == b"conflict":
            raise IdempotencyConflictError(
                "the Idempotency-Key was used for another request: send this one with a new key"
            )
        if outcome == b"too_late":
            message = "too many jobs are waiting to meet 'deadline_s'"
            if not found:
                message = "'deadline_s' passed before the request was complete"
            raise DeadlineUnreachableError(message, retry_after_s=_retry_after_s(found))
        if outcome == b"no_room":
            raise FrameStoreFullError
        if outcome == b"no_place":
            raise StoreUnavailableError("the request's place in the queue was lost: post it again")
        refuse_over_limits(limit_states)
        return Created(
            job_id.decode(),
            is_queued=outcome == b"queued",
            found=found,
            opening=(
                None if outcome == b"existing" else LoggedEvent(OPENING_EVENT, opening.encode())
            ),
            limit_states=limit_states,
        )

    async def append_status(self, job_id: str, event: StatusEvent) -> bool:
        """Publishes the progress of reading. False if a worker has the job or it has ended."""
        return bool(await self._scripts.run("append_status", job_id, event.model_dump_json()))

    async def enqueue(self, request: JobRequest) -> bool:
        """Hands the job with its frames to the workers. False if it has ended meanwhile."""
        assert request.frames is not None or request.video_id is None
        reply = await self._scripts.run(
            "enqueue", request.model, request.job_id, request.model_dump_json()
        )
        return bool(reply)

    async def get(self, job_id: str) -> JobRecord:
        """Raises JobNotFoundError when there never was such a job or its record has expired."""
        async with store_call():
            fields: Any = await self._redis.hgetall(self._keys.job(job_id))
        if not fields:
            raise JobNotFoundError
        record = {name.decode(): value for name, value in fields.items()}
        job = JobRecord(
            job_id=job_id,
            model=record["model"].decode(),
            state=JobState(record["state"].decode()),
            attempts=int(record["attempt"]),
            accepted_at_s=int(record["accepted_at"]) / 1000,
            queued_at_s=seconds(record.get("queued_at")),
            started_at_s=seconds(record.get("started_at")),
            ended_at_s=seconds(record.get("ended_at")),
            request=JobRequest.model_validate_json(record["request"]),
            position=None,
        )
        return await self._placed(job)

    async def refreshed(self, job: JobRecord) -> JobRecord:
        """The job as it is now, except its request, which may be large and is not read again: it
        lacks the frames that have been found since.

        Raises: JobNotFoundError.
        """
        names = ("state", "attempt", "queued_at", "started_at", "ended_at")
        async with store_call():
            fields: Any = await self._redis.hmget(self._keys.job(job.job_id), names)
        state, attempt, *times = fields
        if state is None:
            raise JobNotFoundError
        queued_at_s, started_at_s, ended_at_s = map(seconds, times)
        now = replace(
            job,
            state=JobState(state.decode()),
            attempts=int(attempt),
            queued_at_s=queued_at_s,
            started_at_s=started_at_s,
            ended_at_s=ended_at_s,
            position=None,
        )
        return await self._placed(now)

    async def _placed(self, job: JobRecord) -> JobRecord:
        """With the number of jobs that would be taken before it now, if it is queued."""
        if job.state is not JobState.QUEUED:
            return job
        model, job_id = job.model, job.job_id
        position: Any = await self._scripts.run("position", model, job.request.owner, job_id)
        if position is None:  # the previous release queued it
            async with store_call():
                position = await self._redis.zrank(self._keys.queued(model), job_id)
        return job if position is None else replace(job, position=int(position))

    async def end(
        self,
        job_id: str,
        state: JobState,
        event: ErrorEvent,
        *,
        unless_adopted: bool = False,
        reader: int | None = None,
    ) -> bool:
        """Ends a live job from outside its worker: cancel, deadline, a reader's error.

        A worker that runs the job is notified at once and refused from now on.

        Args:
            unless_adopted: spares a job that a later request with its idempotency key has found.
            reader: number of a reader that has failed, 0 for the first: spares a job that is read
                already, or has another reader by now.

        Returns:
            False if the job had ended already, or is spared.

        Raises:
            JobNotFoundError
        """
        assert state.is_final
        reply = await self._scripts.run(
            "end",
            job_id,
            state.value,
            event.model_dump_json(),
            self._result_ttl_ms,
            int(unless_adopted),
            "" if reader is None else reader,
        )
        if reply < 0:
            raise JobNotFoundError
        return bool(reply)

    async def sweep(self, *, grace_s: float = 5.0) -> Sweep:
        """Ends jobs past their deadline, finds those whose reading API is gone; any API, every
        second.

        A running job's worker enforces the deadline itself and is given `grace_s` to do so.
        """
        overdue, orphans = await self._scripts.run(
            "sweep",
            self._result_ttl_ms,
            milliseconds(grace_s),
            json.dumps(fault(DeadlineExceededError())),
            MAX_SWEPT_JOBS,
        )
        words = [word.decode() for word in orphans]
        return Sweep(
            overdue=tuple(job_id.decode() for job_id in overdue),
            orphans=tuple(map(Orphan, words[::2], words[1::2])),
        )

    async def adopt(self, orphan: Orphan, *, lease_s: float) -> tuple[JobRequest, int] | None:
        """Takes an orphan's place, to read its frames; of several callers one gets it.

        Returns:
            The request, and a number that earlier readers do not have (see `end`).
            None where there is nothing to do: somebody else has it, or it has ended.
        """
        lost = ReaderLostError()
        reply = await self._scripts.run(
            "adopt_reading",
            orphan.model,
            orphan.job_id,
            milliseconds(lease_s),
            MAX_ADOPTIONS,
            json.dumps(fault(lost)),
            self._result_ttl_ms,
        )
        if not reply:
            return None
        request, reader = reply
        return JobRequest.model_validate_json(request), reader

    async def prune(self, owners: Sequence[str]) -> None:
        """Forgets what is counted of these owners' jobs, and of places, and is there no longer; any
        API, every minute. A release that does not keep count leaves some over.
        """
        await self._scripts.run("prune", *owners)

    async def num_jobs(self, owners: Sequence[str]) -> list[tuple[int, int]]:
        """Per owner: how many jobs wait, and how many run."""
        if not owners:
            return []
        async with store_call(), self._redis.pipeline(transaction=False) as pipeline:
            for owner in owners:
                key = self._keys.owner_jobs(owner)
                pipeline.zcount(key, 0, 0)
                pipeline.zcount(key, "(0", "+inf")
            counts: list[int] = await pipeline.execute()
        return list(zip(counts[::2], counts[1::2], strict=True))

    async def depth(self, model: str) -> QueueDepth:
        reading, queued, running, age_ms, places = await self._scripts.run("depth", model)
        return QueueDepth(
            waiting=reading + queued,
            places=places,
            queued=queued,
            running=running,
            oldest_age_s=age_ms / 1000 if age_ms >= 0 else None,
        )


def _queue_full(retry_after_ms: int) -> QueueFullError:
    return QueueFullError(
        "the queue is full (DYCOKE_MAX_QUEUED_JOBS): try again when Retry-After has passed",
        retry_after_s=_retry_after_s(retry_after_ms),
    )


def _retry_after_s(retry_after_ms: int) -> int:
    return min(max(1, math.ceil(retry_after_ms / 1000)), MAX_RETRY_AFTER_S)


def _left_ms(request: JobRequest) -> int | str:
    """Milliseconds until the client's own deadline; empty if there is none."""
    if request.deadline_s is None:
        return ""
    return milliseconds(request.deadline_at_s - time.time())


@lru_cache(maxsize=256)  # a worker says the same for seconds at a time
def _parse_card(text: bytes) -> ModelCard:
    return ModelCard.model_validate_json(text)


def fault(error: DycokeError) -> dict[str, str | bool]:
    """The fields of an error that Lua needs to write its event."""
    return {"code": error.code, "message": error.message, "retryable": error.retryable}
