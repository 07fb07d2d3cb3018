"""What a worker does to jobs: take, renew, append, hand back. `job_queue` is the other half.

A job is given out as a lease: its stream entry stays pending under the worker's name, and renewing
resets the entry's idle time. Each take raises the job's attempt, which fences every later write: a
worker that was paused past its lease, or whose job was ended by someone else, is refused.

If a worker dies, a job that was alone in its engine may be charged with the death. Several jobs
become suspects, which run alone, and are charged with nothing. Two deaths, or eight deliveries, end
a job. A delivery counts for neither if it was handed back, if its worker died while nothing of the
job was in the engine, or if its worker turns out to be alive. `lua/blame.lua` decides who is to
blame; `lost_workers` is how a worker's supervisor reports what it saw.
"""

import json
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from logging import getLogger
from typing import Any, NamedTuple

from pydantic import ValidationError
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from app.errors import JobFailedRepeatedlyError, StoreUnavailableError, WorkersLostError
from app.messages import (
    EVENT_ADAPTER,
    CompressionChoice,
    DoneEvent,
    ErrorEvent,
    JobRequest,
    JobState,
    StatusEvent,
    TokenEvent,
)
from app.store.client import (
    CALL_TIMEOUT_S,
    Scripts,
    in_our_words,
    is_server_condition,
    milliseconds,
    seconds,
    shared_connection,
    store_call,
)
from app.store.job_queue import fault
from app.store.keys import GROUP, RedisKeys
from app.store.queue_snapshot import QueueSnapshot
from dycoke_core.errors import EngineError
from dycoke_core.sequence import SAMPLER_VERSION

UNNAMED_SAMPLER_VERSION = 1  # earlier releases do not note which version drew their tokens
FORGET_CONSUMER_AFTER_S = 3600.0
MAX_JOBS_PER_CALL = 128  # in one call of a script, during which Redis does nothing else

logger = getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Delivery:
    """One job, given to one worker. Times are Unix seconds."""

    job_id: str
    entry_id: str
    worker_id: str
    attempt: int  # fencing token; also how often any worker took the job
    request: JobRequest
    published: tuple[TokenEvent, ...]  # what earlier attempts appended
    queued_at_s: float
    started_at_s: float
    first_token_at_s: float | None
    is_suspect: bool  # it was in the engine of a worker that died, so it runs alone
    sampler_version: int | None  # the version that drew the published tokens; None: there are none
    was_set_aside: bool = False  # handed back to let a suspect run alone
    choice: CompressionChoice | None = None  # an earlier attempt's, if policy `auto` chose
    queue: QueueSnapshot | None = None  # what waited then; only if policy `auto` is to choose

    @property
    def waits_since_s(self) -> float:
        """Unix time since when it waits for an engine: a job that another worker has had was not
        waiting all the time."""
        return self.queued_at_s if self.attempt == 1 else self.started_at_s

    @property
    def published_token_ids(self) -> tuple[int, ...]:
        return tuple(token_id for event in self.published for token_id in event.token_ids)


class Append(NamedTuple):
    """What one job has to say: tokens and status changes in order, and its end, if it has ended.

    Args:
        first_token_at_s: Unix time, once known.
    """

    delivery: Delivery
    events: Sequence[StatusEvent | TokenEvent]
    final: DoneEvent | ErrorEvent | None = None
    first_token_at_s: float | None = None


class Appended(NamedTuple):
    """Args:
    is_accepted: False: the worker no longer holds the job and must drop it.
    next_index: index of the token that Redis expects next. Below the first token of the append,
        nothing was written, for Redis had lost what came before: send again from there.
    is_suspect: Whether the job must still run alone.
    error: what Redis cannot do with this job, whatever the worker sends.
    """

    is_accepted: bool
    next_index: int
    is_suspect: bool = False
    error: str | None = None


class NotedChoice(NamedTuple):
    """Args:
    choice: that is noted, which may be an earlier call's whose reply was lost.
    queue: what waits now.
    """

    choice: CompressionChoice
    queue: QueueSnapshot


