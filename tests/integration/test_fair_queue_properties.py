"""Random histories of a queue: no job is lost, none is answered twice, no key starves, and no
priority of a key.

What may happen: keys ask, workers take, die before or after they have a job, come back with what is
no longer theirs, hand back and answer; clients cancel; sweeps run in between.
"""

import asyncio
import uuid
from collections import Counter
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.keys.limits import NO_LIMITS
from app.messages import JobState
from app.store.client import connect
from app.store.job_leases import Append, Delivery
from app.store.job_queue import JobQueue
from app.store.keys import RedisKeys
from app.store.owner_limits import Allowance
from dycoke_core.config import PRIORITIES, Priority
from tests.integration.api import receipt
from tests.integration.conftest import RedisServer
from tests.integration.jobs import LEASE_S, MODEL, cancelled, leases_of, make_request, with_frames

OWNERS = ("a", "b", "c")
WORKERS = ("worker-0", "worker-1")
MAX_TAKEN_BEFORE = 2  # of another key with jobs of the same cost, while one waits


MAX_TURNS = 5  # of its owner's, until the oldest job is served


bursts = st.tuples(st.sampled_from(OWNERS), st.integers(1, 6), st.sampled_from(PRIORITIES))
ask = st.tuples(st.just("ask"), bursts)
serve = st.tuples(st.just("serve"), st.integers(1, 6))
by_worker = st.tuples(st.sampled_from(("take", "take", "claim", "die")), st.sampled_from(WORKERS))
of_delivery = st.tuples(st.sampled_from(("answer", "answer", "hand_back")), st.integers(0, 30))
cancel = st.tuples(st.just("cancel"), st.integers(0, 30))
sweep = st.tuples(st.just("sweep"), st.none())
histories = st.lists(st.one_of(ask, serve, by_worker, of_delivery, cancel, sweep), max_size=30)
ask_of_one = st.tuples(
    st.just("ask"),
    st.tuples(st.just("a"), st.integers(1, 9), st.sampled_from(PRIORITIES)),
)
busy_histories = st.lists(st.one_of(ask_of_one, serve, cancel), min_size=5, max_size=12)


Operations = list[tuple[str, Any]]


