"""Reads a job's events, from any point on, for any number of readers.

Events are appended by the scripts of `app.store.job_queue` and `app.store.job_leases`, each as the
JSON that clients get. It is validated where it is made, and passed on unchanged. The id of an event
says where in the answer it belongs (`app/store/lua/prelude.lua`), so an id that a client has seen
stays valid for resuming, whatever has happened since.

To wait for events of many jobs, use `app.store.event_reader`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from redis.asyncio import Redis

from app.errors import JobNotFoundError
from app.messages import EVENT_ADAPTER, Event, event_type
from app.store.client import in_our_words, shared_connection
from app.store.keys import RedisKeys
from dycoke_core.errors import InvalidRequestError

FIRST_EVENT = "0-0"  # read after this to read everything
OPENING_EVENT = "0-1"  # the id of every job's first event
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
    """Reads one log at a time, without waiting.

    Every method raises `StoreUnavailableError` when Redis does not answer.
    """

    def __init__(self, redis: Redis, keys: RedisKeys) -> None:
        self._shared = shared_connection(redis)
        self._keys = keys

    async def read(self, job_id: str, *, after: str = FIRST_EVENT) -> list[LoggedEvent]:
        """Returns the next events after `after`, at most `MAX_EVENTS_PER_READ`, in order.

        Raises:
            JobNotFoundError: there is no such job, or its record has expired.
        """
        key = self._keys.events(job_id)
        with in_our_words:
            reply = await self._shared.call(*read_command({key: after}))
            if not reply and not await self._shared.call("EXISTS", key, self._keys.job(job_id)):
                raise JobNotFoundError
        return [event for _, entries in reply or () for event in logged_events(entries)]

    async def last(self, job_id: str) -> Event | None:
        """The newest event, or None if there is none."""
        with in_our_words:
            reply = await self._shared.call(
                *("XREVRANGE", self._keys.events(job_id), "+", "-", "COUNT", 1)
            )
        return logged_events(reply)[0].event if reply else None


def read_command(places: Mapping[str, str]) -> list[str | int]:
    """The command that reads logs, each from its own position.

    Args:
        places: by key, the id of the last event that is known.
    """
    return ["XREAD", "COUNT", MAX_EVENTS_PER_READ, "STREAMS", *places, *places.values()]


def logged_events(entries: Iterable[tuple[bytes, Sequence[bytes]]]) -> list[LoggedEvent]:
    """Parses a stream's entries as Redis returns them."""
    return [LoggedEvent(event_id.decode(), fields[1]) for event_id, fields in entries]


def parse_event_id(text: str) -> str:
    """Checks the id of the last event that a client says it has seen.

    Raises:
        InvalidRequestError
    """
    if not _EVENT_ID.fullmatch(text):
        raise InvalidRequestError("Last-Event-ID must be an id that this service sent")
    return text
