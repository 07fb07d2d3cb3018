"""Requests whose end a proxy may see elsewhere, where h11 parses."""

import h11
import pytest

from app.api.connection.strict_h11 import StrictReceiveBuffer

GOOD = b"POST /v1/video/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n\n\n"


def events(data: bytes, size: int) -> list[object]:
    connection = h11.Connection(h11.SERVER)
    connection._receive_buffer = StrictReceiveBuffer()
    seen: list[object] = []
    for start in range(0, len(data), size):
        connection.receive_data(data[start : start + size])
        while (event := connection.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
            seen.append(event)
    return seen


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_lines_that_end_as_they_should_are_taken(size: int) -> None:
    request, *body, end = events(GOOD, size)
    assert isinstance(request, h11.Request) and isinstance(end, h11.EndOfMessage)
    assert b"".join(part.data for part in body if isinstance(part, h11.Data)) == b"\n\n"


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("place", range(4))
def test_line_feed_alone_ends_no_line(place: int, size: int) -> None:
    lines = GOOD.split(b"\r\n")
    ends = [b"\r\n"] * (len(lines) - 1)
    ends[place] = b"\n"
    data = b"".join(line + end for line, end in zip(lines, [*ends, b""], strict=True))
    with pytest.raises(h11.RemoteProtocolError):
        events(data, size)
