"""Errors as HTTP: the status of every code, and RFC 9457 bodies (`application/problem+json`).

This is the only module that knows both the error tree and HTTP. A body contains
`DycokeError.message`, which is public by contract, and never another exception's text, a path or an
address.
"""

import asyncio
import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.connection.disconnect import ClientLeftError
from app.api.rate_limits import rate_limit_headers
from app.errors import (
    DeadlineUnreachableError,
    KeyLimitError,
    ShuttingDownError,
    TryLaterError,
)
from app.messages import ErrorEvent
from app.metrics import CLIENT_DEADLINE_EXCEEDED
from dycoke_core.errors import DycokeError, InvalidRequestError, VideoError

logger = logging.getLogger(__name__)

PROBLEM_MEDIA_TYPE = "application/problem+json"
INTERNAL_ERROR = "internal_error"
NO_SUCH_FIELD = "is not a field of this request: leave it out"

STATUS_BY_CODE: Mapping[str, int] = {
    "invalid_request": 400,
    "prompt_too_long": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "host_not_allowed": 403,
    "origin_not_allowed": 403,
    "not_found": 404,
    "job_not_found": 404,
    "video_not_found": 404,
    "model_not_found": 404,
    "kept_not_found": 404,
    "kept_truncated": 404,
    "method_not_allowed": 405,
    "upload_timeout": 408,
    "cancelled": 409,
    "idempotency_conflict": 409,
    "is_frame_list": 409,
    "job_not_done": 409,
    "upload_too_large": 413,
    "video_limit_exceeded": 413,
    "unsupported_media_type": 415,
    "unsupported_container": 415,
    "unsupported_codec": 415,
    "no_video_stream": 415,
    "range_not_satisfiable": 416,
    "video_error": 422,
    "unreadable_frame": 422,
    "unreadable_video": 422,
    "video_read_timeout": 422,
    "video_reader_failed": 422,
    "video_reader_killed": 422,
    "key_limit_exceeded": 429,
    "queue_full": 429,
    "too_many_uploads": 429,
    INTERNAL_ERROR: 500,
    "engine_error": 500,
    "out_of_memory": 500,
    "model_load_failed": 500,
    "job_failed_repeatedly": 500,
    "frame_store_full": 503,
    "job_lost": 503,
    "keys_unavailable": 503,
    "no_worker": 503,
    "reader_lost": 503,
    "readers_unavailable": 503,
    "sampler_changed": 503,
    "sandbox_unavailable": 503,
    "shutting_down": 503,
    "store_unavailable": 503,
    "too_many_streams": 503,
    "video_store_full": 503,
    "workers_lost": 503,
    "deadline_exceeded": 504,
    "deadline_unreachable": 504,
}

# Seconds after which a refused client has a fair chance.
RETRY_AFTER_S: Mapping[str, int] = {
    "frame_store_full": 2,
    "keys_unavailable": 5,
    "no_worker": 5,
    "readers_unavailable": 2,
    "shutting_down": 1,
    "store_unavailable": 2,
    "too_many_uploads": 2,
    "video_store_full": 10,
}


_OF_CLIENTS_DEADLINES = (DeadlineUnreachableError.code, CLIENT_DEADLINE_EXCEEDED)


def is_our_fault(outcome: str) -> bool:
    """Whether a failure counts against the service: 5xx, but for the client's own deadline.

    Args:
        outcome: an error's code, or the outcome under which a job is counted.
    """
    return STATUS_BY_CODE.get(outcome, 500) >= 500 and outcome not in _OF_CLIENTS_DEADLINES


class FieldProblem(BaseModel):
    field: str
    message: str


