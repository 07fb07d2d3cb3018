"""What the publisher does with an engine's steps, in an outage, and with a job that fails."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import cast

from prometheus_client import CollectorRegistry

from app.errors import StoreUnavailableError
from app.messages import CompressionChoice, DoneEvent, ErrorEvent, StatusEvent, TokenEvent
from app.metrics import WorkerMetrics
from app.store.job_leases import Append, Appended, Delivery, JobLeases
from app.store.kept_sets import KeptSets
from app.tracing import Tracing
from app.worker.engine_thread import Update
from app.worker.publisher import Publisher
from app.worker.running_jobs import RunningJob, RunningJobs
from dycoke_core import sequence as core
from dycoke_core.auto import Reason
from tests.engine_stats import ONE_RUNNING
from tests.integration.api import until
from tests.integration.fake_engine import make_report
from tests.integration.jobs import make_request, with_frames


class FakeLeases:
    """Takes what is appended, unless it is down; refuses the jobs that a test names."""

    def __init__(self) -> None:
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.is_away = False
        self.broken: set[str] = set()
        self.calls: list[Sequence[Append]] = []
        self.log: dict[str, list[object]] = {}

    async def append(self, appends: Sequence[Append]) -> list[Appended]:
        self.calls.append(appends)
        await self.may_answer.wait()
        if self.is_away:
            raise StoreUnavailableError("away")
        return [self._take(append) for append in appends]

    def _take(self, append: Append) -> Appended:
        job_id = append.delivery.job_id
        if job_id in self.broken:
            return Appended(is_accepted=False, next_index=0, error="WRONGTYPE")
        log = self.log.setdefault(job_id, [])
        log += append.events
        log += [append.final] if append.final else []
        return Appended(is_accepted=True, next_index=next_index(log))


def next_index(log: Sequence[object]) -> int:
    return max([e.next_index for e in log if isinstance(e, TokenEvent)], default=0)


class FakeKeptSets:
    """Notes what is stored, and how many appends came before it."""

    def __init__(self, leases: FakeLeases) -> None:
        self.stored: list[tuple[str, bytes, int]] = []
        self._leases = leases

    async def put(self, delivery: Delivery, blob: bytes) -> bool:
        if self._leases.is_away:
            raise StoreUnavailableError("away")
        self.stored.append((delivery.job_id, blob, len(self._leases.calls)))
        return True


class Running:
    def __init__(self, *job_ids: str) -> None:
        self.leases = FakeLeases()
        self.aborted: list[str] = []
        self.jobs = RunningJobs(self.aborted.append)
        self.jobs.max_jobs = len(job_ids)
        for job_id in job_ids:
            self.jobs.add(RunningJob.of(delivery_of(job_id)))
        metrics = WorkerMetrics(CollectorRegistry(), model="tiny")
        leases = cast(JobLeases, self.leases)
        self.kept = FakeKeptSets(self.leases)
        kept = cast(KeptSets, self.kept)
        self.publisher = Publisher(leases, self.jobs, metrics, Tracing(), kept)

    def step(self, index: int, text: str = "x", *, is_last: bool = False) -> None:
        """One token for each job."""
        events = [
            core.TokenEvent(
                sequence_id=job.sequence_id,
                index=index,
                token_ids=(index,),
                text=text if job.job_id == "a" else "x",
                finish_reason=core.FinishReason.LENGTH if is_last else None,
                report=make_report(list(range(index + 1))) if is_last else None,
            )
            for job in self.jobs
        ]
        self.publisher.publish(Update(events, [], ONE_RUNNING))

    def token_ids(self, job_id: str) -> list[int]:
        events = self.leases.log.get(job_id, [])
        return [i for event in events if isinstance(event, TokenEvent) for i in event.token_ids]


def delivery_of(job_id: str) -> Delivery:
    return Delivery(
        job_id=job_id,
        entry_id="1-0",
        worker_id="w",
        attempt=1,
        request=with_frames(make_request(job_id)),
        published=(),
        queued_at_s=0.0,
        started_at_s=0.0,
        first_token_at_s=None,
        is_suspect=False,
        sampler_version=None,
    )


@asynccontextmanager
async def running(*job_ids: str) -> AsyncIterator[Running]:
    worker = Running(*job_ids)
    task = asyncio.create_task(worker.publisher.run())
    try:
        yield worker
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_one_call_carries_a_step_of_all_jobs() -> None:
    async with running("a", "b", "c") as worker:
        worker.step(0)
        await until(lambda: worker.token_ids("c") == [0])
        assert [len(appends) for appends in worker.leases.calls] == [3]


async def test_tokens_that_come_during_a_call_share_an_event() -> None:
    async with running("a") as worker:
        worker.leases.may_answer.clear()
        worker.step(0)
        await until(lambda: worker.leases.calls)
        for index in (1, 2, 3):
            worker.step(index)
        worker.leases.may_answer.set()
        await until(lambda: worker.token_ids("a") == [0, 1, 2, 3])
        assert len(worker.leases.log["a"]) == 2


async def test_a_choice_is_told_although_the_engine_does_nothing() -> None:
    choice = CompressionChoice(
        compression={"policy": "full"}, level=0, reason=Reason.OBJECTIVE, predicted_ttft_s=1.0
    )
    async with running("a") as worker:
        await asyncio.sleep(0)  # it finds nothing to say
        (job,) = worker.jobs
        worker.publisher.tell_choice(job, choice)
        await until(lambda: worker.leases.log.get("a"))
        assert worker.leases.log["a"] == [StatusEvent(stage="encoding", auto=choice)]
        assert job.policy == "full"


async def test_outage_loses_and_repeats_nothing() -> None:
    async with running("a", "b") as worker:
        worker.leases.is_away = True
        for index in range(3):
            worker.step(index)
            await asyncio.sleep(0)
        await until(lambda: worker.leases.calls)
        worker.leases.is_away = False
        worker.step(3, is_last=True)
        await until(lambda: len(worker.jobs) == 0)
        for job_id in ("a", "b"):
            assert worker.token_ids(job_id) == [0, 1, 2, 3]
            assert isinstance(worker.leases.log[job_id][-1], DoneEvent)


async def test_text_that_cannot_be_published_fails_its_job_alone() -> None:
    async with running("a", "b") as worker:
        worker.step(0)
        worker.step(1, text="\ud800", is_last=True)
        await until(lambda: len(worker.jobs) == 0)
        assert isinstance(worker.leases.log["a"][-1], ErrorEvent)
        assert worker.aborted == ["a#1"]
        assert isinstance(worker.leases.log["b"][-1], DoneEvent)
        assert worker.token_ids("b") == [0, 1]


async def test_job_that_the_store_cannot_take_is_dropped_alone() -> None:
    async with running("a", "b") as worker:
        worker.leases.broken.add("a")
        worker.step(0)
        await until(lambda: worker.jobs.get("a") is None)
        worker.step(1)
        await until(lambda: worker.token_ids("b") == [0, 1])
        assert worker.aborted == ["a#1"]
