"""What a host that never stops sending may cost: in bytes, in seconds, in headers. And under which
name it is addressed.
"""

import asyncio
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpcore
import pytest

from app.api.errors import InvalidFieldsError
from app.api.openai import fetching
from app.api.openai.dialling import MAX_LOOKUPS, MAX_LOOKUPS_OF_A_KEY
from app.api.openai.fetching import (
    CONNECT_S,
    MAX_FETCHES_OF_A_KEY,
    MediaFetcher,
    StorageFailedError,
)
from app.errors import UploadTooLargeError
from app.threads import in_thread
from tests.app.api.openai.net import OWNER, PUBLIC, VIDEO, Net, Send, fetch, response, running_net

URL = "http://cdn.example.com"
OK = response("200 OK")
LIMIT_S = 20.0  # of a test: whatever ends a fetch must have ended it


async def endless(send: Send) -> None:
    await send(OK)
    while True:
        await send(bytes(2**16))


async def drip(send: Send) -> None:
    await send(OK)
    while True:
        await send(b"x")
        await asyncio.sleep(0.01)


async def silence(send: Send) -> None:
    await asyncio.sleep(LIMIT_S)


async def endless_head(send: Send) -> None:
    await send(b"HTTP/1.1 200 OK\r\n")
    while True:
        await send(b"X-Filler: " + bytes(b"x" * 4096) + b"\r\n")


async def endless_interim(send: Send) -> None:
    while True:
        await send(b"HTTP/1.1 103 Early Hints\r\n\r\n")
        await asyncio.sleep(0.001)


async def endless_redirect(send: Send) -> None:
    await send(response("302 Found", "Location: /clip.mp4"))
    while True:
        await send(bytes(2**16))


@pytest.fixture
async def net() -> AsyncIterator[Net]:
    pages = {
        "/clip.mp4": OK + VIDEO,
        "/endless": endless,
        "/drip": drip,
        "/silence": silence,
        "/endless-head": endless_head,
        "/endless-interim": endless_interim,
        "/endless-redirect": endless_redirect,
    }
    async with asyncio.timeout(LIMIT_S), running_net(pages) as net:
        yield net


async def test_a_body_that_never_ends_is_read_up_to_the_cap(net: Net) -> None:
    with pytest.raises(UploadTooLargeError, match="1000000 bytes"):
        await fetch(net, f"{URL}/endless", "*", max_bytes=10**6)