class JobLeases:
    """Every method raises `StoreUnavailableError` when Redis does not answer.

    Args:
        worker_id: unique to this process, also among its earlier lives.
    """

    def __init__(
        self, redis: Redis, keys: RedisKeys, *, model: str, worker_id: str, result_ttl_s: float
    ) -> None:
        self._redis = redis
        self._blocking = shared_connection(redis, "blocking")
        self._keys = keys
        self._scripts = Scripts(redis, keys.prefix)
        self._model = model
        self._worker_id = worker_id
        self._result_ttl_ms = milliseconds(result_ttl_s)
        self._faults = json.dumps(
            {
                "deaths": fault(
                    JobFailedRepeatedlyError(
                        "two workers died while they ran nothing but this job: do not post it "
                        "again as it is"
                    )
                ),
                "deliveries": fault(
                    WorkersLostError(
                        "the workers that took the job were lost: post the request again"
                    )
                ),
            }
        )

    async def ensure_group(self) -> None:
        """Creates the consumer group where it is missing, and forgets consumers long gone."""
        async with store_call():
            try:
                await self._redis.xgroup_create(
                    self._keys.jobs(self._model), GROUP, id="0", mkstream=True
                )
            except ResponseError as error:
                if "BUSYGROUP" not in str(error):
                    raise
        await self._scripts.run(
            "forget_consumers", self._model, milliseconds(FORGET_CONSUMER_AFTER_S)
        )

    async def take(self, *, block_s: float) -> Delivery | None:
        """Takes the next fresh job (`lua/order.lua`); waits for one for at most `block_s`.

        One at a time, so that idle workers share a burst. None also when the job had ended.
        """
        entry_id = await self.read_entry(block_s)
        if entry_id is None:
            return None
        reply = await self._scripts.run(
            "start",
            self._model,
            entry_id,
            self._worker_id,
            uuid.uuid4().hex,
            self._faults,
            self._result_ttl_ms,
        )
        if reply and reply[0] == b"dead":
            self._log_dead_letter(reply[1].decode())
            return None
        return await self._delivery(reply) if reply else None

    async def take_over(
        self,
        *,
        lease_s: float,
        may_be_suspect: bool,
        must_be_suspect: bool = False,
        suspect_idle_s: float = 0.0,
    ) -> Delivery | None:
        """Takes a job that was handed back or whose lease ran out, if there is one.

        Sends jobs that have had all their tries to the dead letters on the way.

        Args:
            suspect_idle_s: leaves suspects to others until they have been idle for so long.
        """
        try:
            dead, reply = await self._scripts.run(
                "claim",
                self._model,
                self._worker_id,
                uuid.uuid4().hex,
                milliseconds(lease_s),
                milliseconds(suspect_idle_s) if may_be_suspect else -1,
                self._faults,
                self._result_ttl_ms,
                int(must_be_suspect),
            )
        except ResponseError as error:
            await self._recreate_group(error)
            return None
        for job_id in dead:
            self._log_dead_letter(job_id.decode())
        return await self._delivery(reply) if reply else None

    async def renew(self, deliveries: Sequence[Delivery]) -> list[bool]:
        """Renews leases. False for each job that ended or is another attempt's: drop it."""
        renewed: list[bool] = []
        for first in range(0, len(deliveries), MAX_JOBS_PER_CALL):
            leases: list[str | int] = []
            for delivery in deliveries[first : first + MAX_JOBS_PER_CALL]:
                leases += [delivery.job_id, delivery.attempt, delivery.entry_id]
            replies = await self._scripts.run("renew", self._model, self._worker_id, *leases)
            renewed += map(bool, replies)
        return renewed

    async def enter(self, delivery: Delivery) -> bool:
        """Notes, before the engine gets the job, that it may be to blame if the worker dies.

        Returns:
            False if it is no longer this worker's.
        """
        return bool(await self._scripts.run("enter", *self._fence(delivery)[1:]))

    async def choose(self, delivery: Delivery, choice: CompressionChoice) -> NotedChoice | None:
        """Stores what policy `auto` chose, for later attempts, unless an earlier call has done so.

        Returns:
            What holds; None if the job is no longer this worker's.
        """
        fence = self._fence(delivery)[1:]
        reply = await self._scripts.run("choose", *fence, choice.model_dump_json())
        if not reply:
            return None
        noted, queue = reply
        return NotedChoice(CompressionChoice.model_validate_json(noted), QueueSnapshot.read(queue))

    async def append(self, appends: Sequence[Append]) -> list[Appended]:
        """Appends an engine step's events of many jobs in one call; ends those that ended.

        Each job is fenced on its own. Sending the same again, after a lost reply, changes nothing.
        """
        appended: list[Appended] = []
        for first in range(0, len(appends), MAX_JOBS_PER_CALL):
            lines = "".join(map(_lines, appends[first : first + MAX_JOBS_PER_CALL]))
            replies = await self._scripts.run(
                "append", self._worker_id, self._result_ttl_ms, SAMPLER_VERSION, lines
            )
            appended += map(_appended, replies)
        return appended

    async def hand_back(
        self, delivery: Delivery, *, lease_s: float, crew: int = 0, is_set_aside: bool = False
    ) -> bool:
        """Gives up a job, so that any worker may take it over at once.

        Args:
            crew: the job was in an engine that failed, with this many in all. It is redelivered as
                a suspect.
            is_set_aside: this worker keeps running, with other jobs.

        Returns:
            False if it was no longer this worker's.
        """
        reply = await self._scripts.run(
            "hand_back",
            *self._fence(delivery),
            delivery.entry_id,
            milliseconds(lease_s),
            crew,
            int(is_set_aside),
        )
        return bool(reply)

    async def ended(self, *, poll_s: float = 1.0) -> AsyncGenerator[str | None, None]:
        """Yields the id of each job that is ended from outside its worker, as it happens.

        Yields None once when it starts to listen, and at least every `poll_s`. What was published
        while no one listened is lost: renewing a lease reports the same.

        Raises:
            StoreUnavailableError: the connection is lost; call again.
        """
        async with self._redis.pubsub(ignore_subscribe_messages=True) as pubsub:
            async with store_call():
                await pubsub.subscribe(self._keys.ended)
                await pubsub.get_message(timeout=CALL_TIMEOUT_S)  # its confirmation, ignored
            yield None
            while True:
                async with store_call():
                    message = await pubsub.get_message(timeout=poll_s)
                yield message["data"].decode() if message else None

    async def read_entry(self, block_s: float) -> bytes | None:
        """Reads one fresh entry; returns its id."""
        block_ms = max(1, milliseconds(block_s))  # 0 would wait forever
        with in_our_words:
            try:
                reply = await self._blocking.call(
                    *("XREADGROUP", "GROUP", GROUP, self._worker_id, "COUNT", 1),
                    *("BLOCK", block_ms, "STREAMS", self._keys.jobs(self._model), ">"),
                )
            except ResponseError as error:
                await self._recreate_group(error)
                return None
        if not reply:
            return None
        entry_id: bytes = reply[0][1][0][0]
        return entry_id

    async def _recreate_group(self, error: ResponseError) -> None:
        """Makes the group again if Redis has lost it; re-raises any other error."""
        if not any(word in str(error) for word in ("NOGROUP", "UNBLOCKED")):
            raise error
        logger.warning("the consumer group is gone; creating it again")
        await self.ensure_group()

    async def _delivery(self, reply: Sequence[Any]) -> Delivery | None:
        """Reads what was published before. A request or choice that cannot be read ends its job."""
        job_id = reply[0].decode()
        attempt, entry_id, request_json, next_index, *more = reply[1:]
        *times, is_suspect, version, choice, was_set_aside, waiting = more
        has_published = int(next_index) > 0
        try:
            request = JobRequest.model_validate_json(request_json)
            chosen = CompressionChoice.model_validate_json(choice) if choice else None
        except ValidationError:
            await self._end_unreadable(job_id)
            return None
        return Delivery(
            job_id=job_id,
            entry_id=entry_id.decode(),
            worker_id=self._worker_id,
            attempt=int(attempt),
            request=request,
            published=await self._published(job_id) if has_published else (),
            queued_at_s=int(times[0]) / 1000,
            started_at_s=int(times[1]) / 1000,
            first_token_at_s=seconds(times[2]),
            is_suspect=is_suspect == b"1",
            was_set_aside=was_set_aside == b"1",
            sampler_version=int(version or UNNAMED_SAMPLER_VERSION) if has_published else None,
            choice=chosen,
            queue=QueueSnapshot.read(waiting) if waiting else None,
        )

    async def _published(self, job_id: str) -> tuple[TokenEvent, ...]:
        async with store_call():
            entries: Any = await self._redis.xrange(self._keys.events(job_id))
        events = (EVENT_ADAPTER.validate_json(fields[b"event"]) for _, fields in entries)
        return tuple(event for event in events if isinstance(event, TokenEvent))

    async def _end_unreadable(self, job_id: str) -> None:
        error = EngineError("this worker's release cannot read the job: post the request again")
        logger.error("dropped a job whose request cannot be read", extra={"job_id": job_id})
        event = ErrorEvent.of(error, job_id)
        await self._scripts.run(
            "end", job_id, JobState.ERROR.value, event.model_dump_json(), self._result_ttl_ms
        )

    def _fence(self, delivery: Delivery) -> tuple[str, str, str, int]:
        return self._model, delivery.job_id, delivery.worker_id, delivery.attempt

    def _log_dead_letter(self, job_id: str) -> None:
        logger.error("job went to the dead letters", extra={"job_id": job_id})


