"""Answers posts on the connection that posted the job, streamed or in one piece."""

from fastapi.responses import JSONResponse, Response
from starlette.requests import Request

from app.api.answer.feed import final_event
from app.api.answer.jobs import Jobs
from app.api.answer.observer import Followers, JobObserver
from app.api.answer.sse import Ending, EventStream, Rendering
from app.api.connection.disconnect import ClientLeftError, unless_disconnected
from app.api.connection.drain import Drain
from app.api.connection.streams import StreamSlot
from app.api.errors import response_for, response_for_event
from app.api.post.cancelling import Cancellations
from app.api.post.submissions import PostedJob
from app.api.rate_limits import rate_limit_headers
from app.errors import ShuttingDownError
from app.messages import DoneEvent
from app.metrics import INTERRUPTED, ApiMetrics
from app.tracing import PostSpan


class Answers:
    def __init__(
        self,
        jobs: Jobs,
        drain: Drain,
        metrics: ApiMetrics,
        followers: Followers,
        cancellations: Cancellations,
    ) -> None:
        self.jobs = jobs
        self.drain = drain
        self.metrics = metrics
        self.followers = followers
        self.cancellations = cancellations

    def to(
        self,
        posted: PostedJob,
        slot: StreamSlot,
        span: PostSpan,
        rendering: Rendering,
    ) -> "Answer":
        """Takes over the slot and the span.

        Args:
            rendering: of the surface that was asked.
        """
        return Answer(self, posted, slot, span, rendering)


class Answer:
    """The answer to one post."""

    def __init__(
        self,
        answers: Answers,
        posted: PostedJob,
        slot: StreamSlot,
        span: PostSpan,
        rendering: Rendering,
    ) -> None:
        self._answers = answers
        self._rendering = rendering
        self._span = span
        self._posted = posted
        self._slot = slot
        self._job_id = posted.record.job_id
        self._feed = answers.jobs.feed(posted.record, opening=posted.opening)
        self._observer = JobObserver(answers.metrics, posted.record.request, span)
        self._batches = self._feed.batches()
        if posted.is_new:
            self._batches = self._observer.watch(self._batches)

    async def response(self, request: Request) -> Response:
        """The response in the form that the post asked for, with the key's rate limit headers."""
        response = self._streamed() if self._posted.fields.stream else await self._whole(request)
        response.headers.update(rate_limit_headers(self._posted.limit_states))
        return response

    def _streamed(self) -> Response:
        return EventStream(
            self._job_id,
            self._batches,
            drain=self._answers.drain,
            on_end=self._on_end,
            rendering=self._rendering,
        )

    async def _whole(self, request: Request) -> Response:
        """Waits for the end of the job; its failure is an HTTP error."""
        ending = Ending.FAILED
        try:
            async with self._answers.drain.until_expired():
                final = await unless_disconnected(request.receive, final_event(self._batches))
            ending = Ending.COMPLETE
        except ClientLeftError:
            ending = Ending.CLIENT_LEFT
            raise
        except ShuttingDownError as error:
            ending = Ending.SHUTDOWN
            return response_for(error, job_id=self._job_id)
        finally:
            self._on_end(ending)
        if isinstance(final, DoneEvent):
            return JSONResponse(self._rendering.body(final), headers={"X-Job-Id": self._job_id})
        return response_for_event(final)

    def _on_end(self, ending: Ending) -> None:
        self._slot.release()
        if not self._posted.is_new:
            self._span.end("repeated", is_error=False)
            return
        if ending is Ending.COMPLETE:
            return
        if ending is Ending.SHUTDOWN:
            self._observer.close(INTERRUPTED)
            return
        if ending is Ending.CLIENT_LEFT:
            self._answers.metrics.count_disconnect()
        self._answers.followers.follow(self._feed, self._observer)
        if self._posted.fields.on_disconnect == "cancel":
            self._answers.cancellations.start(
                self._job_id,
                "the client closed the connection",
                unless_adopted=self._posted.has_key,
            )
