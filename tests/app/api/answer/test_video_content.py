"""A video being sent: its lease and slot are given back, whatever the client does."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from starlette.types import Message

from app.api.answer.video_content import VideoContent
from app.api.connection.streams import StreamSlot
from app.video_store import VideoLease

CONTENT = bytes(range(256)) * 1024
SCOPE = {"type": "http", "method": "GET", "headers": []}


class Held:
    """A lease, or a slot."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.video = SimpleNamespace(video_id="v", probe=SimpleNamespace(container="mp4"))
        self.num_releases = 0

    def release(self) -> None:
        self.num_releases += 1


@pytest.fixture
def held(tmp_path: Path) -> Held:
    path = tmp_path / "video"
    path.write_bytes(CONTENT)
    return Held(path)


def content_of(held: Held) -> VideoContent:
    return VideoContent(cast(VideoLease, held), cast(StreamSlot, held), stall_s=0.05)


async def receive() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


async def test_whole_video_is_sent_and_given_back(held: Held) -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await content_of(held)(SCOPE, receive, send)
    assert b"".join(message.get("body", b"") for message in sent) == CONTENT
    assert held.num_releases == 2


async def test_client_that_takes_nothing_holds_neither_the_video_nor_a_place(held: Held) -> None:
    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    await content_of(held)(SCOPE, receive, send)
    assert held.num_releases == 2


@pytest.mark.parametrize("wanted", [b"bytes=999999-", b"bytes=9-2", b"bytes", b"lines=1-2", b""])
async def test_range_that_cannot_be_given_is_refused_with_a_code(held: Held, wanted: bytes) -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await content_of(held)({**SCOPE, "headers": [(b"range", wanted)]}, receive, send)
    assert sent[0]["status"] == 416
    assert dict(sent[0]["headers"])[b"content-range"] == f"bytes */{len(CONTENT)}".encode()
    assert json.loads(sent[1]["body"])["code"] == "range_not_satisfiable"
    assert held.num_releases == 2


async def test_failure_of_the_connection_is_no_stall(held: Held) -> None:
    async def send(message: Message) -> None:
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await content_of(held)(SCOPE, receive, send)
    assert held.num_releases == 2
