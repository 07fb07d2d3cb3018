"""What a page of another site can make a browser send, against a service without and with keys."""

from collections.abc import Collection, Mapping

import pytest
from starlette.types import Message, Receive, Scope, Send

from app.api.connection.browsers import BrowserGuard


async def status(
    headers: Mapping[str, str] | list[tuple[str, str]],
    *,
    method: str = "GET",
    path: str = "/v1/jobs/x",
    hosts: Collection[str] | None = None,
    origins: Collection[str] = (),
    has_keys: bool = False,
) -> int:
    """What a request gets: 200 where it reaches the application."""
    sent: list[Message] = []

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        sent.append(message)

    guard = BrowserGuard(
        application,
        allowed_hosts=hosts,
        allowed_origins=origins,
        has_keys=lambda: has_keys,
        count_rejection=lambda code: None,
    )
    pairs = list(headers.items()) if isinstance(headers, Mapping) else headers
    raw = [(name.lower().encode(), value.encode()) for name, value in pairs]
    scope = {"type": "http", "method": method, "path": path, "headers": raw}
    await guard(scope, receive, send)
    code: int = sent[0]["status"]
    return code


LOOPBACK = ["localhost", "localhost:8000", "LOCALHOST", "127.0.0.1:8000", "127.1.2.3", "[::1]:8000"]
FOREIGN = [
    "rebind.evil.example",
    "rebind.evil.example:8000",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "evil.example:127.0.0.1",
    "0.0.0.0:8000",
    "",
    "::1",
    "user@localhost",
]


@pytest.mark.parametrize("host", LOOPBACK)
async def test_keyless_service_goes_by_loopback_names(host: str) -> None:
    assert await status({"host": host}) == 200


@pytest.mark.parametrize("host", FOREIGN)
async def test_keyless_service_is_nobodys_by_another_name(host: str) -> None:
    for method in ("GET", "POST", "DELETE", "OPTIONS"):
        assert await status({"host": host}, method=method) == 403
    for path in ("/livez", "/readyz", "/metrics"):
        assert await status({"host": host}, path=path) == 200


async def test_request_without_a_host_is_nobodys() -> None:
    assert await status({}) == 403
    assert await status({}, has_keys=True) == 200


async def test_with_keys_and_no_list_any_host_will_do() -> None:
    assert await status({"host": "api.example.com"}, has_keys=True) == 200


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("api.example.com", 200),
        ("API.example.com:443", 200),
        ("a.b.example.org", 200),
        ("example.org", 403),
        ("evilexample.org", 403),
        ("localhost", 403),
        ("[2001:db8::1]:80", 200),
    ],
)
async def test_list_is_what_counts_with_keys_or_without(host: str, expected: int) -> None:
    hosts = ["api.example.com", "*.example.org", "[2001:db8::1]"]
    for has_keys in (False, True):
        assert await status({"host": host}, hosts=hosts, has_keys=has_keys) == expected
    assert await status({"host": host}, hosts=["*"]) == 200


HOST = {"host": "localhost:8000"}


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, 200),
        ({"origin": "http://localhost:8000"}, 200),
        ({"origin": "http://localhost:8000", "sec-fetch-site": "same-origin"}, 200),
        ({"sec-fetch-site": "none"}, 200),
        ({"origin": "http://localhost:3000"}, 403),
        ({"origin": "https://evil.example", "sec-fetch-site": "cross-site"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": ""}, 403),
        ({"origin": "file://localhost:8000"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
    ],
)
async def test_pages_of_other_sites_write_nothing(headers: dict[str, str], expected: int) -> None:
    for has_keys in (False, True):
        for method in ("POST", "DELETE", "PUT"):
            got = await status({**HOST, **headers}, method=method, has_keys=has_keys)
            assert got == expected, method
        assert await status({**HOST, **headers}, has_keys=has_keys) == 200, "they cannot read it"


async def test_allowed_origins_write() -> None:
    headers = {**HOST, "origin": "https://app.example", "sec-fetch-site": "cross-site"}
    assert await status(headers, method="POST", origins=["https://app.example"]) == 200
    assert await status(headers, method="POST", origins=["https://app.example:8443"]) == 403


async def test_request_whose_end_is_in_doubt_is_refused() -> None:
    both = {**HOST, "transfer-encoding": "chunked", "content-length": "5"}
    assert await status(both, method="POST") == 400
    assert await status([("host", "localhost"), ("host", "evil.example")]) == 400
    for codings in (["gzip, chunked"], ["identity", "chunked"], ["chunked", "chunked"], ["x"]):
        lines = [("transfer-encoding", coding) for coding in codings]
        assert await status([*HOST.items(), *lines], method="POST") == 400, codings
    assert await status({**HOST, "transfer-encoding": "Chunked"}, method="POST") == 200


async def test_upgrade_is_not_asked_for_with_a_body() -> None:
    asks = {**HOST, "connection": "keep-alive, Upgrade", "upgrade": "h2c"}
    assert await status({**asks, "content-length": "5"}, method="POST") == 400
    assert await status({**asks, "transfer-encoding": "chunked"}, method="POST") == 400
    assert await status({**asks, "content-length": "0"}, method="POST") == 200
    assert await status(asks) == 200, "it is answered without one"
    del asks["connection"]
    assert await status({**asks, "content-length": "5"}, method="POST") == 200, "it is not asked"
