"""Which model a request is for, and a place's lease: kept up, lost, given up, handed over."""

import asyncio
from typing import cast

import pytest
from redis.asyncio import Redis

from app.api.post.places import Admitted, Place, choose_model, served_models
from app.errors import ModelNotFoundError, NoWorkerError, QueueFullError, StoreUnavailableError
from app.store.job_queue import JobQueue
from app.store.keys import RedisKeys
from app.store.worker_registry import WorkerRegistry
from app.video_store import VideoLease
from dycoke_core.errors import InvalidRequestError
from tests.cards import model_card
from tests.integration.jobs import MODEL

LEASE_S = 60.0
CARDS = {name: model_card(model=name) for name in ("a", "b")}


def test_the_only_model_needs_no_name() -> None:
    assert choose_model({"a": CARDS["a"]}, None) is CARDS["a"]
    assert choose_model(CARDS, "b") is CARDS["b"]


def test_one_of_several_has_to_be_named_and_served() -> None:
    with pytest.raises(InvalidRequestError, match="a, b"):
        choose_model(CARDS, None)
    with pytest.raises(ModelNotFoundError, match="a, b"):
        choose_model(CARDS, "c")


async def test_a_model_has_one_card_however_many_workers_serve_it(
    redis: Redis, keys: RedisKeys
) -> None:
    registry = WorkerRegistry(redis, keys)
    with pytest.raises(NoWorkerError):
        await served_models(registry)
    for worker_id, model in (("w2", "a"), ("w1", "a"), ("w3", "b")):
        await registry.publish(model_card(worker_id, model=model), 60)
    served = await served_models(registry)
    assert list(served) == ["a", "b"]
    assert (served["a"].worker_id, served["b"].worker_id) == ("w1", "w3")


async def reserved(queue: JobQueue, job_id: str, *, max_jobs: int = 1) -> Place:
    return await Place.reserve(
        queue, MODEL, job_id, owner="o", num_places=1, max_jobs=max_jobs, lease_s=LEASE_S
    )


async def test_a_place_that_is_given_up_is_the_next_ones(queue: JobQueue) -> None:
    place = await reserved(queue, "first")
    with pytest.raises(QueueFullError):
        await reserved(queue, "second")
    await place.release()
    await (await reserved(queue, "second")).release()
    assert (await queue.depth(MODEL)).waiting == 0


class Renewals:
    """A queue whose renewals end as a test says."""

    def __init__(self, *outcomes: bool | Exception) -> None:
        self.outcomes = list(outcomes)
        self.leases_s: list[float] = []
        self.num_releases = 0

    async def renew_place(self, model: str, job_id: str, *, lease_s: float) -> bool:
        self.leases_s.append(lease_s)
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def release(self, model: str, job_id: str) -> None:
        self.num_releases += 1
        raise StoreUnavailableError("away")


def held(renewals: Renewals, *, lease_s: float = 0.003) -> Place:
    return Place.held(cast(JobQueue, renewals), MODEL, "j", lease_s=lease_s)


async def test_a_lease_is_renewed_through_an_outage_until_it_is_lost() -> None:
    lost = asyncio.Event()
    renewals = Renewals(True, StoreUnavailableError("away"), True, False)
    held(renewals).when_lost(lost.set)
    async with asyncio.timeout(30):
        await lost.wait()
    assert renewals.leases_s == [0.003] * 4 and not renewals.outcomes


async def test_nobody_renews_what_has_been_given_up() -> None:
    renewals = Renewals()
    place = held(renewals)
    await place.release()  # Redis is away: the lease runs out by itself
    await asyncio.sleep(0.01)
    assert renewals.num_releases == 1 and not renewals.leases_s


async def test_an_abandoned_lease_ends_at_once_whether_redis_answers_or_not() -> None:
    for outcome in (True, StoreUnavailableError("away")):
        renewals = Renewals(outcome)
        await held(renewals, lease_s=LEASE_S).abandon()
        assert renewals.leases_s == [0.0]


class Video:
    def __init__(self) -> None:
        self.num_releases = 0

    def release(self) -> None:
        self.num_releases += 1


async def test_what_a_refused_request_holds_is_given_back(queue: JobQueue) -> None:
    video = Video()
    with pytest.raises(InvalidRequestError):
        async with Admitted() as admitted:
            admitted.hold(cast(VideoLease, video))
            admitted.take(await reserved(queue, "j"))
            assert admitted.job_id == "j"
            raise InvalidRequestError("after all")
    assert video.num_releases == 1 and (await queue.depth(MODEL)).waiting == 0


async def test_what_is_handed_over_is_the_takers(queue: JobQueue) -> None:
    video = Video()
    async with Admitted() as admitted:
        admitted.hold(cast(VideoLease, video))
        admitted.take(await reserved(queue, "j"))
        place = admitted.hand_over()
    assert video.num_releases == 0 and (await queue.depth(MODEL)).waiting == 1
    await place.release()
    assert (await queue.depth(MODEL)).waiting == 0


async def test_a_forsaken_place_is_the_jobs_and_the_video_goes(queue: JobQueue) -> None:
    video = Video()
    async with Admitted() as admitted:
        admitted.hold(cast(VideoLease, video))
        admitted.take(await reserved(queue, "j"))
        await admitted.forsake()
    assert video.num_releases == 1 and (await queue.depth(MODEL)).waiting == 1
    await queue.release(MODEL, "j")
