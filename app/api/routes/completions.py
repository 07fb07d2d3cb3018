"""`POST /v1/chat/completions`: the same jobs as `/v1/video/chat`, in OpenAI's form."""

from typing import Annotated, Any

from fastapi import APIRouter, Header, Request
from fastapi.responses import Response

from app.api.context import ApiDep, AskerDep, AskingRoute
from app.api.openai.rendering import ChatCompletion
from app.api.openapi import COMPLETION_REQUEST_BODY, COMPLETION_RESPONSE, OPENAI_ERRORS
from app.api.routes.chat import answer

router = APIRouter(tags=["openai"], route_class=AskingRoute)

PATH = "/v1/chat/completions"

_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: COMPLETION_RESPONSE,
    **OPENAI_ERRORS,
}


@router.post(
    PATH,
    summary="Ask in the form of OpenAI's chat completions",
    response_class=Response,
    responses=_RESPONSES,
    openapi_extra={"requestBody": COMPLETION_REQUEST_BODY},
)
async def complete(
    request: Request,
    api: ApiDep,
    principal: AskerDep,
    idempotency_key: Annotated[
        str | None, Header(description="The same key and request: the same job.")
    ] = None,
) -> Response:
    intake = api.completion_intake()
    return await answer(
        request,
        api,
        principal,
        idempotency_key,
        intake,
        PATH,
        lambda record: ChatCompletion(record, intake.options),
    )
