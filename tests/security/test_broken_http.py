"""Bytes that are not HTTP, chunks with false lengths, and clients that are slow or leave."""

import random
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress

import pytest

from tests.security.scale import SCALE
from tests.security.service import CLIP, Service, ask, bearer, upload
from tests.security.tally import Tally

SEED = 29
PATIENCE_S = 30.0
QUIET_S = 5.0
SEGMENT_S = 0.02  # between a request's headers and what follows them
NUM_SLOW = 48  # of the 64 uploads that a key and an address have
KEY = f"authorization: {bearer('alice')['Authorization']}\r\n"
CLOSED = b"closed"
FIRST_BYTES = b'--b\r\ncontent-disposition: form-data; name="video"; filename="a"\r\n\r\n'
FIRST_BYTES += CLIP.read_bytes()[:200]
HEAD = f"POST /v1/video/chat HTTP/1.1\r\nhost: localhost\r\n{KEY}content-type: application/json\r\n"
CHUNKED = f"{HEAD}transfer-encoding: chunked\r\n\r\n"
HIDDEN = "GET /livez HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
# Headers by which one reader and another find different ends of a request; {n} bytes are sent.
DOUBTFUL = (
    *(
        "transfer-encoding: chunked\r\ncontent-length: {n}",
        "content-length: 5\r\ncontent-length: {n}",
    ),
    *("content-length: {n}\r\ntransfer-encoding: chunked", "content-length: 5, {n}"),
    *("content-length: +5", "content-length: 0x5", "content-length: 5 5", "content-length: 5_0"),
    *("content-length: -5", "content-length:", "content-length: \x0b5", "content-length: 5,"),
    *("content-length : 5", " content-length: 5", "content-length\x00: 5", "content-length: 5\x00"),
    *("x: y\ncontent-length: 5", "x: y\rcontent-length: 5", "content-length: 5\n"),
    *("transfer-encoding: xchunked", "transfer-encoding: chunked, identity"),
    *("transfer-encoding: identity, chunked, identity", "transfer-encoding: \x0bchunked"),
    *(
        "transfer-encoding : chunked",
        "transfer-encoding:\r\n chunked",
        "transfer-encoding: chu nked",
    ),
    *(
        "transfer-encoding: chunked\r\ntransfer-encoding: identity",
        "transfer-encoding: gzip, chunked",
    ),
    *("transfer-encoding: identity\r\ntransfer-encoding: chunked", 'transfer-encoding: "chunked"'),
    *("x: y\ntransfer-encoding: chunked", "x: y\rtransfer-encoding: chunked"),
    *("transfer-encoding: chunked, chunked", "transfer-encoding: chunked\r\nhost: other"),
    "connection: upgrade\r\nupgrade: h2c\r\ncontent-length: {n}",
)
# Bodies whose chunks end elsewhere for a reader that is less strict.
CHUNKS = (
    *(
        "2\n{{}}\n0\n\n",
        "2\r\n{{}}\n0\r\n\r\n",
        "2\r\n{{}}0\r\n\r\n",
        "2 \x00\r\n{{}}\r\n0\r\n\r\n",
    ),
    *("0x2\r\n{{}}\r\n0\r\n\r\n", "+2\r\n{{}}\r\n0\r\n\r\n", "-2\r\n{{}}\r\n0\r\n\r\n"),
    *("2;\n{{}}\r\n0\r\n\r\n", "2;a=\nb\r\n{{}}\r\n0\r\n\r\n", "2\r{{}}\r\n0\r\n\r\n"),
    *(
        "10000000000000002\r\n{{}}\r\n0\r\n\r\n",
        "2\r\n{{}}\r\n\r\n0\r\n\r\n",
        "2_\r\n{{}}\r\n0\r\n\r\n",
    ),
)


def requests() -> Iterator[bytes]:
    for chunks in (
        *("zz\r\n", "-1\r\n{}", "5\r\n{}\r\n0\r\n\r\n", "2\r\n{}", "2\r\n{}\r\n0\r\n", "\r\n\r\n"),
        *(
            "ffffffffffffffffff\r\n{}",
            "2;ext=" + "x" * 70_000 + "\r\n{}",
            "0\r\n" + "a: b\r\n" * 5000,
        ),
        *("2\n{}\n0\n\n", "0x2\r\n{}\r\n0\r\n\r\n", "1\r\n{\r\n1\r\n}\r\n0\r\n\r\n", "+2\r\n{}"),
    ):
        yield (CHUNKED + chunks).encode()
    head = f"POST /v1/video/chat HTTP/1.1\r\nhost: localhost\r\n{KEY}"
    for lines in (
        *(
            "content-length: -1\r\n",
            "content-length: 1e3\r\n",
            "content-length: 99999999999999999\r\n",
        ),
        *("content-length: 2\r\ncontent-length: 3\r\n", "transfer-encoding: gzip\r\n"),
        *(
            "transfer-encoding: chunked\r\ncontent-length: 2\r\n",
            "host: other\r\n",
            "x\r\n",
            ": y\r\n",
        ),
        *("x-a: \x00\r\n", "x-a: b\n", " folded: a\r\n", "expect: 100-continue\r\n", "a\tb: c\r\n"),
    ):
        yield (head + lines + "\r\n{}").encode("latin-1")
    yield from (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    )
    yield from (
        b"GET\r\n\r\n",
        b"\x00" * 64,
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET http://[ HTTP/1.1\r\n\r\n",
    )
    chance = random.Random(SEED)
    sound = (CHUNKED + "2\r\n{}\r\n0\r\n\r\n").encode()
    for _ in range(SCALE.num_random):
        changed = bytearray(sound)
        for _ in range(chance.randint(1, 4)):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        yield bytes(changed)


