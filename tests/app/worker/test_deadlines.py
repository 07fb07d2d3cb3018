"""Deadlines in a worker: jobs that it ends because their first token would come too late."""

from app.messages import DoneEvent, ErrorEvent
from app.settings import Settings
from dycoke_core.auto import AutoConfig
from tests.integration.workers import Client, running, wait_until


async def test_a_first_token_that_cannot_come_in_time_ends_the_job(
    settings: Settings, client: Client
) -> None:
    async with running(settings) as worker:
        long = await client.ask("sleep:0.05", max_tokens=4000, timeout_s=600)
        await client.wait_for_token(long, 0)
        worker.engine.first_token_s = 1300.0
        late = await client.ask("why?", timeout_s=600, deadline_s=600)
        *_, last = await client.events(late)
        assert isinstance(last, ErrorEvent)
        assert (last.code, last.retryable) == ("deadline_unreachable", True)
        for in_time in (
            await client.ask("the server's own deadline", timeout_s=600),
            await client.ask("twice as fast would do", timeout_s=900, deadline_s=900),
        ):
            assert isinstance((await client.events(in_time))[-1], DoneEvent)
        worker.engine.first_token_s = None
        unknown = await client.ask("nobody knows", timeout_s=600, deadline_s=600)
        assert isinstance((await client.events(unknown))[-1], DoneEvent)
        assert late not in {s.sequence_id.partition("#")[0] for s in worker.engine.seen}
        assert await client.cancel(long)


async def test_an_engine_without_other_jobs_tries_whatever_is_predicted(
    settings: Settings, client: Client
) -> None:
    async with running(settings) as worker:
        worker.engine.first_token_s = 10_000.0
        job_id = await client.ask("why?", deadline_s=60)
        assert isinstance((await client.events(job_id))[-1], DoneEvent)


async def test_a_job_whose_first_token_is_there_is_not_given_up(
    settings: Settings, hasty: Settings, client: Client
) -> None:
    """It moves to a worker that could not begin it in time."""
    async with running(hasty) as worker:
        job_id = await client.ask("sleep:0.02", max_tokens=100, timeout_s=600, deadline_s=600)
        await client.wait_for_token(job_id, 3)
        assert await worker.stop()
    long = await client.ask("sleep:0.02 too", max_tokens=4000, timeout_s=600)
    async with running(settings, "worker-b") as other:
        other.engine.first_token_s = 10_000.0
        *_, last = await client.events(job_id)
        assert isinstance(last, DoneEvent) and last.attempts == 2
        assert await client.cancel(long)


async def test_a_job_that_is_taken_after_its_deadline_never_reaches_the_engine(
    settings: Settings, client: Client
) -> None:
    job_id = await client.ask("why?", timeout_s=-0.1)
    async with running(settings) as worker:
        *_, last = await client.events(job_id)
        assert isinstance(last, ErrorEvent) and last.code == "deadline_exceeded"
        assert not worker.engine.seen


async def test_jobs_of_auto_that_end_at_their_deadline_have_missed_their_objective(
    settings: Settings, client: Client
) -> None:
    """Else the share of those that met it would rise with every one that is given up."""
    overdue = await client.ask("why?", timeout_s=-0.1, compression=AutoConfig().as_dict())
    fixed = await client.ask("why?", timeout_s=-0.1)
    async with running(settings) as worker:
        for job_id in (overdue, fixed):
            *_, last = await client.events(job_id)
            assert isinstance(last, ErrorEvent) and last.code == "deadline_exceeded"
        long = await client.ask("sleep:0.05", max_tokens=4000, timeout_s=600)
        await client.wait_for_token(long, 0)
        worker.engine.first_token_s = 1300.0
        late = await client.ask(
            "why?", timeout_s=600, deadline_s=600, compression=AutoConfig().as_dict()
        )
        *_, last = await client.events(late)
        assert isinstance(last, ErrorEvent) and last.code == "deadline_unreachable"

        async def are_counted() -> bool:
            return worker.metric("auto_objectives_total", met="false") == 2

        await wait_until(are_counted)
        assert worker.metric("auto_objectives_total", met="true") == 0
        assert await client.cancel(long)
