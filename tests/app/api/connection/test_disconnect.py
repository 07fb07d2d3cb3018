"""Work for a client that may leave."""

import asyncio

import pytest
from starlette.types import Message

from app.api.connection.disconnect import ClientLeftError, unless_disconnected


class Client:
    def __init__(self) -> None:
        self.has_left = asyncio.Event()

    async def receive(self) -> Message:
        await self.has_left.wait()
        return {"type": "http.disconnect"}


async def test_work_is_cancelled_when_the_client_leaves() -> None:
    client, was_cancelled = Client(), asyncio.Event()

    async def work() -> None:
        client.has_left.set()
        try:
            await asyncio.Event().wait()
        finally:
            was_cancelled.set()

    with pytest.raises(ClientLeftError):
        await unless_disconnected(client.receive, work())
    assert was_cancelled.is_set()


async def test_result_counts_that_came_in_spite_of_being_cancelled() -> None:
    client = Client()

    async def work() -> str:
        client.has_left.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return "done all the same"
        raise AssertionError

    assert await unless_disconnected(client.receive, work()) == "done all the same"


async def test_a_client_that_leaves_as_the_work_ends_is_no_error() -> None:
    loop = asyncio.get_running_loop()
    complaints: list[dict[str, object]] = []
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    left, answer = loop.create_future(), loop.create_future()

    async def receive() -> Message:
        await left
        return {"type": "http.disconnect"}

    async def work() -> str:
        return str(await answer)

    loop.call_later(0.01, lambda: (left.set_result(None), answer.set_result("done")))
    assert await unless_disconnected(receive, work()) == "done"
    await asyncio.sleep(0)
    assert not complaints


async def test_failure_of_the_work_is_its_own() -> None:
    async def work() -> None:
        raise ValueError

    with pytest.raises(ValueError):
        await unless_disconnected(Client().receive, work())
    assert len(asyncio.all_tasks()) == 1
