"""Reading a job's events, from any point on, by any number of readers.

Events are appended by the scripts of `app.store.job_queue` and `app.store.job_leases`, each as the
JSON that clients get, which is validated where it is made and passed on as it is. The id of an
event says where in the answer it stands (`app/store/lua/prelude.lua`), so an id that a client has
seen stays good for resuming, whatever happened since.

Whoever waits for events of many jobs uses `app.store.event_reader`.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from redis.asyncio import Redis

from app.errors import JobNotFoundError
from app.messages import EVENT_ADAPTER, Event, event_type
from app.store.client import MAX_BLOCK_S, milliseconds, store_call
from app.store.keys import RedisKeys
from dycoke_core.errors import InvalidRequestError

FIRST_EVENT = "0-0"  # read after this to read everything
MAX_EVENTS_PER_READ = 256

_EVENT_ID = re.compile(r"[0-9]{1,10}-[0-9]{1,10}")


class LoggedEvent(NamedTuple):
    id: str
    data: bytes  # JSON on one line

    @property
    def type(self) -> str:
        return event_type(self.data)

    @property
    def event(self) -> Event:
        return EVENT_ADAPTER.validate_json(self.data)


class EventLog:
    """Reads one log at a time; a reader that waits holds a connection of the client's."""

    def __init__(self, redis: Redis, keys: RedisKeys) -> None:
        self._redis = redis
        self._keys = keys

    async def read(
        self, job_id: str, *, after: str = FIRST_EVENT, block_s: float
    ) -> list[LoggedEvent]:
        """Returns the next events after `after`, or waits for one for at most `block_s`.

        Returns:
            At most `MAX_EVENTS_PER_READ` events in order; none when the time is over.

        Raises:
            JobNotFoundError: there is no such job, or its record has expired.
            StoreUnavailableError
        """
        key = self._keys.events(job_id)
        block_ms = max(1, milliseconds(min(block_s, MAX_BLOCK_S)))  # 0 would block for ever
        async with store_call():
            reply: Any = await self._redis.xread(
                {key: after}, count=MAX_EVENTS_PER_READ, block=block_ms
            )
            if not reply and not await self._redis.exists(key, self._keys.job(job_id)):
                raise JobNotFoundError("no such job")
        return [event for _, entries in reply for event in logged_events(entries)]

    async def last(self, job_id: str) -> Event | None:
        """The newest event, whatever lies before it; None where there is none.

        Raises: StoreUnavailableError.
        """
        async with store_call():
            reply: Any = await self._redis.xrevrange(self._keys.events(job_id), count=1)
        return EVENT_ADAPTER.validate_json(reply[0][1][b"event"]) if reply else None


def logged_events(entries: Iterable[tuple[bytes, Mapping[bytes, bytes]]]) -> list[LoggedEvent]:
    """Takes a stream's entries as the client gives them."""
    return [LoggedEvent(event_id.decode(), fields[b"event"]) for event_id, fields in entries]


def parse_event_id(text: str) -> str:
    """Checks an id that a client says it has seen last.

    Raises:
        InvalidRequestError
    """
    if not _EVENT_ID.fullmatch(text):
        raise InvalidRequestError("Last-Event-ID must be an id that this service sent")
    return text
