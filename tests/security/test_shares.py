"""What one key can hold before any of its jobs is in the queue, and what is left to another key:
readers, answers, requests that are coming in, bytes of uploads.
"""

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

import httpx
import pytest

from app.store.keys import RedisKeys
from tests.integration.conftest import RedisServer
from tests.integration.test_service import wait_until
from tests.security.service import CLIP, PATIENCE_S, Service, ask, bearer, running, upload
from tests.security.tally import Tally

MAX_STREAMS = 8
MAX_UPLOADS = 24  # of an address, half of all
MAX_INCOMING_BYTES = 16 * 2**20  # four uploads of the largest size
NUM_QUESTIONS = 6
READERS = "one key keeps the frame readers busy: questions of another with frames to read"
ANSWERS = "one key holds all the open answers that it can: questions of another"
HEADERS = "one key holds all the requests of headers alone that it can: questions of another"
BYTES = "one key holds all the incoming bytes that it can: uploads of another"


@pytest.fixture(scope="module")
def shared(
    redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("shared")
    settings = {
        "DYCOKE_MAX_STREAMS": str(MAX_STREAMS),
        "DYCOKE_MAX_UPLOADS": str(2 * MAX_UPLOADS),
        "DYCOKE_MAX_UPLOADS_PER_CLIENT": str(MAX_UPLOADS),
        "DYCOKE_MAX_INCOMING_BYTES": str(MAX_INCOMING_BYTES),
        "DYCOKE_MAX_FRAME_READERS": "1",
    }
    with running(redis_server.url, RedisKeys("shares"), folder, **settings) as service:
        yield service


@pytest.fixture
def elsewhere(shared: Service) -> Iterator[httpx.Client]:
    """The other key, at another address."""
    transport = httpx.HTTPTransport(local_address="127.0.0.2")
    with httpx.Client(
        base_url=shared.url, headers=bearer("bob"), timeout=PATIENCE_S, transport=transport
    ) as client:
        yield client


def ask_all(client: httpx.Client, video_id: str, tally: Tally, row: str) -> None:
    """Asks with other frames each time."""
    for number in range(NUM_QUESTIONS):
        body = {"question": "What?", "video_id": video_id, "stream": False, "max_tokens": 2}
        answer = client.post("/v1/video/chat", json={**body, "start_s": number / 100})
        tally.count(row, None if answer.status_code == 200 else answer.text[:80])


def finish(service: Service, tally: Tally, row: str) -> None:
    assert not service.has_failed_inside()
    tally.check(row)


def test_another_keys_frames_are_read_beside_a_flood_of_reads(
    shared: Service, tally: Tally
) -> None:
    mine, others = (upload(client)["video_id"] for client in (shared.alice, shared.bob))

    def flood(number: int) -> None:
        for place in range(3):
            start_s = 0.5 + (3 * number + place) / 100
            ask(shared.alice, mine, num_frames=64, start_s=start_s)

    with ThreadPoolExecutor(MAX_STREAMS) as threads:
        floods = [threads.submit(flood, number) for number in range(MAX_STREAMS - 1)]
        ask_all(shared.bob, others, tally, READERS)
        for each in floods:
            each.result()
    finish(shared, tally, READERS)


def test_readers_of_one_keys_events_leave_room_for_another(shared: Service, tally: Tally) -> None:
    mine, others = (upload(client)["video_id"] for client in (shared.alice, shared.bob))
    body = {"question": "sleep:0.5", "video_id": mine, "max_tokens": 200}
    with ExitStack() as stack:
        first = stack.enter_context(shared.alice.stream("POST", "/v1/video/chat", json=body))
        job = f"/v1/jobs/{first.headers['x-job-id']}"
        for _ in range(MAX_STREAMS - 1):
            stack.enter_context(shared.alice.stream("GET", f"{job}/events"))
        assert shared.alice.get(f"{job}/events").json()["code"] == "too_many_streams"
        ask_all(shared.bob, others, tally, ANSWERS)
        shared.alice.delete(job)
    finish(shared, tally, ANSWERS)


def connect(service: Service, length: int) -> socket.socket:
    """The headers of an upload."""
    connection = socket.create_connection(("127.0.0.1", service.port))
    connection.sendall(
        "\r\n".join(
            [
                "POST /v1/videos HTTP/1.1",
                "host: localhost",
                f"authorization: {bearer('alice')['Authorization']}",
                "content-type: multipart/form-data; boundary=b",
                f"content-length: {length}",
                "\r\n",
            ]
        ).encode()
    )
    return connection


def test_requests_with_headers_alone_leave_room_for_another(
    shared: Service, elsewhere: httpx.Client, tally: Tally
) -> None:
    video_id = upload(shared.bob)["video_id"]
    with ExitStack() as stack:

        def is_full() -> bool:
            stack.enter_context(closing(connect(shared, 1000)))
            return shared.alice.post("/v1/video/chat", json={}).status_code == 429

        wait_until(is_full)
        ask_all(elsewhere, video_id, tally, HEADERS)
    finish(shared, tally, HEADERS)


def test_uploads_that_do_not_end_leave_room_for_another(
    shared: Service, elsewhere: httpx.Client, tally: Tally
) -> None:
    """They send all but their last bytes at once, as many as are taken."""
    head = b'--b\r\ncontent-disposition: form-data; name="video"; filename="a"\r\n\r\n'
    content = (head + CLIP.read_bytes()).ljust(4 * 2**20 - 2**16, b"\0")

    def upload_some(client: httpx.Client) -> int:
        clip = CLIP.read_bytes().ljust(3 * 2**20, b"\0")
        return client.post("/v1/videos", files={"video": clip}).status_code

    with ExitStack() as stack:

        def is_full() -> bool:
            connection = stack.enter_context(closing(connect(shared, 4 * 2**20)))
            connection.settimeout(PATIENCE_S)
            try:
                connection.sendall(content)
            except ConnectionError:
                return True  # it was sent away
            return upload_some(shared.alice) == 429

        wait_until(is_full)
        for _ in range(2):
            status = upload_some(elsewhere)
            tally.count(BYTES, None if status == 201 else f"got a {status}")
    finish(shared, tally, BYTES)
