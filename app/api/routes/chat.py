"""`POST /v1/video/chat`: a question about a video, its answer streamed or in one piece."""

from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Header, Request
from fastapi.responses import Response

from app.api.answer.sse import JobEvents, Rendering
from app.api.connection.disconnect import ClientLeftError
from app.api.context import Api, ApiDep, AskerDep, AskingRoute
from app.api.errors import INTERNAL_ERROR, is_our_fault
from app.api.openapi import CHAT_REQUEST_BODY, CHAT_RESPONSES
from app.api.post.chat_intake import Intake
from app.api.post.intake import may_hold_video
from app.keys.entries import Principal
from app.store.job_queue import JobRecord
from app.tracing import PostSpan
from dycoke_core.errors import DycokeError

router = APIRouter(tags=["chat"], route_class=AskingRoute)

PATH = "/v1/video/chat"


@router.post(
    PATH,
    summary="Ask a video a question",
    response_class=Response,
    responses=CHAT_RESPONSES,
    openapi_extra={"requestBody": CHAT_REQUEST_BODY},
)
async def chat(
    request: Request,
    api: ApiDep,
    principal: AskerDep,
    idempotency_key: Annotated[
        str | None, Header(description="The same key and request: the same job.")
    ] = None,
) -> Response:
    return await answer(request, api, principal, idempotency_key, api.chat_intake, PATH)


async def answer(
    request: Request,
    api: Api,
    principal: Principal,
    idempotency_key: str | None,
    intake: Intake,
    path: str,
    rendering_of: Callable[[JobRecord], Rendering] = lambda _: JobEvents(),
) -> Response:
    """Makes a post's job and answers with what becomes of it.

    Args:
        intake: reads the body.
        path: of the route, for the trace.
        rendering_of: how the surface that was asked writes a job's events.
    """
    slot = api.streams.take(request, principal.owner, is_upload=may_hold_video(request))
    span = api.tracing.start_post(request.headers.get("traceparent"), path)
    try:
        posted = await api.submissions.take(
            request, principal, idempotency_key, span.traceparent, intake, slot
        )
    except BaseException as error:
        slot.release()
        _end_refused(span, error)
        raise
    rendering = rendering_of(posted.record)
    return await api.answers.to(posted, slot, span, rendering).response(request)


def _end_refused(span: PostSpan, error: BaseException) -> None:
    if isinstance(error, ClientLeftError):
        span.end("client_left", is_error=False)
        return
    code = error.code if isinstance(error, DycokeError) else INTERNAL_ERROR
    span.end(code, is_error=is_our_fault(code))
