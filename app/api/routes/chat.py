"""`POST /v1/video/chat`: a question about a video, its answer streamed or in one piece."""

from typing import Annotated

from fastapi import APIRouter, Header, Request
from fastapi.responses import JSONResponse, Response

from app.api.answer.feed import JobFeed, final_event
from app.api.answer.observer import JobObserver
from app.api.answer.sse import Ending, EventStream
from app.api.connection.disconnect import ClientLeftError, unless_disconnected
from app.api.connection.streams import StreamSlot
from app.api.context import Api, ApiDep, PrincipalDep
from app.api.errors import INTERNAL_ERROR, is_our_fault, response_for, response_for_event
from app.api.openapi import CHAT_REQUEST_BODY, CHAT_RESPONSES
from app.api.post.submissions import PostedJob, post_job
from app.errors import ShuttingDownError
from app.messages import DoneEvent
from app.metrics import INTERRUPTED
from app.tracing import PostSpan
from dycoke_core.errors import DycokeError

router = APIRouter(tags=["chat"])


@router.post(
    "/v1/video/chat",
    summary="Ask a video a question",
    response_class=Response,
    responses=CHAT_RESPONSES,
    openapi_extra={"requestBody": CHAT_REQUEST_BODY},
)
async def chat(
    request: Request,
    api: ApiDep,
    principal: PrincipalDep,
    idempotency_key: Annotated[
        str | None, Header(description="The same key and request: the same job.")
    ] = None,
) -> Response:
    slot = api.streams.take()
    span = api.tracing.start_post(request.headers.get("traceparent"))
    try:
        posted = await post_job(api, request, principal, idempotency_key, span.traceparent)
    except BaseException as error:
        slot.release()
        _end_refused(span, error)
        raise
    answer = Answer(api, posted, slot, span)
    return answer.streamed() if posted.fields.stream else await answer.whole(request)


def _end_refused(span: PostSpan, error: BaseException) -> None:
    if isinstance(error, ClientLeftError):
        span.end("client_left", is_error=False)
        return
    code = error.code if isinstance(error, DycokeError) else INTERNAL_ERROR
    span.end(code, is_error=is_our_fault(code))


class Answer:
    """The answer to one post, on the connection that posted it."""

    def __init__(self, api: Api, posted: PostedJob, slot: StreamSlot, span: PostSpan) -> None:
        self._api = api
        self._span = span
        self._posted = posted
        self._slot = slot
        self._job_id = posted.record.job_id
        self._feed = JobFeed(
            api.queue, api.log, posted.record, heartbeat_s=api.settings.heartbeat_s
        )
        self._observer = JobObserver(api.metrics, posted.record.request, span)
        self._batches = self._feed.batches()
        if posted.is_new:
            self._batches = self._observer.watch(self._batches)

    def streamed(self) -> Response:
        return EventStream(self._job_id, self._batches, drain=self._api.drain, on_end=self._on_end)

    async def whole(self, request: Request) -> Response:
        """Waits for the end of the job; its failure is an HTTP error."""
        ending = Ending.FAILED
        try:
            async with self._api.drain.until_expired():
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
            return JSONResponse(final.model_dump(mode="json"), headers={"X-Job-Id": self._job_id})
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
            self._api.metrics.count_disconnect()
        self._api.followers.follow(self._feed, self._observer)
        if self._posted.fields.on_disconnect == "cancel":
            self._api.cancellations.start(
                self._job_id,
                "the client closed the connection",
                unless_adopted=self._posted.has_key,
            )
