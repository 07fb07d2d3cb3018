"""What a worker maintains besides its jobs: leases, deadlines, its card, news of ended jobs."""

import asyncio

from redis.asyncio import Redis

from app.messages import DoneEvent, ErrorEvent
from app.settings import Settings
from app.store.forgotten_videos import ForgottenVideos
from app.store.keys import RedisKeys
from tests.app.worker.conftest import LEASE_S
from tests.integration.conftest import RedisServer
from tests.integration.fake_engine import answer
from tests.integration.workers import (
    Client,
    client_of,
    running,
    token_ids,
    wait_until,
)


async def test_cancelled_running_job_leaves_the_engine_at_once(
    settings: Settings, client: Client
) -> None:
    async with running(settings) as worker:
        job_id = await client.ask("sleep:0.02", max_tokens=4000)
        neighbour = await client.ask("sleep:0.02 too", max_tokens=40)
        await client.wait_for_token(job_id, 2)
        assert await client.cancel(job_id)
        sequence = worker.engine.sequences[f"{job_id}#1"]
        num_tokens = len(sequence.output_token_ids)

        async def is_gone() -> bool:
            return f"{job_id}#1" not in worker.engine.sequences

        await wait_until(is_gone)
        # Not by the next renewal, but by the channel: well before a lease is over.
        assert len(sequence.output_token_ids) - num_tokens < LEASE_S / 3 / 0.02
        assert token_ids(await client.events(neighbour)) == answer("sleep:0.02 too", 40)
        *_, last = await client.events(job_id)
        assert isinstance(last, ErrorEvent) and last.code == "cancelled"


async def test_deadline_ends_a_running_job(settings: Settings, client: Client) -> None:
    async with running(settings) as worker:
        job_id = await client.ask("sleep:0.02", max_tokens=4000, timeout_s=0.5)
        *_, last = await client.events(job_id)
        assert isinstance(last, ErrorEvent)
        assert (last.code, last.retryable) == ("deadline_exceeded", True)

        async def is_gone() -> bool:
            return f"{job_id}#1" not in worker.engine.sequences

        await wait_until(is_gone)


async def test_engine_is_told_of_deleted_videos(
    settings: Settings, client: Client, redis: Redis, keys: RedisKeys
) -> None:
    async with running(settings) as worker:
        await client.wait_for_workers(1)
        await ForgottenVideos(redis, keys).forget("video")
        await wait_until(lambda: asyncio.sleep(0, worker.engine.forgotten == ["video"]))


async def test_card_is_there_while_the_worker_takes_jobs(
    settings: Settings, client: Client
) -> None:
    async with running(settings) as worker:
        await client.wait_for_workers(1)
        (card,) = await client.registry.cards()
        assert (card.worker_id, card.model, card.image_size) == ("worker-a", "dycoke-tiny", 8)
        await worker.stop()
        assert await client.registry.cards() == []


async def test_redis_restart_in_mid_answer_loses_nothing(
    own_redis_server: RedisServer, keys: RedisKeys
) -> None:
    settings = Settings(redis_url=own_redis_server.url, redis_prefix=keys.prefix, lease_s=LEASE_S)
    async with client_of(settings) as client, running(settings) as worker:
        job_id = await client.ask("sleep:0.02", max_tokens=100)
        await client.wait_for_token(job_id, 5)
        own_redis_server.stop()
        await asyncio.sleep(2 * LEASE_S)  # longer than a lease
        own_redis_server.start()
        events = await client.events(job_id)
        assert token_ids(events) == answer("sleep:0.02", 100)
        done = events[-1]
        assert isinstance(done, DoneEvent) and done.attempts == 1
        # The channel, too, is listened to again.
        job_id = await client.ask("sleep:0.02", max_tokens=4000)
        await client.wait_for_token(job_id, 2)
        await client.cancel(job_id)

        async def is_gone() -> bool:
            return not worker.engine.sequences

        await wait_until(is_gone)


async def test_redis_that_lost_its_last_writes_is_told_them_again(
    settings: Settings, client: Client, redis: Redis, keys: RedisKeys
) -> None:
    async with running(settings):
        job_id = await client.ask("sleep:0.02", max_tokens=60)
        await client.wait_for_token(job_id, 10)
        # As if the last second of the append-only file had been lost.
        async with redis.pipeline(transaction=True) as pipeline:
            pipeline.hset(keys.job(job_id), mapping={"next_index": 4, "sequence": 0})
            pipeline.eval(
                "local newer = redis.call('XRANGE', KEYS[1], '5-0', '+') "
                "for _, entry in ipairs(newer) do redis.call('XDEL', KEYS[1], entry[1]) end "
                "redis.call('XSETID', KEYS[1], '4-0')",
                1,
                keys.events(job_id),
            )
            await pipeline.execute()
        events = await client.events(job_id)
    assert token_ids(events) == answer("sleep:0.02", 60)


async def test_redis_that_lost_everything_gets_its_group_back(
    own_redis_server: RedisServer, keys: RedisKeys
) -> None:
    settings = Settings(redis_url=own_redis_server.url, redis_prefix=keys.prefix, lease_s=LEASE_S)
    async with client_of(settings) as client, running(settings) as worker:
        job_id = await client.ask("sleep:0.02", max_tokens=4000)
        await client.wait_for_token(job_id, 2)
        await client.redis.flushall()

        async def is_gone() -> bool:
            return not worker.engine.sequences

        await wait_until(is_gone)
        job_id = await client.ask("why?")
        assert token_ids(await client.events(job_id)) == answer("why?", 8)
        await client.wait_for_workers(1)
