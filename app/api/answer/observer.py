"""Records in the metrics what the clients of this process's jobs experienced.

Each job is observed once, by the process that accepted it: through the connection that posted it
or, if the client has left, by a follower in the background.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from app.api.answer.feed import FINAL_TYPES, FeedItem, JobFeed
from app.api.errors import is_our_fault
from app.errors import DeadlineExceededError
from app.messages import DoneEvent, ErrorEvent, Event, JobRequest, StatusEvent, num_tokens
from app.metrics import CLIENT_DEADLINE_EXCEEDED, DONE, ApiMetrics, RequestLabels
from app.tracing import PostSpan
from dycoke_core.auto import AUTO

logger = logging.getLogger(__name__)


class JobObserver:
    """Sees one job's events as they come."""

    def __init__(self, metrics: ApiMetrics, request: JobRequest, span: PostSpan) -> None:
        self._metrics = metrics
        self._request = request
        self._span = span
        self._last_token_at_s: float | None = None
        self._is_closed = False
        self._label(request.policy_label)
        span.describe(request)

    async def watch(
        self, batches: AsyncGenerator[Sequence[FeedItem], None]
    ) -> AsyncGenerator[Sequence[FeedItem], None]:
        """Passes a feed on and observes its events."""
        async with aclosing(batches):
            async for batch in batches:
                for item in batch:
                    self.see(item)
                yield batch

    def see(self, item: FeedItem) -> None:
        if item.type == "token":
            self._see_tokens(num_tokens(item.data))
        elif item.type in FINAL_TYPES:
            self._see_end(item.event)
        elif item.type == "status" and self._labels.policy == AUTO:
            self._see_choice(item.event)

    def _label(self, policy: str) -> None:
        """Counts the job under this policy from here on."""
        request = self._request
        self._labels = RequestLabels(request.model, policy, request.requested_label)
        self._metrics.expect_request(self._labels)
        self._observe_gap = self._metrics.token_gaps(self._labels)

    def _see_choice(self, event: Event) -> None:
        if isinstance(event, StatusEvent) and event.auto is not None:
            self._label(str(event.auto.compression["policy"]))

    def _see_end(self, event: Event) -> None:
        if isinstance(event, DoneEvent):
            if event.policy_label != self._labels.policy:
                self._label(event.policy_label)  # the choice was published while no one listened
            self._metrics.observe_done(event)
            self.close(DONE)
        elif isinstance(event, ErrorEvent):
            self.close(self._outcome_of(event))

    def _outcome_of(self, event: ErrorEvent) -> str:
        has_own_deadline = self._request.deadline_s is not None
        if event.code == DeadlineExceededError.code and has_own_deadline:
            return CLIENT_DEADLINE_EXCEEDED
        return event.code

    def close(self, outcome: str) -> None:
        """Counts the job, by the first outcome reported."""
        if not self._is_closed:
            self._is_closed = True
            self._metrics.count_request(self._labels, outcome)
            self._span.end(outcome, is_error=outcome != DONE and is_our_fault(outcome))
            logger.info("job ended", extra={**self._request.log_fields, "outcome": outcome})

    def _see_tokens(self, number: int) -> None:
        """Notes arrivals; tokens that share an event arrive at the same time."""
        now = time.monotonic()
        if self._last_token_at_s is not None:
            self._observe_gap(now - self._last_token_at_s)
        for _ in range(number - 1):
            self._observe_gap(0.0)
        self._last_token_at_s = now


class Followers:
    """Observes jobs whose client has left, to their end; at most `max_followers` at a time."""

    def __init__(self, max_followers: int) -> None:
        self._max_followers = max_followers
        self._tasks: set[asyncio.Task[None]] = set()

    def follow(self, feed: JobFeed, observer: JobObserver) -> None:
        if len(self._tasks) >= self._max_followers:
            logger.warning("too many jobs to follow", extra={"job_id": feed.job_id})
            return
        task = asyncio.create_task(self._follow(feed, observer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _follow(self, feed: JobFeed, observer: JobObserver) -> None:
        async with aclosing(observer.watch(feed.batches())) as batches:
            async for _ in batches:
                pass
