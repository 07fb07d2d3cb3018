"""A service on loopback without keys, and a page of another site in a browser on the same machine:
under a name that leads there (DNS rebinding), or by requests across sites.
"""

from collections.abc import Iterator, Mapping

import httpx
import pytest

from app.api.connection.browsers import OPEN_TO_ANY_HOST, READING_METHODS
from app.store.keys import RedisKeys
from tests.app.api.connection.test_browsers import FOREIGN
from tests.integration.conftest import RedisServer
from tests.security.service import CLIP, Service, ask, running, upload
from tests.security.tally import Tally

HOSTS = "without keys: requests under a name of another's, on every path"
ORIGINS = "without keys: requests of other sites' pages, forms and text among them"
PAGES = ("/", "/docs", "/openapi.json", "/page/access.json", "/sample.mp4")
EVIL = "https://evil.example"
# What a browser says of a page of another site. The last is a page of another service's, on a port
# of the same machine.
SENDERS: tuple[Mapping[str, str], ...] = (
    {"Origin": EVIL},
    {"Origin": EVIL, "Sec-Fetch-Site": "cross-site"},
    {"Origin": "null"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Origin": "http://localhost.evil.example"},
    {"Origin": "http://localhost:1"},
)
# The kinds that a page may send anywhere without asking first.
SIMPLE = ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=b")
FORM = b'--b\r\nContent-Disposition: form-data; name="question"\r\n\r\na\r\n--b--\r\n'
QUESTION = b'{"question": "Whose?", "stream": false}'


@pytest.fixture(scope="module")
def keyless(
    redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("keyless")
    with running(redis_server.url, RedisKeys("keyless"), folder, names=()) as service:
        yield service


class Stored:
    """What a page of another site is after."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client
        self.video_id = upload(client)["video_id"]
        self.job_id = ask(client, self.video_id)["job_id"]
        self._before = self._state()

    def operations(self) -> Iterator[tuple[str, str]]:
        """Method and address of everything there is."""
        values = {"video_id": self.video_id, "file_id": self.video_id, "job_id": self.job_id}
        values |= {"model": "tiny", "index": "0"}
        for path, methods in self._client.get("/openapi.json").json()["paths"].items():
            for method in methods:
                yield method.upper(), path.format(**values) + f"?job_id={self.job_id}&token=0"
        for path in PAGES:
            yield "GET", path

    def is_untouched(self) -> bool:
        """Nothing is gone, and nothing has come."""
        return self._state() == self._before

    def _state(self) -> tuple[object, ...]:
        paths = (f"/v1/videos/{self.video_id}", f"/v1/jobs/{self.job_id}", "/v1/usage", "/v1/files")
        return tuple(self._client.get(path).json() for path in paths)


@pytest.fixture(scope="module")
def stored(keyless: Service) -> Stored:
    return Stored(keyless.stranger)


def is_refused(reply: httpx.Response, code: str) -> bool:
    """With its code, in either form."""
    return reply.status_code == 403 and f'"code":"{code}"' in reply.text.replace(" ", "")


def permissions(reply: httpx.Response) -> list[str]:
    """What lets a page of another site read an answer, or send what it must ask for first."""
    return [name for name in reply.headers if name.startswith("access-control-")]


def test_nothing_is_served_under_another_name(
    keyless: Service, stored: Stored, tally: Tally
) -> None:
    for method, url in [*stored.operations(), ("HEAD", "/")]:
        for host in FOREIGN:
            reply = keyless.stranger.request(method, url, headers={"Host": host})
            if url.partition("?")[0] in OPEN_TO_ANY_HOST:
                tells = stored.video_id in reply.text or stored.job_id in reply.text
                is_fine = reply.status_code == 200 and not tells
            else:
                is_fine = is_refused(reply, "host_not_allowed") or (
                    method == "HEAD" and reply.status_code == 403
                )
            tally.count(HOSTS, None if is_fine else f"{method} {url} as {host!r}: {reply.text}")
    assert stored.is_untouched()
    assert not keyless.has_failed_inside()
    tally.check(HOSTS)


def test_pages_of_other_sites_write_nothing_and_read_nothing(
    keyless: Service, stored: Stored, tally: Tally
) -> None:
    for method, url in stored.operations():
        for sender in SENDERS:
            reply = keyless.stranger.request(method, url, headers=sender)
            is_fine = not permissions(reply)
            if method not in READING_METHODS:
                is_fine = is_fine and is_refused(reply, "origin_not_allowed")
            tally.count(ORIGINS, None if is_fine else f"{method} {url} {sender}: {reply.text}")
        asked = {"Origin": EVIL, "Access-Control-Request-Method": method}
        reply = keyless.stranger.options(url, headers=asked)
        is_fine = not permissions(reply) and not reply.is_success
        tally.count(ORIGINS, None if is_fine else f"OPTIONS {url}: {reply.headers}")
    assert stored.is_untouched()
    tally.check(ORIGINS)


@pytest.mark.parametrize("kind", SIMPLE)
def test_what_a_page_may_send_without_asking_makes_nothing(
    kind: str, keyless: Service, stored: Stored, tally: Tally
) -> None:
    body = FORM if kind.startswith("multipart") else QUESTION
    video = FORM.replace(b'"question"', b'"video"; filename="a"').replace(
        b"a\r\n--b--", CLIP.read_bytes() + b"\r\n--b--"
    )
    for path in ("/v1/video/chat", "/v1/chat/completions", "/v1/videos", "/v1/files"):
        for content in (body, video):
            for sender in SENDERS:
                headers = {**sender, "Content-Type": kind}
                reply = keyless.stranger.post(path, content=content, headers=headers)
                is_fine = is_refused(reply, "origin_not_allowed") and not permissions(reply)
                tally.count(ORIGINS, None if is_fine else f"{path} {kind}: {reply.text}")
        if not kind.startswith("multipart"):  # nor by a browser that says nothing of the page
            reply = keyless.stranger.post(path, content=QUESTION, headers={"Content-Type": kind})
            is_fine = reply.status_code == 415 and not permissions(reply)
            tally.count(ORIGINS, None if is_fine else f"{path} {kind}: {reply.text}")
    assert stored.is_untouched()
    tally.check(ORIGINS)
