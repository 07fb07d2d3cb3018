"""How a response is written."""

import asyncio

from app.api.connection.http_protocol import HeadWithBody

HEAD = b"HTTP/1.1 200 OK\r\n\r\n"


class Transport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.is_closed = False

    def write(self, data: bytes) -> None:  # type: ignore[override]
        assert not self.is_closed
        self.written.append(data)

    def close(self) -> None:
        self.is_closed = True

    def is_closing(self) -> bool:
        return self.is_closed


def corked() -> tuple[HeadWithBody, Transport]:
    transport = Transport()
    return HeadWithBody(transport, asyncio.get_running_loop()), transport


async def test_head_goes_out_with_the_first_of_the_body() -> None:
    outer, transport = corked()
    for data in (HEAD, b"a", b"b"):
        outer.write(data)
    await asyncio.sleep(0)
    assert transport.written == [HEAD + b"a", b"b"]


async def test_head_waits_for_no_body_that_is_late() -> None:
    outer, transport = corked()
    outer.write(HEAD)
    assert transport.written == []
    await asyncio.sleep(0)
    assert transport.written == [HEAD]
    outer.write(b"a")
    assert transport.written == [HEAD, b"a"]


async def test_closing_sends_the_head_first() -> None:
    outer, transport = corked()
    outer.write(HEAD)
    outer.close()
    await asyncio.sleep(0)
    assert transport.written == [HEAD] and outer.is_closing()


async def test_head_is_not_written_to_a_connection_that_has_been_closed_meanwhile() -> None:
    outer, transport = corked()
    outer.write(HEAD)
    transport.close()
    await asyncio.sleep(0)
    assert transport.written == []