def requests_within_requests() -> Iterator[str]:
    """After each there is another, which a reader that is less strict would answer."""
    for headers in DOUBTFUL:
        for body in ("0\r\n\r\n", "2\r\n{}\r\n0\r\n\r\n", "{}   "):
            content = body + HIDDEN
            yield f"{HEAD}{headers.format(n=len(content))}\r\n\r\n{content}"
    for chunks in CHUNKS:
        yield CHUNKED + chunks.format() + HIDDEN


def test_no_request_is_found_within_another(service: Service, tally: Tally) -> None:
    """Where the end of one is in doubt it is refused, and nothing after it is read."""
    row = "request smuggling: requests whose end is in doubt, with another after them"
    sound = f"{CHUNKED}2\r\n{{}}\r\n0\r\n\r\n{HIDDEN}"
    assert answers_to(service, sound).count(b"HTTP/1.1 ") == 2, "both are answered"
    for request in requests_within_requests():
        reply = answers_to(service, request)
        is_refused = b"HTTP/1.1 200 " not in reply
        tally.count(row, None if is_refused else f"{request[100:]!r}: {reply!r}")
    assert not service.has_failed_inside()
    tally.check(row)


def answers_to(service: Service, request: str) -> bytes:
    """All that is said until the server closes, or says nothing for a while."""
    said = b""
    with closing(connect(service)) as connection, suppress(ConnectionError, TimeoutError):
        connection.settimeout(QUIET_S)
        head, end, rest = request.encode("latin-1").partition(b"\r\n\r\n")
        connection.sendall(head + end)
        time.sleep(SEGMENT_S)
        connection.sendall(rest)
        while part := connection.recv(65536):
            said += part
    return said


def exchange(service: Service, request: bytes) -> bytes:
    """Sends bytes, closes its side, and reads the answer."""
    with closing(connect(service)) as connection:
        try:
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            return read_all(connection)
        except ConnectionError:  # closed on us, which is an answer
            return b""


def connect(service: Service) -> socket.socket:
    return socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE_S)


def read_all(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


@pytest.mark.timeout(SCALE.timeout_s)
def test_no_bytes_break_the_server(service: Service, tally: Tally) -> None:
    row = "broken HTTP: chunks, lengths, headers, mutated bytes"
    for request in requests():
        try:
            reply = exchange(service, request)
        except TimeoutError:
            tally.count(row, f"no end: {request[:200]!r}")
            continue
        is_broken = b" 500 " in reply.split(b"\r\n")[0]
        tally.count(row, f"{request[:200]!r}: {reply[:200]!r}" if is_broken else None)
    assert service.stranger.get("/livez").status_code == 200
    assert not service.has_failed_inside()
    tally.check(row)


def test_slow_clients_hold_nobody_up(service: Service, tally: Tally) -> None:
    """Half of them send headers alone, half a body byte by byte: another key is answered all the
    while, and each of them is sent away.
    """
    row = "slow clients: headers alone, dripping bodies"
    video = upload(service.bob)["video_id"]
    head = f"POST /v1/videos HTTP/1.1\r\nhost: localhost\r\n{KEY}content-length: 1000000\r\n"
    head += "content-type: multipart/form-data; boundary=b\r\n\r\n"
    with ExitStack() as stack:
        slow = [stack.enter_context(closing(connect(service))) for _ in range(NUM_SLOW)]
        for connection in slow:
            connection.sendall(head.encode())
        for number in range(6):
            for connection in slow[::2]:
                drip(connection, FIRST_BYTES if number == 0 else b"-")
            receipt = ask(service.bob, video, seed=number)
            tally.count(
                row, None if receipt["finish_reason"] else "an honest client was not served"
            )
        until = time.monotonic() + 4 * PATIENCE_S
        for number, connection in enumerate(slow):
            reply = first_line(connection, until, drips=number % 2 == 0)
            is_gone = b" 408 " in reply or reply in (b"", CLOSED)
            tally.count(row, None if is_gone else f"not sent away: {reply[:80]!r}")
    assert not service.has_failed_inside()
    tally.check(row)


def drip(connection: socket.socket, content: bytes = b"-") -> None:
    try:
        connection.sendall(content)
    except ConnectionError:
        return


def first_line(connection: socket.socket, until: float, *, drips: bool) -> bytes:
    """The answer it gets in the end; it keeps trickling bytes meanwhile."""
    connection.settimeout(0.2)
    while time.monotonic() < until:
        try:
            return connection.recv(4096)
        except TimeoutError:
            if drips:
                drip(connection)
        except ConnectionError:
            return CLOSED  # what it was told may be lost with what it still sent
    return b"nothing"