class History:
    def __init__(self, url: str) -> None:
        self.redis = connect(url)
        self.keys = RedisKeys(f"test-{uuid.uuid4().hex[:12]}")
        self.queue = JobQueue(self.redis, self.keys, result_ttl_s=60)
        self.leases = {name: leases_of(self.redis, self.keys, name) for name in WORKERS}
        self.jobs: list[str] = []
        self.waiting: set[str] = set()  # such as no worker ever had
        self.deliveries: list[Delivery] = []
        self.holds: dict[str, Delivery] = {}  # job: the delivery that counts
        self.ends: Counter[str] = Counter()
        self.taken_before: dict[str, Counter[str]] = {}  # by owner, while it waits
        self.priorities: dict[str, Priority] = {}
        self.num_older: dict[str, int] = {}  # of its owner's, when it came
        self.num_turns: Counter[str] = Counter()  # of its owner, since it came

    # --- what may happen ---

    async def ask(self, burst: tuple[str, int, Priority]) -> None:
        owner, number, priority = burst
        for _ in range(number):
            await self.ask_once(owner, priority)

    async def ask_once(self, owner: str, priority: Priority) -> None:
        job_id = f"{owner}{len(self.jobs)}"
        fields = {"owner": owner, "priority": priority}
        request = make_request(job_id).model_copy(update=fields)
        num_places = 1 + len(self.jobs) % 3
        await self.queue.reserve(
            MODEL, job_id, max_jobs=1000, lease_s=30, owner=owner, num_places=num_places
        )
        await self.queue.create(request, allowance=Allowance(owner, NO_LIMITS, max_tokens=9))
        assert await self.queue.enqueue(with_frames(request))
        self.jobs.append(job_id)
        if not self.waits(owner):
            self.taken_before[owner] = Counter()
        self.waiting.add(job_id)
        self.priorities[job_id] = priority
        self.num_older[job_id] = sum(other[0] == owner for other in self.waiting) - 1

    async def take(self, worker: str) -> None:
        self.note(await self.leases[worker].take(block_s=0.001))

    async def serve(self, number: int) -> None:
        """Takes and answers."""
        for _ in range(number):
            num_deliveries = len(self.deliveries)
            await self.take(WORKERS[0])
            if len(self.deliveries) > num_deliveries:
                await self.answer(num_deliveries)

    async def claim(self, worker: str) -> None:
        """As if all leases had run out."""
        taken = await self.leases[worker].take_over(lease_s=0, may_be_suspect=True)
        self.note(taken)

    async def die(self, worker: str) -> None:
        """A worker reads an entry, and ends before it has a job for it."""
        await self.leases[worker].read_entry(0.001)

    async def answer(self, number: int) -> None:
        if self.deliveries:
            delivery = self.deliveries[number % len(self.deliveries)]
            leases = self.leases[delivery.worker_id]
            append = Append(delivery, [], receipt(delivery, 0))
            appended = (await leases.append([append]))[0]
            may = self.holds.get(delivery.job_id) is delivery
            has_said_so = delivery.job_id not in self.holds and appended.is_accepted  # repeated
            assert appended.is_accepted == may or has_said_so
            if may:
                self.end(delivery.job_id)

    async def hand_back(self, number: int) -> None:
        if self.deliveries:
            delivery = self.deliveries[number % len(self.deliveries)]
            may = self.holds.get(delivery.job_id) is delivery
            assert await self.leases[delivery.worker_id].hand_back(delivery, lease_s=LEASE_S) == may
            if may:
                del self.holds[delivery.job_id]

    async def cancel(self, number: int) -> None:
        if self.jobs:
            job_id = self.jobs[number % len(self.jobs)]
            ended = await self.queue.end(job_id, JobState.CANCELLED, cancelled(job_id))
            assert ended == (self.ends[job_id] == 0)
            if ended:
                self.end(job_id)

    async def sweep(self, _: None) -> None:
        await self.queue.sweep()

    # --- what must hold ---

    def waits(self, owner: str) -> bool:
        return any(job_id[0] == owner for job_id in self.waiting)

    def alike(self, job_id: str) -> list[str]:
        """Waiting jobs of the same owner and priority."""
        priority = self.priorities[job_id]
        return [i for i in self.waiting if i[0] == job_id[0] and self.priorities[i] == priority]

    def end(self, job_id: str) -> None:
        self.ends[job_id] += 1
        self.waiting.discard(job_id)
        self.holds.pop(job_id, None)

    def note(self, delivery: Delivery | None) -> None:
        if delivery is None:
            return
        job_id = delivery.job_id
        assert self.ends[job_id] == 0, "no worker gets a job that has ended"
        if job_id in self.waiting:
            self.note_fresh(job_id)
        self.deliveries.append(delivery)
        self.holds[job_id] = delivery

    def note_fresh(self, job_id: str) -> None:
        owner = job_id[0]
        first = min(self.alike(job_id), key=lambda other: int(other[1:]))
        assert job_id == first, "of one key and priority, first in, first out"
        for other in self.waiting:
            self.num_turns[other] += other[0] == owner
        self.waiting.remove(job_id)
        most = MAX_TURNS * (self.num_older[job_id] + 1)
        assert self.num_turns[job_id] <= most, f"{job_id} starves"
        self.taken_before[owner] = Counter()
        for other in OWNERS:
            if other != owner and self.waits(other):
                self.taken_before[other][owner] += 1
                assert self.taken_before[other][owner] <= MAX_TAKEN_BEFORE, f"{other} starves"

    async def drain(self) -> None:
        """All workers are lost; then others answer what is left, without faults."""
        self.holds.clear()
        async with asyncio.timeout(60):
            while sum(self.ends.values()) < len(self.jobs):
                await self.sweep(None)
                await self.claim(WORKERS[0])
                await self.take(WORKERS[0])
                for delivery in list(self.holds.values()):
                    await self.answer(self.deliveries.index(delivery))
        assert self.ends == Counter(self.jobs), "each job ends once"
        while await self.redis.xlen(self.keys.jobs(MODEL)):
            await self.claim(WORKERS[0])
            await self.take(WORKERS[0])
        places = (self.keys.place_owners, self.keys.owner_places, self.keys.more_places)
        counts = (self.keys.owner_jobs, *places)
        for key in (self.keys.order, self.keys.queued, self.keys.given, *counts):
            for name in (MODEL, *OWNERS):
                assert not await self.redis.exists(key(name))


async def live(url: str, history: Operations) -> None:
    lived = History(url)
    try:
        for leases in lived.leases.values():
            await leases.ensure_group()
        for kind, what in history:
            await getattr(lived, kind)(what)
        await lived.drain()
    finally:
        await lived.redis.aclose()


@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(histories)
def test_no_job_is_lost_or_answered_twice_and_no_key_starves(
    redis_server: RedisServer, history: Operations
) -> None:
    asyncio.run(live(redis_server.url, history))


@settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(busy_histories)
def test_no_priority_waits_longer_than_its_bound(
    redis_server: RedisServer, history: Operations
) -> None:
    asyncio.run(live(redis_server.url, history))
