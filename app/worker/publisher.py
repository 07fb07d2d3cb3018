"""Writes the engine's events to the event logs, in order, and notices when a job is lost.

One script call carries the events of all jobs. Steps that end during a call are gathered, and the
tokens that they add to a job share an event, so a slow store makes fewer events, not a longer
queue. All of this holds the GIL, which the engine's thread needs too: per token it must cost
microseconds (`python -m loadtest.path`).

While Redis is down the engine keeps running and the publisher retries. What gathers is bounded by
the running jobs' `max_tokens`, and each job's time by its deadline.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Sequence

from app.errors import (
    DeadlineExceededError,
    DeadlineUnreachableError,
    StoreUnavailableError,
)
from app.messages import CompressionChoice, DoneEvent, ErrorEvent, StatusEvent, TokenEvent
from app.metrics import WorkerMetrics
from app.store.client import RETRY_AFTER_S
from app.store.job_leases import Append, Appended, JobLeases
from app.store.kept_sets import KeptSets
from app.tracing import Tracing
from app.worker import engine_thread
from app.worker.receipt import make_done_event
from app.worker.running_jobs import RunningJob, RunningJobs
from dycoke_core import sequence as core
from dycoke_core.errors import DycokeError, EngineError

_DEADLINE_CODES = (DeadlineExceededError.code, DeadlineUnreachableError.code)

logger = logging.getLogger(__name__)


class Publisher:
    def __init__(
        self,
        leases: JobLeases,
        jobs: RunningJobs,
        metrics: WorkerMetrics,
        tracing: Tracing,
        kept_sets: KeptSets,
    ) -> None:
        self._leases = leases
        self._kept_sets = kept_sets
        self._jobs = jobs
        self._metrics = metrics
        self._tracing = tracing
        self._has_news = asyncio.Event()
        self._is_closed = False

    def publish(self, update: engine_thread.Update) -> None:
        """Takes the outcome of one engine step. Drops what belongs to no running attempt."""
        for change in update.stages:
            if (job := self._jobs.of_sequence(change.sequence_id)) and job.final is None:
                job.statuses.append(_status_event(change, job.choice))
        now_s = time.time()
        generated: Counter[str] = Counter()
        for event in update.tokens:
            if (job := self._jobs.of_sequence(event.sequence_id)) and job.final is None:
                generated[job.policy] += len(event.token_ids)
                self._take_event(job, event, now_s)
        for policy, number in generated.items():
            self._metrics.count_generated(policy, number)
        self._metrics.set_engine(update.stats)
        self._has_news.set()

    def tell_choice(self, job: RunningJob, choice: CompressionChoice) -> None:
        """Stores what policy `auto` chose, and publishes it at once."""
        job.take_choice(choice)
        self._has_news.set()

    def fail(self, job: RunningJob, error: DycokeError) -> None:
        """Ends a job with an error event after everything it has published."""
        if job.final is None:
            logger.warning("job failed", extra={**job.log_fields, "code": error.code})
            job.final = ErrorEvent.of(error, job.job_id)
            self._has_news.set()

    def close(self) -> None:
        """Lets `run` return as soon as nothing is left to publish."""
        self._is_closed = True
        self._has_news.set()

    async def run(self) -> None:
        """Appends until closed."""
        while True:
            self._has_news.clear()
            batch = [job for job in self._jobs if job.has_unsent]
            if batch:
                await self._send(batch)
            elif self._is_closed:
                return
            else:
                await self._has_news.wait()

    async def _send(self, batch: Sequence[RunningJob]) -> None:
        sent = [(job, append) for job in batch if (append := self._append(job)) is not None]
        try:
            for job in batch:
                await self._store_kept(job)
            replies = await self._leases.append([append for _, append in sent])
        except StoreUnavailableError:  # which the lease keeper logs
            await asyncio.sleep(RETRY_AFTER_S)
            return
        for (job, append), reply in zip(sent, replies, strict=True):
            self._take_reply(job, append, reply)

    async def _store_kept(self, job: RunningJob) -> None:
        """Before the job's end, so that a client that has seen the end finds it. A job that is no
        longer this worker's is refused, and its append says so."""
        if job.kept is not None:
            await self._kept_sets.put(job.delivery, job.kept)
            job.kept = None

    def _append(self, job: RunningJob) -> Append | None:
        """Isolates one job: if its events cannot be published, only this job fails."""
        try:
            return job.append()
        except Exception:
            logger.exception("an event could not be published", extra=job.log_fields)
            job.fresh.clear()
            job.final = None  # it would follow what is missing
            self._jobs.stop(job)
            self.fail(
                job, EngineError("the worker failed to publish the answer: post the request again")
            )
            return None

    def _take_reply(self, job: RunningJob, append: Append, reply: Appended) -> None:
        if not reply.is_accepted:
            if reply.error is not None:
                extra = {**job.log_fields, "error": reply.error}
                logger.error("the job store cannot take this job's events", extra=extra)
            self._jobs.drop(job)
            return
        job.next_index = reply.next_index
        if job.is_suspect and not reply.is_suspect:
            self._jobs.clear(job)
        last = append.events[-1] if append.events else None
        if isinstance(last, TokenEvent) and reply.next_index < last.next_index:
            return  # Redis had lost what came before: the next append sends it again
        if job.statuses:
            del job.statuses[: sum(isinstance(event, StatusEvent) for event in append.events)]
        if append.final is not None:
            logger.info("job ended", extra={**job.log_fields, "outcome": append.final.type})
            self._tracing.record_attempt(job.delivery, append.final)
            if isinstance(append.final, DoneEvent):
                self._metrics.observe_done(append.final)
            elif append.final.code in _DEADLINE_CODES and job.objective_s is not None:
                # Left out, a service that answers in time or not at all would look perfect.
                self._metrics.count_objective(is_met=job.has_begun_within(job.objective_s))
            self._jobs.remove(job)

    def _take_event(self, job: RunningJob, event: core.TokenEvent, now_s: float) -> None:
        """Isolates one job: an error here fails only this job."""
        if event.error is not None:
            self.fail(job, event.error)
            return
        if event.token_ids or event.text:
            if job.first_token_at_s is None:
                job.first_token_at_s = now_s
            job.fresh.append(event)
        if event.finish_reason is not None:
            try:
                job.final = self._done(job, event, now_s)
            except Exception:
                logger.exception("a receipt could not be made", extra=job.log_fields)
                self.fail(
                    job,
                    EngineError("the worker failed to publish the answer: post the request again"),
                )

    def _done(self, job: RunningJob, event: core.TokenEvent, now_s: float) -> DoneEvent:
        assert event.report is not None and event.finish_reason is not None
        if event.report.kept is not None:
            job.kept = event.report.kept.encode()
        event.report.text.encode()  # JSON requires that
        return make_done_event(
            job.delivery,
            event.report,
            choice=job.choice,
            finish_reason=event.finish_reason,
            first_token_at_s=job.first_token_at_s or now_s,
            ended_at_s=now_s,
        )


def _status_event(
    change: engine_thread.StageChange, choice: CompressionChoice | None
) -> StatusEvent:
    stage = "encoding" if change.stage is core.Stage.ENCODING else "prefilling"
    return StatusEvent(stage=stage, progress=change.progress, auto=choice)
