"""Answers that come before the body."""

import asyncio

import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from app.api.connection import lingering
from app.api.connection.lingering import LingeringClose


async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
    await PlainTextResponse("no", 429)(scope, receive, send)


async def read_and_answer(scope: Scope, receive: Receive, send: Send) -> None:
    while (await receive()).get("more_body"):
        pass
    await PlainTextResponse("yes")(scope, receive, send)


class Connection:
    def __init__(self, num_chunks: int | None) -> None:
        self.sent: list[Message] = []
        self.num_read = 0
        self._num_chunks = num_chunks  # None: the client waits for the answer, sending nothing

    async def receive(self) -> Message:
        if self._num_chunks is None:
            await asyncio.Event().wait()
        assert self._num_chunks is not None
        self.num_read += 1
        return {
            "type": "http.request",
            "body": b"x",
            "more_body": self.num_read < self._num_chunks,
        }

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    def closes(self) -> bool:
        return (b"connection", b"close") in self.sent[0]["headers"]


def post(length: int | None) -> Scope:
    headers = [] if length is None else [(b"content-length", str(length).encode())]
    return {"type": "http", "method": "POST", "headers": headers}


async def test_what_the_client_still_sends_is_dropped_behind_the_answer() -> None:
    connection = Connection(50)
    await LingeringClose(refuse)(post(50), connection.receive, connection.send)
    assert connection.num_read == 50
    assert connection.closes()
    assert [m.get("body") for m in connection.sent[1:]] == [b"no", b""]
    assert [m.get("more_body") for m in connection.sent[1:]] == [True, False]


async def test_client_that_sends_nothing_more_is_not_waited_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lingering, "LINGER_IDLE_S", 0.05)
    connection = Connection(None)
    await LingeringClose(refuse)(post(10**9), connection.receive, connection.send)
    assert connection.closes()
    assert connection.sent[-1]["more_body"] is False


async def test_client_that_sends_for_ever_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lingering, "LINGER_S", 0.05)
    connection = Connection(10**9)
    original = connection.receive

    async def slowly() -> Message:
        await asyncio.sleep(0.001)
        return await original()

    await LingeringClose(refuse)(post(10**9), slowly, connection.send)
    assert connection.sent[-1]["more_body"] is False


@pytest.mark.parametrize("length", [None, 0, 3])
async def test_answer_behind_the_body_is_left_alone(length: int | None) -> None:
    connection = Connection(length or 1)
    await LingeringClose(read_and_answer)(post(length), connection.receive, connection.send)
    assert not connection.closes()
    assert [m.get("body") for m in connection.sent[1:]] == [b"yes"]