class Problem(BaseModel):
    """RFC 9457. `code` is stable; `retryable`: the same request may succeed later."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    code: str
    retryable: bool
    job_id: str | None = None
    video_id: str | None = None  # already stored, so that a retry need not upload it
    incident: str | None = None  # for an internal error, to find it in the log
    errors: list[FieldProblem] | None = None


class InvalidFieldsError(InvalidRequestError):
    """Invalid fields, each with what is wrong with it."""

    def __init__(self, problems: Sequence[FieldProblem]) -> None:
        super().__init__("; ".join(f"{p.field}: {p.message}" for p in problems))
        self.problems = list(problems)

    @classmethod
    def of(cls, field: str, message: str) -> "InvalidFieldsError":
        """An error about one field."""
        return cls([FieldProblem(field=field, message=message)])

    @classmethod
    def from_pydantic(cls, errors: Sequence[Mapping[str, Any]]) -> "InvalidFieldsError":
        return cls(
            [
                FieldProblem(
                    field=".".join(str(part) for part in error["loc"]) or "body",
                    message=NO_SUCH_FIELD
                    if error["type"] == "extra_forbidden"
                    else error["msg"].removeprefix("Value error, "),
                )
                for error in errors
            ]
        )


def problem_response(
    code: str,
    detail: str,
    *,
    retryable: bool,
    job_id: str | None = None,
    video_id: str | None = None,
    incident: str | None = None,
    errors: Sequence[FieldProblem] | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    status = STATUS_BY_CODE.get(code, 500)
    problem = Problem(
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        code=code,
        retryable=retryable,
        job_id=job_id,
        video_id=video_id,
        incident=incident,
        errors=list(errors) if errors is not None else None,
    )
    given = dict(headers or {})
    if code in RETRY_AFTER_S:
        given.setdefault("Retry-After", str(RETRY_AFTER_S[code]))
    if code == ShuttingDownError.code:
        given.setdefault("Connection", "close")  # the next request may meet another process
    if status == 401:
        given.setdefault("WWW-Authenticate", 'Bearer realm="dycoke"')
    return JSONResponse(
        problem.model_dump(exclude_none=True),
        status_code=status,
        headers=given,
        media_type=PROBLEM_MEDIA_TYPE,
    )


def response_for(error: DycokeError, *, job_id: str | None = None) -> JSONResponse:
    headers: dict[str, str] = {}
    if isinstance(error, KeyLimitError):
        headers |= rate_limit_headers(error.limit_states)
    if isinstance(error, TryLaterError):
        headers["Retry-After"] = str(error.retry_after_s)
    if job_id is not None:
        headers["X-Job-Id"] = job_id
    return problem_response(
        error.code,
        error.message,
        retryable=error.retryable,
        job_id=job_id,
        video_id=error.video_id if isinstance(error, TryLaterError) else None,
        errors=_problems_of(error),
        headers=headers,
    )


def _problems_of(error: DycokeError) -> list[FieldProblem] | None:
    if isinstance(error, InvalidFieldsError):
        return error.problems
    if isinstance(error, VideoError) and error.field is not None:
        return [FieldProblem(field=error.field, message=error.message)]
    return None


def response_for_event(event: ErrorEvent) -> JSONResponse:
    """The response for a job's error if the client did not ask for a stream."""
    return problem_response(
        event.code,
        event.message,
        retryable=event.retryable,
        job_id=event.job_id,
        headers={"X-Job-Id": event.job_id},
    )


def log_incident(error: BaseException, **extra: str) -> str:
    """Logs an unexpected exception; returns the id that clients see instead of it."""
    incident = uuid.uuid4().hex[:12]
    logger.error("internal error", exc_info=error, extra={"incident": incident, **extra})
    return incident


def incident_message(incident: str) -> str:
    return f"internal error; the server's log says more under incident {incident}"


def install_error_handlers(app: FastAPI, count_rejection: Callable[[str], None]) -> None:
    """Args:
    count_rejection: called with the code of every refused post.
    """

    async def on_dycoke_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, DycokeError)
        if request.method == "POST":
            count_rejection(error.code)
        if error.code == INTERNAL_ERROR:  # a class without a code of its own
            return _internal_error(error)
        return response_for(error)

    app.add_exception_handler(DycokeError, on_dycoke_error)
    app.add_exception_handler(ClientLeftError, _on_client_left)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)


async def _on_client_left(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # no one reads it, but servers require an answer


async def _on_validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return response_for(InvalidFieldsError.from_pydantic(error.errors()))


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    """Answers what the framework refuses by itself: unknown routes and methods."""
    assert isinstance(error, HTTPException)
    code, detail = {
        404: (
            "not_found",
            "there is nothing at this path; /openapi.json lists the paths there are",
        ),
        405: (
            "method_not_allowed",
            "this path does not take this method; the Allow header lists those it takes",
        ),
    }.get(error.status_code, ("invalid_request", "the request is malformed"))
    return problem_response(code, detail, retryable=False, headers=error.headers)


def _internal_error(error: BaseException) -> JSONResponse:
    incident = log_incident(error)
    return problem_response(
        INTERNAL_ERROR, incident_message(incident), retryable=False, incident=incident
    )


class LastErrors:
    """ASGI middleware for what no handler has answered: an unexpected exception becomes
    a 500 with an incident id, and one log line; being cancelled by a server that has waited long
    enough in its shutdown becomes a 503.

    Where the response has begun, the connection is closed instead.

    Args:
        is_draining: whether the server is shutting down.
    """

    def __init__(self, app: ASGIApp, is_draining: Callable[[], bool]) -> None:
        self._app = app
        self._is_draining = is_draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_started = False

        async def watched_send(message: Message) -> None:
            nonlocal has_started
            has_started = has_started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        except asyncio.CancelledError:
            if scope["type"] != "http" or has_started or not self._is_draining():
                raise
            refusal = response_for(ShuttingDownError())
            await refusal(scope, receive, send)
        except Exception as error:
            if scope["type"] != "http":
                raise
            response = _internal_error(error)
            if not has_started:
                await response(scope, receive, send)
