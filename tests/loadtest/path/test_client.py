"""The clients of `loadtest.path` notice every missing token, and when each one came."""

import pytest

from loadtest.path.client import AnswerError, Stream

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


def frame(*token_ids: int) -> bytes:
    ids = ",".join(map(str, token_ids))
    data = f'{{"type":"token","index":{token_ids[0]},"text":"x","token_ids":[{ids}]}}'
    return f"event: token\nid: {token_ids[-1] + 1}-0\ndata: {data}\n\n".encode()


def stream_of(*chunks: bytes) -> Stream:
    stream = Stream(b"")
    for second, chunk in enumerate(chunks):
        stream.chunks.append(chunk)
        stream.times_s.append(float(second))
    return stream


async def test_token_counts_when_the_last_of_its_bytes_has_come() -> None:
    whole = frame(0) + frame(1, 2)
    stream = stream_of(HEAD, whole[:70], whole[70:], frame(3))
    assert stream.tokens() == [(2.0, 1), (2.0, 2), (3.0, 1)]


@pytest.mark.parametrize("frames", [[frame(0), frame(2)], [frame(0), frame(0)], [frame(1)]])
async def test_missing_or_repeated_token_is_an_error(frames: list[bytes]) -> None:
    with pytest.raises(AnswerError):
        stream_of(HEAD, *frames).tokens()


async def test_refusal_is_an_error_with_its_text() -> None:
    with pytest.raises(AnswerError, match="queue_full"):
        stream_of(b'HTTP/1.1 429 Too Many Requests\r\n\r\n{"code":"queue_full"}').tokens()
