"""What may be fetched, and that nothing else is ever dialled: every known trick."""

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpcore
import pytest

from app.api.errors import InvalidFieldsError
from app.api.openai.fetching import MediaFetcher, is_global
from app.errors import UploadTooLargeError

VIDEO = bytes(range(256)) * 40
PUBLIC, OTHER = "93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"
RESOLVED = {
    "cdn.example.com": [PUBLIC],
    "both.example.com": [OTHER, PUBLIC],
    "inside.example.com": ["10.0.0.7"],
    "half.example.com": [PUBLIC, "127.0.0.1"],
    "nowhere.example.com": [],
    "example.com": [PUBLIC],
    "xn--bcher-kva.example.com": [PUBLIC],
    # As a resolver of the C library's answers for them.
    "2130706433": ["127.0.0.1"],
    "0x7f.1": ["127.0.0.1"],
    "127.1": ["127.0.0.1"],
}


def response(status: str, *headers: str, body: bytes = b"") -> bytes:
    lines = "\r\n".join([f"HTTP/1.1 {status}", *headers, "Connection: close"])
    return lines.encode() + b"\r\n\r\n" + body


def redirect(location: str) -> bytes:
    return response("302 Found", f"Location: {location}", "Content-Length: 0")


PAGES = {
    "/clip.mp4": response("200 OK", f"Content-Length: {len(VIDEO)}", body=VIDEO),
    "/unmeasured": response("200 OK", body=VIDEO),
    "/huge": response("200 OK", "Content-Length: 99999999999"),
    "/gzip": response("200 OK", "Content-Encoding: gzip", body=VIDEO),
    "/secret": response("403 Forbidden", body=b"the password is swordfish"),
    "/short": response("200 OK", "Content-Length: 1000", body=b"only this"),
    "/garbage": b"SSH-2.0-OpenSSH\r\n",
    "/moved": redirect("/clip.mp4"),
    "/elsewhere": redirect("http://both.example.com/clip.mp4"),
    "/metadata": redirect("http://169.254.169.254/latest/meta-data/"),
    "/inside": redirect("http://inside.example.com/clip.mp4"),
    "/file": redirect("file:///etc/passwd"),
    "/port": redirect("http://cdn.example.com:6379/"),
    "/user": redirect("http://me:secret@cdn.example.com/clip.mp4"),
    "/loop": redirect("/loop"),
    "/bad": redirect("http://[::1"),
}


