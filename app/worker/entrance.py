"""Brings prepared jobs into the engine: at once, in turn, or once policy `auto` has chosen.

Waits: for a job's turn and for the engine, until the job's deadline (`app.worker.lease_keeper` ends
the wait). While Redis is down nothing can be chosen, because a choice is stored before any token is
produced. So from the first choice that fails until one is stored, jobs with a known compression do
not wait for others.
"""

import asyncio
import time

from app.errors import DeadlineUnreachableError, StoreUnavailableError
from app.messages import CompressionChoice
from app.metrics import WorkerMetrics
from app.store.client import RETRY_AFTER_S
from app.store.job_leases import JobLeases
from app.worker.choice_request import ChoiceRequest
from app.worker.choosing_line import ChoosingLine
from app.worker.engine_thread import EngineThread
from app.worker.publisher import Publisher
from app.worker.running_jobs import RunningJob, RunningJobs
from dycoke_core.auto import AutoConfig, Choice, resolved_compression
from dycoke_core.config import CompressionConfig
from dycoke_core.sequence import Sequence

DEADLINE_MARGIN = 2.0  # how much faster than predicted a first token may come


class Entrance:
    def __init__(
        self,
        leases: JobLeases,
        engine: EngineThread,
        publisher: Publisher,
        jobs: RunningJobs,
        metrics: WorkerMetrics,
    ) -> None:
        self._leases = leases
        self._engine = engine
        self._publisher = publisher
        self._jobs = jobs
        self._metrics = metrics
        self._line = ChoosingLine()

    def note_taken(self, job: RunningJob) -> None:
        """Notes that a job no longer waits in Redis, and what its delivery says of those that do.
        Choices count it from now on, while it is prepared as well. `note_left` has to follow."""
        self._line.note_taken(job)

    def note_left(self, job: RunningJob) -> None:
        """Notes that the engine has got a job that was taken, or never will."""
        self._line.note_left(job)

    async def add(self, job: RunningJob, sequence: Sequence) -> None:
        """Raises DycokeError: the engine does not take the sequence, or not in time."""
        compression = resolved_compression(job.delivery.request.compression)
        if isinstance(compression, CompressionConfig):
            sequence.compression = compression
            await self._add_in_turn(job, sequence)
        elif (choice := job.delivery.choice) is not None:  # of an earlier attempt
            self._publisher.tell_choice(job, choice)
            sequence.compression = CompressionConfig.parse(choice.compression)
            await self._add_in_turn(job, sequence)
        else:
            await self._add_by_choice(job, sequence, compression)

    async def _add_by_choice(self, job: RunningJob, sequence: Sequence, config: AutoConfig) -> None:
        """While Redis is away, chooses again and again: a choice that could not be stored is soon
        out of date.
        """
        request = ChoiceRequest(
            sequence,
            config,
            lambda: self._line.outlook(job),
            accepted_at_s=job.delivery.request.accepted_at_s,
            queued_at_s=job.delivery.waits_since_s,
        )
        while True:
            try:
                return await self._add_as_chosen(job, request)
            except StoreUnavailableError:
                self._line.note_store(can_choose=False)
                await asyncio.sleep(RETRY_AFTER_S)

    async def _add_as_chosen(self, job: RunningJob, request: ChoiceRequest) -> None:
        """With a cached prefix it costs only its question, so it waits for no other choice."""

        async def passes() -> bool:
            return await self._engine.choose_cached(request)

        if await passes():
            await self._note_and_add(job, request)
        else:
            async with self._line.turn(job, request.prefix_keys, passes):
                await self._note_and_add(job, request)

    async def _note_and_add(self, job: RunningJob, request: ChoiceRequest) -> None:
        """Raises StoreUnavailableError: the choice may not have been stored; nothing was added."""
        chosen = request.cached or await self._engine.choose_compression(request)
        noted = await self._leases.choose(job.delivery, _message(chosen))
        self._line.note_store(can_choose=True)
        if noted is None:
            self._jobs.drop(job)  # cancels this task
            await asyncio.sleep(0)
            return
        self._line.note(noted.queue)
        self._metrics.count_choice(noted.choice)
        self._publisher.tell_choice(job, noted.choice)
        request.sequence.compression = CompressionConfig.parse(noted.choice.compression)
        await self._add(job, request.sequence)

    async def _add_in_turn(self, job: RunningJob, sequence: Sequence) -> None:
        """Keeps arrival order after jobs that wait for a choice, unless its prefix is cached."""
        if self._line.is_empty_for(job):
            await self._add(job, sequence)
            return
        prefix_key = await self._engine.prefix_key(sequence)

        async def passes() -> bool:
            has_video = sequence.frames is not None  # otherwise there is hardly a prefix to share
            return has_video and await self._engine.has_prefix(prefix_key)

        if await passes():
            await self._add(job, sequence)
        else:
            async with self._line.turn(job, frozenset({prefix_key}), passes, is_chosen_for=False):
                await self._add(job, sequence)

    async def _add(self, job: RunningJob, sequence: Sequence) -> None:
        """Raises DeadlineUnreachableError: the answer would be late and would cost other jobs time.

        An engine that has nothing else to do tries in any case: predictions that were wrong are
        put right by that alone.
        """
        has_others = len(self._jobs) > 1
        if has_others and job.has_own_deadline and job.first_token_at_s is None:
            predicted_s = await self._engine.predict_first_token_s(sequence)
            left_s = job.deadline_at_s - time.time()
            if predicted_s is not None and predicted_s / DEADLINE_MARGIN > left_s:
                raise DeadlineUnreachableError(
                    "the first token would come after 'deadline_s'", retry_after_s=1
                )
        self._line.note_prefix(await self._engine.add(sequence))


def _message(choice: Choice) -> CompressionChoice:
    return CompressionChoice(
        compression=choice.compression.as_dict(),
        level=choice.level,
        reason=choice.reason,
        predicted_ttft_s=choice.predicted_ttft_s,
    )
