"""`POST /v1/video/chat`: a question about a video, its answer streamed or in one piece."""

from typing import Annotated

from fastapi import APIRouter, Header, Request
from fastapi.responses import Response

from app.api.connection.disconnect import ClientLeftError
from app.api.context import ApiDep, AskerDep, AskingRoute
from app.api.errors import INTERNAL_ERROR, is_our_fault
from app.api.openapi import CHAT_REQUEST_BODY, CHAT_RESPONSES
from app.tracing import PostSpan
from dycoke_core.errors import DycokeError

router = APIRouter(tags=["chat"], route_class=AskingRoute)


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
    principal: AskerDep,
    idempotency_key: Annotated[
        str | None, Header(description="The same key and request: the same job.")
    ] = None,
) -> Response:
    slot = api.streams.take()
    span = api.tracing.start_post(request.headers.get("traceparent"))
    try:
        posted = await api.submissions.take(request, principal, idempotency_key, span.traceparent)
    except BaseException as error:
        slot.release()
        end_refused(span, error)
        raise
    return await api.answers.to(posted, slot, span).response(request)


def end_refused(span: PostSpan, error: BaseException) -> None:
    if isinstance(error, ClientLeftError):
        span.end("client_left", is_error=False)
        return
    code = error.code if isinstance(error, DycokeError) else INTERNAL_ERROR
    span.end(code, is_error=is_our_fault(code))