def _lines(append: Append) -> str:
    """What `append.lua` reads of one job: one long argument is cheaper to send than many."""
    delivery, final = append.delivery, append.final
    state = "" if final is None else JobState.DONE if final.type == "done" else JobState.ERROR
    first_token_at_s = append.first_token_at_s
    first_token_at = "" if first_token_at_s is None else milliseconds(first_token_at_s)
    events = [_line(event) for event in append.events]
    return (
        f"{delivery.job_id} {delivery.attempt} {state} {first_token_at} {len(events)}\n"
        f"{final.model_dump_json() if final else ''}\n{''.join(events)}"
    )


def _line(event: StatusEvent | TokenEvent) -> str:
    """The index of an event's first token, the index after its last, and the event."""
    if isinstance(event, TokenEvent):
        return f"{event.index} {event.next_index} {event.model_dump_json()}\n"
    return f"  {event.model_dump_json()}\n"


def _appended(reply: int | Sequence[Any]) -> Appended:
    """Raises StoreUnavailableError: Redis took no write just now."""
    if isinstance(reply, int):
        return Appended(is_accepted=True, next_index=reply)
    if len(reply) > 1:
        is_accepted, next_index, is_suspect = reply
        return Appended(bool(is_accepted), next_index, bool(is_suspect))
    text = reply[0].decode(errors="replace")
    if is_server_condition(text):
        raise StoreUnavailableError("the job store takes no writes just now: try again")
    return Appended(is_accepted=False, next_index=0, error=text)