class Net:
    """A resolver and a dialer of the test's own; all that is dialled leads to one server."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.dialled: list[tuple[str, int]] = []
        self.refused: set[str] = set()
        self.answers: dict[str, list[Sequence[str]]] = {}  # one after another, then RESOLVED

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        if self.answers.get(host):
            return self.answers[host].pop(0)
        return RESOLVED.get(host, [host])

    async def dial(
        self, address: str, port: int, timeout: float | None
    ) -> httpcore.AsyncNetworkStream:
        self.dialled.append((address, port))
        if address in self.refused:
            raise httpcore.ConnectError("refused")
        return await httpcore.AnyIOBackend().connect_tcp("127.0.0.1", self._port, timeout)


@asynccontextmanager
async def running_net() -> AsyncIterator[Net]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            path = head.split(b" ", 2)[1].decode()
            assert b"\r\nHost: " in head and b"cookie" not in head.lower()
            writer.write(PAGES.get(path, response("404 Not Found")))
            await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield Net(server.sockets[0].getsockname()[1])


@pytest.fixture
async def net() -> AsyncIterator[Net]:
    async with running_net() as net:
        yield net


async def fetch(
    net: Net,
    url: str,
    *domains: str,
    folder: Path | None = None,
    max_bytes: int = 10**6,
) -> bytes:
    got = bytearray()

    async def write(data: bytes) -> None:
        got.extend(data)

    fetcher = MediaFetcher(domains, folder, max_bytes=max_bytes, resolve=net.resolve, dial=net.dial)
    await fetcher.fetch(url, "here", write)
    return bytes(got)


@pytest.mark.parametrize(
    ("url", "domain", "dialled"),
    [
        ("http://cdn.example.com/clip.mp4", "cdn.example.com", [(PUBLIC, 80)]),
        ("http://CDN.Example.com./unmeasured", "cdn.example.com", [(PUBLIC, 80)]),
        ("http://cdn.example.com:443/clip.mp4", "*.example.com", [(PUBLIC, 443)]),
        ("http://cdn.example.com/moved", "*", [(PUBLIC, 80), (PUBLIC, 80)]),
        ("http://cdn.example.com/elsewhere", "*.example.com", [(PUBLIC, 80), (OTHER, 80)]),
        ("http://bücher.example.com/clip.mp4", "*.example.com", [(PUBLIC, 80)]),
        (f"http://{PUBLIC}/clip.mp4", PUBLIC, [(PUBLIC, 80)]),
        (f"http://[{OTHER}]/clip.mp4", "*", [(OTHER, 80)]),
    ],
)
async def test_what_is_allowed_is_fetched_from_the_address_that_was_checked(
    url: str, domain: str, dialled: list[tuple[str, int]], net: Net
) -> None:
    if url.endswith(".") or "com./" in url:
        net.answers["cdn.example.com."] = [[PUBLIC]]
    assert await fetch(net, url, domain) == VIDEO
    assert net.dialled == dialled


@pytest.mark.parametrize(
    "url",
    [
        "http://evil.com/clip.mp4",
        "http://example.com/clip.mp4",  # *.example.com is what is below it
        "http://notexample.com/clip.mp4",
        "http://cdn.example.com.evil.com/clip.mp4",
        "http://cdn.example.com@evil.com/clip.mp4",
        "http://me:secret@cdn.example.com/clip.mp4",
        "http://cdn.example.com:6379/",
        "http://cdn.example.com:22/",
        "https://cdn.example.com:8443/",
        "ftp://cdn.example.com/clip.mp4",
        "gopher://cdn.example.com/",
        "javascript:alert(1)",
        "http:///clip.mp4",
        "http://",
        "//cdn.example.com/clip.mp4",
        "http://[::1/",
        "http://cdn.example.com\\@evil.com/",
        "http://cdn.example.com\n.evil.com/",
        "vid_unknown",
        "",
    ],
)
async def test_what_is_not_allowed_is_not_even_resolved(url: str, net: Net) -> None:
    with pytest.raises(InvalidFieldsError) as refused:
        await fetch(net, url, "*.example.com")
    assert refused.value.problems[0].field == "here" and not net.dialled


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "2130706433",
        "0x7f.1",
        "127.1",
        "0.0.0.0",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "100.100.100.200",
        "192.0.0.192",
        "198.18.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "[::]",
        "[::1]",
        "[::ffff:127.0.0.1]",
        f"[::ffff:{PUBLIC}]",
        "[::7f00:1]",
        "[fe80::1]",
        "[fc00::1]",
        "[fec0::1]",
        "[ff02::1]",
        "[fd00:ec2::254]",
        "[64:ff9b::7f00:1]",
        "[64:ff9b:1::a9fe:a9fe]",
        "[2002:7f00:1::]",
        "[2001:0:7f00:1::]",
        "inside.example.com",
        "half.example.com",
        "nowhere.example.com",
    ],
)
async def test_nothing_is_dialled_that_is_not_public_whoever_is_allowed(
    host: str, net: Net
) -> None:
    with pytest.raises(InvalidFieldsError) as refused:
        await fetch(net, f"http://{host}/clip.mp4", "*")
    assert not net.dialled
    assert "fetched" in refused.value.message or "valid" in refused.value.message


@pytest.mark.parametrize(
    ("page", "num_dialled"),
    [
        ("metadata", 1),
        ("inside", 1),
        ("file", 1),
        ("port", 1),
        ("user", 1),
        ("bad", 1),
        ("loop", 4),
        ("gzip", 1),
        ("secret", 1),
        ("short", 1),
        ("garbage", 1),
        ("missing", 1),
    ],
)
async def test_what_comes_back_is_checked_like_the_first_url(
    page: str, num_dialled: int, net: Net
) -> None:
    with pytest.raises(InvalidFieldsError) as refused:
        await fetch(net, f"http://cdn.example.com/{page}", "*")
    assert net.dialled == [(PUBLIC, 80)] * num_dialled
    for word in ("169.254", "10.0.0.7", "swordfish", "SSH", "403", "404"):
        assert word not in refused.value.message


async def test_a_second_resolution_has_no_say(net: Net) -> None:
    """The name turns to an inner address as soon as it has been checked."""
    net.answers["cdn.example.com"] = [[PUBLIC], ["127.0.0.1"]]
    assert await fetch(net, "http://cdn.example.com/clip.mp4", "*") == VIDEO
    assert net.dialled == [(PUBLIC, 80)]
    with pytest.raises(InvalidFieldsError):  # and is checked anew with the next URL
        await fetch(net, "http://cdn.example.com/clip.mp4", "*")
    assert net.dialled == [(PUBLIC, 80)]


async def test_the_next_address_is_tried_where_one_does_not_answer(net: Net) -> None:
    net.refused = {OTHER}
    assert await fetch(net, "http://both.example.com/clip.mp4", "*") == VIDEO
    assert net.dialled == [(OTHER, 80), (PUBLIC, 80)]


async def test_what_is_announced_too_large_is_not_read(net: Net) -> None:
    with pytest.raises(UploadTooLargeError):
        await fetch(net, "http://cdn.example.com/huge", "*")


async def test_nothing_is_allowed_by_default(net: Net) -> None:
    for url in ("http://cdn.example.com/clip.mp4", "file:///etc/passwd"):
        with pytest.raises(InvalidFieldsError):
            await fetch(net, url)
    assert not net.dialled


@pytest.mark.parametrize("address", [PUBLIC, OTHER, "8.8.8.8", "2a00:1450:4001::1"])
def test_public_addresses_are_known(address: str) -> None:
    assert is_global(address)


# --- files ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "media"
    (folder / "a b").mkdir(parents=True)
    (folder / "a b" / "clip.mp4").write_bytes(VIDEO)
    (tmp_path / "secret").write_bytes(b"secret")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "out").symlink_to(tmp_path)
    (folder / "same").symlink_to(folder / "a b" / "clip.mp4")
    os.mkfifo(folder / "pipe")
    return folder


@pytest.mark.parametrize("prefix", ["file://", "file://localhost", "FILE://", "file:"])
async def test_files_of_the_folder_are_read(prefix: str, folder: Path, net: Net) -> None:
    url = f"{prefix}{folder}/a%20b/clip.mp4"
    assert await fetch(net, url, folder=folder) == VIDEO


@pytest.mark.parametrize(
    "path",
    [
        "{folder}/../secret",
        "{folder}/%2e%2e/secret",
        "{folder}/a%20b/../../secret",
        "{folder}/link",
        "{folder}/same",
        "{folder}/out/secret",
        "{folder}/pipe",
        "{folder}/a%20b",
        "{folder}",
        "{folder}/missing",
        "{folder}/clip%00.mp4",
        "{folder}2/clip.mp4",
        "{folder}/%ff",
        "/proc/self/environ",
        "/etc/passwd",
        "//evil.com{folder}/a%20b/clip.mp4",
    ],
)
async def test_no_other_file_is(path: str, folder: Path, net: Net) -> None:
    url = "file:" + ("" if path.startswith("//") else "//") + path.format(folder=folder)
    with pytest.raises(InvalidFieldsError, match="reads no such file"):
        await fetch(net, url, "*", folder=folder)
