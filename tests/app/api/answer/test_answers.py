"""Answers to posts, streamed or whole: what each end gives back, cancels, follows and counts."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message

from app.api.answer.answers import Answer, Answers
from app.api.answer.jobs import Jobs
from app.api.answer.observer import Followers
from app.api.answer.sse import JobEvents
from app.api.connection.disconnect import ClientLeftError
from app.api.connection.drain import Drain
from app.api.connection.streams import StreamSlot
from app.api.post.cancelling import Cancellations
from app.api.post.submissions import PostedJob
from app.api.schemas import ChatFields
from app.keys.limits import LimitState
from app.messages import JobState
from app.metrics import ApiMetrics
from app.store.job_leases import Append, Delivery, JobLeases
from app.store.job_queue import JobQueue
from app.tracing import PostSpan
from tests.integration.api import receipt
from tests.integration.jobs import cancelled, finish, say, start, submit, token


class Slot:
    num_released = 0

    def release(self) -> None:
        self.num_released += 1


class Cancelling:
    """What would be cancelled in the background."""

    def __init__(self) -> None:
        self.started: list[tuple[str, bool]] = []

    def start(self, job_id: str, reason: str, *, unless_adopted: bool) -> None:
        self.started.append((job_id, unless_adopted))


class Client:
    """Who has asked, and may leave."""

    def __init__(self) -> None:
        self.has_left = asyncio.Event()
        self.sent: list[Message] = []

    async def receive(self) -> Message:
        await self.has_left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    @property
    def request(self) -> Request:
        return Request({"type": "http", "headers": []}, self.receive)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


class Desk:
    """Answers, and what they use."""

    def __init__(self, jobs: Jobs) -> None:
        self.registry = CollectorRegistry()
        self.drain, self.followers = Drain(), Followers(10)
        self.cancelling, self.slot, self.client = Cancelling(), Slot(), Client()
        self._answers = Answers(
            jobs,
            self.drain,
            ApiMetrics(self.registry),
            self.followers,
            cast(Cancellations, self.cancelling),
        )
        self._jobs = jobs

    async def answer(self, *, is_new: bool = True, has_key: bool = False, **fields: Any) -> Answer:
        record = await self._jobs.queue.get("j")
        posted = PostedJob(
            record,
            ChatFields(question="?", **fields),
            is_new=is_new,
            has_key=has_key,
            limit_states=(LimitState("jobs", "concurrent-requests", limit=4, left=3),),
        )
        span = PostSpan(None, None)
        return self._answers.to(posted, cast(StreamSlot, self.slot), span, JobEvents())

    async def whole(self, **options: Any) -> Response:
        answer = await self.answer(stream=False, **options)
        async with asyncio.timeout(30):
            return await answer.response(self.client.request)

    async def streamed(self, **options: Any) -> Response:
        """Sends the whole stream to the client."""
        response = await (await self.answer(**options)).response(self.client.request)
        async with asyncio.timeout(30):
            await response({"type": "http"}, self.client.receive, self.client.send)
        return response

    def ended(self, outcome: str) -> float:
        labels = {"model": "tiny", "policy": "full", "requested": "fixed", "outcome": outcome}
        return self.registry.get_sample_value("dycoke_requests_total", labels) or 0.0


@pytest.fixture
async def desk(jobs: Jobs) -> AsyncIterator[Desk]:
    desk = Desk(jobs)
    yield desk
    await desk.followers.aclose()


@pytest.fixture
async def delivery(queue: JobQueue, leases: JobLeases) -> Delivery:
    await submit(queue, "j")
    return await start(leases)


async def answered(leases: JobLeases, delivery: Delivery) -> None:
    await leases.append([Append(delivery, [token(0)], receipt(delivery, 1))])


async def test_an_answer_in_one_piece_is_its_receipt(
    desk: Desk, leases: JobLeases, delivery: Delivery
) -> None:
    await answered(leases, delivery)
    response = await desk.whole()
    assert response.status_code == 200 and response.headers["x-job-id"] == "j"
    assert json.loads(bytes(response.body))["usage"]["completion_tokens"] == 1
    assert response.headers["ratelimit"] == '"jobs";r=3'
    assert desk.slot.num_released == 1 and desk.ended("done") == 1
    assert desk.cancelling.started == []


async def test_a_failure_in_one_piece_is_a_problem(
    desk: Desk, leases: JobLeases, delivery: Delivery
) -> None:
    await finish(leases, delivery)
    response = await desk.whole()
    assert response.status_code == 500
    assert json.loads(bytes(response.body))["code"] == "x"
    assert desk.slot.num_released == 1 and desk.ended("x") == 1


async def test_a_stream_ends_with_its_job(
    desk: Desk, leases: JobLeases, delivery: Delivery
) -> None:
    await answered(leases, delivery)
    response = await desk.streamed()
    assert response.headers["ratelimit-policy"].startswith('"jobs";q=4')
    assert b"event: done" in desk.client.body
    assert desk.slot.num_released == 1 and desk.ended("done") == 1


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("on_disconnect", ["cancel", "continue"])
async def test_a_job_whose_client_leaves_is_followed_and_cancelled_unless_it_is_to_continue(
    stream: bool,
    on_disconnect: str,
    desk: Desk,
    queue: JobQueue,
    leases: JobLeases,
    delivery: Delivery,
) -> None:
    await say(leases, delivery, 0)
    desk.client.has_left.set()
    if stream:
        await desk.streamed(on_disconnect=on_disconnect)
    else:
        with pytest.raises(ClientLeftError):
            await desk.whole(on_disconnect=on_disconnect)
    expected = [("j", False)] if on_disconnect == "cancel" else []
    assert desk.cancelling.started == expected and desk.slot.num_released == 1
    assert desk.registry.get_sample_value("dycoke_client_disconnects_total") == 1
    await finish(leases, delivery)
    async with asyncio.timeout(30):
        while not desk.ended("x"):  # counted by the follower
            await asyncio.sleep(0.001)


async def test_a_repeated_request_counts_nothing_and_spares_what_others_have_found(
    desk: Desk, leases: JobLeases, delivery: Delivery
) -> None:
    desk.client.has_left.set()
    with pytest.raises(ClientLeftError):
        await desk.whole(is_new=False)
    assert desk.cancelling.started == [], "whoever posted it first has it still"
    desk.client.has_left.clear()
    await answered(leases, delivery)
    response = await desk.whole(is_new=False)
    assert response.status_code == 200 and desk.ended("done") == 0
    assert desk.slot.num_released == 2


async def test_a_job_that_a_retry_may_find_by_its_key_is_spared_if_one_has(
    desk: Desk, delivery: Delivery
) -> None:
    desk.client.has_left.set()
    await desk.streamed(has_key=True)
    assert desk.cancelling.started == [("j", True)]


async def test_a_process_that_ends_cancels_nothing(desk: Desk, delivery: Delivery) -> None:
    desk.drain.expire()
    response = await desk.whole()
    assert response.status_code == 503
    assert json.loads(bytes(response.body))["code"] == "shutting_down"
    assert response.headers["x-job-id"] == "j"
    assert desk.cancelling.started == [] and desk.ended("interrupted") == 1


async def test_a_job_that_was_cancelled_elsewhere_is_a_conflict(
    desk: Desk, queue: JobQueue, delivery: Delivery
) -> None:
    await queue.end("j", JobState.CANCELLED, cancelled("j"))
    response = await desk.whole()
    assert response.status_code == 409 and desk.ended("cancelled") == 1
