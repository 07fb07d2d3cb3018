"""Framing, and the ways in which a stream can end."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

from starlette.types import Message

from app.api.answer.feed import FeedItem
from app.api.answer.sse import Ending, EventStream, frame
from app.api.connection.drain import Drain
from app.messages import StatusEvent, TokenEvent


def test_durable_event_carries_its_id_and_others_none() -> None:
    token = TokenEvent(index=0, text="a\nb\r\u2028", token_ids=[1])
    assert frame(FeedItem.of(token, "1-0")) == (
        b'event: token\nid: 1-0\ndata: {"type":"token","index":0,"text":"a\\nb\\r\xe2\x80\xa8",'
        b'"token_ids":[1]}\n\n'
    )
    assert b"id:" not in frame(FeedItem.of(StatusEvent(stage="encoding")))


class Client:
    """An ASGI server's side of one connection."""

    def __init__(self, *, takes: int | None = None) -> None:
        self.sent: list[Message] = []
        self.has_left = asyncio.Event()
        self._takes = takes

    async def receive(self) -> Message:
        await self.has_left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if self._takes is not None and len(self.sent) >= self._takes:
            await asyncio.Event().wait()
        self.sent.append(message)


async def tokens(num_batches: int | None) -> AsyncGenerator[Sequence[FeedItem], None]:
    index = 0
    while num_batches is None or index < num_batches:
        yield [FeedItem.of(TokenEvent(index=index, text="x", token_ids=[1]), f"{index + 1}-0")]
        index += 1
        await asyncio.sleep(0.001)


async def stream(
    client: Client,
    batches: AsyncGenerator[Sequence[FeedItem], None],
    drain: Drain,
    stall_s: float = 5,
) -> list[Ending]:
    endings: list[Ending] = []
    response = EventStream("job", batches, drain=drain, on_end=endings.append, stall_s=stall_s)
    await response({"type": "http"}, client.receive, client.send)
    return endings


async def test_stream_completes() -> None:
    client = Client()
    assert await stream(client, tokens(3), Drain()) == [Ending.COMPLETE]
    assert [m.get("more_body") for m in client.sent] == [None, True, True, True, False]


async def test_jobs_last_event_ends_the_response_with_it() -> None:
    async def batches() -> AsyncGenerator[Sequence[FeedItem], None]:
        yield [FeedItem("token", b"{}", "1-0")]
        yield [FeedItem("token", b"{}", "2-0"), FeedItem("done", b"{}", "3-0")]
        raise AssertionError("nobody asks on")

    client = Client()
    assert await stream(client, batches(), Drain()) == [Ending.COMPLETE]
    assert [m.get("more_body") for m in client.sent] == [None, True, False]


async def test_stream_notices_that_the_client_has_left() -> None:
    client = Client()
    asyncio.get_running_loop().call_later(0.05, client.has_left.set)
    assert await stream(client, tokens(None), Drain()) == [Ending.CLIENT_LEFT]


async def test_client_that_takes_nothing_has_left() -> None:
    client = Client(takes=3)
    assert await stream(client, tokens(None), Drain(), stall_s=0.05) == [Ending.CLIENT_LEFT]
    assert len(client.sent) == 3


async def test_stream_ends_whole_when_the_drain_is_over() -> None:
    client, drain = Client(), Drain()
    asyncio.get_running_loop().call_later(0.05, drain.expire)
    assert await stream(client, tokens(None), drain) == [Ending.SHUTDOWN]
    assert client.sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}


async def test_failing_stream_says_so_in_an_event() -> None:
    async def failing() -> AsyncGenerator[Sequence[FeedItem], None]:
        yield []
        raise RuntimeError("secret")

    client = Client()
    assert await stream(client, failing(), Drain()) == [Ending.FAILED]
    text = b"".join(m.get("body", b"") for m in client.sent)
    assert b"internal_error" in text
    assert b"secret" not in text
