"""Pictures of frames: few at a time, keys in turn, and each an open answer until it is out."""

import asyncio
import threading
from types import SimpleNamespace
from typing import cast

import pytest
from starlette.types import Message

from app.api.answer import frame_images
from app.api.answer.frame_images import MAX_ENCODED, FrameImage, FrameImages
from app.api.connection.streams import StreamSlot
from app.store.frame_store import FrameStore
from tests.integration.api import until

SCOPE = {"type": "http", "method": "GET", "headers": []}


class Frames:
    """A store of one frame, that says whose was asked for."""

    async def frame(self, digest: str, index: int) -> tuple[SimpleNamespace, bytes] | None:
        return (SimpleNamespace(shape=(1, 1, 1, 3)), digest.encode()) if digest else None


async def test_few_are_made_at_a_time_and_keys_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    may_end = threading.Semaphore(0)

    def encode(pixels: bytes, *, width: int, height: int) -> bytes:
        begun.append(pixels.decode())
        assert may_end.acquire(timeout=20)
        return pixels

    monkeypatch.setattr(frame_images, "encode_png", encode)
    images = FrameImages(cast(FrameStore, Frames()))
    made = [asyncio.create_task(images.png("a", 0, "key_a")) for _ in range(8)]
    await until(lambda: len(begun) == MAX_ENCODED)
    made.append(asyncio.create_task(images.png("b", 0, "key_b")))
    await asyncio.sleep(0)  # it is in line
    for num_ended in range(1, 4):
        may_end.release()
        await until(lambda done=num_ended: sum(task.done() for task in made) == done)
        await until(lambda: len(begun) - sum(task.done() for task in made) == MAX_ENCODED)
    assert "b" in begun[: MAX_ENCODED + 2]
    may_end.release(len(made))
    assert await asyncio.gather(*made) == [b"a"] * 8 + [b"b"]


async def test_what_is_not_stored_gives_its_turn_back() -> None:
    images = FrameImages(cast(FrameStore, Frames()))
    for _ in range(MAX_ENCODED + 1):
        assert await images.png("", 0, "key_a") is None


class Slot:
    def __init__(self) -> None:
        self.is_free = False

    def release(self) -> None:
        self.is_free = True


async def receive() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


async def test_picture_is_an_open_answer_until_the_client_has_it() -> None:
    slot, sent, may_end = Slot(), list[Message](), asyncio.Event()

    async def send(message: Message) -> None:
        if len(sent) == 2:  # the server waits here while its buffer is full
            await may_end.wait()
        sent.append(message)

    image = FrameImage(b"png", cast(StreamSlot, slot), headers={"X-Frame-Index": "3"})
    sending = asyncio.create_task(image(SCOPE, receive, send))
    await until(lambda: len(sent) == 2)
    assert not slot.is_free
    may_end.set()
    await sending
    assert slot.is_free
    headers = dict(sent[0]["headers"])
    assert (headers[b"content-type"], headers[b"content-length"]) == (b"image/png", b"3")
    assert (headers[b"x-frame-index"], headers[b"cache-control"]) == (b"3", b"private, no-store")
    assert b"".join(message["body"] for message in sent[1:]) == b"png"


async def test_client_that_takes_nothing_holds_no_place() -> None:
    slot = Slot()

    async def send(message: Message) -> None:
        await asyncio.Event().wait()

    await FrameImage(b"png", cast(StreamSlot, slot), headers={}, stall_s=0.05)(SCOPE, receive, send)
    assert slot.is_free
