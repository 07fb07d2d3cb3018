"""The jobs that a worker holds, from their delivery until their end is in the event log."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from app.messages import CompressionChoice, DoneEvent, ErrorEvent, StatusEvent, TokenEvent
from app.store.job_leases import Append, Delivery
from dycoke_core import sequence as core
from dycoke_core.auto import AutoConfig, resolved_compression

MAX_WAIT_S = 1.0


@dataclass(slots=True, eq=False)
class RunningJob:
    """A job and its unpublished events, bounded by its `max_tokens` however long Redis is down."""

    delivery: Delivery
    answer: list[TokenEvent]  # as sent, including what earlier attempts published
    next_index: int  # index of the first token that the event log lacks; set by the publisher
    first_token_at_s: float | None  # Unix time, of any attempt
    fresh: list[core.TokenEvent] = field(default_factory=list)  # what the engine has made since
    statuses: list[StatusEvent] = field(default_factory=list)  # not in the log yet
    final: DoneEvent | ErrorEvent | None = None  # set once; nothing comes after it
    kept: bytes | None = None  # a `KeptHistory` that is to be stored before the end is published
    is_suspect: bool = False  # must have the engine to itself; cleared by the publisher
    is_in_engine: bool = False  # the engine has it, or may have; set by the taker
    choice: CompressionChoice | None = None  # of policy `auto`
    # Brings it, or later its frames again, to the engine; set by the taker and the frame loader.
    loading: "asyncio.Task[None] | None" = None
    # The engine's name for this attempt; what is left of an earlier attempt has another name.
    sequence_id: str = field(init=False)
    policy: str = field(init=False)

    @classmethod
    def of(cls, delivery: Delivery) -> "RunningJob":
        answer = list(delivery.published)
        return cls(
            delivery=delivery,
            answer=answer,
            next_index=answer[-1].next_index if answer else 0,
            first_token_at_s=delivery.first_token_at_s,
            is_suspect=delivery.is_suspect,
        )

    @property
    def job_id(self) -> str:
        return self.delivery.job_id

    def __post_init__(self) -> None:
        self.sequence_id = f"{self.job_id}#{self.delivery.attempt}"
        self.policy = self.delivery.request.policy_label

    def take_choice(self, choice: CompressionChoice) -> None:
        """Stores what policy `auto` chose. `Publisher.tell_choice` publishes it at once."""
        self.choice = choice
        self.statuses.append(StatusEvent(stage="encoding", auto=choice))
        self.policy = str(choice.compression["policy"])

    @property
    def log_fields(self) -> dict[str, str]:
        return self.delivery.request.log_fields

    @property
    def deadline_at_s(self) -> float:
        return self.delivery.request.deadline_at_s

    @property
    def has_own_deadline(self) -> bool:
        """Whether the client has set one."""
        return self.delivery.request.deadline_s is not None

    @property
    def objective_s(self) -> float | None:
        """Of policy `auto`, to the first token; None: the policy is another."""
        asked = resolved_compression(self.delivery.request.compression)
        return asked.objective_s if isinstance(asked, AutoConfig) else None

    def has_begun_within(self, seconds: float) -> bool:
        """Whether its first token came so soon after its acceptance."""
        at_s = self.first_token_at_s
        return at_s is not None and at_s - self.delivery.request.accepted_at_s <= seconds

    @property
    def has_unsent(self) -> bool:
        return bool(self.fresh or self.statuses or self.final or self.unsent_tokens())

    def unsent_tokens(self) -> list[TokenEvent]:
        """The last tokens of the answer: those that the event log lacks."""
        first = len(self.answer)
        while first > 0 and self.answer[first - 1].index >= self.next_index:
            first -= 1
        return self.answer[first:]

    def append(self) -> Append:
        """All that the event log lacks. A job's status changes end before its tokens begin.

        Tokens that have come since the last append share an event. One that was sent stays as it
        is when it is sent again: a client that has seen it may come back for what follows it.
        """
        events: list[StatusEvent | TokenEvent] = [*self.statuses, *self.unsent_tokens()]
        if self.fresh:
            made = _events(self.fresh, self.delivery.request.tells_prompt_tokens)
            self.fresh.clear()
            self.answer += made
            events += made
        return Append(self.delivery, events, self.final, self.first_token_at_s)


def _events(fresh: list[core.TokenEvent], tells_prompt_tokens: bool) -> list[TokenEvent]:
    """Text without a token, at an answer's very end, stays apart: it has an index of its own.

    Raises:
        ValueError: the engine's output cannot be an event.
    """
    prompt_tokens = fresh[0].prompt_tokens if tells_prompt_tokens else None
    if len(fresh) == 1:
        return [_event(fresh[0].index, fresh[0].text, list(fresh[0].token_ids), prompt_tokens)]
    with_tokens = [event for event in fresh if event.token_ids]
    events = [_event(event.index, event.text, []) for event in fresh if not event.token_ids]
    if with_tokens:
        text = "".join(event.text for event in with_tokens)
        token_ids = [token_id for event in with_tokens for token_id in event.token_ids]
        events.insert(0, _event(with_tokens[0].index, text, token_ids, prompt_tokens))
    return events


def _event(
    index: int, text: str, token_ids: list[int], prompt_tokens: int | None = None
) -> TokenEvent:
    text.encode()  # a lone surrogate would fail later, with everything sent in that call
    return TokenEvent(index=index, text=text, token_ids=token_ids, prompt_tokens=prompt_tokens)


class RunningJobs:
    """At most `max_jobs`, in the order in which they came. Belongs to the event loop.

    None are taken before the engine has said how many it runs.

    Args:
        abort: makes the engine drop a sequence, within one step.
    """

    def __init__(self, abort: Callable[[str], object]) -> None:
        self.max_jobs = 0
        self._abort = abort
        self._jobs: dict[str, RunningJob] = {}
        self._has_changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[RunningJob]:
        return iter(list(self._jobs.values()))

    @property
    def has_room(self) -> bool:
        return len(self._jobs) < self.max_jobs

    @property
    def has_suspect(self) -> bool:
        return any(job.is_suspect for job in self._jobs.values())

    def get(self, job_id: str) -> RunningJob | None:
        return self._jobs.get(job_id)

    def of_sequence(self, sequence_id: str) -> RunningJob | None:
        """Returns None for a sequence of an attempt that is over."""
        job = self._jobs.get(sequence_id.rpartition("#")[0])
        return job if job is not None and job.sequence_id == sequence_id else None

    def add(self, job: RunningJob) -> None:
        assert self.has_room and job.job_id not in self._jobs
        self._jobs[job.job_id] = job

    def drop(self, job: RunningJob) -> None:
        """Drops a job that has ended or is another worker's; the engine does within one step."""
        self.remove(job)
        self.stop(job)

    def stop(self, job: RunningJob) -> None:
        """Keeps a job, and its frames, from the engine, or has the engine abort it; its place stays
        taken."""
        if job.loading is not None:
            job.loading.cancel()
        self._abort(job.sequence_id)

    def remove(self, job: RunningJob) -> None:
        """Forgets a job, unless another attempt of it has taken its place."""
        if self._jobs.get(job.job_id) is job:
            del self._jobs[job.job_id]
            self._has_changed.set()

    def clear(self, job: RunningJob) -> None:
        """Lets others run again: the job is no longer a suspect."""
        job.is_suspect = False
        self._has_changed.set()

    async def wait_until_alone(self, timeout_s: float | None = None) -> bool:
        """Waits until a single job is left. False if that takes longer than `timeout_s`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while len(self._jobs) > 1:
                    await self.wait_for_change(MAX_WAIT_S)
        return len(self._jobs) <= 1

    async def wait_for_change(self, timeout_s: float) -> None:
        """Waits until a job leaves or is cleared, for at most `timeout_s`."""
        self._has_changed.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._has_changed.wait()
