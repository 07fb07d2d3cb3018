"""What one job's events become in the metrics, and who follows a job whose client has left."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry

from app.api.answer.feed import FeedItem, JobFeed
from app.api.answer.observer import Followers, JobObserver
from app.messages import CompressionChoice, DoneEvent, ErrorEvent, JobRequest, StatusEvent
from app.metrics import ApiMetrics
from app.store.job_leases import Delivery
from app.tracing import PostSpan
from dycoke_core.auto import DEFAULT_LADDER, AutoConfig
from tests.integration.api import receipt, token
from tests.integration.jobs import make_request, with_frames

FULL = {"policy": "full"}
CHOICE = CompressionChoice(
    compression=DEFAULT_LADDER[1].as_dict(), level=1, reason="objective", predicted_ttft_s=0.5
)


class Seen:
    """A job's observer, and the metrics that it writes."""

    def __init__(self, compression: dict[str, Any], **fields: Any) -> None:
        self.registry = CollectorRegistry()
        self.request = with_frames(make_request("j")).model_copy(
            update={"compression": compression, **fields}
        )
        self.observer = JobObserver(ApiMetrics(self.registry), self.request, PostSpan(None, None))

    def see(self, *events: Any) -> None:
        for event in events:
            self.observer.see(FeedItem.of(event, "1-0"))

    def outcomes(self) -> dict[tuple[str, str], float]:
        """Jobs that have ended, by policy and outcome."""
        samples = (
            sample
            for family in self.registry.collect()
            for sample in family.samples
            if sample.name == "dycoke_requests_total" and sample.value
        )
        return {(s.labels["policy"], s.labels["outcome"]): s.value for s in samples}

    def value(self, name: str, policy: str = "full", requested: str = "fixed") -> float | None:
        labels = {"model": self.request.model, "policy": policy, "requested": requested}
        return self.registry.get_sample_value(f"dycoke_{name}", labels)


def done(request: JobRequest, auto: CompressionChoice | None = None) -> DoneEvent:
    return receipt(cast(Delivery, _Delivered(request)), 3, auto)


class _Delivered:
    attempt = 1

    def __init__(self, request: JobRequest) -> None:
        self.request = request


def failed(code: str) -> ErrorEvent:
    return ErrorEvent(code=code, message="m", retryable=False, job_id="j")


def test_a_job_that_is_done_is_counted_once_with_its_receipt() -> None:
    seen = Seen(FULL)
    end = done(seen.request)
    seen.see(token(0), token(1), end, end)
    seen.observer.close("interrupted")
    assert seen.outcomes() == {("full", "done"): 1}
    assert seen.value("request_latency_seconds_sum") == 2 * end.timings_s.total


def test_tokens_of_one_event_have_no_gap_between_them() -> None:
    seen = Seen(FULL)
    seen.see(token(0))
    assert seen.value("inter_token_latency_seconds_count") == 0
    three = token(1).model_copy(update={"token_ids": [1, 2, 3]})
    seen.see(three)
    assert seen.value("inter_token_latency_seconds_count") == 3


@pytest.mark.parametrize(
    ("fields", "code", "outcome"),
    [
        ({}, "cancelled", "cancelled"),
        ({}, "deadline_exceeded", "deadline_exceeded"),
        ({"deadline_s": 3.0}, "deadline_exceeded", "client_deadline_exceeded"),
        ({"deadline_s": 3.0}, "engine_error", "engine_error"),
    ],
)
def test_a_job_that_fails_is_counted_by_whose_deadline_it_was(
    fields: dict[str, Any], code: str, outcome: str
) -> None:
    seen = Seen(FULL, **fields)
    seen.see(failed(code))
    assert seen.outcomes() == {("full", outcome): 1}


def test_policy_auto_is_counted_as_what_it_chose() -> None:
    seen = Seen(AutoConfig().as_dict())
    seen.see(StatusEvent(stage="encoding"), StatusEvent(stage="encoding", auto=CHOICE))
    seen.see(done(seen.request, CHOICE))
    assert seen.outcomes() == {("dycoke", "done"): 1}


def test_a_choice_that_nobody_heard_of_is_taken_from_the_receipt() -> None:
    seen = Seen(AutoConfig().as_dict())
    seen.see(done(seen.request, CHOICE))
    assert seen.outcomes() == {("dycoke", "done"): 1}
    failing = Seen(AutoConfig().as_dict())
    failing.see(failed("engine_error"))
    assert failing.outcomes() == {("auto", "engine_error"): 1}


async def test_what_is_watched_passes_on_as_it_is() -> None:
    seen = Seen(FULL)
    closed = []

    async def batches() -> AsyncGenerator[Sequence[FeedItem], None]:
        try:
            yield [FeedItem.of(token(0), "1-0")]
            yield []
            yield [FeedItem.of(failed("cancelled"), "2-0")]
        finally:
            closed.append(True)

    passed = [list(batch) async for batch in seen.observer.watch(batches())]
    assert [[item.type for item in batch] for batch in passed] == [["token"], [], ["error"]]
    assert seen.outcomes() == {("full", "cancelled"): 1} and closed


class Feed:
    """A feed that ends when the test says so."""

    job_id = "j"

    def __init__(self) -> None:
        self.may_end = asyncio.Event()
        self.is_closed = False

    async def batches(self) -> AsyncGenerator[Sequence[FeedItem], None]:
        try:
            await self.may_end.wait()
            yield [FeedItem.of(failed("cancelled"), "1-0")]
        finally:
            self.is_closed = True


async def test_a_job_whose_client_has_left_is_followed_to_its_end() -> None:
    seen, feed, followers = Seen(FULL), Feed(), Followers(1)
    followers.follow(cast(JobFeed, feed), seen.observer)
    await asyncio.sleep(0)
    feed.may_end.set()
    async with asyncio.timeout(30):
        while not feed.is_closed:
            await asyncio.sleep(0)
    assert seen.outcomes() == {("full", "cancelled"): 1}
    await followers.aclose()


async def test_so_many_are_followed_and_all_are_let_go() -> None:
    followers = Followers(2)
    watched = [(Seen(FULL), Feed()) for _ in range(3)]
    for seen, feed in watched:
        followers.follow(cast(JobFeed, feed), seen.observer)
    await asyncio.sleep(0)
    await followers.aclose()
    assert [feed.is_closed for _, feed in watched] == [True, True, False]
    assert not any(seen.outcomes() for seen, _ in watched)
