"""Problems in OpenAI's form: on which paths, and what of them is kept."""

import json

import pytest
from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.errors import InvalidFieldsError, response_for
from app.api.openai.errors import OpenAIErrors, error_object, is_openai_path
from app.errors import ModelNotFoundError, QueueFullError


@pytest.mark.parametrize(
    ("path", "is_one"),
    [
        ("/v1/chat/completions", True),
        ("/v1/models", True),
        ("/v1/models/org/name", True),
        ("/v1/modelsx", False),
        ("/v1/files/file_1/content", True),
        ("/v1/video/chat", False),
        ("/", False),
    ],
)
def test_paths_of_openais_clients_are_known(path: str, is_one: bool) -> None:
    assert is_openai_path(path) is is_one


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("invalid_request", "invalid_request_error"),
        ("unauthorized", "authentication_error"),
        ("forbidden", "permission_error"),
        ("video_not_found", "not_found_error"),
        ("queue_full", "rate_limit_error"),
        ("no_worker", "server_error"),
        ("of another release", "server_error"),
    ],
)
def test_the_kind_of_an_error_follows_its_status(code: str, kind: str) -> None:
    assert error_object(code, "why") == {
        "message": "why",
        "type": kind,
        "param": None,
        "code": code,
    }


def test_a_model_that_nobody_serves_is_told_by_its_field() -> None:
    assert error_object("model_not_found", "why")["param"] == "model"
    assert error_object("model_not_found", "why", "other")["param"] == "other"


async def answer_of(app: ASGIApp, path: str = "/v1/chat/completions") -> tuple[Message, bytes]:
    """What a client gets: the response's start, and its body."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        raise AssertionError("nobody reads the body here")

    await OpenAIErrors(app)({"type": "http", "path": path, "headers": []}, receive, send)
    start, *rest = sent
    return start, b"".join(message["body"] for message in rest)


def headers_of(start: Message) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in start["headers"]}


async def test_a_problem_is_rewritten_with_the_length_of_what_it_becomes() -> None:
    error = QueueFullError("the queue is full", retry_after_s=3, video_id="vid_1")
    start, body = await answer_of(response_for(error))
    headers = headers_of(start)
    assert start["status"] == 429 and headers["content-type"] == "application/json"
    assert headers["content-length"] == str(len(body))
    assert headers["retry-after"] == "3" and headers["x-should-retry"] == "true"
    assert json.loads(body)["error"] == {
        "message": "the queue is full",
        "type": "rate_limit_error",
        "param": None,
        "code": "queue_full",
        "video_id": "vid_1",
    }


async def test_the_first_wrong_field_is_the_param_and_no_retry_helps() -> None:
    start, body = await answer_of(response_for(InvalidFieldsError.of("messages.0", "must be text")))
    assert headers_of(start)["x-should-retry"] == "false"
    error = json.loads(body)["error"]
    assert (error["param"], error["code"]) == ("messages.0", "invalid_request")


async def test_a_problem_that_comes_in_pieces_is_rewritten_as_one() -> None:
    whole = response_for(ModelNotFoundError("none"))

    async def in_pieces(scope: Scope, receive: Receive, send: Send) -> None:
        body = bytes(whole.body)
        await send({"type": "http.response.start", "status": 404, "headers": whole.raw_headers})
        for at in range(0, len(body), 7):
            piece = {"type": "http.response.body", "body": body[at : at + 7]}
            await send({**piece, "more_body": at + 7 < len(body)})

    _, body = await answer_of(in_pieces)
    assert json.loads(body)["error"]["code"] == "model_not_found"


async def test_on_other_paths_a_problem_stays_one() -> None:
    response = response_for(ModelNotFoundError("none"))
    start, body = await answer_of(response, path="/v1/video/chat")
    assert body == bytes(response.body)
    assert headers_of(start)["content-type"].startswith("application/problem+json")


async def test_answers_pass_through_with_the_jobs_id() -> None:
    async def chunks():  # type: ignore[no-untyped-def]
        yield b"data: 1\n\n"
        yield b"data: [DONE]\n\n"

    for response, expected in (
        (JSONResponse({"a": 1}, headers={"X-Job-Id": "job_1"}), b'{"a":1}'),
        (
            StreamingResponse(chunks(), headers={"X-Job-Id": "job_1"}),
            b"data: 1\n\ndata: [DONE]\n\n",
        ),
    ):

        async def app(
            scope: Scope, receive: Receive, send: Send, response: ASGIApp = response
        ) -> None:
            await response({**scope, "asgi": {"spec_version": "2.4"}}, receive, send)

        start, body = await answer_of(app)
        assert body == expected and headers_of(start)["x-request-id"] == "job_1"
