"""The run's record of its jobs: what each asked for, what its readers saw, what went wrong.

A client's view of an answer is a `View`: it checks every event against the tokens that an
undisturbed run makes, over as many connections as it takes.
"""

import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import httpx

from tests.integration.api import SseEvent
from tests.integration.fake_engine import answer, text_of

POISON = "poison"
# How a job that was not cancelled and kills no worker may end other than `done`: each error invites
# the client to ask again, and names something that the faults took away.
EXCUSED = ("store_unavailable", "reader_lost", "shutting_down", "no_worker")


class Answer(NamedTuple):
    token_ids: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Question:
    """What a client asks for, the same for every run of a seed."""

    number: int
    text: str
    max_tokens: int
    num_frames: int
    clip: int  # which of the run's clips
    start_s: float
    manner: str  # see `clients.Client`
    has_key: bool  # an Idempotency-Key
    has_upload: bool  # sends the clip along
    leaves_after: int  # tokens that a client reads before it does what its manner says
    api: int  # asked first
    expected: Answer | None = None  # None: what the fake engine says

    @property
    def is_poison(self) -> bool:
        return POISON in self.text.split()

    @property
    def answer(self) -> Answer:
        """That of an undisturbed run."""
        if self.expected is not None:
            return self.expected
        ids = answer(self.text, self.max_tokens)
        return Answer(tuple(ids), "".join(map(text_of, ids)))


@dataclass(slots=True, eq=False)
class JobEntry:
    """One accepted job. Times are seconds since the run began."""

    job_id: str
    question: Question
    accepted_at_s: float
    may_be_cancelled: bool = False
    num_posts: int = 0  # that were answered with this job
    outcome: str = ""  # done, cancelled or an error's code
    history: list[tuple[float, str]] = field(default_factory=list)


class Ledger:
    def __init__(self) -> None:
        self._began_at = time.monotonic()
        self.jobs: dict[str, JobEntry] = {}
        self.faults: list[tuple[float, str]] = []
        self.num_faults: Counter[str] = Counter()  # by kind
        self.problems: list[tuple[str | None, str]] = []  # of a job, or of none
        self.refusals: Counter[str] = Counter()  # by code
        self.num_resumes = 0
        self.num_unknown_jobs = 0  # whose creation no client heard of

    def now_s(self) -> float:
        return time.monotonic() - self._began_at

    def accept(self, job_id: str, question: Question) -> JobEntry:
        entry = self.jobs.get(job_id)
        if entry is None:
            entry = self.jobs[job_id] = JobEntry(job_id, question, self.now_s())
        entry.num_posts += 1
        self.note(entry, "accepted")
        return entry

    def note(self, entry: JobEntry, text: str) -> None:
        entry.history.append((self.now_s(), text))

    def note_fault(self, text: str) -> None:
        self.faults.append((self.now_s(), text))

    def count_refusal(self, code: str) -> None:
        self.refusals[code] += 1

    def check_that_it_was_chaos(self) -> None:
        """A run in which no fault hit, or nothing was answered, shows nothing."""
        if not self.num_faults.total():
            self.blame("no fault struck")
        if not any(entry.outcome == "done" for entry in self.jobs.values()):
            self.blame("no answer was whole")

    def blame(self, text: str, job_id: str | None = None) -> None:
        self.problems.append((job_id, text))


class View:
    """What one reader has seen of an answer, from its start."""

    def __init__(self, entry: JobEntry, ledger: Ledger, reader: str) -> None:
        self.entry = entry
        self.last_id: str | None = None
        self.final: SseEvent | None = None
        self._expected = entry.question.answer
        self._ledger = ledger
        self._reader = reader
        self._has_opening = False
        self._text = ""
        self.num_tokens = 0

    def take(self, event: SseEvent) -> None:
        if self.final is not None:
            self._blame(f"'{event.name}' came after the end")
            return
        if event.id is not None:
            self._check_order(event.id)
            self.last_id = event.id
        if event.name == "job":
            if self._has_opening:
                self._blame("the opening event came twice")
            self._has_opening = True
            return
        if event.name == "status":
            return
        if not self._has_opening:
            self._blame(f"'{event.name}' came before the opening event")
        if event.name == "token":
            self._take_token(event.data)
        else:
            self._take_end(event)

    def _check_order(self, event_id: str) -> None:
        if self.last_id is not None and _position(event_id) <= _position(self.last_id):
            self._blame(f"event {event_id} came after {self.last_id}")

    def _take_token(self, data: dict[str, Any]) -> None:
        index, ids = data["index"], data["token_ids"]
        if index != self.num_tokens:
            self._blame(f"token {index} came where {self.num_tokens} was due")
        if tuple(ids) != self._expected.token_ids[index : index + len(ids)]:
            self._blame(f"tokens from {index} on are {ids}, not those of an undisturbed run")
        self.num_tokens = index + len(ids)  # text alone is an answer's very end
        self._text += data["text"]

    def _take_end(self, event: SseEvent) -> None:
        if event.id is None:  # the connection's end, not the job's
            self._ledger.note(self.entry, f"{self._reader} was sent away: {event.data['code']}")
            if event.data["code"] != "store_unavailable":
                self._blame(f"was sent away: {event.data}")
            return
        self.final = event
        if event.name == "error":
            self._ledger.note(self.entry, f"{self._reader} read the end: {event.data['code']}")
            return
        self._ledger.note(self.entry, f"{self._reader} read the end: done")
        num_expected = len(self._expected.token_ids)
        if self.num_tokens != num_expected or self._text != self._expected.text:
            self._blame(f"done after {self.num_tokens} tokens of {num_expected}")
        check_receipt(event.data, self.entry, self._ledger)

    def _blame(self, what: str) -> None:
        self._ledger.blame(f"{self._reader}: {what}", self.entry.job_id)


def check_receipt(done: dict[str, Any], entry: JobEntry, ledger: Ledger) -> None:
    """Checks what `done` says against what was asked."""
    expected = entry.question.answer
    said = (done["text"], done["usage"]["completion_tokens"], done["job_id"])
    if said != (expected.text, len(expected.token_ids), entry.job_id):
        ledger.blame("the receipt is not this answer's", entry.job_id)


def _position(event_id: str) -> tuple[int, int]:
    first, second = event_id.split("-")
    return int(first), int(second)


async def sse_events(reply: httpx.Response) -> AsyncIterator[SseEvent]:
    """Parses an event stream as it comes, whole events only."""
    name, data, event_id = "", "", None
    async for line in reply.aiter_lines():
        field_name, _, value = line.partition(": ")
        if line == "" and name:
            yield SseEvent(name, json.loads(data), event_id)
            name, data, event_id = "", "", None
        elif field_name == "event":
            name = value
        elif field_name == "data":
            data = value
        elif field_name == "id":
            event_id = value
