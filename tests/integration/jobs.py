"""Jobs as the tests make them, and the steps from one state to the next."""

import asyncio
import time

from redis.asyncio import Redis

from app.errors import JobCancelledError
from app.messages import ErrorEvent, FramesRef, JobRequest, TokenEvent, Turn
from app.store.event_log import EventLog
from app.store.job_leases import Append, Delivery, JobLeases
from app.store.job_queue import JobQueue
from app.store.keys import GROUP, RedisKeys

MODEL = "tiny"
LEASE_S = 0.3


def make_request(job_id: str, *, timeout_s: float = 60.0, model: str = MODEL) -> JobRequest:
    now = time.time()
    return JobRequest(
        job_id=job_id,
        model=model,
        video_id="video",
        messages=[Turn(role="user", content="What happens?")],
        max_tokens=8,
        temperature=0.0,
        top_p=1.0,
        seed=0,
        stop=[],
        compression={"policy": "full"},
        weights_digest="w",
        dtype="float32",
        prefill_chunk_tokens=64,
        accepted_at_s=now,
        deadline_at_s=now + timeout_s,
    )


def with_frames(request: JobRequest) -> JobRequest:
    frames = FramesRef(
        digest="frames",
        num_frames=1,
        image_size=8,
        indices=[0],
        timestamps_s=[0.0],
        reader="decord",
        is_cached=False,
    )
    return request.model_copy(update={"frames": frames})


def token(index: int) -> TokenEvent:
    return TokenEvent(index=index, text=f"t{index} ", token_ids=[100 + index])


def leases_of(redis: Redis, keys: RedisKeys, worker_id: str, *, model: str = MODEL) -> JobLeases:
    return JobLeases(redis, keys, model=model, worker_id=worker_id, result_ttl_s=60)


async def submit(queue: JobQueue, job_id: str, *, timeout_s: float = 60.0) -> JobRequest:
    request = make_request(job_id, timeout_s=timeout_s)
    await queue.reserve(MODEL, job_id, max_jobs=100, lease_s=30)
    assert (await queue.create(request)).job_id == job_id
    request = with_frames(request)
    assert await queue.enqueue(request)
    return request


async def take(leases: JobLeases) -> Delivery:
    delivery = await leases.take(block_s=5)
    assert delivery is not None
    return delivery


async def take_over(leases: JobLeases, *, may_be_suspect: bool = True) -> Delivery:
    """Waits until a lease has run out."""
    while True:
        delivery = await leases.take_over(lease_s=LEASE_S, may_be_suspect=may_be_suspect)
        if delivery:
            return delivery
        await asyncio.sleep(0.02)


def cancelled(job_id: str) -> ErrorEvent:
    return ErrorEvent.of(JobCancelledError("cancelled"), job_id)


async def say(leases: JobLeases, delivery: Delivery, *indices: int) -> tuple[bool, int]:
    appended = (await leases.append([Append(delivery, [token(i) for i in indices])]))[0]
    return appended.is_accepted, appended.next_index


async def start(leases: JobLeases) -> Delivery:
    """Takes the next job and gives it to an engine."""
    delivery = await take(leases)
    assert await leases.enter(delivery)
    return delivery


async def finish(leases: JobLeases, delivery: Delivery) -> bool:
    final = ErrorEvent(code="x", message="x", retryable=False, job_id=delivery.job_id)
    return (await leases.append([Append(delivery, [], final)]))[0].is_accepted


async def event_types(log: EventLog, job_id: str) -> list[tuple[str, str]]:
    return [(e.id, e.event.type) for e in await log.read(job_id)]


async def entries(redis: Redis, keys: RedisKeys) -> tuple[int, int]:
    """How many entries the stream has, and how many of them are pending."""
    stream = keys.jobs(MODEL)
    return await redis.xlen(stream), (await redis.xpending(stream, GROUP))["pending"]