async def test_a_file_may_not_be_larger_than_the_cap_either(net: Net, tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(VIDEO)
    url = f"file://{tmp_path}/clip.mp4"
    assert await fetch(net, url, folder=tmp_path, max_bytes=len(VIDEO)) == VIDEO
    with pytest.raises(UploadTooLargeError):
        await fetch(net, url, folder=tmp_path, max_bytes=len(VIDEO) - 1)


async def test_a_disk_of_ours_that_fails_is_not_blamed_on_the_url(tmp_path: Path) -> None:
    async def write(data: bytes) -> None:
        raise OSError("no space left on device")

    (tmp_path / "clip.mp4").write_bytes(VIDEO)
    fetcher = MediaFetcher((), tmp_path, max_bytes=10**6)
    with pytest.raises(StorageFailedError):
        await fetcher.fetch(f"file://{tmp_path}/clip.mp4", "messages", write, owner=OWNER)


async def test_a_body_that_comes_too_slowly_is_given_up(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "IDLE_S", 0.2)
    monkeypatch.setattr(fetching, "MIN_BYTES_S", 1e6)
    with pytest.raises(InvalidFieldsError, match="fetched"):
        await fetch(net, f"{URL}/drip", "*")


@pytest.mark.parametrize("page", ["drip", "silence", "endless-interim"])
async def test_no_fetch_is_longer_than_its_limit(
    page: str, net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "MAX_FETCH_S", 0.3)
    monkeypatch.setattr(fetching, "MIN_BYTES_S", 0.01)
    with pytest.raises(InvalidFieldsError, match="fetched"):
        await fetch(net, f"{URL}/{page}", "*")


async def test_a_host_that_says_nothing_is_given_up(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "IDLE_S", 0.2)
    with pytest.raises(InvalidFieldsError, match="fetched"):
        await fetch(net, f"{URL}/silence", "*")


async def test_a_head_that_never_ends_is_given_up(net: Net) -> None:
    with pytest.raises(InvalidFieldsError, match="fetched"):
        await fetch(net, f"{URL}/endless-head", "*")


async def test_the_body_of_a_redirect_is_not_read(net: Net) -> None:
    assert await fetch(net, f"{URL}/endless-redirect", "*") == VIDEO


async def test_a_name_that_is_never_resolved_is_given_up(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        await asyncio.Event().wait()
        return []

    monkeypatch.setattr(net, "resolve", resolve)
    monkeypatch.setattr(fetching, "MAX_FETCH_S", 0.1)
    with pytest.raises(InvalidFieldsError, match="fetched"):
        await fetch(net, f"{URL}/clip.mp4", "*")


class SlowNames:
    """The system's resolver, which answers for no name below slow.example.com until it may."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.may_answer = threading.Event()

    def getaddrinfo(self, host: str, *args: Any, **options: Any) -> list[Any]:
        self.asked.append(host)
        if host.endswith("slow.example.com"):
            self.may_answer.wait(LIMIT_S)
            raise socket.gaierror("no such name")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (PUBLIC, 80))]

    async def until_asked(self, number: int) -> None:
        while len(self.asked) < number:
            await asyncio.sleep(0.01)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowNames]:
    names = SlowNames()
    monkeypatch.setattr(socket, "getaddrinfo", names.getaddrinfo)
    yield names
    names.may_answer.set()


def fetch_slow(fetcher: MediaFetcher, owner: str, number: int) -> list[asyncio.Task[None]]:
    urls = (f"http://{owner}{i}.slow.example.com/" for i in range(number))
    return [asyncio.create_task(fetcher.fetch(url, "here", drop, owner=owner)) for url in urls]


async def test_slow_names_of_a_key_keep_no_other_from_its_videos(
    net: Net, names: SlowNames
) -> None:
    """More of them than there are threads, and none is ever resolved. Uploads have threads too."""
    fetcher = MediaFetcher(["*"], None, max_bytes=len(VIDEO), dial=net.dial)
    fetches = fetch_slow(fetcher, "a", MAX_LOOKUPS + 1)
    got = bytearray()

    async def write(data: bytes) -> None:
        got.extend(data)

    await names.until_asked(MAX_LOOKUPS_OF_A_KEY)
    await fetcher.fetch(f"{URL}/clip.mp4", "here", write, owner="b")
    assert bytes(got) == VIDEO
    assert await in_thread(lambda: "free") == "free"
    assert len(names.asked) == MAX_LOOKUPS_OF_A_KEY + 1, "the others wait"
    names.may_answer.set()
    results = await asyncio.gather(*fetches, return_exceptions=True)
    assert all(isinstance(result, InvalidFieldsError) for result in results)
    assert len(names.asked) == MAX_LOOKUPS + 2


async def test_name_that_nobody_waits_for_any_more_still_counts(net: Net, names: SlowNames) -> None:
    """A client that leaves, or is sent away, takes no thread along."""
    fetcher = MediaFetcher(["*"], None, max_bytes=1, dial=net.dial)
    for _ in range(3):
        fetches = fetch_slow(fetcher, "a", MAX_LOOKUPS_OF_A_KEY)
        await names.until_asked(MAX_LOOKUPS_OF_A_KEY)
        for task in fetches:
            task.cancel()
        await asyncio.gather(*fetches, return_exceptions=True)
    assert len(names.asked) == MAX_LOOKUPS_OF_A_KEY
    names.may_answer.set()
    results = await asyncio.gather(*fetch_slow(fetcher, "a", 1), return_exceptions=True)
    assert isinstance(results[0], InvalidFieldsError)
    assert len(names.asked) == MAX_LOOKUPS_OF_A_KEY + 1


async def drop(data: bytes) -> None:
    raise AssertionError("nothing has come")


async def test_a_key_has_few_fetches_at_a_time_and_keeps_no_other_from_its_own() -> None:
    may_end = asyncio.Event()
    num_begun = 0

    async def held(send: Send) -> None:
        nonlocal num_begun
        num_begun += 1
        await send(OK)
        await may_end.wait()
        await send(VIDEO)

    async with running_net({"/held": held, "/clip.mp4": OK + VIDEO}) as net:
        fetcher = MediaFetcher(["*"], None, max_bytes=10**6, resolve=net.resolve, dial=net.dial)

        async def get(path: str, owner: str) -> bytes:
            got = bytearray()

            async def write(data: bytes) -> None:
                got.extend(data)

            await fetcher.fetch(f"{URL}{path}", "here", write, owner=owner)
            return bytes(got)

        async with asyncio.timeout(LIMIT_S):
            mine = [
                asyncio.create_task(get("/held", OWNER)) for _ in range(3 * MAX_FETCHES_OF_A_KEY)
            ]
            while num_begun < MAX_FETCHES_OF_A_KEY:
                await asyncio.sleep(0.01)
            assert await get("/clip.mp4", "another") == VIDEO
            assert num_begun == MAX_FETCHES_OF_A_KEY
            may_end.set()
            assert await asyncio.gather(*mine) == [VIDEO] * len(mine)


async def test_dialling_has_a_limit(net: Net) -> None:
    await fetch(net, f"{URL}/clip.mp4", "*")
    assert net.timeouts == [CONNECT_S]


class Handshake(httpcore.AsyncNetworkStream):
    """Records the server name of a TLS handshake, and stops there."""

    def __init__(self) -> None:
        self.names: list[str | None] = []
        self.contexts: list[ssl.SSLContext] = []

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.AsyncNetworkStream:
        self.names.append(server_hostname)
        self.contexts.append(ssl_context)
        raise httpcore.ConnectError("not here")

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        raise AssertionError("nothing is read before the handshake")

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        raise AssertionError("nothing is written before the handshake")

    async def aclose(self) -> None:
        pass

    def get_extra_info(self, info: str) -> Any:
        return None


async def test_tls_is_spoken_to_the_name_at_the_address_that_was_checked(net: Net) -> None:
    handshake = Handshake()
    dialled: list[str] = []

    async def dial(address: str, port: int, timeout: float | None) -> Handshake:
        dialled.append(f"{address}:{port}")
        return handshake

    fetcher = MediaFetcher(["*"], None, max_bytes=1, resolve=net.resolve, dial=dial)
    with pytest.raises(InvalidFieldsError, match="fetched"):
        await fetcher.fetch("https://cdn.example.com/clip.mp4", "here", drop, owner=OWNER)
    assert dialled == [f"{PUBLIC}:443"]
    assert handshake.names == ["cdn.example.com"]
    (context,) = handshake.contexts
    assert context.check_hostname and context.verify_mode is ssl.CERT_REQUIRED
